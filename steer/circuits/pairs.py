"""Pairs of prompts: what a model is given, and a counterfactual of the same length token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from steer.circuits.texts import Positions, Prompts, Texts, rows_of
from steer.errors import ConfigError
from steer.model.tokens import Row, rows_hash


@dataclass(frozen=True, eq=False)
class Pairs:
    """Clean prompts, and counterfactual ones of which each has as many tokens as its partner.

    Attributes:
        clean, corrupted: the same number of prompts, with the roles of the clean ones' tokens.

    Example:
        >>> pairs = Pairs.of(model, ["The nurse said that"], ["The person said that"], tokenizer=tokenizer)
    """

    clean: Texts
    corrupted: Texts

    @classmethod
    def of(cls, model: nn.Module, clean: Prompts, corrupted: Prompts, *, tokenizer: Any = None, positions: Positions = "sum") -> Pairs:
        """Tokenises both.

        Args:
            positions: see `Texts`.

        Raises:
            ConfigError: another number of prompts, or of tokens in a pair.
        """
        rows, others = rows_of(model, clean, tokenizer), rows_of(model, corrupted, tokenizer)
        if len(rows) != len(others):
            raise _other_count(len(rows), len(others))
        for number, (row, other) in enumerate(zip(rows, others, strict=True)):
            if len(row.ids) != len(other.ids):
                raise _other_length(number, len(row.ids), len(other.ids))
        return cls(Texts(rows, positions), Texts(others, positions))

    def __len__(self) -> int:
        return len(self.clean)

    def hash(self) -> str:
        """SHA-256 of the tokens of all pairs."""
        return rows_hash(self.rows)

    @property
    def rows(self) -> list[Row]:
        """Clean ones, then corrupted ones."""
        return [*self.clean.rows, *self.corrupted.rows]


# ---- errors


def _other_count(clean: int, corrupted: int) -> ConfigError:
    return ConfigError("clean and corrupted prompts do not pair up", expected=f"{clean} corrupted prompts", found=corrupted,
                       remedy="give one counterfactual for each prompt")  # fmt: skip


def _other_length(number: int, clean: int, corrupted: int) -> ConfigError:
    return ConfigError(
        f"the prompts of pair {number} have different numbers of tokens, so that their activations do not correspond",
        expected=f"{clean} tokens in the corrupted prompt, as in the clean one",
        found=corrupted,
        remedy="choose a counterfactual that the tokenizer splits into as many tokens, or ablate to a mean: ablation='mean'",
    )
