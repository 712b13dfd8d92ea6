"""Adapters: a plan as a PEFT LoRA adapter, which any program that loads those can run, switch off and stack.

W x + b becomes W x + b + B A x + c: an ablation is B A = -Q Q^T W, a constant is the bias c of B (`lora_bias`). In an embedding the same
is done to its rows. Nothing is trained, and nothing of the model changes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from steer.errors import DeployError
from steer.files import atomic_write, place_of, storage_errors, sync_folder
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

WEIGHTS = "adapter_model.safetensors"  # PEFT's names
CONFIG = "adapter_config.json"
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
    return _write_adapter(path, safetensors.torch.save(tensors, {"format": "pt"}), json.dumps(config, indent=2, sort_keys=True) + "\n")


# ---- files


def _write_adapter(folder: Path, weights: bytes, config: str) -> Path:
    """Writes an adapter, or leaves the one that is there.

    Weights of one adapter beside the configuration of another load without an error. So the configuration goes first and comes last: where
    the process is killed in between, there is none, PEFT refuses the folder, and the next call puts back what was there.
    """
    contents: dict[str, bytes | str] = {WEIGHTS: weights, CONFIG: config}
    new = {name: folder / f".{name}.new" for name in contents}
    old = {name: folder / f".{name}.old" for name in contents}
    with storage_errors(folder, len(weights) + len(config)):
        if not (folder / CONFIG).exists():
            _put_back(folder, old)
        try:
            for name, content in contents.items():
                atomic_write(new[name], content)
            _swap(folder, new, old)
            sync_folder(folder)
        finally:
            for path in (*new.values(), *old.values()):
                path.unlink(missing_ok=True)
    return folder


def _swap(folder: Path, new: dict[str, Path], old: dict[str, Path]) -> None:
    """Moves the old files away and the new files in, or puts the old files back where a step fails."""
    try:
        for name in (CONFIG, WEIGHTS):
            if (folder / name).exists():
                os.replace(folder / name, old[name])
        for name in (WEIGHTS, CONFIG):
            os.replace(new[name], folder / name)
    except BaseException:
        for name in new:
            if not new[name].exists():
                (folder / name).unlink(missing_ok=True)
        _put_back(folder, old)
        raise


def _put_back(folder: Path, old: dict[str, Path]) -> None:
    for name in (WEIGHTS, CONFIG):
        if old[name].exists():
            os.replace(old[name], folder / name)


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
    config = _config(anatomy, sorted(low_rank), rank, with_biases, saved_complete, conv1d)
    return config, {f"base_model.model.{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _with_constant_as_rank(change: WeightChange) -> tuple[Tensor, Tensor]:
    """A and B of an embedding's change, with its constant, where there is one, as one more rank: a row of ones times the constant."""
    if not change.shifts:
        return change.a, change.b
    ones = change.a.new_ones(1, change.a.shape[1])
    return torch.cat([change.a, ones]), torch.cat([change.b, change.bias[:, None]], 1)  # [rank + 1, in], [out, rank + 1]


def _config(anatomy: Anatomy, targets: list[str], rank: int, with_biases: bool, saved_complete: list[str], conv1d: bool) -> dict[str, Any]:
    """PEFT's configuration, as JSON has it."""
    from peft import LoraConfig  # takes seconds to import

    base: Any = anatomy.model
    config = LoraConfig(
        # the class that PEFT has for this task gives token ids to the encoder, which may take sound
        task_type="CAUSAL_LM" if base.get_output_embeddings() is not None and not base.config.is_encoder_decoder else None,
        base_model_name_or_path=getattr(base, "name_or_path", None) or base.config.name_or_path or None,
        r=rank,
        lora_alpha=rank,  # a scale of 1
        target_modules=targets,
        modules_to_save=saved_complete or None,
        lora_bias=with_biases,
        fan_in_fan_out=conv1d,
        inference_mode=True,
    )
    return _plain(config.to_dict())


def _plain(value: Any) -> Any:
    """A value as JSON has it; PEFT keeps sets and enumerations."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, set | list | tuple):
        return [_plain(entry) for entry in (sorted(value) if isinstance(value, set) else value)]
    return getattr(value, "value", value)


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
