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
        unequal = [i for i, (row, other) in enumerate(zip(rows, others, strict=True)) if len(row.ids) != len(other.ids)]
        if unequal:
            raise _other_lengths([(i, _shown(clean, rows, i), _shown(corrupted, others, i)) for i in unequal], len(rows))
        return cls(Texts(rows, positions), Texts(others, positions))

    def __len__(self) -> int:
        return len(self.clean)

    def __repr__(self) -> str:
        lengths = [len(row.ids) for row in self.clean.rows]
        return f"Pairs({len(self)} of {min(lengths)} to {max(lengths)} tokens)"

    def equal(self) -> list[int]:
        """Numbers of the pairs whose prompts are the same, of which a counterfactual says nothing."""
        both = zip(self.clean.rows, self.corrupted.rows, strict=True)
        return [number for number, (row, other) in enumerate(both) if row.ids == other.ids]

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


def _shown(prompts: Prompts, rows: list[Row], number: int) -> str:
    text = prompts[number] if isinstance(prompts, list | tuple) else None
    return f"{len(rows[number].ids)} tokens" + (f" in {text!r}" if isinstance(text, str) else "")


def _other_lengths(unequal: list[tuple[int, str, str]], pairs: int) -> ConfigError:
    listed = "; ".join(f"pair {number}: {clean}, {corrupted}" for number, clean, corrupted in unequal[:3])
    return ConfigError(
        f"{len(unequal)} of {pairs} pairs have prompts with different numbers of tokens, so that their activations do not correspond",
        expected="as many tokens in a corrupted prompt as in its clean one",
        found=listed + (f"; and {len(unequal) - 3} more" if len(unequal) > 3 else ""),
        remedy="choose other words, counted by len(tokenizer(text).input_ids); or do without counterfactuals: "
        "Pairs.of(model, clean, clean), and attribute(..., method='eap', ablation=mean_ablation(model, texts))",
    )
