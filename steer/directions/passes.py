"""Passes of a sweep: one batch of texts under several plans, of which everything that all of them have in common runs once.

Three things are in common. The unembedding is only asked for the tokens whose prediction is read. Blocks below the first site of a plan
give the same in all of its row slots, and in all plans. A prefix that texts share is read once, or once a slot where it is steered too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.intervene import Plan
from steer.intervene.expansion import sites_in
from steer.model.anatomy import Anatomy
from steer.model.annotations import response_tokens
from steer.model.devices import input_device
from steer.model.logits_at import logits_at
from steer.model.prefix import CachedPrefix, empty_prefix, extended, prefix_batch
from steer.model.resume import recorded_blocks, resumed
from steer.model.tokens import Row, collate


@dataclass(frozen=True, eq=False)
class SlottedPlan:
    """A plan that is not attached, and how many row slots it has."""

    plan: Plan
    slots: int


@dataclass(frozen=True, eq=False)
class Wanted:
    """The tokens of a batch whose next token is predicted, n of them.

    Attributes:
        place: [n] which text of the batch; column: [n] which of its tokens.
        targets: [n] the token that follows, -1 after the last one.
    """

    place: Tensor
    column: Tensor
    targets: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], predict: str) -> Wanted:
        """Of every text each token before one of the `response`, or the `last` token."""
        place: list[int] = []
        column: list[int] = []
        targets: list[int] = []
        for i, row in enumerate(rows):
            last = len(row.ids) - 1
            start, stop = (last, last + 1) if predict == "last" else (max(row.prompt - 1, 0), last)
            place += [i] * (stop - start)
            column += range(start, stop)
            targets += [-1] if predict == "last" else row.ids[start + 1 :]
        return cls(torch.tensor(place), torch.tensor(column), torch.tensor(targets))


@dataclass(frozen=True, eq=False)
class ReadPrefixes:
    """Prefixes that were read: `unsteered`, and under each plan (the same object where plans leave them alone)."""

    unsteered: CachedPrefix
    steered: list[CachedPrefix]


class Passes:
    """Runs batches under several plans.

    Args:
        plans: each is attached while its own passes run.
        share: blocks below a plan's first site run once for all slots; prefixes may be shared.
        gather: the unembedding gets the wanted tokens only.

    Attributes:
        depths: how many blocks run once for all slots, by plan.
        steers_prefix: plans act on every token, and on prefixes too; else they leave prefixes alone.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy | None, plans: Sequence[SlottedPlan], *, share: bool, gather: bool) -> None:
        self.model = model
        self.anatomy = anatomy
        self.plans = plans
        self.depths = [unchanged_blocks(anatomy, entry.plan) if share and anatomy is not None else 0 for entry in plans]
        self.steers_prefix = any(not acts_on_responses(entry.plan) for entry in plans)
        self.head = anatomy.unembedding if gather and anatomy is not None else None
        self.device = input_device(model)

    def no_prefixes(self) -> ReadPrefixes:
        """Where reading prefixes starts from: one of no tokens."""
        assert self.anatomy is not None
        return ReadPrefixes(empty_prefix(self.anatomy, 1), [empty_prefix(self.anatomy, entry.slots) for entry in self.plans])

    def read_prefixes(self, before: ReadPrefixes, of: Tensor, prefixes: Sequence[tuple[int, ...]]) -> ReadPrefixes:
        """Runs prefixes, under every plan that acts on them.

        Args:
            before: prefixes that these continue.
            of: [prefixes] which of them each continues.
            prefixes: token ids.
        """
        batch = prefix_batch(prefixes)
        nothing = torch.zeros(0, dtype=torch.long)
        unsteered = before.unsteered.select(of)
        if not self.steers_prefix:
            self._logits(unsteered.continued(batch), nothing)
            read = extended(unsteered, batch)
            return ReadPrefixes(read, [read] * len(self.plans))
        records = self._records(unsteered.continued(batch))
        steered = []
        for number, entry in enumerate(self.plans):
            slots = torch.arange(entry.slots)
            repeated = _repeated(batch, entry.slots)
            prefix = self._prefix_of_rows(number, before, of, slots, CachedPrefix.select)
            self._steered(number, slots, records, prefix.continued(repeated), repeated["attention_mask"] < 0, nothing)
            steered.append(extended(prefix, repeated))
        return ReadPrefixes(extended(unsteered, batch), steered)

    def logits(
        self, rows: Sequence[Row], wanted: Wanted, prefixes: ReadPrefixes | None, of: Tensor, slots: Mapping[int, Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Runs a batch under every plan in turn.

        Args:
            rows: the texts, without the prefixes.
            of: [batch] the prefix of each text.
            slots: the row slots to run, by number of the plan.

        Yields:
            Number of the plan, and logits [slots, n wanted, vocabulary].
        """
        batch = collate(rows, pad=0)
        response = batch.pop("labels") != -100
        records = {}
        if any(self.depths):
            records = self._records({**batch, "use_cache": False} if prefixes is None else prefixes.unsteered.lend(of).continued(batch))
        tokens = batch["input_ids"].numel()
        flat = wanted.place * batch["input_ids"].shape[1] + wanted.column
        for number, chosen in slots.items():
            repeated = _repeated(batch, len(chosen))
            inputs: dict[str, Any] = {**repeated, "use_cache": False}
            if prefixes is not None:
                inputs = self._prefix_of_rows(number, prefixes, of, chosen, CachedPrefix.lend).continued(repeated)
            columns = (torch.arange(len(chosen))[:, None] * tokens + flat).flatten()  # [slots * n]
            logits = self._steered(number, chosen, records, inputs, response.repeat(len(chosen), 1), columns)
            yield number, logits.unflatten(0, (len(chosen), -1))

    def _prefix_of_rows(
        self, number: int, prefixes: ReadPrefixes, of: Tensor, slots: Tensor, take: Callable[..., CachedPrefix]
    ) -> CachedPrefix:
        """The prefix of every row of a batch, slot after slot, by `select` or `lend`. Blocks that are skipped only ask how long it is."""
        depth = self.depths[number]
        if not self.steers_prefix:
            return take(prefixes.unsteered, of.repeat(len(slots)), first_layer=depth)
        count = len(prefixes.unsteered.mask)
        rows = (slots[:, None] * count + of).flatten()
        return take(prefixes.steered[number], rows, first_layer=depth, below=prefixes.unsteered.cache)

    def _records(self, inputs: dict[str, Any]) -> dict[int, Any]:
        """What reaches the depths of all plans, in a pass without them."""
        depths = {depth for depth in self.depths if depth}
        if not depths:
            return {}
        assert self.anatomy is not None
        with recorded_blocks(self.anatomy.blocks, depths) as records:
            self.model(**self._placed(inputs))
        return records

    def _steered(
        self, number: int, slots: Tensor, records: dict[int, Any], inputs: dict[str, Any], response: Tensor, columns: Tensor
    ) -> Tensor:
        """[n, vocabulary] logits of the flat `columns` under one plan, in a pass that begins at the plan's depth."""
        entry, depth = self.plans[number], self.depths[number]
        blocks = self.anatomy.blocks if self.anatomy is not None else []
        with entry.plan.attached(self.model, stack=True) as attachment, resumed(blocks, depth, records.get(depth), len(slots)):
            if entry.slots > 1:
                attachment.set_rows(slots.repeat_interleave(len(response) // len(slots)))
            with response_tokens(self.model, response):
                return self._logits(inputs, columns)

    def _logits(self, inputs: dict[str, Any], columns: Tensor) -> Tensor:
        """[n, vocabulary]. columns: [n] indices into the tokens of all rows, one row after the other."""
        return logits_at(self.model, self.head, self._placed(inputs), columns.to(self.device))

    def _placed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def unchanged_blocks(anatomy: Anatomy, plan: Plan) -> int:
    """How many blocks, from the first, give the same with a plan as without it."""
    depths = []
    for intervention in plan.interventions:
        for site in sites_in(intervention, anatomy):
            if intervention.gate is not None or site.module is not None or site.part == "embed":
                return 0
            layer = anatomy.n_layers if site.layer is None else site.layer  # final_norm and logits come after all blocks
            depths.append(layer + 1 if site.part == "output" else layer)
    return min(depths)


def acts_on_responses(plan: Plan) -> bool:
    """True when a plan leaves prompts alone, whatever they are."""
    scopes = [intervention.scope for intervention in plan.interventions]
    return all(selector.kind == "response" for scope in scopes for selector in scope.selectors)


def may_split(plan: Plan) -> bool:
    """True when a plan does the same to a text whose beginning runs in a pass of its own: it acts on responses, or on all tokens."""
    if any(intervention.gate is not None for intervention in plan.interventions):
        return False
    return acts_on_responses(plan) or all(str(intervention.scope) == "all" for intervention in plan.interventions)


def reads_logits(anatomy: Anatomy, plan: Plan) -> bool:
    """True when a plan acts on the logits, where it has to see those of all tokens."""
    return any(site.part == "logits" for intervention in plan.interventions for site in sites_in(intervention, anatomy))


def _repeated(batch: dict[str, Tensor], slots: int) -> dict[str, Tensor]:
    """[slots * batch, tokens], one copy of the whole batch after the other."""
    return {name: batch[name].repeat(slots, 1) for name in ("input_ids", "attention_mask")}
