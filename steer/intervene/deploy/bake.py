"""Baking: a plan becomes part of the weights. A constant goes into a bias, an ablation turns W into W - Q Q^T W.

Rounding aside the model then does without hooks what it did with the plan, for every token that is not padding, while dropout is off. That
is proved on random tokens, in float32, before a weight changes (`steer.intervene.deploy.check`). In half precision the two round
differently, but neither is nearer to the exact result than the other.
"""

from __future__ import annotations

from torch import nn

from steer.errors import DeployError
from steer.intervene.deploy.baked import Baked
from steer.intervene.deploy.check import Check
from steer.intervene.deploy.constant import AT_RUN_TIME, cannot_carry, constant_edits
from steer.intervene.deploy.fold import Fold, check_sites, fold
from steer.intervene.deploy.savable import make_savable
from steer.intervene.plan import Plan
from steer.model.anatomy import Anatomy

_UNTIE = "load it with tie_word_embeddings=False and give it a copy of the embedding as head, or use steer.to_adapter"


def bake(plan: Plan, model: nn.Module, *, savable: bool = True) -> Baked:
    """Moves a plan into the weights of a model.

    A plan can be baked when all its interventions act alike in every pass (scope `all`, constant strength, no gate, one row slot, all
    phases), are affine functions of the activation, and stand where a linear map takes or gives exactly their activation: constants at
    embed, the residual stream, attention and MLP; ablation and other projections at embed, attention and MLP.

    Args:
        plan: not attached.
        model: dense weights, raw or wrapped. Under PEFT, constants only, and only for interventions with the role `reference`, since
            the pass without adapters has the same weights.
        savable: refuse what `save_pretrained` and `from_pretrained` would lose: a bias that the family has no setting for. Where it
            has one (`mlp_bias`, `attention_bias`), the setting is switched on and the other maps that it speaks of get a bias of 0.
            False for a model that stays in this process.

    Returns:
        A handle that undoes it to the bit, by `undo()` or at the end of a `with` block.

    Raises:
        DeployError: a plan, model or site for which it would not be exact; the model is as it was.
        AttachError: something is attached to the model.
        SiteError, WidthError, WrongModelError: the plan does not fit the model.
    """
    anatomy, carrier = Anatomy.find(model), "a bake"
    edits = constant_edits(plan, carrier)
    check_sites(edits, carrier)
    check = Check(anatomy, [one for one, _ in edits], plan.fingerprint, carrier)
    if any(hasattr(module, "base_layer") for module in model.modules()):
        for one, _ in edits:
            if "reference" not in one.roles:
                expected = "roles=('policy', 'reference'): the pass without adapters has the same weights"
                raise cannot_carry(one, carrier, expected, f"only {', '.join(one.roles)} on a PEFT model", "give it both roles")
    folds = fold(anatomy, edits, carrier)
    for made in folds:
        _check_untied(model, made)
    check.prove(folds)
    baked = Baked()
    try:
        for made in folds:
            baked.apply(made)
        if savable:
            make_savable(anatomy, baked)
        baked.error = check.compare()
        baked.seal()
    except BaseException:
        baked.undo()
        raise
    return baked


def _check_untied(model: nn.Module, made: Fold) -> None:
    """Raises DeployError when a weight that changes is used by another module too."""
    if made.keeps_weight:
        return
    users = [path for path, module in model.named_modules() if any(one is made.parameter for one in module._parameters.values())]
    if len(users) > 1:
        raise DeployError(
            f"a bake cannot change '{made.path}', whose weight other modules use too",
            expected="a weight of its own",
            found=f"one weight in {' and '.join(users)}",
            remedy=f"{_UNTIE}, or {AT_RUN_TIME}",
        )
