"""Distributed alignment search, DAS (Geiger et al. 2024, arXiv 2303.02536): learns the subspace that carries a causal variable.

A subspace that was trained will do something on almost any model (Makelov et al. 2024, arXiv 2311.17030; Sutter et al. 2025), so that every
result stands beside three controls: random subspaces, arbitrary labels, and a model that was never trained.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from steer import files
from steer.checks import finite_number, number_within, whole_number
from steer.circuits.interchange import Interchange, Swap
from steer.circuits.pairs import Pairs
from steer.errors import ConfigError, WrongModelError
from steer.intervene import Ablate, Intervention, Plan
from steer.model.anatomy import Anatomy
from steer.model.fingerprint import differing, warn_of_cast
from steer.model.site import Site
from steer.reading import check_kinds, damage_of

KIND = "das subspace"


def fit_das(
    model: nn.Module,
    site: Site | str,
    pairs: Pairs,
    labels: Sequence[int],
    rank: int = 1,
    *,
    choices: Sequence[int] | None = None,
    steps: int = 100,
    lr: float = 0.02,
    batch: int = 16,
    held_out: float = 0.3,
    placebos: int = 5,
    untrained: nn.Module | None = None,
    seed: int = 0,
    max_tokens: int = 512,
    progress: bool = True,
) -> DAS:
    """Learns an orthonormal subspace of an activation whose swap changes the output as a causal variable says, with its controls.

    The model is not changed and need not be frozen. The loss is the cross-entropy of the labels among the choices. The same is trained
    twice more for the controls, on shuffled labels and on an untrained model.

    Args:
        pairs: clean prompts are the base, corrupted ones the source; tokens with a role are swapped.
        labels: token id that should follow each base prompt after the swap.
        rank: of the subspace.
        choices: token ids among which the model chooses; the different labels for None.
        steps, lr, batch: of Adam, on `batch` pairs each.
        held_out: share of the pairs that is not trained on.
        placebos: random subspaces of the same rank.
        untrained: the same architecture with other weights; a newly initialised one for None, which models of transformers alone have.
        seed: of split, initial subspace, order and controls.

    Raises:
        ConfigError: a rank above the width, labels that do not fit or are all the same, too few pairs, an untrained model that is missing.
            SiteError: no such site.

    Example:
        >>> das = fit_das(model, "layers.12.output", pairs, labels, rank=2, steps=2)
        >>> print(das)  # always with its controls
    """
    whole_number(rank, "the rank of DAS", least=1)
    whole_number(steps, "the steps of DAS", least=1)
    whole_number(batch, "the batch of DAS", least=1)
    whole_number(placebos, "the number of random subspaces", least=1)
    finite_number(lr, "the learning rate of DAS", above=0.0)
    number_within(held_out, "the share of held-out pairs", 0, 1)
    swap = Swap(model, site, pairs, labels, choices, max_tokens=max_tokens)
    if rank > swap.width:
        raise _rank_too_large(rank, swap)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pairs), generator=generator)
    count = round(held_out * len(pairs))
    test, train = order[:count], order[count:]
    if not len(test) or not len(train) or len(swap.labels[train].unique()) < 2:
        raise _too_few(len(train), len(test))
    fit = _Fit(rank, steps, lr, batch, seed, progress)
    subspace, losses = fit(swap, swap.labels, train, "DAS")
    random = [_random_subspace(rank, swap.width, generator) for _ in range(placebos)]
    shuffled = _shuffled(swap.labels, train, test, generator)
    of_shuffled, _ = fit(swap, shuffled, train, "DAS, arbitrary labels")
    other = Swap(untrained_copy(model, seed) if untrained is None else untrained, site, pairs, labels, choices, max_tokens=max_tokens)
    if other.width != swap.width:
        raise _other_untrained(swap.width, other.width)
    of_untrained, _ = fit(other, other.labels, train, "DAS, untrained model")
    accuracies = {
        "train": swap.result(train.tolist(), subspace).accuracy,
        "held_out": (whole := swap.result(test.tolist(), subspace)).accuracy,
        "without_swap": whole.accuracy_before,
        "all_of_the_activation": swap.result(test.tolist(), None).accuracy,
        "placebo": sum(swap.result(test.tolist(), rows).accuracy for rows in random) / placebos,
        "arbitrary_labels_train": swap.result(train.tolist(), of_shuffled, shuffled).accuracy,
        "arbitrary_labels": swap.result(test.tolist(), of_shuffled, shuffled).accuracy,
        "untrained_train": other.result(train.tolist(), of_untrained).accuracy,
        "untrained": other.result(test.tolist(), of_untrained).accuracy,
    }
    facts = {
        "method": {"name": "das", "rank": rank, "steps": steps, "lr": lr, "batch": batch, "seed": seed},
        "pairs": {"count": len(pairs), "hash": pairs.hash(), "train": len(train), "held_out": len(test)},
        "choices": swap.choices.tolist(),
        "placebos": placebos,
        "loss": {"first": float(losses[0]), "last": float(losses[-1])},
        "model": swap.anatomy.fingerprint(),
    }
    return DAS(swap.site, subspace, accuracies, facts)


@dataclass(frozen=True, eq=False)
class DAS:
    """A learned subspace, with interchange intervention accuracies of it and of its controls.

    Attributes:
        site: where it lies. subspace: [rank, width] fp32 orthonormal rows.
        accuracies: `train` and `held_out`; `without_swap` and `all_of_the_activation`, the ends between which it lies; controls `placebo`
            (mean over random subspaces), `arbitrary_labels` and `untrained`, held out, the latter two with `_train` too.
        facts: training, pairs and model, JSON-able.

    Example:
        >>> das = fit_das(model, "layers.12.output", pairs, labels, steps=2)
        >>> das.accuracy, das.accuracies["placebo"], das.subspace.shape  # [rank, width]
        >>> plan = das.ablation_plan(model)
    """

    site: Site
    subspace: Tensor
    accuracies: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return len(self.subspace)

    @property
    def accuracy(self) -> float:
        """Share of the held-out pairs in which the swap gives what the label says."""
        return self.accuracies["held_out"]

    def __repr__(self) -> str:
        of = self.accuracies
        return (
            f"DAS(rank {self.rank} at {self.site}: accuracy {of['held_out']:.3f} held out, {of['train']:.3f} trained on; "
            f"random subspaces {of['placebo']:.3f}, "
            f"arbitrary labels {of['arbitrary_labels']:.3f} ({of['arbitrary_labels_train']:.3f} trained on), "
            f"untrained model {of['untrained']:.3f} ({of['untrained_train']:.3f} trained on); "
            f"whole activation {of['all_of_the_activation']:.3f}, no swap {of['without_swap']:.3f})"
        )

    def interchange(self, model: nn.Module, pairs: Pairs, labels: Sequence[int], *, choices: Sequence[int] | None = None) -> Interchange:
        """The subspace swapped in other pairs. Raises WrongModelError for another model, and what `interchange` raises."""
        self._check_model(model)
        return Swap(model, self.site, pairs, labels, choices).result(range(len(pairs)), self.subspace)

    def ablation_plan(self, model: nn.Module, strength: float = 1.0, *, scope: str = "all") -> Plan:
        """A plan that takes the subspace out of the activation, h - strength * (h Q^T) Q. Raises WrongModelError for another model."""
        self._check_model(model)
        return Plan([Intervention(Ablate(self.subspace), self.site, scope, strength)], fingerprint=Anatomy.find(model).fingerprint())

    def _check_model(self, model: nn.Module) -> None:
        known, found = self.facts.get("model"), Anatomy.find(model).fingerprint()
        if known is None:
            return
        if differing(known, found):
            raise _other_model(known, found)
        warn_of_cast("this subspace was", known, found, stacklevel=4)

    def save(self, path: str | Path) -> Path:
        """Writes manifest and tensors, atomically."""
        manifest = {"site": str(self.site), "accuracies": self.accuracies, "facts": self.facts}
        return files.save_artifact(path, KIND, {"subspace": self.subspace}, manifest)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote. Raises DamagedFileError, WrongKindError, UnsafeFileError, NonFiniteError, FileError."""
        manifest, tensors = files.load_artifact(path, KIND)
        with damage_of(path, "a subspace of DAS"):
            check_kinds(manifest, {"site": str, "accuracies": dict, "facts": dict})
            return cls(Site.parse(manifest["site"]), tensors["subspace"], manifest["accuracies"], manifest["facts"])


