"""Editors: methods that turn facts into low-rank changes of weights, and the bench of things that all of them work with.

A new one is a file in `steer.edits.editors` with one `@EDITORS.register(name)`.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from steer.edits.contexts import Contexts
from steer.edits.covariance import Covariance
from steer.edits.edit import WeightDelta
from steer.edits.edited_map import EditedMap, edited_maps
from steer.edits.edited_weights import EditedWeights
from steer.edits.fact import Fact
from steer.edits.factor import Factor
from steer.edits.keys import ReadTexts, read_texts
from steer.edits.solve import COLLINEAR, Metric, PastKeys, Solved, nearest_pair
from steer.edits.value import Value, ValueSettings, solve_values
from steer.edits.value_cache import ValueStore
from steer.errors import EditError
from steer.model.anatomy import Anatomy
from steer.model.prefix import replaced_forwards
from steer.model.site import Site
from steer.registry import Registry


@dataclass(frozen=True, eq=False)
class Solution:
    """What an editor gives for n facts.

    Attributes:
        deltas: changes of different matrices; of rank 0 where there is nothing to write.
        strength: [n] the share of what was asked that is written, the smallest over layers; None for editors without a solve.
        values: what was asked; None for editors without values.
        no_op: numbers of the facts that the model says already, of which nothing is written.
        of: [m] the fact that each key and each column of the deltas belongs to, where they have some.

    Example:
        >>> solution = EDITORS.get("rome")().solve(EditBench(model, tokenizer, [8], contexts, covariance=covariance), [fact])
        >>> [delta.rank for delta in solution.deltas], solution.strength
    """

    deltas: tuple[WeightDelta, ...]
    strength: Tensor | None = None
    values: tuple[Value, ...] | None = None
    no_op: tuple[int, ...] = ()
    of: Tensor | None = None


class EditBench:
    """A model with what editors need of it: maps, keys, values, factors. Nothing that is read here changes the model.

    `steer.edit_facts` makes one for an editor; an editor of your own is tried on one that you make.

    Attributes:
        layers: to be edited, ascending. maps: their down projections, by layer.
        layers_from: who chose them, see `steer.edits.preparation`. covariance_from: what its texts are.

    Example:
        >>> bench = EditBench(model, tokenizer, [8], contexts, covariance=covariance)
        >>> solution = EDITORS.get("rome")().solve(bench, [fact])
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        layers: Sequence[int],
        contexts: Contexts,
        *,
        covariance: Covariance | None = None,
        values: ValueStore | None = None,
        progress: str | None = None,
        layers_from: str = "given",
        covariance_from: str = "given",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.anatomy = Anatomy.find(model)
        self.maps: dict[int, EditedMap] = {edited.layer: edited for edited in edited_maps(self.anatomy, layers)}
        self.layers = list(self.maps)
        self.contexts = contexts
        self.covariance = covariance
        self.store = values
        self.progress = progress
        self.layers_from = layers_from
        self.covariance_from = covariance_from
        self._powers: dict[int, float] = {}
        self._past: dict[tuple[int, str], tuple[list[str], PastKeys | None]] = {}

    def values(self, facts: Sequence[Fact], layer: int, settings: ValueSettings) -> list[Value]:
        """What the map of a layer would have to write for each fact, see `steer.edits.solve_values`."""
        return solve_values(self.model, self.tokenizer, facts, self.contexts, layer, settings, cache=self.store, progress=self.progress)

    def read(self, facts: Sequence[Fact], sites: Sequence[Site], weighting: str) -> ReadTexts:
        """Activations at the subjects of facts, see `steer.edits.keys.read_texts`."""
        return read_texts(self.model, self.tokenizer, facts, self.contexts, sites, weighting)

    def factor(self, layer: int) -> Factor:
        """The factor of the covariance of a layer. Raises EditError without a covariance."""
        if self.covariance is None:
            raise no_covariance()
        return self.covariance.factor(layer)

    def past_keys(self, layer: int, metric: Metric, kind: str, keys: Tensor) -> PastKeys | None:
        """Keys of the edits that are in the weights of the model, but for those that are nearly one of `keys`, [m, f], which are written
        anew: the last edit of a fact wins. None for none.

        Args:
            kind: of metric, under which they are kept for the next solve.
        """
        path = self.maps[layer].name
        applied = [edit for edit in EditedWeights.of(self.model).applied if edit.delta(path) is not None]
        names = [edit.name for edit in applied]
        known, past = self._past.get((layer, kind), ([], None))
        if names[: len(known)] != known:
            known, past = [], None
        if more := [delta.keys for edit in applied[len(known) :] if (delta := edit.delta(path)) is not None and delta.keys is not None]:
            past = PastKeys.of(torch.cat(more), metric) if past is None else past.extended(torch.cat(more), metric)
        self._past[layer, kind] = names, past
        return None if past is None else past.unlike(keys)

    def output_power(self, layer: int) -> float | None:
        """tr(W0 C W0^T): mean squared length of what the map of a layer gives for ordinary keys, without its bias and without any edit.
        None without a covariance, or for a quantised map."""
        if self.covariance is None or self.maps[layer].is_quantised:
            return None
        if layer not in self._powers:
            edited = self.maps[layer]
            weight = edited.as_held(EditedWeights.of(self.model).original(edited.name).float())  # [d, f]
            self._powers[layer] = float((weight @ self.factor(layer).moment.to(weight) * weight).sum())
        return self._powers[layer]

    def delta(self, layer: int, solved: Solved, keys: Tensor) -> WeightDelta:
        """The change of the map of a layer that was solved from keys [m, f]; dense where its rank is no smaller than the matrix."""
        path = self.maps[layer].name
        if solved.u.shape[1] >= min(len(solved.u), len(solved.v)):
            return WeightDelta.of_change(path, layer, (solved.u @ solved.v.T).float(), keys=keys)
        return WeightDelta(path, layer, solved.u, solved.v, keys=keys)

    def no_delta(self, layer: int) -> WeightDelta:
        """The change of a map by nothing, of rank 0."""
        edited = self.maps[layer]
        return WeightDelta(edited.name, layer, torch.zeros(edited.out_width, 0), torch.zeros(edited.in_width, 0))

    @contextmanager
    def beside(self, deltas: Sequence[WeightDelta]) -> Iterator[None]:
        """Lets the model run as if these changes were in its weights, which stay as they are: W x + u (v^T x)."""
        with replaced_forwards({self.maps[delta.layer].module: _beside(self.maps[delta.layer], delta) for delta in deltas if delta.rank}):
            yield


