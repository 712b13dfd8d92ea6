"""Importers: what each one has to say, and the source that they look at."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from steer.checks import errors_of
from steer.directions.direction import Direction, Directions
from steer.errors import ConfigError, DamagedFileError, FileError, WidthError, WrongKindError
from steer.files import METADATA_KEY, contents
from steer.intervene.plan import Plan
from steer.model.site import Site
from steer.reading import kind_of, read_bytes, read_json, size_of
from steer.registry import Registry
from steer.tensor_files import read_npy, read_npz, read_safetensors, read_torch, tensor_format


@dataclass(eq=False)
class Source:
    """A file or folder of another program, read at most once.

    Attributes:
        path: of it.
        n_layers: number of blocks of the model, when the caller said so.
        site: pattern with `{layer}` that overrules the format's own conversion, or None.
        scope: on which tokens the interventions of a plan act, or None.
        placed: layer of each site that was given out.
    """

    path: Path
    n_layers: int | None = None
    site: str | None = None
    scope: str | None = None
    placed: dict[Site, int] = field(default_factory=dict)

    @cached_property
    def head(self) -> bytes:
        """The first bytes of a file; nothing for a folder."""
        return read_bytes(self.path, 8) if self.path.is_file() else b""

    @cached_property
    def form(self) -> str | None:
        """`torch`, `json`, `npy`, `npz`, `safetensors`, `gguf` or `zip`, by the content; None for a folder or anything else."""
        return tensor_format(self.path) if self.path.is_file() else None

    @property
    def is_torch(self) -> bool:
        """Looks like a file of torch.save, as a zip or as the pickle that it was before."""
        return self.form == "torch"

    @cached_property
    def content(self) -> Any:
        """What a file holds, except for GGUF; None for a folder or anything else."""
        readers: dict[str | None, Callable[[Path], Any]] = {
            "torch": read_torch,
            "json": read_json,
            "npy": read_npy,
            "npz": read_npz,
            "safetensors": _plain_safetensors,
        }
        return readers[self.form](self.path) if self.form in readers else None

    def has(self, *names: str) -> bool:
        """It is a folder with these files."""
        return all((self.path / name).is_file() for name in names)

    def place(self, layer: int, site: str) -> Site:
        """The site of a layer, by the format's own conversion or by that of the caller.

        Raises:
            DamagedFileError: no layer of the model. ConfigError: two layers at one site.
        """
        self.check_layer(layer)
        placed = Site.parse((site if self.site is None else self.site).format(layer=layer))
        if self.placed.setdefault(placed, layer) != layer:
            raise _one_site_error(self, placed, layer)
        return placed

    def check_layer(self, layer: int) -> None:
        """Raises DamagedFileError for a layer that the model does not have, as far as the caller said how many there are."""
        if layer < 0 or (self.n_layers is not None and layer >= self.n_layers):
            raise _layer_error(self, layer)

    def asked_site(self, why: str, suggestion: str) -> str:
        """The caller's conversion. Raises ConfigError, saying why it is needed, when there is none."""
        if self.site is None:
            raise _no_site_error(self, why, suggestion)
        return self.site


class Importer:
    """One format. A subclass is one file with one registration, and its docstring's first line says what it reads and where it puts it.

    Attributes:
        looks_for: what it recognises, for the error that lists all of them.
        makes: `directions` or `plan`.
        is_last: takes a file only when no other importer recognises it.
    """

    name: ClassVar[str]
    looks_for: ClassVar[str]
    makes: ClassVar[str] = "directions"
    is_last: ClassVar[bool] = False

    @staticmethod
    def recognises(source: Source) -> bool:
        """By content. May read the source, but must not raise for one of another format."""
        raise NotImplementedError

    @staticmethod
    def read(source: Source) -> Directions | Plan:
        """Raises the errors of `import_directions`."""
        raise NotImplementedError


IMPORTERS: Registry[type[Importer]] = Registry("import format", "steer.directions.importers", "steer.importers", subclass_of=Importer)
KINDS: dict[str, type] = {"directions": Directions, "plan": Plan}  # what importers make


