"""Loads a causal language model and its tokenizer by name or path."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from steer.checks import of_type
from steer.errors import ConfigError, DamagedFileError, ModelNotFoundError, SteerError, TokenizerError, UnsafeFileError
from steer.files import contents
from steer.model import embedded, tied
from steer.model.gguf import read_gguf
from steer.reading import place_of, read_json

_EXPECTED = f"'{embedded.NAME}', a hub id, a model folder, a .gguf file or a PEFT adapter folder"
_TOKENIZERS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # of the models that `load` made
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load(
    name_or_path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", untie: bool = False
) -> tuple[Any, Any]:
    """Returns (model in eval mode, tokenizer).

    Args:
        name_or_path: `smollm2-135m` (the embedded model); a `.gguf` file; a folder with a PEFT adapter, which is loaded on the base that
            it names; a folder in the Hugging Face layout; otherwise a hub id. A path wins over a hub id, the embedded name over both.
        dtype: of the weights.
        device: where the model is moved after loading.
        untie: give a head that is tied to the embedding a copy of its own, so that the two can change apart.

    Raises:
        ModelNotFoundError: the name or path leads nowhere.
        UnsafeFileError: the weights are there only as a pickle.
        DamagedFileError: a file is truncated or altered.
        TokenizerError: the folder holds a model but no tokenizer.
        ConfigError: no name or path, or a device that is not there.

    Example:
        >>> model, tokenizer = steer.load("smollm2-135m")
        >>> model.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=8)
    """
    of_type(name_or_path, (str, Path), "the model", f"give a name or a path, such as '{embedded.NAME}'")
    _check_device(device)
    name = str(name_or_path)
    path = place_of(name)
    _check_name(name)
    if name == embedded.NAME:
        model, tokenizer = _from_transformers(str(embedded.converted_folder()), name, dtype)
    elif path.suffix == ".gguf":
        model, tokenizer = read_gguf(path, dtype)
    elif (path / "adapter_config.json").is_file():
        return _with_adapter(path, dtype, device, untie)
    elif path.is_dir():
        _check_folder(path)
        model, tokenizer = _from_transformers(str(path), name, dtype)
    elif path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise _no_model_at(name, "a file that is not GGUF" if path.exists() else "nothing there")
    else:
        model, tokenizer = _from_transformers(name, name, dtype)
    if untie:
        tied.untie(model)
    # An adapter saved from this model records where its base came from: by the name asked for, not by a path of this machine's cache.
    model.name_or_path = tokenizer.name_or_path = name
    # What loads "the same model again", as TRL does for a reference model, asks the configuration, and transformers knows no name of ours.
    model.config._name_or_path = _for_transformers(name, path)
    model = model.to(device).eval()
    _TOKENIZERS[model] = tokenizer
    return model, tokenizer


def depth_of(name_or_path: str | Path) -> int | None:
    """Number of blocks of a model by its configuration, read before its weights are; None where no folder says it, or it is unclear."""
    name = str(name_or_path)
    folder = embedded.converted_folder() if name == embedded.NAME else place_of(name)
    if not (folder / "config.json").is_file():
        return None
    with suppress(OSError, ValueError, KeyError):  # `load` says what is wrong with it
        depth = getattr(AutoConfig.from_pretrained(str(folder)).get_text_config(), "num_hidden_layers", None)
        return depth if isinstance(depth, int) else None
    return None


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer that `load` gave with a model, or with the one inside it. Raises ConfigError where `load` did not make it."""
    for module in model.modules():  # a wrapper comes before what it wraps
        if module in _TOKENIZERS:
            return _TOKENIZERS[module]
    raise _no_tokenizer_known(model)


def _for_transformers(name: str, path: Path) -> str:
    """What `from_pretrained` of transformers takes for this model: an absolute path, or a hub id. It reads no GGUF by its path alone."""
    if name == embedded.NAME:
        return str(embedded.converted_folder().absolute())
    return os.path.abspath(path) if path.exists() else name


