"""Causal tracing (Meng et al. 2022, arXiv 2202.05262, section 2): which states, set back to their clean values, bring back a fact.

The subject of a prompt is corrupted, and the probability of the answer falls. Then one state at one token and layer is set back to what it
was, and the probability that returns is the indirect effect of that state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from steer.checks import integer, whole_number
from steer.edits.fact import Fact
from steer.edits.locate import target_ids
from steer.edits.tracing.cells import HIDDEN, KINDS, Cell, Restoring
from steer.edits.tracing.corruption import CorruptedSubject, Corruption, NoCorruption, corruption_of
from steer.edits.tracing.fast import FastPasses
from steer.edits.tracing.passes import Passes, Record
from steer.edits.tracing.plain import plain_logits
from steer.edits.tracing.prompts import Subjects, TracedPrompt, traced_prompts
from steer.edits.tracing.result import FactTrace, LeftOut, TraceResult
from steer.edits.tracing.trial import record_for_fast
from steer.errors import EditError, NonFiniteError
from steer.model.anatomy import Anatomy
from steer.model.capture import evaluating
from steer.model.devices import without_autocast


@without_autocast
def causal_trace(
    model: nn.Module,
    tokenizer: Any,
    facts: Fact | Sequence[Fact],
    *,
    kinds: str | Sequence[str] = KINDS,
    corruption: str | Corruption = "noise",
    samples: int = 10,
    seed: int = 0,
    window: int = 10,
    severed: str | None = None,
    count: int | None = None,
    max_tokens: int = 2048,
    progress: bool = True,
) -> TraceResult:
    """Traces facts that a model knows: clean, corrupted and restored runs, for every token and layer.

    A fact is known when the first token of its answer (`fact.true`, or `fact.target` where that is the only one) is the most probable one;
    others are left out and listed. Of an answer of several tokens the first is traced.

    All cells at one token run in one batch, from that token and their layer on, where a trial shows that this model gives the same so as
    in whole passes; else each cell is a whole pass.

    Args:
        model: anything `Plan.attach` takes; plans that are attached stay in force.
        facts: one or many.
        kinds: `hidden` (the output of one block), `mlp`, `attn` (what these add in several layers).
        corruption: `noise`, `replacement`, `mean`, or an object, such as `Noise(deviations=2)`.
        samples: of random corruptions; their probabilities are averaged. The same draws are used for all cells of a fact.
        seed: what is drawn for a fact depends on it and on the fact alone.
        window: layers in which `mlp` and `attn` are restored together, [l - window / 2, l + window / 2), cut off at the ends.
        severed: `mlp` or `attn`: its outputs at the restored token keep their corrupted values in all layers, which leaves the paths
            around it.
        count: facts that are traced at most, the first ones that are known.
        max_tokens: of a batch, all its rows together.

    Raises:
        EditError: no facts, or none that is known; a corruption that does not fit. SubjectNotFoundError. SiteError: parts that this model
            does not have. AnatomyError: no logits. ConfigError: an unknown kind, a window below 1. NonFiniteError: NaN in a run.

    Example:
        >>> traced = steer.causal_trace(model, tokenizer, known, samples=2, kinds=["hidden"])
        >>> print(traced.table())
        >>> traced.indirect_effects(0, "hidden").shape  # [tokens, layers]
    """
    restoring = Restoring.of(kinds, window, severed)
    samples, seed, max_tokens = integer(samples), integer(seed), integer(max_tokens)
    whole_number(samples, "the number of samples", least=1)
    whole_number(seed, "the seed of causal tracing")
    whole_number(max_tokens, "`max_tokens`", least=1)
    if count is not None:
        whole_number(count := integer(count), "the number of facts that are traced", least=1)
    method = corruption_of(corruption)
    anatomy = Anatomy.find(model)
    if getattr(anatomy.config, "is_encoder_decoder", False):
        raise _encoder_decoder(anatomy)
    prompts = traced_prompts(tokenizer, [facts] if isinstance(facts, Fact) else facts, anatomy)
    subjects = Subjects(model, anatomy, tokenizer, prompts)
    passes = Passes(model, anatomy, restoring.sites(anatomy))
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        known, left_out = _known(passes, subjects, method, samples, seed, count, progress)
        if not known:
            raise _none_known(left_out)
        tracer = _Tracer(passes, restoring, tokenizer, max_tokens)
        total = sum(tracer.cells_of(fact.prompt) for fact in known)
        with tqdm(total=total, desc="causal tracing", unit="cell", disable=None if progress else True) as bar:
            traces = tuple(tracer.trace(fact, bar) for fact in known)
    about = {
        "corruption": {"name": method.name, **method.settings(), **method.measured(subjects)},
        "samples": known[0].corrupted.embeddings.shape[0],
        "seed": seed,
        "window": restoring.window,
        "severed": severed,
        "whole_passes": tracer.whole_passes,
        "model": anatomy.fingerprint(),
    }
    return TraceResult(traces, restoring.kinds, tuple(left_out), about)


# ---- facts that are known


@dataclass(frozen=True, eq=False)
class _Known:
    """A fact that is traced. other: the most probable token but the answer."""

    prompt: TracedPrompt
    corrupted: CorruptedSubject
    other: int


def _known(
    passes: Passes, subjects: Subjects, method: Corruption, samples: int, seed: int, count: int | None, progress: bool
) -> tuple[list[_Known], list[LeftOut]]:
    """The facts that the model knows and that can be corrupted, as many as are wanted; those looked at that are left out."""
    known: list[_Known] = []
    left_out: list[LeftOut] = []
    bar = tqdm(subjects.prompts, desc="facts that are known", unit="fact", disable=None if progress else True, leave=False)
    for number, prompt in enumerate(bar):
        if len(known) == count:
            break
        logits = passes.clean_logits(prompt).float()
        if not bool(torch.isfinite(logits).all()):
            raise _non_finite(prompt)
        best, second = logits.topk(2).indices.tolist()
        if best != prompt.answer[0]:
            said = subjects.tokenizer.decode([best])
            reason = f"the model says {said!r} ({float(logits.softmax(-1)[best]):.2f})"
            if not said.strip() or target_ids(subjects.tokenizer, said)[0] != best:
                reason += ", with which no answer behind a blank begins"
            left_out.append(LeftOut(prompt.fact, reason))
            continue
        try:
            corrupted = method.of(number, subjects, samples, _generator(seed, prompt))
        except NoCorruption as reason:
            left_out.append(LeftOut(prompt.fact, str(reason)))
            continue
        known.append(_Known(prompt, corrupted, second))
    return known, left_out


def _generator(seed: int, prompt: TracedPrompt) -> Generator:
    digest = hashlib.sha256(repr((seed, prompt.ids, prompt.first, prompt.last)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ---- runs


class _Tracer:
    """Traces one fact after the other.

    Attributes:
        whole_passes: number of facts that were traced by the plain protocol.
    """

    def __init__(self, passes: Passes, restoring: Restoring, tokenizer: Any, max_tokens: int) -> None:
        self.passes, self.restoring, self.tokenizer, self.max_tokens = passes, restoring, tokenizer, max_tokens
        self.n_layers = passes.anatomy.n_layers
        self.whole_passes = 0

    def cells_of(self, prompt: TracedPrompt) -> int:
        """How many cells of a prompt have a run."""
        return sum(len(self._run_at(prompt, token)) for token in range(prompt.first, len(prompt.ids)))

    def trace(self, known: _Known, bar: tqdm) -> FactTrace:
        prompt, embeddings = known.prompt, known.corrupted.embeddings
        n_tokens, kinds = len(prompt.ids), self.restoring.kinds
        record = record_for_fast(self.passes, prompt, embeddings, self.restoring, self.max_tokens)
        is_fast = record is not None
        if record is None:
            record = self.passes.record(prompt, embeddings, with_cache=False)
            self.whole_passes += 1
        ends = _readings(record.logits, known)
        clean, corrupted = ends[0], ends[1:].mean(0)
        # before the subject nothing differs from the corrupted run, nor does it behind the last block of an earlier token
        restored = corrupted[:, None, None, None].repeat(1, len(kinds), n_tokens, self.n_layers)
        if HIDDEN in kinds:
            restored[:, kinds.index(HIDDEN), -1, -1] = clean
        for token in range(prompt.first, n_tokens):
            cells = self._run_at(prompt, token)
            for batch, logits in self._logits(known, cells, record, is_fast):
                for cell, reading in zip(batch, _readings(logits, known).mean(1), strict=True):
                    restored[:, kinds.index(cell.kind), token, cell.layer] = reading
                bar.update(len(batch))
        if not bool(torch.isfinite(restored).all()):
            raise _non_finite(prompt)
        return FactTrace(
            fact=prompt.fact,
            tokens=tuple(self.tokenizer.decode([token]) for token in prompt.ids),
            first=prompt.first,
            last=prompt.last,
            answer=self.tokenizer.decode([prompt.answer[0]]),
            answer_tokens=len(prompt.answer),
            other=self.tokenizer.decode([known.other]),
            clean=clean,
            corrupted=corrupted,
            restored=restored,
            corruption=known.corrupted.facts,
        )

    def _run_at(self, prompt: TracedPrompt, token: int) -> list[Cell]:
        return [cell for cell in self.restoring.cells(token, self.n_layers) if cell.joins < self.n_layers]

    def _logits(self, known: _Known, cells: Sequence[Cell], record: Record, is_fast: bool) -> Any:
        """Yields some of the cells with [cells, samples, vocabulary] logits of the last token."""
        severed = self.restoring.severed
        if is_fast:
            if cells:
                yield from FastPasses(self.passes, known.prompt, severed, record, max_tokens=self.max_tokens).logits(cells)
            return
        for cell in cells:
            yield [cell], plain_logits(self.passes, known.prompt, known.corrupted.embeddings, cell, severed, record)[None]


def _readings(logits: Tensor, known: _Known) -> Tensor:
    """[..., 2] fp64 on the CPU: probability of the answer, and its logit minus that of the other token. logits: [..., vocabulary]."""
    exact = logits if logits.dtype == torch.float64 else logits.float()
    answer, other = exact[..., known.prompt.answer[0]], exact[..., known.other]
    return torch.stack([(answer - exact.logsumexp(-1)).exp(), answer - other], -1).double().cpu()


# ---- errors


def _none_known(left_out: Sequence[LeftOut]) -> EditError:
    return EditError(
        "none of the facts can be traced",
        expected="facts whose answer is what the model says first",
        found="; ".join(f"'{entry.fact.prompt}' -> '{entry.fact.true or entry.fact.target}': {entry.reason}" for entry in left_out[:3]),
        remedy="trace facts that the model knows; where it says a word, that may be the target",
    )


def _encoder_decoder(anatomy: Anatomy) -> EditError:
    return EditError(
        f"causal tracing of this {anatomy.kind} is not known",
        expected="a model of one stack, which reads the prompt and says the answer",
        found="an encoder and a decoder",
        remedy="trace a decoder-only model",
    )


def _non_finite(prompt: TracedPrompt) -> NonFiniteError:
    return NonFiniteError(
        f"logits behind '{prompt.fact.prompt}' are not finite",
        expected="finite numbers",
        found="NaN or infinity",
        remedy="run the model in float32 or bfloat16; if it is, look at its weights and at what is attached",
    )
