"""A prompt as a treatment: often the treatment to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steer.checks import of_type
from steer.errors import ConfigError
from steer.experiment.irrelevant import irrelevant_texts, n_tokens
from steer.experiment.treatment import BOTH, INFERENCE, TRAIN, TREATMENTS, Bench, Treatment


@TREATMENTS.register("prompt")
class Prompt(Treatment):
    """A system message before what the model is asked, or before the rows that it is trained on.

    With `when: train` it is inoculation: the rows are trained on behind the message, and the model is used without it.
    Controls: irrelevant texts with as many tokens, each another one.

    Args:
        system: the message.

    Raises:
        ConfigError: an empty message.

    Example:
        >>> arms = {"plain": None, "steered": plan, "prompted": steer.Prompt("Answer soberly, without praise.")}
    """

    when = (TRAIN, INFERENCE, BOTH)
    system: str
    unit = "tokens"

    def __init__(self, system: str) -> None:
        of_type(system, str, "the system message of a prompt", "pass it as text")
        if not system.strip():
            raise _no_message()
        self.system = system
        self._irrelevant: list[str] = []  # of its controls

    def describe(self) -> str:
        return f"the system message \N{LEFT DOUBLE QUOTATION MARK}{self.system}\N{RIGHT DOUBLE QUOTATION MARK}"

    def spec(self) -> dict[str, Any]:
        return {"system": self.system}

    def training_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [{**row, "system": self.system} for row in rows]

    def size(self, bench: Bench) -> dict[str, float]:
        return {"message": float(n_tokens(bench.tokenizer, self.system))}

    def control(self, bench: Bench, seed: int) -> Treatment:
        if len(self._irrelevant) <= seed:
            self._irrelevant = irrelevant_texts(bench.tokenizer, self.system, max(seed + 1, 2 * len(self._irrelevant)))
        if len(self._irrelevant) <= seed:
            raise _too_few_texts(self.system, len(self._irrelevant), seed + 1)
        return Prompt(self._irrelevant[seed])


# ---- errors


def _no_message() -> ConfigError:
    return ConfigError("a prompt needs a message", expected="text", found="an empty one", remedy="write system=..., or leave the arm out")


def _too_few_texts(system: str, texts: int, wanted: int) -> ConfigError:
    return ConfigError(
        f"the prompt '{system}' is too short for so many controls",
        expected=f"{wanted} or more irrelevant texts with as many tokens",
        found=f"{texts} that differ",
        remedy="ask for fewer draws: the same text twice is no second control",
    )
