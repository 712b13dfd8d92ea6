"""What a plan as text may name beside directions: something that operators are made of with words of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from steer.intervene.operator import Operator
from steer.model.site import Site


class OperatorSource:
    """Makes operators of `<operator>(<name>, <word>=<value>, ...)` in a plan as text; a dictionary is one.

    Attributes:
        short_names: names of operators by the shorter ones that a text may use with it.
    """

    short_names: ClassVar[Mapping[str, str]] = {}

    def operator(self, kind: type[Operator], words: Mapping[str, Any]) -> Operator:
        """The operator of that kind that the words mean. Raises TypeError for words that it does not know, ConfigError for wrong values."""
        raise NotImplementedError

    def text_site(self) -> Site | None:
        """Where its operators act when a text does not say; None where it has to."""
        raise NotImplementedError
