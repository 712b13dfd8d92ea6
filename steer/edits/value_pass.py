"""Passes of the value problem: texts run from the edited token on and from the edited block up, what comes before is read once.

A shift of what a block writes at one token changes neither earlier tokens nor lower blocks. So the tokens before it are read once into a
KV cache, and what reaches the edited block is kept; a step of the optimisation runs what is left. That this gives what whole passes give
is tried on the model at hand, and whole passes take its place where it does not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.errors import SteerError
from steer.model.anatomy import Anatomy
from steer.model.devices import input_device
from steer.model.logits_at import logits_at
from steer.model.prefix import (
    PROVEN,
    CachedPrefix,
    agree,
    empty_prefix,
    extended,
    may_share,
    prefix_batch,
    replaced_forwards,
    structure_of,
    windows_that_end,
)
from steer.model.resume import recorded_blocks, resumed
from steer.model.tokens import Row, collate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValueRow:
    """One text of a value problem.

    Attributes:
        ids: tokens up to the last one whose prediction is read.
        site: index of the edited token, the last one of the subject.
        fact: number of the fact that it belongs to.
        targets: the tokens predicted at the end of the text; none where the whole distribution after the edited token is read.
        weight: of its mean log-probability in the loss of its fact.
        is_plain: it is the prompt itself, without a context before it.
    """

    ids: tuple[int, ...]
    site: int
    fact: int
    targets: tuple[int, ...]
    weight: float
    is_plain: bool = False

    @property
    def read(self) -> range:
        """Indices of the tokens whose prediction is read."""
        return range(len(self.ids) - max(len(self.targets), 1), len(self.ids))


class ValuePass:
    """Passes over the rows of some facts, in which linear maps of one block give something else at the edited tokens.

    Args:
        layer: the block of the maps.
        maps: whose outputs are shifted: the down projection, for PMET the output projection of the attention too.
        is_resumed: run the rest of the texts from `layer` up; else whole texts through the whole model.

    Attributes:
        rows: the texts that are left.
        columns: [n] indices of the predictions that are read, into the tokens of all rows, one row after the other.
        written: for each map, [rows, width] what it gives at the edited tokens without a shift.
        stream: [rows, width] what the block gives there.
    """

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, layer: int, maps: Sequence[nn.Module], rows: Sequence[ValueRow], *, is_resumed: bool
    ) -> None:
        self.model = model
        self.anatomy = anatomy
        self.layer = layer
        self.maps = list(maps)
        self.rows = list(rows)
        self.is_resumed = is_resumed
        self.device = input_device(model)
        batch = collate([Row(row.ids[self._cut(row) :], 0) for row in rows], pad=0)
        self.batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        self._index()
        self.prefix = self._read_prefixes() if is_resumed else None
        self.record: Any = None  # what reaches the edited block
        self.written: list[Tensor] = []
        self._read_edited_block()

    def _cut(self, row: ValueRow) -> int:
        return row.site if self.is_resumed else 0

    def _index(self) -> None:
        """Works out where the edited tokens and the predictions lie among the rows that are left."""
        self.sites = torch.tensor([row.site - self._cut(row) for row in self.rows])
        self.facts = torch.tensor([row.fact for row in self.rows])
        width = self.batch["input_ids"].shape[1]
        self.columns = torch.tensor([i * width + token - self._cut(row) for i, row in enumerate(self.rows) for token in row.read])

    def _read_prefixes(self) -> CachedPrefix:
        batch = prefix_batch([row.ids[: row.site] for row in self.rows])
        nothing = empty_prefix(self.anatomy, len(self.rows))
        if not batch["input_ids"].shape[1]:
            return nothing
        logits_at(self.model, self.anatomy.unembedding, self._placed(nothing.continued(batch)), torch.zeros(0, dtype=torch.long))
        return extended(nothing, batch)

    def _read_edited_block(self) -> None:
        """Runs the rows up to the edited block, which fills `record`, `written` and `stream`."""
        written: dict[nn.Module, Tensor] = {}

        def recording(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                written[module] = self._at_sites(output)
                return output

            return record

        forwards = {module: recording(module, module.forward) for module in self.maps}
        depths = {self.layer, self.layer + 1} if self.is_resumed and self.layer else {self.layer + 1}
        with replaced_forwards(forwards), recorded_blocks(self.anatomy.blocks, depths) as records:
            logits_at(self.model, self.anatomy.unembedding, self._inputs(0), self.columns)
        output = records[self.layer + 1]
        self.written = [written[module] for module in self.maps]
        self.stream = self._at_sites(output if isinstance(output, Tensor) else output[0])
        self.record = records.get(self.layer) if self.is_resumed else None

    def _at_sites(self, output: Tensor) -> Tensor:
        """[rows, width] fp32 of [rows, tokens, width], or of the same with rows and tokens in one axis."""
        h = output.detach().reshape(len(self.rows), -1, output.shape[-1])
        return h[torch.arange(len(self.rows)), self.sites].float()

    def logits(self, deltas: Sequence[Tensor]) -> Tensor:
        """[n, vocabulary] predictions at `columns`; differentiable. deltas: for each map [facts, width], added to what it gives."""
        forwards = {module: self._shifted(module.forward, delta[self.facts]) for module, delta in zip(self.maps, deltas, strict=True)}
        depth = self.layer if self.is_resumed else 0
        with replaced_forwards(forwards), resumed(self.anatomy.blocks, depth, self.record, 1):
            return logits_at(self.model, self.anatomy.unembedding, self._inputs(depth), self.columns)

    def _shifted(self, forward: Callable[..., Any], shift: Tensor) -> Callable[..., Any]:
        """A map that gives `shift`, [rows, width], more at the edited tokens."""

        def shifted(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            h = output.reshape(len(self.rows), -1, output.shape[-1])  # [rows, tokens, width]: OPT's maps have rows and tokens in one axis
            places = (torch.arange(len(self.rows), device=h.device), self.sites.to(h.device))
            return h.index_put(places, shift.to(h), accumulate=True).view(output.shape)

        return shifted

    def keep(self, facts: set[int]) -> None:
        """Leaves out the rows of all other facts."""
        kept = torch.tensor([i for i, row in enumerate(self.rows) if row.fact in facts])
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in kept.tolist()]
        self.batch = {name: tensor[kept] for name, tensor in self.batch.items()}
        self._index()
        if self.prefix is not None:
            self.prefix = self.prefix.select(kept)
        if isinstance(self.record, Tensor):
            self.record = self.record[kept.to(self.record.device)]
        elif self.record is not None:
            self.record = type(self.record)((self.record[0][kept.to(self.record[0].device)], *self.record[1:]))

    def _inputs(self, depth: int) -> dict[str, Any]:
        """The arguments of a pass whose blocks below `depth` are skipped."""
        if self.prefix is None:
            return self._placed({**self.batch, "use_cache": False})
        return self._placed(self.prefix.lend(torch.arange(len(self.rows)), first_layer=depth).continued(self.batch))

    def _placed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def may_resume(model: nn.Module, anatomy: Anatomy, layer: int, maps: Sequence[nn.Module], rows: Sequence[ValueRow]) -> bool:
    """True when, on a few of the rows, the rest of the texts gives the predictions and gradients that whole texts give."""
    if anatomy.main is not anatomy or anatomy.stack.own_call is not None or not may_share(model):
        return False
    proven = PROVEN.setdefault(model, set())
    by_site = sorted(rows, key=lambda row: row.site)
    tried = list(dict.fromkeys([by_site[0], by_site[-1], min(rows, key=lambda row: len(row.ids) - row.site)]))
    try:
        windows = windows_that_end(anatomy, max(len(row.ids) for row in rows))
        way = ("value of an edit", layer, len(maps), structure_of(anatomy), windows)
        if way in proven:
            return True
        if windows:  # the longest text is the one that loses keys
            tried = list(dict.fromkeys([*tried, max(rows, key=lambda row: len(row.ids))]))
        whole, rest = (_trial(ValuePass(model, anatomy, layer, maps, tried, is_resumed=is_resumed)) for is_resumed in (False, True))
    except (SteerError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model may refuse a cache in any way
        log.info("values of edits are found by whole passes, since resumed ones failed: %s: %s", type(error).__name__, error)
        return False
    if all(agree(one, other) for one, other in zip(whole, rest, strict=True)):
        proven.add(way)
        return True
    log.info("values of edits are found by whole passes, since resumed ones give something else in this model")
    return False


def _trial(value_pass: ValuePass) -> list[Tensor]:
    """What one step reads: what the maps gave, log-probabilities under some shift, and their gradients."""
    facts = int(value_pass.facts.max()) + 1
    deltas = []
    for written in value_pass.written:
        noise = torch.randn(written.shape[1], generator=torch.Generator().manual_seed(0)).to(written.device)
        shift = noise * (written.norm(dim=-1).mean() / noise.norm())
        deltas.append(shift.expand(facts, -1).clone().requires_grad_())
    with torch.enable_grad():
        logprobs = value_pass.logits(deltas).float().log_softmax(-1)
        gradients = torch.autograd.grad(logprobs[:, 0].sum(), deltas)
    return [*value_pass.written, logprobs.detach(), *gradients]
