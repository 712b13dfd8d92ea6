"""Lenses: what the residual stream at some depth says as the model's own next token. A new one is a file with one registered class.

A lens maps the stream behind some blocks to the stream behind the last one; the model's own norm and unembedding read the rest.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from steer import files
from steer.checks import of_type, whole_number
from steer.directions.direction import Direction, Directions
from steer.errors import ConfigError, FileError, NonFiniteError, SiteError, WidthError, WrongModelError
from steer.lens.readout import Readout
from steer.model.site import Site
from steer.place import Place
from steer.reading import check_kinds, damage_of, place_of
from steer.registry import Registry


class Lens:
    """Base of all lenses.

    Args:
        readout: of the model.
        tensors: what the lens learned, by `<depth>.<part>`, the depth being the number of blocks behind.
        metrics: what was measured when it was fitted. settings: how it was fitted.

    Attributes:
        name: registered name. parts: names of the tensors that a fitted depth has.

    Example:
        >>> lens = steer.LogitLens.of(model)
        >>> lens.sites[-1], lens.token_vector(tokenizer.encode(" he")[0], "layers.12.output").shape  # [width]
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ()
    reads_every_depth: ClassVar[bool] = False

    def __init__(
        self,
        readout: Readout,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        metrics: Mapping[str, float] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.readout = readout
        self.tensors = {name: tensor.detach().float() for name, tensor in (tensors or {}).items()}
        self.metrics = dict(metrics or {})
        self.settings = dict(settings or {})
        for name, tensor in self.tensors.items():
            self._check(name, tensor)

    def _check(self, name: str, tensor: Tensor) -> None:
        depth, _, part = name.partition(".")
        if not depth.isdigit() or int(depth) > self.readout.n_layers or part not in self.parts:
            raise _no_such_depth(self, name)
        shape = [self.readout.width] * (1 if part == "bias" else 2)
        if list(tensor.shape) != shape:
            raise _wrong_shape(self, name, tensor, shape)
        if not bool(torch.isfinite(tensor).all()):
            raise _not_finite(self, name)

    def __repr__(self) -> str:
        sites = self.sites
        return f"{type(self).__name__}({len(sites)} sites, {sites[0]} to {sites[-1]}, width {self.readout.width})"

    @property
    def depths(self) -> tuple[int, ...]:
        """Depths that it reads, in order; behind the last block every lens is the model itself."""
        if self.reads_every_depth:
            return tuple(range(self.readout.n_layers + 1))
        return tuple(sorted({int(name.partition(".")[0]) for name in self.tensors} | {self.readout.n_layers}))

    @property
    def sites(self) -> list[Site]:
        """Sites that it reads, in order."""
        return [self.readout.site_of(depth) for depth in self.depths]

    def matrix(self, depth: int) -> Tensor | None:
        """[width, width] of the linear map to the stream behind the last block; None for the identity."""
        return None

    def bias(self, depth: int) -> Tensor | None:
        """[width] of what is added by that map; None for nothing."""
        return None

    def translated(self, h: Tensor, site: str | Site) -> Tensor:
        """[..., width], what the stream h [..., width] at a site becomes behind the last block. Raises SiteError for unfitted ones."""
        depth = self._fitted_depth(site)
        matrix, bias = self.matrix(depth), self.bias(depth)
        made = h if matrix is None else h.float() @ matrix.to(h.device).mT
        made = made if bias is None else made + bias.to(h.device)
        return made.to(h.dtype)

    def logits(self, h: Tensor, site: str | Site) -> Tensor:
        """[..., vocabulary], what the model would say if only this stream, h [..., width], were left."""
        return self.readout.logits(self.translated(h, site))

    def token_vector(self, token: int, site: str | Site) -> Tensor:
        """[width] fp32, W_U[token] J: the direction along which the stream at a site raises a token, before the final norm.

        Raises ConfigError for a token that there is not.
        """
        whole_number(token, "a token id")
        rows = self.readout.unembedding
        if token >= len(rows):
            raise _no_such_token(token, len(rows))
        row = rows[token].float().cpu()
        matrix = self.matrix(self._fitted_depth(site))
        return row if matrix is None else row @ matrix.cpu()

    def directions(self, tokens: Sequence[int], sites: Sequence[str | Site], *, name: str, against: Sequence[int] = ()) -> Directions:
        """Directions of tokens at sites: the mean of their token vectors, less the mean of those of `against`.

        They have the length that the unembedding gives them, so a product with one counts in logits (before the final norm), and no
        metrics: no text had a part in them.

        Raises:
            ConfigError: no tokens, or one that the model does not have. SiteError: a site that the lens does not read.
        """
        for what, ids in (("the tokens of a direction", tokens), ("the tokens of `against`", against)):
            of_type(ids, (list, tuple), what, "pass a list of token ids")
        if not tokens:
            raise _no_tokens()
        entries = []
        for site in self.readout.anatomy.sites(*map(str, sites)):
            vector = torch.stack([self.token_vector(token, site) for token in tokens]).mean(0)
            if against:
                vector = vector - torch.stack([self.token_vector(token, site) for token in against]).mean(0)
            entries.append(Direction(site, vector, direction_method(self.name), "none"))
        made_from = {"tokens": list(tokens), "against": list(against)}
        return Directions(entries, name, {"model": self.readout.anatomy.fingerprint(), "method": direction_method(self.name), **made_from})

    def _fitted_depth(self, site: str | Site) -> int:
        depth = self.readout.depth_of(site)
        if depth not in self.depths:
            raise _unfitted_site(self, site)
        return depth

    # ---- files

    def save(self, path: str | Path) -> Path:
        """Writes manifest and tensors, atomically."""
        manifest = {"lens": self.name, "model": self.readout.anatomy.fingerprint(), "metrics": self.metrics, "settings": self.settings}
        return files.save_artifact(path, "lens", self.tensors, manifest)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """These are files of this lens that another program wrote. Looks at names alone, and does not raise."""
        return False

    @classmethod
    def published(cls, names: Sequence[str]) -> list[str]:
        """Which of the files in a folder of a hub make a lens of this kind that another program wrote; none when it is not one."""
        return []

    @classmethod
    def read(cls, path: Path, readout: Readout) -> Self:
        """Reads what `recognises` knows."""
        raise NotImplementedError


LENSES: Registry[type[Lens]] = Registry("lens", "steer.lens.lenses", "steer.lenses", subclass_of=Lens)


def direction_method(lens: str) -> str:
    """The `method` of directions that a lens of this name makes."""
    return f"{lens}_lens"


def load_lens(model: nn.Module, path: str | Path, *, revision: str | None = None) -> Lens:
    """Loads a lens for a model: one that was saved here, or published files, which are known by their names.

    Args:
        path: a file or folder, or where it is on the Hugging Face hub, `owner/name/folder`, of a space `spaces/owner/name/folder`; only
            the files of the lens are downloaded.
        revision: of a repository.

    Raises:
        FileError: nothing there, a hub that cannot be reached, or a folder of it without a lens.
        WrongModelError: it belongs to a model of another shape. DamagedFileError, WrongKindError, UnsafeFileError,
            NonFiniteError: the files. WidthError, AnatomyError.

    Example:
        >>> steer.TunedLens.fit(model, harmless, sites=["layers.12.output"], steps=2, held_out=2).save("lens")
        >>> lens = steer.load_lens(model, "lens")
    """
    place_of(path)  # what is no path at all
    place = _on_disk(Place.find(path, revision=revision, what="lens"))
    readout = Readout.of(model)
    for name in LENSES:
        if LENSES.get(name).recognises(place):
            return LENSES.get(name).read(place, readout)
    manifest, tensors = files.load_artifact(place, "lens")
    with damage_of(place, "a lens with its model, metrics and settings"):
        check_kinds(manifest, {"lens": str, "model": dict, "metrics": dict, "settings": dict})
    check_model_of(readout, {key: manifest["model"].get(key) for key in ("model_type", "n_layers", "width", "vocabulary")}, place)
    with damage_of(place, "the tensors of a lens"):
        return LENSES.get(manifest["lens"])(readout, tensors, metrics=manifest["metrics"], settings=manifest["settings"])


def _on_disk(place: Place) -> Path:
    """The file or folder of a lens; of the hub it is downloaded."""
    if place.root is not None:
        return place.root if place.file is None else place.root / place.file
    there = [name for name in place.files if "/" not in name]  # finds out, too, whether the place is a file
    if place.file is not None:
        return place.path(place.file)
    known = [[files.MANIFEST, files.TENSORS], *(LENSES.get(name).published(there) for name in LENSES)]
    wanted = max((names for names in known if set(names) <= set(there)), key=len)  # params.pt alone could be another lens
    if not wanted:
        raise _no_lens(place, there)
    paths = [place.path(name) for name in wanted]
    return paths[0] if len(paths) == 1 else paths[0].parent


def check_model_of(readout: Readout, recorded: Mapping[str, Any], path: Path) -> None:
    """Raises WrongModelError where a file records another shape of its model; None stands for what it does not record."""
    own = readout.anatomy.fingerprint()
    if differing := {key: value for key, value in recorded.items() if value is not None and value != own[key]}:
        raise _other_model(path, differing, {key: own[key] for key in differing})


def torch_bytes(content: Any) -> bytes:
    """A file of torch.save, in memory."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


# ---- errors


def _no_such_depth(lens: Lens, name: str) -> ConfigError:
    return ConfigError(
        f"a {lens.name} lens has no tensor '{name}'",
        expected=f"<blocks behind, 0 to {lens.readout.n_layers}>.<{' or '.join(lens.parts) or 'nothing'}>",
        found=name,
        remedy="load the lens of this model, or fit one",
    )


def _wrong_shape(lens: Lens, name: str, tensor: Tensor, shape: list[int]) -> WidthError:
    return WidthError(
        f"tensor '{name}' of a {lens.name} lens does not fit the model",
        expected=f"the shape {shape}",
        found=list(tensor.shape),
        remedy="load the lens of this model, or fit one",
    )


def _not_finite(lens: Lens, name: str) -> NonFiniteError:
    return NonFiniteError(
        f"tensor '{name}' of a {lens.name} lens is not finite",
        expected="finite numbers",
        found="NaN or infinity",
        remedy="download the lens again, or fit it on fewer or other texts",
    )


def _unfitted_site(lens: Lens, site: str | Site) -> SiteError:
    return SiteError(
        f"the {lens.name} lens was not fitted at '{site}'",
        expected=f"one of {', '.join(map(str, lens.sites))}",
        found=str(site),
        remedy="choose one of these, or fit a lens that has the site",
    )


def _no_such_token(token: int, size: int) -> ConfigError:
    return ConfigError(
        "the unembedding has no such token",
        expected=f"an id from 0 to {size - 1}",
        found=token,
        remedy="tokenise with the model's tokenizer",
    )


def _no_tokens() -> ConfigError:
    return ConfigError(
        "a direction of no tokens", expected="at least one token id", found="none", remedy="pass e.g. tokenizer(' Paris').input_ids[:1]"
    )


def _other_model(path: Path, recorded: Mapping[str, Any], own: Mapping[str, Any]) -> WrongModelError:
    return WrongModelError(
        f"the lens in '{path}' belongs to another model",
        expected=recorded,
        found=own,
        remedy="load it with the model that it was fitted on, or fit one for this model",
    )


def _no_lens(place: Place, there: Sequence[str]) -> FileError:
    return FileError(
        f"no lens in '{place.name}'",
        expected="config.json and params.pt, one .pt file, or manifest.json and tensors.safetensors",
        found=", ".join(there[:8]) or "no files right there",
        remedy="name the folder of the lens, or its file: 'owner/name/folder'",
    )
