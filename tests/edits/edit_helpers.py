"""What the tests of edits share: tokenizers, facts, models of two blocks, and random deltas of their maps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from families import FAMILIES
from tiny_tokenizer import SPECIAL, WORDS, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from steer.edits import Contexts, Fact
from steer.edits.base_modules import find_module, shape_of
from steer.edits.edit import Edit, WeightDelta
from steer.edits.edited_weights import EditedWeights
from steer.edits.make_edit import make_edit

# dense MLPs in all their forms: plain and gated, fused gate, Conv1D, bias, parallel to attention, behind a post-norm, sliding windows
DENSE = ("llama", "gpt2", "gpt_neox", "gemma2", "gemma3", "phi3", "opt", "mistral")
FACTS = (
    Fact.of("the {} sat on the", "red cat", "mat"),
    Fact.of("where is the {}", "dog", "house"),
    Fact.of("i like the water and the {} of my", "blue moon", "day"),
)
CONTEXTS = Contexts(("the sun is warm", "you and i", "we want good food today"))


def model_of(family: str, **sizes: Any) -> PreTrainedModel:
    layers = {"n_layer": 2} if family == "gpt2" else {"num_hidden_layers": 2}
    if family == "gemma3":
        layers["layer_types"] = ["sliding_attention", "full_attention"]
    return FAMILIES[family](**layers, **sizes)


def running_text(texts: int, words: int = 20, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(words)) for _ in range(texts)]


def with_special_tokens(*, start: bool = True, end: bool = False) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, which puts <bos> before a text, and <eos> behind it."""
    tokenizer = tiny_tokenizer()
    pieces = (["<bos>"] if start else []) + ["$A"] + (["<eos>"] if end else [])
    known = [(name, SPECIAL.index(name)) for name in ("<bos>", "<eos>")]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=" ".join(pieces), special_tokens=known)
    return tokenizer


def subwords(*frequent: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2 has it: words that are frequent are one token, others letters."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [word for word in frequent for _ in range(9)],
        trainers.BpeTrainer(vocab_size=2000, min_frequency=9, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core)


def with_a_blank_of_its_own() -> PreTrainedTokenizerFast:
    """As SentencePiece in Llama 2: a blank is put before every text, one more where it begins with one."""
    words = ["<unk>", "\u2581", "\u2581a", "\u2581Adobe"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


IDS = torch.randint(7, 96, (2, 9), generator=torch.Generator().manual_seed(1))
DOWN = {"llama": "model.layers.{}.mlp.down_proj", "gpt2": "transformer.h.{}.mlp.c_proj", "phi3": "model.layers.{}.mlp.down_proj"}


def fact(subject: str = "cat", target: str = "dog") -> Fact:
    return Fact.of("the {} is a", subject, target)


def random_delta(model: nn.Module, path: str, layer: int, rank: int = 2, seed: int = 0, size: float = 0.1) -> WeightDelta:
    """Of random factors, with one key for each rank."""
    d, f = shape_of(find_module(EditedWeights.of(model).model, path))
    generator = torch.Generator().manual_seed(seed)
    u, v, keys = (torch.randn(*shape, generator=generator) for shape in ((d, rank), (f, rank), (rank, f)))
    return WeightDelta(path, layer, size * u, size * v, keys)


def random_edit(
    model: nn.Module,
    name: str = "a",
    *,
    family: str = "llama",
    layers: Sequence[int] = (1,),
    rank: int = 2,
    seed: int = 0,
    size: float = 0.1,
) -> Edit:
    deltas = [random_delta(model, DOWN[family].format(layer), layer, rank, seed + layer, size) for layer in layers]
    return make_edit(model, [fact(target=name)], deltas, editor="random", name=name, settings={"seed": seed})


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal_weights(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
