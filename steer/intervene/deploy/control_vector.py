"""GGUF control vectors, the form in which llama.cpp and repeng read and write steering vectors.

A file has the architecture `controlvector`, the keys `controlvector.model_hint` and `controlvector.layer_count`, and one fp32 vector
`direction.<n>` for each layer. Both programs add direction.n to what block n, counted from 0, puts out: `layers.<n>.output`. llama.cpp has
no place for block 0 and refuses a file with `direction.0` (`common_control_vector_load`, `llama_adapter_cvec`); repeng takes it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from steer.checks import of_type
from steer.errors import ConfigError, DeployError, WidthError
from steer.files import atomic_write, place_of, storage_errors, temporary_sibling
from steer.intervene.affine import Affine
from steer.intervene.deploy.constant import cannot_carry, constant_edits
from steer.intervene.expansion import expanded
from steer.intervene.intervention import Intervention
from steer.intervene.plan import Plan
from steer.model.sites import Sites
from steer.tensor_files import gguf_package

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
        WidthError: a vector that does not fit the model.

    Example:
        >>> steer.to_gguf(plan, "happy.gguf", model_hint=model.config.model_type)
    """
    as_written = constant_edits(plan, _CARRIER, None, phases=("generate",))
    known = plan.fingerprint or {}
    n_layers = known.get("n_layers")
    edits = [(placed, edit) for intervention, edit in as_written for placed in _at_single_sites(intervention, n_layers)]
    hint = model_hint or known.get("model_type")
    if hint is None:
        raise _no_model_hint()
    of_type(hint, str, "`model_hint`", "pass the architecture as text, e.g. model.config.model_type")
    width = known.get("width", edits[0][0].operator.width)
    layers: dict[int, Tensor] = {}
    for intervention, edit in edits:
        layer = _block_number(intervention, edit, n_layers)
        if intervention.operator.width != width:
            raise _other_width(intervention, width)
        layers[layer] = layers.get(layer, torch.zeros_like(edit.shift)) + edit.shift  # [width]
    return _write(place_of(path), hint, layers)


def _at_single_sites(intervention: Intervention, n_layers: int | None) -> list[Intervention]:
    """The intervention at each of its sites. Raises DeployError for a pattern where the depth of the model is not known."""
    if n_layers is None:
        if isinstance(intervention.site, Sites) and intervention.site.has_pattern:
            raise _unknown_depth(intervention)
        n_layers = 0  # nobody asks
    depth = n_layers
    [placed] = expanded([intervention], lambda sites: sites.in_layers(depth))
    return placed


def _block_number(intervention: Intervention, edit: Affine, n_layers: int | None) -> int:
    """The block to whose output an edit adds. Raises DeployError for anything else than an addition there, and for block 0."""
    site = intervention.single_site
    if edit.rank or site.part not in ("input", "output") or site.layer is None:
        raise _no_addition_to_stream(intervention)
    layer = site.layer
    if layer < 0:
        if n_layers is None:
            raise _unknown_depth(intervention)
        layer += n_layers
    if site.part == "input":
        layer -= 1  # the same tensor as the output of the block before
    if n_layers is not None and layer >= n_layers:
        raise _block_out_of_range(intervention, n_layers)
    if layer < 1:
        raise _block_zero(intervention)
    return layer


def _write(path: Path, hint: str, layers: dict[int, Tensor]) -> Path:
    gguf = gguf_package("cannot write a control vector")
    with storage_errors(path, sum(vector.numel() * 4 for vector in layers.values())):
        path.parent.mkdir(parents=True, exist_ok=True)
        # the writer wants a path of its own; beside the file, so that no other disk has to have room
        with temporary_sibling(path, is_folder=False) as written:
            writer = gguf.GGUFWriter(written, ARCHITECTURE)
            writer.add_string(f"{ARCHITECTURE}.model_hint", hint)
            writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(layers))
            for layer, vector in sorted(layers.items()):
                writer.add_tensor(f"direction.{layer}", vector.float().numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            return atomic_write(path, written.read_bytes())


# ---- errors


def _no_model_hint() -> ConfigError:
    return ConfigError(
        "a control vector names the architecture of its model",
        expected="model_hint, or a plan with a fingerprint",
        found="neither",
        remedy="pass model_hint=model.config.model_type",
    )


def _other_width(intervention: Intervention, width: int) -> WidthError:
    return WidthError(
        f"'{intervention.name}' does not fit the model of a control vector",
        expected=f"{width} numbers at every layer",
        found=intervention.operator.width,
        remedy="export a plan for one model",
    )


def _no_addition_to_stream(intervention: Intervention) -> DeployError:
    found = f"'{intervention.operator.name}' at '{intervention.site}'"
    return cannot_carry(intervention, _CARRIER, "an addition at layers.<n>.output", found, "use steer.to_adapter")


def _unknown_depth(intervention: Intervention) -> DeployError:
    expected = "a layer counted from 0, or a plan with a fingerprint"
    return cannot_carry(
        intervention,
        _CARRIER,
        expected,
        f"'{intervention.site}' of a model of unknown depth",
        "count the layer from 0, or take plan.expanded(model)",
    )


def _block_out_of_range(intervention: Intervention, n_layers: int) -> DeployError:
    return cannot_carry(intervention, _CARRIER, f"a block from 1 to {n_layers - 1}", f"'{intervention.site}'", "steer an earlier block")


def _block_zero(intervention: Intervention) -> DeployError:
    expected = "the output of block 1 or a later one: llama.cpp has no control vector for block 0"
    return cannot_carry(intervention, _CARRIER, expected, f"'{intervention.site}'", "steer a later block")
