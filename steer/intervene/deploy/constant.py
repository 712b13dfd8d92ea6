"""Constant edits: the plans that are the same function in every pass. Only those can leave the hooks."""

from __future__ import annotations

from collections.abc import Collection

from steer.checks import of_type
from steer.errors import DeployError
from steer.intervene.affine import Affine, affine_form
from steer.intervene.expansion import at_single_sites
from steer.intervene.intervention import Intervention
from steer.intervene.plan import Plan
from steer.intervene.schedules.constant import Constant
from steer.model.anatomy import Anatomy
from steer.model.context import PHASES
from steer.model.sites import examples_of

AT_RUN_TIME = "keep it at run time: `with plan.attached(model):`"


def constant_edits(
    plan: Plan, carrier: str, anatomy: Anatomy | None, phases: Collection[str] = PHASES
) -> list[tuple[Intervention, Affine]]:
    """The interventions of a plan that do something, with their affine forms.

    Args:
        anatomy: of a model, in which an intervention at several sites is one at each; None where there is no model to look at.
        carrier: what they are to be put into, for the errors.
        phases: those that the carrier cannot tell apart.

    Raises:
        DeployError: an intervention that depends on the token, the row, the phase or the step, or is not an affine function of the
            activation; or a plan that does nothing.
    """
    of_type(plan, Plan, "the plan", "pass a steer.Plan first")
    edits: list[tuple[Intervention, Affine]] = []
    for intervention in plan.interventions:
        if not _acts(intervention, plan.step):
            continue
        _check_constant(intervention, carrier, phases)
        edit = affine_form(intervention.operator, intervention.strength_at(plan.step))
        if edit is None:
            raise _not_affine(intervention, carrier)
        placed = [intervention] if anatomy is None else at_single_sites([intervention], anatomy.model, anatomy)[0]
        edits += [(at_site, edit) for at_site in placed]
    if not edits:
        raise _nothing_to_carry(plan, carrier)
    return edits


def _acts(intervention: Intervention, step: int) -> bool:
    """It is switched on, with a strength other than 0 now or under its schedule later."""
    if not intervention.enabled or not any(intervention.strength):
        return False
    return not isinstance(intervention.schedule, Constant) or bool(intervention.strength_at(step).any())


def _check_constant(intervention: Intervention, carrier: str, phases: Collection[str]) -> None:
    """Raises DeployError for an intervention that acts differently on some rows, tokens, phases or steps."""
    for site in examples_of(intervention.site):
        if site.stack is not None:
            remedy = "name the site without a stack where it is that of the text"
            raise cannot_carry(intervention, carrier, "a site of the stack that the tokens of a text go through", str(site), remedy)
    if intervention.slots > 1:
        raise _depends_on_row(intervention, carrier)
    if str(intervention.scope) != "all":
        raise _depends_on_token(intervention, carrier)
    if intervention.gate is not None:
        raise cannot_carry(intervention, carrier, "no gate", f"gate {intervention.gate}", "leave the gate out")
    if intervention.preserve_norm:
        raise cannot_carry(intervention, carrier, "preserve_norm=False", "preserve_norm=True", "leave it out")
    if not isinstance(intervention.schedule, Constant):
        raise _depends_on_step(intervention, carrier)
    if not set(phases) <= set(intervention.phases):
        raise _depends_on_phase(intervention, carrier, phases)
    if "policy" not in intervention.roles:
        raise cannot_carry(intervention, carrier, "the role policy", ", ".join(intervention.roles), "add it to the roles")


# ---- errors


def cannot_carry(intervention: Intervention, carrier: str, expected: object, found: object, remedy: str) -> DeployError:
    """The error of an intervention that a carrier cannot carry exactly; every remedy ends in keeping it at run time."""
    what = f"{carrier} cannot carry '{intervention.name}'"
    return DeployError(what, expected=expected, found=found, remedy=f"{remedy}, or {AT_RUN_TIME}")


def _depends_on_row(intervention: Intervention, carrier: str) -> DeployError:
    found = f"{intervention.slots} row slots"
    return cannot_carry(intervention, carrier, "one vector and strength for every row", found, "export one plan for each slot")


def _depends_on_token(intervention: Intervention, carrier: str) -> DeployError:
    return cannot_carry(intervention, carrier, "scope 'all'", f"scope '{intervention.scope}'", "give it scope='all'")


def _depends_on_step(intervention: Intervention, carrier: str) -> DeployError:
    remedy = "set the strength that it is to have for good"
    return cannot_carry(intervention, carrier, "a constant schedule", intervention.schedule, remedy)


def _depends_on_phase(intervention: Intervention, carrier: str, phases: Collection[str]) -> DeployError:
    expected = f"the phases {', '.join(sorted(phases))}"
    return cannot_carry(intervention, carrier, expected, f"only {', '.join(intervention.phases)}", "give it all of them")


def _not_affine(intervention: Intervention, carrier: str) -> DeployError:
    return cannot_carry(
        intervention,
        carrier,
        expected="an edit that is an affine function of the activation",
        found=f"'{intervention.operator.name}'",
        remedy="choose another operator",
    )


def _nothing_to_carry(plan: Plan, carrier: str) -> DeployError:
    return DeployError(
        f"there is nothing to put into {carrier}",
        expected="an intervention that is switched on, with a strength other than 0",
        found=f"{len(plan.interventions)} that do nothing",
        remedy="give it a strength, or attachment.as_plan() of one that was switched on",
    )
