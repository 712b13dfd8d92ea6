"""Adapters: a plan as a PEFT LoRA adapter, which any program that loads those can run, switch off and stack.

W x + b becomes W x + b + B A x + c: an ablation is B A = -Q Q^T W, a constant is the bias c of B (`lora_bias`). In an embedding the same
is done to its rows. Nothing is trained, and nothing of the model changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.errors import DeployError
from steer.files import place_of
from steer.intervene.deploy.adapter_files import PREFIX, adapter_config, write_adapter
from steer.intervene.deploy.baked import Baked
from steer.intervene.deploy.check import Check
from steer.intervene.deploy.constant import cannot_carry, constant_edits
from steer.intervene.deploy.placement import check_sites, weight_edits
from steer.intervene.deploy.transformers_model import transformers_model
from steer.intervene.deploy.weight_edit import WeightChange, WeightEdit, is_conv1d
from steer.intervene.intervention import Intervention
from steer.intervene.plan import Plan
from steer.model.anatomy import Anatomy
from steer.model.devices import check_weights_are_there

_CARRIER = "an adapter"


def to_adapter(plan: Plan, model: nn.Module, path: str | Path) -> Path:
    """Writes a plan as a folder that `PeftModel.from_pretrained(model, path)` loads.

    The conditions are those of `steer.bake`, with three differences. Biases and tied embeddings are no obstacle, since the adapter stands
    beside the weights. With the adapter switched off the model is not steered, so that the roles must be `policy` alone. Experts of a
    mixture cannot be carried.

    `merge_and_unload` gives the same model where PEFT can merge: not into maps without a bias when the plan has constants, and not into
    tied embeddings (load the model with `steer.load(..., untie=True)` for that).

    Args:
        plan: not attached to this model.
        model: the transformers model that the adapter is for, without adapters. Its weights are changed to try the adapter, and put back
            to the bit.
        path: a folder; an adapter that is there is replaced when the new one is complete, and other files stay.

    Raises:
        DeployError: a plan, model or site for which it would not be exact.
        AttachError: something is attached to the model.
        SiteError, WidthError, WrongModelError: the plan does not fit the model.
        StorageFullError: no room; an adapter that was there is untouched.

    Example:
        >>> steer.to_adapter(plan, model, "steered")
        >>> steered = peft.PeftModel.from_pretrained(model, "steered")
    """
    anatomy = Anatomy.find(model)
    check_weights_are_there(model, _CARRIER)
    path = place_of(path)
    base = transformers_model(anatomy)
    if base is None or any(hasattr(module, "base_layer") for module in model.modules()):
        raise _no_plain_model(model, with_adapters=base is not None)
    edits = constant_edits(plan, _CARRIER, anatomy)
    check_sites(edits, _CARRIER)
    interventions = [intervention for intervention, _ in edits]
    for intervention in interventions:
        if "reference" in intervention.roles:
            raise _reference_is_steered(intervention)
    base_anatomy = Anatomy.find(base)  # names as in the model that the adapter is loaded on
    check = Check(base_anatomy, interventions, plan.fingerprint, _CARRIER)
    edits_of_weights = weight_edits(base_anatomy, edits, _CARRIER)
    for weight_edit in edits_of_weights:
        if weight_edit.kind == "experts":
            raise _edit_of_experts(weight_edit)
    check.prove(edits_of_weights)
    with Baked() as trial:
        config, tensors = _adapter(edits_of_weights, base_anatomy)
        trial.untie(base_anatomy)  # an adapter of a tied embedding leaves the head alone
        for weight_edit in edits_of_weights:
            trial.apply(weight_edit)
        check.compare()
    return write_adapter(path, tensors, config)


# ---- PEFT's form


def _adapter(edits_of_weights: list[WeightEdit], anatomy: Anatomy) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's configuration and tensors.

    PEFT has no bias for embeddings, neither their own nor beside those of other maps. A constant in their rows becomes one more rank, of
    ones; an embedding in an adapter that needs biases elsewhere, or of a class of its own, is saved complete (`modules_to_save`).
    """
    changes = {weight_edit.path: weight_edit.change() for weight_edit in edits_of_weights}
    with_biases = any(changes[weight_edit.path].shifts for weight_edit in edits_of_weights if weight_edit.kind == "linear")
    saved_complete: list[str] = []
    low_rank: dict[str, tuple[Tensor, Tensor]] = {}  # A and B by the path of their map
    tensors: dict[str, Tensor] = {}
    for weight_edit in edits_of_weights:
        path = weight_edit.path
        change = changes[path]
        if weight_edit.kind != "embedding":
            low_rank[path] = change.a, change.b
            if with_biases:
                tensors[f"{path}.lora_B.bias"] = change.bias
        elif with_biases or type(weight_edit.module) is not nn.Embedding:
            saved_complete.append(path)
            tensors[f"{path}.weight"] = weight_edit.changed_weight(change).to(weight_edit.parameter.dtype)
        else:
            low_rank[path] = _with_constant_as_rank(change)
    if not low_rank:  # PEFT wants at least one low-rank map; this one does nothing
        point = anatomy.point("layers.0.attn.z")
        low_rank[point.path] = torch.zeros(1, point.width or 0), torch.zeros(anatomy.width, 1)
    rank = max(1, *(len(a) for a, _ in low_rank.values()))
    embeddings = {weight_edit.path for weight_edit in edits_of_weights if weight_edit.kind == "embedding"}
    for path, (a, b) in low_rank.items():
        name_a, name_b = ("lora_embedding_A", "lora_embedding_B") if path in embeddings else ("lora_A.weight", "lora_B.weight")
        tensors[f"{path}.{name_a}"] = torch.cat([a, a.new_zeros(rank - len(a), a.shape[1])])  # [rank, in]
        tensors[f"{path}.{name_b}"] = torch.cat([b, b.new_zeros(len(b), rank - b.shape[1])], 1)  # [out, rank]
    conv1d = any(is_conv1d(weight_edit.module) for weight_edit in edits_of_weights)
    config = adapter_config(anatomy.model, sorted(low_rank), rank, conv1d=conv1d, with_biases=with_biases, saved_complete=saved_complete)
    return config, {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}


def _with_constant_as_rank(change: WeightChange) -> tuple[Tensor, Tensor]:
    """A and B of an embedding's change, with its constant, where there is one, as one more rank: a row of ones times the constant."""
    if not change.shifts:
        return change.a, change.b
    ones = change.a.new_ones(1, change.a.shape[1])
    return torch.cat([change.a, ones]), torch.cat([change.b, change.bias[:, None]], 1)  # [rank + 1, in], [out, rank + 1]


# ---- errors


def _no_plain_model(model: nn.Module, *, with_adapters: bool) -> DeployError:
    return DeployError(
        "an adapter is made for a transformers model without adapters",
        expected="such a model, raw or compiled",
        found=f"{type(model).__name__} with adapters" if with_adapters else type(model).__name__,
        remedy="merge the adapters first: model.merge_and_unload()",
    )


def _reference_is_steered(intervention: Intervention) -> DeployError:
    return cannot_carry(
        intervention,
        _CARRIER,
        expected="roles=('policy',)",
        found="the role reference, which is the adapter switched off",
        remedy="leave it out",
    )


def _edit_of_experts(weight_edit: WeightEdit) -> DeployError:
    return DeployError(
        f"{_CARRIER} cannot carry an edit of experts",
        expected="edits of linear maps and embeddings",
        found=weight_edit.path,
        remedy="use steer.bake, or leave the MLP of these blocks out of the plan",
    )
