"""What a plan learns while a model is trained: its parameters lie outside the model, where no trainer looks for them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steer.callbacks.ranks import Ranks
from steer.checks import of_type
from steer.errors import ConfigError
from steer.intervene import Plan

PREFIX = "learning/"  # of what it puts into a checkpoint


class Learning:
    """The parameters of a plan in a training run.

    Those that an optimiser of the trainer has are left to it. For the others there is a second optimiser: of the trainer's class and with
    its settings but for the rate and weight decay, stepped when the trainer's is. It is not a group of the trainer's own, because
    schedulers are bound to the groups they were made with, and because sharded optimisers (FSDP2) save parameters of the model only.

    Args:
        plan: what learns.
        rate: learning rate of the parameters that no optimiser has; None when all are in one.
    """

    def __init__(self, plan: Plan, rate: float | None) -> None:
        if rate is not None:
            of_type(rate, (int, float), "learning_rate of a plan", "pass e.g. 1e-2")
        if rate is not None and not 0 < rate < float("inf"):
            remedy = "pass e.g. learning_rate=1e-2; to keep learned tensors as they are, call requires_grad_(False) on plan.parameters()"
            raise ConfigError("learning_rate of a plan", expected="a positive number, or None", found=rate, remedy=remedy)
        self.plan, self.rate = plan, rate
        self.optimizer: Optimizer | None = None
        self.loaded: dict[str, Tensor] = {}
        self._parameters: list[nn.Parameter] = []
        self._ranks = Ranks()
        self._outside: list[nn.Parameter] = []
        self._group: dict[str, Any] = {}
        self._reference = 0.0
        self._unseen: list[tuple[str, str, nn.Parameter]] = []
        self._fired: dict[str, int] = {}
        self._backward = False

    def start(self, model: nn.Module, optimizers: Sequence[Optimizer], ranks: Ranks) -> None:
        """Training starts, or goes on; a saved state is in `loaded` by then. All ranks call it together.

        Raises:
            ConfigError: parameters that would not be learned, or a rate for none.
        """
        self._parameters, self._ranks = [one for one in self.plan.parameters() if one.requires_grad], ranks
        held = {id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
        free = [one for one in self._parameters if id(one) not in held]
        self._check(free)
        within = {id(one) for one in model.parameters()}
        self._outside = [one for one in self._parameters if id(one) not in within]
        for one in self._outside:
            one.grad = None
            ranks.share(one.data)
        self.optimizer = None
        if free:
            assert self.rate is not None
            first = next((one for one in optimizers if one.param_groups), None)  # Lightning's has none where a module gives none
            self._group = {"lr": 1.0} if first is None else first.param_groups[0]
            self._reference = float(self._group.get("max_lr", self._group.get("initial_lr", self._group["lr"])))
            self.optimizer = _like(first, free, self.rate)
            self._restore()
        self.loaded = {}
        self._fired, self._backward = self.plan.fired(), False
        learning = {id(one) for one in self._parameters}
        self._unseen = [(i.name, name, one) for i in self.plan.interventions for name, one in i.parameters.items() if id(one) in learning]

    def _check(self, free: list[nn.Parameter]) -> None:
        names = {id(one): f"{i.name}/{name}" for i in self.plan.interventions for name, one in i.parameters.items()}
        if free and self.rate is None:
            raise ConfigError(
                "this plan has parameters that nothing would train",
                expected="a learning rate for them, or an optimiser that has them",
                found=", ".join(names[id(one)] for one in free),
                remedy="pass learning_rate=... to the callback, add them to an optimiser, or call requires_grad_(False) on them",
            )
        if not free and self.rate is not None:
            raise ConfigError(
                "learning_rate has nothing to train",
                expected="learnable tensors that no optimiser has yet",
                found="all are in an optimiser" if self._parameters else "none in this plan",
                remedy="leave learning_rate out" if self._parameters else "call train() on an operator or a soft gate of the plan",
            )
        for one in self.plan.interventions:
            if "train" not in one.phases and any(parameter.requires_grad for parameter in one.parameters.values()):
                raise ConfigError(
                    f"'{one.name}' learns, but does not act in training",
                    expected="the phase 'train'",
                    found=one.phases,
                    remedy="name 'train' in the phases of the callback and of the intervention",
                )

    def average(self) -> None:
        """Makes gradients those of all ranks. Called by all of them after every backward pass; what was averaged before stays so."""
        self._backward = True
        if not self._outside or not self._ranks.many:
            return
        given = torch.tensor([float(one.grad is not None) for one in self._outside], device=self._outside[0].device)
        grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in self._outside]
        mean = self._ranks.mean(torch.cat([given, *(grad.flatten().to(given.device) for grad in grads)]))
        sizes = [one.numel() for one in self._outside]
        for one, any_rank, grad in zip(self._outside, mean[: len(sizes)].tolist(), mean[len(sizes) :].split(sizes), strict=True):
            one.grad = grad.view_as(one).to(one.device) if any_rank else None

    def check_reached(self) -> None:
        """Raises ConfigError when an intervention acted in a pass that was differentiated, but what it learns got no gradient."""
        self._unseen = [(name, tensor, one) for name, tensor, one in self._unseen if one.grad is None]
        if not self._unseen or not self._backward:
            return
        fired = self.plan.fired()
        cut = [f"{name}/{tensor}" for name, tensor, _ in self._unseen if fired[name] > self._fired[name]]
        if cut:
            raise ConfigError(
                f"{', '.join(cut)} got no gradient, though its intervention acted",
                expected="a loss that depends on the steered activations",
                found="no path from the loss to this tensor",
                remedy="compute the loss from the steered pass; in a frozen model checkpoint gradients with use_reentrant=False",
            )

    def step(self, *, scaler: Any = None, clip: float = 0.0, by_value: bool = False) -> None:
        """The trainer's optimiser is about to step, with gradients that are complete.

        Args:
            scaler: gradient scaler of fp16 training, whose update is the trainer's business.
            clip: limit of the norm of all gradients of this optimiser, or of each entry when `by_value`; 0 for none.
        """
        self._backward = False
        optimizer = self.optimizer
        if optimizer is None:
            return
        parameters = [one for one in optimizer.param_groups[0]["params"] if one.grad is not None]
        if not parameters:
            return
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip and by_value:
            nn.utils.clip_grad_value_(parameters, clip)
        elif clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        assert self.rate is not None
        optimizer.param_groups[0]["lr"] = self.rate * (float(self._group["lr"]) / self._reference if self._reference else 1.0)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        optimizer.zero_grad()

    def zero_grad(self) -> None:
        """Drops the gradients of all parameters, for a trainer that does so by way of its model."""
        for one in self._outside:
            one.grad = None

    # ---- checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """Flat CPU tensors: state of the second optimiser; the parameters themselves are in the plan's state."""
        if self.optimizer is None:
            return {}
        state = {f"{PREFIX}reference": torch.tensor(self._reference, dtype=torch.float64)}
        for i, entries in self.optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                if not isinstance(value, Tensor | int | float):
                    raise ConfigError(
                        f"state '{name}' of {type(self.optimizer).__name__} cannot be saved",
                        expected="tensors and numbers",
                        found=type(value).__name__,
                        remedy="use an optimiser of torch.optim, or add plan.parameters() to an optimiser of the trainer",
                    )
                tensor = value.detach().cpu().clone() if isinstance(value, Tensor) else torch.tensor(value)
                state[f"{PREFIX}{i}/{name}/{'tensor' if isinstance(value, Tensor) else 'number'}"] = tensor
        return state

    def _restore(self) -> None:
        """Puts what was loaded into the new optimiser."""
        if not self.loaded or self.optimizer is None:
            return
        self._reference = float(self.loaded[f"{PREFIX}reference"])
        found: dict[int, dict[str, Any]] = {}
        for key, tensor in self.loaded.items():
            if key.count("/") == 3:
                _, i, name, kind = key.split("/")
                found.setdefault(int(i), {})[name] = tensor if kind == "tensor" else tensor.item()
        self._check_fits(found, self.optimizer.param_groups[0]["params"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": found})

    def _check_fits(self, state: dict[int, dict[str, Any]], parameters: list[nn.Parameter]) -> None:
        """Raises ConfigError for a state with which an optimiser, which takes any, would crash at its first step or go on to NaN."""
        shapes = {i: list(one.shape) for i, one in enumerate(parameters)}
        for i, entries in state.items():
            for name, value in entries.items():
                if i not in shapes or isinstance(value, Tensor) and _misshapen(list(value.shape), shapes[i]):
                    raise ConfigError(
                        f"the saved optimiser state '{name}' of parameter {i + 1} does not fit the plan",
                        expected=f"one for shape {shapes[i]}" if i in shapes else f"{len(shapes)} parameters",
                        found=list(value.shape) if isinstance(value, Tensor) else value,
                        remedy="resume with the plan that was trained, or one made in the same way, with the same tensors frozen",
                    )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Keeps what the next start takes up."""
        self.loaded = {key: tensor for key, tensor in state.items() if key.startswith(PREFIX)}


def _misshapen(state: list[int], parameter: list[int]) -> bool:
    """Factored optimisers keep fewer dimensions than the parameter has, or single entries in place of some."""
    return len(state) == len(parameter) and any(a not in (1, b) for a, b in zip(state, parameter, strict=True))


def _like(optimizer: Optimizer | None, parameters: list[nn.Parameter], rate: float) -> Optimizer:
    """A new optimiser of the same class and settings, without weight decay; AdamW where there is none to be like."""
    if optimizer is None:
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    known = inspect.signature(type(optimizer).__init__).parameters
    settings = {name: value for name, value in optimizer.defaults.items() if name in known}
    settings |= {"weight_decay": 0.0} if "weight_decay" in known else {}
    try:
        return type(optimizer)(parameters, **{**settings, "lr": rate})
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"no second {type(optimizer).__name__} can be made for the parameters of the plan",
            expected="a class that is made of parameters and its defaults, as those of torch.optim",
            found=str(error),
            remedy="add plan.parameters() to an optimiser of the trainer, and leave learning_rate out",
        ) from error
