"""Optimal ablation: constants that are learned so that ablation with them changes a model least (Li & Janson 2024, arXiv 2409.09951).

A mean is a value that a component may never take, and can do harm beyond the loss of what the component says. The change that is left
with the best constants is what the component is needed for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.checks import finite_number, whole_number
from steer.circuits.ablation import OPTIMAL, Ablation, mean_ablation
from steer.circuits.circuit import Circuit
from steer.circuits.component_run import ComponentRun, TakenOut
from steer.circuits.pairs import Pairs
from steer.circuits.targets import Target, target_words
from steer.circuits.text_overlap import window_hashes
from steer.circuits.texts import Batch, Prompts, Texts, rows_of
from steer.errors import ConfigError
from steer.model.site import Site
from steer.model.tokens import rows_hash


@torch.inference_mode(False)  # of the caller, in which nothing has a gradient
def optimal_ablation(
    model: nn.Module,
    circuit: Circuit,
    texts: Prompts | Pairs,
    target: Target | None = None,
    *,
    all_but: bool = False,
    steps: int = 50,
    lr: float = 0.02,
    start: Ablation | None = None,
    tokenizer: Any = None,
    max_tokens: int = 512,
    progress: bool = True,
) -> Ablation:
    """Constants, learned by Adam, with which the ablation of a circuit changes the model least.

    Args:
        texts: to learn them on; use others to measure with them. Of pairs the clean prompts.
        target: the mean square of its change is minimised; None for the mean KL divergence of all next-token distributions.
        all_but: everything else is ablated, and not the circuit.
        steps: of one batch each.
        lr: in units of the root mean square of each site's constant at the start.
        start: constants to start from; None for the means over the texts.

    Raises:
        ConfigError: an empty circuit, or constants to start from that are none.

    Example:
        >>> circuit.with_ablation(optimal_ablation(model, circuit, texts, steps=2))
    """
    whole_number(steps, "the steps of an optimal ablation", least=1)
    finite_number(lr, "the learning rate of an optimal ablation", above=0)
    rows = texts.clean.rows if isinstance(texts, Pairs) else rows_of(model, texts, tokenizer)
    first = mean_ablation(model, rows, max_tokens=max_tokens) if start is None else start
    learning = _Learning(model, circuit, Texts(rows), target, first, all_but, max_tokens)
    before = learning.loss()
    for _ in tqdm(range(steps), desc="optimal ablation", disable=None if progress else True):
        learning.step(lr)
    after = learning.loss()
    values = learning.values() if after < before else {}  # no better than where it started
    facts = {
        "texts": len(rows),
        "tokens": sum(len(row.ids) for row in rows),
        "hash": rows_hash(rows),
        "windows": sorted({*window_hashes(rows), *first.facts.get("windows", [])}),
        "objective": "KL divergence" if target is None else f"squared change of the {target_words(target)}",
        "ablated": "all but the circuit" if all_but else "the circuit",
        "steps": steps,
        "lr": lr,
        "model": learning.run.anatomy.fingerprint(),
        "before": before,
        "after": min(after, before),
    }
    return Ablation(OPTIMAL, {**first.values, **values}, facts)


class _Learning:
    """Constants in training."""

    def __init__(
        self, model: nn.Module, circuit: Circuit, texts: Texts, target: Target | None, start: Ablation, all_but: bool, max_tokens: int
    ) -> None:
        circuit.check_model(model)
        constants = start.constants()
        if circuit.is_empty and circuit.edges is None:
            raise _empty()
        self.target = target
        self.run = ComponentRun(model, texts, target or _no_target, start, max_tokens=max_tokens)
        self.taken_out = TakenOut.all_but(circuit) if all_but else TakenOut.circuit(circuit)
        self._batches = self._in_turn()
        self._start: dict[Site, Tensor] = {}
        self._scale: dict[Site, float] = {}
        self._moved: dict[Site, Tensor] = {}  # from the start, in units of the scale
        for site, width in self.run.replaced(self.taken_out).items():
            value = constants(site, width).float()
            self._start[site] = value
            self._scale[site] = max(float(value.square().mean().sqrt()), 1e-3)
            self._moved[site] = torch.zeros(width, requires_grad=True)
        if not self._moved:
            raise _empty()
        self._optimizer = torch.optim.Adam(list(self._moved.values()))

    def values(self) -> dict[Site, Tensor]:
        """[width] fp32 by site."""
        return {site: (self._start[site] + self._scale[site] * moved).detach() for site, moved in self._moved.items()}

    def _in_turn(self) -> Iterator[list[int]]:
        batches = list(self.run.batches([self.taken_out]))
        while True:
            yield from batches

    def step(self, lr: float) -> None:
        """One step on the next batch."""
        loss = self._loss(self.run.passes.batch(next(self._batches)), gradients=True)
        gradients = torch.autograd.grad(loss.mean(), list(self._moved.values()), allow_unused=True)
        for moved, gradient in zip(self._moved.values(), gradients, strict=True):
            moved.grad = gradient
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()

    def loss(self) -> float:
        """Mean over all texts."""
        losses = [self._loss(self.run.passes.batch(prompts), gradients=False) for prompts in self.run.batches([self.taken_out])]
        return float(torch.cat(losses).double().mean())

    def _loss(self, batch: Batch, *, gradients: bool) -> Tensor:
        """[rows]."""
        whole = self._logits(batch, TakenOut.nothing(self.run.graph), gradients=False)
        ablated = self._logits(batch, self.taken_out, gradients=gradients)
        with torch.set_grad_enabled(gradients):
            if self.target is not None:
                changes = self.run.passes.values(self.target, batch, ablated) - self.run.passes.values(self.target, batch, whole)
                return changes.square()
            return torch.stack([_divergence(batch.of(row, whole), batch.of(row, ablated)) for row in range(len(batch.ids))])

    def _logits(self, batch: Batch, taken_out: TakenOut, *, gradients: bool) -> Tensor:
        def replacement(site: Site, h: Tensor) -> Tensor:
            return (self._start[site].to(h.device) + self._scale[site] * self._moved[site].to(h.device)).to(h.dtype)

        functions = self.run.functions(taken_out, replacement)
        last = bool(getattr(self.target, "at_last_token", False))
        logits = self.run.passes.run_batch(batch, functions, gradients=gradients, last_token=last)
        assert logits is not None
        return logits


def _divergence(whole: Tensor, ablated: Tensor) -> Tensor:
    """Mean over tokens of KL(whole, ablated), in nats. Both: logits [tokens, vocabulary]."""
    log_p = whole.float().log_softmax(-1)
    return (log_p.exp() * (log_p - ablated.float().log_softmax(-1))).sum(-1).mean()


def _no_target(logits: Tensor, prompt: int) -> Tensor:
    return logits.new_zeros(())


# ---- errors


def _empty() -> ConfigError:
    return ConfigError("there is nothing to ablate", expected="a circuit with components or edges, and others beside it for all_but",
                       found="none", remedy="choose other components")  # fmt: skip