def _check_name(name: str) -> None:
    """Raises ModelNotFoundError for no name, and for a misspelt one of the embedded model, before the hub is asked for that."""
    if not name.strip():
        raise _no_name(name)
    if name == embedded.NAME or "/" in name or Path(name).expanduser().exists():
        return
    if difflib.get_close_matches(name.lower(), [embedded.NAME], cutoff=0.8):
        raise ModelNotFoundError(f"no model '{name}'", expected=_EXPECTED, found=name, remedy=f"did you mean '{embedded.NAME}'?")


def _check_device(device: str | torch.device) -> None:
    """Raises ConfigError for a device that is not there, before the model is read, which can take minutes."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # a torch that was built without CUDA fails by an assertion
        raise _no_device(device, error) from error


def _from_transformers(source: str, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    is_local = Path(source).is_dir()
    try:
        with _quiet(is_local):
            found = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(source)
    except SafetensorError as error:
        raise _damaged_weights(f"'{name}'", error) from error
    except Exception as error:  # what a damaged config or tokenizer makes transformers stumble over is of any class
        if is_local and not isinstance(error, SteerError | MemoryError | torch.OutOfMemoryError):
            raise _unloadable(name, error) from error
        if not isinstance(error, OSError | ValueError):
            raise
        if "use_safetensors=True" in str(error):  # transformers' advice where a repository has only pickles
            raise _unsafe(name, "a repository without safetensors") from error
        raise _not_on_the_hub(name, error) from error
    model, loading = found
    if loading["missing_keys"]:  # transformers makes these up, with a warning
        raise _missing_weights(name, sorted(loading["missing_keys"]))
    return model, tokenizer


def _with_adapter(path: Path, dtype: torch.dtype, device: str | torch.device, untie: bool) -> tuple[Any, Any]:
    from peft import PeftModel  # takes a second to import, and most loads do not need it

    base_name = _base_of(path)
    if not (path / "adapter_model.safetensors").is_file():
        raise _unsafe(str(path), contents(path)) if any(path.glob("*.bin")) else _no_adapter_weights(path)
    base, tokenizer = load(base_name, dtype=dtype, device=device, untie=untie)
    try:
        model = PeftModel.from_pretrained(base, path)
    except SafetensorError as error:
        raise _damaged_weights(str(path), error) from error
    except (ValueError, TypeError, RuntimeError) as error:
        raise _adapter_does_not_fit(path, base_name, error) from error
    return model.to(device).eval(), AutoTokenizer.from_pretrained(path) if _has_tokenizer(path) else tokenizer


def _base_of(adapter: Path) -> str:
    """Name or path of the model that an adapter belongs to."""
    try:
        base_name = read_json(adapter / "adapter_config.json")["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise _broken_adapter_config(adapter, error) from error
    if not base_name:
        raise _no_base(adapter, base_name)
    return base_name


def _check_folder(path: Path) -> None:
    """Raises ModelNotFoundError, UnsafeFileError or TokenizerError for a folder that lacks a part of a model."""
    if not (path / "config.json").is_file():
        raise _no_model_in(path)
    if not any(path.glob("*.safetensors")):
        if any(file for pattern in _PICKLES for file in path.glob(pattern)):
            raise _unsafe(str(path), contents(path))
        raise _no_weights_in(path)
    if not _has_tokenizer(path):
        raise _no_tokenizer_in(path)


def _has_tokenizer(path: Path) -> bool:
    # transformers would make an empty tokenizer where these are missing
    return any((path / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"))


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """No progress bar for a load that takes a fraction of a second."""
    if not (quiet and transformers_logging.is_progress_bar_enabled()):
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


# ---- errors


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _no_name(name: str) -> ModelNotFoundError:
    return ModelNotFoundError("no model is named", expected=_EXPECTED, found=repr(name), remedy=f"give a name, such as '{embedded.NAME}'")


def _no_model_at(path: str, found: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"no model at {path}", expected=_EXPECTED, found=found, remedy="check the path")


def _no_model_in(path: Path) -> ModelNotFoundError:
    expected = "config.json and *.safetensors, or adapter_config.json"
    remedy = "give the folder that save_pretrained wrote"
    return ModelNotFoundError(f"no model in {path}", expected=expected, found=contents(path), remedy=remedy)


def _no_weights_in(path: Path) -> ModelNotFoundError:
    remedy = "copy the weights there, or save the model again with save_pretrained"
    return ModelNotFoundError(f"no weights in {path}", expected="*.safetensors", found=contents(path), remedy=remedy)


def _no_tokenizer_in(path: Path) -> TokenizerError:
    remedy = f"tokenizer.save_pretrained('{path}')"
    return TokenizerError(f"no tokenizer in {path}", expected="tokenizer.json", found=contents(path), remedy=remedy)


def _not_on_the_hub(name: str, error: Exception) -> ModelNotFoundError:
    remedy = f"check the spelling and the network, or use '{embedded.NAME}', which needs none"
    return ModelNotFoundError(f"no model '{name}'", expected=_EXPECTED, found=_brief(error), remedy=remedy)


def _no_tokenizer_known(model: nn.Module) -> ConfigError:
    return ConfigError(
        "the tokenizer of this model is not known",
        expected="tokenizer=..., or a model of steer.load",
        found=f"a {type(model).__name__} that was made elsewhere",
        remedy="pass tokenizer=AutoTokenizer.from_pretrained(...)",
    )


def _no_device(device: str | torch.device, error: Exception) -> ConfigError:
    found = f"torch {torch.__version__} with {torch.cuda.device_count()} CUDA devices: {_brief(error)}"
    remedy = "pass one that this machine has, e.g. device='cpu'"
    return ConfigError(f"no device {device!r}", expected="a device of torch", found=found, remedy=remedy)


def _unloadable(name: str, error: Exception) -> DamagedFileError:
    expected = "a folder as save_pretrained writes it, of an architecture that transformers knows"
    remedy = "copy or save it again, or upgrade transformers if the model is newer"
    return DamagedFileError(f"cannot load the model in {name}", expected=expected, found=_brief(error), remedy=remedy)


def _damaged_weights(name: str, error: Exception) -> DamagedFileError:
    what = f"the weights of {name} are truncated or altered"
    return DamagedFileError(what, expected="whole safetensors files", found=str(error), remedy="download or copy them again")


def _missing_weights(name: str, missing: list[str]) -> DamagedFileError:
    return DamagedFileError(
        f"the file of '{name}' lacks weights, which would be random numbers",
        expected="every weight that the configuration asks for",
        found=f"{len(missing)} missing, e.g. {missing[0]}",
        remedy="if that is the head of a tied model, set tie_word_embeddings to true in config.json; else copy or save the model again",
    )


def _unsafe(name: str, found: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"the weights of '{name}' are a pickle, which can run any code when it is opened",
        expected="*.safetensors",
        found=found,
        remedy="convert it where you trust it: load it with transformers, then save_pretrained, which writes safetensors",
    )


def _broken_adapter_config(adapter: Path, error: Exception) -> DamagedFileError:
    expected = "JSON with the key base_model_name_or_path"
    remedy = "correct the file, or save the adapter again with save_pretrained"
    return DamagedFileError(f"the adapter_config.json of {adapter} is broken", expected=expected, found=_brief(error), remedy=remedy)


def _no_base(adapter: Path, base_name: object) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"the adapter in {adapter} does not say which base it belongs to",
        expected="a name or path as base_model_name_or_path in adapter_config.json",
        found=repr(base_name),
        remedy="write the base that it was trained on there",
    )


def _no_adapter_weights(adapter: Path) -> DamagedFileError:
    return DamagedFileError(
        f"{adapter} lacks adapter_model.safetensors",
        expected="adapter_config.json and adapter_model.safetensors",
        found=contents(adapter),
        remedy="copy it there, or save the adapter again with save_pretrained",
    )


def _adapter_does_not_fit(adapter: Path, base_name: str, error: Exception) -> DamagedFileError:
    return DamagedFileError(
        f"the adapter in {adapter} does not fit '{base_name}'",
        expected="an adapter that was trained on this model",
        found=_brief(error),
        remedy="correct base_model_name_or_path in its adapter_config.json",
    )
