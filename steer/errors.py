"""Typed errors. Each names the thing that is wrong, what was expected, what was found and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import partial
from typing import Any


class SteerError(Exception):
    """Base of every error that `steer` raises on purpose.

    Args:
        what: the thing that is wrong, by its name.
        expected: what would have been right.
        found: what is there instead.
        remedy: what the reader can do about it.

    Example:
        >>> try:
        ...     steer.Site.parse("layer 12")
        ... except steer.SteerError as error:
        ...     print(type(error).__name__)
        SiteError
    """

    def __init__(self, what: str, *, expected: object, found: object, remedy: str) -> None:
        self.what = what
        self.expected = expected
        self.found = found
        self.remedy = remedy
        super().__init__(f"{what}\n  expected: {expected}\n  found: {found}\n  remedy: {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Python's own way to copy and pickle an exception calls its class with the message alone."""
        construct = partial(type(self), self.what, expected=self.expected, found=self.found, remedy=self.remedy)
        return construct, (), vars(self) | ({"errno": self.errno} if isinstance(self, OSError) else {})


def did_you_mean(wrong: str, known: Iterable[str]) -> str | None:
    """The remedy for a misspelt name, or for one whose words stand in another order; None when nothing is near it."""
    names = list(known)
    near = [name for name in names if _words(name) == _words(wrong)] or difflib.get_close_matches(wrong, names, n=1)
    return f"did you mean '{near[0]}'?" if near else None


def _words(name: str) -> list[str]:
    return sorted(re.split(r"[\W_]+", name.lower()))


def in_file(error: SteerError, path: Any) -> SteerError:
    """The same error with the name of the file whose content it is about."""
    return type(error)(f"{error.what} (in '{path}')", expected=error.expected, found=error.found, remedy=error.remedy)


class SiteError(SteerError, ValueError):
    """A site that cannot be parsed, does not exist in this model, or whose layer is out of range."""


class AnatomyError(SteerError):
    """A model whose blocks, attention or MLP cannot be found."""


class WidthError(SteerError, ValueError):
    """A vector whose width differs from that of its site."""


class NonFiniteError(SteerError, ValueError):
    """NaN or infinity where finite numbers are needed."""


class ConfigError(SteerError, ValueError):
    """An unknown name, or a value outside its range, in a call or a configuration."""


class AttachError(SteerError, RuntimeError):
    """A plan that is attached twice, or used while it is not attached."""


class HookDidNotRunError(SteerError, RuntimeError):
    """An attached site that the forward pass never reached: it would have been steered silently by nothing."""


class ContextError(SteerError, RuntimeError):
    """A forward pass that does not say which tokens are meant (no labels, no mask, no row slots)."""


class WrongModelError(SteerError, ValueError):
    """A plan, direction or store that was made for another model."""


class DeployError(SteerError, ValueError):
    """A plan that weights, an adapter or a file of another program cannot carry exactly, or a bake that cannot be undone any more."""


class EditError(SteerError, ValueError):
    """A fact, or an edit of weights, that this model cannot take as it is asked for."""


class SubjectNotFoundError(EditError):
    """A prompt that does not contain its subject."""


class ConflictingEditsError(EditError):
    """Edits that ask for different things at one place."""


class GuardError(EditError):
    """An edit that a guard stopped, because of what it would do to the rest of the model. `facts` has the names of those facts."""

    facts: tuple[str, ...] = ()


class FileError(SteerError):
    """Base of everything that can be wrong with a file."""


class DamagedFileError(FileError, ValueError):
    """A truncated or altered file, or one with parts missing."""


class UnsafeFileError(FileError, ValueError):
    """A pickle where safetensors is wanted."""


class WrongKindError(FileError, ValueError):
    """A file of another kind or schema than the one asked for."""


class StorageFullError(FileError, OSError):
    """No room left on the device; nothing of the old file was lost."""


class TokenizerError(SteerError, ValueError):
    """A tokenizer that lacks a pad token or a chat template, or text that gives no tokens."""


class ContrastError(SteerError, ValueError):
    """An empty, one-sided or degenerate contrast set."""


class ModelNotFoundError(SteerError, LookupError):
    """A model name or path that leads nowhere."""


class JudgeError(SteerError, RuntimeError):
    """A judge that cannot be reached, gives no grade, or would cost more than its budget."""
