"""Mask learning as a LightningModule: gates of candidates are trained, the model around them is frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from steer.circuits.gates import CandidateGates
from steer.circuits.terms import Term
from steer.circuits.text_passes import TextPasses
from steer.circuits.texts import Batch, Texts
from steer.errors import NonFiniteError
from steer.intervene import Attachment
from steer.model.anatomy import Anatomy
from steer.model.capture import evaluating
from steer.model.logits_at import logits_at, lone_head
from steer.model.own_calls import texts_call
from steer.model.tokens import Row

Draw = list[list[int]]  # items of each term in one step
_SHORT = 128  # tokens


class TermPasses:
    """Runs the prompts of several terms together: each prompt once, those of similar length in one pass.

    Args:
        terms: whose prompts may be asked for.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, terms: Sequence[Term]) -> None:
        rows = list(dict.fromkeys(row for term in terms for item in term.items for row in item))
        self.passes = TextPasses(model, anatomy, Texts(rows), max_tokens=max(len(row.ids) for row in rows))
        self.place = {row: place for place, row in enumerate(rows)}

    def logits(self, wanted: Sequence[tuple[Row, slice]], *, gradients: bool) -> dict[tuple[int, str], Tensor]:
        """[tokens, vocabulary] by `key`: logits of rows at some of their tokens."""
        by_row: dict[int, dict[str, slice]] = {}
        for row, tokens in wanted:
            by_row.setdefault(self.place[row], {})[repr(tokens)] = tokens
        found: dict[tuple[int, str], Tensor] = {}
        for group in self._of_similar_length(list(by_row)):
            inside = [{name: range(self.passes.texts.lengths[row])[tokens] for name, tokens in by_row[row].items()} for row in group]
            places = [sorted({place for tokens in of_row.values() for place in tokens}) for of_row in inside]
            logits = self._at_places(self.passes.batch(group), places, gradients)
            for number, of_row, kept, wanted_there in zip(group, logits, places, inside, strict=True):
                for name, chosen in wanted_there.items():
                    found[number, name] = of_row if list(chosen) == kept else of_row[[kept.index(place) for place in chosen]]
        return found

    def _at_places(self, batch: Batch, places: list[list[int]], gradients: bool) -> Sequence[Tensor]:
        """[places, vocabulary] of each row of a batch, padded at its right."""
        passes, width = self.passes, batch.ids.shape[1]
        head = lone_head(passes.model, passes.anatomy.unembedding)
        if head is not None and texts_call(passes.model, passes.anatomy) is passes.model:
            columns = torch.tensor([row * width + place for row, of_row in enumerate(places) for place in of_row])
            inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
            with evaluating(passes.model), torch.set_grad_enabled(gradients), _attention(batch, gradients):
                logits = logits_at(passes.model, head, inputs, columns)  # [places of all rows, vocabulary]
        else:
            at_all = sorted({place for of_row in places for place in of_row})
            padded = passes.run_batch(batch, {}, gradients=gradients, places=torch.tensor(at_all))
            assert padded is not None
            chosen = [row * len(at_all) + at_all.index(place) for row, of_row in enumerate(places) for place in of_row]
            logits = padded.flatten(0, 1)[chosen]
        # rows are taken apart at once: each taken alone would have a gradient as large as all of them
        return logits.split([len(of_row) for of_row in places])

    def key(self, row: Row, tokens: slice) -> tuple[int, str]:
        return self.place[row], repr(tokens)

    def _of_similar_length(self, rows: list[int]) -> Iterator[list[int]]:
        """Groups of which none is padded by more than half and a few tokens: short prompts are not run at the length of neutral text."""
        lengths = self.passes.texts.lengths
        group: list[int] = []
        for row in sorted(rows, key=lambda row: lengths[row]):
            if group and lengths[row] > 1.5 * lengths[group[0]] + 4:
                yield group
                group = []
            group.append(row)
        if group:
            yield group


