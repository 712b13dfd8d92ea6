"""Stand-ins: models, tokenizers, texts, and what trains a model."""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any

import torch
import transformers
from callback_helpers import Module, loader
from callback_helpers import examples as training_rows
from drift.drift_helpers import batch as training_batch
from drift.drift_helpers import prompts as some_rows
from edits.edit_helpers import subwords
from families import FAMILIES
from own_models import TinyGPT
from tiny_tokenizer import CHAT_TEMPLATE, SPECIAL, WORDS
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from stand_ins.namespace import MAKERS, StandIns, stand_in
from steer.model.load import _TOKENIZERS

WIDTH = 36
MODEL_SIZES = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": WIDTH,
    "max_position_embeddings": 512,
}
ONE_TOKEN = (*WORDS, *"he she him her said person nurse carpenter tell Paris Rome France".split())  # with the blank before them

for shown_as, module_name in {"pl": "pytorch_lightning", "peft": "peft", "np": "numpy"}.items():
    MAKERS[shown_as] = lambda names, module_name=module_name: importlib.import_module(module_name)


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
        for noun, adjective, other in zip(NOUNS, ADJECTIVES, NOUNS[3:] + NOUNS, strict=False)
    ]


@stand_in
def other_texts(names: StandIns) -> list[str]:
    return [f"we want {adjective} water for the {noun} today" for noun, adjective in zip(NOUNS, ADJECTIVES, strict=True)]


NOUNS = ["cat", "dog", "mat", "house", "tree", "food", "water", "sun"]
ADJECTIVES = ["good", "nice", "warm", "big", "small", "red", "blue", "green"]


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
