"""What the examples of the documentation take for granted: `model`, `tokenizer`, `direction`, `plan`, ..., tiny and made on first use.

One namespace for the pages of docs/ and for the examples of docstrings. The model has as many blocks and heads as the embedded one, so that
its sites and heads can be named, and common words are one token.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from bias.bias_helpers import write_crows
from callback_helpers import Module, loader
from callback_helpers import examples as training_rows
from drift.drift_helpers import batch as training_batch
from drift.drift_helpers import prompts as some_rows
from edits.edit_helpers import subwords
from families import FAMILIES
from own_models import TinyGPT
from tiny_tokenizer import CHAT_TEMPLATE, SPECIAL, WORDS
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import steer
import steer.bias
import steer.callbacks
import steer.circuits
import steer.edits
import steer.features
import steer.lens
import steer.report
from steer.features.activations.relu import ReLU
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.model.load import _TOKENIZERS
from steer.model.tokens import plain
from steer.registry import REGISTRIES

WIDTH = 36
MODEL_SIZES = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": WIDTH,
    "max_position_embeddings": 512,
}
ONE_TOKEN = (*WORDS, *"he she him her said person nurse carpenter tell Paris Rome France".split())  # with the blank before them
MAKERS: dict[str, Callable[[StandIns], Any]] = {}


class StandIns(dict[str, Any]):
    """Names of an example: those that it assigns, stand-ins, and the public names of `packages`.

    Its attribute is a dict of globals: a name that is not in it is made, or looked up, when the code first says it.
    """

    def __init__(self, *packages: ModuleType) -> None:
        super().__init__(steer=steer, torch=torch, copy=copy)
        self._packages = (*packages, steer, steer.callbacks)

    def __missing__(self, name: str) -> Any:
        if name in MAKERS:
            self[name] = MAKERS[name](self)
            return self[name]
        for package in self._packages:
            if name in package.__all__:
                return getattr(package, name)
        raise KeyError(name)


def stand_in(make: Callable[[StandIns], Any]) -> Callable[[StandIns], Any]:
    """Makes the name of a function one of the namespace."""
    MAKERS[make.__name__] = make
    return make


def shared(make: Callable[[StandIns], Any]) -> Callable[[StandIns], Any]:
    """A stand-in that takes time and that no example changes: made once in a process, of stand-ins of its own."""
    once = functools.cache(lambda: make(StandIns(steer.circuits, steer.edits)))
    MAKERS[make.__name__] = lambda names: once()
    return MAKERS[make.__name__]


for shown_as, module_name in {"pl": "pytorch_lightning", "peft": "peft", "np": "numpy"}.items():
    MAKERS[shown_as] = lambda names, module_name=module_name: importlib.import_module(module_name)


def keep_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an example registers is gone after the test."""
    for registry in list(REGISTRIES.values()):
        registry.load()  # one may bring others
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


