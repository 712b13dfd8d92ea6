"""The store of values: what an edit has to write is found once for a fact, whatever editor asks, and never used on other weights."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from steer.edits.value_settings import Value
from steer.errors import DamagedFileError
from steer.files import load_artifact, save_artifact
from steer.model.fingerprint import bits_digest
from steer.reading import check_kinds, damage_of, place_of

log = logging.getLogger(__name__)

KIND = "values of edits"
_TENSORS = ("delta", "written")
_NUMBERS = ("mlp_norm", "block_norm", "loss", "probability", "steps", "stopped", "seconds")


def weights_digest(model: nn.Module) -> str:
    """Digest of every parameter and buffer, read where they lie, and of what PEFT has switched on."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        bits = None if tensor.is_meta else bits_digest(tensor)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {bits}\n".encode())
    for path, module in model.named_modules():
        if isinstance(getattr(type(module), "disable_adapters", None), property):  # a layer of PEFT's
            state: Any = module
            digest.update(f"{path} {state.disable_adapters} {state.active_adapters} {getattr(state, 'scaling', None)}\n".encode())
    return digest.hexdigest()


class ValueStore:
    """Keeps values by weights, fact, layer, contexts and settings: in memory, and in a folder where one is named.

    Hand one store to several calls of `edit_facts` to compare editors: the optimisation, the larger part of an edit, runs once. With a
    folder it runs once for a program that is killed and started again, too; the values of a batch of facts are one file, written whole.

    Args:
        folder: of the files; what is there already is read, and a damaged file is left alone with a warning in the log.

    Example:
        >>> store = ValueStore()
        >>> how = {"layers": [8], "covariance": covariance, "contexts": contexts, "values": store}
        >>> for editor in ("rome", "memit"):  # the second takes the values that the first has solved
        ...     edit = steer.edit_facts(model, tokenizer, fact, editor=editor, **how)
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else place_of(folder)
        self._values: dict[str, Value] = {}
        self.found = 0  # how many values were not optimised again
        for file in [] if self.folder is None else sorted(self.folder.glob("*.safetensors")):
            try:
                self._values |= _read(file)
            except DamagedFileError as error:
                log.warning("values of edits are found again: %s", error)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Value | None:
        """The value under a key, None where there is none."""
        digest = _digest(key)
        value = self._values.get(digest)
        self.found += value is not None
        if value is not None and (spent := _SPENT.get()) is not None and digest not in spent.made:
            spent.seconds += value.seconds
            spent.made.add(digest)
        return value

    def put(self, values: Mapping[Hashable, Value]) -> None:
        """Keeps values under their keys. Raises StorageFullError."""
        new = {_digest(key): value for key, value in values.items()}
        self._values |= new
        if (spent := _SPENT.get()) is not None:
            spent.made |= new.keys()
        if self.folder is None or not new:
            return
        tensors = {f"{key}/{name}": getattr(value, name) for key, value in new.items() for name in _TENSORS}
        manifest = {key: {name: getattr(value, name) for name in _NUMBERS} for key, value in new.items()}
        save_artifact(self.folder / f"{_digest(tuple(new))}.safetensors", KIND, tensors, {"values": manifest})


@dataclass
class SpentBefore:
    """CPU seconds that values took which were found in a store instead of being made again.

    Attributes:
        made: what was put into stores meanwhile, whose time is no earlier one, and what was counted.
    """

    seconds: float = 0.0
    made: set[str] = field(default_factory=set)


_SPENT: ContextVar[SpentBefore | None] = ContextVar("_SPENT", default=None)


@contextmanager
def spent_before() -> Iterator[SpentBefore]:
    """Counts what values that are taken from stores within had cost, so that an edit is not called cheap because its value was there."""
    token = _SPENT.set(SpentBefore())
    try:
        yield _SPENT.get() or SpentBefore()
    finally:
        _SPENT.reset(token)


def _digest(key: Hashable) -> str:
    """Of a key of numbers and texts, whose repr says all of it."""
    return hashlib.sha256(repr(key).encode()).hexdigest()[:32]


def _read(file: Path) -> dict[str, Value]:
    manifest, tensors = load_artifact(file, KIND)
    with damage_of(file, "values of edits with their numbers"):
        check_kinds(manifest, {"values": dict})
        found: dict[str, Value] = {}
        for key, numbers in manifest["values"].items():
            parts: dict[str, Any] = {name: tensors[f"{key}/{name}"] for name in _TENSORS} | {name: numbers[name] for name in _NUMBERS}
            found[key] = Value(**parts)
        return found
