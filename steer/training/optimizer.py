"""Plan optimiser: trains the parameters of a plan beside the optimiser of a trainer, and like it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steer.errors import ConfigError

PREFIX = "learning/"  # of its keys in a checkpoint


class PlanOptimizer:
    """Optimiser of the parameters of a plan that no optimiser of the trainer has.

    It has the class and the settings of the trainer's first optimiser, without weight decay; AdamW where a trainer has none. Its rate rises
    and falls with the rate of the trainer's first parameter group, so every scheduler is followed. It is no group of the trainer's own
    optimiser, because schedulers are bound to the groups they were made with, and because sharded optimisers (FSDP2) save parameters of
    the model only.

    Args:
        parameters: of the plan.
        learning_rate: where the trainer's rate is its initial one, or under one-cycle its highest.
        trainer_optimizers: the trainer's.

    Raises:
        ConfigError: the class of the trainer's optimiser cannot be made from parameters and its defaults.
    """

    def __init__(self, parameters: list[nn.Parameter], learning_rate: float, trainer_optimizers: Sequence[Optimizer]) -> None:
        # Lightning's has no groups where a module gives no optimiser
        followed = next((optimizer for optimizer in trainer_optimizers if optimizer.param_groups), None)
        self.optimizer = _optimizer_like(followed, parameters, learning_rate)
        self.learning_rate = learning_rate
        self._followed_group: dict[str, Any] = {"lr": 1.0} if followed is None else followed.param_groups[0]
        full_rate = self._followed_group.get("max_lr", self._followed_group.get("initial_lr", self._followed_group["lr"]))
        self._full_rate = float(full_rate)  # of the followed group: at this rate of its own, `learning_rate` is used

    def step(self, *, scaler: Any = None, clip: float = 0.0, by_value: bool = False) -> None:
        """Steps with the rate of now, and drops the gradients.

        Args:
            scaler: gradient scaler of fp16 training, whose update is the trainer's business.
            clip: limit of the norm of all gradients of this optimiser, or of each entry when `by_value`; 0 for none.
        """
        group = self.optimizer.param_groups[0]
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if clip and by_value:
            nn.utils.clip_grad_value_(parameters, clip)
        elif clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        factor = float(self._followed_group["lr"]) / self._full_rate if self._full_rate else 1.0
        group["lr"] = self.learning_rate * factor
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
        self.optimizer.zero_grad()

    # ---- checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """State of the optimiser as flat CPU tensors: `learning/reference`, `learning/<parameter>/<name>/<tensor or number>`.

        Raises:
            ConfigError: the state holds something else than tensors and numbers.
        """
        state = {f"{PREFIX}reference": torch.tensor(self._full_rate, dtype=torch.float64)}
        for index, entries in self.optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    state[f"{PREFIX}{index}/{name}/tensor"] = value.detach().cpu().clone()
                elif isinstance(value, int | float):
                    state[f"{PREFIX}{index}/{name}/number"] = torch.tensor(value)
                else:
                    raise _state_not_savable(self.optimizer, name, value)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a saved state, if there is one.

        Raises:
            ConfigError: the state belongs to other parameters.
        """
        if f"{PREFIX}reference" not in state:
            return
        self._full_rate = float(state[f"{PREFIX}reference"])
        entries: dict[int, dict[str, Any]] = {}
        for key, tensor in state.items():
            if key.startswith(PREFIX) and key.count("/") == 3:
                _, index, name, kind = key.split("/")
                entries.setdefault(int(index), {})[name] = tensor if kind == "tensor" else tensor.item()
        _check_shapes(entries, self.optimizer.param_groups[0]["params"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": entries})


def _optimizer_like(optimizer: Optimizer | None, parameters: list[nn.Parameter], rate: float) -> Optimizer:
    """A new optimiser of the same class and settings, without weight decay; AdamW for None."""
    if optimizer is None:
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    arguments = inspect.signature(type(optimizer).__init__).parameters
    settings = {name: value for name, value in optimizer.defaults.items() if name in arguments}
    settings |= {"weight_decay": 0.0} if "weight_decay" in arguments else {}
    try:
        return type(optimizer)(parameters, **{**settings, "lr": rate})
    except (TypeError, ValueError, AssertionError) as error:
        raise _no_second_optimizer(optimizer, error) from error


def _check_shapes(entries: dict[int, dict[str, Any]], parameters: list[nn.Parameter]) -> None:
    """Raises ConfigError for a state with which an optimiser, which takes any, would crash at its first step or go on to NaN."""
    shapes = {index: list(parameter.shape) for index, parameter in enumerate(parameters)}
    for index, values in entries.items():
        for name, value in values.items():
            if index not in shapes or isinstance(value, Tensor) and not _shape_fits(list(value.shape), shapes[index]):
                raise _state_does_not_fit(name, value, index, shapes)


def _shape_fits(state: list[int], parameter: list[int]) -> bool:
    """Factored optimisers keep fewer dimensions than the parameter has, or single entries in place of some."""
    return len(state) != len(parameter) or all(n in (1, size) for n, size in zip(state, parameter, strict=True))


# ---- errors


def _no_second_optimizer(optimizer: Optimizer, error: Exception) -> ConfigError:
    return ConfigError(
        f"no second {type(optimizer).__name__} can be made for the parameters of the plan",
        expected="a class that is made of parameters and its defaults, as those of torch.optim",
        found=str(error),
        remedy="add plan.parameters() to an optimiser of the trainer, and leave learning_rate out",
    )


def _state_not_savable(optimizer: Optimizer, name: str, value: Any) -> ConfigError:
    return ConfigError(
        f"state '{name}' of {type(optimizer).__name__} cannot be saved",
        expected="tensors and numbers",
        found=type(value).__name__,
        remedy="use an optimiser of torch.optim, or add plan.parameters() to an optimiser of the trainer",
    )


def _state_does_not_fit(name: str, value: Any, index: int, shapes: dict[int, list[int]]) -> ConfigError:
    return ConfigError(
        f"the saved optimiser state '{name}' of parameter {index + 1} does not fit the plan",
        expected=f"one for shape {shapes[index]}" if index in shapes else f"{len(shapes)} parameters",
        found=list(value.shape) if isinstance(value, Tensor) else value,
        remedy="resume with the plan that was trained, or one made in the same way, with the same tensors frozen",
    )
