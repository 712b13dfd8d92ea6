"""A debiasing baseline of `steer.bias` as a treatment, fitted on the texts that the circuits of the experiment are found on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from torch import nn

from steer.bias import MITIGATIONS, Mitigation, fit_mitigation
from steer.checks import of_type
from steer.errors import ConfigError
from steer.experiment.pronoun_circuits import OCCUPATION
from steer.experiment.treatment import INFERENCE, TREATMENTS, Bench, Treatment
from steer.experiment.treatments.circuit import circuits_of
from steer.model.precision import AUTO

_WITHOUT_TEXTS = ("self_debias",)
_ON_RUNNING_TEXT = ("cda",)


@TREATMENTS.register("mitigation")
class MitigationTreatment(Treatment):
    """A debiasing method of `steer.bias.mitigations()`, fitted to the base model.

    Pairs are words that state a gender (`gender_words`) in the first two sentences of the split `sentences`; rows for `cda` are
    the running text of the split `learning`.

    Args:
        method: e.g. `projection`. options: of the method, e.g. {site: layers.26.output}.

    Example:
        >>> # in a configuration: treatment: {kind: mitigation, method: projection, options: {site: layers.26.output}}
    """

    when = (INFERENCE,)

    def __init__(self, method: str, options: Mapping[str, Any] | None = None) -> None:
        MITIGATIONS.get(method)
        of_type(options or {}, Mapping, "the options of a mitigation", "e.g. {site: layers.26.output}")
        self.method = method
        self.options = dict(options or {})
        self._fitted: Mitigation | None = None

    def describe(self) -> str:
        return self.method if self._fitted is None else self._fitted.describe()

    def spec(self) -> dict[str, Any]:
        return {"method": self.method, "options": self.options}

    def prepare(self, bench: Bench) -> Self:
        if self._fitted is None:
            circuits = circuits_of(bench, self)
            texts: Any = None
            options = self.options
            if self.method in _ON_RUNNING_TEXT:
                texts = [row["text"] for row in circuits.rows("learning")]
                if options.get("precision", AUTO) == AUTO:
                    options = {**options, "precision": circuits.precision}
            elif self.method not in _WITHOUT_TEXTS:
                sentences, words = circuits.rows("sentences")[:2], circuits.rows("gender_words")
                texts = [
                    tuple(row["text"].replace(OCCUPATION, pair[side]) for side in ("male", "female")) for row in sentences for pair in words
                ]
            self._fitted = fit_mitigation(self.method, bench.model, texts, tokenizer=bench.tokenizer, **options)
        return self

    @contextmanager
    def acting(self, model: nn.Module) -> Iterator[nn.Module]:
        if self._fitted is None:
            raise _not_prepared(self)
        with self._fitted.acting(model) as acting:
            yield acting


def _not_prepared(treatment: MitigationTreatment) -> ConfigError:
    what = "this mitigation was not fitted yet"
    return ConfigError(what, expected="`prepare` before it acts", found=treatment.describe(), remedy="call prepare(bench)")