@dataclass(frozen=True)
class _Fit:
    """Training of a subspace, the same way for the result and its controls."""

    rank: int
    steps: int
    lr: float
    batch: int
    seed: int
    progress: bool

    def __call__(self, swap: Swap, labels: Tensor, train: Tensor, description: str) -> tuple[Tensor, Tensor]:
        """[rank, width] orthonormal rows, and [steps] losses. labels: [pairs] places among the choices."""
        generator = torch.Generator().manual_seed(self.seed)
        layer = nn.Linear(swap.width, self.rank, bias=False)
        with torch.no_grad():
            layer.weight.copy_(_random_subspace(self.rank, swap.width, generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # the parametrisation draws the rows that it adds to a basis of the whole space
            parametrizations.orthogonal(layer)
        parameters = list(layer.parameters())
        optimiser = torch.optim.Adam(parameters, lr=self.lr)
        losses = torch.zeros(self.steps)
        for step in tqdm(range(self.steps), desc=description, unit="step", disable=None if self.progress else True):
            chosen = train[torch.randperm(len(train), generator=generator)[: self.batch]].tolist()
            with torch.enable_grad():
                logits = swap.logits(chosen, layer.weight, gradients=True)
                loss = nn.functional.cross_entropy(logits, labels[chosen].to(logits.device))
                # of the subspace alone: gradients of the model's weights would stay behind
                gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()
            losses[step] = loss.detach()
        return layer.weight.detach().clone(), losses


def untrained_copy(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model of the same architecture with newly initialised weights. Raises ConfigError for models that are not of transformers."""
    if not isinstance(model, PreTrainedModel):
        raise _no_untrained(model)
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)(copy.deepcopy(model.config))
    return fresh.to(device=like.device, dtype=like.dtype).eval()


def _random_subspace(rank: int, width: int, generator: torch.Generator) -> Tensor:
    """[rank, width] orthonormal rows of a uniformly random subspace."""
    q, _ = torch.linalg.qr(torch.randn(width, rank, generator=generator))
    return q.T.contiguous()


def _shuffled(labels: Tensor, train: Tensor, test: Tensor, generator: torch.Generator) -> Tensor:
    """Labels exchanged at random among the pairs of each part, so that both keep how often each label occurs."""
    shuffled = labels.clone()
    for part in (train, test):
        shuffled[part] = labels[part[torch.randperm(len(part), generator=generator)]]
    return shuffled


# ---- errors


def _rank_too_large(rank: int, swap: Swap) -> ConfigError:
    return ConfigError(f"a subspace of '{swap.site}' cannot have this rank", expected=f"1 to {swap.width}, its width", found=rank,
                       remedy="start with rank 1, and compare with random subspaces of the same rank")  # fmt: skip


def _too_few(train: int, test: int) -> ConfigError:
    return ConfigError("DAS has too few pairs to train on one part and measure on another",
                       expected="pairs of two labels to train on, and at least one that is held out", found=f"{train} and {test}",
                       remedy="pass more pairs, or another held_out share")  # fmt: skip


def _no_untrained(model: nn.Module) -> ConfigError:
    return ConfigError("the untrained control needs a model with other weights", expected="a model of transformers, or untrained=",
                       found=type(model).__name__, remedy="pass untrained=, the same model before training")  # fmt: skip


def _other_untrained(width: int, found: int) -> ConfigError:
    return ConfigError("the untrained model is of another architecture", expected=f"width {width} at the site", found=found,
                       remedy="pass a model made from the same configuration")  # fmt: skip


def _other_model(known: Any, found: Any) -> WrongModelError:
    return WrongModelError("the subspace is one of another model", expected=known, found=found,
                           remedy="fit it on this model, or load the one that it was fitted on")  # fmt: skip
