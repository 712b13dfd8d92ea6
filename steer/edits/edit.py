"""Edit: a named low-rank change of weights that writes facts into a model, with what it was made from.

W' = W + u v^T in each of the matrices that it touches. The change is stored as its factors, never as a snapshot of weights, so that it can
be taken out again to the bit (`steer.edits.edited_weights`) and exported as an adapter (`steer.edits.edit_adapter`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from steer.checks import json_value, of_type
from steer.edits.fact import Fact
from steer.errors import EditError, NonFiniteError
from steer.files import load_artifact, save_artifact, tensor_hash
from steer.reading import check_kinds, damage_of

if TYPE_CHECKING:
    from steer.edits.edited_weights import EditedWeights

KIND = "edit"
_MATRICES = ("u", "v", "keys", "values")
_MANIFEST = {
    "name": str,
    "facts": list,
    "editor": str,
    "settings": dict,
    "deltas": list,
    "contexts": (dict, type(None)),
    "of": (list, type(None)),
    "base": dict,
    "model": dict,
    "provenance": dict,
}


@dataclass(frozen=True, eq=False)
class WeightDelta:
    """The change of one weight matrix W [d, f], dW = u v^T, and what it was solved from.

    All tensors are fp32 on the CPU, whatever the model is in: products of two such numbers are exact in fp64, in which they are added.

    Attributes:
        path: of the module in the model as it was loaded, e.g. `model.layers.8.mlp.down_proj`, without what PEFT adds to it.
        layer: number of its block.
        u: [d, rank]. v: [f, rank].
        keys: [n, f] inputs of the map at which facts were written; None where it was not solved from keys.
        values: [n, d] what the edited map gives for these keys, without its bias: (W + dW) k.

    Raises:
        EditError: shapes that do not fit each other. NonFiniteError: NaN or infinity.

    Example:
        >>> (delta,) = edit.deltas
        >>> delta.path, delta.rank, delta.change().shape  # [d, f]
    """

    path: str
    layer: int
    u: Tensor
    v: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None

    def __post_init__(self) -> None:
        for name in _MATRICES:
            tensor = getattr(self, name)
            if tensor is None:
                continue
            of_type(tensor, Tensor, f"`{name}` of a weight delta", "pass a matrix as a torch.Tensor")
            if tensor.dim() != 2:
                raise _wrong_shape(self.path, name, "a matrix", tensor)
            if not bool(torch.isfinite(tensor).all()):
                raise _not_finite(self.path, name)
            object.__setattr__(self, name, tensor.detach().to("cpu", torch.float32, copy=True).contiguous())
        if self.u.shape[1] != self.v.shape[1]:
            raise _wrong_shape(self.path, "v", f"[f, {self.u.shape[1]}], as u has", self.v)
        if self.keys is not None and self.keys.shape[1] != len(self.v):
            raise _wrong_shape(self.path, "keys", f"[n, {len(self.v)}]", self.keys)
        if self.values is not None and (self.keys is None or self.values.shape != (len(self.keys), len(self.u))):
            n = "n" if self.keys is None else len(self.keys)
            raise _wrong_shape(self.path, "values", f"[{n}, {len(self.u)}], beside keys", self.values)

    @classmethod
    def of_change(cls, path: str, layer: int, change: Tensor, **solved_from: Tensor | None) -> Self:
        """The delta of a dense change [d, f] of any rank: one factor is the identity of the smaller side, so that the product is exact."""
        d, f = change.shape
        u, v = (torch.eye(d), change.mT) if d <= f else (change, torch.eye(f))
        return cls(path, layer, u, v, **solved_from)

    def __repr__(self) -> str:
        d, f = self.shape
        return f"WeightDelta('{self.path}': {d} x {f} of rank {self.rank}, norm {self.norm:.3g})"

    @property
    def shape(self) -> tuple[int, int]:
        """[d, f]: width out, width in."""
        return len(self.u), len(self.v)

    @property
    def rank(self) -> int:
        """Columns of the factors; 0 for a change that does nothing."""
        return self.u.shape[1]

    @property
    def is_dense(self) -> bool:
        """The factors are no smaller than the matrix."""
        return self.rank >= min(self.shape)

    @property
    def norm(self) -> float:
        """Frobenius norm of dW."""
        return math.sqrt(max(self.inner(self), 0.0))

    def inner(self, other: WeightDelta) -> float:
        """<dW, dW'>, the sum of products in the units of the weights squared, from the factors alone."""
        u, v = self.u.double().mT @ other.u.double(), self.v.double().mT @ other.v.double()  # [rank, rank of the other]
        return float((u * v).sum())

    def change(self) -> Tensor:
        """dW, [d, f] fp32."""
        return (self.u.double() @ self.v.double().mT).float()


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of weights that writes facts: low-rank deltas of one or more matrices, the facts, and how it was made.

    Nothing of a model changes by making one. `steer.edits.make_edit` makes it with the hashes of the model that it was solved for.

    Attributes:
        name: unique among the edits on one model; by default the editor and a digest of the deltas.
        facts: what it writes.
        editor: name of the method, e.g. `memit`.
        deltas: of different matrices.
        settings: of the method, JSON-able.
        contexts: texts before the prompts, as `Contexts.to_json` has them; None where none were used.
        of: number of the fact, in `facts`, that each key of the deltas belongs to; None where the keys are those of all facts, in order.
        base: hash of each touched matrix without any edit, by path, of the model that it was solved for.
        model: fingerprint of that model (`Anatomy.fingerprint`).
        provenance: anything else, JSON-able: edits that were on the model when it was solved, readings of guards.

    Raises:
        EditError: two deltas of one matrix. ConfigError: something that JSON cannot hold.

    Example:
        >>> with edit.applied(model):
        ...     model.generate(**prompt, max_new_tokens=2)
        >>> edit.save("capital")
        PosixPath('capital')
    """

    facts: tuple[Fact, ...]
    editor: str
    deltas: tuple[WeightDelta, ...]
    name: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    contexts: Mapping[str, Any] | None = None
    of: tuple[int, ...] | None = None
    base: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("facts", Fact), ("deltas", WeightDelta)):
            of_type(getattr(self, name), (list, tuple), f"`{name}` of an edit", f"pass a tuple of {kind.__name__}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
            for part in getattr(self, name):
                of_type(part, kind, f"one of `{name}` of an edit", f"pass a tuple of {kind.__name__}")
        of_type(self.editor, str, "the editor of an edit", "pass its name, e.g. 'memit'")
        paths = [delta.path for delta in self.deltas]
        if twice := [path for path in dict.fromkeys(paths) if paths.count(path) > 1]:
            raise _two_deltas(twice[0])
        for name in ("settings", "contexts", "base", "model", "provenance"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, dict(value))
                json_value(getattr(self, name), f"`{name}` of an edit")
        if self.of is not None:
            object.__setattr__(self, "of", tuple(int(number) for number in self.of))
            if not set(self.of) <= set(range(len(self.facts))) or any(
                delta.keys is not None and len(delta.keys) != len(self.of) for delta in self.deltas
            ):
                raise _wrong_facts(self)
        if not self.name:
            object.__setattr__(self, "name", f"{self.editor}-{(self.digest if self.deltas else _facts_digest(self.facts))[:10]}")

    def __repr__(self) -> str:
        layers = ", ".join(str(delta.layer) for delta in self.deltas)
        covariance = ""
        if kept := self.provenance.get("covariance"):
            covariance = f", covariance of {min(kept['tokens'].values()):,} tokens: {kept['from']}"
        return f"Edit('{self.name}': {len(self.facts)} facts by {self.editor}, rank {self.rank} in layers {layers or 'none'}{covariance})"

    @property
    def rank(self) -> int:
        """The largest of its deltas; 0 for an edit that does nothing."""
        return max((delta.rank for delta in self.deltas), default=0)

    @property
    def digest(self) -> str:
        """SHA-256 of the deltas: two edits with the same one change the same weights by the same numbers."""
        digest = hashlib.sha256()
        for delta in sorted(self.deltas, key=lambda delta: delta.path):
            digest.update(f"{delta.path} {tensor_hash({'u': delta.u, 'v': delta.v})}\n".encode())
        return digest.hexdigest()

    def delta(self, path: str) -> WeightDelta | None:
        """The delta of the matrix at a path."""
        return next((delta for delta in self.deltas if delta.path == path), None)

    def named(self, name: str) -> Self:
        """The same under another name."""
        return replace(self, name=name)

    @contextmanager
    def applied(self, model: nn.Module, *, on_other_weights: bool = False) -> Iterator[EditedWeights]:
        """The edit in the weights of a model inside a `with` block, and out of them on every way out; see `EditedWeights.apply`."""
        from steer.edits.edited_weights import EditedWeights

        with EditedWeights.of(model).with_edit(self, on_other_weights=on_other_weights) as edited:
            yield edited

    def diff(self, other: Edit) -> EditDifference:
        """What another edit does differently."""
        of_type(other, Edit, "the other edit", "pass an Edit")
        only_here, only_there = (
            tuple(fact for fact in one.facts if fact not in another.facts) for one, another in ((self, other), (other, self))
        )
        settings = {
            key: (self.settings.get(key), other.settings.get(key))
            for key in sorted({*self.settings, *other.settings})
            if self.settings.get(key) != other.settings.get(key)
        }
        if self.editor != other.editor:
            settings = {"editor": (self.editor, other.editor), **settings}
        paths = dict.fromkeys(delta.path for delta in (*self.deltas, *other.deltas))
        matrices = {path: MatrixDifference.of(self.delta(path), other.delta(path)) for path in paths}
        return EditDifference(only_here, only_there, settings, matrices)

    # ---- files

    def save(self, path: str | Path) -> Path:
        """Writes it whole or not at all; see `steer.files.save_artifact` for the two forms and the errors."""
        tensors = {
            f"{number}/{name}": tensor
            for number, delta in enumerate(self.deltas)
            for name in _MATRICES
            if (tensor := getattr(delta, name)) is not None
        }
        return save_artifact(path, KIND, tensors, self.as_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads it. Raises FileError and its kinds for what is no edit or is damaged."""
        manifest, tensors = load_artifact(path, KIND)
        with damage_of(path, "an edit as `save` writes it"):
            check_kinds(manifest, _MANIFEST)
            deltas = []
            for number, entry in enumerate(manifest["deltas"]):
                check_kinds(entry, {"path": str, "layer": int, "rank": int})
                deltas.append(WeightDelta(entry["path"], entry["layer"], **_of_delta(tensors, number)))
            if sum(getattr(delta, name) is not None for delta in deltas for name in _MATRICES) < len(tensors):
                raise ValueError(f"tensors of no delta among {', '.join(sorted(tensors))}")
            return cls.from_json(manifest, tuple(deltas))

    def as_json(self) -> dict[str, Any]:
        """All but the tensors."""
        return {
            "name": self.name,
            "facts": [fact.as_json() for fact in self.facts],
            "editor": self.editor,
            "settings": self.settings,
            "deltas": [{"path": delta.path, "layer": delta.layer, "rank": delta.rank} for delta in self.deltas],
            "contexts": self.contexts,
            "of": None if self.of is None else list(self.of),
            "base": self.base,
            "model": self.model,
            "provenance": self.provenance,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], deltas: tuple[WeightDelta, ...]) -> Self:
        """The inverse of `as_json`, with the tensors."""
        facts = tuple(Fact.from_json(fact) for fact in content["facts"])
        kept = {name: content[name] for name in ("settings", "contexts", "of", "base", "model", "provenance")}
        return cls(facts, content["editor"], deltas, content["name"], **kept)


