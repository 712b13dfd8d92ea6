"""Sparse probing: how well a few features of a dictionary tell two classes of texts apart, beside a probe on whole activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import of_type, whole_number
from steer.directions.extractor import extra
from steer.errors import ConfigError
from steer.features.dictionary import Dictionary
from steer.features.evaluation.pooled import PooledTexts, pooled_texts
from steer.features.training.dictionary_config import generator
from steer.lens.labelled import LabelledTexts

LABELS = "random_labels"


@dataclass(frozen=True)
class SparseProbe:
    """What probes reach on the held-out texts of one task.

    Attributes:
        accuracy: share of texts told right, by number of features. features: that were chosen, by their number.
        dense: accuracy of a probe on the whole activation.
        random_labels: share of texts that the largest sparse probe tells right, chosen and fitted on labels that were shuffled, against
            shuffled labels: how much choosing among all features reaches on nothing.
        majority: share of the commoner class. texts: held out.

    Example:
        >>> probe = steer.features.evaluation.sparse_probing(model, dictionary, {"it or us": labelled}, k=[2])["it or us"]
        >>> probe.accuracy[2], probe.dense, probe.majority
    """

    accuracy: dict[int, float]
    features: dict[int, tuple[int, ...]]
    dense: float
    random_labels: float
    majority: float
    texts: int

    def described(self) -> dict[str, Any]:
        """JSON form."""
        by_k = {f"top_{k}": value for k, value in self.accuracy.items()}
        chosen = {f"features_{k}": list(features) for k, features in self.features.items()}
        others = {"dense": self.dense, LABELS: self.random_labels, "majority": self.majority, "texts": self.texts}
        return {**by_k, **others, **chosen}


def sparse_probing(
    model: nn.Module,
    dictionary: Dictionary,
    tasks: Mapping[str, LabelledTexts],
    *,
    k: Sequence[int] = (1, 2, 5),
    holdout: float = 0.3,
    seed: int = 0,
    progress: str | None = None,
) -> dict[str, SparseProbe]:
    """Accuracy of logistic regressions on the k features whose means differ most between the classes (as SAEBench has it).

    Features and activations are averaged over each text's response. Features are chosen and fitted on some texts and judged on others,
    whole groups held out where the texts have groups.

    Args:
        tasks: by name, texts of two classes.
        k: numbers of features.
        holdout: share of the texts that are held out. seed: of the split and of the shuffled labels.

    Raises:
        ConfigError: no tasks, or scikit-learn is missing. ContrastError: texts that cannot be split.

    Example:
        >>> probes = steer.features.evaluation.sparse_probing(model, dictionary, {"it or us": labelled}, k=[1, 2])
        >>> probes["it or us"].accuracy  # by number of features
    """
    of_type(tasks, Mapping, "the tasks", "pass {'name': LabelledTexts}")
    if not tasks:
        raise _no_tasks()
    for number in k:
        whole_number(number, "an entry of `k`", least=1)
    found = {}
    for name, texts in tasks.items():
        of_type(texts, LabelledTexts, f"the task '{name}'", "pass LabelledTexts")
        train, test = texts.split(holdout, seed, classes=True)
        pooled = pooled_texts(model, dictionary, texts.rows, progress=progress)
        found[name] = _probed(pooled, torch.tensor(texts.labels), train, test, sorted(set(k)), seed)
    return found


def _probed(pooled: PooledTexts, labels: Tensor, train: list[int], test: list[int], k: Sequence[int], seed: int) -> SparseProbe:
    chosen = {count: _most_different(pooled.f[train], labels[train], count) for count in k}
    accuracy = {count: fitted_accuracy(pooled.f[:, features], labels, train, test) for count, features in chosen.items()}
    # not the numbers by which the texts were split
    shuffled = labels[torch.randperm(len(labels), generator=generator(seed, LABELS))]
    control = _most_different(pooled.f[train], shuffled[train], k[-1])
    share = float(labels[test].mean())
    return SparseProbe(
        accuracy,
        {count: tuple(features.tolist()) for count, features in chosen.items()},
        fitted_accuracy(pooled.h, labels, train, test),
        fitted_accuracy(pooled.f[:, control], shuffled, train, test),
        max(share, 1 - share),
        len(test),
    )


def _most_different(f: Tensor, labels: Tensor, count: int) -> Tensor:
    """[count] features with the largest differences of class means."""
    difference = f[labels == 1].mean(0) - f[labels == 0].mean(0)
    return difference.abs().topk(min(count, f.shape[1])).indices


def fitted_accuracy(x: Tensor, labels: Tensor, train: Sequence[int], test: Sequence[int]) -> float:
    """Share of held-out texts that a logistic regression gets right."""
    return float((predict(fit(x[train], labels[train]), x[test]) == labels[test]).float().mean())


def fit(x: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """(weights [width], bias) of a logistic regression, penalty C = 1, on numbers of deviation 1; of one class alone, that class."""
    if len(labels.unique()) < 2:
        return torch.zeros(x.shape[1]), 1.0 if bool(labels.any()) else -1.0
    mean, spread = x.mean(0), x.std(0)
    spread = torch.where(spread > 1e-8 * spread.max().clamp_min(1e-30), spread, torch.inf)  # constant numbers say nothing
    scaled = (x - mean) / spread
    fitted = extra("sklearn.linear_model").LogisticRegression(C=1.0, max_iter=1000).fit(scaled.double().numpy(), labels.numpy())
    weight = torch.from_numpy(fitted.coef_[0]).float() / spread
    return weight, float(fitted.intercept_[0]) - float(mean @ weight)


def predict(probe: tuple[Tensor, float], x: Tensor) -> Tensor:
    """[texts] 0 or 1."""
    weight, bias = probe
    return (x @ weight + bias > 0).float()


# ---- errors


def _no_tasks() -> ConfigError:
    return ConfigError("there is nothing to probe", expected="{'name': LabelledTexts}", found="no tasks", remedy="give labelled texts")
