"""Features of a dictionary as a treatment: clamped, ablated or added, beside the mean difference that they compete with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from steer.checks import finite_number, one_of
from steer.directions.at_words import AT, BEFORE
from steer.errors import ConfigError
from steer.experiment.experiment_features import ExperimentFeatures
from steer.experiment.treatment import BOTH, INFERENCE, TRAIN, TREATMENTS, Bench, Treatment
from steer.experiment.treatments.plan import PlanTreatment
from steer.features.feature_edit import FeatureEdit
from steer.features.operators.ablate_features import AblateFeatures
from steer.features.operators.add_decoder import AddDecoder
from steer.features.operators.clamp_features import ClampFeatures
from steer.features.random_features import random_features
from steer.intervene import Add, Intervention, Operator, Plan
from steer.intervene.scope import Scope

CLAMP, ABLATE, DECODER = "clamp", "ablate", "decoder"
EDITS = (CLAMP, ABLATE, DECODER, AT, BEFORE)
_DRAWS = 20  # draws of random features that are tried for one control
_WORDS = {
    CLAMP: "clamped to {dose:g} x their maxima",
    ABLATE: "ablated",
    DECODER: "decoder rows added, as long as at {dose:g} x their maxima",
    AT: "mean difference at the words of their concept added, as long as they are at {dose:g} x their maxima",
    BEFORE: "mean difference before the words of their concept added, as long as they are at {dose:g} x their maxima",
}


@TREATMENTS.register("feature")
class FeatureTreatment(Treatment):
    """Features of `experiment.features` are clamped, ablated or added, or the mean difference at their concept's words is.

    Controls: random features that are on as often, edited in the same way, by as much (an ablation by what they are); of a mean
    difference random directions as long.

    Args:
        edit: `clamp`, `ablate`, `decoder` (their decoder rows added), `at` or `before` (mean difference at or right before the words).
        dose: in multiples of the features' recorded maxima, also for what is added in their place; the strength of an ablation.
        scope: tokens; those that the dictionary was not trained on are left out.

    Example:
        >>> # in a configuration: treatment: {kind: feature, edit: clamp}
    """

    when = (TRAIN, INFERENCE, BOTH)  # tokens that the dictionary was not trained on are left out, which no weight can
    unit = PlanTreatment.unit

    def __init__(self, edit: str, dose: float = 1.0, scope: str = "all") -> None:
        self.edit: str = one_of(edit, EDITS, "the edit of a feature")
        finite_number(dose, "the dose of a feature")
        self.dose = dose
        self.scope = Scope.parse(scope)
        self._inner: PlanTreatment | None = None
        self._drawn: int | None = None  # number of the draw of a control

    def describe(self) -> str:
        return f"features of the experiment: {_WORDS[self.edit].format(dose=self.dose)}"

    def spec(self) -> dict[str, Any]:
        drawn = {} if self._drawn is None else {"random": self._drawn}
        return {"edit": self.edit, "dose": self.dose, "scope": str(self.scope), **drawn}

    def prepare(self, bench: Bench) -> Self:
        if self._inner is None:
            features = of_experiment(bench, self)
            self._inner = self._of(_operator(self.edit, features, features.chosen, self.dose), features).prepare(bench)
        return self

    def _of(self, operator: Operator, features: ExperimentFeatures) -> PlanTreatment:
        scope = AblateFeatures(features.dictionary, features.chosen).narrowed(self.scope)  # also of what is added
        strength = self.dose if self.edit == ABLATE else 1.0
        return PlanTreatment(Plan(Intervention(operator, features.dictionary.writes[0], scope, strength)))

    @property
    def inner(self) -> PlanTreatment:
        """Its plan. Raises ConfigError before `prepare`."""
        if self._inner is None:
            raise _not_prepared(self)
        return self._inner

    @contextmanager
    def acting(self, model: nn.Module) -> Iterator[nn.Module]:
        with self.inner.acting(model):
            yield model

    def training_plan(self) -> Plan | None:
        return self.inner.training_plan()

    def save(self, folder: Path) -> None:
        self.inner.save(folder)

    def size(self, bench: Bench) -> dict[str, float]:
        return {} if self.edit == ABLATE else {self.edit: next(iter(self.inner.size(bench).values()))}

    def control(self, bench: Bench, seed: int) -> Treatment:
        features = of_experiment(bench, self)
        partner = FeatureTreatment(self.edit, self.dose, str(self.scope))
        partner._drawn = seed
        if self.edit in (AT, BEFORE):
            drawn = self.inner.control(bench, seed)
            assert isinstance(drawn, PlanTreatment)
            partner._inner = drawn
            return partner
        partner._inner = self._of(self._random(bench, features, seed), features).prepare(bench)
        return partner

    def _random(self, bench: Bench, features: ExperimentFeatures, number: int) -> Operator:
        """The edit of random features, as large as this one. Draws that cannot be as small are passed over. Raises ConfigError."""
        dictionary, possible = features.dictionary, 0
        if self.edit == ABLATE:
            return AblateFeatures(dictionary, random_features(dictionary, features.chosen, draws=number + 1)[number])
        size, states = self.size(bench)[self.edit], bench.states(self.inner.plan)[dictionary.writes[0]]
        for draw in range(number + _DRAWS):  # one draw more at a time: many draws are refused where few are not
            chosen = random_features(dictionary, features.chosen, draws=draw + 1)[draw]
            operator = _as_large(_operator(self.edit, features, chosen, self.dose), features, chosen, size, states)
            if operator is not None and possible == number:
                return operator
            possible += operator is not None
        raise _never_as_small(features.chosen, size)


def of_experiment(bench: Bench, treatment: Treatment) -> ExperimentFeatures:
    """The features of the experiment. Raises ConfigError where it has none."""
    if bench.features is None:
        raise _no_features(treatment)
    return bench.features


def _operator(edit: str, features: ExperimentFeatures, chosen: Sequence[int], dose: float) -> Operator:
    dictionary = features.dictionary
    if edit == ABLATE:
        return AblateFeatures(dictionary, list(chosen))
    if edit == CLAMP:
        return ClampFeatures(dictionary, list(chosen), to=dose, of_maximum=True)
    if edit == DECODER:
        return AddDecoder(dictionary, list(chosen), dose, of_maximum=True)
    return Add(dose * features.difference(edit))


def _as_large(operator: Operator, features: ExperimentFeatures, chosen: Sequence[int], size: float, states: Tensor) -> Operator | None:
    """The same edit of random features, to another multiple of their maxima: that at which its root mean square is `size`.

    dh = c A - B, with A the sum of the rows at the maxima, and B what the features are at a token; |dh|^2 is a parabola in c. None where
    its least value is larger: to take away what the features are is more than what is wanted.
    """
    dictionary = features.dictionary
    assert dictionary.maxima is not None
    maxima = dictionary.maxima[torch.tensor(chosen)].double()
    rows = dictionary.decoder_rows(list(chosen)).double()
    whole = maxima @ rows  # [width]
    if isinstance(operator, AddDecoder):
        return AddDecoder(dictionary, list(chosen), size / float(whole.norm()), of_maximum=True)
    assert isinstance(operator, FeatureEdit)
    now = dictionary.encode_selected(states, list(chosen)).double() @ rows  # [tokens, width]
    inside = dictionary.untrained.trained_on(states)  # outliers keep what they are
    inside = torch.ones(len(states), dtype=torch.bool) if inside is None else inside
    share = float(inside.double().mean())
    a = float(whole @ whole) * share
    b = -2 * float(whole @ now[inside].mean(0)) * share
    c = float(now[inside].square().sum(1).mean()) * share - size**2
    root = b * b - 4 * a * c
    if root < 0:
        return None
    return ClampFeatures(dictionary, list(chosen), to=(-b + root**0.5) / (2 * a), of_maximum=True)


# ---- errors


def _no_features(treatment: Treatment) -> ConfigError:
    return ConfigError(
        f"treatment '{treatment.name}' edits the features of an experiment that has none",
        expected="a section experiment.features, with a dictionary and `chosen` or `concepts`",
        found="none",
        remedy="add it, see conf/experiment/golden_gate.yaml; in Python a plan with steer.ClampFeatures does the same",
    )


def _not_prepared(treatment: FeatureTreatment) -> ConfigError:
    what = "the features of this treatment were not read yet"
    return ConfigError(what, expected="`prepare` before it acts", found=treatment.describe(), remedy="call prepare(bench)")


def _never_as_small(chosen: Sequence[int], size: float) -> ConfigError:
    return ConfigError(
        f"no clamp of random features is as small as that of {list(chosen)}, which they are matched with",
        expected=f"a root mean square of {size:.4g}",
        found="more at every value, since they are on at many tokens",
        remedy="raise the dose, or draw other features",
    )
