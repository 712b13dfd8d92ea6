"""SiteEdits: everything that one attachment does at one hook point, as the one function that the hook calls."""

from __future__ import annotations

from torch import Tensor

from steer.intervene.active import ActiveIntervention
from steer.intervene.gate import SiteGate
from steer.intervene.prepared import PreparedEdit
from steer.intervene.token_counter import TokenCounter
from steer.model.context import ForwardContext, in_backward


class SiteEdits:
    """The gates and interventions of one attachment at one hook point; gates see the activation before the edits.

    Attributes:
        plan_number: of the attachment among those stacked on the model.
        gates: gates that read here, with the names of their decisions.
        interventions: in the order of the plan.
        readings: names under which later edits find this activation, as the interventions leave it.
        counts_calls: some intervention is counted where it happens.
    """

    def __init__(self, counter: TokenCounter, plan_number: int) -> None:
        self.gates: list[tuple[SiteGate, str]] = []
        self.interventions: list[ActiveIntervention] = []
        self.readings: list[str] = []
        self.counter = counter
        self.plan_number = plan_number
        self.counts_calls = False

    @property
    def prepared(self) -> PreparedEdit | None:
        """The edit that a hook may make by itself, where there is nothing but one intervention without a gate."""
        if self.gates or self.readings or self.counts_calls or len(self.interventions) != 1 or self.interventions[0].gate is not None:
            return None
        return self.interventions[0].prepared

    def __call__(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        """The edited activation, h itself where nothing changes. h: [batch, tokens, width]."""
        for gate, name in self.gates:
            gate.read(h, ctx, name)
        for intervention in self.interventions:
            h = intervention(h, ctx)
        for name in self.readings:
            ctx.scratch.readings[name] = h
        if self.counts_calls and not in_backward():
            self.counter.called(self.interventions, ctx)
        return h
