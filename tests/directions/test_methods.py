"""Extractors equal a direct fit on the collected texts, and ask for no more than they read."""

import builtins
import sys

import numpy
import pytest
import torch
from concept_erasure import LeaceFitter
from directions.direction_helpers import moments_of
from sklearn.covariance import oas
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from steer.directions import EXTRACTORS, ContrastSet, Erasure, extract, fit_erasure
from steer.directions.erasure import erasure
from steer.directions.extractor import Extractor, extractor
from steer.directions.extractors.ccs import consistency
from steer.directions.heldout import auc
from steer.directions.moments import NEEDS, ContrastMoments
from steer.errors import ConfigError, ContrastError, NonFiniteError, WidthError
from steer.intervene import Erase, Intervention, Plan
from steer.model.tokens import Row

N, WIDTH = 60, 8
SIDE = torch.arange(N) % 2 == 0


def texts(gap: float = 2.0, offset: float = 50.0, seed: int = 0) -> torch.Tensor:
    """[N, WIDTH] with correlated dimensions, far from zero; every second text is positive and `gap` further along the first one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator) + offset
    x[SIDE, 0] += gap
    return x


def run(method: str, x: torch.Tensor, paired: bool = True) -> torch.Tensor:
    extractor = EXTRACTORS.get(method)
    return extractor.direction(moments_of(x, SIDE, paired, extractor.needs)).double()


def aligned(a: torch.Tensor, b: torch.Tensor) -> float:
    return abs(float(torch.cosine_similarity(a.double(), b.double(), dim=0)))


def test_lda_equals_a_direct_fit():
    x = texts()
    own = torch.where(SIDE[:, None], x[SIDE].double().mean(0), x[~SIDE].double().mean(0))
    within, _ = oas((x - own).numpy(), assume_centered=True)
    gap = x[SIDE].double().mean(0) - x[~SIDE].double().mean(0)
    assert aligned(run("lda", x), torch.from_numpy(numpy.linalg.solve(within, gap.numpy()))) > 1 - 1e-6


def test_lda_is_shrunk_where_there_are_fewer_texts_than_dimensions():
    generator = torch.Generator().manual_seed(0)
    few, fresh = (torch.randn(24, 100, generator=generator) for _ in range(2))
    side = torch.arange(24) % 2 == 0
    for x in (few, fresh):
        x[side, :4] += 1.5
    extractor = EXTRACTORS.get("lda")
    direction = extractor.direction(moments_of(few, side, False, extractor.needs)).float()
    assert torch.isfinite(direction).all() and auc((fresh @ direction)[side].double(), (fresh @ direction)[~side].double()) > 0.85


def test_classes_that_do_not_vary_differ_by_their_means():
    x = torch.where(SIDE[:, None], torch.linspace(49, 51, WIDTH), 50.0)
    assert aligned(run("lda", x), x[0] - x[1]) > 1 - 1e-4


def test_leace_equals_a_direct_fit():
    x = texts()
    eraser = LeaceFitter.fit(x.double(), SIDE.double()).eraser
    fitted = erasure(moments_of(x, SIDE, True, ("scatter",)))
    assert aligned(run("leace", x), eraser.proj_right[0]) > 1 - 1e-6
    assert torch.allclose(fitted(x), eraser(x.double()).float(), atol=1e-3)


def test_nothing_linear_is_left_after_erasure():
    x = texts()
    fitted = erasure(moments_of(x, SIDE, False, ("scatter",)))
    erased = fitted(x).double()
    assert (erased[SIDE].mean(0) - erased[~SIDE].mean(0)).norm() < 1e-4 * (x[SIDE].mean(0) - x[~SIDE].mean(0)).norm()
    probe = LogisticRegression(C=1e4, max_iter=2000)
    assert probe.fit(x - 50, SIDE).score(x - 50, SIDE) > 0.8
    assert probe.fit(erased - 50, SIDE).score(erased - 50, SIDE) <= 0.6
    assert fitted.left.shape == fitted.right.shape == (1, WIDTH) and fitted.mean.shape == (WIDTH,)


def test_the_operator_erases_what_was_fitted(tiny):
    """`erase` takes the tensors as they are, and its change at strength 1 is the eraser's."""
    model = tiny("llama")
    rows = [Row(tuple(torch.randint(7, 96, (6,), generator=torch.Generator().manual_seed(i)).tolist()), 2) for i in range(16)]
    contrast = ContrastSet(tuple(rows[:8]), tuple(rows[8:]), paired=False)
    (site, fitted), *_ = fit_erasure(model, contrast, ["layers.1.output"], span="last", progress=False).items()
    assert isinstance(fitted, Erasure)
    ids = torch.tensor([rows[0].ids])
    with torch.no_grad():
        before = model(ids, output_hidden_states=True).hidden_states[2]
        with Plan(Intervention(Erase(fitted.left, fitted.right, fitted.mean), site)).attached(model):
            after = model(ids, output_hidden_states=True).hidden_states[2]
    assert torch.allclose(after, fitted(before), atol=1e-4) and not torch.allclose(after, before, atol=1e-3)


