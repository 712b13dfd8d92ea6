"""Gradient mask: only a circuit learns, or all but the circuit; everything else stays as it is to the bit.

A masked gradient alone does not do that: weight decay moves what has no gradient, and momentum what once had one. So what is not to learn
is put back after each optimiser step, and its optimiser state is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steer.checks import of_type
from steer.circuits.circuit import Circuit
from steer.circuits.circuit_parameters import Masks, circuit_masks
from steer.errors import AttachError, ConfigError
from steer.intervene.deploy.weight_edit import is_dense
from steer.model.restoring import restoring


@dataclass(eq=False)
class MaskedParameter:
    """A parameter of which some entries learn.

    Attributes:
        stays: bool, of its shape: the entries that do not learn. before: values to go back to, None until the start.
    """

    name: str
    parameter: nn.Parameter
    stays: Tensor
    before: Tensor | None = None

    def mask_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(self._on(parameter), 0)

    @torch.no_grad()
    def put_back(self, state: dict[str, Any]) -> None:
        """After an optimiser step. state: the optimiser's of this parameter."""
        assert self.before is not None
        self.parameter.copy_(torch.where(self._on(self.parameter), self.before.to(self.parameter), self.parameter))
        for entry in state.values():
            if isinstance(entry, Tensor) and entry.shape == self.parameter.shape and entry.is_floating_point():
                entry.masked_fill_(self._on(entry), 0)

    def _on(self, other: Tensor) -> Tensor:
        if self.stays.device != other.device:
            self.stays = self.stays.to(other.device)
        return self.stays


