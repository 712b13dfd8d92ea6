"""GGUF control vectors, the form in which llama.cpp and repeng read and write steering vectors.

A file has the architecture `controlvector`, the keys `controlvector.model_hint` and `controlvector.layer_count`, and one fp32 vector
`direction.<n>` for each layer. Both programs add direction.n to what block n, counted from 0, puts out: `layers.<n>.output`. llama.cpp has
no place for block 0 and refuses a file with `direction.0` (`common_control_vector_load`, `llama_adapter_cvec`); repeng takes it.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.checks import of_type
from steer.errors import ConfigError, WidthError
from steer.files import atomic_write, place_of, storage_errors
from steer.intervene.affine import Affine
from steer.intervene.deploy.constant import cannot_carry, constant_edits
from steer.intervene.intervention import Intervention
from steer.intervene.plan import Plan

ARCHITECTURE = "controlvector"
_CARRIER = "a control vector"


def to_gguf(plan: Plan, path: str | Path, *, model_hint: str | None = None) -> Path:
    """Writes a plan of additions to the residual stream as a control vector; strengths are multiplied in.

    llama.cpp adds it at every position (`--control-vector <file>`); the plan must do the same whenever it generates.

    Args:
        path: a file, `*.gguf` by custom.
        model_hint: architecture of the model, e.g. `llama`; what the plan's fingerprint says when None.

    Raises:
        DeployError: anything but constants at the outputs of blocks 1 to the last.
        ConfigError: no model hint; the package `gguf` is missing.
        StorageFullError: no room; a file that was there is untouched.
    """
    edits = constant_edits(plan, _CARRIER, phases=("generate",))
    known = plan.fingerprint or {}
    hint = model_hint or known.get("model_type")
    if hint is None:
        raise ConfigError(
            "a control vector names the architecture of its model",
            expected="model_hint, or a plan with a fingerprint",
            found="neither",
            remedy="pass model_hint=model.config.model_type",
        )
    of_type(hint, str, "`model_hint`", "pass the architecture as text, e.g. model.config.model_type")
    width = known.get("width", edits[0][0].operator.width)
    layers: dict[int, Tensor] = {}
    for one, edit in edits:
        layer = _layer(one, edit, known.get("n_layers"))
        if one.operator.width != width:
            raise WidthError(
                f"'{one.name}' does not fit the model of a control vector",
                expected=f"{width} numbers at every layer",
                found=one.operator.width,
                remedy="export a plan for one model",
            )
        layers[layer] = layers.get(layer, torch.zeros_like(edit.shift)) + edit.shift
    return _write(place_of(path), hint, layers)


def _layer(one: Intervention, edit: Affine, n_layers: int | None) -> int:
    site = one.site
    if edit.rank or site.part not in ("input", "output") or site.layer is None:
        expected, found = "an addition at layers.<n>.output", f"'{one.operator.name}' at '{site}'"
        raise cannot_carry(one, _CARRIER, expected, found, "use steer.to_adapter")
    layer = site.layer
    if layer < 0:
        if n_layers is None:
            expected = "a layer counted from 0, or a plan with a fingerprint"
            raise cannot_carry(one, _CARRIER, expected, f"'{site}' of a model of unknown depth", "count the layer from 0")
        layer += n_layers
    layer -= site.part == "input"  # the same tensor as the output of the block before
    if n_layers is not None and layer >= n_layers:
        raise cannot_carry(one, _CARRIER, f"a block from 1 to {n_layers - 1}", f"'{site}'", "steer an earlier block")
    if layer < 1:
        expected = "the output of block 1 or a later one: llama.cpp has no control vector for block 0"
        raise cannot_carry(one, _CARRIER, expected, f"'{site}'", "steer a later block")
    return layer


def gguf_package(what: str) -> Any:
    """The package `gguf`. Raises ConfigError when it is missing."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        install = "pip install 'torchsteer[gguf]'"
        raise ConfigError(what, expected="the package gguf", found="not installed", remedy=install) from error


def _write(path: Path, hint: str, layers: dict[int, Tensor]) -> Path:
    gguf = gguf_package("cannot write a control vector")
    with storage_errors(path, sum(vector.numel() * 4 for vector in layers.values())):
        path.parent.mkdir(parents=True, exist_ok=True)
        # the writer wants a path of its own; beside the file, so that no other disk has to have room
        handle, name = tempfile.mkstemp(suffix=".gguf", prefix=".", dir=path.parent)
        os.close(handle)
        try:
            writer = gguf.GGUFWriter(name, ARCHITECTURE)
            writer.add_string(f"{ARCHITECTURE}.model_hint", hint)
            writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(layers))
            for layer, vector in sorted(layers.items()):
                writer.add_tensor(f"direction.{layer}", vector.float().numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            return atomic_write(path, Path(name).read_bytes())
        finally:
            os.unlink(name)