def test_a_concept_that_is_not_there_cannot_be_erased():
    x = texts()
    x[SIDE] = x[~SIDE]
    with pytest.raises(ContrastError, match="nothing to erase"):
        erasure(moments_of(x, SIDE, True, ("scatter",)))


def test_logistic_equals_a_direct_fit():
    x = texts()
    centred = (x - x.mean(0)).double()
    fitted = LogisticRegression(max_iter=1000).fit(centred / centred.square().mean().sqrt(), SIDE)
    assert aligned(run("logistic", x), torch.from_numpy(fitted.coef_[0])) > 1 - 1e-6


def test_centred_pca_equals_sklearn_with_or_without_pairs():
    x = texts()
    expected = torch.from_numpy(PCA(1).fit(x.double().numpy()).components_[0])
    assert min(aligned(run("pca_centred", x, paired), expected) for paired in (True, False)) > 1 - 1e-6
    assert aligned(run("pca", x, False), expected) > 1 - 1e-6 > aligned(run("pca", x, True), expected)


def test_pair_differences_are_not_centred():
    """The part that all pairs share survives; centring the differences would remove it."""
    x = texts(gap=0.0)
    x[SIDE] = x[~SIDE]
    x[SIDE, 2] += 5  # the same in all pairs
    x[SIDE, 3] += torch.randn(N // 2, generator=torch.Generator().manual_seed(0))
    assert abs(run("pca", x)[2]) > 0.9


def test_ccs_splits_pairs_without_their_labels():
    """The same probe whichever side is called positive: labels have no part in it but the sign, which the caller sets."""
    x = texts(gap=12.0, offset=0.0)
    swapped = x.view(-1, 2, WIDTH).flip(1).reshape(N, WIDTH)
    a, b = run("ccs", x), run("ccs", swapped)
    for direction in (a, b):
        along = x.double() @ direction
        assert max(auc(along[SIDE], along[~SIDE]), auc(along[~SIDE], along[SIDE])) > 0.95
    assert aligned(a, b) > 0.9
    p, q = torch.tensor([[1.0, 0.5]]), torch.tensor([[0.0, 0.5]])
    assert consistency(p, q).tolist() == pytest.approx([0.0, 0.25])


def test_other_names_find_the_same_method():
    assert EXTRACTORS.get("caa") is EXTRACTORS.get("mean_difference") and EXTRACTORS.get("mass_mean") is EXTRACTORS.get("lda")
    assert "caa" not in list(EXTRACTORS) and "caa" not in dict(EXTRACTORS.table())
    with pytest.raises(ConfigError, match="registered twice"):
        EXTRACTORS.register("caa")(None)
    with pytest.raises(ConfigError, match="did you mean 'mass_mean'"):
        EXTRACTORS.get("massmean")


@pytest.mark.parametrize("method", sorted(EXTRACTORS))
def test_moments_hold_only_what_a_method_reads(method):
    """Every method works with only what it declares as needed; with less, the moments name what is missing."""
    extractor, x = EXTRACTORS.get(method), texts()
    moments = moments_of(x, SIDE, True, extractor.needs)
    assert set(extractor.needs) <= set(NEEDS) and extractor.direction(moments).shape == (WIDTH,)
    assert (moments.all.second is not None, moments.differences.second is not None, moments.texts is not None) == tuple(
        need in extractor.needs for need in NEEDS
    )
    if extractor.needs:
        with pytest.raises(ConfigError, match=f"'{extractor.needs[0]}' was not kept"):
            extractor.direction(moments_of(x, SIDE, True, ()))


def test_covariances_from_sums_equal_numpys():
    x = texts(offset=1e3)
    moments = ContrastMoments(SIDE, True, ("scatter", "texts"))
    for rows in torch.arange(N).view(-1, 2).flip(0).split(7):  # pairs stay together, in any order
        moments.update(x[rows.flatten(), None], torch.ones(rows.numel(), 1), rows.flatten())
    expected = numpy.cov(x.double().numpy().T, bias=True) * N
    numpy.testing.assert_allclose(moments.total.matrix.numpy(), expected, rtol=1e-6, atol=1e-6)
    within = sum(numpy.cov(x[members].double().numpy().T, bias=True) * int(members.sum()) for members in (SIDE, ~SIDE))
    numpy.testing.assert_allclose(moments.within.matrix.numpy(), within, rtol=1e-6, atol=1e-6)
    assert torch.equal(moments.collected(), x) and moments.n == N


@pytest.mark.parametrize(("method", "package"), [("logistic", "sklearn"), ("leace", "concept_erasure")])
def test_a_missing_package_is_named_before_a_pass(method, package, tiny, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)
        return real(name, *arguments, **options)

    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(builtins, "__import__", without)
    model = tiny("llama")
    model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was run"))
    rows = [Row((i, i + 1, i + 2), 1) for i in range(7, 23)]
    contrast = ContrastSet(tuple(rows[:8]), tuple(rows[8:]), paired=True)
    with pytest.raises(ConfigError, match=rf"needs '{package}'[\s\S]*pip install 'torchsteer\[directions\]'"):
        extract(model, contrast, ["layers.1.output"], name="x", method=method, progress=False)


def test_the_missing_package_of_another_extractor_is_named_itself():
    with pytest.raises(ConfigError) as caught:
        Extractor(lambda moments: moments.gap, package="not_there.linear").check("odd", paired=True)
    assert "needs 'not_there'" in str(caught.value) and "pip install not_there," in caught.value.remedy
    assert "torchsteer" not in str(caught.value) and "scikit-learn" not in str(caught.value)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (None, ConfigError, r"the extractor 'odd' gives no direction[\s\S]*NoneType"),
        (torch.ones(32, dtype=torch.long), ConfigError, r"the extractor 'odd' gives no direction[\s\S]*torch.int64"),
        (torch.ones(1, 32), WidthError, r"the extractor 'odd'[\s\S]*shape \[32\][\s\S]*\[1, 32\]"),
        (torch.full((32,), torch.nan), NonFiniteError, "what the extractor 'odd' gives"),
    ],
)
def test_what_an_extractor_gives_is_checked(result, error, message, tiny, monkeypatch):
    monkeypatch.setitem(EXTRACTORS._entries, "odd", Extractor(lambda moments: result))
    rows = [Row((i, i + 1, i + 2), 1) for i in range(7, 23)]
    with pytest.raises(error, match=message):
        extract(
            tiny("llama"), ContrastSet(tuple(rows[:8]), tuple(rows[8:]), True), ["layers.1.output"], name="x", method="odd", progress=False
        )


