"""Mitigations of bias: the standard debiasing baselines, each a plan, a logits processor or rows to train on. A new one is one new file.

A method is a function in `steer.bias.mitigation` that fits a `Mitigation` to a model. What is fitted acts inside
`with fitted.acting(model)`, whatever the method is, so that one table can have a row for each.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from steer.bias.texts import Pairs
from steer.checks import of_type
from steer.errors import ConfigError, did_you_mean
from steer.intervene import Plan
from steer.model.load import tokenizer_of
from steer.model.site import Site
from steer.registry import Registry

Sites = str | Site | Sequence[str | Site]


@dataclass(frozen=True, eq=False, kw_only=True)
class Mitigation(ABC):
    """A debiasing method, fitted to a model.

    Attributes:
        name: of the method, see `mitigations`.
        facts: what it was fitted on and how, JSON-able: the model's fingerprint, numbers and digests of texts, sites, options.
        plan: its interventions; None for a method that is no plan.

    Example:
        >>> fitted = steer.bias.fit_mitigation("projection", model, site="layers.26.output")
        >>> fitted.describe(), fitted.plan
    """

    name: str
    facts: dict[str, Any] = field(repr=False)
    plan: Plan | None = field(default=None, repr=False)

    @abstractmethod
    def describe(self) -> str:
        """One phrase for a table."""

    @abstractmethod
    def acting(self, model: nn.Module) -> Any:
        """Context manager: the model with the mitigation, in scoring passes; as it was afterwards, on every exit path."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PlanMitigation(Mitigation):
    """A mitigation that edits activations.

    Attributes:
        what: what is done at each site, as `describe` says it.
    """

    what: str
    plan: Plan = field(repr=False)

    def describe(self) -> str:
        return f"{self.what} at {', '.join(self.facts['sites'])}"

    @contextmanager
    def acting(self, model: nn.Module) -> Iterator[nn.Module]:
        with self.plan.attached(model, stack=True):
            yield model


MITIGATIONS: Registry[Callable[..., Mitigation]] = Registry("mitigation", "steer.bias.mitigation", "steer.mitigations")


def mitigations() -> list[str]:
    """Names of the debiasing methods.

    Example:
        >>> steer.bias.mitigations()
        ['cda', 'inlp', 'leace', 'projection', 'self_debias', 'sentence_debias']
    """
    return list(MITIGATIONS)


def fit_mitigation(
    name: str, model: nn.Module, texts: Pairs | Sequence[Any] | None = None, *, tokenizer: Any = None, **options: Any
) -> Mitigation:
    """Fits a debiasing baseline to a model, which stays as it is.

    Args:
        name: one of `mitigations()`.
        model: a decoder, raw or wrapped.
        texts: what it is fitted on: (text, text) pairs that differ in the group alone for plans, rows to augment for `cda`, none for
            `self_debias`. The texts of `steer.bias.gender_texts` when None.
        tokenizer: of the model; the one that `steer.load` gave with it when None.
        options: those of the method, see docs/bias_mitigation.md; `site` of every method that is a plan.

    Raises:
        ConfigError: an unknown method or option. Otherwise as the method.

    Example:
        >>> fitted = fit_mitigation("projection", model, site="layers.26.output")
        >>> with fitted.acting(model):
        ...     logits = model(**batch).logits
    """
    method = MITIGATIONS.get(name)
    of_type(model, nn.Module, "the model to be debiased", "pass the first of what steer.load returns")
    known = list(inspect.signature(method).parameters)[3:]  # after model, texts and tokenizer
    if unknown := [option for option in options if option not in known]:
        raise _unknown_option(name, unknown[0], known)
    return method(model, texts, tokenizer_of(model) if tokenizer is None else tokenizer, **options)


# ---- errors


def _unknown_option(name: str, option: str, known: list[str]) -> ConfigError:
    return ConfigError(
        f"mitigation '{name}' has no option '{option}'",
        expected=f"options among {', '.join(known)}",
        found=option,
        remedy=did_you_mean(option, known) or "leave it out",
    )
