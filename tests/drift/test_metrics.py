"""The drift metrics against their limits and simulation, and what the base class asks of a new one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from drift.drift_helpers import SITE, direction, prompts
from scipy import stats
from torch import Tensor

from steer.drift import METRICS, DriftStore, DriftTracker
from steer.drift.accumulators import ProjectionMoments
from steer.drift.measurement import SiteMeasurement
from steer.drift.metric import DriftMetric, compute_metrics, drift_metric, metrics_of
from steer.drift.site_directions import SiteDirections
from steer.errors import ConfigError
from steer.model.site import Site

Tiny = Callable[[str], Any]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def named_only(units: Tensor) -> SiteDirections:
    """units: [named directions, width]."""
    return SiteDirections(Site.parse(SITE), tuple(f"d{i}" for i in range(len(units))), units, (1.0,) * len(units))


def shifted(shift: Tensor, units: Tensor, baseline: Tensor) -> SiteMeasurement:
    """Every prompt's state is moved by the same vector. shift: [width], units: [named directions, width], baseline: [prompts, width]."""
    return SiteMeasurement.of_states(named_only(units), baseline + shift, baseline)


def z_isotropic(shift: Tensor, units: Tensor) -> Tensor:
    return METRICS.get("z_isotropic").compute([shifted(shift, units, normal(30, len(shift), seed=9))])[0]


def z_covariance(shift: Tensor, units: Tensor, baseline: Tensor) -> Tensor:
    return METRICS.get("z_covariance").compute([shifted(shift, units, baseline)])[0]


def z_controls(effect: Tensor, controls: Tensor) -> Tensor:
    """effect: [named directions] in baseline SD, controls: [controls] likewise."""
    width = len(effect) + len(controls)
    own = SiteDirections(Site.parse(SITE), tuple(map(str, range(width))), torch.eye(width).double(), (1.0,) * len(effect))
    site = SiteMeasurement.of_states(own, normal(2, width), normal(2, width))
    site.values["effect_sd"] = torch.cat([effect, controls]).double()
    return METRICS.get("z_controls").compute([site])[0]


def test_isotropic_z_on_isotropic_states_is_the_cosine_times_the_root_of_the_width() -> None:
    width = 64
    baseline, shift = normal(200, width), normal(width, seed=1) * 3
    named = torch.nn.functional.normalize(normal(8, width, seed=2) + torch.linspace(-0.3, 0.3, 8).double()[:, None] * shift, dim=1)
    expected = named @ shift / shift.norm() * math.sqrt(width)
    z = METRICS.get("z_isotropic").compute([shifted(shift, named, baseline)])[0]
    near = expected.abs() < 3
    assert near.any() and not near.all()
    torch.testing.assert_close(z[near], expected[near], rtol=0.1, atol=0.1)
    aligned = z_isotropic(shift, (torch.stack([shift, -shift]) / shift.norm()))
    assert aligned.tolist() == pytest.approx([stats.norm.isf(0.5e-4), -stats.norm.isf(0.5e-4)])
    assert z_isotropic(torch.zeros(width).double(), named).tolist() == [0.0] * 8
    few = METRICS.get("z_isotropic").compute([shifted(shift, named, baseline[:2])])[0]
    assert bool(few.isnan().all())


@pytest.mark.parametrize(("prompts", "decay"), [(8, 1.5), (16, 0.5), (16, 1.0), (16, 1.5), (24, 1.5), (64, 1.0), (64, 2.0)])
@pytest.mark.parametrize("common", [True, False], ids=["one shift for all prompts", "noise of each prompt"])
def test_isotropic_z_holds_its_size_on_anisotropic_states(prompts: int, decay: float, common: bool) -> None:
    """Directions and shifts that vary as the states do and have nothing to do with each other; the spectrum falls as 1 / rank^decay."""
    width, trials, named = 256, 60, 16
    sd = torch.arange(1, width + 1).double().pow(-decay / 2)
    passed = []
    for trial in range(trials):
        draws = normal(2 * prompts + named, width, seed=1000 * prompts + trial) * sd
        baseline, noise = draws[:prompts], draws[prompts : 2 * prompts]
        units = torch.nn.functional.normalize(draws[2 * prompts :], dim=1)
        site = SiteMeasurement.of_states(named_only(units), baseline + (noise[0] if common else noise), baseline)
        passed.append(METRICS.get("z_isotropic").compute([site])[0].abs() > 1.96)
    assert 0.03 <= float(torch.cat(passed).double().mean()) <= 0.07