# ---- model and texts


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = subwords(*(f" {word}" for word in ONE_TOKEN))
    ends = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer.add_special_tokens({**ends, "additional_special_tokens": SPECIAL[4:]})
    tokenizer.model_max_length = 512
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@functools.cache
def _model() -> LlamaForCausalLM:
    ids = {f"{name}_token_id": getattr(_tokenizer(), f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return FAMILIES["llama"](**MODEL_SIZES, **ids, vocab_size=len(_tokenizer()))


_last: list[Any] = []  # the model of the example before, whose sites are proven already


@stand_in
def model(names: StandIns) -> Any:
    if not _last or not _is_as_new(_last[0]):
        _last[:] = [copy.deepcopy(_model())]
    _TOKENIZERS[_last[0]] = names["tokenizer"]  # as `steer.load` does
    return _last[0]


def _is_as_new(model: Any) -> bool:
    """No example has changed, wrapped or hooked it."""
    new, state = _model().state_dict(), model.state_dict()
    if any(module.training or module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return False
    if any(parameter.grad is not None or not parameter.requires_grad for parameter in model.parameters()):
        return False
    return new.keys() == state.keys() and all(torch.equal(new[name], state[name]) for name in new)


@stand_in
def own_model(names: StandIns) -> Any:
    """A GPT of the user's own, which transformers does not know."""
    return TinyGPT()


@stand_in
def base(names: StandIns) -> Any:
    return names["model"]


@stand_in
def tuned(names: StandIns) -> Any:
    """The model after a step of training."""
    made = copy.deepcopy(names["model"])
    train(made)
    return made


@stand_in
def tokenizer(names: StandIns) -> Any:
    return copy.deepcopy(_tokenizer())


@stand_in
def texts(names: StandIns) -> list[str]:
    return [
        f"the {noun} is {adjective} and the {other} sat on it"
        for noun, adjective, other in zip(_NOUNS, _ADJECTIVES, _NOUNS[3:] + _NOUNS, strict=False)
    ]


@stand_in
def other_texts(names: StandIns) -> list[str]:
    return [f"we want {adjective} water for the {noun} today" for noun, adjective in zip(_NOUNS, _ADJECTIVES, strict=True)]


_NOUNS = ["cat", "dog", "mat", "house", "tree", "food", "water", "sun"]
_ADJECTIVES = ["good", "nice", "warm", "big", "small", "red", "blue", "green"]


@stand_in
def rows(names: StandIns) -> Any:
    return some_rows(8)


@stand_in
def probe(names: StandIns) -> Any:
    return some_rows(8, seed=1)


MAKERS["prompts"] = rows


@stand_in
def prompt(names: StandIns) -> Any:
    return names["tokenizer"]("the cat sat on the", return_tensors="pt", return_token_type_ids=False)


@stand_in
def batch(names: StandIns) -> Any:
    made = training_batch(0)
    return {**made, "completion_mask": (made["labels"] != -100).long()}


# ---- training


def train(model: Any, optimizer: Any = None) -> None:
    """A step on a batch."""
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(**training_batch(0)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


MAKERS["train"] = lambda names: train


@stand_in
def optimizer(names: StandIns) -> Any:
    return torch.optim.SGD(names["model"].parameters(), lr=0.01)


@stand_in
def module(names: StandIns) -> Any:
    return Module(names["model"])


@stand_in
def trainer(names: StandIns) -> Any:
    """Of transformers, for two steps."""
    options = {
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    arguments = transformers.TrainingArguments("trained", use_cpu=True, **options)
    return transformers.Trainer(names["model"], arguments, train_dataset=training_rows())


@stand_in
def batches(names: StandIns) -> Any:
    return loader()


# ---- directions, plans, features


@stand_in
def vector(names: StandIns) -> Any:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)) / 3


@stand_in
def direction(names: StandIns) -> Any:
    return names["directions"].best()


@stand_in
def plan(names: StandIns) -> Any:
    return steer.Plan(steer.Intervention(steer.Add(names["vector"]), "layers.12.output"))


@stand_in
def contrast(names: StandIns) -> Any:
    return _contrast(names, "how is the {}")


@stand_in
def held_out(names: StandIns) -> Any:
    """Pairs that had no part in `directions`."""
    return _contrast(names, "tell i how the {} is")


def _contrast(names: StandIns, question: str) -> Any:
    told = [(noun, good) for noun in _NOUNS for good in ("good", "nice")]
    answers = [{"positive": f"the {noun} is {good}", "negative": f"the {noun} is bad"} for noun, good in told]
    return steer.ContrastSet.from_pairs(
        names["tokenizer"],
        [{"prompt": question.format(noun) + f" {good}", **pair} for (noun, good), pair in zip(told, answers, strict=True)],
    )


@stand_in
def neutral(names: StandIns) -> Any:
    return [plain(names["tokenizer"], text) for text in names["other_texts"]]


@stand_in
def harmless(names: StandIns) -> Any:
    return [plain(names["tokenizer"], text) for text in names["texts"]]


@stand_in
def labelled(names: StandIns) -> Any:
    return steer.LabelledTexts.from_texts(names["tokenizer"], names["texts"] + names["other_texts"], [0] * 8 + [1] * 8)


@shared
def directions(names: StandIns) -> Any:
    return steer.extract(names["model"], names["contrast"], ["layers.12.output", "layers.16.output"], name="kind", progress=False)


@stand_in
def dictionary(names: StandIns) -> Any:
    return _autoencoder("layers.12.output")


@stand_in
def later_dictionary(names: StandIns) -> Any:
    return _autoencoder("layers.13.output")


def _autoencoder(at: str) -> Any:
    """Of 64 features."""
    read, bias, write, center = (
        torch.randn(size, generator=torch.Generator().manual_seed(8)) for size in ((64, WIDTH), 64, (64, WIDTH), WIDTH)
    )
    encoder = steer.features.Encoder(steer.features.InMemory(read), bias - 1, ReLU())
    site = (steer.Site.parse(at),)
    rows = steer.features.InMemory(torch.nn.functional.normalize(write, dim=1))
    own = SparseAutoencoder(encoder, rows, center, steer.features.Origin(site, site))
    own.density, own.maxima = torch.full((64,), 0.1), torch.full((64,), 4.0)
    return own


@stand_in
def items(names: StandIns) -> Any:
    return [{"prompt": f"how is the {noun}", "trait": f"the {noun} is good", "neutral": f"the {noun} is bad"} for noun in _NOUNS]


@stand_in
def tracker(names: StandIns) -> Any:
    return steer.DriftTracker({"kind": names["direction"]}, probe=names["probe"], controls=4)


@shared
def result(names: StandIns) -> Any:
    return steer.compare(names["model"], {"plain": None, "warm": names["plan"]}, "logprob_gap", names["items"], better="higher")


@stand_in
def engine(names: StandIns) -> Any:
    """Of vLLM or its like."""
    return SimpleNamespace(load_weights=list)


@stand_in
def folder_of_pyvene(names: StandIns) -> Path:
    from directions.test_foreign import ADDITION, addition, pyvene

    return pyvene(Path("pyvene"), (2, "block_output", ADDITION, addition(2)))


# ---- circuits


@stand_in
def pairs(names: StandIns) -> Any:
    clean = [f"the {noun} said that the cat" for noun in _NOUNS[:4]]
    corrupted = [f"the {noun} said that the dog" for noun in _NOUNS[:4]]
    return steer.circuits.Pairs.of(names["model"], clean, corrupted)


@stand_in
def target(names: StandIns) -> Any:
    he, she = (names["tokenizer"].encode(word)[0] for word in (" he", " she"))
    return steer.LogitDifference(he, she)


@shared
def scores(names: StandIns) -> Any:
    return steer.circuits.attribute(names["model"], names["pairs"], names["target"], progress=False)


@shared
def circuit(names: StandIns) -> Any:
    model = names["model"]
    return names["scores"].top_nodes(5).with_ablation(steer.circuits.mean_ablation(model, names["texts"]))


@stand_in
def labels(names: StandIns) -> list[int]:
    """The token that should follow each of `pairs` after a swap."""
    return [names["tokenizer"].encode(word)[0] for word in (" mat", " house") * 2]


# ---- files that an example reads


def write_crows_pairs(path: Path) -> None:
    pairs = [
        ("the nurse said her name", "the nurse said his name", "stereo", "gender"),
        ("she is small", "he is small", "antistereo", "gender"),
    ]
    write_crows(path, pairs)


def write_winogender(path: Path) -> None:
    sentences = [f"nurse.someone.1.{gender}.txt\tthe nurse said that {who} is good" for gender, who in (("male", "he"), ("female", "she"))]
    path.write_text("\n".join(["sentid\tsentence", *sentences]), encoding="utf-8")


def write_counterfact(path: Path) -> None:
    from edits.test_records import FULL

    path.write_text(json.dumps([FULL]), encoding="utf-8")


FILES: dict[str, Callable[[Path], None]] = {
    "counterfact.json": write_counterfact,
    "crows_pairs_anonymized.csv": write_crows_pairs,
    "all_sentences.tsv": write_winogender,
}


# ---- edits


@stand_in
def fact(names: StandIns) -> Any:
    return steer.Fact.of("the {} sat on the", "red cat", "mat", true="house")


@stand_in
def facts(names: StandIns) -> Any:
    return [names["fact"], steer.Fact.of("where is the {}", "dog", "house", true="mat")]


@stand_in
def records(names: StandIns) -> Any:
    neighbours = {"red cat": ("the dog sat on the",), "dog": ("where is the tree",)}
    return [
        steer.edits.FactRecord(fact, paraphrases=(f"today {fact.prompt}",), neighbours=neighbours[fact.subject]) for fact in names["facts"]
    ]


@shared
def covariance(names: StandIns) -> Any:
    texts = [" ".join(names["texts"] + names["other_texts"])[start:] for start in range(0, 300, 5)]
    return steer.edits.Covariance.fit(names["model"], names["tokenizer"], texts, layers=[4, 5, 6, 7, 8], progress=None)


@shared
def known(names: StandIns) -> Any:
    """Facts that the model knows: what it says."""
    model, tokenizer = names["model"], names["tokenizer"]
    facts = []
    for noun in _NOUNS:
        ids = torch.tensor([tokenizer.encode(f"the {noun} sat on the")])
        said = int(model(ids).logits[0, -1].argmax())
        word = tokenizer.decode([said]).strip()
        if tokenizer.encode(f" {word}") == [said]:
            facts.append(steer.Fact.of("the {} sat on the", noun, word))
    return facts[:2]


@stand_in
def contexts(names: StandIns) -> Any:
    return steer.edits.Contexts(("the sun is warm", "you and i"))


@shared
def edit(names: StandIns) -> Any:
    how = {"editor": "rome", "layers": [8], "covariance": names["covariance"], "contexts": names["contexts"]}
    return steer.edit_facts(names["model"], names["tokenizer"], names["fact"], **how)


@shared
def evaluation(names: StandIns) -> Any:
    how = {"layers": [8], "covariance": names["covariance"], "contexts": names["contexts"]}
    return steer.edits.evaluate_edits(names["model"], names["tokenizer"], names["records"], "rome", **how)


@shared
def traced(names: StandIns) -> Any:
    return steer.causal_trace(names["model"], names["tokenizer"], names["known"], samples=2, progress=False)
