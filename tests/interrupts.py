"""Interrupts at a chosen line of the package, as a signal may come."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

import steer

PACKAGE = os.path.dirname(steer.__file__) + os.sep


class Interrupt(BaseException):
    pass


class InterruptAt:
    """Raises at the n-th line that is executed in files of the package, once."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.raised = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE) or self.raised:
            return None
        if event == "line":
            self.line -= 1
            if self.line < 0:
                self.raised = True
                raise Interrupt
        return self


def traced(action: Any, line: int) -> InterruptAt:
    """Runs an action up to a line of it, counted in lines of the package."""
    interrupt = InterruptAt(line)
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        action()
    except Interrupt:
        pass
    finally:
        sys.settrace(before)
    return interrupt


def interrupted(action: Any, line: int) -> bool:
    """Whether the line was reached."""
    return traced(action, line).raised


def lines_of(action: Any) -> int:
    """How many lines of the package an action executes."""
    return sys.maxsize - traced(action, sys.maxsize).line
