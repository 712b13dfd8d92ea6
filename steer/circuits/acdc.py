"""ACDC, automatic circuit discovery by exact ablation of edges (Conmy et al. 2023, arXiv 2304.14997)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer import files
from steer.checks import of_type
from steer.circuits.ablation import Ablation, resample_ablation
from steer.circuits.circuit import Circuit
from steer.circuits.component_run import TakenOut
from steer.circuits.components import ComponentGraph
from steer.circuits.pairs import Pairs
from steer.circuits.patch_effects import edge_place
from steer.circuits.patched_run import Patch, PatchedRun
from steer.circuits.targets import Target, target_words
from steer.circuits.texts import Batch
from steer.errors import ConfigError, WrongModelError
from steer.model.fingerprint import differing, warn_of_cast

KIND = "acdc progress"
KL = "KL divergence from the model"
SAVE_SECONDS = 30.0
MOST_AT_ONCE = 64  # edges that are tried together


def acdc(
    model: nn.Module,
    pairs: Pairs,
    threshold: float,
    target: Target | None = None,
    *,
    candidates: Circuit | Sequence[str] | None = None,
    ablation: Ablation | None = None,
    checkpoint: str | Path | None = None,
    max_tokens: int = 512,
    progress: bool = True,
) -> Circuit:
    """The circuit that is left when every edge is taken out whose loss costs less than a threshold.

    Readers are visited from the logits backwards, and of each the edges from its latest writer on. An edge that is out stays out where the
    loss rises by less than the threshold. Edges into readers that lead nowhere any more go without a run.

    Cost: one run of all pairs for each edge, which is days for all 70,651 edges of a model of 135M parameters on a CPU. So `candidates` are
    usually the best few hundred edges of an attribution; all other edges are out from the start.

    Runs stand side by side where that changes no decision: the next few edges are taken out one more at a time, each in rows of its own,
    and what comes after the first edge that has to stay is dropped and run again. More are tried at once the longer all of them go.

    Args:
        threshold: of the rise of the loss, mean over pairs, in nat without a target and else in its units. Infinity takes everything out.
        target: a number that should stay high, whose negative is the loss; the KL divergence of the last token's distribution from that of
            the whole model for None.
        candidates: a circuit of edges, or names such as `a3.h5->m7`; all edges for None.
        ablation: what takes the place of what an edge carries; the counterfactual prompt for None.
        checkpoint: a file to go on from, written every half minute and when the run stops.
        max_tokens: padded tokens of a batch.

    Raises:
        ConfigError: a threshold that is NaN, no candidates, an edge that there is not, or a checkpoint of another run.

    Example:
        >>> scores = attribute(model, pairs, target)
        >>> circuit = acdc(model, pairs, 0.01, candidates=scores.top_edges(20))
    """
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or threshold != threshold:
        raise _no_threshold(threshold)
    search = _Search(model, pairs, threshold, target, candidates, resample_ablation() if ablation is None else ablation, max_tokens)
    if checkpoint is not None and Path(checkpoint).exists():
        search.resume(checkpoint)
    try:
        with tqdm(total=len(search.queue), initial=search.done, desc="acdc", unit="edge", disable=None if progress else True) as bar:
            saved_at = time.monotonic()
            while search.done < len(search.queue):
                bar.update(search.step())
                bar.set_postfix(kept=search.kept_candidates, loss=f"{search.loss:.4g}")
                if checkpoint is not None and time.monotonic() - saved_at > SAVE_SECONDS:
                    search.save(checkpoint)
                    saved_at = time.monotonic()
    finally:
        if checkpoint is not None:
            search.save(checkpoint)
    return search.circuit()


class _Search:
    """State of a search.

    Attributes:
        out: [writers, readers] bool, edges that are taken out.
        queue: places of the candidates in the order in which they are tried. done: how many have been decided.
        loss: mean over prompts of the circuit as it is now.
        runs: passes of all prompts so far.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Pairs,
        threshold: float,
        target: Target | None,
        candidates: Circuit | Sequence[str] | None,
        ablation: Ablation,
        max_tokens: int,
    ) -> None:
        self.loss_of = _NegativeTarget(target) if target is not None else KLFromModel()
        self.patched = PatchedRun(model, pairs, self.loss_of, ablation=ablation, max_tokens=max_tokens)
        self.pairs, self.threshold, self.ablation = pairs, threshold, ablation
        graph = self.patched.run.graph
        mask = _candidates(graph, candidates, self.patched.run.anatomy.fingerprint())
        self.queue = [(writer, reader) for reader, writer in reversed(mask.T.nonzero().tolist())]
        self.out = graph.possible & ~mask
        self.done, self.runs, self.at_once = 0, 0, 1
        if isinstance(self.loss_of, KLFromModel):
            self.loss_of.look(self.patched)
        self.loss = self.start_loss = float(self._losses([self.out])[0])

    @property
    def kept_candidates(self) -> int:
        return self.done - sum(bool(self.out[place]) for place in self.queue[: self.done])

    def _losses(self, outs: Sequence[Tensor]) -> Tensor:
        """[sets of edges] means over prompts."""
        nodes = TakenOut.nothing(self.patched.run.graph).nodes
        self.runs += len(outs)
        return self.patched.values([Patch(TakenOut(nodes, {}, out)) for out in outs]).mean(1)

    def step(self) -> int:
        """Decides on the next edges. Returns on how many."""
        graph = self.patched.run.graph
        if not self._leads_on(self.queue[self.done][1]):
            self.out[self.queue[self.done]] = True
            self.done += 1
            return 1
        reader = self.queue[self.done][1]
        tried = [place for place in self.queue[self.done : self.done + self.at_once] if place[1] == reader]
        outs, out = [], self.out
        for place in tried:
            out = out.clone()
            out[place] = True
            outs.append(out)
        losses = self._losses(outs).tolist()
        gone = 0
        while gone < len(tried) and losses[gone] - self.loss < self.threshold:
            self.loss = losses[gone]
            gone += 1
        self.out = outs[gone - 1] if gone else self.out
        decided = min(gone + 1, len(tried))  # the one that has to stay is decided too
        self.at_once = min(2 * self.at_once, MOST_AT_ONCE) if gone == self.at_once else max(1, gone)
        self.done += decided
        assert not bool((self.out & ~graph.possible).any())
        return decided

    def _leads_on(self, reader: int) -> bool:
        """Whether anything still reads a component that uses what a reader reads."""
        graph = self.patched.run.graph
        if reader == len(graph.readers) - 1:
            return True
        return bool((graph.possible & ~self.out)[graph.reads_for[reader]].any())

    def circuit(self) -> Circuit:
        """What is left, without edges that lead nowhere."""
        graph = self.patched.run.graph
        kept = graph.pruned(graph.possible & ~self.out)
        facts = {
            "method": {"name": "acdc", "threshold": self.threshold if abs(self.threshold) < torch.inf else str(self.threshold)},
            "target": self.loss_of.words,
            "loss": float(self._losses([graph.possible & ~kept])[0]),
            "start_loss": self.start_loss,
            "candidates": len(self.queue),
            "runs": self.runs,
            "ablation": self.ablation.kind,
            "direction": "noising",
            "pairs": {"count": len(self.pairs), "hash": self.pairs.hash()},
            "model": self.patched.run.anatomy.fingerprint(),
        }
        return Circuit(graph, kept.any(1).double(), edges=kept, ablation=self.ablation, facts=facts)

    # ---- files

    def _key(self) -> dict[str, Any]:
        """What a checkpoint must have been made with."""
        queue = hashlib.sha256(str(self.queue).encode()).hexdigest()
        key = {"threshold": str(float(self.threshold)), "target": self.loss_of.words, "pairs": self.pairs.hash(), "queue": queue}
        return {**key, "ablation": self.ablation.kind, "model": self.patched.run.anatomy.fingerprint()}

    def save(self, path: str | Path) -> None:
        """Atomically."""
        state = {"done": self.done, "runs": self.runs, "loss": self.loss, "start_loss": self.start_loss}
        files.save_artifact(path, KIND, {"out": self.out}, {"made_with": self._key(), **state})

    def resume(self, path: str | Path) -> None:
        """Goes on from a checkpoint. Raises ConfigError for one of another run, and what `files.load_artifact` raises."""
        manifest, tensors = files.load_artifact(path, KIND)
        if (made_with := manifest.get("made_with")) != (key := self._key()):
            raise _other_run(path, made_with, key)
        self.out, self.done, self.runs = tensors["out"], manifest["done"], manifest["runs"]
        self.loss, self.start_loss = manifest["loss"], manifest["start_loss"]


