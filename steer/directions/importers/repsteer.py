"""The artifact folders of repsteer: manifest.json, tensors.safetensors and checksums.json."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steer.directions.direction import Directions
from steer.directions.importer import IMPORTERS, Importer, Source, gathered, incomplete, integer_of, mapping_of
from steer.errors import ConfigError, DamagedFileError, WrongKindError
from steer.model.site import Site
from steer.reading import read_bytes, read_json
from steer.tensor_files import read_safetensors

MANIFEST, TENSORS, CHECKSUMS = "manifest.json", "tensors.safetensors", "checksums.json"
_KINDS = {"direction": "direction", "probe": "weight", "sae_feature": "decoder_direction", "subspace": "basis"}  # -> its tensor
_COMPONENTS = {"resid_pre": "layers.{layer}.input", "resid_post": "layers.{layer}.output", "head_result": "layers.{layer}.attn.z"}
_SANDWICH = ("gemma2", "gemma3", "olmo2", "olmo3")  # their modules put out what a norm follows


@IMPORTERS.register("repsteer")
class Repsteer(Importer):
    """repsteer artifact folder (checked by its SHA-256): `resid_post` of layer L -> `layers.L.output`, `resid_pre` -> `.input`, likewise.

    `attn_out` and `mlp_out` are what the modules put out: `layers.L.attn.output` and `.mlp.output`, in families with norms after them
    (gemma2) `module:layers.L.self_attn:output`. `resid_mid` is what goes into the norm before the MLP. Directions, probes, SAE features and
    subspaces of one dimension are read.
    """

    looks_for = f"a folder with {MANIFEST}, {TENSORS} and {CHECKSUMS}"

    @staticmethod
    def recognises(source: Source) -> bool:
        return source.has(MANIFEST, TENSORS, CHECKSUMS)

    @staticmethod
    def read(source: Source) -> Directions:
        if not Repsteer.recognises(source):
            raise incomplete(source, Repsteer.looks_for, "not all of them")
        _check_hashes(source)
        manifest = mapping_of(source, read_json(source.path / MANIFEST), MANIFEST)
        tensors, _ = read_safetensors(source.path / TENSORS)
        kind = manifest.get("artifact_type")
        name = _KINDS.get(str(kind))
        vector = None if name is None else tensors.get(name)
        if vector is None or (vector.ndim > 1 and len(vector) > 1):
            raise _kind_error(source, kind, tensors)
        notes = {key: manifest[key] for key in ("model", "dataset_fingerprint", "normalization", "seed") if manifest.get(key) is not None}
        return gathered(source, {_site(source, manifest): vector.flatten()}, method=str(manifest.get("method") or "repsteer"), **notes)


def _check_hashes(source: Source) -> None:
    checksums = mapping_of(source, read_json(source.path / CHECKSUMS), CHECKSUMS)
    listed = mapping_of(source, checksums.get("files", {}), f"files in {CHECKSUMS}")
    for name in (MANIFEST, TENSORS):
        expected = str(listed.get(name)).removeprefix("sha256:")
        digest = hashlib.sha256(read_bytes(source.path / name)).hexdigest()
        if digest != expected:
            raise _altered_error(source, name, expected, digest)


def _site(source: Source, manifest: Mapping[str, Any]) -> Site:
    site = mapping_of(source, manifest.get("site") or {}, f"site in {MANIFEST}")
    model = mapping_of(source, manifest.get("model") or {}, f"model in {MANIFEST}")
    architecture = str(model.get("architecture") or "").lower()
    component = str(site.get("component"))
    layer = site.get("layer")
    if site.get("unit") is not None or site.get("stream", "language") != "language":
        raise _unit_error(source, site)
    if component == "logits":
        return Site("logits")
    pattern = _COMPONENTS.get(component)
    if pattern is None and component in ("attn_out", "mlp_out") and architecture:
        module, part = ("self_attn", "attn") if component == "attn_out" else ("mlp", "mlp")
        after = any(family in architecture for family in _SANDWICH)
        pattern = f"module:layers.{{layer}}.{module}:output" if after else f"layers.{{layer}}.{part}.output"
    if pattern is None and component == "resid_mid" and architecture:
        norm = "pre_feedforward_layernorm" if "gemma2" in architecture else "post_attention_layernorm"
        pattern = f"module:layers.{{layer}}.{norm}:input"
    if pattern is None or layer is None:
        pattern = source.asked_site(f"component {component!r} of architecture {architecture!r}", "layers.{layer}.output")
    return source.place(0 if layer is None else integer_of(source, layer, "layer"), pattern)


def _kind_error(source: Source, kind: object, tensors: Mapping[str, Tensor]) -> WrongKindError:
    return WrongKindError(
        f"'{source.path}' is not one direction",
        expected=f"one of {', '.join(_KINDS)} with a vector",
        found=f"'{kind}' with {', '.join(f'{name} {list(tensor.shape)}' for name, tensor in tensors.items())}",
        remedy="make an operator of its tensors, e.g. steer.Ablate(basis)",
    )


def _altered_error(source: Source, name: str, expected: str, digest: str) -> DamagedFileError:
    return DamagedFileError(
        f"{name} of '{source.path}' was altered",
        expected=f"sha256 {expected}",
        found=f"sha256 {digest}",
        remedy="get it again from where it came",
    )


def _unit_error(source: Source, site: Mapping[str, Any]) -> ConfigError:
    return ConfigError(
        f"'{source.path}' belongs to a part of an activation, or to another stream",
        expected="a site of the language model, without a unit",
        found=site,
        remedy="make a steer.Direction of its vector at a site of your choice",
    )
