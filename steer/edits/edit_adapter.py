"""Edits as PEFT LoRA adapters: any program that loads those can run an edit, switch it off, stack it and merge it, without this library.

W x + b becomes W x + b + B A x with B = u and A = v^T, alpha = rank, so that PEFT's scale is 1. The two factors are balanced by a power of
two, which changes no product: what is read back changes weights by the same numbers, to the bit. The file of the tensors also keeps what
the edit is, and the hashes of the matrices that it was solved for.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import of_type
from steer.edits.base_modules import base_path, find_module, fitting_module
from steer.edits.edit import Edit, WeightDelta
from steer.edits.edited_weights import EditedWeights
from steer.errors import ConfigError, DeployError
from steer.intervene import Plan
from steer.intervene.deploy.adapter import to_adapter as plan_to_adapter
from steer.intervene.deploy.adapter_files import PREFIX, adapter_config, check_adds_only, read_adapter, write_adapter
from steer.intervene.deploy.transformers_model import transformers_model
from steer.intervene.deploy.weight_edit import is_conv1d
from steer.model.anatomy import Anatomy
from steer.model.restoring import restoring_all
from steer.reading import damage_of

_A, _B = ".lora_A.weight", ".lora_B.weight"
_BASE, _EDITS = "base", "edits"  # keys of what is kept beside the tensors

Factors = dict[str, tuple[Tensor, Tensor]]  # A [rank, f] and B [d, rank] by the path of their map


def to_adapter(
    edits: Edit | Sequence[Edit],
    model: nn.Module,
    folder: str | Path,
    *,
    plan: Plan | str | Path | None = None,
    on_other_weights: bool = False,
) -> Path:
    """Writes edits as a folder that `PeftModel.from_pretrained(model, folder)` loads.

    Several edits become one adapter, whose rank is the sum of theirs. This is also how a quantised model gets an edit. Edits that are in
    the weights of the model have to be reverted before the adapter is loaded on it.

    Args:
        model: the model that they were solved for, raw or wrapped; it is left as it is.
        folder: an adapter that is there is replaced when the new one is complete, and other files stay.
        plan: a plan, or a saved one, that the adapter carries on top of the edits: see `steer.to_adapter` for what it can carry.
        on_other_weights: see `EditedWeights.apply`.

    Raises:
        DeployError: a delta that is dense or of a rank so large that an adapter would be no smaller than the matrix; no transformers
            model; a plan that an adapter cannot carry.
        WrongModelError: matrices that the edits were not solved for. ConfigError: no edits, or none that changes anything.
        StorageFullError: no room.

    Example:
        >>> steer.edits.to_adapter(edit, model, "capital")
        >>> edited = peft.PeftModel.from_pretrained(model, "capital")
    """
    of_type(edits, (Edit, list, tuple), "the edits of an adapter", "pass an Edit, or a list of them")
    chosen = (edits,) if isinstance(edits, Edit) else tuple(edits)
    for edit in chosen:
        of_type(edit, Edit, "an edit", "pass an Edit, or a list of them")
    if not chosen:
        raise _no_edits()
    edited = EditedWeights.of(model)
    base = transformers_model(Anatomy.find(model))
    if base is None:
        raise _no_transformers_model(model)
    deltas = [delta for edit in chosen for delta in edit.deltas]
    if not deltas and plan is None:
        raise _no_change(chosen)
    modules = {delta.path: fitting_module(base, delta.path, delta.shape) for delta in deltas}
    if not on_other_weights:
        for edit in chosen:
            edited.check_weights(edit)
    factors = {path: adapter_factors([delta for delta in deltas if delta.path == path]) for path in modules}
    conv1d = any(is_conv1d(module) for module in modules.values())
    kept = {_BASE: {path: digest for edit in chosen for path, digest in edit.base.items()}, _EDITS: [edit.as_json() for edit in chosen]}
    others: dict[str, Tensor] = {}
    config = adapter_config(base, sorted(factors), 1, conv1d=conv1d)
    if plan is not None:
        config, others = _of_plan(plan, chosen, edited, on_other_weights)
    config, tensors = _joined(factors, config, others)
    return write_adapter(folder, tensors, config, kept)


def from_adapter(folder: str | Path, model: nn.Module, *, name: str = "", on_other_weights: bool = False) -> Edit:
    """Reads a LoRA adapter as an edit: one that `to_adapter` wrote, or any other that adds B A to weights and does nothing else.

    Of edits of this library it has facts, editor and hashes again; keys and values, from which a delta can be solved again, are in the
    files of `Edit.save` alone.

    Args:
        model: raw or wrapped; it is left as it is.
        name: by default that of the edit that was written, or one from the content.
        on_other_weights: see `EditedWeights.apply`.
        folder: of the adapter.

    Raises:
        ConfigError: an adapter that changes more than weights of linear maps. ModelNotFoundError: no adapter.
        WrongModelError: maps that the model does not have, or matrices that the edit was not solved for. FileError.

    Example:
        >>> steer.edits.to_adapter(edit, model, "capital")
        PosixPath('capital')
        >>> steer.edits.from_adapter("capital", model).facts
    """
    config, tensors, kept = read_adapter(folder)
    check_adds_only(folder, config, list(tensors))
    if patterns := [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]:
        raise _with_patterns(folder, patterns)
    edited = EditedWeights.of(model)
    with damage_of(folder, "a LoRA adapter as PEFT writes it"):
        factors = _read_factors(tensors, _scale(config))
        entries = [] if kept is None else [Edit.from_json(entry, ()) for entry in kept[_EDITS]]
        base = {} if kept is None else dict(kept[_BASE])
    layers = _layers(edited.model, list(factors))
    deltas = tuple(WeightDelta(path, layers[path], b, a.mT) for path, (a, b) in factors.items())
    for delta in deltas:
        fitting_module(edited.model, delta.path, delta.shape)
    edit = _merged(entries, deltas, base, name, Anatomy.find(model).fingerprint())
    if not on_other_weights:
        edited.check_weights(edit)
    return edit


# ---- factors


def adapter_factors(deltas: Sequence[WeightDelta]) -> tuple[Tensor, Tensor]:
    """A [rank, f] and B [d, rank] of the sum of some deltas of one matrix. Raises DeployError where they are no smaller than the matrix."""
    if sum(delta.rank for delta in deltas) >= min(deltas[0].shape):
        raise _too_large(deltas)
    u, v = (torch.cat([getattr(delta, name) for delta in deltas], 1) for name in ("u", "v"))
    sizes = u.norm(dim=0) / v.norm(dim=0)  # of the columns of one factor in those of the other
    exponents = torch.where((sizes > 0) & sizes.isfinite(), sizes.log2() / 2, 0.0).round()
    balance = torch.exp2(exponents)  # powers of two: no digit of a product changes
    return (v * balance).mT.contiguous(), u / balance


def _joined(factors: Factors, config: Mapping[str, Any], others: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One adapter of the factors of edits and of the tensors of another adapter with a scale of 1, padded with zeros to one rank."""
    tensors = dict(others)
    with_biases = any(name.endswith(".lora_B.bias") for name in others)
    for path, (a, b) in factors.items():
        name_a, name_b = f"{PREFIX}{path}{_A}", f"{PREFIX}{path}{_B}"
        if name_a in others:
            a, b = torch.cat([others[name_a].to(a), a]), torch.cat([others[name_b].to(b), b], 1)
        elif with_biases:
            tensors[f"{PREFIX}{path}.lora_B.bias"] = b.new_zeros(len(b))
        tensors[name_a], tensors[name_b] = a, b
    in_rows = (_A, ".lora_embedding_A")
    rank = max([1, *(len(tensor) for name, tensor in tensors.items() if name.endswith(in_rows))])
    for name, tensor in tensors.items():
        if name.endswith(in_rows):
            tensors[name] = torch.cat([tensor, tensor.new_zeros(rank - len(tensor), tensor.shape[1])])
        elif name.endswith((_B, ".lora_embedding_B")):
            tensors[name] = torch.cat([tensor, tensor.new_zeros(len(tensor), rank - tensor.shape[1])], 1)
    targets = sorted({*factors, *config["target_modules"]})
    return {**config, "r": rank, "lora_alpha": rank, "target_modules": targets}, tensors