@dataclass(eq=False)
class MaskData:
    """What the steps of a run draw, and what the unedited model gives there.

    Attributes:
        draws: by step. unedited: value by term and item, of those that a step draws.
    """

    terms: Sequence[Term]
    draws: list[Draw]
    unedited: list[dict[int, Tensor]] = field(default_factory=list)

    @classmethod
    def drawn(cls, terms: Sequence[Term], steps: int, seed: int) -> MaskData:
        random = torch.Generator().manual_seed(seed)
        return cls(terms, [[term.draw(random) for term in terms] for _ in range(steps)])

    @torch.no_grad()
    def look(self, passes: TermPasses, max_tokens: int = 512) -> None:
        """Runs the unedited model on what the steps will draw. max_tokens: of a pass, whose log-probabilities are in memory in fp32."""
        for number, term in enumerate(self.terms):
            values: dict[int, Tensor] = {}
            items = sorted({item for draw in self.draws for item in draw[number]}) if term.compares else []
            per_pass = max(1, max_tokens // max(sum(len(row.ids) for row in item) for item in term.items))
            for start in range(0, len(items), per_pass):
                chosen = items[start : start + per_pass]
                found = values_of(term, passes, chosen, gradients=False)
                values |= {item: _compact(value) for item, value in zip(chosen, found, strict=True)}
            self.unedited.append(values)


def values_of(term: Term, passes: TermPasses, items: Sequence[int], *, gradients: bool) -> list[Tensor]:
    """Of one term alone."""
    logits = passes.logits([(row, term.tokens) for item in items for row in term.items[item]], gradients=gradients)
    return _values(term, passes, items, logits)


def _values(term: Term, passes: TermPasses, items: Sequence[int], logits: Mapping[tuple[int, str], Tensor]) -> list[Tensor]:
    return [term.value([logits[passes.key(row, term.tokens)] for row in term.items[item]], item) for item in items]


def _compact(value: Tensor) -> Tensor:
    """Numbers as they are; log-probabilities of a vocabulary in fp16, which holds all that occur and needs half the memory."""
    return value if value.dim() == 0 else value.half().cpu()


class MaskTraining(pl.LightningModule):
    """Trains gates: the weighted sum of the terms, and of the sizes of the gates by kind.

    The model is no part of the module, so that nothing moves, saves or trains it; the plan is attached by the module while it trains, since
    gates are moved to their device before.

    Attributes:
        history: losses by step, unweighted, by the name of a term, and `size`, the sum of all amounts.
    """

    def __init__(
        self,
        passes: TermPasses,
        gates: CandidateGates,
        data: MaskData,
        *,
        sparsity: dict[str, float],
        lr: float,
        after_step: Callable[[float], None],
    ) -> None:
        super().__init__()
        self.gates = nn.ParameterList(gates.parameters)
        self.passes, self.candidates, self.data = passes, gates, data
        self.sparsity, self.lr, self.after_step = sparsity, lr, after_step
        self.history: list[dict[str, float]] = []
        self.attachment: Attachment | None = None
        self._attached_alone: bool | None = None

    # ---- the plan on the model

    def switch(self, alone: bool | None) -> None:
        """Attaches the plan that ablates the circuit, the one that leaves it alone, or none."""
        if self._attached_alone is alone:
            return
        if self.attachment is not None and self.attachment.is_attached:
            self.attachment.detach()
        self.attachment, self._attached_alone = None, None
        if alone is not None:
            self.attachment = self.candidates.plan(alone=alone).attach(self.passes.passes.model)
            self._attached_alone = alone

    # ---- training

    def train_dataloader(self) -> list[int]:
        return list(range(len(self.data.draws)))  # a batch is the number of a step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.gates, lr=self.lr, betas=(0.85, 0.97))
        steps = len(self.data.draws)
        # the last two fifths of the steps settle what the noise of small draws left moving
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (steps - step) / (0.4 * steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, step: int, index: int) -> Tensor:
        draw = self.data.draws[step]
        losses: dict[str, Tensor] = {}
        total = self.candidates.penalty(self.sparsity)
        for alone in (False, True):
            chosen = [number for number, term in enumerate(self.data.terms) if term.alone is alone]
            if not chosen:
                continue
            self.switch(alone)
            terms = [self.data.terms[number] for number in chosen]
            wanted = [
                (row, term.tokens) for number, term in zip(chosen, terms, strict=True) for item in draw[number] for row in term.items[item]
            ]
            logits = self.passes.logits(wanted, gradients=True)
            for number, term in zip(chosen, terms, strict=True):
                loss = self._loss(number, draw[number], logits)
                losses[_unique(term.name, losses)] = loss
                total = total + term.weight * loss.to(total.device)
        self._note(step, losses, total)
        return total

    def _loss(self, number: int, items: Sequence[int], logits: Mapping[tuple[int, str], Tensor]) -> Tensor:
        """Mean over the items of a term."""
        term, unedited = self.data.terms[number], self.data.unedited[number]
        costs = []
        for item, value in zip(items, _values(term, self.passes, items, logits), strict=True):
            before = unedited.get(item)
            costs.append(term.cost(value, None if before is None else before.to(value.device)))
        return torch.stack(costs).mean()

    def _note(self, step: int, losses: dict[str, Tensor], total: Tensor) -> None:
        if not bool(torch.isfinite(total.detach())):
            raise _diverged(step, losses)
        with torch.no_grad():
            size = sum(float(each.ablating.amounts().sum()) for each in self.candidates.sites)
        self.history.append({**{name: float(loss.detach()) for name, loss in losses.items()}, "size": size})
        self.after_step(float(total.detach()))

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        self.candidates.cut_off()


def _attention(batch: Batch, gradients: bool) -> AbstractContextManager[None]:
    """Attention by plain products where the fused one is slow: on the CPU, in bfloat16, backwards (4 times at 10 tokens, 2 at 128)."""
    is_slow = gradients and batch.ids.device.type == "cpu" and torch.is_autocast_enabled("cpu") and batch.ids.shape[1] <= _SHORT
    return sdpa_kernel(SDPBackend.MATH) if is_slow else nullcontext()


def _unique(name: str, taken: Mapping[str, object]) -> str:
    number = 2
    unique = name
    while unique in taken:
        unique = f"{name}#{number}"
        number += 1
    return unique


def _diverged(step: int, losses: dict[str, Tensor]) -> NonFiniteError:
    return NonFiniteError("the loss of mask learning is not finite", expected="a finite number",
                          found=f"step {step}: {({name: float(loss.detach()) for name, loss in losses.items()})}",
                          remedy="lower lr, or look at the logits of these prompts")  # fmt: skip
