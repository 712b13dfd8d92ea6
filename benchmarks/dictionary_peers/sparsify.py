"""sparsify: top-k and group-wise maximum, autoencoders, transcoders, skip connections."""

import sys
from pathlib import Path

sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]  # which has a module of this name
import sparsify  # noqa: E402
from sparsify.config import SparseCoderConfig  # noqa: E402
from sparsify.sparse_coder import SparseCoder  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parent))
import torch  # noqa: E402
from answers import FEATURES, WIDTH, Answers, randomised  # noqa: E402

assert sparsify
folder = Path(sys.argv[1])
answers = Answers(folder, "eai-sparsify")
kinds = {
    "topk": {},
    "groupmax": {"activation": "groupmax", "k": 8},
    "expansion_factor": {"num_latents": 0, "expansion_factor": 6},
    "transcoder": {"transcode": True},
    "skip_transcoder": {"transcode": True, "skip_connection": True},
}
for name, options in kinds.items():
    coder = SparseCoder(WIDTH, SparseCoderConfig(**{"num_latents": FEATURES, "k": 9, **options}))
    randomised(coder)
    place = f"{name}/layers.3{'.mlp' if 'transcoder' in name else ''}"
    coder.save_to_disk(folder / place)
    coder = SparseCoder.load_from_disk(folder / place).double()
    h = answers.activations()
    encoded = coder.encode(h)
    f = torch.zeros(len(h), coder.num_latents, dtype=torch.float64).scatter(1, encoded.top_indices, encoded.top_acts)
    # its decoder may be a kernel for other devices and dtypes: the sum that stands in its fallback
    out = torch.nn.functional.embedding_bag(encoded.top_indices, coder.W_dec, per_sample_weights=encoded.top_acts, mode="sum") + coder.b_dec
    answers.add(name, place, h, f, out + (h @ coder.W_skip.mT if coder.W_skip is not None else 0))