def _beside(edited: EditedMap, delta: WeightDelta) -> Any:
    forward = edited.module.forward
    factors: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = forward(x, *args, **kwargs)
        if x.device not in factors:
            factors[x.device] = delta.u.to(x.device), delta.v.to(x.device)
        u, v = factors[x.device]
        return output + (x.float() @ v @ u.mT).to(output)

    return run


@dataclass(frozen=True)
class Editor(ABC):
    """A method of editing. Its fields are its settings, which an edit keeps.

    Attributes:
        needs_covariance: it cannot do without one.
        several_layers: it spreads an edit over layers by default.

    Example:
        >>> @EDITORS.register("nothing")
        ... class Nothing(Editor):
        ...     needs_covariance = False
        ...
        ...     def solve(self, bench, facts):
        ...         return Solution(tuple(bench.no_delta(layer) for layer in bench.layers))
        >>> edit = steer.edit_facts(model, tokenizer, [fact], editor="nothing", layers=[8], contexts=contexts)
    """

    name: ClassVar[str]
    needs_covariance: ClassVar[bool] = True
    several_layers: ClassVar[bool] = False

    @abstractmethod
    def solve(self, bench: EditBench, facts: Sequence[Fact]) -> Solution:
        """The changes that write the facts. The model is left as it was."""

    def settings(self) -> dict[str, Any]:
        """What it was set to, JSON-able."""
        return _plain(self)


