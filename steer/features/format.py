"""Formats of dictionaries: what each one has to say, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from steer.checks import errors_of
from steer.errors import ConfigError, DamagedFileError, SteerError, WrongKindError, in_file
from steer.features.dictionary import Dictionary
from steer.features.provenance import Origin, Source, Untrained
from steer.features.rows import InFile, InMemory, Rows
from steer.features.wanted import Wanted, sites_of
from steer.place import Place
from steer.registry import Registry
from steer.tensor_files import open_safetensors


class Format:
    """One format. A subclass is one file with one registration, whose docstring's first line says what it reads and what is applied.

    Attributes:
        looks_for: what it recognises, for the error that lists all of them.
        writes: it can be written too, by `write`.
    """

    name: ClassVar[str]
    looks_for: ClassVar[str]
    writes: ClassVar[bool] = False

    @staticmethod
    def recognises(place: Place) -> bool:
        """By the files and their content, of which no weights are fetched. Must not raise for a place of another format."""
        raise NotImplementedError

    @staticmethod
    def read(place: Place, wanted: Wanted) -> Dictionary:
        """Raises the errors of `load_dictionary`."""
        raise NotImplementedError

    @staticmethod
    def write(dictionary: Dictionary, path: str | Path, dtype: str) -> Path:
        """Where `writes` is True. Raises ConfigError for a dictionary that it cannot hold."""
        raise NotImplementedError


FORMATS: Registry[type[Format]] = Registry("dictionary format", "steer.features.formats", "steer.dictionary_formats", subclass_of=Format)


def choose(place: Place, name: str | None) -> type[Format]:
    """The format of that name, or the one that recognises the files.

    Raises:
        ConfigError: an unknown name, or files that fit several. WrongKindError: files that fit none, or not the one asked for.
    """
    if name is not None:
        chosen = FORMATS.get(name)
        if not _recognises(chosen, place):
            raise _other_format(place, name, chosen)
        return chosen
    fitting = [name for name in FORMATS if _recognises(FORMATS.get(name), place)]
    if len(fitting) != 1:
        raise _several(place, fitting) if fitting else _none(place)
    return FORMATS.get(fitting[0])


def writer_of(name: str) -> Callable[[Dictionary, str | Path, str], Path]:
    """The writer of a format. Raises ConfigError for one that is only read."""
    chosen = FORMATS.get(name)
    if not chosen.writes:
        raise _only_read(name)
    return chosen.write


def _recognises(chosen: type[Format], place: Place) -> bool:
    with errors_of(f"the dictionary format '{chosen.name}'", "let its `recognises` return False for files of other formats"):
        return bool(chosen.recognises(place))


class Tensors:
    """The tensors of one file, or of several, of which the large ones stay there until they are needed.

    Attributes:
        paths: files that they came from.
    """

    def __init__(self, place: Place, held: Mapping[str, Tensor], files: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]],
                 dtypes: Mapping[str, Any], paths: Iterable[Path]) -> None:  # fmt: skip
        self.place = place
        self._held, self._files, self.shapes, self._dtypes = dict(held), dict(files), dict(shapes), dict(dtypes)
        self.paths = tuple(paths)
        self.taken: set[str] = set()

    @classmethod
    def of_safetensors(cls, place: Place, *names: str) -> Tensors:
        """Reads the headers. Raises DamagedFileError, UnsafeFileError, WrongKindError."""
        files, shapes, dtypes, paths = {}, {}, {}, []
        for name in names:
            path = place.path(name)
            paths.append(path)
            with open_safetensors(path) as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    if key in files:
                        raise _twice(place, key)
                    shapes[key] = tuple(file.get_slice(key).get_shape())
                    dtypes[key] = file.get_tensor(key).dtype  # mapped, not read
                    files[key] = path
        return cls(place, {}, files, shapes, dtypes, paths)

    @classmethod
    def in_memory(cls, place: Place, content: Any, path: Path) -> Tensors:
        """What a file of torch.save or numpy held. Raises DamagedFileError for what is no mapping."""
        if not isinstance(content, Mapping):
            raise incomplete(place, "tensors by name", type(content).__name__)
        held = {str(key).removeprefix("_orig_mod."): value for key, value in content.items() if isinstance(value, Tensor)}
        return cls(place, held, {}, {key: tuple(value.shape) for key, value in held.items()}, {}, [path])

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def get(self, key: str, *shape: int | None) -> Tensor:
        """One tensor, in memory.

        Args:
            shape: what it has to have, None for any size on an axis; any shape when empty.

        Raises:
            DamagedFileError: there is none, or it has another shape; with the file, the key and both shapes. NonFiniteError.
        """
        self._check(key, shape)
        tensor = self._read(key)
        InMemory(tensor.reshape(1) if tensor.dim() == 0 else tensor, f"'{key}' of '{self.place.name}'")  # finite
        return tensor

    def optional(self, key: str, *shape: int | None) -> Tensor | None:
        """As `get`; None where there is none."""
        return self.get(key, *shape) if key in self else None

    def whole_numbers(self, key: str) -> list[int]:
        """Sizes and counts. Raises DamagedFileError for anything else."""
        self._check_there(key)
        listed = self._read(key).flatten().tolist()
        if any(isinstance(number, complex) or number != int(number) for number in listed):
            raise incomplete(self.place, f"whole numbers in '{key}'", listed[:8])
        return [int(number) for number in listed]

    def rows(self, key: str, *shape: int | None, axis: int = 0) -> Rows:
        """One tensor as rows of features, which are counted along `axis`; left in the file where it is one of safetensors."""
        self._check(key, shape)
        if key in self._held:
            return InMemory(self._held[key].movedim(axis, 0), f"'{key}' of '{self.place.name}'")
        return InFile(self._files[key], key, self.shapes[key], self._dtypes[key], axis)

    def check_all_taken(self, *known: str) -> None:
        """Raises DamagedFileError for tensors that nothing was made of; known: patterns of those that say nothing about the features."""
        left = [key for key in self.shapes if key not in self.taken and not any(key.startswith(name) for name in known)]
        if left:
            raise _unknown_tensors(self.place, left, self.taken)

    def _read(self, key: str) -> Tensor:
        if key in self._held:
            return self._held[key]
        with open_safetensors(self._files[key]) as file:
            return file.get_tensor(key)

    def _check_there(self, key: str) -> None:
        if key not in self.shapes:
            raise incomplete(self.place, f"the tensor '{key}'", f"{', '.join(sorted(self.shapes)) or 'no tensors'}")
        self.taken.add(key)

    def _check(self, key: str, shape: tuple[int | None, ...]) -> None:
        self._check_there(key)
        dtype = self._held[key].dtype if key in self._held else self._dtypes[key]
        if not dtype.is_floating_point:
            raise _wrong_dtype(self.place, key, dtype)
        found = self.shapes[key]
        if shape and (len(found) != len(shape) or any(size not in (None, is_there) for size, is_there in zip(shape, found, strict=True))):
            raise _wrong_shape(self.place, key, shape, found)


def origin_of(
    format: str,
    place: Place,
    wanted: Wanted,
    *,
    reads: str | list[str] | None,
    writes: str | list[str] | None = None,
    is_transcoder: bool = False,
    hooks: Iterable[str] = (),
    paths: Iterable[Path] = (),
    model: str | None = None,
    first: int = 0,
    max_norm: float | None = None,
    notes: dict[str, Any] | None = None,
) -> Origin:
    """Where a dictionary belongs; what the caller says goes before what the file says.

    Args:
        reads, writes: sites as the file says; None for a hook that does not say which tensor of a plain model is meant.
        is_transcoder: it writes other sites than it reads.

    Raises:
        ConfigError: neither says it. SiteError.
    """
    hooks = tuple(hooks)
    chosen_reads = sites_of(reads if wanted.reads is None else wanted.reads, wanted)
    if chosen_reads is None:
        raise _no_site(place, hooks, "reads")
    chosen_writes = sites_of(writes if wanted.writes is None else wanted.writes, wanted) if is_transcoder else chosen_reads
    if chosen_writes is None:
        raise _no_site(place, hooks, "writes")
    source = Source(format, place.name, place.revision, tuple(paths), model, hooks, (), dict(notes or {}))
    untrained = Untrained(first, max_norm) if wanted.untrained is None else wanted.untrained
    return Origin(chosen_reads, chosen_writes, source, untrained, wanted.models)


D = TypeVar("D", bound=Dictionary)


def noted(dictionary: D, *folded: str) -> D:
    """Notes what was folded into the matrices."""
    source = replace(dictionary.origin.source, folded=(*dictionary.origin.source.folded, *folded))
    dictionary.origin = replace(dictionary.origin, source=source)
    return dictionary


def number_in(place: Place, settings: Mapping[str, Any], key: str, *, least: int = 1) -> int:
    """A whole number of a configuration. Raises DamagedFileError."""
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < least:
        raise incomplete(place, f"'{key}', a whole number, {least} or more", repr(value))
    return int(value)


@contextmanager
def damage_in(place: Place, format: type[Format]) -> Iterator[None]:
    """Raises DamagedFileError for what a format of ours stumbles over; typed errors get the name of the place where they lack it."""
    try:
        yield
    except SteerError as error:
        if place.name in str(error):
            raise
        raise in_file(error, place.name) from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise incomplete(place, f"what belongs into files of '{format.name}'", f"{type(error).__name__}: {error}") from error


def k_in(place: Place, settings: Mapping[str, Any], width: int, key: str = "k") -> int:
    """Features per token of a top-k dictionary. Raises DamagedFileError for more than it has."""
    k = number_in(place, settings, key)
    if k > width:
        raise incomplete(place, f"'{key}', {width} or less, as many features as there are", k)
    return k


def incomplete(place: Place, expected: str, found: object) -> DamagedFileError:
    """The error of files that lack a part, or have another one than they say."""
    what = f"the dictionary '{place.name}' lacks a part, or holds a wrong one"
    return DamagedFileError(what, expected=expected, found=str(found)[:300], remedy="get it again from where it came")


def unsupported(place: Place, what: str, expected: str, found: object) -> WrongKindError:
    """The error of a whole file of which nothing here is equal."""
    remedy = "load another one, or convert it with the program that trained it"
    return WrongKindError(f"'{place.name}': {what}", expected=expected, found=str(found)[:300], remedy=remedy)


def needs(place: Place, argument: str, why: str, example: str) -> ConfigError:
    """The error of a file that does not say what is needed."""
    what = f"'{place.name}' does not say what it takes to use it"
    return ConfigError(what, expected=f"{argument}=", found=why, remedy=f"e.g. {argument}={example}")


# ---- errors


def _wrong_shape(place: Place, key: str, expected: tuple[int | None, ...], found: tuple[int, ...]) -> DamagedFileError:
    shape = ", ".join("any" if size is None else str(size) for size in expected)
    what = f"the tensor '{key}' of '{place.name}' has another shape than the rest of the file says"
    return DamagedFileError(what, expected=f"[{shape}]", found=list(found), remedy="get it again from where it came")


def _wrong_dtype(place: Place, key: str, found: torch.dtype) -> DamagedFileError:
    what = f"the tensor '{key}' of '{place.name}' holds no real numbers"
    return DamagedFileError(what, expected="a floating-point dtype", found=found, remedy="get it again from where it came")


def _unknown_tensors(place: Place, left: list[str], taken: set[str]) -> WrongKindError:
    expected = f"nothing beside {', '.join(sorted(taken))}"
    return unsupported(place, "tensors that this format does not have", expected, ", ".join(sorted(left)[:8]))


def _twice(place: Place, key: str) -> DamagedFileError:
    return incomplete(place, f"'{key}' once", "in two files")


def _other_format(place: Place, name: str, chosen: type[Format]) -> WrongKindError:
    return WrongKindError(
        f"'{place.name}' is not of the format '{name}'",
        expected=chosen.looks_for,
        found=", ".join(place.files[:8]) or "no files",
        remedy="leave format= out to have it told by the files",
    )


def _several(place: Place, fitting: list[str]) -> ConfigError:
    return ConfigError(
        f"'{place.name}' could be of several formats",
        expected="files that only one of them has",
        found=", ".join(f"'{name}': {FORMATS.get(name).looks_for}" for name in fitting),
        remedy=f"pass format='{fitting[0]}' or another of these",
    )


def _none(place: Place) -> WrongKindError:
    return WrongKindError(
        f"'{place.name}' is no dictionary that can be read",
        expected="; ".join(f"'{name}': {FORMATS.get(name).looks_for}" for name in FORMATS),
        found=", ".join(place.files[:8]) or "no files",
        remedy="give the folder of one dictionary: of a repository with many, folder='...'",
    )


def _only_read(name: str) -> ConfigError:
    writable = [known for known in FORMATS if FORMATS.get(known).writes]
    what = f"the format '{name}' is read, not written"
    return ConfigError(what, expected=f"one of {', '.join(writable)}", found=name, remedy="choose one of these")


def _no_site(place: Place, hooks: tuple[str, ...], argument: str) -> ConfigError:
    return ConfigError(
        f"'{place.name}' does not say at which tensor of a plain model it belongs",
        expected=f"{argument}=, a site",
        found=f"the hook {', '.join(map(repr, hooks))}" if hooks else "no hook in the file",
        remedy=f"e.g. {argument}='layers.12.output', or the path of a module: 'module:model.layers.12.post_attention_layernorm:input'",
    )
