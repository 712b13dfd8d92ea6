"""Baking: a plan becomes part of the weights. A constant goes into a bias, an ablation turns W into W - Q Q^T W.

Rounding aside the model then does without hooks what it did with the plan, for every token that is not padding, while dropout is off. That
is proved on random tokens, in float32, before a weight changes (`steer.intervene.deploy.check`). In half precision the two round
differently, but neither is nearer to the exact result than the other.
"""

from __future__ import annotations

import warnings

from torch import nn

from steer.checks import level_of_caller
from steer.errors import DeployError
from steer.intervene.deploy.baked import Baked
from steer.intervene.deploy.check import Check
from steer.intervene.deploy.constant import AT_RUN_TIME, cannot_carry, constant_edits
from steer.intervene.deploy.placement import check_sites, weight_edits
from steer.intervene.deploy.savable import make_savable
from steer.intervene.deploy.weight_edit import WeightEdit
from steer.intervene.intervention import Intervention
from steer.intervene.plan import Plan
from steer.model.anatomy import Anatomy
from steer.model.devices import check_weights_are_there

_CARRIER = "a bake"
ROUGH, MUCH = 0.01, 100  # a relative difference from the plan that is said, where it is so many times that in float32


def bake(plan: Plan, model: nn.Module, *, savable: bool = True) -> Baked:
    """Moves a plan into the weights of a model.

    A plan can be baked when all its interventions act alike in every pass (scope `all`, constant strength, no gate, one row slot, all
    phases), are affine functions of the activation, and stand where a linear map takes or gives exactly their activation: constants at
    embed, the residual stream, attention and MLP; ablation and other projections at embed, attention and MLP.

    Args:
        plan: not attached to this model.
        model: dense weights, raw or wrapped. A head that is tied to an embedding which changes gets a copy of it first. Under PEFT,
            constants only, and only for interventions with the role `reference`, since the pass without adapters has the same weights.
        savable: refuse what `save_pretrained` and `from_pretrained` would lose: a bias that the family has no setting for. Where it
            has one (`mlp_bias`, `attention_bias`), the setting is switched on and the other maps that it speaks of get a bias of 0.
            False for a model that stays in this process.

    Returns:
        A handle that undoes it to the bit, by `undo()` or at the end of a `with` block. A warning says where rounding, in half precision,
        takes the model more than 1 % from the plan.

    Raises:
        DeployError: a plan, model or site for which it would not be exact; the model is as it was.
        AttachError: something is attached to the model.
        SiteError, WidthError, WrongModelError: the plan does not fit the model.

    Example:
        >>> steer.bake(steer.Plan(steer.Intervention(steer.Add(vector), "layers.12.output")), model)
        >>> model.save_pretrained("baked")
    """
    anatomy = Anatomy.find(model)
    check_weights_are_there(model, _CARRIER)
    edits = constant_edits(plan, _CARRIER, anatomy)
    check_sites(edits, _CARRIER)
    interventions = [intervention for intervention, _ in edits]
    check = Check(anatomy, interventions, plan.fingerprint, _CARRIER)
    if any(hasattr(module, "base_layer") for module in model.modules()):  # PEFT's
        for intervention in interventions:
            if "reference" not in intervention.roles:
                raise _reference_not_steered(intervention)
    edits_of_weights = weight_edits(anatomy, edits, _CARRIER)
    check.prove(edits_of_weights)
    baked = Baked()
    try:
        if any(weight_edit.module is anatomy.embedding for weight_edit in edits_of_weights):
            baked.untie(anatomy)
        for weight_edit in edits_of_weights:
            _check_untied(model, weight_edit)
        for weight_edit in edits_of_weights:
            baked.apply(weight_edit)
        if savable:
            make_savable(anatomy, baked)
        baked.error = check.compare()
        baked.seal()
        if baked.error > max(ROUGH, MUCH * check.error_in_float32):
            warnings.warn(_rounding(baked, check), stacklevel=level_of_caller())
        return baked
    except BaseException as error:  # also of an interrupt as it returns, after which nobody could undo it
        baked.__exit__(type(error), error, error.__traceback__)
        raise


def _check_untied(model: nn.Module, weight_edit: WeightEdit) -> None:
    """Raises DeployError when a weight that changes is used by another module too."""
    if weight_edit.changes_bias_only:
        return
    users = []
    for path, module in model.named_modules():
        if any(parameter is weight_edit.parameter for parameter in module._parameters.values()):
            users.append(path)
    if len(users) > 1:
        raise _tied_weight(weight_edit, users)


# ---- errors


def _rounding(baked: Baked, check: Check) -> str:
    dtype = str(check.steered.dtype).removeprefix("torch.")
    return (
        f"with the plan in its weights the model is {baked.error:.2%} off from the plan at run time, in {dtype}; in float32 it is "
        f"{check.error_in_float32:.1e}. That is rounding of {dtype}, which the plan at run time has too: to bake in float32 and convert "
        "the weights afterwards gives no more. Keep them in float32 where it matters"
    )


def _reference_not_steered(intervention: Intervention) -> DeployError:
    return cannot_carry(
        intervention,
        _CARRIER,
        expected="roles=('policy', 'reference'): the pass without adapters has the same weights",
        found=f"only {', '.join(intervention.roles)} on a PEFT model",
        remedy="give it both roles",
    )


def _tied_weight(weight_edit: WeightEdit, users: list[str]) -> DeployError:
    return DeployError(
        f"{_CARRIER} cannot change '{weight_edit.path}', whose weight other modules use too",
        expected="a weight of its own",
        found=f"one weight in {' and '.join(users)}",
        remedy=f"use steer.to_adapter, or {AT_RUN_TIME}",
    )