@dataclass(frozen=True)
class MatrixDifference:
    """Of the deltas of one matrix in two edits: their norms, 0 where one has none, and the cosine between them, NaN where one is 0."""

    norm: float
    other_norm: float
    cosine: float

    @classmethod
    def of(cls, delta: WeightDelta | None, other: WeightDelta | None) -> Self:
        norm, other_norm = (0.0 if each is None else each.norm for each in (delta, other))
        both = delta is not None and other is not None and norm and other_norm
        return cls(norm, other_norm, delta.inner(other) / (norm * other_norm) if both else math.nan)  # type: ignore[arg-type, union-attr]


@dataclass(frozen=True)
class EditDifference:
    """What two edits have of their own.

    Attributes:
        facts, other_facts: that only the one, or only the other, writes.
        settings: by name, of the one and of the other, where they differ.
        matrices: by path.
    """

    facts: tuple[Fact, ...]
    other_facts: tuple[Fact, ...]
    settings: Mapping[str, tuple[Any, Any]]
    matrices: Mapping[str, MatrixDifference]

    def __str__(self) -> str:
        lines = [f"facts: {len(self.facts)} only here, {len(self.other_facts)} only there"]
        lines += [f"{name}: {here!r} here, {there!r} there" for name, (here, there) in self.settings.items()]
        lines += [f"{path}: |dW| {each.norm:.4g} here, {each.other_norm:.4g} there, cosine {each.cosine:.3f}"
                  for path, each in self.matrices.items()]  # fmt: skip
        return "\n".join(lines)


