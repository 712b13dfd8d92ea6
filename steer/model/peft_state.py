"""What PEFT has switched on in a model: whether a pass is the reference's, and how many cache entries a tuned prefix takes."""

from __future__ import annotations

from typing import Any

from torch import nn


class PeftState:
    """Reads the state of the adapters around and inside a decoder; empty for a model without any.

    Attributes:
        adapter_layer: a layer of PEFT's, which knows what is switched on, or None.
        prefix_model: the PEFT model that tunes a prefix, or None.
    """

    def __init__(self) -> None:
        self.adapter_layer: Any = None
        self.prefix_model: Any = None

    def find(self, model: nn.Module, chain: list[nn.Module]) -> None:
        """Looks for adapters again: a later attach may come through another wrapper. chain: modules from the model down to the decoder."""
        for module in chain:
            if str(getattr(getattr(module, "active_peft_config", None), "peft_type", "")).endswith("PREFIX_TUNING"):
                self.prefix_model = module
        if self.adapter_layer is None:
            # a property on PEFT's layers; transformers' own models have a method of that name
            layers = (module for module in model.modules() if isinstance(getattr(type(module), "disable_adapters", None), property))
            self.adapter_layer = next(layers, None)

    def is_reference(self) -> bool:
        """True when the adapters are off, or TRL's copy of the initial adapter is on."""
        layer = self.adapter_layer
        return layer is not None and (bool(layer.disable_adapters) or "ref" in layer.active_adapters)

    def prefix_length(self) -> int:
        """Entries of a cache that prefix tuning puts before every text; none while the adapter is off."""
        if self.prefix_model is None or "forward" in vars(self.prefix_model):
            return 0
        return int(self.prefix_model.active_peft_config.num_virtual_tokens)
