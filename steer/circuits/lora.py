"""LoRA restricted to a circuit: an adapter on the maps of its heads, MLPs and neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from steer.circuits.circuit import Circuit
from steer.circuits.circuit_parameters import circuit_masks
from steer.errors import ConfigError
from steer.intervene.deploy.weight_edit import is_conv1d

if TYPE_CHECKING:
    from peft import LoraConfig


def lora_config(model: nn.Module, circuit: Circuit, *, r: int = 8, **options: Any) -> LoraConfig:
    """PEFT's configuration of an adapter on the linear maps that a circuit has a part in.

    The adapter alone would change all heads of these maps. `GradientMask` of the adapted model restricts it: B has rows of the circuit
    alone, A columns of it, so that what B A adds elsewhere is exactly 0.

    Args:
        options: others of `LoraConfig`, e.g. lora_alpha, lora_dropout.

    Raises:
        ConfigError: options that name other maps or train more than A and B; a circuit that no linear map has a part of.

    Example:
        >>> adapted = peft.get_peft_model(model, lora_config(model, circuit, r=4))
        >>> optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
        >>> with GradientMask(adapted, circuit).active(optimizer):
        ...     train(adapted, optimizer)
    """
    from peft import LoraConfig  # takes seconds to import

    for name in ("target_modules", "modules_to_save", "use_dora", "lora_bias"):
        if options.get(name):
            raise _widens(name)
    if options.get("bias", "none") != "none":
        raise _widens("bias")
    masks = circuit_masks(model, circuit)
    maps = {
        path: module
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and getattr(module, "weight", None) in masks
    }
    if not maps:
        raise _no_maps(circuit)
    conv1d = any(is_conv1d(module) for module in maps.values())
    return LoraConfig(r=r, target_modules=sorted(maps), fan_in_fan_out=conv1d, **options)


def _widens(name: str) -> ConfigError:
    return ConfigError(f"`{name}` would train more than the circuit", expected="an adapter of A and B on the circuit's maps",
                       found=name, remedy=f"leave `{name}` out")  # fmt: skip


def _no_maps(circuit: Circuit) -> ConfigError:
    return ConfigError("no linear map belongs to the circuit, so that there is nothing to adapt", expected="heads, MLPs or neurons",
                       found=", ".join(circuit.node_names[:4]), remedy="add components to it")  # fmt: skip
