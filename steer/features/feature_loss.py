"""Feature losses: a hinge or a target on the pre-activations of chosen features (after Deng et al. 2025, SASFT, arXiv 2507.14894)."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.checks import one_of
from steer.errors import ConfigError
from steer.features.chosen_features import ChosenFeatures
from steer.features.dictionary import Dictionary, Features
from steer.features.feature_edit import listed, origin_of, without_first
from steer.features.numbers import Numbers, per_feature
from steer.features.token_loss import TokenLoss
from steer.intervene.scope import Scope

READ = ("pre_activations", "activations")


class FeatureLoss(TokenLoss):
    """Keeps chosen features below or above bounds, or near a target, while a model is trained.

        mean over tokens and features of  max(p - high, 0) + max(low - p, 0)   or   (p - target)^2

    p is the pre-activation of a feature, which has a gradient where the feature is off, too. Only the rows of the chosen features are
    computed. Tokens that the dictionary was not trained on are left out.

    Args:
        dictionary: an autoencoder or a transcoder.
        features: one index or several.
        high, low: bounds; a number for all features or one for each, e.g. `mean_pre` of `feature_statistics` of the model before it is
            trained, on texts in which the features should be silent. Without any number `high` is the threshold above which each feature
            is on: the loss is 0 where it is off.
        target: instead of bounds.
        of: `pre_activations`, or `activations`, whose gradient is 0 where a feature is off.
        scope: on which tokens, as of an intervention.
        weight: factor in the training loss.
        name: unique among the losses of a run.
        rows: name of an entry of the training batch, [rows], that is true (not 0) for the rows in which the loss counts, e.g. for those in
            another language; None for all. A trainer of transformers does not hand it on to the model.

    Raises:
        ConfigError: bounds beside a target or in the wrong order; no number for a dictionary without thresholds; features that are none
            or named twice; a dictionary of several sites.

    Example:
        >>> silent = steer.features.feature_statistics(model, dictionary, rows, [3, 40])
        >>> loss = steer.FeatureLoss(dictionary, [3, 40], high=silent.mean_pre, scope="response", weight=0.1)
        >>> trainer = pl.Trainer(callbacks=[steer.callbacks.LossCallback([loss])])
    """

    def __init__(
        self,
        dictionary: Dictionary,
        features: Features,
        *,
        high: Numbers | None = None,
        low: Numbers | None = None,
        target: Numbers | None = None,
        of: str = READ[0],
        scope: Scope | str = "all",
        weight: float = 1.0,
        name: str = "",
        rows: str | None = None,
    ) -> None:
        self.chosen = ChosenFeatures(dictionary, features, "a feature loss")
        self.features = tuple(self.chosen.indices.tolist())
        self.origin = origin_of(dictionary)
        self.of = one_of(of, READ, "what a feature loss is of")
        self.max_norm = dictionary.untrained.max_norm
        site = dictionary.reads[0]
        super().__init__(site, scope, weight, name or f"feature_loss@{site}", rows)
        self.scope = without_first(self.scope, dictionary.untrained.first)
        numbers = {"high": high, "low": low, "target": target}
        given = {word: per_feature(value, list(self.features), word)[0, 0] for word, value in numbers.items() if value is not None}
        if "target" in given and len(given) > 1:
            raise _target_and_bounds(list(given))
        if not given:
            given = {"high": _threshold(dictionary, self.chosen.indices)}
        if len(given) == 2 and not bool((given["low"] <= given["high"]).all()):
            raise _empty_range(given)
        self.numbers = given  # [chosen] each

    def per_token(self, h: Tensor) -> Tensor:
        p = self.chosen.pre_activations(h) if self.of == READ[0] else self.chosen.activations(h)  # [batch, tokens, chosen]
        if next(iter(self.numbers.values())).device != p.device:
            self.numbers = {word: number.to(p.device) for word, number in self.numbers.items()}
        numbers = self.numbers
        if "target" in numbers:
            return (p - numbers["target"]).square().mean(-1)
        sides = [(p - numbers["high"]).relu()] if "high" in numbers else []
        sides += [(numbers["low"] - p).relu()] if "low" in numbers else []
        return torch.stack(sides).sum(0).mean(-1)

    def counts(self, h: Tensor) -> Tensor | None:
        return None if self.max_norm is None else h.detach().norm(dim=-1) <= self.max_norm

    def __repr__(self) -> str:
        words = "; ".join(f"{word} {', '.join(f'{n:.4g}' for n in number.tolist()[:6])}" for word, number in self.numbers.items())
        return f"{super().__repr__()[:-1]}: {self.of} of {listed(self.features, self.origin)}, {words})"


def _threshold(dictionary: Dictionary, indices: Tensor) -> Tensor:
    """[chosen] pre-activations above which features are on."""
    threshold = dictionary.threshold(indices)
    if threshold is None:
        raise _no_threshold(dictionary)
    return threshold.detach().float().expand(len(indices)).clone()


# ---- errors


def _target_and_bounds(given: list[str]) -> ConfigError:
    return ConfigError(
        "a feature loss has a target or bounds",
        expected="target=, or high= and low=",
        found=" and ".join(given),
        remedy="leave one of them out, or make two losses",
    )


def _no_threshold(dictionary: Dictionary) -> ConfigError:
    return ConfigError(
        f"the features of a {dictionary.activation_name} dictionary have no threshold that a loss could keep them below",
        expected="high=, low= or target=",
        found="none of them",
        remedy="measure it: high=steer.features.feature_statistics(model, dictionary, rows, features).mean_pre",
    )


def _empty_range(numbers: dict[str, Tensor]) -> ConfigError:
    found = " to ".join(str(numbers[name].tolist()[:6]) for name in ("low", "high"))
    return ConfigError("the range of a feature loss is empty", expected="low <= high", found=found, remedy="exchange the two")
