"""Dictionary features as tracked things: their numbers are those of whole encoding, in both modes, whatever the activation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drift.drift_helpers import SITE, Loop, batch, direction, prompts
from drift.feature_helpers import CHOSEN, DENSITY, FEATURES, dictionary, features_of, numbers, states
from scipy import stats
from torch import Tensor

from steer.drift import METRICS, DriftRecord, DriftStore, DriftTracker, TrackedFeatures
from steer.drift.feature_groups import feature_groups
from steer.drift.feature_sums import DictionarySums, FeatureSums, largest_over_ranks
from steer.errors import ConfigError, WidthError
from steer.features.activation import Activation
from steer.features.activations.jumprelu import JumpReLU
from steer.features.activations.topk import TopK
from steer.model.hooks import prepare_compile

Tiny = Callable[[str], Any]
ACTIVATIONS: dict[str, Callable[[], Activation | None]] = {
    "relu": lambda: None,
    "jumprelu": lambda: JumpReLU(numbers(FEATURES, seed=1).abs()),
    "topk": lambda: TopK(6),
}


def tracker(own: Any = None, features: list[int] = CHOSEN, **options: Any) -> DriftTracker:
    options = {"controls": 4, "stream": False, **options}
    return DriftTracker(features={"warm": TrackedFeatures(own or dictionary(), features, DENSITY)}, **options)


def of_kind(records: list[DriftRecord], kind: str = "feature", mode: str = "probe") -> list[DriftRecord]:
    return [record for record in records if record.kind == kind and record.mode == mode]


def nudge(model: Any, scale: float = 0.05) -> None:
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += scale * numbers(*parameter.shape, seed=50 + i)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_probe_mode_gives_the_numbers_of_whole_encoding(tiny: Tiny, activation: str) -> None:
    model, texts = tiny("llama").eval(), prompts(n=12)
    own = dictionary(ACTIVATIONS[activation](), first=1)
    tracked = tracker(own, probe=texts)
    with tracked.attached(model):
        before = features_of(model, texts, own, first=1)
        first = of_kind(tracked.measure(0))
        nudge(model)
        now = features_of(model, texts, own, first=1)
        records = of_kind(tracked.measure(1))
    assert [record.direction for record in records] == [f"warm/{i}" for i in CHOSEN]
    assert {record.change for record in first} == {0.0}
    for record, i in zip(records, CHOSEN, strict=True):
        change = torch.stack([a[:, i].mean() - b[:, i].mean() for a, b in zip(now, before, strict=True)])
        shares = torch.stack([(a[:, i] > 0).double().mean() - (b[:, i] > 0).double().mean() for a, b in zip(now, before, strict=True)])
        everything = torch.cat(now)[:, i]
        assert record.n == 12
        assert record.change == pytest.approx(change.mean().item(), rel=1e-4, abs=1e-6)
        assert record.density == pytest.approx(torch.stack([(f[:, i] > 0).double().mean() for f in now]).mean().item())
        assert record.density_change == pytest.approx(shares.mean().item(), abs=1e-9)
        assert record.maximum == pytest.approx(everything.max().item(), rel=1e-4)
        assert record.mean_on == pytest.approx(everything[everything > 0].mean().item(), rel=1e-4, nan_ok=True)
        half = stats.t.ppf(0.975, 11) * change.std().item() / 12**0.5
        assert (record.change_low, record.change_high) == pytest.approx((record.change - half, record.change + half), abs=1e-5)
        assert record.p is not None and record.q >= record.p and math.isfinite(record.z_controls)


def test_random_features_of_the_same_dictionary_stand_beside_them(tiny: Tiny) -> None:
    tracked = tracker(probe=prompts())
    with tracked.attached(tiny("llama")):
        tracked.measure(0)
        records = tracked.measure(1)
    controls = of_kind(records, "feature_control")
    assert len(controls) >= 4
    assert not {int(record.direction.removeprefix("warm/random-")) for record in controls} & set(CHOSEN)
    assert all("p" not in record.metrics and "effect_sd" in record.metrics for record in controls)
    assert not any("random" in name for name in tracked.log_values())
    assert f"drift/warm/{CHOSEN[0]}/{SITE}/effect_sd" in tracked.log_values()


def test_random_features_of_one_group_are_not_named_in_another(tiny: Tiny) -> None:
    own, share = dictionary(), torch.full((FEATURES,), 0.1)
    named = {"a": [3], "b": list(range(4, 20))}
    for seed in range(4):
        groups = feature_groups({name: TrackedFeatures(own, features, share) for name, features in named.items()}, 4, seed)
        drawn = {int(name.rpartition("-")[2]) for group in groups for name in group.names if "random" in name}
        assert len(drawn) >= 16 and not drawn & set(range(3, 20))


def test_stream_mode_counts_the_labelled_tokens_alone(tiny: Tiny) -> None:
    model, own = tiny("llama").train(), dictionary(first=2)
    tracked = tracker(own, stream=True)
    with tracked.attached(model):
        tracked.measure(0)
        for step in (0, 1):
            model(**batch(step))
        first = of_kind(tracked.measure(1), mode="stream")
        model(**batch(2))
        records = of_kind(tracked.measure(2), mode="stream")
    assert {record.change for record in first} == {record.change_low for record in first} == {0.0}

    def read(*steps: int) -> Tensor:
        """[rows, tokens, features], nan where no token counts."""
        taken = []
        for step in steps:
            inputs = batch(step)
            f = own.encode(states(model.eval(), inputs["input_ids"], inputs["attention_mask"])).double()
            taken.append(torch.where((inputs["labels"] != -100).unsqueeze(-1), f, torch.nan))
        return torch.cat(taken)

    before, now = read(0, 1), read(2)
    for record, i in zip(records, CHOSEN, strict=True):
        tokens, base = now[..., i][~now[..., i].isnan()], before[..., i][~before[..., i].isnan()]
        assert record.n == len(tokens)
        assert record.mean == pytest.approx(tokens.mean().item(), rel=1e-4)
        assert record.change == pytest.approx((tokens.mean() - base.mean()).item(), rel=1e-3, abs=1e-6)
        assert record.density == pytest.approx((tokens > 0).double().mean().item())
        assert record.maximum == pytest.approx(tokens.max().item(), rel=1e-4)
        error = 0.0
        for window in (now[..., i], before[..., i]):
            mean, sizes = window[~window.isnan()].mean(), (~window.isnan()).sum(1)
            error += float((window.nansum(1) - mean * sizes).square().sum() * len(window) / (len(window) - 1) / sizes.sum() ** 2)
        half = stats.t.ppf(0.975, 3) * error**0.5
        assert (record.change_low, record.change_high) == pytest.approx((record.change - half, record.change + half), rel=1e-3, abs=1e-6)


def test_a_first_batch_without_a_token_does_not_leave_the_dictionary_unmeasured(tiny: Tiny) -> None:
    model, own = tiny("llama").train(), dictionary(first=2)
    tracked, nothing = tracker(own, stream=True), batch(0)
    nothing["labels"] = torch.full_like(nothing["labels"], -100)
    nothing["labels"][:, 1] = nothing["input_ids"][:, 1]  # a token that the dictionary was not trained on
    with tracked.attached(model):
        tracked.measure(0)
        for inputs in (nothing, batch(1)):
            model(**inputs)
        tracked.measure(1)
        (first,) = [record for record in tracked.latest if record.kind == "dictionary" and record.mode == "stream"]
        model(**batch(2))
        tracked.measure(2)
        (second,) = [record for record in tracked.latest if record.kind == "dictionary" and record.mode == "stream"]
    assert first.n > 0 and first.metrics["fvu"] > 0 and second.metrics["fvu_change"] == second.metrics["fvu"] - first.metrics["fvu"]


def test_features_are_computed_in_full_precision_under_autocast(tiny: Tiny) -> None:
    model, own, read = tiny("llama").train(), dictionary(), []
    tracked = tracker(own, stream=True)
    encode = tracked.features.groups[0].encode
    tracked.features.groups[0].encode = lambda h: read.append((h, encode(h))) or read[-1][1]
    with tracked.attached(model), torch.autocast("cpu", torch.bfloat16):
        model(**batch(0))
    ((h, f),) = read
    expected = own.encode(h.float())[..., CHOSEN]
    torch.testing.assert_close(f[..., : len(CHOSEN)], expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.allclose(own.encode(h.float())[..., CHOSEN].float(), expected, rtol=1e-5, atol=1e-5)


def test_two_ranks_sum_to_the_window_of_one() -> None:
    """Also the maximum, which is found by sums."""
    f, weight = numbers(6, 5, 3, seed=3).relu(), numbers(6, 5, seed=4) > 0
    whole, parts = FeatureSums(3), [FeatureSums(3), FeatureSums(3)]
    whole.update(f, weight)
    for part, rows in zip(parts, (slice(0, 2), slice(2, 6)), strict=True):
        part.update(f[rows], weight[rows])
    for reduced in _on_two_ranks(parts):
        for name, tensor in whole.state_dict().items():
            torch.testing.assert_close(reduced.state_dict()[name], tensor, rtol=1e-12, atol=1e-12, msg=name)


def _on_two_ranks(parts: list[FeatureSums]) -> list[FeatureSums]:
    """`reduced` of every rank, in threads that meet at every sum."""
    import threading

    barrier, given, out = threading.Barrier(2), [torch.empty(0)] * 2, [parts[0]] * 2

    def run(rank: int) -> None:
        def reduce(tensor: Tensor) -> Tensor:
            given[rank] = tensor
            barrier.wait(30)
            total = given[0] + given[1]
            barrier.wait(30)
            return total

        out[rank] = parts[rank].reduced(reduce)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return out


@pytest.mark.parametrize("values", [[0.0, 1e-42, 3.4e38, 7.123456789], [2.0**k for k in range(-20, 20)]])
def test_the_largest_of_one_rank_is_itself(values: list[float]) -> None:
    x = torch.tensor(values)
    assert torch.equal(largest_over_ranks(x, lambda t: t), x)


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_the_dictionary_itself_is_measured(tiny: Tiny, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.drift.feature_tracking.LEAST_TOKENS", 10)
    model, texts, own = tiny("llama").eval(), prompts(n=12), dictionary(ACTIVATIONS[activation](), first=1)
    tracked = tracker(own, probe=texts)
    with tracked.attached(model):
        (record,) = of_kind(tracked.measure(0), "dictionary")
        h = torch.cat([states(model, torch.tensor([row.ids]))[0, 1:] for row in texts]).double()
        f = own.encode(h)
        fvu = (h - own.decode(f)).square().sum() / (h - h.mean(0)).square().sum()
        assert record.n == len(h)
        assert record.fvu == pytest.approx(fvu.item(), rel=1e-4)
        assert record.l0 == pytest.approx((f > 0).sum(1).double().mean().item())
        assert record.silent == pytest.approx(((f > 0).sum(0) == 0).double().mean().item())
        assert record.fvu_change == 0.0
        with torch.no_grad():  # what stays is the bias of the decoder, which is no longer small beside the activations
            for parameter in model.parameters():
                parameter *= 0.3
        with pytest.warns(UserWarning, match="the dictionary of 'warm' at .* explains the model less well") as caught:
            (record,) = of_kind(tracked.measure(1), "dictionary")
        assert record.fvu_change > 0.25 * fvu and len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tracked.measure(2)  # it warns once


def test_tiles_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    own, h = dictionary(), numbers(50, 32, seed=1)
    whole = DictionarySums(own)
    whole.update(h)
    monkeypatch.setattr("steer.drift.feature_sums.TILE", FEATURES * 7)
    tiles = DictionarySums(own)
    tiles.update(h)
    for name in DictionarySums.names:
        torch.testing.assert_close(getattr(tiles, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


def test_only_the_rows_of_the_chosen_features_are_computed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In stream mode; the dictionary as a whole is read once in a window."""
    model, own = tiny("llama").train(), dictionary()
    tracked, computed = tracker(own, stream=True), []
    encode = type(own.encoder).encode
    monkeypatch.setattr(type(own.encoder), "encode", lambda self, h, f=None: computed.append(self.width) or encode(self, h, f))
    with tracked.attached(model):
        tracked.measure(0)
        for step in range(3):
            model(**batch(step))
    chosen = len(tracked.features.groups[0].names)
    assert chosen < FEATURES
    assert sorted(computed) == sorted([chosen] * 3 + [FEATURES])


