"""What PEFT has switched on in a model: whether a pass is the reference's, and how many virtual tokens stand before every text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

_REFERENCE_WORDS = ("ref", "reference", "teacher")  # in names of adapters: TRL's, and those of loops of one's own


class VirtualTokens(NamedTuple):
    """Positions before every text that are no tokens of it.

    Attributes:
        number: how many; 0 where nothing is tuned but weights, and while the adapter is off.
        in_cache: they are entries of the cache from the start (prefix tuning), else embeddings that run through the blocks with the prompt
            (prompt tuning, p-tuning).
    """

    number: int = 0
    in_cache: bool = False


NONE = VirtualTokens()


class PeftState:
    """Reads the state of the adapters around and inside a decoder; empty for a model without any.

    Attributes:
        adapter_layer: a layer of PEFT's, which knows what is switched on, or None.
        models: each model of PEFT's above the decoder, and its height above it.
    """

    def __init__(self) -> None:
        self.adapter_layer: Any = None
        self.models: list[tuple[Any, int]] = []

    def find(self, model: nn.Module, chain: list[nn.Module]) -> None:
        """Looks for adapters again: a later attach may come through another wrapper. chain: modules from the model down to the decoder."""
        for height, module in enumerate(reversed(chain)):
            # on the class: a compiled model forwards the attributes of the one inside it
            if hasattr(type(module), "active_peft_config") and all(model is not module for model, _ in self.models):
                self.models.append((module, height))
        if self.adapter_layer is None:
            # a property on PEFT's layers; transformers' own models have a method of that name
            layers = (module for module in model.modules() if isinstance(getattr(type(module), "disable_adapters", None), property))
            self.adapter_layer = next(layers, None)

    def is_reference(self) -> bool:
        """True when the adapters are off, or one is on that is called a reference, or none that is trained while another one is."""
        layer = self.adapter_layer
        if layer is not None and (layer.disable_adapters or _has_reference_name(layer.active_adapters)):
            return True
        for model, _ in self.models:
            active = _active_adapters(model) if layer is None else layer.active_adapters
            if _is_off(model) or _has_reference_name(active) or _only_others_are_trained(model, active):
                return True
        return False

    def virtual_tokens(self, outermost: int) -> VirtualTokens:
        """Virtual tokens of the pass that began with the module of this height above the decoder."""
        for model, height in self.models:
            config = model.active_peft_config
            if not config.is_prompt_learning or _is_off(model):
                continue
            if config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
                return VirtualTokens(config.num_virtual_tokens, in_cache=True)
            if (outermost >= height or _generates(model)) and not getattr(model.config, "is_encoder_decoder", False):
                return VirtualTokens(config.num_virtual_tokens)
        return NONE


def _has_reference_name(adapters: Iterable[str]) -> bool:
    for name in adapters:  # no regular expressions: compiled code runs this, too
        for word in name.lower().replace("-", "_").replace(".", "_").split("_"):
            if word.rstrip("0123456789") in _REFERENCE_WORDS:
                return True
    return False


def _active_adapters(model: Any) -> list[str]:
    """Names of the adapters that are on in a model of PEFT's without adapter layers: soft prompts and the like."""
    active = model.active_adapter
    return [active] if isinstance(active, str) else list(active)


def _only_others_are_trained(model: Any, active: Iterable[str]) -> bool:
    """The adapters that are on were loaded for inference, beside one that was made or loaded to be trained."""
    configs = model.peft_config
    if len(configs) < 2 or not all(getattr(configs.get(name), "inference_mode", False) for name in active):
        return False
    return any(not config.inference_mode for config in configs.values())


def _is_off(model: Any) -> bool:
    """Inside `disable_adapter()`."""
    return bool(getattr(model, "_adapters_disabled", False))


def _generates(model: Any) -> bool:
    """Its `generate` runs, which calls the base model, and lends that its own way of preparing inputs."""
    prepare = vars(model.base_model).get("prepare_inputs_for_generation")
    return getattr(prepare, "__self__", None) is model
