"""Which plans are the same function in every pass: only those can leave the hooks."""

from __future__ import annotations

from collections.abc import Collection

from steer.checks import of_type
from steer.errors import DeployError
from steer.intervene.affine import Affine, affine_form
from steer.intervene.intervention import Intervention
from steer.intervene.plan import Plan
from steer.intervene.schedules.constant import Constant
from steer.model.context import PHASES

AT_RUN_TIME = "keep it at run time: `with plan.attached(model):`"


def constant_edits(plan: Plan, carrier: str, phases: Collection[str] = PHASES) -> list[tuple[Intervention, Affine]]:
    """The interventions of a plan that do something, with their affine forms.

    Args:
        carrier: what they are to be put into, for the errors.
        phases: those that the carrier cannot tell apart.

    Raises:
        DeployError: an intervention that depends on the token, the row, the phase or the step, or is not an affine function of the
            activation; or a plan that does nothing.
    """
    of_type(plan, Plan, "the plan", "pass a steer.Plan first")
    edits = []
    for one in plan.interventions:
        steady = isinstance(one.schedule, Constant)
        if not one.enabled or not any(one.strength) or steady and not bool(one.strength_at(plan.step).any()):
            continue  # switched off
        missing = [phase for phase in PHASES if phase in phases and phase not in one.phases]
        for wrong, expected, found, remedy in (
            (one.slots > 1, "one vector and strength for every row", f"{one.slots} row slots", "export one plan for each slot"),
            (str(one.scope) != "all", "scope 'all'", f"scope '{one.scope}'", "give it scope='all'"),
            (one.gate is not None, "no gate", f"gate {one.gate}", "leave the gate out"),
            (one.preserve_norm, "preserve_norm=False", "preserve_norm=True", "leave it out"),
            (not steady, "a constant schedule", one.schedule, "set the strength that it is to have for good"),
            (bool(missing), f"the phases {', '.join(sorted(phases))}", f"only {', '.join(one.phases)}", "give it all of them"),
            ("policy" not in one.roles, "the role policy", ", ".join(one.roles), "add it to the roles"),
        ):
            if wrong:
                raise cannot_carry(one, carrier, expected, found, remedy)
        edit = affine_form(one.operator, one.strength_at(plan.step))
        if edit is None:
            expected = "an edit that is an affine function of the activation"
            raise cannot_carry(one, carrier, expected, f"'{one.operator.name}'", "choose another operator")
        edits.append((one, edit))
    if not edits:
        raise DeployError(
            f"there is nothing to put into {carrier}",
            expected="an intervention that is switched on, with a strength other than 0",
            found=f"{len(plan.interventions)} that do nothing",
            remedy="give it a strength, or attachment.as_plan() of one that was switched on",
        )
    return edits


def cannot_carry(one: Intervention, carrier: str, expected: object, found: object, remedy: str) -> DeployError:
    return DeployError(f"{carrier} cannot carry '{one.name}'", expected=expected, found=found, remedy=f"{remedy}, or {AT_RUN_TIME}")