# ---- beside directions, in stores, over a resume


def test_directions_and_features_of_one_site_do_not_mix(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    alone = DriftTracker({"rude": direction()}, probe=prompts(), controls=4, stream=False)
    both = DriftTracker(
        {"rude": direction()},
        features={"warm": (dictionary(), CHOSEN, DENSITY)},
        probe=prompts(),
        controls=4,
        stream=False,
        store=tmp_path / "d.sqlite",
    )
    records = []
    for tracked in (alone, both):
        with tracked.attached(model):
            tracked.measure(0)
        nudge(model)
        with tracked.attached(model):
            records.append(tracked.measure(1))
        nudge(model, -0.05)
    (of_direction,) = of_kind(records[1], "named")
    (expected,) = of_kind(records[0], "named")
    assert {k: v for k, v in of_direction.metrics.items()} == pytest.approx(dict(expected.metrics), rel=1e-3, nan_ok=True)
    with DriftStore(tmp_path / "d.sqlite") as store:
        assert {each.kind for each in store.tracked()} == {"named", "control", "feature", "feature_control", "dictionary"}
        series = store.series(f"warm/{CHOSEN[1]}", SITE)
        assert series["step"] == [0, 1] and series["density"][1] == of_kind(records[1])[1].density
        assert [r.direction for r in store.records(kind="dictionary")] == ["warm", "warm"]


@pytest.mark.parametrize("cut", [1, 2])
def test_a_resumed_run_gives_the_records_of_the_uninterrupted_one(tiny: Tiny, cut: int) -> None:
    def start() -> tuple[DriftTracker, Loop]:
        torch.manual_seed(0)
        return tracker(dictionary(first=1), probe=prompts(), stream=True), Loop(tiny("llama"))

    def go(tracked: DriftTracker, loop: Loop, steps: int) -> list[DriftRecord]:
        return [r for step in loop.train(steps) if step % 2 == 0 for r in tracked.measure(step)]

    tracked, loop = start()
    with tracked.attached(loop.model):
        tracked.measure(0)
        whole = go(tracked, loop, 4)
    tracked, loop = start()
    with tracked.attached(loop.model):
        tracked.measure(0)
        resumed = go(tracked, loop, cut)
        state, rest = tracked.state_dict(), loop.state()
    tracked, loop = start()
    loop.restore(rest)
    tracked.load_state_dict(state)
    with tracked.attached(loop.model):
        resumed += go(tracked, loop, 4 - cut)
    assert [(r.step, r.mode, r.direction, r.n) for r in resumed] == [(r.step, r.mode, r.direction, r.n) for r in whole]
    for one, other in zip(resumed, whole, strict=True):
        assert dict(one.metrics) == pytest.approx(dict(other.metrics), rel=1e-9, abs=1e-12, nan_ok=True), one.direction
    with pytest.raises(ConfigError, match="another"):
        tracker(dictionary(first=1), [5, 33, 9], probe=prompts(), stream=True).load_state_dict(state)


def test_training_is_the_same_to_the_bit(tiny: Tiny) -> None:
    def losses(tracked: DriftTracker | None) -> list[float]:
        loop, found = Loop(tiny("llama")), []
        if tracked is not None:
            tracked.attach(loop.model).measure(0)
        for step in loop.train(4):
            found.append(float(next(loop.model.parameters()).sum()))
            if tracked is not None:
                tracked.measure(step)
        return found

    assert losses(tracker(probe=prompts(), stream=True)) == losses(None)


def test_compiled_training_is_read_like_any_other_and_not_compiled_again(tiny: Tiny) -> None:
    torch._dynamo.reset()
    compilations = torch._dynamo.utils.counters["stats"]
    prepare_compile()
    windows = []
    for model in (torch.compile(tiny("llama").train(), backend="eager"), tiny("llama").train()):
        loop, tracked = Loop(model), tracker(dictionary(first=1), probe=prompts(), stream=True)
        with tracked.attached(model):
            tracked.measure(0)
            list(loop.train(2))
            before = compilations["unique_graphs"]
            windows.append(of_kind(tracked.measure(2), mode="stream") + of_kind(tracked.latest, "dictionary", "stream"))
            list(loop.train(2))
            tracked.measure(4)
        assert before > 0 and compilations["unique_graphs"] == before
    for compiled, plain in zip(*windows, strict=True):
        assert compiled.n == plain.n
        assert dict(compiled.metrics) == pytest.approx(dict(plain.metrics), rel=1e-4, abs=1e-6, nan_ok=True)


def test_metrics_of_features_and_of_directions_are_told_apart() -> None:
    from steer.drift.metric import metrics_of

    of_direction = {metric.name for metric in metrics_of("probe")}
    assert {"z_isotropic", "effect_sd"} <= of_direction and not {"density", "fvu"} & of_direction
    of_feature = {metric.name for metric in metrics_of("stream", "feature")}
    assert {"density", "maximum", "mean_on", "change_low", "z_controls"} <= of_feature and not {"p", "fvu", "dot_change"} & of_feature
    assert {"fvu", "fvu_change", "l0", "silent"} <= {metric.name for metric in metrics_of("stream", "dictionary")}
    assert METRICS.get("density").of == ("feature",)


# ---- what is refused


def test_what_cannot_be_tracked_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"'warm' are none[\s\S]*dictionary, indices"):
        DriftTracker(features={"warm": [3, 4]}, probe=prompts())  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"lies outside the dictionary[\s\S]*\[40\]"):
        tracker(features=[40], probe=prompts())
    with pytest.raises(ConfigError, match="nobody recorded how often"):
        DriftTracker(features={"warm": (dictionary(), CHOSEN)}, probe=prompts())
    with pytest.raises(ConfigError, match=r"one name at one site[\s\S]*warm@"):
        DriftTracker({"warm": direction()}, features={"warm": (dictionary(), CHOSEN, DENSITY)}, probe=prompts())
    with pytest.raises(WidthError, match=r"features at [\s\S]*do not fit[\s\S]*width 32[\s\S]*width 16 of FeatureGroup\(warm"):
        tracker(dictionary(width=16), probe=prompts()).attach(tiny("llama"))