def test_covariance_z_is_the_limit_of_random_directions_drawn_from_the_states() -> None:
    width, n = 32, 12
    states = normal(n, width) * torch.linspace(3, 0.1, width).double() + 5
    shift, named = normal(width, seed=1), torch.nn.functional.normalize(normal(3, width, seed=2), dim=1)
    drawn = normal(40000, n, seed=3) @ (states - states.mean(0))
    spread = (drawn @ shift).square().mean().sqrt() / drawn.square().sum(1).mean().sqrt()
    torch.testing.assert_close(z_covariance(shift, named, states), (named @ shift) / spread, rtol=0.02, atol=1e-3)


def test_covariance_z_forgives_a_shift_along_what_varies_anyway() -> None:
    width = 50
    states = normal(20, width) * 0.1
    states[:, 0] += 10 * normal(20, seed=1)
    named = torch.eye(width, dtype=torch.float64)[:2]
    along_noise, elsewhere = named[0] * 3, named[1] * 3
    assert z_covariance(along_noise, named, states)[0] < 1.1 < z_isotropic(along_noise, named)[0]
    assert z_covariance(elsewhere, named, states)[1] > 10


def test_control_z() -> None:
    controls = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert z_controls(torch.tensor([2.0, -3.0]), controls).tolist() == [2.0, -3.0]
    assert z_controls(torch.tensor([0.0]), torch.zeros(4)).tolist() == [0.0]


def test_control_z_holds_its_size() -> None:
    """Named directions that are random ones themselves exceed the 5 % point of t with 16 degrees of freedom 5 % of the time."""
    shifts = normal(4000, 17)
    z = torch.stack([z_controls(row[:1], row[1:])[0] for row in shifts])
    assert 0.04 <= float((z.abs() > stats.t(16).ppf(0.975)).double().mean()) <= 0.06


# ---- what a measurement has in each mode


def test_the_metrics_of_each_mode() -> None:
    names = {mode: [metric.name for metric in metrics_of(mode)] for mode in ("probe", "stream")}
    of_features, of_dictionaries = ([metric.name for metric in metrics_of("probe", of)] for of in ("feature", "dictionary"))
    assert sorted({*names["probe"], *of_features, *of_dictionaries}) == list(METRICS)
    assert {"p", "q", "z_isotropic", "z_covariance"}.isdisjoint(names["stream"])
    assert set(names["stream"]) >= {"mean", "sd", "change", "effect_sd", "effect_gap", "z_controls"}
    for name in names["probe"]:
        metric = METRICS.get(name)
        assert (name in names["stream"]) == ("stream" in metric.modes and all(need in names["stream"] for need in metric.needs))
    assert all(names["probe"].index(need) < names["probe"].index(name) for name in names["probe"] for need in METRICS.get(name).needs)


def test_every_metric_says_what_it_is() -> None:
    assert all(isinstance(METRICS.get(name), DriftMetric) and METRICS.get(name).name == name and what for name, what in METRICS.table())


def test_values_of_controls_only_where_a_metric_has_them() -> None:
    own = SiteDirections(Site.parse(SITE), ("a", "b", "random-00"), torch.eye(3).double(), (2.0, 4.0))
    moments = ProjectionMoments(3)
    moments.update(normal(20, 3), torch.ones(20))
    later = ProjectionMoments(3)
    later.update(normal(30, 3, seed=1) + 1, torch.ones(30))
    stream = SiteMeasurement.of_moments(own, later, moments)
    compute_metrics([stream])
    counts = {name: len(values) for name, values in stream.values.items()}
    assert counts == {metric.name: 3 if metric.controls else 2 for metric in metrics_of("stream")}
    assert counts.items() >= {"mean": 3, "sd": 3, "change": 3, "effect_sd": 3, "effect_gap": 2, "z_controls": 2}.items()
    torch.testing.assert_close(stream.values["effect_gap"], stream.values["change"][:2] / torch.tensor([2.0, 4.0]).double())
    with pytest.raises(ConfigError, match="states that are not kept"):
        _ = stream.shift


# ---- a new metric


@pytest.fixture
def new() -> Iterator[Callable[..., Any]]:
    """Registers metrics for a test, and takes them away after it."""
    METRICS.load()
    before = dict(METRICS._entries)
    yield drift_metric
    METRICS._entries.clear()
    METRICS._entries.update(before)


