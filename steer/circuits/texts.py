"""Prompts of a circuit: rows of tokens, a role for every token at which nodes are meant, and padded batches of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import of_type
from steer.errors import ConfigError
from steer.model.load import tokenizer_of
from steer.model.tokens import Row, check_rows, collate

NO_ROLE = -1  # at padding and at tokens that are left alone
Prompts = Sequence[Row] | Sequence[str] | Mapping[str, Tensor]
Positions = str | Sequence[Sequence[str | None]]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some prompts, padded.

    Attributes:
        prompts: [rows] number of the prompt in each row; one prompt may stand in many rows.
        ids, mask: [rows, tokens] as a model takes them.
        positions: [rows, tokens] place of each token in its text, from 0.
        roles: [rows, tokens], NO_ROLE at padding.
    """

    prompts: Tensor
    ids: Tensor
    mask: Tensor
    positions: Tensor
    roles: Tensor

    def of(self, row: int, h: Tensor) -> Tensor:
        """[tokens of the text, ...] what a padded tensor holds of one row."""
        return h[row, self.mask[row].bool()]


class Texts:
    """Prompts with the roles of their tokens.

    Args:
        rows: at least one.
        positions: `sum`, one role for all tokens; `each`, the place of a token is its role, for prompts of one length; or labels of all
            tokens of each prompt, None for those that are left alone.

    Attributes:
        role_names: by number. roles: [tokens] of each prompt.

    Raises:
        ConfigError: other positions, labels that do not fit the prompts, or no token with one.
    """

    def __init__(self, rows: Sequence[Row], positions: Positions = "sum", *, side: str = "right") -> None:
        check_rows(rows, "the prompts of a circuit")
        if not rows:
            raise _no_prompts()
        self.rows, self.positions, self.side = list(rows), positions, side
        self.lengths = [len(row.ids) for row in rows]
        labels = _labels(self.lengths, positions)
        self.role_names = list(dict.fromkeys(label for of_row in labels for label in of_row if label is not None))
        if not self.role_names:
            raise _no_roles()
        numbers = {name: number for number, name in enumerate(self.role_names)}
        self.roles = [torch.tensor([NO_ROLE if label is None else numbers[label] for label in of_row]) for of_row in labels]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, prompts: Sequence[int], device: torch.device) -> Batch:
        """Pads prompts, which may be named more than once."""
        padded = collate([self.rows[i] for i in prompts], 0, side=self.side)
        mask = padded["attention_mask"]
        roles = torch.full(mask.shape, NO_ROLE)
        for row, i in enumerate(prompts):
            roles[row, mask[row].bool()] = self.roles[i]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return Batch(torch.tensor(list(prompts)), *(tensor.to(device) for tensor in (padded["input_ids"], mask, positions, roles)))


def rows_of(model: nn.Module, prompts: Prompts, tokenizer: Any = None) -> list[Row]:
    """Rows of texts, of rows, or of a padded batch with `input_ids` and `attention_mask`, whichever side it is padded at.

    Raises:
        ConfigError: prompts of another type, or texts without a tokenizer.
    """
    if isinstance(prompts, Mapping):
        return _unpadded(prompts)
    of_type(prompts, (list, tuple), "the prompts of a circuit", "pass a list of texts or of rows, or a padded batch of the tokenizer")
    if prompts and all(isinstance(prompt, str) for prompt in prompts):
        tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
        return [Row(tuple(tokenizer(prompt).input_ids), 0) for prompt in prompts]
    check_rows(prompts, "the prompts of a circuit")
    return list(prompts)  # type: ignore[arg-type]


def _unpadded(batch: Mapping[str, Tensor]) -> list[Row]:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or (mask is not None and mask.shape != ids.shape):
        raise _no_batch(batch)
    mask = torch.ones_like(ids) if mask is None else mask
    return [Row(tuple(row[real.bool()].tolist()), 0) for row, real in zip(ids, mask, strict=True)]


def _labels(lengths: Sequence[int], positions: Positions) -> Sequence[Sequence[str | None]]:
    if positions == "sum":
        return [[""] * length for length in lengths]
    if positions == "each":
        if len(set(lengths)) > 1:
            raise _other_lengths(lengths)
        return [[str(place) for place in range(length)] for length in lengths]
    if isinstance(positions, str):
        raise _unknown_positions(positions)
    of_type(positions, (list, tuple), "`positions`", "pass 'sum', 'each', or a label for each token of each prompt")
    if [len(of_row) for of_row in positions] != list(lengths):
        raise _other_labels([len(of_row) for of_row in positions], lengths)
    if wrong := [label for of_row in positions for label in of_row if not (label is None or isinstance(label, str) and label)]:
        raise _no_label(wrong[0])
    return positions


# ---- errors


def _no_prompts() -> ConfigError:
    return ConfigError("no prompts to attribute on", expected="at least one", found="none", remedy="pass a list of texts or rows")


def _no_roles() -> ConfigError:
    return ConfigError("no token of the prompts is looked at", expected="a label for at least one token", found="None for all",
                       remedy="give labels to the tokens that count, or pass positions='sum'")  # fmt: skip


def _no_batch(batch: Mapping[str, Any]) -> ConfigError:
    return ConfigError(
        "a batch of prompts cannot be read",
        expected="input_ids [prompts, tokens], and attention_mask of the same shape where there is padding",
        found={name: list(value.shape) if isinstance(value, Tensor) else type(value).__name__ for name, value in batch.items()},
        remedy="pass tokenizer(texts, padding=True, return_tensors='pt')",
    )


def _other_lengths(lengths: Sequence[int]) -> ConfigError:
    return ConfigError(
        "positions of prompts of different length are not the same positions",
        expected="prompts with the same number of tokens",
        found=f"{min(lengths)} to {max(lengths)} tokens",
        remedy="use positions='sum', or a label for each token of each prompt",
    )


def _unknown_positions(positions: str) -> ConfigError:
    return ConfigError(
        "unknown `positions`",
        expected="'sum', 'each', or a label for each token of each prompt",
        found=repr(positions),
        remedy="'sum' adds the scores of a feature over the tokens of a prompt, 'each' keeps them apart",
    )


def _other_labels(found: list[int], lengths: Sequence[int]) -> ConfigError:
    return ConfigError(
        "the labels in `positions` do not fit the prompts",
        expected=f"a list of labels for each prompt, {list(lengths)[:8]} of them",
        found=found[:8],
        remedy="give every token a label, None for those that are left alone",
    )


def _no_label(label: object) -> ConfigError:
    return ConfigError("a label in `positions` is none", expected="text, or None", found=repr(label), remedy="e.g. 'subject'")
