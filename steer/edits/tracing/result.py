"""TraceResult: effects of every token and layer of the facts that were traced, averages over facts, tables, files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from steer import files
from steer.checks import one_of
from steer.edits.fact import Fact
from steer.edits.tracing.averages import ROLES, AverageEffects, Mean, mean_over_facts, role_of
from steer.errors import ConfigError
from steer.reading import check_kinds, damage_of

KIND = "causal trace"
MEASURES = ("probability", "logit difference")
PROBABILITY, LOGIT_DIFFERENCE = MEASURES
NOT_A_CHOICE = (
    "Where a fact can be restored does not say where it is best edited: over layers the two hardly go together "
    "(Hase et al. 2023, arXiv 2301.04213). Choose the layers of an edit by a sweep."
)
_FIELDS = {"tokens": list, "first": int, "last": int, "answer": str, "answer_tokens": int, "other": str, "corruption": dict, "fact": dict}


@dataclass(frozen=True)
class LeftOut:
    """A fact that was not traced, and why.

    Example:
        >>> [(left_out.fact.prompt, left_out.reason) for left_out in traced.left_out]
    """

    fact: Fact
    reason: str


@dataclass(frozen=True, eq=False)
class FactTrace:
    """The runs of one fact. The first axis of all tensors is that of `MEASURES`.

    Attributes:
        fact: whose answer is traced.
        tokens: of the prompt, as text. first, last: those of the subject.
        answer: the token that is traced, the first of `answer_tokens` that the answer has.
        other: the most probable other token of the clean run, with which the logit of the answer is compared.
        clean, corrupted: [measures] of the run as it is, and with the subject corrupted (a mean over samples).
        restored: [measures, kinds, tokens, layers] of the corrupted run with one thing set back to its clean value.
        corruption: what was chosen for this subject, such as `replaced_by`.

    Example:
        >>> (trace, *others) = traced.traces
        >>> trace.tokens, trace.total_effect, trace.effects.shape  # [measures, kinds, tokens, layers]
    """

    fact: Fact
    tokens: tuple[str, ...]
    first: int
    last: int
    answer: str
    answer_tokens: int
    other: str
    clean: Tensor
    corrupted: Tensor
    restored: Tensor
    corruption: dict[str, Any] = field(default_factory=dict)

    @property
    def total_effect(self) -> Tensor:
        """[measures] clean - corrupted."""
        return self.clean - self.corrupted

    @property
    def effects(self) -> Tensor:
        """[measures, kinds, tokens, layers] indirect effects: restored - corrupted."""
        return self.restored - self.corrupted[:, None, None, None]

    @property
    def roles(self) -> tuple[str, ...]:
        """[tokens] the role of each token, empty before the subject."""
        return tuple(role_of(token, self.first, self.last, len(self.tokens)) for token in range(len(self.tokens)))

    def __repr__(self) -> str:
        p, q = self.clean[0], self.corrupted[0]
        return f"FactTrace('{self.fact.prompt}' ->{self.answer!r}, p {p:.3f} clean and {q:.3f} corrupted, {len(self.tokens)} tokens)"


@dataclass(frozen=True, eq=False)
class TraceResult:
    """What `causal_trace` found.

    Attributes:
        traces: of the facts that the model knows.
        kinds: what was restored, in the order of the tensors.
        left_out: facts that were looked at and not traced.
        about: corruption, samples, seed, window, what was severed, model, `whole_passes` (facts traced by the plain protocol); JSON-able.

    Raises:
        ConfigError: tensors that do not fit tokens, kinds and layers.

    Example:
        >>> print(traced.table())
        >>> traced.indirect_effects(0, "hidden").shape  # [tokens, layers]
    """

    traces: tuple[FactTrace, ...]
    kinds: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    about: dict[str, Any]

    def __post_init__(self) -> None:
        for trace in self.traces:
            shape = (len(MEASURES), len(self.kinds), len(trace.tokens), self.n_layers)
            if tuple(trace.restored.shape) != shape:
                raise _other_shape(shape, trace.restored)

    def __len__(self) -> int:
        return len(self.traces)

    def __getitem__(self, number: int) -> FactTrace:
        return self.traces[number]

    def __iter__(self) -> Iterator[FactTrace]:
        return iter(self.traces)

    @property
    def n_layers(self) -> int:
        return self.traces[0].restored.shape[-1]

    # ---- effects

    def indirect_effects(self, number: int, kind: str, measure: str = PROBABILITY) -> Tensor:
        """[tokens, layers] of one fact. Raises ConfigError for a kind that was not traced, or an unknown measure."""
        return self[number].effects[self._measure(measure), self._kind(kind)]

    def average_effects(self, kind: str, measure: str = PROBABILITY) -> AverageEffects:
        """Average indirect effects by role of the token, with intervals over facts. Raises ConfigError as `indirect_effects`."""
        by_role: dict[str, list[Tensor]] = {role: [] for role in ROLES}
        of_measure, of_kind = self._measure(measure), self._kind(kind)
        for trace in self:
            effects = trace.effects[of_measure, of_kind]  # [tokens, layers]
            for role in ROLES:
                places = [token for token, name in enumerate(trace.roles) if name == role]
                if places:
                    by_role[role].append(effects[places].mean(0))
        found = {role: mean_over_facts(values) for role, values in by_role.items() if values}
        means, halves = (torch.stack([pair[part] for pair in found.values()]) for part in (0, 1))
        return AverageEffects(kind, measure, tuple(found), tuple(len(by_role[role]) for role in found), means, halves)

    def average(self, what: str, measure: str = PROBABILITY) -> Mean:
        """Mean over facts of `clean`, `corrupted` or `total_effect`. Raises ConfigError."""
        one_of(what, ("clean", "corrupted", "total_effect"), "what is averaged")
        mean, half = mean_over_facts([getattr(trace, what)[self._measure(measure)] for trace in self])
        value, width = float(mean), float(half)
        return Mean(value, None, None, len(self)) if math.isnan(width) else Mean(value, value - width, value + width, len(self))

    def _kind(self, kind: str) -> int:
        return self.kinds.index(one_of(kind, self.kinds, "the kind of a trace"))

    def _measure(self, measure: str) -> int:
        return MEASURES.index(one_of(measure, MEASURES, "the measure of a trace"))

    # ---- text

    def table(self, measure: str | None = None) -> str:
        """Averages as text: for each kind and role the highest effect over layers, and the layer.

        Args:
            measure: one of `MEASURES`; None for all. Raises ConfigError for another.
        """
        measures = MEASURES if measure is None else (measure,)
        return "\n".join([self.setting(), *(line for each in measures for line in self._lines(each)), *self.notes()])

    def _lines(self, measure: str) -> list[str]:
        """The table of one measure."""
        ends = ", ".join(f"{name.replace('_', ' ')} {self.average(name, measure)}" for name in ("clean", "corrupted", "total_effect"))
        averages = [self.average_effects(kind, measure) for kind in self.kinds]
        rows = [("highest indirect effect over layers", *(f"{kind}, layer" for kind in self.kinds))]
        for role, n in zip(averages[0].roles, averages[0].n, strict=True):
            peaks = [average.peak(role) for average in averages]
            rows.append((f"  {role} ({n})", *(f"{mean}, {layer}" for layer, mean in peaks)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        intervals = ", 95 % intervals over facts" if len(self) > 1 else ""
        return ["", f"{measure} of the answer{intervals}: {ends}", *lines, ""]

    def setting(self) -> str:
        """How it was traced, in a line."""
        corruption, samples = self.about["corruption"], self.about["samples"]
        said = {"noise": f"noise of {corruption.get('deviations', 0):g} deviations of the subjects' embeddings, {samples} samples"}
        parts = [f"{len(self)} fact{'s' * (len(self) > 1)}", said.get(corruption["name"], f"corruption '{corruption['name']}'")]
        parts += [f"window of {self.about['window']} layers"] if set(self.kinds) - {"hidden"} else []
        parts += [f"{self.about['severed']} severed at the restored token"] if self.about["severed"] else []
        return f"causal trace of {', '.join(parts)}"

    def notes(self) -> list[str]:
        """What a reader has to know beside the numbers, a sentence or two each."""
        several = sum(trace.answer_tokens > 1 for trace in self)
        found = [f"{several} of the answers have several tokens; the first is traced."] if several else []
        if self.left_out:
            shown = "; ".join(f"'{entry.fact.prompt}' ({entry.reason})" for entry in self.left_out[:3])
            more = f"; and {len(self.left_out) - 3} more" if len(self.left_out) > 3 else ""
            found.append(f"Left out: {len(self.left_out)} facts. {shown}{more}.")
        if whole := self.about.get("whole_passes"):
            why = "the model cannot be run in parts, or has something attached"
            found.append(f"{whole} of the facts had a whole pass for every cell, which is slow: {why}.")
        return [*found, NOT_A_CHOICE]

    def __repr__(self) -> str:
        return f"TraceResult({len(self)} facts, {', '.join(self.kinds)}, {self.n_layers} layers, {len(self.left_out)} left out)"

    # ---- files

    def save(self, path: str | Path) -> Path:
        """Writes manifest and tensors, atomically; one file where the path ends in `.safetensors`."""
        tensors = {f"restored.{number}": trace.restored for number, trace in enumerate(self)}
        tensors |= {name: torch.stack([getattr(trace, name) for trace in self]) for name in ("clean", "corrupted")}
        left_out = [{"fact": entry.fact.as_json(), "reason": entry.reason} for entry in self.left_out]
        facts = [{**{name: getattr(trace, name) for name in _FIELDS}, "fact": trace.fact.as_json()} for trace in self]
        manifest = {"kinds": list(self.kinds), "facts": facts, "left_out": left_out, "about": self.about}
        return files.save_artifact(path, KIND, tensors, manifest)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote. Raises DamagedFileError, WrongKindError, UnsafeFileError, NonFiniteError, FileError."""
        manifest, tensors = files.load_artifact(path, KIND)
        with damage_of(path, KIND):
            check_kinds(manifest, {"kinds": list, "facts": list, "left_out": list, "about": dict})
            traces = []
            for number, facts in enumerate(manifest["facts"]):
                check_kinds(facts, _FIELDS)
                own: dict[str, Any] = {**facts, "fact": Fact.from_json(facts["fact"]), "tokens": tuple(facts["tokens"])}
                own |= {name: tensors[name][number] for name in ("clean", "corrupted")}
                traces.append(FactTrace(**own, restored=tensors[f"restored.{number}"]))
            left_out = tuple(LeftOut(Fact.from_json(entry["fact"]), entry["reason"]) for entry in manifest["left_out"])
            return cls(tuple(traces), tuple(manifest["kinds"]), left_out, manifest["about"])


# ---- errors


def _other_shape(shape: tuple[int, ...], restored: Tensor) -> ConfigError:
    return ConfigError("probabilities of a trace do not fit its tokens, kinds and layers", expected=list(shape),
                       found=list(restored.shape), remedy="make it with causal_trace")  # fmt: skip
