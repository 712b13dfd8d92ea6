"""Restoring: what was changed for a while is put back on every way out, an interrupt of the way out included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def restoring(put_back: Callable[[], None]) -> Iterator[None]:
    """Calls `put_back` when the block ends, however it ends, and once more where that was interrupted.

    Args:
        put_back: harmless when it is done again, and when there is nothing to put back yet.

    Example:
        >>> with restoring(installation.remove):
        ...     installation.install()
        ...     model(**batch)
    """
    is_done = False
    try:
        try:
            yield
        finally:
            put_back()
            is_done = True
    except BaseException:
        if not is_done:
            put_back()
        raise


@contextmanager
def restoring_all() -> Iterator[ExitStack]:
    """An `ExitStack` whose callbacks run on every way out. Its own `with` skips them where an interrupt comes as the block has just ended.

    Example:
        >>> with restoring_all() as stack:
        ...     for module in model.modules():
        ...         stack.callback(module.register_forward_hook(hook).remove)
        ...     model(**batch)
    """
    stack = ExitStack()
    with restoring(stack.close):
        yield stack


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Gives an object an attribute of its own for a while."""
    had_own = name in vars(owner)
    before = vars(owner).get(name)

    def put_back() -> None:
        if had_own:
            setattr(owner, name, before)
        else:
            vars(owner).pop(name, None)

    with restoring(put_back):
        setattr(owner, name, value)
        yield
