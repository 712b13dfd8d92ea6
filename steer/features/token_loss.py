"""Losses of activations, token by token, which the loss callbacks add to the loss that a trainer trains with."""

from __future__ import annotations

from torch import Tensor, nn

from steer.checks import finite_number, of_type
from steer.intervene.scope import Scope
from steer.model.context import ForwardContext
from steer.model.hook_registration import AFTER_EDITS
from steer.model.site import Site


class TokenLoss:
    """A loss of the activation at one site: the mean of `per_token` over the tokens of a scope, times a weight.

    A subclass says what it is of a token. Nothing of it changes when it is added to a training run.

    Args:
        site: which activation. scope: on which tokens, as of an intervention.
        weight: factor in the training loss.
        name: unique among the losses of a run.
        rows: name of an entry of the training batch, [rows], that is true (not 0) for the rows in which the loss counts; None for all.

    Attributes:
        order: where it reads among the edits at its site; as they leave the activation, unless a subclass says otherwise.

    Raises:
        ConfigError: a scope or a weight that is none.
    """

    order = AFTER_EDITS

    def __init__(self, site: Site, scope: Scope | str, weight: float, name: str, rows: str | None = None) -> None:
        of_type(scope, (str, Scope), f"the scope of '{name}'", "write it as text, e.g. 'response'")
        of_type(name, str, "the name of a loss", "pass text, or leave it out")
        of_type(rows, (str, type(None)), f"`rows` of '{name}'", "name an entry of the batch, or leave it out")
        finite_number(weight, f"the weight of '{name}'", above=0)
        self.site, self.scope, self.weight, self.name, self.rows = site, Scope.parse(scope), float(weight), name, rows

    def __repr__(self) -> str:
        return f"{type(self).__name__}('{self.name}' at {self.site} on {self.scope} tokens, weight {self.weight:.4g})"

    def check_model(self, model: nn.Module) -> None:
        """Raises ConfigError for a model that cannot be trained with this loss."""

    def per_token(self, h: Tensor) -> Tensor:
        """[batch, tokens] fp32 or fp64. h: [batch, tokens, width] fp32 or fp64."""
        raise NotImplementedError

    def of_pass(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        """The same for a pass whose texts it may have to know: token ids, attention mask."""
        return self.per_token(h)

    def counts(self, h: Tensor) -> Tensor | None:
        """[batch, tokens] bool, False for tokens that are left out for what their activation is; None when there are none of these."""
        return None
