"""What grows with the number of interventions, sites, row slots or cached tokens: making plans, attaching them, driving them, decoding.

Imports of `steer` are public names only, so that older checkouts can be measured.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from hook_timer import HookTimer, per_pass
from models import PROMPT, decoded, random_ids, tiny_llama
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import steer

SMALL, USUAL = 8, 64  # widths
PARTS = ("attn.output", "mlp.output", "output")
LAYERS = 30  # of the model with a site in each
PADDING = 3  # tokens
WARM_UP = 3  # decode steps


class Workload:
    """Cases by name, each a function that measures itself once.

    Args:
        arguments: interventions (of the large plan), layers (of the model with many sites, three sites each), caches ([rows, tokens] of
            long caches), together (interventions at one site), rows (numbers of row slots), repeats (of one measurement).
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.repeats = arguments["repeats"]
        self.notes: list[str] = []
        ALL_ATTENTION_FUNCTIONS.register("none", _no_attention)
        count, layers, together = (arguments[name] for name in ("interventions", "layers", "together"))
        self.shallow = tiny_llama(1, USUAL)
        self.usual = tiny_llama(LAYERS, USUAL)
        self.deep = tiny_llama(layers, SMALL)
        self.long = tiny_llama(1, SMALL, positions=1 << 20, attention="none")
        self.cases: dict[str, Callable[[], float]] = {
            "make": partial(self._make, interventions(count, scope="all")),
            "make, interventions too": lambda: self._repeated(lambda _: steer.Plan(interventions(count, scope="all"))),
            "make, equal names": partial(self._make, interventions(count, scope="all", name="steered")),
            "set_window": partial(self._drive, count, lambda attachment, number: attachment.set_window(0, 100 + number)),
            "step": partial(self._drive, count, lambda attachment, number: attachment.step(number)),
            "attach": partial(self._attach, layers),
            "adds at a site": partial(self._at_a_site, ["all"] * together),
            "windows at a site": partial(self._at_a_site, [f"generated[:{1000 + number}]" for number in range(together)]),
        }
        for rows, tokens in arguments["caches"]:
            self.cases[f"window, cache {rows}x{tokens}"] = partial(self._cached, "generated[:100000]", rows, tokens)
        self.cases[f"all, cache {rows}x{tokens}"] = partial(self._cached, "all", rows, tokens)
        for slots in arguments["rows"]:
            self.cases[f"row slots {slots}"] = partial(self._rows, slots)

    def measure(self, case: str) -> dict[str, float]:
        """Milliseconds of CPU time for what is done between passes; microseconds inside hooks a pass for what is done in passes."""
        gc.disable()  # a collection takes longer than what is measured
        try:
            return {"value": self.cases[case]()}
        finally:
            gc.enable()

    # ---- between passes: milliseconds, median over the repeats

    def _repeated(self, action: Callable[[int], Any]) -> float:
        taken = []
        for number in range(1, self.repeats + 2):
            started = time.process_time()
            action(number)
            taken.append(1e3 * (time.process_time() - started))
        return statistics.median(taken[1:])  # the first one fills caches

    def _make(self, parts: list[Any]) -> float:
        return self._repeated(lambda _: steer.Plan(parts))

    def _drive(self, count: int, action: Callable[[Any, int], None]) -> float:
        """Calls `action` on an attached plan, with a new number each time."""
        with _attached(self.usual, steer.Plan(interventions(count, scope="generated[:32]"))) as attachment:
            return self._repeated(partial(action, attachment))

    def _attach(self, layers: int) -> float:
        vector = torch.ones(SMALL)
        sites = [f"layers.{layer}.{part}" for layer in range(layers) for part in PARTS]
        plan = steer.Plan([steer.Intervention(steer.Add(vector), site) for site in sites])
        return self._repeated(lambda _: plan.attach(self.deep).detach())

    # ---- in passes: microseconds inside hooks a pass

    def _hooked(self, model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> float:
        """Microseconds inside hooks in a decode step after the prompt `ids`."""
        passes = []
        with torch.no_grad(), HookTimer(model) as timer:
            for arguments in itertools.islice(decoded(model, ids, mask), WARM_UP + 3 * self.repeats):
                timer.reset()
                model(**arguments)
                passes.append(timer.nanoseconds)
        return per_pass(passes[WARM_UP:])

    def _at_a_site(self, scopes: list[str]) -> float:
        vector = torch.full((USUAL,), 0.01)
        plan = steer.Plan([steer.Intervention(steer.Add(vector), "layers.0.output", scope=scope) for scope in scopes])
        with _attached(self.shallow, plan):
            return self._hooked(self.shallow, random_ids(self.shallow, 1, PROMPT))

    def _cached(self, scope: str, rows: int, tokens: int) -> float:
        plan = steer.Plan([steer.Intervention(steer.Add(torch.full((SMALL,), 0.01)), "layers.0.output", scope=scope)])
        mask = torch.ones(rows, tokens, dtype=torch.long)
        mask[0, :PADDING] = 0
        with _attached(self.long, plan):
            return self._hooked(self.long, random_ids(self.long, rows, tokens), mask)

    def _rows(self, slots: int) -> float:
        vectors = torch.full((slots, USUAL), 0.01)
        plan = steer.Plan([steer.Intervention(steer.Add(vectors), f"layers.{layer}.output") for layer in range(LAYERS)])
        with _attached(self.usual, plan) as attachment:
            attachment.set_rows(list(range(slots)))
            return self._hooked(self.usual, random_ids(self.usual, slots, PROMPT))


def interventions(count: int, *, scope: str, name: str = "") -> list[Any]:
    """As many additions over all layers; `name` for all of them, or names that differ."""
    vector = torch.full((USUAL,), 0.01)
    return [
        steer.Intervention(steer.Add(vector), f"layers.{number % LAYERS}.output", scope=scope, name=name or f"addition {number}")
        for number in range(count)
    ]


@contextmanager
def _attached(model: nn.Module, plan: Any) -> Iterator[Any]:
    attachment = plan.attach(model)
    try:
        yield attachment
    finally:
        attachment.detach()


def _no_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Replaces attention, so that a prompt of 131,072 tokens takes no time: every token sees only itself.

    Args:
        query: [batch, heads, tokens, head size].
    """
    return query.transpose(1, 2).contiguous(), None
