"""Drift metrics: from the statistics of a measurement to one value per direction. A new one is a file with one registered function.

    # steer/drift/metrics/spread.py
    @drift_metric("spread", unit="of the baseline")
    def spread(site: SiteMeasurement) -> Tensor:
        '''Standard deviation of the projection over that of the baseline.'''
        return site.sd / site.baseline_sd

It is computed at every measurement from then on, kept in the store and in the records, and sent to the loggers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.checks import errors_of, of_type
from steer.drift.measurement import MODES, Measurement, SiteMeasurement
from steer.drift.site_directions import SiteDirections
from steer.errors import ConfigError, SteerError, did_you_mean
from steer.registry import Registry

THINGS = ("direction", "feature", "dictionary")
RECORD_FIELDS = ("step", "mode", "direction", "site", "kind", "n", "metrics")


@dataclass(frozen=True)
class DriftMetric:
    """A function of the measurement at one site, and when it is defined.

    Attributes:
        function: takes a `SiteMeasurement` (of features a `FeatureMeasurement`, of dictionaries a `DictionaryMeasurement`), or with
            `across_sites` a sequence of them. It gives fp64 values in the order of the directions, concatenated over the sites with
            `across_sites`; nan where a value is not defined.
        unit: what the values are counted in, for the documentation.
        modes: modes of reading in which it is defined: `probe`, which has the states of each prompt, and `stream`, which has moments only.
        controls: the random control directions have a value too: [directions] of values, otherwise [named directions].
        needs: other metrics, which are in `values` by then. It is not computed in a mode in which one of them is not.
        across_sites: it compares directions of all sites, as a correction for many tests does.
        logged: it is sent to the loggers.
        of: what it is defined of: `direction`, `feature`, `dictionary`.
    """

    name: str
    function: Callable[..., Tensor]
    unit: str = ""
    modes: tuple[str, ...] = MODES
    controls: bool = True
    needs: tuple[str, ...] = ()
    across_sites: bool = False
    logged: bool = True
    of: tuple[str, ...] = ("direction",)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.function.__doc__

    def compute(self, sites: Sequence[Measurement]) -> list[Tensor]:
        """The values at each site, fp64. The function gets copies, so that it cannot change what other metrics read.

        Raises:
            ConfigError: the function fails, or returns anything else.
        """
        sites = [site.copy() for site in sites]
        counts = [len(site.tracked.names) if self.controls else site.tracked.named_count for site in sites]
        if self.across_sites:
            return list(self._checked(self._called(sites), sum(counts)).split(counts))
        return [self._checked(self._called(site), count) for site, count in zip(sites, counts, strict=True)]

    def _called(self, measured: Measurement | Sequence[Measurement]) -> Any:
        try:
            with errors_of(f"drift metric '{self.name}'", "correct its function; metrics that it reads from `values` belong into `needs`"):
                return self.function(measured)
        except SteerError as error:
            if f"'{self.name}'" in error.what:
                raise
            raise _named(self, error) from error

    def _checked(self, values: Any, count: int) -> Tensor:
        if not isinstance(values, Tensor) or values.dtype != torch.float64 or values.shape != (count,):
            raise _wrong_values(self, values, count)
        return values.detach().cpu()


METRICS: Registry[Any] = Registry("drift metric", "steer.drift.metrics", "steer.drift_metrics", instance_of=DriftMetric)


def drift_metric(
    name: str,
    *,
    unit: str = "",
    modes: tuple[str, ...] = MODES,
    controls: bool = True,
    needs: tuple[str, ...] = (),
    across_sites: bool = False,
    logged: bool = True,
    of: tuple[str, ...] = ("direction",),
) -> Callable[[Callable[..., Tensor]], DriftMetric]:
    """Registers a function as the drift metric of that name; the options are those of `DriftMetric`.

    Raises:
        ConfigError: the name is taken, also by a field of `DriftRecord`; an unknown mode or thing; `needs` that is no tuple.
    """
    if name in RECORD_FIELDS:
        raise _reserved_name(name)
    what = f"of drift metric '{name}'"
    of_type(modes, (tuple, list), f"`modes` {what}", "pass a tuple, e.g. modes=('probe',)")
    if not modes or not all(mode in MODES for mode in modes):
        raise _unknown_modes(name, modes)
    of_type(of, (tuple, list), f"`of` {what}", "pass a tuple, e.g. of=('feature',)")
    if not of or not all(thing in THINGS for thing in of):
        raise _unknown_things(name, of)
    register = METRICS.register(name)
    of_type(needs, (tuple, list), f"`needs` {what}", "pass a tuple of names, e.g. needs=('p',)")
    for need in needs:
        of_type(need, str, f"`needs` {what}", "pass names of metrics, e.g. needs=('p',)")
    of_type(unit, str, f"`unit` {what}", "pass text")
    for option, value in (("controls", controls), ("across_sites", across_sites), ("logged", logged)):
        of_type(value, bool, f"`{option}` {what}", "pass True or False")

    def add(function: Callable[..., Tensor]) -> DriftMetric:
        of_type(function, Callable, f"the function {what}", "put the decorator above a function")  # type: ignore[arg-type]
        return register(DriftMetric(name, function, unit, tuple(modes), controls, tuple(needs), across_sites, logged, tuple(of)))

    return add


def metrics_of(mode: str, of: str = "direction") -> list[DriftMetric]:
    """Metrics that are defined in a mode, of directions, features or dictionaries, each after those that it needs.

    One of another package that needs what there is not is left out, with a warning, and so are those that need it.

    Raises:
        ConfigError: a metric needs one that does not exist, or that needs it in turn.
    """
    is_defined: dict[str, bool] = {}

    def visit(name: str, needed_by: tuple[str, ...]) -> None:
        if name in needed_by:
            raise _circular_needs((*needed_by, name))
        if name in is_defined:
            return
        metric = METRICS.get(name)
        of_type(metric, DriftMetric, f"drift metric '{name}'", f"register it with @drift_metric('{name}')")
        missing = [need for need in metric.needs if need not in METRICS]
        if missing and not METRICS.is_announced(name):
            raise _unknown_need(metric, missing[0])
        if missing:
            warnings.warn(f"{_unknown_need(metric, missing[0])}", stacklevel=4)
            is_defined[name] = False
            return
        for need in metric.needs:
            visit(need, (*needed_by, name))
        is_defined[name] = mode in metric.modes and of in metric.of and all(is_defined[need] for need in metric.needs)

    for name in METRICS:
        visit(name, ())
    return [METRICS.get(name) for name, defined in is_defined.items() if defined]


def compute_metrics(sites: Sequence[Measurement]) -> None:
    """Fills `values` of what was measured together: in one mode, all of directions, all of features, or all of dictionaries."""
    if not sites:
        return
    for metric in metrics_of(sites[0].mode, sites[0].of):
        for site, values in zip(sites, metric.compute(sites), strict=True):
            site.values[metric.name] = values


def check_metrics(mode: str, sites: Iterable[SiteDirections]) -> None:
    """Computes the metrics of a mode once on made-up moments, before training is under way. Raises ConfigError, which names the metric."""
    measurements = []
    for directions in sites:
        count = len(directions.names)
        mean, sd, baseline_mean, baseline_sd = (torch.full((count,), value, dtype=torch.float64) for value in (0.5, 1.5, 0.0, 1.0))
        measurements.append(SiteMeasurement(directions, mode, 8, mean, sd, baseline_mean, baseline_sd))
    compute_metrics(measurements)


def _named(metric: DriftMetric, error: SteerError) -> SteerError:
    what = f"drift metric '{metric.name}': {error.what}"
    return type(error)(what, expected=error.expected, found=error.found, remedy=error.remedy)


def _unknown_need(metric: DriftMetric, need: str) -> ConfigError:
    return ConfigError(
        f"drift metric '{metric.name}' needs one that there is not",
        expected=f"`needs` among {', '.join(METRICS)}",
        found=repr(need),
        remedy=did_you_mean(need, METRICS) or f"register '{need}', or take it out of `needs`",
    )


def _wrong_values(metric: DriftMetric, values: Any, count: int) -> ConfigError:
    which = "direction, controls included," if metric.controls else "named direction"
    where = "all sites" if metric.across_sites else "the site"
    found = f"{type(values).__name__} {str(values)[:60]!r}"
    if isinstance(values, Tensor):
        found = f"{values.dtype} of the shape {list(values.shape)}"
    return ConfigError(
        f"drift metric '{metric.name}' returned no column of values",
        expected=f"a tensor of torch.float64 and the shape [{count}], one value per {which} of {where}",
        found=found,
        remedy="return such a tensor; a metric that controls do not have is registered with controls=False",
    )


def _reserved_name(name: str) -> ConfigError:
    return ConfigError(
        f"drift metric '{name}' has the name of a field of the records",
        expected=f"another name than {', '.join(RECORD_FIELDS)}",
        found=name,
        remedy="give the metric another name",
    )


def _unknown_modes(name: str, modes: tuple[str, ...]) -> ConfigError:
    return ConfigError(
        f"drift metric '{name}' is for an unknown mode",
        expected=f"modes among {', '.join(MODES)}",
        found=repr(modes),
        remedy="register it with modes=('probe',), or leave modes out for both",
    )


def _unknown_things(name: str, of: tuple[str, ...]) -> ConfigError:
    return ConfigError(
        f"drift metric '{name}' is of an unknown thing",
        expected=f"of= among {', '.join(THINGS)}",
        found=repr(of),
        remedy="register it with of=('feature',), or leave it out for directions",
    )


def _circular_needs(chain: tuple[str, ...]) -> ConfigError:
    return ConfigError(
        f"drift metric '{chain[-1]}' needs itself",
        expected="metrics that do not need each other in a circle",
        found=" -> ".join(chain),
        remedy="take one of them out of `needs`",
    )