def _facts_digest(facts: tuple[Fact, ...]) -> str:
    """Of edits that do nothing, which have no deltas to be told apart by."""
    return hashlib.sha256(" ".join(fact.name for fact in facts).encode()).hexdigest()


def _of_delta(tensors: Mapping[str, Tensor], number: int) -> dict[str, Any]:
    """Of one delta in a file; u and v are there, keys and values may not be."""
    factors = {name: tensors[f"{number}/{name}"] for name in ("u", "v")}
    return factors | {name: tensors.get(f"{number}/{name}") for name in ("keys", "values")}


# ---- errors


def _wrong_shape(path: str, name: str, expected: str, tensor: Tensor) -> EditError:
    return EditError(
        f"`{name}` of the delta of '{path}' does not fit",
        expected=expected,
        found=list(tensor.shape),
        remedy="dW = u @ v.T with u [d, rank] and v [f, rank]; a Conv1D has its delta in the same convention",
    )


def _not_finite(path: str, name: str) -> NonFiniteError:
    return NonFiniteError(
        f"`{name}` of the delta of '{path}' is not finite",
        expected="finite numbers",
        found="NaN or infinity",
        remedy="lower the learning rate of the value, or raise the ridge of the solve",
    )


def _wrong_facts(edit: Edit) -> EditError:
    return EditError(
        "`of` does not say to which facts the keys of an edit belong",
        expected=f"for each key a number from 0 to {len(edit.facts) - 1}",
        found=f"{len(edit.of or ())} numbers, for {[0 if delta.keys is None else len(delta.keys) for delta in edit.deltas]} keys",
        remedy="pass the `of` that the keys came with (FactKeys.of)",
    )


def _two_deltas(path: str) -> EditError:
    return EditError(
        f"an edit has two deltas of '{path}'",
        expected="one for each matrix",
        found="two",
        remedy="join their factors: u = torch.cat([u1, u2], 1), v = torch.cat([v1, v2], 1)",
    )
