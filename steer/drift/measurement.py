"""Measurement of one site at one step: the statistics from which drift metrics are computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor

from steer.drift.accumulators import ProjectionMoments
from steer.drift.site_directions import SiteDirections
from steer.errors import ConfigError
from steer.model.site import Site

MODES = ("probe", "stream")


class Tracked(Protocol):
    """What the columns of a measurement are of: directions of a site, features of a group, or a dictionary."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns, the named ones first, then the controls."""
        ...

    @property
    def named_count(self) -> int: ...

    @property
    def site(self) -> Site: ...

    def kind(self, index: int) -> str:
        """One of `steer.drift.site_directions.KINDS`."""
        ...


class Measurement:
    """What is known of one or several tracked things at one step, in one mode.

    Attributes:
        of: `direction`, `feature` or `dictionary`.
        tracked: the things, a column each.
        mode: `probe` (fixed texts) or `stream` (training tokens).
        n: texts (probe) or tokens (stream, and of a dictionary).
        seed: of whatever a metric draws at random.
        values: metrics computed so far, by name: [columns], or [named columns] of those that controls do not have.
    """

    of: ClassVar[str]
    tracked: Any
    mode: str
    n: Any
    seed: int
    values: dict[str, Tensor]

    def copy(self) -> Self:
        """The same with tensors of its own, into which a metric of somebody else's may write."""
        raise NotImplementedError

    def named(self, columns: Tensor) -> Tensor:
        """Columns without the controls, [..., named] from [..., all]."""
        return columns[..., : self.tracked.named_count]

    def controls(self, columns: Tensor) -> Tensor:
        """Columns of the controls, [..., controls] from [..., all]."""
        return columns[..., self.tracked.named_count :]


@dataclass(frozen=True, eq=False)
class SiteMeasurement(Measurement):
    """Projections on the directions of one site, now and at the baseline; every tensor is fp64 on the CPU.

    Columns are in the order of `directions.names`: the named directions first, then the controls.

    Attributes:
        directions: the named directions and controls of the site, with their unit vectors and class gaps.
        mode: `probe` (fixed prompts) or `stream` (training tokens).
        n: prompts (probe) or labelled tokens (stream).
        mean, sd: [directions] of the projection over prompts or tokens; sd with n - 1, nan where n is 1.
        baseline_mean, baseline_sd: [directions], the same at the first measurement.
        seed: of whatever a metric draws at random.
        values: metrics computed so far, by name: [directions], or [named directions] of those that controls do not have.
    """

    of: ClassVar[str] = "direction"

    directions: SiteDirections
    mode: str
    n: int
    mean: Tensor
    sd: Tensor
    baseline_mean: Tensor
    baseline_sd: Tensor
    seed: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)
    _states: Tensor | None = None
    _baseline_states: Tensor | None = None

    @classmethod
    def of_states(cls, directions: SiteDirections, states: Tensor, baseline: Tensor, seed: int = 0) -> SiteMeasurement:
        """Probe mode: from the states of the prompts now and at the baseline, [prompts, width] each."""
        states = states.double()
        baseline = baseline.double()
        now = states @ directions.units.mT  # [prompts, directions]
        before = baseline @ directions.units.mT
        moments = (now.mean(0), now.std(0), before.mean(0), before.std(0))
        return cls(directions, "probe", len(states), *moments, seed, _states=states, _baseline_states=baseline)

    @classmethod
    def of_moments(cls, directions: SiteDirections, window: ProjectionMoments, baseline: ProjectionMoments) -> SiteMeasurement:
        """Stream mode: from the moments of a window and of the first one."""
        return cls(directions, "stream", int(window.n), window.mean, window.sd, baseline.mean, baseline.sd)

    @property
    def tracked(self) -> SiteDirections:
        return self.directions

    @property
    def spread(self) -> Tensor:
        """[directions], in which `effect_sd` counts."""
        return self.baseline_sd

    @property
    def states(self) -> Tensor:
        """[prompts, width] of each prompt now. Raises ConfigError in stream mode, which has none."""
        if self._states is None:
            raise _no_states(self.mode)
        return self._states

    @property
    def baseline_states(self) -> Tensor:
        """[prompts, width] of each prompt at the baseline. Raises ConfigError in stream mode, which has none."""
        if self._baseline_states is None:
            raise _no_states(self.mode)
        return self._baseline_states

    @cached_property
    def shift(self) -> Tensor:
        """[width], mean state minus baseline mean state; probe mode."""
        return (self.states - self.baseline_states).mean(0)

    @cached_property
    def differences(self) -> Tensor:
        """[prompts, directions], projection of each prompt now minus its own at the baseline; probe mode."""
        return (self.states - self.baseline_states) @ self.directions.units.mT

    def copy(self) -> SiteMeasurement:
        """The same with tensors of its own, into which a metric of somebody else's may write."""
        own: dict[str, Any] = {
            name: value.clone()
            for name in ("mean", "sd", "baseline_mean", "baseline_sd", "_states", "_baseline_states")
            if isinstance(value := getattr(self, name), Tensor)
        }
        directions = replace(self.directions, units=self.directions.units.clone())
        return replace(self, directions=directions, values={name: value.clone() for name, value in self.values.items()}, **own)


def _no_states(mode: str) -> ConfigError:
    return ConfigError(
        "a drift metric reads states that are not kept",
        expected="a measurement in probe mode, which keeps the state of each prompt",
        found=f"one in {mode} mode",
        remedy="register the metric with modes=('probe',)",
    )