class GradientMask:
    """Lets only the weights of a circuit learn, or all but these; the others stay as they are to the bit, whatever the optimiser does.

    Heads have rows of q, k and v (those of their key-value group) and columns of the output projection, see
    `steer.circuits.circuit_parameters`. Of a model with LoRA adapters (`lora_config`) it masks these, so that the product changes the
    circuit's rows and columns alone.

    Args:
        model: raw or with PEFT adapters, before DDP is put around it.
        circuit: of this model; amounts do not matter.
        only: the circuit learns; False for all but the circuit.

    Attributes:
        learning, total: numbers of entries, of those that were trained before.

    Raises:
        ConfigError: quantised, sharded, offloaded or tied weights, or nothing that learns. WrongModelError, AnatomyError, SiteError.

    Example:
        >>> mask = GradientMask(model, circuit)
        >>> with mask.active(optimizer):
        ...     train(model, optimizer)
    """

    def __init__(self, model: nn.Module, circuit: Circuit, *, only: bool = True) -> None:
        of_type(circuit, Circuit, "the circuit of a gradient mask", "pass a Circuit")
        self.model, self.only = model, only
        self.partial: list[MaskedParameter] = []
        self.frozen: list[nn.Parameter] = []
        self.whole: list[nn.Parameter] = []  # of which all learns
        self.learning = self.total = 0
        masks = circuit_masks(model, circuit)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._add(name, parameter, masks)
        if not self.learning:
            raise _nothing_learns(self.total, only)
        self._handles: list[Any] = []
        self._has_frozen = False

    def _add(self, name: str, parameter: nn.Parameter, masks: Masks) -> None:
        inside = masks.get(parameter)
        n_inside = 0 if inside is None else int(inside.expand(parameter.shape).sum())
        n_learning = n_inside if self.only else parameter.numel() - n_inside
        self.total += parameter.numel()
        self.learning += n_learning
        if n_learning == 0:
            self.frozen.append(parameter)
        elif n_learning < parameter.numel():
            assert inside is not None
            stays = (~inside if self.only else inside).expand(parameter.shape).contiguous()
            self.partial.append(MaskedParameter(name, parameter, stays.to(parameter.device)))
        else:
            self.whole.append(parameter)

    def __repr__(self) -> str:
        return f"GradientMask({'only' if self.only else 'all but'} the circuit: {self.learning} of {self.total} numbers learn)"

    # ---- life

    @contextmanager
    def active(self, *optimizers: Optimizer) -> Iterator[GradientMask]:
        """`attach`, `start` and `detach` around a block, on every exit path."""
        with restoring(self.detach):
            self.attach()
            self.start(optimizers)
            yield self

    def attach(self) -> None:
        """Masks gradients from now on, as they are accumulated. Parameters of which nothing learns need no gradient until the detach.

        Raises:
            AttachError: DDP is around the model already, which waits for gradients of all that it was given.
        """
        self.detach()
        if self.frozen and any(isinstance(module, nn.parallel.DistributedDataParallel) for module in self.model.modules()):
            raise _in_ddp()
        self._has_frozen = True
        for parameter in self.frozen:
            parameter.requires_grad_(False)
            parameter.grad = None
        for masked in self.partial:
            self._handles.append(masked.parameter.register_post_accumulate_grad_hook(masked.mask_gradient))

    def start(self, optimizers: Sequence[Optimizer]) -> None:
        """Notes what is to stay, and puts it back after each step of these optimisers. Weights are loaded by then.

        Raises:
            ConfigError: parameters that were sharded or replaced since, adapters that are not new, or no optimiser.
        """
        optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]  # below accelerate's and Lightning's
        current = {id(parameter) for parameter in self.model.parameters()}
        in_optimizers = {id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}
        for masked in self.partial:
            if id(masked.parameter) not in in_optimizers:  # another optimiser may have it, whose weight decay nobody would undo
                raise _not_optimised(masked.name)
            if id(masked.parameter) not in current or not is_dense(masked.parameter):
                raise _replaced(masked.name)
        if in_optimizers.isdisjoint(id(parameter) for parameter in (*self.whole, *(masked.parameter for masked in self.partial))):
            raise _nothing_optimised(self.learning)
        self._empty_adapters()
        for masked in self.partial:
            masked.before = masked.parameter.detach().clone()
            masked.mask_gradient(masked.parameter)
        by_parameter = {masked.parameter: masked for masked in self.partial}

        def after_step(optimizer: Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter in by_parameter:
                        by_parameter[parameter].put_back(optimizer.state.get(parameter, {}))

        def before_step(*_: Any) -> None:  # DDP's mean over ranks may have come after the hook of the gradient
            for masked in self.partial:
                masked.mask_gradient(masked.parameter)

        for optimizer in optimizers:
            self._handles += [optimizer.register_step_pre_hook(before_step), optimizer.register_step_post_hook(after_step)]

    def detach(self) -> None:
        """Takes the hooks off and lets everything learn again that did before; may be called at any time."""
        while self._handles:
            self._handles.pop().remove()
        if self._has_frozen:
            for parameter in self.frozen:
                parameter.requires_grad_(True)
            self._has_frozen = False
        for masked in self.partial:
            masked.before = None

    @torch.no_grad()
    def _empty_adapters(self) -> None:
        """A new adapter has random numbers in A and zeros in B. In A what does not learn has to be 0, or B would bring it in."""
        named = dict(self.model.named_parameters())
        for masked in self.partial:
            if ".lora_A." not in masked.name and ".lora_B." not in masked.name:
                continue
            values = masked.parameter[masked.stays.to(masked.parameter.device)]
            if not bool(values.any()):  # B of a new adapter, or one that this mask has trained
                continue
            b = named.get(masked.name.replace(".lora_A.", ".lora_B."))
            if ".lora_B." in masked.name or b is None or bool(b.any()):
                raise _old_adapter(masked.name)
            masked.parameter.masked_fill_(masked.stays.to(masked.parameter.device), 0)


# ---- errors


def _nothing_learns(total: int, only: bool) -> ConfigError:
    return ConfigError(
        "nothing would learn under this gradient mask",
        expected=f"parameters with requires_grad {'inside' if only else 'outside'} the circuit",
        found=f"none of {total} numbers that are trained",
        remedy="call requires_grad_(True) on the model, or make the adapter with steer.circuits.lora_config of this circuit",
    )


def _in_ddp() -> AttachError:
    return AttachError(
        "a gradient mask freezes parameters that DDP waits for",
        expected="a mask that is attached before DDP is put around the model",
        found="DistributedDataParallel",
        remedy="use GradientMaskCallback, or attach the mask first",
    )


def _not_optimised(name: str) -> ConfigError:
    return ConfigError(
        f"'{name}' of the gradient mask is in none of these optimisers, so that what another one does to it would not be undone",
        expected="all optimisers of this model's parameters",
        found="others",
        remedy="pass all that train the model: mask.active(first, second); requires_grad_(False) for what none trains",
    )


def _nothing_optimised(learning: int) -> ConfigError:
    return ConfigError(
        "these optimisers train nothing of what the gradient mask lets learn",
        expected=f"some of the {learning} numbers that learn",
        found="others",
        remedy="pass the optimiser of this model, made of model.parameters()",
    )


def _replaced(name: str) -> ConfigError:
    return ConfigError(
        f"'{name}' was sharded, moved off or replaced after the gradient mask was made",
        expected="the parameter that was there, whole",
        found="another one",
        remedy="use a strategy that keeps parameters whole (DDP), or make the mask after the model is complete",
    )


def _old_adapter(name: str) -> ConfigError:
    return ConfigError(
        f"the adapter '{name}' has learned outside of the circuit already",
        expected="a new adapter, whose B is 0",
        found="numbers that a mask would have to take out",
        remedy="make it with get_peft_model(model, steer.circuits.lora_config(model, circuit)), and mask it before it is trained",
    )
