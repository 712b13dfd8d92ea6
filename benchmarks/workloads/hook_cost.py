"""What a hook costs where it runs: the time inside hooks in the decode steps of a model, one site a layer.

A case is an edit made by a hook written by hand, with the fewest operations that do the same, by `steer`, or by another library. All cases
edit the output of every layer. Imports of `steer` are public names only, so that older checkouts can be measured.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from hook_timer import HookTimer, per_pass
from models import PROMPT, decoded, random_ids, read_model, tiny_llama
from torch import Tensor

ROWS = 8
TINY_LAYERS = 30
LIMIT = 0.5  # of the projection, on either side, for clamps
WARM_UP = 2  # decode steps
Attached = Callable[[], AbstractContextManager[Any]]
Edit = Callable[[Tensor], Tensor]


class Case(NamedTuple):
    """One way to make one edit.

    Attributes:
        attached: makes a context manager that holds the hooks.
        rows: texts that are decoded together.
    """

    attached: Attached
    rows: int = 1


def hand_add(vector: Tensor) -> Edit:
    return lambda h: h + vector


# A product and a sum cost less here than a matrix product with one column, and `vector_norm` less than `Tensor.norm`.


def hand_ablate(unit: Tensor) -> Edit:
    """h - (h·u) u"""
    return lambda h: torch.addcmul(h, (h * unit).sum(-1, keepdim=True), unit, value=-1)


def hand_clamp(unit: Tensor) -> Edit:
    """h + (clamp(h·u) - h·u) u"""

    def edit(h: Tensor) -> Tensor:
        projection = (h * unit).sum(-1, keepdim=True)  # [batch, tokens, 1]
        return torch.addcmul(h, projection.clamp(-LIMIT, LIMIT) - projection, unit)

    return edit


def hand_gate(unit: Tensor, vector: Tensor) -> Edit:
    """h + v where h·w > 0"""
    return lambda h: torch.addcmul(h, (h * unit).sum(-1, keepdim=True) > 0, vector)


def hand_norm_kept(vector: Tensor) -> Edit:
    """(h + v) |h| / |h + v|"""
    norm = torch.linalg.vector_norm

    def edit(h: Tensor) -> Tensor:
        added = h + vector
        return added * (norm(h, dim=-1, keepdim=True) / norm(added, dim=-1, keepdim=True))

    return edit


def hand_rows(vectors: Tensor) -> Edit:
    """Each row of the batch gets its own vector, picked when the rows are set. vectors: [slots, width]."""
    of_rows = vectors[torch.arange(ROWS)][:, None]  # [batch, 1, width]
    return lambda h: h + of_rows


class Workload:
    """Cases on one model, one site at the output of each layer.

    Args:
        arguments: model (a folder, or `tiny`), steps (decode steps of one measurement), peer (another library, or None for `steer`).

    Attributes:
        cases: by name; `timer` calls a hook that does nothing.
        notes: what cannot be measured here, and why.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        folder = arguments["model"]
        self.model = tiny_llama(TINY_LAYERS, 64) if folder == "tiny" else read_model(folder)
        self.layers = list(self.model.model.layers)
        self.steps = arguments["steps"]
        self.notes: list[str] = []
        width, random = self.model.config.hidden_size, torch.Generator().manual_seed(1)
        self.vectors = 0.05 * torch.randn(len(self.layers), ROWS, width, generator=random)  # [layers, rows, width]
        units = torch.randn(len(self.layers), width, generator=random)
        self.units = units / units.norm(dim=-1, keepdim=True)  # [layers, width]
        peer = arguments.get("peer")
        edits = self._hand_cases() | self._steer_cases() if peer is None else {f"{peer}: add": Case(self._peer(peer))}
        self.cases = {"timer": Case(self._unedited), **edits}

    def measure(self, case: str) -> dict[str, float]:
        """Microseconds per pass inside hooks and outside of them, and the number of hook calls.

        Hooks are timed by the wall clock, whose reading disturbs them less than that of CPU time; steps by the CPU time of their thread.
        """
        chosen = self.cases[case]
        in_hooks: list[list[int]] = []
        steps: list[float] = []
        ids = random_ids(self.model, chosen.rows, PROMPT)
        with torch.no_grad(), chosen.attached(), HookTimer(self.model) as timer:
            passes = decoded(self.model, ids)
            for step in range(WARM_UP + self.steps):
                arguments = next(passes)
                timer.reset()
                started = time.thread_time_ns()
                self.model(**arguments)
                taken = time.thread_time_ns() - started
                if step >= WARM_UP:
                    in_hooks.append(timer.nanoseconds)
                    steps.append(taken / 1e3)
        hooks = per_pass(in_hooks)
        return {"hooks_us": hooks, "rest_us": statistics.median(steps) - hooks, "calls": len(in_hooks[0]), "sites": len(self.layers)}

    # ---- by hand

    def _hand_cases(self) -> dict[str, Case]:
        add = [hand_add(vectors[0]) for vectors in self.vectors]
        each = list(zip(self.units, self.vectors[:, 0], strict=True))
        return {
            "hand: add": Case(partial(self._by_hand, add)),
            "hand again: add": Case(partial(self._by_hand, add)),
            "hand: ablate": Case(partial(self._by_hand, [hand_ablate(unit) for unit in self.units])),
            "hand: clamp": Case(partial(self._by_hand, [hand_clamp(unit) for unit in self.units])),
            "hand: gate": Case(partial(self._by_hand, [hand_gate(unit, vector) for unit, vector in each])),
            "hand: norm kept": Case(partial(self._by_hand, [hand_norm_kept(vector) for _, vector in each])),
            "hand: rows": Case(partial(self._by_hand, [hand_rows(vectors) for vectors in self.vectors]), ROWS),
        }

    @contextmanager
    def _by_hand(self, edits: list[Edit]) -> Iterator[None]:
        def hook_of(edit: Edit) -> Callable[..., Tensor]:
            def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
                return edit(output)

            return hook

        handles = [layer.register_forward_hook(hook_of(edit)) for layer, edit in zip(self.layers, edits, strict=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _unedited(self) -> Iterator[None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            return None

        handles = [layer.register_forward_hook(hook) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ---- by steer

    def _steer_cases(self) -> dict[str, Case]:
        import steer

        def plan(make: Callable[[Tensor, Tensor], Any], **options: Callable[[Tensor], Any] | Any) -> Any:
            """One intervention a layer; an option that is a function is called with the layer's unit vector."""
            return steer.Plan(
                [
                    steer.Intervention(
                        make(vectors[0], unit),
                        f"layers.{layer}.output",
                        **{name: value(unit) if callable(value) else value for name, value in options.items()},
                    )
                    for layer, (vectors, unit) in enumerate(zip(self.vectors, self.units, strict=True))
                ]
            )

        def add(vector: Tensor, unit: Tensor) -> Any:
            return steer.Add(vector)

        of_rows = steer.Plan([steer.Intervention(steer.Add(v), f"layers.{layer}.output") for layer, v in enumerate(self.vectors)])
        plans = {
            "add": plan(add),
            "ablate": plan(lambda vector, unit: steer.Ablate(unit)),
            "clamp": plan(lambda vector, unit: steer.Clamp(unit, low=-LIMIT, high=LIMIT)),
            "gate": plan(add, gate=lambda unit: steer.ProbeGate(unit)),
            "norm kept": plan(add, preserve_norm=True),
            "window": plan(add, scope="generated[:100000]"),
        }
        cases = {f"steer: {edit}": Case(partial(self._by_plan, edit_plan)) for edit, edit_plan in plans.items()}
        return {**cases, "steer: rows": Case(partial(self._by_plan, of_rows, list(range(ROWS))), ROWS)}

    @contextmanager
    def _by_plan(self, plan: Any, rows: list[int] | None = None) -> Iterator[None]:
        attachment = plan.attach(self.model)
        try:
            if rows is not None:
                attachment.set_rows(rows)
            yield
        finally:
            attachment.detach()

    # ---- by another library

    def _peer(self, name: str) -> Attached:
        return {"steering-vectors": self._steering_vectors, "repsteer": self._repsteer}[name]()

    def _by_layer(self) -> dict[int, Tensor]:
        return {layer: vectors[0] for layer, vectors in enumerate(self.vectors)}

    def _steering_vectors(self) -> Attached:
        library = importlib.import_module("steering_vectors")
        steering_vector = library.SteeringVector(layer_activations=self._by_layer())
        return lambda: steering_vector.apply(self.model)

    def _repsteer(self) -> Attached:
        library = importlib.import_module("repsteer")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model.name_or_path)
        wrapped = library.models.from_model(self.model, tokenizer=tokenizer, model_id="embedded", revision="1")

        def addition(layer: int, vector: Tensor) -> Any:
            site = library.sites.resid_post(layer)
            metadata = library.artifacts.ArtifactMetadata(model_id="embedded", model_revision="1", site=site, hidden_size=len(vector))
            return library.Intervention(
                artifact=library.artifacts.DirectionArtifact(metadata=metadata, direction=vector),
                operator=library.operators.Add(),
                positions=library.positions.AllTokens(),
                strength=library.schedules.Constant(1.0),
            )

        plan = library.SteeringPlan([addition(layer, vector) for layer, vector in self._by_layer().items()])
        return lambda: wrapped.steer(plan)
