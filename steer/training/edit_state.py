"""State of edits in a checkpoint: flat names and CPU tensors, which every trainer can save.

`step`, `applied`, `beside/<name>` of other edits on the model, and once they are applied: `probability`, `faded`, `resolved` (see
`EditRun`), `edit/<name>/<path>/<u, v, keys or values>`, `hash/<path>` (of each edited matrix, 32 bytes), `protection/...`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steer.edits.edit import Edit
from steer.errors import ConfigError

_PARTS = ("u", "v", "keys", "values")


@dataclass(frozen=True)
class SavedWeights:
    """What the weights of a checkpoint held.

    Attributes:
        hashes: of the matrices with edits of the run, by path.
        others: names of edits on the model that are not of the run.
    """

    hashes: Mapping[str, str] = field(default_factory=dict)
    others: frozenset[str] = frozenset()

    def tensors(self) -> dict[str, Tensor]:
        """Hashes as bytes, and the names."""
        hashes = {f"hash/{path}": torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8) for path, digest in self.hashes.items()}
        return hashes | {f"beside/{name}": torch.tensor(True) for name in self.others}

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> SavedWeights:
        """Inverse of `tensors`."""
        hashes = {name.removeprefix("hash/"): bytes(tensor.tolist()).hex() for name, tensor in state.items() if name.startswith("hash/")}
        return cls(hashes, frozenset(name.removeprefix("beside/") for name in state if name.startswith("beside/")))


def edit_tensors(edits: Sequence[Edit]) -> dict[str, Tensor]:
    """Factors, keys and values of edits."""
    return {
        f"edit/{edit.name}/{delta.path}/{part}": tensor
        for edit in edits
        for delta in edit.deltas
        for part in _PARTS
        if (tensor := getattr(delta, part)) is not None
    }


def edits_from(state: Mapping[str, Tensor], given: Sequence[Edit]) -> list[Edit]:
    """The edits of a saved state; those that were given where they were not applied yet. Raises ConfigError for the state of others."""
    try:
        if not bool(state["applied"]):
            return list(given)
        restored = []
        for edit in given:
            deltas = []
            for delta in edit.deltas:
                saved: dict[str, Any] = {
                    part: state[f"edit/{edit.name}/{delta.path}/{part}"] for part in _PARTS if getattr(delta, part) is not None
                }
                if any(saved[part].shape != getattr(delta, part).shape for part in saved):
                    raise ValueError(f"other shapes for '{delta.path}'")
                deltas.append(replace(delta, **saved))
            restored.append(replace(edit, deltas=tuple(deltas)))
        for name, length in (("probability", len(given)), ("faded", len(given))):
            if len(state[name]) != length:
                raise ValueError(f"{name} of {len(state[name])} edits")
        int(state["step"]), int(state["resolved"])
        return restored
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _other_edits(given, error) from error


# ---- errors


def _other_edits(given: Sequence[Edit], error: Exception) -> ConfigError:
    return ConfigError(
        "the state of edits in this checkpoint does not fit these edits",
        expected=f"that of {', '.join(edit.name for edit in given)}",
        found=f"{type(error).__name__}: {error}",
        remedy="resume with the edits that the run began with, or from another checkpoint",
    )
