"""Learning: trains the parameters of a plan, which lie outside the model, where no trainer looks for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steer.checks import of_type
from steer.errors import ConfigError
from steer.intervene import Attachment, Plan
from steer.training.optimizer import PREFIX, PlanOptimizer
from steer.training.ranks import Ranks


class Learning:
    """The parameters of a plan in a training run.

    Parameters that are in an optimiser of the trainer are left to it; the others get a `PlanOptimizer`, which is stepped when the trainer's
    is. Gradients of parameters outside the model are averaged over the ranks here, because the trainer does so for its model only.

    Args:
        plan: what learns.
        learning_rate: of the parameters that no optimiser has; None when all are in one.

    Attributes:
        plan_optimizer: None before the start, and when the trainer's optimisers have all parameters.

    Raises:
        ConfigError: the rate is no positive number.
    """

    def __init__(self, plan: Plan, learning_rate: float | None) -> None:
        if learning_rate is not None:
            of_type(learning_rate, (int, float), "learning_rate of a plan", "pass e.g. 1e-2")
            if not 0 < learning_rate < float("inf"):
                raise _bad_rate(learning_rate)
        self.plan = plan
        self.learning_rate = learning_rate
        self.plan_optimizer: PlanOptimizer | None = None
        self._attachment: Attachment | None = None
        self._saved: Mapping[str, Tensor] = {}  # of a checkpoint, until the next start
        self._ranks = Ranks()
        self._outside_model: list[nn.Parameter] = []
        self._without_gradient: list[tuple[str, str, nn.Parameter]] = []  # intervention, tensor, parameter: no gradient seen yet
        self._tokens_at_start: dict[str, int] = {}
        self._ran_backward = False  # since the last optimiser step

    def start(self, attachment: Attachment, model: nn.Module, optimizers: Sequence[Optimizer], ranks: Ranks) -> None:
        """Starts, or goes on from the state that was loaded before. All ranks call it together.

        Args:
            attachment: the plan on the model.
            model: what the trainer trains; the parameters of the plan that are part of it are left to the trainer's averaging.
            optimizers: the trainer's.

        Raises:
            ConfigError: parameters that nothing would train, a rate with nothing to train, or a saved state that does not fit.
        """
        parameters = [parameter for parameter in self.plan.parameters() if parameter.requires_grad]
        in_optimizers = _ids(parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"])
        unclaimed = [parameter for parameter in parameters if id(parameter) not in in_optimizers]
        self._check(attachment, parameters, unclaimed)
        in_model = _ids(model.parameters())
        self._attachment = attachment
        self._ranks = ranks
        self._outside_model = [parameter for parameter in parameters if id(parameter) not in in_model]
        for parameter in self._outside_model:
            parameter.grad = None
            ranks.broadcast(parameter.data)
        self.plan_optimizer = None
        if unclaimed:
            assert self.learning_rate is not None
            self.plan_optimizer = PlanOptimizer(unclaimed, self.learning_rate, optimizers)
            self.plan_optimizer.load_state_dict(self._saved)
        self._saved = {}
        self._tokens_at_start = attachment.fired(by_site=True)
        self._ran_backward = False
        self._without_gradient = [entry for entry in self._named() if entry[2].requires_grad]

    def _named(self) -> list[tuple[str, str, nn.Parameter]]:
        """Intervention, tensor and parameter, for every parameter of the plan."""
        return [(edit.name, name, parameter) for edit in self.plan.interventions for name, parameter in edit.parameters.items()]

    def _check(self, attachment: Attachment, parameters: list[nn.Parameter], unclaimed: list[nn.Parameter]) -> None:
        if unclaimed and self.learning_rate is None:
            ids = _ids(unclaimed)
            raise _untrained(f"{edit}/{name}" for edit, name, parameter in self._named() if id(parameter) in ids)
        if not unclaimed and self.learning_rate is not None:
            raise _nothing_to_train(bool(parameters))
        for active in attachment.interventions:
            learns = any(parameter.requires_grad for parameter in active.description.parameters.values())
            if learns and "train" not in active.phases:
                raise _idle_in_training(active.name, active.phases)

    def average_gradients(self) -> None:
        """Averages gradients over the ranks, which all call it after every backward pass; averaging twice changes nothing."""
        self._ran_backward = True
        parameters = self._outside_model
        if not parameters or not self._ranks.is_distributed:
            return
        device = parameters[0].device
        has_gradient = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=device)
        gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters]
        # one message for all: [parameters + sum of their sizes]
        mean = self._ranks.mean(torch.cat([has_gradient, *(gradient.flatten().to(device) for gradient in gradients)]))
        share_of_ranks, flat = mean.split([len(parameters), mean.numel() - len(parameters)])
        means = flat.split([parameter.numel() for parameter in parameters])
        for parameter, share, gradient in zip(parameters, share_of_ranks.tolist(), means, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.device) if share else None

    def check_gradients(self) -> None:
        """Raises ConfigError when an intervention acted in a pass that was differentiated, but a parameter of it got no gradient."""
        self._without_gradient = [entry for entry in self._without_gradient if entry[2].grad is None]
        if self._attachment is None or not self._without_gradient or not self._ran_backward:
            return
        fired = self._attachment.fired(by_site=True)
        acted = {
            name
            for name in {edit for edit, _, _ in self._without_gradient}
            if any(fired[active.name] > self._tokens_at_start[active.name] for active in self._attachment.at_sites(name))
        }
        cut_off = [f"{edit}/{name}" for edit, name, _ in self._without_gradient if edit in acted]
        if cut_off:
            raise _no_gradient(cut_off)

    def step(self, *, scaler: Any = None, clip: float = 0.0, by_value: bool = False) -> None:
        """Steps, just before the trainer's optimiser does; gradients are complete by then. Arguments: see `PlanOptimizer.step`."""
        self._ran_backward = False
        if self.plan_optimizer is not None:
            self.plan_optimizer.step(scaler=scaler, clip=clip, by_value=by_value)

    def zero_grad(self) -> None:
        """Drops all gradients, for a trainer that does so by way of its model."""
        for parameter in self._outside_model:
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Flat CPU tensors of the optimiser's state; the parameters themselves are in the state of the plan."""
        return {} if self.plan_optimizer is None else self.plan_optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Holds a saved state until the next start."""
        self._saved = {key: tensor for key, tensor in state.items() if key.startswith(PREFIX)}


def _ids(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(parameter) for parameter in parameters}


# ---- errors


def _bad_rate(rate: float) -> ConfigError:
    remedy = "pass e.g. learning_rate=1e-2; to keep learned tensors as they are, call requires_grad_(False) on plan.parameters()"
    return ConfigError("learning_rate of a plan", expected="a positive number, or None", found=rate, remedy=remedy)


def _untrained(names: Iterable[str]) -> ConfigError:
    return ConfigError(
        "this plan has parameters that nothing would train",
        expected="a learning rate for them, or an optimiser that has them",
        found=", ".join(names),
        remedy="pass learning_rate=... to the callback, add them to an optimiser, or call requires_grad_(False) on them",
    )


def _nothing_to_train(has_parameters: bool) -> ConfigError:
    return ConfigError(
        "learning_rate has nothing to train",
        expected="learnable tensors that no optimiser has yet",
        found="all are in an optimiser" if has_parameters else "none in this plan",
        remedy="leave learning_rate out" if has_parameters else "call train() on an operator or a soft gate of the plan",
    )


def _idle_in_training(name: str, phases: tuple[str, ...]) -> ConfigError:
    return ConfigError(
        f"'{name}' learns, but does not act in training",
        expected="the phase 'train'",
        found=phases,
        remedy="name 'train' in the phases of the callback and of the intervention",
    )


def _no_gradient(names: list[str]) -> ConfigError:
    return ConfigError(
        f"{', '.join(names)} got no gradient, though its intervention acted",
        expected="a loss that depends on the steered activations",
        found="no path from the loss to this tensor",
        remedy="compute the loss from the steered pass; in a frozen model checkpoint gradients with use_reentrant=False",
    )