# ---- losses


@dataclass(frozen=True)
class _NegativeTarget:
    target: Target

    @property
    def at_last_token(self) -> bool:
        return bool(getattr(self.target, "at_last_token", False))

    @property
    def words(self) -> str:
        return target_words(self.target)

    def __call__(self, logits: Tensor, prompt: int) -> Tensor:
        return -self.target(logits, prompt)


class KLFromModel:
    """KL divergence, in nats, of the distribution after the last token of a prompt from that of the model as it is: KL(model || run)."""

    at_last_token = True
    words = KL

    def __init__(self) -> None:
        self.log_probabilities: dict[int, Tensor] = {}  # [vocabulary] by prompt

    @torch.no_grad()
    def look(self, patched: PatchedRun) -> None:
        """Runs the model as it is over all prompts."""
        passes = patched.run.passes
        for prompts in passes.batches(range(len(patched))):
            batch: Batch = passes.batch(prompts)
            logits = passes.run_batch(batch, {}, gradients=False, last_token=True)
            assert logits is not None
            for prompt, of_row in zip(prompts, logits[:, -1].float().log_softmax(-1), strict=True):
                self.log_probabilities[prompt] = of_row

    def __call__(self, logits: Tensor, prompt: int) -> Tensor:
        known, now = self.log_probabilities[prompt], logits[-1].log_softmax(-1)
        return (known.exp() * (known - now)).sum()


