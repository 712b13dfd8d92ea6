"""Corruptions: what takes the place of a subject's token embeddings in the corrupted run of causal tracing.

A new one is a file in `steer.edits.tracing.corruptions`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Generator, Tensor

from steer.checks import of_type
from steer.edits.tracing.prompts import Subjects
from steer.errors import ConfigError
from steer.registry import Registry


class NoCorruption(Exception):
    """A fact that a corruption has nothing for; it is left out of the trace, with the message as the reason."""


@dataclass(frozen=True, eq=False)
class CorruptedSubject:
    """What takes the place of one subject.

    Attributes:
        embeddings: [samples, subject tokens, width]; one sample where there is nothing random.
        facts: JSON-able, what was chosen for this subject.

    Example:
        >>> CorruptedSubject(torch.zeros(1, 2, 36), {"replaced_by": "nothing"}).embeddings.shape  # [samples, subject tokens, width]
        torch.Size([1, 2, 36])
    """

    embeddings: Tensor
    facts: dict[str, Any] = field(default_factory=dict)


class Corruption(ABC):
    """What is put in the place of subjects.

    Attributes:
        name: under which it is registered.

    Example:
        >>> @CORRUPTIONS.register("zeros")
        ... class Zeros(Corruption):
        ...     def of(self, number, subjects, samples, generator):
        ...         return CorruptedSubject(torch.zeros_like(subjects.embeddings[number])[None])
        >>> "zeros" in CORRUPTIONS
        True
    """

    name: ClassVar[str]

    @abstractmethod
    def of(self, number: int, subjects: Subjects, samples: int, generator: Generator) -> CorruptedSubject:
        """What takes the place of the subject of one fact.

        Args:
            number: of the fact, in `subjects.prompts`.
            samples: how many are wanted of what is random.
            generator: on the CPU, of this fact alone, so that what it draws does not depend on other facts.

        Raises:
            NoCorruption: there is nothing for this fact. EditError: nothing for any, or settings that do not fit.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """JSON-able arguments of the class, for what is said of a result."""

    def measured(self, subjects: Subjects) -> dict[str, Any]:
        """JSON-able numbers that the corruption takes from all subjects together."""
        return {}


CORRUPTIONS: Registry[type[Corruption]] = Registry(
    "corruption", "steer.edits.tracing.corruptions", "steer.corruptions", subclass_of=Corruption
)


def corruption_of(corruption: str | Corruption, settings: Mapping[str, Any] | None = None) -> Corruption:
    """A corruption by its name, or the one that is given. Raises ConfigError for an unknown name, and for settings it does not take."""
    if isinstance(corruption, Corruption):
        return corruption
    of_type(corruption, str, "the corruption of a trace", f"pass one of {', '.join(CORRUPTIONS)}, or an object of such a class")
    method = CORRUPTIONS.get(corruption)
    try:
        return method(**(settings or {}))
    except TypeError as error:
        raise _unknown_setting(corruption, settings or {}, error) from error


# ---- errors


def _unknown_setting(name: str, settings: Mapping[str, Any], error: TypeError) -> ConfigError:
    return ConfigError(
        f"the corruption '{name}' cannot be made with these settings",
        expected="settings that it takes, which docs/causal_tracing.md lists",
        found=f"{', '.join(settings)}: {error}",
        remedy="correct or leave out settings",
    )
