"""A penalty that keeps learned gains of features few (L1) or small (L2)."""

from __future__ import annotations

from torch import Tensor

from steer.checks import number_within, of_type
from steer.errors import ConfigError
from steer.features.operators.feature_adapter import FeatureAdapter
from steer.features.operators.feature_gains import FeatureGains
from steer.features.token_loss import TokenLoss
from steer.intervene import Intervention, Plan
from steer.model.hook_registration import AFTER_EDITS, BEFORE_EDITS


class GainPenalty(TokenLoss):
    """l1 * sum_j |c_j| + l2 * sum_j c_j^2 of the changes c that `FeatureGains` or a `FeatureAdapter` of a plan makes, mean over its tokens.

    Of constant gains c is how far gain and offset are from 1 and 0; of an adapter, what it gives for the token.

    Args:
        plan: with the operator that learns; the plan that the steering callback of the same run has.
        l1, l2: at least one of them.
        intervention: its name, where the plan has several of the kind.
        weight: factor in the training loss.
        name: unique among the losses of a run.

    Raises:
        ConfigError: no such operator, or several; an earlier edit of the plan at its site, which changes what it reads; row slots.

    Example:
        >>> gains = steer.FeatureGains(dictionary, [5, 7, 40]).train()
        >>> plan = steer.Plan(steer.Intervention(gains, dictionary.writes[0]))
        >>> penalty = steer.features.GainPenalty(plan, l1=0.02)
        >>> callbacks = [SteeringCallback(plan, learning_rate=1e-2), LossCallback([penalty])]
    """

    def __init__(
        self, plan: Plan, *, l1: float = 0.0, l2: float = 0.0, intervention: str | None = None, weight: float = 1.0, name: str = ""
    ) -> None:
        of_type(plan, Plan, "the plan of a gain penalty", "pass the Plan of the steering callback")
        for word, value in (("l1", l1), ("l2", l2)):
            number_within(value, f"`{word}` of a gain penalty", 0.0)
        if not l1 and not l2:
            raise _no_penalty()
        learned = _learned(plan, intervention)
        operator = learned.operator
        assert isinstance(operator, FeatureGains | FeatureAdapter)
        if operator.slots > 1:
            raise _row_slots(learned, operator.slots)
        self.operator, self.l1, self.l2 = operator, float(l1), float(l2)
        self.order = BEFORE_EDITS if operator.reads_at is None else AFTER_EDITS
        earlier = plan.interventions[: plan.interventions.index(learned)]
        if operator.reads_at is None and (other := next((each for each in earlier if str(learned.site) == str(each.site)), None)):
            raise _edited_before(learned, other)
        super().__init__(operator.reads_at or learned.single_site, learned.scope, weight, name or f"gain_penalty@{learned.single_site}")

    def per_token(self, h: Tensor) -> Tensor:
        changes = self.operator.changes(h)  # [batch, tokens, chosen]
        return self.l1 * changes.abs().sum(-1) + self.l2 * changes.square().sum(-1)

    def counts(self, h: Tensor) -> Tensor | None:
        longest = self.operator.max_norm
        return None if longest is None else h.detach().norm(dim=-1) <= longest


def _learned(plan: Plan, name: str | None) -> Intervention:
    """The intervention that is meant."""
    kinds = [each for each in plan.interventions if isinstance(each.operator, FeatureGains | FeatureAdapter)]
    found = [each for each in kinds if name in (None, each.name)]
    if len(found) != 1:
        raise _which_intervention(name, [each.name for each in kinds])
    return found[0]


# ---- errors


def _no_penalty() -> ConfigError:
    return ConfigError("a gain penalty has no coefficient", expected="l1=, l2= or both, above 0", found="neither", remedy="e.g. l1=0.02")


def _which_intervention(name: str | None, known: list[str]) -> ConfigError:
    return ConfigError(
        "it is not clear whose gains are penalised",
        expected="one intervention with FeatureGains or a FeatureAdapter",
        found=f"'{name}', and {', '.join(known) or 'none'} in the plan" if name else ", ".join(known) or "none in the plan",
        remedy="pass intervention=, the name of one of them" if known else "pass the plan that learns gains",
    )


def _row_slots(intervention: Intervention, slots: int) -> ConfigError:
    return ConfigError(
        f"'{intervention.name}' has gains for each row slot, and a penalty does not know the rows",
        expected="one set of gains",
        found=f"{slots} row slots",
        remedy="learn one at a time",
    )


def _edited_before(intervention: Intervention, other: Intervention) -> ConfigError:
    return ConfigError(
        f"a penalty cannot read what '{intervention.name}' reads",
        expected=f"no earlier edit at {intervention.site}",
        found=f"'{other.name}'",
        remedy="put the intervention that learns first in the plan",
    )
