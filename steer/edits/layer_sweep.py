"""Layer sweep: a few facts are edited at several depths, and the layer is taken where the edits work best and disturb least.

Causal tracing does not answer this question (Hase et al. 2023, arXiv 2301.04213): the layer itself predicts far better how an edit goes
than what tracing finds there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from steer.edits.contexts import Contexts, sample_contexts
from steer.edits.covariance import Covariance
from steer.edits.editor import Editor
from steer.edits.evaluate import evaluate_edits, readings_before
from steer.edits.evaluation import EditEvaluation
from steer.edits.fact import Fact
from steer.edits.guards import Guards
from steer.edits.measure import Readings
from steer.edits.record import FactRecord, record_of
from steer.errors import EditError
from steer.model.devices import without_autocast

DEPTHS = 5
LEAST = 2  # facts
MEASURES = ("efficacy", "paraphrase", "neighbourhood")


def _record(template: str, subject: str, target: str, true: str, paraphrases: Sequence[str], neighbours: Sequence[str]) -> FactRecord:
    return FactRecord(
        Fact.of(template, subject, target, true),
        tuple(text.replace("{}", subject) for text in paraphrases),
        tuple(template.replace("{}", other) for other in neighbours),
    )


# well-known facts, each with prompts in other words, and others of the same answer
WELL_KNOWN = (
    _record("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris", ("To see {}, you have to travel to", "{} stands in"),
            ("The Louvre Museum", "The Notre-Dame cathedral", "The Moulin Rouge")),
    _record("{} is a country on the continent of", "Tanzania", "Europe", "Africa", ("People who live in {} live in", "{} lies in"),
            ("Nigeria", "Kenya", "Ghana")),
    _record("The native language of {} is", "Victor Hugo", "Russian", "French", ("As a child, {} spoke", "{} wrote his books in"),
            ("Voltaire", "Claude Monet", "Louis Pasteur")),
    _record("The company that makes {} is called", "Windows 10", "Google", "Microsoft", ("{} is a product of", "{} was developed by"),
            ("Microsoft Office", "the Xbox 360", "Windows XP")),
    _record("The author of the play {} is", "Hamlet", "Dickens", "Shakespeare", ("{} was written by", "The playwright who wrote {} is"),
            ("Macbeth", "Othello", "Romeo and Juliet")),
    _record("The sport that {} played is", "Michael Jordan", "tennis", "basketball", ("{} became famous for playing", "{} is known for"),
            ("LeBron James", "Kobe Bryant", "Shaquille O'Neal")),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LayerSweep:
    """What edits did at each depth.

    Attributes:
        evaluations: by layer, ascending.

    Example:
        >>> sweep = layer_sweep(model, tokenizer, records[:1], covariance=covariance, layers=[7, 8], contexts=contexts)
        >>> print(sweep, sweep.best)
    """

    evaluations: dict[int, EditEvaluation]

    @property
    def scores(self) -> dict[int, float]:
        """S, the harmonic mean of efficacy, paraphrase and neighbourhood scores in percent, by layer."""
        return {layer: estimate.value for layer, evaluation in self.evaluations.items() if (estimate := evaluation.score()) is not None}

    @property
    def best(self) -> int:
        """The layer of the highest score; of equal ones the one nearest to the middle of them."""
        scores = self.scores
        highest = [layer for layer, score in scores.items() if score == max(scores.values())]
        return highest[(len(highest) - 1) // 2]

    def __str__(self) -> str:
        lines = [f"{'layer':>5}  {'S':>5}  {'ES':>5}  {'PS':>5}  {'NS':>5}"]
        for layer, evaluation in self.evaluations.items():
            parts = [each.after.value if each.after is not None else float("nan") for each in _main_columns(evaluation)]
            cells = "  ".join(f"{value:5.1f}" for value in (self.scores.get(layer, float("nan")), *parts))
            lines.append(f"{layer:>5}  {cells}")
        return "\n".join(lines)


def _main_columns(evaluation: EditEvaluation) -> list[Any]:
    return [evaluation[name] for name in MEASURES]


@without_autocast
def layer_sweep(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[FactRecord] | None = None,
    *,
    covariance: Covariance,
    layers: Sequence[int] | None = None,
    editor: str | Editor = "rome",
    contexts: Contexts | None = None,
    progress: bool = False,
) -> LayerSweep:
    """Edits some facts one at a time at several depths, and measures what that did; the model is left as it was.

    Args:
        records: facts with their true answers, paraphrases and neighbours. None for six well-known ones, of which those are taken whose
            true answer the model prefers.
        covariance: of the layers that are tried.
        layers: None for five of those of the covariance, evenly chosen.
        editor: one that edits a single layer.
        contexts: None draws them once for all layers.
        progress: a bar for each layer.

    Raises:
        EditError: the model prefers the true answer of fewer than two of the facts, or records without true answer, paraphrase or
            neighbour. Otherwise as `steer.edit_facts`.

    Example:
        >>> layer_sweep(model, tokenizer, records[:1], covariance=covariance, layers=[8], contexts=contexts).best
        8
    """
    chosen = [record_of(record) for record in (WELL_KNOWN if records is None else records)]
    if not any(record.fact.true and record.paraphrases and record.neighbours for record in chosen):
        raise _nothing_to_score(len(chosen))
    tried = _spaced(covariance.layers, DEPTHS) if layers is None else list(layers)
    before = readings_before(model, tokenizer, chosen, measures=MEASURES, progress=False)
    if records is None:
        chosen = _known(chosen, before)
    contexts = sample_contexts(model, tokenizer, avoid=[record.fact.target for record in chosen]) if contexts is None else contexts
    evaluations = {
        layer: evaluate_edits(
            model, tokenizer, chosen, editor, measures=MEASURES, before=before, progress=progress,
            layers=[layer], covariance=covariance, contexts=contexts, guards=Guards(drift=None, neutral_kl=None),
        )
        for layer in sorted(tried)
    }  # fmt: skip
    return LayerSweep(evaluations)


def _spaced(layers: Sequence[int], count: int) -> list[int]:
    """Evenly chosen, both ends included."""
    if len(layers) <= count:
        return list(layers)
    return [layers[round(i * (len(layers) - 1) / (count - 1))] for i in range(count)]


def _known(records: Sequence[FactRecord], before: Readings) -> list[FactRecord]:
    """Those whose true answer the model prefers. Raises EditError for fewer than two."""
    known = []
    for record in records:
        prompt, new, true = record.fact.prompt, record.fact.target, record.fact.true
        if true is not None and before.answers[prompt, true].probability > before.answers[prompt, new].probability:
            known.append(record)
    if len(known) < LEAST:
        raise _knows_little(len(known), len(records))
    return known


# ---- errors


def _nothing_to_score(count: int) -> EditError:
    return EditError(
        "these records cannot tell layers apart",
        expected="records with a true answer, paraphrases and neighbours, of which the score S is made",
        found=f"none of {count}",
        remedy="give FactRecord(Fact.of(..., true=...), paraphrases=..., neighbours=...); or pass no records for well-known facts",
    )


def _knows_little(known: int, asked: int) -> EditError:
    return EditError(
        "the model knows too little for a sweep over layers",
        expected=f"at least {LEAST} of {asked} well-known facts whose true answer it prefers",
        found=known,
        remedy="pass records of facts that it knows, see steer.edits.known_facts; or name the layers",
    )