def test_a_new_metric_is_computed_logged_and_stored(tiny: Tiny, tmp_path: Path, new: Any) -> None:
    @new("range", unit="of the activation", modes=("probe",), controls=False)
    def spread(site: SiteMeasurement) -> Tensor:
        """Largest projection minus the smallest."""
        projections = site.named(site.states @ site.directions.units.mT)
        return projections.max(0).values - projections.min(0).values

    @new("largest", needs=("range",), across_sites=True, controls=False, logged=False)
    def largest(sites: Any) -> Tensor:
        """The same, as a share of the largest one at any site."""
        ranges = torch.cat([site.values["range"] for site in sites])
        return ranges / ranges.max()

    watched = {"a": [direction(SITE), direction("layers.0.output", seed=1)], "b": direction(SITE, seed=2)}
    tracker = DriftTracker(watched, probe=prompts(), controls=2, store=tmp_path / "d.sqlite")
    with tracker.attached(tiny("llama")):
        named = [record for record in tracker.measure(0) if record.kind == "named"]
    assert all(record.range > 0 for record in named) and max(record.largest for record in named) == 1.0
    assert [record.range for record in tracker.latest if record.kind == "control"] == [None] * 4
    assert tracker.log_values()[f"drift/a/{SITE}/range"] == named[0].range
    assert not any(key.endswith("largest") for key in tracker.log_values())
    with DriftStore(tmp_path / "d.sqlite") as store:
        assert store.series("b", SITE)["range"] == [record.range for record in named if record.direction == "b"]
        assert sorted(store.records(), key=str) == sorted(tracker.latest, key=str)


@pytest.mark.parametrize(
    ("returned", "described"),
    [
        (torch.zeros(3), "torch.float32 of the shape \\[3\\]"),
        (torch.zeros(2).double(), "torch.float64 of the shape \\[2\\]"),
        (torch.zeros(3, 1).double(), "torch.float64 of the shape \\[3, 1\\]"),
        (1.0, "float '1.0'"),
        (None, "NoneType"),
    ],
)
def test_anything_but_a_column_of_values_is_refused(tiny: Tiny, new: Any, returned: Any, described: str) -> None:
    @new("wrong")
    def wrong(site: SiteMeasurement) -> Any:
        """Wrong."""
        return returned

    tracker = DriftTracker({"rude": direction()}, probe=prompts(), controls=2)
    with tracker.attached(tiny("llama")):
        with pytest.raises(ConfigError, match=f"'wrong' returned no column(.|\n)*shape \\[3\\], one value per direction(.|\n)*{described}"):
            tracker.measure(0)
        assert tracker.last_step == -1


def test_needs_that_cannot_be_met_are_refused(new: Any) -> None:
    new("a", needs=("b",))(lambda site: site.values["b"])
    with pytest.raises(ConfigError, match="drift metric 'a' needs one that there is not"):
        metrics_of("probe")
    new("b", needs=("a",))(lambda site: site.values["a"])
    with pytest.raises(ConfigError, match="needs itself(.|\n)*a -> b -> a"):
        metrics_of("probe")


def test_registrations_that_cannot_work_are_refused(new: Any) -> None:
    for reserved in ("step", "n", "metrics"):
        with pytest.raises(ConfigError, match="name of a field"):
            new(reserved)
    for modes in ((), ("dream",)):
        with pytest.raises(ConfigError, match="unknown mode"):
            new("odd", modes=modes)
    with pytest.raises(ConfigError, match="drift metric 'bare' is none(.|\n)*decorator in steer.drift.metric"):
        METRICS.register("bare")(lambda site: site.mean)
    assert "bare" not in METRICS
    for name in ("a/b", " a", "a ", "", 3, "a\n"):
        with pytest.raises(ConfigError, match="cannot be the name of a drift metric"):
            new(name)
    with pytest.raises(ConfigError, match="`needs` of drift metric 'odd'"):
        new("odd", needs="p")


@pytest.mark.parametrize("across_sites", [False, True])
def test_a_metric_cannot_change_what_others_read(new: Any, across_sites: bool) -> None:
    def measured() -> dict[str, Tensor]:
        site = shifted(normal(4), torch.eye(4).double()[:2], normal(9, 4, seed=1))
        compute_metrics([site])
        return site.values

    def write(site: SiteMeasurement) -> Tensor:
        for tensor in (site.mean, site.baseline_sd, site.states, site.baseline_states, site.directions.units, *site.values.values()):
            tensor.zero_()
        return site.mean

    before = measured()
    new("a_writing", across_sites=across_sites)(lambda measured_at: write(measured_at[0]) if across_sites else write(measured_at))
    after = measured()
    assert after.pop("a_writing").tolist() == [0, 0]
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def test_a_metric_that_fails_is_named(new: Any) -> None:
    new("broken")(lambda site: site.values["nope"])
    with pytest.raises(ConfigError, match="drift metric 'broken' failed(.|\n)*KeyError: 'nope'") as caught:
        compute_metrics([shifted(normal(4), torch.eye(4).double()[:2], normal(9, 4, seed=1))])
    assert isinstance(caught.value.__cause__, KeyError)


