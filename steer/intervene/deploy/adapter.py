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
from steer.intervene.deploy.fold import Fold, check_sites, fold, is_conv1d, transformers_model
from steer.intervene.plan import Plan
from steer.model.anatomy import Anatomy

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names


def to_adapter(plan: Plan, model: nn.Module, path: str | Path) -> Path:
    """Writes a plan as a folder that `PeftModel.from_pretrained(model, path)` loads.

    The conditions are those of `steer.bake`, with three differences. Biases and tied embeddings are no obstacle, since the adapter stands
    beside the weights. With the adapter switched off the model is not steered, so that the roles must be `policy` alone. Experts of a
    mixture cannot be carried.

    `merge_and_unload` gives the same model where PEFT can merge: not into maps without a bias when the plan has constants, and not into
    tied embeddings (load the model with `tie_word_embeddings=False` for that).

    Args:
        plan: not attached.
        model: the transformers model that the adapter is for, without adapters. Its weights are changed to try the adapter, and put back
            to the bit.
        path: a folder; an adapter that is there is replaced when the new one is complete, and other files stay.

    Raises:
        DeployError: a plan, model or site for which it would not be exact.
        AttachError: something is attached to the model.
        SiteError, WidthError, WrongModelError: the plan does not fit the model.
        StorageFullError: no room; an adapter that was there is untouched.
    """
    anatomy, carrier, path = Anatomy.find(model), "an adapter", place_of(path)
    base = transformers_model(anatomy)
    if base is None or any(hasattr(module, "base_layer") for module in model.modules()):
        raise DeployError(
            "an adapter is made for a transformers model without adapters",
            expected="such a model, raw or compiled",
            found=f"{type(model).__name__} with adapters" if base is not None else type(model).__name__,
            remedy="merge the adapters first: model.merge_and_unload()",
        )
    edits = constant_edits(plan, carrier)
    check_sites(edits, carrier)
    for one, _ in edits:
        if "reference" in one.roles:
            raise cannot_carry(one, carrier, "roles=('policy',)", "the role reference, which is the adapter switched off", "leave it out")
    base_anatomy = Anatomy.find(base)  # names as in the model that the adapter is loaded on
    check = Check(base_anatomy, [one for one, _ in edits], plan.fingerprint, carrier)
    folds = fold(base_anatomy, edits, carrier)
    if mixed := [made.path for made in folds if made.kind == "experts"]:
        raise DeployError(
            "an adapter cannot carry an edit of experts",
            expected="edits of linear maps and embeddings",
            found=mixed[0],
            remedy="use steer.bake, or leave the MLP of these blocks out of the plan",
        )
    check.prove(folds)
    with Baked() as trial:
        config, tensors = _adapter(folds, base_anatomy)
        for made in folds:
            trial.apply(made)
        check.compare()
    return _replace(path, safetensors.torch.save(tensors, {"format": "pt"}), json.dumps(config, indent=2, sort_keys=True) + "\n")


def _replace(folder: Path, weights: bytes, config: str) -> Path:
    """Writes an adapter, or leaves the one that is there.

    Weights of one adapter beside the configuration of another load without an error. So the configuration goes first and comes last: where
    the process is killed in between, there is none, PEFT refuses the folder, and the next call puts back what was there.
    """
    made: dict[str, bytes | str] = {WEIGHTS: weights, CONFIG: config}
    new, old = ({name: folder / f".{name}.{age}" for name in made} for age in ("new", "old"))
    with storage_errors(folder, len(weights) + len(config)):
        if not (folder / CONFIG).exists():
            _put_back(folder, old)
        try:
            for name, content in made.items():
                atomic_write(new[name], content)
            try:
                for name in (CONFIG, WEIGHTS):
                    if (folder / name).exists():
                        os.replace(folder / name, old[name])
                for name in (WEIGHTS, CONFIG):
                    os.replace(new[name], folder / name)
            except BaseException:
                for name in made:
                    if not new[name].exists():
                        (folder / name).unlink(missing_ok=True)
                _put_back(folder, old)
                raise
            sync_folder(folder)
        finally:
            for path in (*new.values(), *old.values()):
                path.unlink(missing_ok=True)
    return folder


def _put_back(folder: Path, old: dict[str, Path]) -> None:
    for name in (WEIGHTS, CONFIG):
        if old[name].exists():
            os.replace(old[name], folder / name)


def _adapter(folds: list[Fold], anatomy: Anatomy) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's configuration and tensors.

    PEFT has no bias for embeddings, neither their own nor beside those of other maps. A constant in their rows becomes one more rank, of
    ones; an embedding in an adapter that needs biases elsewhere, or of a class of its own, is kept as a whole (`modules_to_save`).
    """
    from peft import LoraConfig  # takes seconds to import

    base: Any = anatomy.model
    changes = {made.path: made.change() for made in folds}
    biased = any(bool((changes[made.path][2] != 0).any()) for made in folds if made.kind == "linear")
    whole = [made for made in folds if made.kind == "table" and (biased or type(made.module) is not nn.Embedding)]
    low_rank: dict[str, tuple[Tensor, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for made in folds:
        a, b, shift = changes[made.path]
        if made in whole:
            tensors[f"{made.path}.weight"] = (made.weight.to(a) + b @ a + shift[:, None]).mT.to(made.parameter.dtype)
        elif made.kind == "table":
            constant = int((shift != 0).any())
            low_rank[made.path] = torch.cat([a, a.new_ones(constant, a.shape[1])]), torch.cat([b, shift[:, None][:, :constant]], 1)
        else:
            low_rank[made.path] = a, b
            if biased:
                tensors[f"{made.path}.lora_B.bias"] = shift
    if not low_rank:  # PEFT wants one low-rank map; this one does nothing
        point = anatomy.point("layers.0.attn.z")
        low_rank[point.path] = torch.zeros(1, point.width or 0), torch.zeros(anatomy.width, 1)
    rank = max(1, *(len(a) for a, _ in low_rank.values()))
    tables = {made.path for made in folds if made.kind == "table"}
    for path, (a, b) in low_rank.items():
        padded = torch.cat([a, a.new_zeros(rank - len(a), a.shape[1])]), torch.cat([b, b.new_zeros(len(b), rank - b.shape[1])], 1)
        names = ("lora_embedding_A", "lora_embedding_B") if path in tables else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{path}.{name}": tensor for name, tensor in zip(names, padded, strict=True)}
    config = LoraConfig(
        task_type="CAUSAL_LM" if base.get_output_embeddings() is not None else None,
        base_model_name_or_path=base.config.name_or_path or None,
        r=rank,
        lora_alpha=rank,  # a scale of 1
        target_modules=sorted(low_rank),
        modules_to_save=[made.path for made in whole] or None,
        lora_bias=biased,
        fan_in_fan_out=any(is_conv1d(made.module) for made in folds),
        inference_mode=True,
    )
    found = {f"base_model.model.{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()}
    return _plain(config.to_dict()), found


def _plain(value: Any) -> Any:
    """As JSON has it; PEFT keeps sets and enumerations."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, set | list | tuple):
        return [_plain(one) for one in (sorted(value) if isinstance(value, set) else value)]
    return getattr(value, "value", value)
