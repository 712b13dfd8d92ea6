"""Handover: an attached plan goes into the weights while an engine of its own, vLLM for instance, copies them for the next rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from steer.checks import of_type
from steer.errors import AttachError, DeployError
from steer.intervene.attachment import Attachment
from steer.intervene.deploy.baked import Baked
from steer.intervene.deploy.check import Check
from steer.intervene.deploy.constant import constant_edits
from steer.intervene.deploy.placement import check_sites, weight_edits
from steer.intervene.deploy.weight_edit import WeightEdit
from steer.intervene.intervention import Intervention
from steer.intervene.plan import Plan
from steer.intervene.schedules.constant import Constant
from steer.model.anatomy import Anatomy
from steer.model.context import PHASES
from steer.model.devices import check_weights_are_there
from steer.model.tied import tied_head

_CARRIER = "a handover of weights"
_PHASE = "generate"


class Handover:
    """Gives an engine that samples rollouts from copied weights what an attached plan does in the phase `generate`.

    The engine keeps the parameters that it was made with. So an edit has to fit into weights and biases that the model has already: a
    constant at a block whose last map has no bias is refused, and so is an edit of an embedding that shares its weight with the head.
    Otherwise the conditions are those of `steer.bake`, except that a schedule is allowed: the strengths are those of the moment.

    Args:
        plan: its interventions in the phase `generate` are handed over. Not attached yet: that the edited weights do what the plan does
            is proved here, once, on random tokens in float32.
        model: as it trains, under PEFT too (constants only). Its weights may change afterwards, its modules may not.

    Raises:
        DeployError: an intervention that the weights cannot carry exactly, or that needs a parameter which the model has not.
        AttachError: something is attached to the model.
        SiteError, WidthError, WrongModelError: the plan does not fit the model.

    Example:
        >>> ablation = steer.Plan(steer.Intervention(steer.Ablate(vector), "layers.12.mlp.output"))
        >>> handover = steer.Handover(ablation, model)
        >>> with ablation.attached(model) as attachment, handover.weights(attachment):
        ...     engine.load_weights(model.named_parameters())
    """

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        of_type(plan, Plan, "the plan of a handover", "pass a steer.Plan first")
        self.plan = plan
        self.anatomy = Anatomy.find(model)
        check_weights_are_there(model, _CARRIER)
        in_rollouts = [each for each in plan.interventions if _PHASE in each.phases and each.enabled]
        if not in_rollouts:
            raise _nothing_in_rollouts(plan)
        edits = constant_edits(_for_good({each: each.strength for each in in_rollouts}, plan), _CARRIER, self.anatomy)
        check_sites(edits, _CARRIER)
        weights = weight_edits(self.anatomy, edits, _CARRIER)
        for weight_edit in weights:
            self._check_engine_has_it(weight_edit)
        Check(self.anatomy, [intervention for intervention, _ in edits], plan.fingerprint, _CARRIER).prove(weights)

    def __repr__(self) -> str:
        return f"Handover({self.plan})"

    @contextmanager
    def weights(self, attachment: Attachment) -> Iterator[Baked]:
        """The weights hold what the plan does now, at the strengths and with the learned tensors of this moment, until the block ends.

        Args:
            attachment: of the plan, on this model. Its hooks stay, so a pass of this model within the block is steered twice.

        Raises:
            AttachError: an attachment of another plan.
            DeployError: a weight that was written within the block, and would be lost.
        """
        of_type(attachment, Attachment, "what a handover puts into the weights", "pass what plan.attach(model) returned")
        if attachment.plan is not self.plan:
            raise _another_plan(attachment.plan, self.plan)
        with Baked() as baked:
            for weight_edit in self._weight_edits_now(attachment):
                baked.apply(weight_edit)
            baked.seal()
            yield baked

    def _weight_edits_now(self, attachment: Attachment) -> list[WeightEdit]:
        strengths = {}
        for intervention in attachment.as_plan().interventions:
            active = attachment[intervention.name]
            strength = tuple(active.strength.flatten().tolist())  # with schedule and switch
            if _PHASE in active.phases and any(strength):
                strengths[intervention] = strength
        if not strengths:  # a schedule that begins at 0
            return []
        return weight_edits(self.anatomy, constant_edits(_for_good(strengths, self.plan), _CARRIER, self.anatomy), _CARRIER)

    def _check_engine_has_it(self, weight_edit: WeightEdit) -> None:
        """Raises DeployError for an edit that needs a parameter of its own."""
        if weight_edit.kind == "linear" and weight_edit.bias is None and weight_edit.change().shifts:
            raise _no_bias(weight_edit)
        if weight_edit.module is self.anatomy.embedding and tied_head(self.anatomy) is not None:
            raise _tied_to_head(weight_edit)


def _for_good(interventions: dict[Intervention, tuple[float, ...]], plan: Plan) -> Plan:
    """A plan of these interventions at these strengths, in every pass."""
    constant = [
        dataclasses.replace(each, strength=strength, schedule=Constant(), phases=PHASES) for each, strength in interventions.items()
    ]
    return Plan(constant, fingerprint=plan.fingerprint)


# ---- errors


def _nothing_in_rollouts(plan: Plan) -> DeployError:
    return DeployError(
        f"there is nothing to put into {_CARRIER}",
        expected=f"an intervention that is switched on in the phase '{_PHASE}'",
        found=f"{len(plan.interventions)} interventions, none of them",
        remedy=f"name '{_PHASE}' among the phases",
    )


def _another_plan(found: Plan, expected: Plan) -> AttachError:
    return AttachError(
        "a handover is for the plan that it was proved with",
        expected=repr(expected),
        found=repr(found),
        remedy="make a Handover of this plan before it is attached",
    )


def _no_bias(weight_edit: WeightEdit) -> DeployError:
    return DeployError(
        f"{_CARRIER} cannot change '{weight_edit.path}' by a constant: an engine has only the parameters that the model has",
        expected="a bias",
        found=f"{type(weight_edit.module).__name__} without one",
        remedy="ablate instead of adding, steer a map that has a bias, or load model and engine from a checkpoint with the bias "
        "(mlp_bias=True or attention_bias=True in the configuration of a family that has them)",
    )


def _tied_to_head(weight_edit: WeightEdit) -> DeployError:
    return DeployError(
        f"{_CARRIER} cannot change '{weight_edit.path}', whose weight the head uses too",
        expected="an embedding of its own",
        found="one weight for both, which the engine has as one, too",
        remedy="load model and engine from an untied checkpoint (steer.load(untie=True), save_pretrained), or leave the embedding out",
    )