def test_loggers_get_finite_values_alone(tiny: Tiny, new: Any) -> None:
    for name, factor in (("undefined", math.nan), ("endless", math.inf), ("least", -math.inf)):
        new(name)(lambda site, factor=factor: torch.ones_like(site.mean) * factor)
    tracker = DriftTracker({"rude": direction()}, probe=prompts(), controls=2)
    with tracker.attached(tiny("llama")):
        [named] = [record for record in tracker.measure(0) if record.kind == "named"]
    assert math.isnan(named.undefined) and named.endless == math.inf and named.least == -math.inf
    assert tracker.log_values() and all(math.isfinite(value) for value in tracker.log_values().values())


# ---- metrics that fail


def tracked(**options: Any) -> DriftTracker:
    return DriftTracker({"a": direction(SITE)}, probe=prompts(), controls=2, **options)


def test_states_in_a_mode_without_them_are_found_at_the_first_measurement(tiny: Tiny, new: Any) -> None:
    @new("forgetful")
    def forgetful(site: SiteMeasurement) -> Tensor:
        """It should say modes=('probe',)."""
        return site.states.mean() + 0 * site.sd

    tracker = tracked()
    with tracker.attached(tiny("llama")):
        with pytest.raises(ConfigError, match=r"drift metric 'forgetful': a drift metric reads states[\s\S]*modes=\('probe',\)"):
            tracker.measure(0)
        assert tracker.last_step == -1
    tracker = tracked(stream=False)
    with tracker.attached(tiny("llama")):
        assert all(record.forgetful is not None for record in tracker.measure(0))


def test_a_metric_that_writes_changes_nothing_of_the_others(tiny: Tiny, new: Any) -> None:
    @new("a_vandal")
    def vandal(site: SiteMeasurement) -> Tensor:
        """Writes into all that it gets."""
        site.values.clear()
        site.directions.units.zero_()
        return site.mean.mul_(0)

    with (tracker := tracked()).attached(tiny("llama")):
        spoilt = {record.direction: record.mean for record in tracker.measure(0)}
    del METRICS._entries["a_vandal"]
    with (tracker := tracked()).attached(tiny("llama")):
        assert spoilt == {record.direction: record.mean for record in tracker.measure(0)}
    vandal_of_ours = DriftMetric("x", vandal.function)
    vandal.function.__module__ = "steer.drift.metrics.vandal"  # in the folder of the kind, as a new file of a checkout is
    units = torch.eye(3).double()
    site = SiteMeasurement.of_states(named_only(units), normal(4, 3), normal(4, 3, seed=1))
    before = site.mean.clone()
    vandal_of_ours.compute([site])
    assert torch.equal(site.mean, before)


def test_a_need_that_there_is_not_names_who_has_it(new: Any) -> None:
    @new("hungry", needs=("effect_sdd",))
    def hungry(site: SiteMeasurement) -> Tensor:
        """Needs what there is not."""
        return site.sd

    with pytest.raises(ConfigError, match=r"drift metric 'hungry' needs one that there is not[\s\S]*did you mean 'effect_sd'"):
        metrics_of("probe")
    METRICS._announced.add("hungry")
    try:
        with pytest.warns(UserWarning, match="drift metric 'hungry' needs one that there is not"):
            names = [metric.name for metric in metrics_of("probe")]
        assert "hungry" not in names and "effect_sd" in names
    finally:
        METRICS._announced.discard("hungry")


@pytest.mark.parametrize(
    "options",
    [
        {"modes": 3},
        {"modes": "probe"},
        {"modes": ("x",)},
        {"needs": (5,)},
        {"needs": "p"},
        {"unit": None},
        {"controls": 1},
        {"logged": "no"},
    ],
)
def test_options_of_the_decorator_are_typed(options: dict[str, Any], new: Any) -> None:
    with pytest.raises(ConfigError, match="drift metric 'typed'"):
        new("typed", **options)(lambda site: site.sd)
    with pytest.raises(ConfigError, match="the function of drift metric 'typed'"):
        new("typed")(5)
    assert "typed" not in METRICS
