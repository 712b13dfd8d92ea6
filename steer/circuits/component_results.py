"""Results of the evaluation of circuits of components, with what they depend on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steer.circuits.circuit import Circuit
from steer.circuits.evaluation import share_of

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the edges, as MIB takes them


@dataclass(frozen=True, eq=False)
class ComponentFaithfulness:
    """The target of each prompt with different parts ablated.

    Attributes:
        full, empty: [prompts] nothing ablated, and all edges, or all components of the circuit's kinds.
        circuit, without_circuit: [prompts] all but the circuit, and the circuit alone.
        random, without_random: [draws, prompts] the same for random circuits of its size.
        facts: ablation, nodes or edges, tokens, target, prompts, draws and seed; JSON-able.

    Example:
        >>> evaluation = ComponentEvaluation(model, pairs, target, resample_ablation())
        >>> found = evaluation.faithfulness(circuit, draws=1)
        >>> found.faithfulness, found.random_faithfulness, found.share("without_circuit")
    """

    full: Tensor
    empty: Tensor
    circuit: Tensor
    without_circuit: Tensor
    random: Tensor
    without_random: Tensor
    facts: dict[str, Any] = field(default_factory=dict)

    def share(self, name: str) -> float:
        """The share (M(name) - M(empty)) / (M(full) - M(empty)) of the means over prompts, and draws."""
        return share_of(_mean(getattr(self, name)), _mean(self.full), _mean(self.empty))

    def mean_of_ratios(self, name: str) -> float:
        """The mean over prompts of that ratio, NaN where it is not defined for one: it says something else than the ratio of means."""
        differences = self.full - self.empty
        if bool((differences == 0).any()):
            return float("nan")
        return _mean((getattr(self, name) - self.empty) / differences)

    @property
    def faithfulness(self) -> float:
        """Of the circuit: 1 where it does as much as the model, 0 where as little as nothing."""
        return self.share("circuit")

    @property
    def random_faithfulness(self) -> float:
        """The mean of random circuits, counted likewise: 1 where they do as much as the model; NaN without any."""
        return self.share("random")

    def recorded_in(self, circuit: Circuit) -> Circuit:
        """The circuit with this result and all that it depends on among its facts."""
        names = ("circuit", "without_circuit", "random", "without_random")
        values = {name: self.share(name) for name in names if getattr(self, name).numel()}
        ratios = {name: ratio for name in values if (ratio := self.mean_of_ratios(name)) == ratio}
        found = {"faithfulness": values, "mean_of_ratios": ratios, "full": _mean(self.full), "empty": _mean(self.empty), **self.facts}
        return replace(circuit, facts={**circuit.facts, "evaluation": found})

    def __repr__(self) -> str:
        about = f"{self.facts.get('of')}, {self.facts.get('ablation', {}).get('kind')} ablation, {len(self.full)} prompts"
        return (
            f"ComponentFaithfulness({self.faithfulness:.3f}, random {self.random_faithfulness:.3f}; mean of ratios "
            f"{self.mean_of_ratios('circuit'):.3f}; target {_mean(self.full):.3f}, without the circuit {_mean(self.without_circuit):.3f}, "
            f"with nothing {_mean(self.empty):.3f}; {about})"
        )


@dataclass(frozen=True, eq=False)
class Completeness:
    """|M(C without K) - M(model without K)| for knock-out sets K within a circuit C: 0 where the circuit does all of the job.

    Attributes:
        differences: [sets] of random sets. random: [draws, sets] the same of random circuits.
        worst: names in the greedy set. worst_differences: [steps] at each of its sizes.
        facts: see `ComponentFaithfulness`.

    Example:
        >>> evaluation = ComponentEvaluation(model, pairs, target, resample_ablation())
        >>> found = evaluation.completeness(scores.top_nodes(2), draws=1)
        >>> found.worst, found.worst_differences
    """

    differences: Tensor
    random: Tensor
    worst: tuple[str, ...]
    worst_differences: Tensor
    facts: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        worst = f"{float(self.worst_differences.max()):.3f}" if len(self.worst) else "none tried"
        return f"Completeness(incomplete by {_mean(self.differences):.3f}, random {_mean(self.random):.3f}; greedy worst {worst})"


@dataclass(frozen=True, eq=False)
class Minimality:
    """How much the target changes, with the circuit alone, when one of its parts goes too: near 0 for one that the circuit can spare.

    Attributes:
        names: of its components or edges. changes: [names]. random: [tried] the same of the parts of random circuits.
        facts: see `ComponentFaithfulness`.

    Example:
        >>> found = ComponentEvaluation(model, pairs, target, resample_ablation()).minimality(scores.top_nodes(2), draws=1)
        >>> dict(zip(found.names, found.changes.tolist()))
    """

    names: tuple[str, ...]
    changes: Tensor
    random: Tensor
    facts: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        least = int(self.changes.argmin())
        return (
            f"Minimality({len(self.names)} tried, median {float(self.changes.median()):.3f}, random {_mean(self.random):.3f}; "
            f"least {self.names[least]} {float(self.changes[least]):.4f})"
        )


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve:
    """Faithfulness of the highest-scored edges over the share of edges that are kept.

    Attributes:
        shares: of the edges. sizes: numbers of edges left after pruning.
        full, empty: [prompts] of the target. circuit: [shares, prompts]. random: [draws, shares, prompts] by random orders.
        facts: see `ComponentFaithfulness`; `absolute` says how edges were ordered.

    Example:
        >>> curve = ComponentEvaluation(model, pairs, target, resample_ablation()).curve(scores, shares=[0.01, 1.0], draws=1)
        >>> curve.faithfulness, curve.cpr, curve.cmd  # [shares], area under it, area between it and 1
    """

    shares: tuple[float, ...]
    sizes: tuple[int, ...]
    full: Tensor
    empty: Tensor
    circuit: Tensor
    random: Tensor
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def faithfulness(self) -> Tensor:
        """[shares]."""
        return self._of(self.circuit)

    @property
    def random_faithfulness(self) -> Tensor:
        """[draws, shares]."""
        return self._of(self.random)

    def _of(self, values: Tensor) -> Tensor:
        return (values.mean(-1) - self.empty.mean()) / (self.full.mean() - self.empty.mean())

    @property
    def cpr(self) -> float:
        """Area under the faithfulness, higher is better; linear in the share, from the first share on."""
        return self._area(self.faithfulness)

    @property
    def cmd(self) -> float:
        """Area between the faithfulness and 1 over the share of edges, lower is better."""
        return self._area((1 - self.faithfulness).abs())

    @property
    def random_cpr(self) -> Tensor:
        """[draws]."""
        return torch.trapezoid(self.random_faithfulness, torch.tensor(self.shares, dtype=torch.float64))

    @property
    def random_cmd(self) -> Tensor:
        """[draws]."""
        return torch.trapezoid((1 - self.random_faithfulness).abs(), torch.tensor(self.shares, dtype=torch.float64))

    def _area(self, heights: Tensor) -> float:
        return float(torch.trapezoid(heights, torch.tensor(self.shares, dtype=torch.float64)))

    def __repr__(self) -> str:
        points = ", ".join(f"{share:g}: {value:.2f}" for share, value in zip(self.shares, self.faithfulness.tolist(), strict=True))
        of_random = f"random {_mean(self.random_cpr):.3f}, {_mean(self.random_cmd):.3f}"
        return f"FaithfulnessCurve(CPR {self.cpr:.3f}, CMD {self.cmd:.3f}; {of_random}; {points})"


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
