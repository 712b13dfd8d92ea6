"""State of a plan in a checkpoint: flat names and CPU tensors, which every trainer can save.

`step`, and for every intervention `<name>/base`, `<name>/enabled`, `<name>/tokens` (steered so far, over all ranks), `<name>/window` (for a
scope with one slice) and `<name>/learned/<tensor>`. Checkpoints of all versions have this layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steer.errors import ConfigError


def flatten(state: Mapping[str, Any], tokens: Mapping[str, int]) -> dict[str, Tensor]:
    """Flat tensors of what `state_dict` of a plan gives, and of the tokens that each intervention has steered."""
    flat = {"step": torch.tensor(state["step"])}
    for name, values in state["interventions"].items():
        flat[f"{name}/base"] = values["base"]
        flat[f"{name}/enabled"] = torch.tensor(values["enabled"])
        flat[f"{name}/tokens"] = torch.tensor(tokens[name])
        if values["window"] is not None:
            flat[f"{name}/window"] = torch.tensor([[bound is not None, bound or 0] for bound in values["window"]])  # [2 bounds, 2]
        flat |= {f"{name}/learned/{key}": tensor for key, tensor in values["learned"].items()}
    return flat


def unflatten(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inverse of `flatten`: what `load_state_dict` of a plan takes. Raises ConfigError for what `flatten` does not make."""
    names = [key.removesuffix("/base") for key in flat if key.endswith("/base")]
    try:
        interventions = {
            name: {
                "base": flat[f"{name}/base"],
                "enabled": bool(flat[f"{name}/enabled"]),
                "window": _window(flat.get(f"{name}/window")),
                "learned": learned_tensors(flat, name),
            }
            for name in names
        }
        for name in names:
            steered_tokens(flat, name)
        return {"step": int(flat["step"]), "interventions": interventions}
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise _no_state(error) from error


def steered_tokens(flat: Mapping[str, Tensor], name: str) -> int:
    """Tokens that an intervention had steered when the state was saved."""
    return int(flat[f"{name}/tokens"])


def learned_tensors(flat: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """What an intervention had learned when the state was saved, by the names of its parameters."""
    prefix = f"{name}/learned/"
    return {key.removeprefix(prefix): tensor for key, tensor in flat.items() if key.startswith(prefix)}


def _window(bounds: Tensor | None) -> tuple[int | None, ...] | None:
    """Start and stop of a window, None for an open end. bounds: [2, 2], whether there is a bound, and where."""
    return None if bounds is None else tuple(bound if is_bounded else None for is_bounded, bound in bounds.tolist())


# ---- errors


def _no_state(error: Exception) -> ConfigError:
    return ConfigError(
        "the state of a plan in this checkpoint lacks a part, or holds one that does not fit",
        expected="step, and for every intervention base, enabled, tokens, window and learned tensors",
        found=f"{type(error).__name__}: {error}",
        remedy="resume from another checkpoint, or with the version that wrote this one",
    )