# ---- candidates


def _candidates(graph: ComponentGraph, candidates: Circuit | Sequence[str] | None, fingerprint: Any) -> Tensor:
    """[writers, readers] bool. Raises ConfigError, WrongModelError."""
    if candidates is None:
        return graph.possible.clone()
    mask = torch.zeros_like(graph.possible)
    if isinstance(candidates, Circuit):
        known = candidates.facts.get("model", fingerprint)
        if candidates.graph != graph or differing(known, fingerprint):
            raise _other_model(known, fingerprint)
        warn_of_cast("the candidates of acdc were", known, fingerprint, stacklevel=5)
        if candidates.edges is not None:
            mask = candidates.edges & graph.possible
    else:
        of_type(candidates, (list, tuple), "the candidates of acdc", "pass a circuit of edges, or a list of their names")
        for name in candidates:
            mask[edge_place(graph, name)] = True
    if not bool(mask.any()):
        raise _no_candidates()
    return mask


# ---- errors


def _no_threshold(value: object) -> ConfigError:
    return ConfigError("wrong value for the threshold of acdc", expected="a number, or infinity", found=repr(value), remedy="e.g. 0.01 nat")


def _no_candidates() -> ConfigError:
    return ConfigError("acdc has no edge to try", expected="at least one candidate", found="none",
                       remedy="e.g. candidates=scores.top_edges(500), or leave it out for all edges")  # fmt: skip


def _other_model(known: Any, found: Any) -> WrongModelError:
    return WrongModelError("the candidates of acdc are edges of another model", expected=found, found=known,
                           remedy="attribute on this model")  # fmt: skip


def _other_run(path: str | Path, found: Any, expected: Any) -> ConfigError:
    differs = [name for name in expected if not isinstance(found, dict) or found.get(name) != expected[name]]
    return ConfigError(f"the checkpoint '{path}' is one of another run of acdc", expected="the same " + ", ".join(expected),
                       found=f"another {', '.join(differs)}", remedy="name another file, or delete this one")  # fmt: skip
