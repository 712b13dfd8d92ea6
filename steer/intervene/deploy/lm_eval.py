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
from steer.intervene.deploy.fold import transformers_model
from steer.intervene.plan import Plan
from steer.model.anatomy import Anatomy
from steer.model.site import Site

_CARRIER = "a steering file of lm-eval"
_CLOSE = 1e-5


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
    """
    path = place_of(path)
    if path.suffix != ".pt":
        raise ConfigError("lm-eval reads this form from '.pt' files", expected="*.pt", found=path.name, remedy="change the ending")
    anatomy = Anatomy.find(model)
    base = transformers_model(anatomy) or anatomy.decoder
    named = {id(module): name for name, module in getattr(base, "base_model", base).named_modules()}
    found: dict[str, Affine] = {}
    for one, edit in constant_edits(plan, _CARRIER, phases=("validate", "generate")):
        site = one.site if one.site.module is not None else anatomy.point(one.site).site
        if site.part == "input" and site.layer:
            site = Site("output", site.layer - 1)  # the same tensor
        point = anatomy.point(site)
        if point.side != "output" or point.columns is not None or not named.get(id(point.module)):
            raise cannot_carry(one, _CARRIER, "what a module of the decoder puts out", f"'{one.site}'", "steer an output")
        if edit.shift.shape[0] != (point.width or edit.shift.shape[0]):
            expected, wrong = f"width {point.width}", f"width {edit.shift.shape[0]}"
            raise cannot_carry(one, _CARRIER, expected, wrong, "extract the vector on this model and at this site")
        name = named[id(point.module)]
        if name in found and (found[name].rank or edit.rank):
            raise cannot_carry(one, _CARRIER, f"one edit of '{name}', or additions only", "several edits of it", "keep one of them")
        found[name] = found[name].then(edit) if name in found else edit
    entries = {name: _entry(name, edit) for name, edit in found.items()}
    buffer = io.BytesIO()
    torch.save(entries, buffer)
    return atomic_write(path, buffer.getvalue())


def _entry(name: str, edit: Affine) -> dict[str, Any]:
    if edit.rank == 0:
        return {"steering_vector": edit.shift.float(), "steering_coefficient": 1.0, "action": "add", "bias": None, "head_index": None}
    # h - (h u) u + value u, for a u of length 1
    length = edit.right[0].norm()
    u = edit.right[0] / length
    value = float(edit.shift @ u)
    off_line = (edit.shift - value * u).norm() > _CLOSE * max(1.0, abs(value))
    if edit.rank > 1 or bool(off_line) or bool((edit.left[0] * length + u).norm() > _CLOSE):
        raise DeployError(
            f"{_CARRIER} cannot carry the edit of '{name}'",
            expected="an addition, or a projection on one direction set to a value, at strength 1",
            found=f"an edit of rank {edit.rank}",
            remedy="use steer.bake or steer.to_adapter and evaluate that model",
        )
    return {"steering_vector": u.float(), "steering_coefficient": value, "action": "clamp", "bias": None, "head_index": None}
