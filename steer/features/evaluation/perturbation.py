"""Targeted perturbation: ablating the features of one class should harm the probe of that class, and no other.

TPP of SAEBench (2503.09532). Scores of this kind vary much between seeds and settings, and rank dictionaries unreliably (2605.18229);
sparse probing is steadier. Read them beside the random features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import number_within, of_type, whole_number
from steer.errors import ConfigError, ContrastError
from steer.features.dictionary import Dictionary
from steer.features.evaluation.pooled import PooledTexts, pooled_texts
from steer.features.evaluation.probing import fit, predict
from steer.model.tokens import Row, plain


@dataclass(frozen=True)
class Perturbation:
    """What ablation does to the probes of all classes.

    Attributes:
        score: drop of accuracy of the class whose features are ablated, less that of the other classes, averaged, by number of features.
        random: the same with as many features drawn from those that are on in the texts.
        intended, unintended: the two parts of the score.
        accuracy: of each class's probe before anything is ablated.
        features: of each class, the most first.

    Example:
        >>> classes = {"about it": texts, "about us": other_texts}
        >>> found = steer.features.evaluation.targeted_perturbation(model, dictionary, classes, tokenizer=tokenizer, counts=[2])
        >>> found.accuracy["about it"], found.features["about it"]
    """

    score: dict[int, float]
    random: dict[int, float]
    intended: dict[int, float]
    unintended: dict[int, float]
    accuracy: dict[str, float]
    features: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """JSON form."""
        numbers = {
            name: {str(count): value for count, value in getattr(self, name).items()}
            for name in ("score", "random", "intended", "unintended")
        }
        return {**numbers, "accuracy": self.accuracy, "features": {name: list(features) for name, features in self.features.items()}}


def targeted_perturbation(
    model: nn.Module,
    dictionary: Dictionary,
    classes: Mapping[str, Sequence[str]],
    *,
    tokenizer: Any,
    counts: Sequence[int] = (2, 5, 10, 20),
    holdout: float = 0.3,
    seed: int = 0,
    progress: str | None = None,
) -> Perturbation:
    """Ablates the features that matter most to the probe of one class, the dictionary's error kept, and measures the probes of all classes.

    Probes are logistic regressions of one class against the others, on mean activations. A feature matters by the difference of its means
    times the probe's weight along its decoder row. Since decoders are linear, ablation on the mean of a text is exact.

    Args:
        classes: texts of each class, by name.
        counts: numbers of features that are ablated.
        holdout: share of each class's texts that is held out. seed: of the split and of the random features.

    Raises:
        ConfigError: fewer than two classes; a dictionary that does not write the site that it reads. ContrastError: too few texts, or
            one of them twice.

    Example:
        >>> classes = {"about it": texts, "about us": other_texts}
        >>> found = steer.features.evaluation.targeted_perturbation(model, dictionary, classes, tokenizer=tokenizer, counts=[2, 5])
        >>> found.score, found.random  # drop of accuracy by number of features; of random ones
    """
    of_type(classes, Mapping, "the classes", "pass {'name': [texts]}")
    number_within(holdout, "`holdout`", 0.05, 0.95)
    for count in counts:
        whole_number(count, "an entry of `counts`", least=1)
    if len(classes) < 2:
        raise _one_class(classes)
    if len(dictionary.reads) != 1 or dictionary.reads != dictionary.writes:
        raise _other_site(dictionary)
    rows: list[Row] = []
    labels: list[int] = []
    for number, (name, texts) in enumerate(classes.items()):
        of_type(texts, (list, tuple), f"the texts of '{name}'", "pass a list of texts")
        if len(texts) < 4:
            raise _few_texts(name, len(texts))
        rows += [plain(tokenizer, text) for text in texts]
        labels += [number] * len(texts)
    first: dict[tuple[int, ...], int] = {}
    for i, row in enumerate(rows):
        if first.setdefault(row.ids, i) != i:  # a copy among the held-out texts would be judged by what it was learned from
            raise _repeated(tokenizer, row)
    random = torch.Generator().manual_seed(seed)
    test = _held_out(torch.tensor(labels), holdout, random)
    pooled = pooled_texts(model, dictionary, rows, progress=progress)
    return _perturbed(pooled, dictionary, list(classes), torch.tensor(labels), test, sorted(set(counts)), random)


def _perturbed(
    pooled: PooledTexts,
    dictionary: Dictionary,
    names: list[str],
    labels: Tensor,
    test: Tensor,
    counts: Sequence[int],
    random: torch.Generator,
) -> Perturbation:
    h, f = pooled.h, pooled.f
    probes, ranked = [], []
    for number in range(len(names)):
        own = (labels == number).float()
        probe = fit(h[~test], own[~test])
        probes.append(probe)
        difference = f[~test & (own == 1)].mean(0) - f[~test & (own == 0)].mean(0)
        ranked.append(_by_effect(dictionary, difference, probe[0]))

    def accuracies(ablated: Tensor | None) -> list[float]:
        x = h[test] if ablated is None else h[test] - f[test][:, ablated] @ dictionary.decoder_rows(ablated)
        return [float((predict(probe, x) == (labels[test] == number).float()).float().mean()) for number, probe in enumerate(probes)]

    before = accuracies(None)
    on = (f > 0).any(0).nonzero()[:, 0]
    score: dict[str, dict[int, float]] = {name: {} for name in ("score", "random", "intended", "unintended")}
    for count in counts:
        drops = [_drop(before, accuracies(features[:count]), number) for number, features in enumerate(ranked)]
        draws = [on[torch.randperm(len(on), generator=random)[:count]] for _ in names]
        by_chance = [_drop(before, accuracies(features), number) for number, features in enumerate(draws)]
        intended, unintended = (sum(drop[part] for drop in drops) / len(drops) for part in range(2))
        score["intended"][count], score["unintended"][count], score["score"][count] = intended, unintended, intended - unintended
        score["random"][count] = sum(own - others for own, others in by_chance) / len(by_chance)
    features = {name: tuple(order[: counts[-1]].tolist()) for name, order in zip(names, ranked, strict=True)}
    return Perturbation(**score, accuracy=dict(zip(names, before, strict=True)), features=features)


def _by_effect(dictionary: Dictionary, difference: Tensor, weight: Tensor) -> Tensor:
    """[features] in the order of how much their mean difference moves a probe towards its class."""
    along = torch.cat([dictionary.decoder_rows(part) @ weight for part in torch.arange(dictionary.width).split(4096)])
    return (difference * along).argsort(descending=True)


def _drop(before: list[float], after: list[float], own: int) -> tuple[float, float]:
    """Loss of accuracy of one class, and the mean of the others."""
    drops = [was - now for was, now in zip(before, after, strict=True)]
    others = [drop for number, drop in enumerate(drops) if number != own]
    return drops[own], sum(others) / len(others)


def _held_out(labels: Tensor, share: float, random: torch.Generator) -> Tensor:
    """[texts] True for a share of each class."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for number in labels.unique():
        own = (labels == number).nonzero()[:, 0]
        count = min(len(own) - 2, max(1, round(share * len(own))))
        held[own[torch.randperm(len(own), generator=random)[:count]]] = True
    return held


# ---- errors


def _one_class(classes: Mapping[str, Sequence[str]]) -> ConfigError:
    found = ", ".join(classes) or "none"
    return ConfigError(
        "a perturbation is targeted at one of several classes", expected="two classes or more", found=found, remedy="add one"
    )


def _few_texts(name: str, count: int) -> ContrastError:
    return ContrastError(f"the class '{name}' has too few texts", expected="4 or more", found=count, remedy="give more texts")


def _repeated(tokenizer: Any, row: Row) -> ContrastError:
    return ContrastError(
        "a text of the classes is there twice",
        expected="every text once, in one class: a copy that is held out would be judged by what it was learned from",
        found=repr(tokenizer.decode(list(row.ids)))[:120],
        remedy="remove one of them",
    )


def _other_site(dictionary: Dictionary) -> ConfigError:
    found = f"reads {', '.join(map(str, dictionary.reads))}; writes {', '.join(map(str, dictionary.writes))}"
    return ConfigError(
        "a targeted perturbation ablates features at the site where the probes read",
        expected="a dictionary that writes the one site that it reads",
        found=found,
        remedy="use an autoencoder, or sparse probing, which takes every dictionary",
    )