def _of_plan(
    plan: Plan | str | Path, edits: Sequence[Edit], edited: EditedWeights, on_other_weights: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The adapter of a plan for the edited weights: an ablation of what a map gives depends on them."""
    if not isinstance(plan, Plan):
        plan = Plan.load(plan)
    if others := [edit.name for edit in edited.applied if edit.name not in {chosen.name for chosen in edits}]:
        raise _others_applied(others)
    with tempfile.TemporaryDirectory() as folder, restoring_all() as stack:
        for edit in edits:
            if not any(edit.name == other.name for other in edited.applied):
                stack.enter_context(edited.with_edit(edit, on_other_weights=on_other_weights))
        config, tensors, _ = read_adapter(plan_to_adapter(plan, edited.model, folder))
    return config, tensors


def _scale(config: Mapping[str, Any]) -> float:
    """What PEFT multiplies B A by."""
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _read_factors(tensors: Mapping[str, Tensor], scale: float) -> Factors:
    """Factors by base path, without ranks that are 0. Raises ConfigError for what is no linear map."""
    factors: Factors = {}
    for name in sorted(tensors):
        if not name.endswith(_A):
            if not name.endswith(_B) or name.removesuffix(_B) + _A not in tensors:
                raise _no_linear_map(name)
            continue
        a, b = tensors[name].float(), tensors[name.removesuffix(_A) + _B].float() * scale
        if a.dim() != 2 or b.dim() != 2:
            raise _no_linear_map(name)
        used = (a != 0).any(1) & (b != 0).any(0)  # [rank]
        factors[base_path(name.removesuffix(_A))] = a[used], b[:, used]
    return factors


def _layers(base: nn.Module, paths: Sequence[str]) -> dict[str, int]:
    """The block of each map, by its path; -1 for one outside the blocks. Raises WrongModelError for a map that is not there."""
    by_module = {module: layer for layer, block in enumerate(Anatomy.find(base).blocks) for module in block.modules()}
    return {path: by_module.get(find_module(base, path), -1) for path in paths}


def _merged(entries: Sequence[Edit], deltas: tuple[WeightDelta, ...], base: dict[str, str], name: str, model: dict[str, Any]) -> Edit:
    """One edit of what an adapter says that it holds: several edits become one with their facts, none an edit without facts."""
    if len(entries) == 1:
        (edit,) = entries
        return replace(edit, deltas=deltas, name=name or edit.name, base=base, of=None)
    facts = tuple(dict.fromkeys(fact for edit in entries for fact in edit.facts))
    editors = list(dict.fromkeys(edit.editor for edit in entries)) or ["lora"]
    provenance = {"merged": [edit.as_json() for edit in entries]} if entries else {}
    name = name or "+".join(edit.name for edit in entries)
    return Edit(
        facts, "+".join(editors), deltas, name, base=base, model=dict(entries[0].model) if entries else model, provenance=provenance
    )


# ---- errors


def _no_edits() -> ConfigError:
    return ConfigError("there is no edit to write", expected="at least one", found="none", remedy="pass an edit, or a list of them")


def _no_change(edits: Sequence[Edit]) -> ConfigError:
    is_said = not any(edit.provenance.get("not_found") for edit in edits)
    return ConfigError(
        "there is nothing to write into an adapter",
        expected="an edit that changes a matrix",
        found=f"{', '.join(edit.name for edit in edits)}: " + ("the model gave these answers already" if is_said else "no value was found"),
        remedy="use the model as it is" if is_said else "edit a lower layer, or give ValueSettings other lr, steps or clamp",
    )


def _others_applied(names: list[str]) -> ConfigError:
    return ConfigError(
        "the plan would be worked out for weights that hold other edits",
        expected="no edits on the model but those that go into the adapter",
        found=", ".join(names),
        remedy="revert them first, or write them into the adapter, too",
    )


def _no_transformers_model(model: nn.Module) -> DeployError:
    return DeployError(
        "an adapter is made for a model of transformers",
        expected="such a model, raw or wrapped",
        found=type(model).__name__,
        remedy="apply the edit and save the weights, or save the edit: edit.save(path)",
    )


def _too_large(deltas: Sequence[WeightDelta]) -> DeployError:
    d, f = deltas[0].shape
    return DeployError(
        f"an adapter of the change of '{deltas[0].path}' would be no smaller than the matrix",
        expected=f"a rank below {min(d, f)}, the smaller side of {d} x {f}",
        found=f"rank {sum(delta.rank for delta in deltas)}" + (", dense" if any(delta.is_dense for delta in deltas) else ""),
        remedy="apply the edits and save the model (model.save_pretrained), or write fewer of them into one adapter",
    )


def _with_patterns(folder: str | Path, patterns: list[str]) -> ConfigError:
    return ConfigError(
        f"the adapter in {folder} has ranks or scales of its own for some maps",
        expected="one rank and one alpha",
        found=", ".join(patterns),
        remedy="merge it and compare the two models, or train one without patterns",
    )


def _no_linear_map(name: str) -> ConfigError:
    return ConfigError(
        "this adapter changes something else than a linear map",
        expected="`lora_A` and `lora_B` of linear maps",
        found=name,
        remedy="leave embeddings and convolutions out of the adapter",
    )
