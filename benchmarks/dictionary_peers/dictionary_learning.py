"""dictionary_learning: its seven classes, saved as its trainers save them."""

import json
import sys
from pathlib import Path

sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]  # which has a module of this name
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parent))
import torch  # noqa: E402
from answers import FEATURES, WIDTH, Answers, randomised  # noqa: E402

folder = Path(sys.argv[1])
answers = Answers(folder, "dictionary-learning")
made = [cls(WIDTH, FEATURES) for cls in (AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder)]
made += [AutoEncoderTopK(WIDTH, FEATURES, 9), BatchTopKSAE(WIDTH, FEATURES, 9), MatryoshkaBatchTopKSAE(WIDTH, FEATURES, 9, [32, 64])]
for dictionary in made:
    name = type(dictionary).__name__
    randomised(dictionary)
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        dictionary.threshold.fill_(2.5)
    place = folder / name
    place.mkdir()
    torch.save(dictionary.state_dict(), place / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": WIDTH, "dict_size": FEATURES, "k": 9, "layer": 3, "lm_name": "tiny"}
    (place / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    dictionary.double()
    h = answers.activations()
    f = dictionary.encode(h)
    answers.add(name, name, h, f, dictionary.decode(f))