def test_an_extractor_may_give_any_floating_point(tiny, monkeypatch):
    monkeypatch.setitem(EXTRACTORS._entries, "half", Extractor(lambda moments: moments.gap.bfloat16()))
    rows = [Row((i, i + 1, i + 2), 1) for i in range(7, 23)]
    contrast = ContrastSet(tuple(rows[:8]), tuple(rows[8:]), True)
    half, full = (extract(tiny("llama"), contrast, ["layers.1.output"], name="x", method=m, progress=False) for m in ("half", "caa"))
    assert aligned(half["layers.1.output"].vector, full["layers.1.output"].vector) > 0.999


def contrast() -> ContrastSet:
    rows = [Row((i, i + 1, i + 2), 1) for i in range(7, 23)]
    return ContrastSet(tuple(rows[:8]), tuple(rows[8:]), True)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda moments: 1 / 0, ConfigError, r"the extractor 'odd' failed[\s\S]*ZeroDivisionError"),
        (lambda moments: moments.gap.to("meta"), ConfigError, r"the extractor 'odd' gives no direction[\s\S]*on meta"),
        (lambda moments: moments.gap.to_sparse(), ConfigError, r"the extractor 'odd' gives no direction[\s\S]*sparse"),
        (lambda moments: moments.gap + 0j, ConfigError, r"the extractor 'odd' gives no direction[\s\S]*complex"),
        (lambda moments: moments.gap * 0, ConfigError, r"the extractor 'odd' gives a vector that is zero"),
        (lambda moments: at_right_angles(moments.gap), ContrastError, r"the extractor 'odd' gives a vector along which the two classes"),
    ],
)
def test_an_extractor_at_fault_is_named(function, error, message, tiny, monkeypatch):
    monkeypatch.setitem(EXTRACTORS._entries, "odd", Extractor(function))
    with pytest.raises(error, match=message):
        extract(tiny("llama"), contrast(), ["layers.1.output"], name="x", method="odd", progress=False)


