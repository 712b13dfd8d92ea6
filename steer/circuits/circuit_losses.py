"""Losses that weaken a circuit while a model is trained: its activations towards their mean, or the model towards one without it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from steer.checks import finite_number, of_type
from steer.circuits.circuit import Circuit
from steer.circuits.component_scores import ComponentScores
from steer.errors import ConfigError, ContextError, WrongModelError
from steer.features.token_loss import TokenLoss
from steer.intervene import Plan
from steer.intervene.scope import Scope
from steer.model.context import ForwardContext
from steer.model.own_calls import texts_call
from steer.model.restoring import restoring
from steer.model.site import Site


class CircuitActivationLoss(TokenLoss):
    """Squared distance of a circuit's activations from what takes their place, the weighted mean over its channels at one site.

    Args:
        channels: [width] weight of each channel, 0 for those outside of the circuit. constant: [width].
    """

    def __init__(self, site: Site, channels: Tensor, constant: Tensor, scope: Scope | str, weight: float, name: str) -> None:
        super().__init__(site, scope, weight, name)
        self.channels, self.constant = channels.float() / channels.float().sum(), constant.float()

    def per_token(self, h: Tensor) -> Tensor:
        if self.channels.device != h.device:
            self.channels, self.constant = self.channels.to(h.device), self.constant.to(h.device)
        return ((h - self.constant).square() * self.channels).sum(-1)  # [batch, tokens]


def circuit_losses(
    model: nn.Module, circuit: Circuit, *, scores: ComponentScores | None = None, scope: Scope | str = "all", weight: float = 1.0
) -> list[CircuitActivationLoss]:
    """Losses for `LossCallback`, one for each site, that draw the activations of a circuit to the constants of its ablation.

    Together they are weight * sum over channels of w (h - constant)^2 / sum of w, with w = amount * |score| of the channel's component.

    Args:
        scores: of the components, to which weight is in proportion; amounts alone for None.
        scope: the tokens on which activations count, see `steer.Scope`.

    Raises:
        ConfigError: no ablation with constants, an empty circuit, or scores that are all zero in it. WrongModelError.

    Example:
        >>> callback = LossCallback(circuit_losses(model, circuit, scores=scores, weight=0.1))
    """
    anatomy = circuit.check_model(model)
    finite_number(weight, "the weight of a circuit's losses", above=0)
    if circuit.ablation is None or circuit.is_empty:
        raise _nothing_to_draw_to(circuit)
    circuit.check_whole("the loss of a circuit's activations")
    weighted = circuit if scores is None else _times_scores(circuit, scores)
    channels = weighted.amounts(anatomy)
    total = sum(float(of_site.sum()) for of_site in channels.values())
    if not total:
        raise _zero_scores()
    constants = circuit.ablation.constants()
    return [
        CircuitActivationLoss(site, of_site, constants(site, len(of_site)), scope, weight * float(of_site.sum()) / total, f"circuit@{site}")
        for site, of_site in channels.items()
    ]


def _times_scores(circuit: Circuit, scores: ComponentScores) -> Circuit:
    """Amounts times |scores|. A neuron without a score has weight 0."""
    if scores.graph != circuit.graph:
        raise _other_scores(circuit, scores)
    neurons = {
        layer: amounts * (scores.neurons[layer].sum(0).abs() if layer in scores.neurons else 0)
        for layer, amounts in circuit.neurons.items()
    }
    return Circuit(circuit.graph, circuit.nodes * scores.node_scores.abs(), neurons=neurons, facts=circuit.facts)


class AblatedTeacherLoss(TokenLoss):
    """KL divergence of the trained model from a teacher whose circuit is ablated, in nats per token: it learns to do without the circuit.

    The teacher runs on the texts of every training pass, without gradients. A pass has to give logits of all tokens.

    Args:
        teacher: a model of its own, of which nothing is trained, e.g. a copy made before the training.
        circuit: with its ablation. strength: of that.
        scope, weight, name, rows: as of `FeatureLoss`.

    Raises:
        ConfigError: no ablation with constants; when training begins, a teacher that shares weights with the trained model.
        WrongModelError: a circuit of another model.

    Example:
        >>> loss = AblatedTeacherLoss(copy.deepcopy(model), circuit)
        >>> trainer = pl.Trainer(callbacks=[LossCallback([loss])])
    """

    def __init__(
        self,
        teacher: nn.Module,
        circuit: Circuit,
        *,
        strength: float = 1.0,
        scope: Scope | str = "all",
        weight: float = 1.0,
        name: str = "ablated_teacher",
        rows: str | None = None,
    ) -> None:
        of_type(teacher, nn.Module, "the teacher", "pass a model, e.g. copy.deepcopy(model)")
        super().__init__(Site("logits"), scope, weight, name, rows)
        self.teacher, self.anatomy = teacher, circuit.check_model(teacher)
        self.plan: Plan = circuit.ablation_plan(teacher, strength)

    def check_model(self, model: nn.Module) -> None:
        trained = {id(parameter) for parameter in model.parameters()}
        if any(id(parameter) in trained for parameter in self.teacher.parameters()):
            raise _teacher_is_trained(self.name)

    def of_pass(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        if ctx.ids is None:
            raise _no_ids(self.name)
        was_training = [module for module in self.teacher.modules() if module.training]

        def put_back() -> None:
            for module in was_training:
                module.training = True

        with restoring(put_back), torch.no_grad(), self.plan.attached(self.teacher):
            for module in was_training:
                module.training = False
            device = next(self.teacher.parameters()).device
            mask = ctx.attention.long().to(device) if isinstance(ctx.attention, Tensor) else None
            output = texts_call(self.teacher, self.anatomy)(input_ids=ctx.ids.to(device), attention_mask=mask, use_cache=False)
        log_p = output.logits.to(h.device).float().log_softmax(-1)  # [batch, tokens, vocabulary]
        if log_p.shape != h.shape:
            raise _other_tokens(self.name, list(log_p.shape), list(h.shape))
        return (log_p.exp() * (log_p - h.log_softmax(-1))).sum(-1)  # [batch, tokens]

    def per_token(self, h: Tensor) -> Tensor:
        raise _no_ids(self.name)


# ---- errors


def _nothing_to_draw_to(circuit: Circuit) -> ConfigError:
    return ConfigError(
        "a circuit's losses draw its activations to the constants of its ablation",
        expected="a circuit that is not empty, with a zero or mean ablation",
        found=repr(circuit),
        remedy="circuit.with_ablation(mean_ablation(model, texts))",
    )


def _zero_scores() -> ConfigError:
    return ConfigError("the scores of this circuit's components are all zero", expected="scores by which it was chosen", found="zeros",
                       remedy="leave scores out")  # fmt: skip


def _other_scores(circuit: Circuit, scores: ComponentScores) -> WrongModelError:
    return WrongModelError("circuit and scores are of different models", expected=repr(circuit), found=repr(scores),
                           remedy="attribute on the model of the circuit")  # fmt: skip


def _teacher_is_trained(name: str) -> ConfigError:
    return ConfigError(
        f"the teacher of '{name}' shares weights with the model that is trained",
        expected="a model of its own, which stays as it is",
        found="the trained model, or one with its weights",
        remedy="AblatedTeacherLoss(copy.deepcopy(model), circuit)",
    )


def _no_ids(name: str) -> ContextError:
    return ContextError(
        f"'{name}' does not know the texts of this pass",
        expected="a pass that is given token ids",
        found="embeddings, or no pass",
        remedy="call the model with input_ids",
    )


def _other_tokens(name: str, teacher: list[int], student: list[int]) -> ContextError:
    return ContextError(f"the logits of '{name}' and of the model do not correspond", expected=teacher, found=student,
                        remedy="let the model give logits of all tokens, without logits_to_keep")  # fmt: skip
