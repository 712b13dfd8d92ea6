"""Reads a GGUF file as a plain model: every weight unpacked, and no mark of quantisation left that would forbid saving or training it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from steer.errors import DamagedFileError, ModelNotFoundError
from steer.reading import read_bytes
from steer.tensor_files import open_gguf


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The causal language model and the tokenizer in one GGUF file. Slow: seconds of Python per 100 MB.

    Raises:
        ModelNotFoundError: no such file, or the `gguf` package is missing.
        DamagedFileError: not a GGUF file, truncated, or of an architecture that transformers cannot read.
    """
    if not path.is_file():
        raise _no_file(path)
    if importlib.util.find_spec("gguf") is None:
        raise _no_package(path)
    magic = read_bytes(path, 4)
    if magic != b"GGUF":
        raise _no_gguf(path, magic)
    open_gguf(path)  # transformers would go on counting beyond the end of a file that is cut short
    # Newer transformers keep the blocks packed where a GPU kernel can read them; hooks, edits and training need dense weights.
    dense = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    try:
        marked = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **dense)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except MemoryError:
        raise  # the machine's, since the file holds what it declares
    except Exception as error:  # of any class: it depends on where the damage is
        raise _unreadable(path, error) from error
    return _unmarked(marked), tokenizer


def _unmarked(marked: Any) -> Any:
    """A new model around the same tensors: transformers refuses `save_pretrained` on one that it has read from GGUF."""
    config = marked.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(marked)(config)
    model.load_state_dict(marked.state_dict(), assign=True)
    model.tie_weights()
    # rotary frequencies and their like are in no state_dict, and still on the meta device
    for name, buffer in marked.named_buffers():
        owner, _, buffer_name = name.rpartition(".")
        model.get_submodule(owner)._buffers[buffer_name] = buffer
    model.generation_config = marked.generation_config
    return model.eval()


# ---- errors


def _no_file(path: Path) -> ModelNotFoundError:
    found = "a folder" if path.is_dir() else "nothing there"
    return ModelNotFoundError(f"no file {path}", expected="a GGUF file", found=found, remedy="check the path")


def _no_package(path: Path) -> ModelNotFoundError:
    remedy = "pip install 'torchsteer[gguf]'"
    return ModelNotFoundError(f"cannot read {path}", expected="the package gguf", found="not installed", remedy=remedy)


def _no_gguf(path: Path, magic: bytes) -> DamagedFileError:
    remedy = "download it again: a git-lfs pointer or an error page may lie in its place"
    return DamagedFileError(f"{path} is not a GGUF file", expected=f"first bytes {b'GGUF'!r}", found=magic, remedy=remedy)


def _unreadable(path: Path, error: Exception) -> DamagedFileError:
    expected = "a whole GGUF file of an architecture that transformers reads"
    remedy = "download it again if it is cut short, or upgrade transformers if the model is newer"
    return DamagedFileError(f"cannot read {path}", expected=expected, found=f"{type(error).__name__}: {error}", remedy=remedy)
