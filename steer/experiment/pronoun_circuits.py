"""Circuits of an experiment on pronouns, found and learned on occupations of their own, and kept in its folder."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steer.bias.scoring import Scorer
from steer.circuits import (
    Ablation,
    Circuit,
    ComponentScores,
    KeepKL,
    KeepTarget,
    LogitDifference,
    Pairs,
    Shift,
    attribute,
    learn_circuit,
    mean_ablation,
)
from steer.errors import ConfigError
from steer.experiment.data import DataSet
from steer.model.anatomy import Anatomy
from steer.model.devices import input_device
from steer.model.precision import FLOAT32, products_in
from steer.model.tokens import Row, plain

OCCUPATION = "{occupation}"
LENGTH = 128  # tokens of a row of running text
MOST_WORDS = 20  # occupations that are attributed
ATTRIBUTION, GATES = BY = ("attribution", "gates")
GATE_SETTINGS = {
    "steps": 64, "lr": 0.04, "keep": 0.6, "keep_weight": 0.3, "side": 0.5, "kl_weight": 5.0, "shifts": 20, "facts": 8, "texts": 2,
    "head_sparsity": 0.02, "neuron_sparsity": 0.0005, "seed": 0,
}  # fmt: skip


@dataclass(eq=False)
class PronounCircuits:
    """Makes circuits of what a model says of occupations and pronouns.

    Attributes:
        data: the splits that `splits` names: occupations, sentences with {occupation} cut before a pronoun, words that state a gender, and
            running text for constants and for learning. What is reported is in none of them.
        baseline: the word that shifts are measured from.
        folder: where finished circuits are kept; None to make them anew.
        say: told what is being made.
        precision: of the passes for means and learned gates, see `steer.model.precision`.
    """

    model: nn.Module
    tokenizer: Any
    data: DataSet
    splits: Mapping[str, str]
    baseline: str = "person"
    folder: Path | None = None
    say: Callable[[str], None] = lambda text: None
    precision: str = FLOAT32
    _made: dict[str, Circuit] = field(default_factory=dict, repr=False)
    _tokens: dict[str, int] = field(default_factory=dict, repr=False)  # of pronouns, asked for in every prompt

    def circuit(self, by: str, settings: Mapping[str, Any]) -> Circuit:
        """By attribution (`nodes`, `method`) or learned gates (see `GATE_SETTINGS`); from the folder where it was made before."""
        key = self._key(by, settings)
        if key not in self._made:
            kept = None if self.folder is None else self.folder / f"{by}-{key[:12]}"
            if kept is not None and kept.exists():
                self._made[key] = Circuit.load(kept)
            else:
                self.say(f"by {by}, on {len(self.occupations)} occupations")
                self._made[key] = self._found(**settings) if by == ATTRIBUTION else self._learned({**GATE_SETTINGS, **settings})
                if kept is not None:
                    self._made[key].save(kept)
                self.say(repr(self._made[key]))
        return self._made[key]

    def to_dict(self) -> dict[str, Any]:
        """What is said of them in metrics.json: what each ablates, and the strongest edges of the attribution as a graph."""
        drawing = self.scores.drawing()
        nodes = [{"kind": node.kind, "site": node.site, "part": node.part} for node in drawing.nodes]
        graph = {"nodes": nodes, "scores": drawing.scores.tolist(), "edges": drawing.edges.tolist(), "weights": drawing.weights.tolist()}
        return {"made": [_said(circuit) for circuit in self._made.values()], "graph": graph}

    def digest(self) -> str:
        """SHA-256 of all that circuits are made from but the model."""
        return self.data.digest(*sorted(self.splits.values()))

    def _key(self, by: str, settings: Mapping[str, Any]) -> str:
        made_of = {"by": by, "settings": dict(settings), "data": self.digest(), "model": Anatomy.find(self.model).fingerprint()}
        if self.precision != FLOAT32:
            made_of["precision"] = self.precision
        return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()

    # ---- texts

    def rows(self, what: str) -> list[dict[str, str]]:
        return self.data.split(self.splits[what])

    @cached_property
    def occupations(self) -> list[str]:
        return [row["text"] for row in self.rows("occupations")]

    def running(self, what: str) -> list[Row]:
        """Running text in rows of `LENGTH` tokens."""
        rows = [plain(self.tokenizer, row["text"]) for row in self.rows(what)]
        return [Row(row.ids[start : start + LENGTH], 0) for row in rows for start in range(0, len(row.ids) - LENGTH // 2, LENGTH)]

    @cached_property
    def ablation(self) -> Ablation:
        """Means over text that is used for nothing else."""
        with products_in(self.precision, input_device(self.model)):
            return mean_ablation(self.model, self.running("constants"))

    def _token(self, word: str) -> int:
        if word in self._tokens:
            return self._tokens[word]
        ids = self.tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise _no_token(word, ids)
        return self._tokens.setdefault(word, ids[0])

    # ---- attribution

    @cached_property
    def scores(self) -> ComponentScores:
        """Edges and nodes of |shift| by EAP-IG, over the occupations of as many tokens as the baseline."""
        rows = self.rows("sentences")[:2]
        length = len(self.tokenizer(f" {self.baseline}", add_special_tokens=False).input_ids)
        fitting = [word for word in self.occupations if len(self.tokenizer(f" {word}", add_special_tokens=False).input_ids) == length]
        fitting = random.Random(0).sample(fitting, min(len(fitting), MOST_WORDS))
        clean = [row["text"].replace(OCCUPATION, word) for row in rows for word in fitting]
        corrupted = [row["text"].replace(OCCUPATION, self.baseline) for row in rows for _ in fitting]
        pronouns = [(row["male"], row["female"]) for row in rows for _ in fitting]
        scorer = Scorer(self.model, self.tokenizer, progress=False)
        shifts = scorer.log_odds(clean, pronouns) - scorer.log_odds(corrupted, pronouns)
        # what is attributed is the size of the shift: the pronoun that it leads to comes first
        ordered = [both if shift > 0 else both[::-1] for both, shift in zip(pronouns, shifts.tolist(), strict=True)]
        first, second = ([self._token(both[side]) for both in ordered] for side in (0, 1))
        pairs = Pairs.of(self.model, clean, corrupted, tokenizer=self.tokenizer)
        return attribute(self.model, pairs, LogitDifference(first, second))

    def _found(self, nodes: int = 5) -> Circuit:
        return self.scores.top_nodes(nodes).with_ablation(self.ablation)

    # ---- learned gates

    def _learned(self, settings: Mapping[str, Any]) -> Circuit:
        """Gates on all heads and neurons: shift^2, predictions on running text kept, and what words of a gender say."""
        graph = self.scores.graph
        nodes = torch.tensor([float(writer.kind == "head") for writer in graph.writers], dtype=torch.float64)
        anatomy = Anatomy.find(self.model)
        width = {layer: anatomy.point(f"layers.{layer}.mlp.neurons").width for layer in range(len(graph.layers))}
        neurons = {layer: torch.ones(size or 0, dtype=torch.float64) for layer, size in width.items()}
        candidates = Circuit(graph, nodes, neurons=neurons, facts={"model": anatomy.fingerprint()})
        return learn_circuit(
            self.model,
            self._terms(settings),
            candidates,
            ablation=self.ablation,
            steps=settings["steps"],
            lr=settings["lr"],
            start=0.0,
            sparsity={"head": settings["head_sparsity"], "neuron": settings["neuron_sparsity"]},
            seed=settings["seed"],
            precision=self.precision,
        )

    def _terms(self, settings: Mapping[str, Any]) -> list[Any]:
        chooser = random.Random(settings["seed"])
        sentences = self.rows("sentences")
        asked = [(word, row) for word in self.occupations for row in sentences]
        asked = chooser.sample(asked, len(asked))
        prompts = [row["text"].replace(OCCUPATION, word) for word, row in asked]
        partners = [row["text"].replace(OCCUPATION, self.baseline) for _, row in asked]
        first, second = ([self._token(row[side]) for _, row in asked] for side in ("male", "female"))
        tokenizer, model = self.tokenizer, self.model
        stated, others, male, female = [], [], [], []
        for row in sentences:
            for pair in self.rows("gender_words"):
                stated.append(row["text"].replace(OCCUPATION, pair["male"]))
                others.append(row["text"].replace(OCCUPATION, pair["female"]))
                male.append(self._token(row["male"]))
                female.append(self._token(row["female"]))
        odds = LogitDifference(male, female)
        each = LogitDifference(male * 2, female * 2)
        return [
            Shift(model, prompts, partners, LogitDifference(first, second), per_step=settings["shifts"], tokenizer=tokenizer),
            KeepKL(self.running("learning"), weight=settings["kl_weight"], per_step=settings["texts"], tokens=slice(32, None, 2)),
            KeepTarget(
                model, stated, odds, partners=others, share=settings["keep"], weight=settings["keep_weight"],
                per_step=settings["facts"], tokenizer=tokenizer,
            ),
            KeepTarget(
                model, stated + others, each, share=settings["side"], weight=settings["keep_weight"],
                per_step=settings["facts"], tokenizer=tokenizer,
            ),
        ]  # fmt: skip


def _said(circuit: Circuit) -> dict[str, Any]:
    heads = {name: float(amount) for name, amount in zip((w.name for w in circuit.graph.writers), circuit.nodes, strict=True) if amount}
    method = circuit.facts.get("method")
    return {
        "method": method if isinstance(method, str) else (method or {}).get("name"),
        "nodes": heads,
        "neurons": {str(layer): float(amounts.sum()) for layer, amounts in circuit.neurons.items()},
        "terms": circuit.facts.get("terms"),
        "ablation": None if circuit.ablation is None else {"kind": circuit.ablation.kind, "tokens": circuit.ablation.facts.get("tokens")},
    }


# ---- errors


def _no_token(word: str, ids: Sequence[int]) -> ConfigError:
    return ConfigError(
        f"the pronoun '{word}' is not one token of this tokenizer",
        expected="one token, with the space in front",
        found=list(ids),
        remedy="use pronouns that are single tokens",
    )
