"""Runs the fenced blocks of a page one after the other, and compares what they print with the block `text` that stands behind them.

- A block `python`, `yaml` or `json` whose first line is a comment with a file's name (`# train.py`) is that file, and is written, not run.
- A block `python` runs in the names of the page; a block `bash` line by line: `steer ...` and `python <file> ...` in this process. Lines of
  other programs (pip, make) are not run.
- A line `...` of a block `text` stands for any lines. Words have to be the same; numbers may differ by what the processors of two machines
  make of the same sums: 2 %, or two units of the last digit shown.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiment_helpers import command

NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?|(?<![\w.])[-+−]?\.\d+(?:e[-+]?\d+)?")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
FILE = re.compile(r"# ([\w./-]+\.(?:py|yaml|json|jsonl))\n")


@dataclass
class Step:
    """A block that does something, and what the page says that it prints (None: nothing is shown)."""

    language: str
    code: str
    shown: str | None = None


@dataclass
class Page:
    path: Path
    names: dict[str, Any] = field(default_factory=dict)

    def steps(self) -> list[Step]:
        steps: list[Step] = []
        for language, code in FENCE.findall(self.path.read_text(encoding="utf-8")):
            if language == "text":
                assert steps and steps[-1].shown is None, f"{self.path.name}: nothing before this output:\n{code}"
                steps[-1].shown = code
            elif language in ("python", "bash", "yaml", "json"):
                steps.append(Step(language, code))
        return steps

    def printed(self, step: Step) -> str:
        """What a step prints."""
        if file := FILE.match(step.code):
            Path(file[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(file[1]).write_text(step.code, encoding="utf-8")
            return ""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            if step.language == "python":
                exec(compile(step.code, str(self.path), "exec"), self.names)
            elif step.language == "bash":
                for line in step.code.replace("\\\n", " ").splitlines():
                    run(line)
        return out.getvalue()

    def differences(self) -> Iterator[str]:
        """Runs the page in the current folder, and says of each output what is not as shown."""
        for step in self.steps():
            printed = self.printed(step)
            if step.shown is not None and not alike(step.shown, printed):
                yield f"{self.path.name} shows\n{step.shown}\nwhere the code prints\n{printed}\n--- code:\n{step.code}"


def run(line: str) -> None:
    """A line of a shell, if it is one of `steer` or of a script that the page wrote."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["steer"]:
        assert command(*words[1:]) == 0, line
    elif words[:1] == ["python"] and words[1].endswith(".py"):
        arguments, sys.argv = sys.argv, words[1:]
        try:
            runpy.run_path(words[1], run_name="__main__")
        finally:
            sys.argv = arguments


def alike(shown: str, printed: str) -> bool:
    """Whether an output is the one shown, up to rounding, and to the lines that `...` stands for."""
    return _lines_alike(*([line for line in text.splitlines() if line.strip()] for text in (shown, printed)))


def _lines_alike(shown: list[str], printed: list[str]) -> bool:
    if not shown:
        return not printed
    if shown[0].strip() == "...":
        return any(_lines_alike(shown[1:], printed[skipped:]) for skipped in range(len(printed) + 1))
    return bool(printed) and line_alike(shown[0], printed[0]) and _lines_alike(shown[1:], printed[1:])


def line_alike(shown: str, printed: str) -> bool:
    shown, printed = (re.sub(r"\s+", " ", line.strip()) for line in (shown, printed))
    if NUMBER.sub("#", shown) != NUMBER.sub("#", printed):
        return False
    return all(number_alike(*pair) for pair in zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True))


def number_alike(shown: str, printed: str) -> bool:
    first, second = (text.replace(",", "").replace("−", "-") for text in (shown, printed))
    if first == second:
        return True
    if not ({*first} & {*".e"}):  # whole numbers are counts, layers, steps
        return False
    digits = len(first.partition("e")[0].partition(".")[2])
    unit = 10.0 ** (int(first.partition("e")[2] or 0) - digits)
    return abs(float(first) - float(second)) <= max(0.02 * abs(float(first)), 2 * unit)