def gathered(source: Source, vectors: Mapping[Site, Tensor | Any], *, method: str, span: str | int = "unknown", **notes: Any) -> Directions:
    """Directions out of imported vectors.

    Args:
        vectors: [width] each, of any number type. Zero vectors, with which some programs fill the layers they did not read, are left out.
        method, span: as far as the file says.
        notes: what else it says, JSON-able.

    Raises:
        DamagedFileError, WidthError.
    """
    if source.is_torch:
        for vector in vectors.values():
            if not isinstance(vector, Tensor):
                raise incomplete(source, "a tensor for each layer", type(vector).__name__)
    try:
        read_in = {site: torch.as_tensor(vector).detach() for site, vector in vectors.items()}
        for vector in read_in.values():
            if vector.is_complex() or vector.is_meta or vector.layout is not torch.strided or vector.dtype is torch.bool:
                raise ValueError(f"{vector.dtype}, {vector.layout} on {vector.device}: no plain numbers")
        tensors = {site: vector.float() for site, vector in read_in.items()}
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise incomplete(source, "a vector of numbers for each layer", str(error)) from error
    entries = [Direction(site, vector, method, span) for site, vector in tensors.items() if bool((vector != 0).any())]
    if not entries:
        raise _zeros_error(source, len(tensors))
    if len({len(entry.vector) for entry in entries}) > 1:
        raise _widths_error(source, entries)
    read = {entry.site for entry in entries}
    left_out = [str(site) for site in tensors if site not in read]
    return Directions(entries, source.path.stem, {"imported": {"file": source.path.name, "left_out": left_out, **notes}})


def integer_of(source: Source, value: Any, what: str) -> int:
    """An integer of a file, which may be written as text. Raises DamagedFileError."""
    try:
        return int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError) as error:
        raise incomplete(source, f"a whole number as {what}", repr(value)[:60]) from error


def matrix_of(source: Source) -> Tensor:
    """[rows, width] of a torch file. Raises DamagedFileError when it holds something else."""
    content = source.content
    if not isinstance(content, Tensor) or content.ndim != 2 or len(content) < 2:
        held = list(content.shape) if isinstance(content, Tensor) else type(content).__name__
        raise incomplete(source, "one matrix, [layers, width]", held)
    return content


def by_layer(source: Source, part: str) -> dict[int, Any]:
    """What a part of the content has for each layer, in their order. Raises DamagedFileError."""
    entries = source.content[part]
    if not isinstance(entries, Mapping):
        raise incomplete(source, f"{part} by layer", type(entries).__name__)
    layers = {integer_of(source, layer, f"layer in {part}"): value for layer, value in entries.items()}
    return {layer: layers[layer] for layer in sorted(layers)}


def _plain_safetensors(path: Path) -> dict[str, Tensor] | None:
    """Tensors by name; None for a file that steer wrote, which says more than its tensors."""
    tensors, metadata = read_safetensors(path)
    return None if METADATA_KEY in metadata else tensors


def mapping_of(source: Source, value: Any, what: str) -> Mapping[Any, Any]:
    """A part of a file that has to be an object or a dictionary. Raises DamagedFileError."""
    if not isinstance(value, Mapping):
        raise incomplete(source, f"{what}, an object with keys", f"{type(value).__name__} {value!r:.60}")
    return value


def choose(source: Source, format: str | None) -> type[Importer]:
    """The importer by name, or the one that recognises the content.

    Raises:
        FileError: nothing there. ConfigError: an unknown name, or content that fits several. WrongKindError: content that fits none.
    """
    if not source.path.exists():
        raise _missing_error(source)
    if not source.path.is_dir():
        size_of(source.path)  # raises for a pipe, a device and what cannot be read
    if format is not None:
        chosen = importer_of(format)
        if not _recognises(format, chosen, Source(source.path, site=source.site)):
            raise _format_error(source, format, chosen)
        return chosen
    fitting = [name for name in sorted(IMPORTERS) if _recognises(name, importer_of(name), source)]
    if any(not importer_of(name).is_last for name in fitting):
        fitting = [name for name in fitting if not importer_of(name).is_last]
    if len(fitting) == 1:
        return importer_of(fitting[0])
    raise _several_error(source, fitting) if fitting else _none_error(source)


def importer_of(name: str) -> type[Importer]:
    """The importer of that name. Raises ConfigError for an unknown one, and for one that does not say what it reads."""
    importer = IMPORTERS.get(name)
    if not isinstance(getattr(importer, "looks_for", None), str) or importer.makes not in KINDS:
        raise _importer_error(name, importer)
    return importer


def read_by(importer: type[Importer], source: Source) -> Directions | Plan:
    """What an importer reads. Raises ConfigError when it fails, or gives something else than it `makes`; besides as `Importer.read`."""
    what = f"the importer '{importer.name}'"
    with errors_of(what, "correct its `read`; of a damaged file it raises `steer.directions.importer.incomplete`"):
        content = importer.read(source)
    if not isinstance(content, KINDS[importer.makes]):
        raise _content_error(what, importer, content)
    return content


def _recognises(name: str, importer: type[Importer], source: Source) -> bool:
    with errors_of(f"the importer '{name}'", "let its `recognises` return False for files of other formats"):
        recognised = importer.recognises(source)
    if recognised is None:
        raise _undecided_error(name)
    return bool(recognised)