def at_right_angles(gap: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(gap, dim=0)
    other = torch.ones_like(unit)
    for _ in range(3):
        other = other - (other @ unit) * unit
    return other


@pytest.mark.parametrize("factor", [1e-200, 1e300, -1.0])
def test_an_extractor_may_give_any_length_and_sign(factor, tiny, monkeypatch):
    monkeypatch.setitem(EXTRACTORS._entries, "long", Extractor(lambda moments: moments.gap * factor))
    model = tiny("llama")
    long, usual = (extract(model, contrast(), ["layers.1.output"], name="x", method=m, progress=False) for m in ("long", "caa"))
    torch.testing.assert_close(long["layers.1.output"].vector, usual["layers.1.output"].vector)


def test_registrations_of_extractors_that_cannot_work(tiny, monkeypatch):
    with pytest.raises(ConfigError, match=r"the extractor 'odd' needs what is not kept[\s\S]*did you mean 'scatter'"):
        extractor("odd", needs=("scater",))
    with pytest.raises(ConfigError, match="`needs` of the extractor 'odd'"):
        extractor("odd", needs="scatter")
    monkeypatch.setitem(EXTRACTORS._entries, "bare", lambda moments: moments.gap)
    monkeypatch.setitem(EXTRACTORS._entries, "odd", Extractor(lambda moments: moments.gap, needs=("nonsense",)))
    model = tiny("llama")
    model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was run"))
    for method, message in (("bare", r"extractor 'bare'[\s\S]*@extractor\('bare'\)"), ("odd", "'odd' needs what is not kept")):
        with pytest.raises(ConfigError, match=message):
            extract(model, contrast(), ["layers.1.output"], name="x", method=method, progress=False)


def test_an_extractor_that_writes_changes_nothing_of_the_others(monkeypatch):
    monkeypatch.setattr(EXTRACTORS, "_entries", dict(EXTRACTORS._entries))

    @extractor("vandal", needs=("scatter", "differences", "texts"))
    def vandal(moments: ContrastMoments) -> torch.Tensor:
        """Writes into all that it gets."""
        gap = moments.gap
        for tensor in (moments.is_positive, moments.collected(), moments.within.matrix, moments.positive.first, moments.negative.first):
            tensor.zero_()
        for scatter in (moments.all, moments.differences):
            if scatter.second is not None:
                scatter.second.zero_()
        moments.norm = moments.tokens = 0.0
        return gap

    for count in (N, WIDTH - 2):  # more texts than dimensions, and fewer, which are kept instead of second moments
        x, side = texts()[:count], SIDE[:count]
        moments, untouched = (moments_of(x, side, True, tuple(NEEDS)) for _ in range(2))
        assert aligned(vandal.read("vandal", moments), untouched.gap) > 1 - 1e-9
        assert torch.equal(moments.is_positive, side) and moments.activation_norm == untouched.activation_norm
        for method in ("mean_difference", "lda", "pca"):
            own = EXTRACTORS.get(method)
            assert torch.equal(own.read(method, moments), own.read(method, untouched))


def test_an_extractor_reads_what_it_asked_for_even_where_others_ask_for_more():
    own = Extractor(lambda moments: moments.within.matrix.diagonal())
    with pytest.raises(ConfigError, match="'scatter' was not kept"):
        own.read("own", moments_of(texts(), SIDE, True, ("scatter",)))


@pytest.mark.parametrize("options", [{"package": 5}, {"pairs": "no"}, {"needs": "scatter"}, {"needs": (5,)}])
def test_options_of_the_decorator_are_typed(options, monkeypatch):
    monkeypatch.setattr(EXTRACTORS, "_entries", dict(EXTRACTORS._entries))
    with pytest.raises(ConfigError, match="extractor 'typed'"):
        extractor("typed", **options)(lambda moments: moments.gap)
    with pytest.raises(ConfigError, match="the function of the extractor 'typed'"):
        extractor("typed")(5)
