"""The value problem of some facts at one block: losses of all of them in one pass, Adam with a clamp for each, until each is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from steer.edits.fact import Fact
from steer.edits.value_pass import ValuePass, ValueRow, may_resume
from steer.edits.value_settings import CLAMPS, Value, ValueSettings
from steer.errors import NonFiniteError
from steer.model.anatomy import Anatomy
from steer.model.likelihood import target_logprobs

_FIRST_MOMENT, _SECOND_MOMENT, _EPSILON = 0.9, 0.999, 1e-8  # Adam's


@dataclass(eq=False)
class ValueProblem:
    """The value problem at one block of a model. maps: of which the first is the edited one."""

    model: nn.Module
    anatomy: Anatomy
    layer: int
    maps: list[nn.Module]
    settings: ValueSettings

    def solve(self, rows: Sequence[ValueRow], facts: Sequence[Fact]) -> list[Value]:
        """Optimises the deltas of some facts together. rows: theirs, one fact after the other."""
        numbers = list(dict.fromkeys(row.fact for row in rows))
        rows = [replace(row, fact=numbers.index(row.fact)) for row in rows]
        is_resumed = may_resume(self.model, self.anatomy, self.layer, self.maps, rows)
        value_pass = ValuePass(self.model, self.anatomy, self.layer, self.maps, rows, is_resumed=is_resumed)
        norms = [self._norms(value_pass, len(facts), written) for written in value_pass.written]
        return _Optimisation(value_pass, facts, norms, self.settings).run()

    def _norms(self, value_pass: ValuePass, count: int, written: Tensor) -> tuple[Tensor, ...]:
        """[facts] norms of what a map and what the block give at the edited token of the prompt, in the units of the map.

        Where the prompt has no weight in the loss, the mean over the contexts.
        """
        stream = value_pass.stream.norm(dim=-1).to(written.device)
        norms = torch.stack([written.norm(dim=-1), stream * self._units(written, is_mlp=written is value_pass.written[0])], 1)
        of_facts = []
        for fact in range(count):
            counted = [i for i, row in enumerate(value_pass.rows) if row.fact == fact and row.weight]
            plain = [i for i in counted if value_pass.rows[i].is_plain]
            of_facts.append(norms[plain or counted].mean(0))
        return tuple(torch.stack(of_facts).unbind(1))

    def _units(self, written: Tensor, *, is_mlp: bool) -> Tensor | float:
        """[rows] how much longer what the map gives is than what is added to the stream; 1 without a norm between them."""
        writer = self.anatomy.writer(self.layer, "mlp" if is_mlp else "attn")
        post_norm = self.anatomy.post_norm(self.layer, writer)
        if post_norm is None:
            return 1.0
        dtype = next((parameter.dtype for parameter in post_norm.parameters()), written.dtype)
        return written.norm(dim=-1) / post_norm(written.to(dtype)).float().norm(dim=-1)


class _Optimisation:
    """Adam on the deltas of some facts, each with a clamp of its own, until each is done.

    Attributes:
        deltas: for each map [facts, width]. best: the ones of the lowest loss so far.
        active: the facts that are not done.
    """

    def __init__(self, value_pass: ValuePass, facts: Sequence[Fact], norms: list[tuple[Tensor, ...]], settings: ValueSettings) -> None:
        self.value_pass = value_pass
        self.facts = facts
        self.settings = settings
        self.norms = norms
        self.reference = [pair[CLAMPS.index(settings.clamp_of)] for pair in norms]
        count = len(facts)
        self.deltas = [written.new_zeros(count, written.shape[1]).requires_grad_() for written in value_pass.written]
        self.moments = [(torch.zeros_like(delta), torch.zeros_like(delta)) for delta in self.deltas]
        self.best = torch.zeros_like(self.deltas[0])
        self.loss = torch.full((count,), math.inf)
        self.probability = torch.zeros(count)
        self.steps = torch.zeros(count, dtype=torch.long)
        self.at_argmax = torch.zeros(count, dtype=torch.long)
        self.stopped = [""] * count
        self.active = list(range(count))
        self.before: Tensor | None = None  # [facts, vocabulary] log-probabilities behind the edited token without a delta

    def run(self) -> list[Value]:
        for step in range(self.settings.steps):
            with torch.enable_grad():
                terms = _Terms.of(self.value_pass, self.deltas, len(self.facts), self.before)
                self.before = terms.behind
                loss = self._loss(terms)
            self._record(step, loss.detach().cpu(), terms)
            if step == self.settings.steps - 1 or not self.active:
                break
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss[self.active].sum(), self.deltas)
            self._update(step + 1, gradients)
            self.value_pass.keep(set(self.active))
        mlp, block = (norm.tolist() for norm in self.norms[0])
        return [
            Value(self.best[i].detach().float().cpu().clone(), mlp[i], block[i], float(self.loss[i]), float(self.probability[i]),
                  int(self.steps[i]), self.stopped[i] or "steps")
            for i in range(len(self.facts))
        ]  # fmt: skip

    def _loss(self, terms: _Terms) -> Tensor:
        """[facts]"""
        settings = self.settings
        weight = torch.where(terms.is_argmax, settings.argmax_weight, 1.0)
        decay = sum(delta.norm(dim=-1) / norm.square() for delta, norm in zip(self.deltas, self.reference, strict=True))
        return weight * terms.nll + settings.kl * terms.kl + settings.weight_decay * decay

    def _record(self, step: int, loss: Tensor, terms: _Terms) -> None:
        """Keeps the best deltas, and takes out the facts that are done."""
        settings = self.settings
        at_argmax, gives_target, kl = terms.is_argmax.cpu(), terms.gives_target.cpu(), terms.kl.detach().cpu()
        probability = terms.probability.cpu()
        for i in list(self.active):
            if not math.isfinite(float(loss[i])):
                raise _not_finite(self.facts[i], "loss", step)
            self.steps[i] += 1
            if loss[i] < self.loss[i]:
                self.loss[i], self.probability[i] = loss[i], probability[i]
                self.best[i] = self.deltas[0].detach()[i]
            self.at_argmax[i] += at_argmax[i]
            if step == 0 and gives_target[i]:
                self.stopped[i] = "no_op"
            elif loss[i] < settings.stop_loss:
                self.stopped[i] = "loss"
            elif settings.stop_at_argmax is not None and self.at_argmax[i] >= settings.stop_at_argmax:
                self.stopped[i] = "argmax"
            elif settings.stop_kl is not None and at_argmax[i] and kl[i] <= settings.stop_kl:
                self.stopped[i] = "kl"
            if self.stopped[i]:
                self.active.remove(i)

    def _update(self, step: int, gradients: Sequence[Tensor]) -> None:
        """One step of Adam and the projection. What it does to facts that are done is never read."""
        finite = torch.stack([gradient.isfinite().all(-1).cpu() for gradient in gradients]).all(0)
        for i in self.active:
            if not finite[i]:
                raise _not_finite(self.facts[i], "gradient", step)
        for delta, gradient, (first, second), norm in zip(self.deltas, gradients, self.moments, self.reference, strict=True):
            first.lerp_(gradient, 1 - _FIRST_MOMENT)
            second.lerp_(gradient.square(), 1 - _SECOND_MOMENT)
            scale = (second / (1 - _SECOND_MOMENT**step)).sqrt_().add_(_EPSILON)
            with torch.no_grad():
                delta.sub_(self.settings.lr / (1 - _FIRST_MOMENT**step) * first / scale)
                most = self.settings.clamp * norm[:, None]  # [facts, 1]
                length = delta.norm(dim=-1, keepdim=True)
                delta.copy_(torch.where(length > most, delta * (most / length), delta))


@dataclass(frozen=True, eq=False)
class _Terms:
    """What one evaluation gives, [facts] each.

    Attributes:
        nll: -log p(target) per token, mean over contexts. kl: behind the subject, against `behind`.
        is_argmax: every token of the target is the most probable one in all contexts; gives_target: in the prompt itself.
        probability: of the target per token, mean over contexts.
        behind: [facts, vocabulary] log-probabilities behind the edited token before there was a delta.
    """

    nll: Tensor
    kl: Tensor
    is_argmax: Tensor
    gives_target: Tensor
    probability: Tensor
    behind: Tensor

    @classmethod
    def of(cls, value_pass: ValuePass, deltas: Sequence[Tensor], count: int, behind: Tensor | None) -> _Terms:
        logits = value_pass.logits(deltas)  # [n, vocabulary]
        device = logits.device
        rows = value_pass.rows
        targets = torch.tensor([token for row in rows for token in row.targets or (-1,)], device=device)
        is_target = targets >= 0
        with_target = [row for row in rows if row.targets]
        row_of = torch.tensor([i for i, row in enumerate(with_target) for _ in row.targets], device=device)
        fact_of = torch.tensor([row.fact for row in with_target], device=device)
        weight = torch.tensor([row.weight for row in with_target], device=device)
        is_plain = torch.tensor([row.is_plain for row in with_target], device=device)
        lengths = torch.tensor([len(row.targets) for row in with_target], device=device)

        of_target = logits[is_target]
        summed = torch.zeros(len(with_target), device=device).index_add(0, row_of, target_logprobs(of_target, targets[is_target]))
        mean = summed / lengths  # [rows with a target]
        missed = torch.zeros_like(weight).index_add(0, row_of, (of_target.argmax(-1) != targets[is_target]).float())

        last = logits[~is_target].float().log_softmax(-1)  # [facts that are left, vocabulary]
        left = torch.tensor([row.fact for row in rows if not row.targets], device=device)
        if behind is None:
            behind = torch.zeros(count, last.shape[-1], device=device).index_copy(0, left, last.detach())
        kl = (behind[left].exp() * (behind[left] - last)).sum(-1)

        home = deltas[0].device
        nothing = torch.zeros(count, device=device)
        return cls(
            nothing.index_add(0, fact_of, -weight * mean).to(home),
            nothing.index_copy(0, left, kl).to(home),
            (nothing.index_add(0, fact_of, missed * (weight > 0)) == 0).to(home),
            nothing.index_add(0, fact_of, missed * is_plain) == 0,
            nothing.index_add(0, fact_of, weight * mean.detach().exp()),
            behind,
        )


# ---- errors


def _not_finite(fact: Fact, what: str, step: int) -> NonFiniteError:
    return NonFiniteError(
        f"the {what} of the value of '{fact.prompt}' -> '{fact.target}' is not finite",
        expected="finite numbers",
        found=f"NaN or infinity at step {step}",
        remedy="run the model in float32 or bfloat16, or lower the learning rate of its ValueSettings",
    )