def incomplete(source: Source, expected: str, found: object) -> DamagedFileError:
    """The error of a file that lacks a part."""
    return DamagedFileError(f"'{source.path}' lacks a part", expected=expected, found=found, remedy="get it again from where it came")


def _importer_error(name: str, importer: object) -> ConfigError:
    return ConfigError(
        f"the importer '{name}' does not say what it reads",
        expected=f"a subclass of Importer with `looks_for`, text, and `makes`, {' or '.join(map(repr, KINDS))}",
        found=repr(importer),
        remedy="e.g. looks_for = \"JSON with 'vectors'\" in its class",
    )


def _content_error(what: str, importer: type[Importer], content: object) -> ConfigError:
    return ConfigError(
        f"{what} reads something else than it says",
        expected=KINDS[importer.makes].__name__,
        found=f"{type(content).__name__} {str(content)[:60]!r}",
        remedy="return what `gathered(source, vectors, method=...)` makes, or set `makes` to what it returns",
    )


def _undecided_error(name: str) -> ConfigError:
    return ConfigError(
        f"the importer '{name}' does not decide whether a file is its own",
        expected="True or False from `recognises`",
        found="None",
        remedy="return the comparison",
    )


def _one_site_error(source: Source, site: Site, layer: int) -> ConfigError:
    return ConfigError(
        f"'{source.path.name}' has vectors of several layers, and site= one place for all",
        expected="a site with {layer} in place of the layer",
        found=f"'{source.site}' for the layers {source.placed[site]} and {layer}",
        remedy="e.g. site='layers.{layer}.output'",
    )


def _layer_error(source: Source, layer: int) -> DamagedFileError:
    return DamagedFileError(
        f"'{source.path.name}' holds a layer that the model does not have",
        expected="0 or more" if source.n_layers is None else f"0 to {source.n_layers - 1}",
        found=layer,
        remedy="check n_layers; the file may be for another model",
    )


def _no_site_error(source: Source, why: str, suggestion: str) -> ConfigError:
    return ConfigError(
        f"'{source.path.name}' does not say at which tensor its vectors belong",
        expected="site=, a site with {layer} in place of the layer",
        found=why,
        remedy=f"e.g. site='{suggestion}'",
    )


def _zeros_error(source: Source, count: int) -> DamagedFileError:
    return DamagedFileError(
        f"'{source.path}' holds no vector",
        expected="at least one that is not zero",
        found=f"{count} zero vectors",
        remedy="look at what wrote it",
    )


def _widths_error(source: Source, entries: list[Direction]) -> WidthError:
    return WidthError(
        f"'{source.path.name}' has vectors of different widths",
        expected="one width, that of the model",
        found=", ".join(f"{entry.site}: {len(entry.vector)}" for entry in entries),
        remedy="get it again from where it came",
    )


def _missing_error(source: Source) -> FileError:
    return FileError(f"no file or folder {source.path}", expected="a vector file", found="nothing there", remedy="check the path")


def _format_error(source: Source, format: str, chosen: type[Importer]) -> WrongKindError:
    return WrongKindError(
        f"'{source.path}' is not of the format '{format}'",
        expected=chosen.looks_for,
        found=_looks(source),
        remedy="leave format= out to have it told by its content",
    )


def _several_error(source: Source, fitting: list[str]) -> ConfigError:
    return ConfigError(
        f"'{source.path}' could be of several formats",
        expected="content that only one of them has",
        found=", ".join(f"'{name}': {importer_of(name).looks_for}" for name in fitting),
        remedy=f"pass format='{fitting[0]}' or another of these, or n_layers= to tell them apart",
    )


def _none_error(source: Source) -> WrongKindError:
    return WrongKindError(
        f"'{source.path}' is of no format that can be imported",
        expected="; ".join(f"'{name}': {importer_of(name).looks_for}" for name in sorted(IMPORTERS)),
        found=_looks(source),
        remedy="pass site= if it is nothing but vectors, or make a steer.Direction of one; steer's own files load with Directions.load",
    )


def _looks(source: Source) -> str:
    """What a file or folder holds, in words."""
    if source.path.is_dir():
        return f"a folder with {contents(source.path)}"
    form, content = source.form, source.content
    if isinstance(content, Tensor):
        return f"a {form} file with a tensor {list(content.shape)} of {content.dtype}"
    if isinstance(content, Mapping):
        entries = [f"{key} {list(value.shape)}" if isinstance(value, Tensor) else str(key) for key, value in list(content.items())[:8]]
        return f"a {form} file with {', '.join(entries) or 'nothing'}"
    if form == "safetensors":
        return "an artifact of steer"
    if content is not None:
        return f"a {form} file with a {type(content).__name__}"
    head = read_bytes(source.path, 64)
    return kind_of(head) or f"a file that begins with {head[:8]!r}"
