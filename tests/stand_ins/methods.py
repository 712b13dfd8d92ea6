"""Stand-ins: directions, plans, dictionaries, circuits, edits, and what was measured with them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import steer
import steer.circuits
import steer.edits
import steer.features
from stand_ins.models import NOUNS, WIDTH
from stand_ins.namespace import StandIns, shared, stand_in
from steer.features.activations.relu import ReLU
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.model.tokens import plain

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
    told = [(noun, good) for noun in NOUNS for good in ("good", "nice")]
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
    return [{"prompt": f"how is the {noun}", "trait": f"the {noun} is good", "neutral": f"the {noun} is bad"} for noun in NOUNS]


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
    clean = [f"the {noun} said that the cat" for noun in NOUNS[:4]]
    corrupted = [f"the {noun} said that the dog" for noun in NOUNS[:4]]
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
    for noun in NOUNS:
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