@dataclass(frozen=True)
class ValueEditor(Editor):
    """A method that writes values, which are found for each fact by itself: a `ValueStore` keeps them, and editors may share them.

    Attributes:
        value_settings: how values are optimised.

    Example:
        >>> from steer.edits.editors.memit import MEMIT
        >>> MEMIT(value_settings=ValueSettings(steps=10))
    """

    value_settings: ValueSettings = field(default_factory=ValueSettings, kw_only=True)

    def values(self, bench: EditBench, facts: Sequence[Fact]) -> list[Value]:
        """Values at the last of the layers."""
        return bench.values(facts, bench.layers[-1], self.value_settings)


def _plain(settings: Any) -> dict[str, Any]:
    return {each.name: _plain(value) if is_dataclass(value := getattr(settings, each.name)) else value for each in fields(settings)}


EDITORS: Registry[type[Editor]] = Registry("editor", "steer.edits.editors", "steer.editors", subclass_of=Editor)


class WeakValueWarning(UserWarning):
    """A fact for which nothing better than no change was found, so that the edit does not write it."""


class CollinearKeysWarning(UserWarning):
    """Two facts whose keys are nearly the same, mostly of one subject: what is written for one is written for the other."""


def collinear(keys: Tensor, of: Tensor, facts: Sequence[Fact]) -> tuple[Fact, Fact, float] | None:
    """Two facts whose keys have a cosine above `COLLINEAR`, and that cosine. keys: [m, f], of the facts `of`, [m]."""
    first, second, cosine = nearest_pair(keys, of)
    return (facts[int(of[first])], facts[int(of[second])], cosine) if abs(cosine) > COLLINEAR else None


def warn_of_collinear(keys: Tensor, of: Tensor, facts: Sequence[Fact]) -> None:
    """Warns of facts that an editor with a ridge cannot tell apart."""
    if (found := collinear(keys, of, facts)) is not None:
        first, second, cosine = found
        warnings.warn(
            f"'{first.prompt}' and '{second.prompt}' have nearly the same key (cosine {cosine:.4f}): each gets a mixture of both values",
            CollinearKeysWarning,
            stacklevel=4,
        )


def solution_of_values(
    deltas: Sequence[WeightDelta], values: Sequence[Value], strength: Tensor | None = None, of: Tensor | None = None
) -> Solution:
    """A solution of an editor with values. strength: 1 for all when None. of: none where nothing is written."""
    strength = torch.ones(len(values), dtype=torch.float64) if strength is None else strength
    no_op = tuple(i for i, value in enumerate(values) if value.is_no_op)
    return Solution(tuple(deltas), strength, tuple(values), no_op, of)


def wanted_rows(facts: Sequence[Fact], values: Sequence[Value]) -> list[int]:
    """Numbers of the facts of which there is something to write. Warns of those whose value is zero though the model does not say them."""
    wanted = []
    for i, (fact, value) in enumerate(zip(facts, values, strict=True)):
        if bool(value.delta.any()):
            wanted.append(i)
        elif not value.is_no_op:
            warnings.warn(
                f"no value was found for '{fact.prompt}' -> '{fact.target}' (loss {value.loss:.2f} in {value.steps} steps): it is not "
                "written; edit a lower layer, or give ValueSettings other lr, steps or clamp",
                WeakValueWarning,
                stacklevel=4,
            )
    return wanted


def smallest(strength: Tensor, of: Tensor, count: int) -> Tensor:
    """[count] the smallest strength of the keys of each fact; 1 for a fact without keys."""
    return torch.ones(count, dtype=torch.float64).scatter_reduce(0, of, strength.double().cpu(), "amin")


# ---- errors


def no_covariance(editor: str = "this editor") -> EditError:
    return EditError(
        f"{editor} needs the covariance of the keys",
        expected="a Covariance of the layers that are edited",
        found="none",
        remedy="pass covariance=Covariance.fit(model, tokenizer, texts, layers), with some tens of thousands of tokens of any text",
    )
