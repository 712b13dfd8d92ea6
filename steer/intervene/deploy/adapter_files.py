"""Files of a PEFT LoRA adapter: a folder never holds half of one and half of another; those in which B A is all there is can be read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from steer.errors import ConfigError, ModelNotFoundError
from steer.files import atomic_write, place_of, storage_errors, sync_folder
from steer.files import contents as what_is_in
from steer.reading import parse_json, read_json
from steer.tensor_files import read_safetensors

WEIGHTS = "adapter_model.safetensors"  # PEFT's names
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # before the path of every module
_FACTS = "steer_adapter"  # in the metadata of the tensors
# values of an adapter's configuration with which it adds B A to weights and does nothing else; the first is the default
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # the others also change the base
}
_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


def write_adapter(
    path: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], facts: Mapping[str, Any] | None = None
) -> Path:
    """Writes an adapter, or leaves the one that is there.

    Weights of one adapter beside the configuration of another load without an error. So the configuration goes first and comes last: where
    the process is killed in between, there is none, PEFT refuses the folder, and the next call puts back what was there.

    Args:
        path: of a folder; other files in it stay.
        tensors: by PEFT's names, of any device and layout.
        config: PEFT's configuration as `adapter_config` gives it.
        facts: anything of steer's own, JSON-able, which PEFT does not read; it is kept in the file of the tensors, see `read_adapter`.

    Raises:
        StorageFullError: no room; an adapter that was there is untouched.
    """
    folder = place_of(path)
    metadata = {"format": "pt", **({} if facts is None else {_FACTS: json.dumps(facts)})}
    weights = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    contents: dict[str, bytes | str] = {WEIGHTS: weights, CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n"}
    new = {name: folder / f".{name}.new" for name in contents}
    old = {name: folder / f".{name}.old" for name in contents}
    with storage_errors(folder, sum(map(len, contents.values()))):
        if not (folder / CONFIG).exists():
            _put_back(folder, old)
        try:
            for name, content in contents.items():
                atomic_write(new[name], content)
            _swap(folder, new, old)
            sync_folder(folder)
        finally:
            for file in (*new.values(), *old.values()):
                file.unlink(missing_ok=True)
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


def adapter_config(
    base: Any, targets: Sequence[str], rank: int, *, conv1d: bool, with_biases: bool = False, saved_complete: Sequence[str] = ()
) -> dict[str, Any]:
    """PEFT's configuration of a LoRA adapter with a scale of 1, as JSON has it.

    Args:
        base: the transformers model that it is for. targets: paths of its modules.
        conv1d: they hold their weights transposed.
        with_biases: B has a bias in each. saved_complete: modules that are in the adapter as a whole.
    """
    from peft import LoraConfig  # takes seconds to import

    config = LoraConfig(
        # the class that PEFT has for this task gives token ids to the encoder, which may take sound
        task_type="CAUSAL_LM" if base.get_output_embeddings() is not None and not base.config.is_encoder_decoder else None,
        base_model_name_or_path=getattr(base, "name_or_path", None) or base.config.name_or_path or None,
        r=rank,
        lora_alpha=rank,  # a scale of 1
        target_modules=list(targets),
        modules_to_save=list(saved_complete) or None,
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


# ---- reading


def check_is_adapter(path: str | Path) -> Path:
    """The folder of an adapter. Raises ModelNotFoundError where it lacks one of its two files."""
    folder = place_of(path)
    if not all((folder / file).is_file() for file in (CONFIG, WEIGHTS)):
        raise _no_adapter(folder)
    return folder


def read_adapter(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any] | None]:
    """The configuration and the tensors of an adapter, by PEFT's names, and what steer kept beside them; None where that is nothing.

    Raises:
        ModelNotFoundError: no adapter. DamagedFileError, and the other kinds of FileError.
    """
    folder = check_is_adapter(path)
    tensors, metadata = read_safetensors(folder / WEIGHTS)
    kept = metadata.get(_FACTS)
    return read_json(folder / CONFIG), tensors, None if kept is None else parse_json(kept, f"what steer kept in {folder / WEIGHTS}")


def check_adds_only(path: str | Path, config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises ConfigError for an adapter that changes a model in other ways than by adding B A to weights. names: of its tensors."""
    others = [f"{key}={config[key]}" for key, plain in _PLAIN.items() if config.get(key, plain[0]) not in plain]
    others += [name for name in names if not name.endswith(_FACTORS)]
    if others:
        raise _no_lora(path, others)


# ---- errors


def _no_adapter(folder: Path) -> ModelNotFoundError:
    expected = "a folder with adapter_config.json and adapter_model.safetensors, as save_pretrained of PEFT writes it"
    return ModelNotFoundError(f"no adapter in {folder}", expected=expected, found=what_is_in(folder), remedy="check the path")


def _no_lora(path: str | Path, found: list[str]) -> ConfigError:
    return ConfigError(
        f"the adapter in {path} is not one whose weight changes can be read",
        expected="LoRA that adds B A to weights, and nothing else",
        found=", ".join(found[:3]),
        remedy="use a LoRA adapter, or merge it and compare the two models",
    )
