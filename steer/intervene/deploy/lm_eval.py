"""Steering files of the LM Evaluation Harness (EleutherAI, model type `steered`), in the form of lm-eval 0.4.13.

`lm_eval --model steered --model_args pretrained=...,steer_path=<file>.pt` hooks modules of the model's decoder by their names, and at every
position adds coefficient * vector to what they put out (`add`), or sets its projection on the vector's direction to the coefficient
(`clamp`). One module takes one entry. Versions whose entries have no `head_index` add the last vector of a file at all of its modules.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steer.errors import ConfigError, DeployError
from steer.files import atomic_write, place_of
from steer.intervene.affine import Affine
from steer.intervene.deploy.constant import cannot_carry, constant_edits
from steer.intervene.deploy.transformers_model import transformers_model
from steer.intervene.intervention import Intervention
from steer.intervene.plan import Plan
from steer.model.anatomy import Anatomy, HookPoint
from steer.model.site import Site

_CARRIER = "a steering file of lm-eval"
_CLOSE = 1e-5  # how far an edit may be from the form of `clamp`; directions are of length 1 to fp32


def to_lm_eval(plan: Plan, model: nn.Module, path: str | Path) -> Path:
    """Writes a plan as {hookpoint: {steering_vector, steering_coefficient, action, bias, head_index}}.

    Args:
        plan: additions, ablations of one direction and clamps to a value, at what modules of the decoder put out, one for each module
            (additions to one module become one), acting on all tokens when the model evaluates and generates.
        model: the transformers model that will be evaluated, for the names of its modules.
        path: ends in `.pt`, by which lm-eval knows the form.

    Raises:
        DeployError: anything else in the plan.
        ConfigError: another ending. SiteError: the plan does not fit the model. StorageFullError: no room.

    Example:
        >>> steer.to_lm_eval(plan, model, "steer.pt")
    """
    path = place_of(path)
    if path.suffix != ".pt":
        raise _other_ending(path)
    anatomy = Anatomy.find(model)
    base = transformers_model(anatomy) or anatomy.decoder
    module_names = {id(module): name for name, module in getattr(base, "base_model", base).named_modules()}
    edits: dict[str, Affine] = {}  # by the name of the module
    for intervention, edit in constant_edits(plan, _CARRIER, anatomy, phases=("validate", "generate")):
        point = _hook_point(anatomy, intervention)
        name = module_names.get(id(point.module))
        if point.side != "output" or point.columns is not None or not name:
            raise _no_output_of_module(intervention)
        if point.width not in (None, edit.shift.shape[0]):
            raise _other_width(intervention, point.width, edit)
        if name in edits:
            if edits[name].rank or edit.rank:
                raise _several_edits(intervention, name)
            edit = edits[name].then(edit)
        edits[name] = edit
    entries = {name: _entry(name, edit) for name, edit in edits.items()}
    buffer = io.BytesIO()
    torch.save(entries, buffer)
    return atomic_write(path, buffer.getvalue())


def _hook_point(anatomy: Anatomy, intervention: Intervention) -> HookPoint:
    """The hook point of an intervention; for the input of a block that of the output of the block before, which is the same tensor."""
    site = intervention.single_site
    if site.module is None:
        site = anatomy.point(site).site
    if site.part == "input" and site.layer:
        site = Site("output", site.layer - 1)
    return anatomy.point(site)


def _entry(name: str, edit: Affine) -> dict[str, Any]:
    """The entry of a module: `add` for an addition, `clamp` for h - (h u) u + value u with a u of length 1."""
    if edit.rank == 0:
        return {"steering_vector": edit.shift.float(), "steering_coefficient": 1.0, "action": "add", "bias": None, "head_index": None}
    length = edit.right[0].norm()
    u = edit.right[0] / length  # [width]
    value = float(edit.shift @ u)
    shift_along_u = (edit.shift - value * u).norm() <= _CLOSE * max(1.0, abs(value))
    removes_u = (edit.left[0] * length + u).norm() <= _CLOSE
    if edit.rank > 1 or not shift_along_u or not removes_u:
        raise _neither_add_nor_clamp(name, edit)
    return {"steering_vector": u.float(), "steering_coefficient": value, "action": "clamp", "bias": None, "head_index": None}


# ---- errors


def _other_ending(path: Path) -> ConfigError:
    return ConfigError("lm-eval reads this form from '.pt' files", expected="*.pt", found=path.name, remedy="change the ending")


def _no_output_of_module(intervention: Intervention) -> DeployError:
    found = f"'{intervention.site}'"
    return cannot_carry(intervention, _CARRIER, "what a module of the decoder puts out", found, "steer an output")


def _other_width(intervention: Intervention, width: int | None, edit: Affine) -> DeployError:
    found = f"width {edit.shift.shape[0]}"
    return cannot_carry(intervention, _CARRIER, f"width {width}", found, "extract the vector on this model and at this site")


def _several_edits(intervention: Intervention, name: str) -> DeployError:
    return cannot_carry(intervention, _CARRIER, f"one edit of '{name}', or additions only", "several edits of it", "keep one of them")


def _neither_add_nor_clamp(name: str, edit: Affine) -> DeployError:
    return DeployError(
        f"{_CARRIER} cannot carry the edit of '{name}'",
        expected="an addition, or a projection on one direction set to a value, at strength 1",
        found=f"an edit of rank {edit.rank}",
        remedy="use steer.bake or steer.to_adapter and evaluate that model",
    )
