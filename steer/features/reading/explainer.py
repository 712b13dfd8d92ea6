"""Explainers: what gives a feature its name. One file each in `steer.features.reading.explainers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from steer.checks import of_type
from steer.errors import ConfigError
from steer.features.reading.card import FeatureCard
from steer.registry import Registry

LONGEST = 200  # characters of a name


class Explainer:
    """Makes a name of what is known of a feature.

    Attributes:
        name: under which it is registered.

    Example:
        >>> from steer.features.reading import EXPLAINERS, Explainer
        >>> @EXPLAINERS.register("first_example")
        ... class FirstExample(Explainer):
        ...     def explain(self, card):
        ...         return card.examples[0].text() if card.examples else "never on"
        >>> reading = steer.read_features(model, dictionary, texts, tokenizer=tokenizer, features=[3], context=16)
        >>> reading.explain("first_example")[3].name
    """

    name: ClassVar[str]

    def explain(self, card: FeatureCard) -> str:
        """The name of a feature, in a few words."""
        raise NotImplementedError

    def described(self) -> str:
        """What the names come from, for a reader of the page."""
        return self.name

    def named(self, card: FeatureCard) -> str:
        """The name on one line. Raises ConfigError for anything but text."""
        name = self.explain(card)
        of_type(name, str, f"the name of feature {card.feature} from the explainer '{self.name}'", "return text")
        return " ".join(name.split())[:LONGEST]


EXPLAINERS: Registry[type[Explainer]] = Registry(
    "explainer", "steer.features.reading.explainers", "steer.explainers", subclass_of=Explainer
)


def explainer_of(explainer: str | Explainer | Callable[[FeatureCard], str], settings: Mapping[str, Any]) -> Explainer:
    """An explainer by its name, by itself or by a function. Raises ConfigError."""
    if isinstance(explainer, str):
        method = EXPLAINERS.get(explainer)
        try:
            return method(**settings)
        except TypeError as error:
            raise _unknown_setting(explainer, settings, error) from error
    if not isinstance(explainer, Explainer) and callable(explainer):
        from steer.features.reading.explainers.function import Function

        explainer = Function(explainer)
    of_type(explainer, Explainer, "the explainer", f"pass one of {', '.join(EXPLAINERS)}, or a function of a FeatureCard")
    if settings:
        raise _unknown_setting(type(explainer).__name__, settings, TypeError("settings go with a name"))
    return explainer


# ---- errors


def _unknown_setting(name: str, settings: Mapping[str, Any], error: TypeError) -> ConfigError:
    return ConfigError(
        f"the explainer '{name}' cannot be made with these settings",
        expected="settings that it takes, which docs/features.md lists",
        found=f"{', '.join(settings)}: {error}",
        remedy="correct or leave out settings",
    )
