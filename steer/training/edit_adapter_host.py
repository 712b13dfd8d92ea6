"""Edits of a training run in a PEFT adapter of their own, beside the one that learns."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.edits.base_modules import fitting_module
from steer.edits.edit import Edit, WeightDelta
from steer.edits.edit_adapter import adapter_factors
from steer.errors import ConfigError
from steer.intervene.deploy.weight_edit import is_conv1d
from steer.model.restoring import restoring
from steer.training.edit_hosts import ADAPTER, EditHost
from steer.training.edit_state import SavedWeights

_HELD: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()  # names of the edits in it, by PEFT model
_IN_USE: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # PEFT models whose adapter of edits belongs to a run that goes on


class AdapterHost(EditHost):
    """In a LoRA adapter that nothing trains, of the name `edits`: zeros from the start, so that optimisers, DDP and checkpoints know it."""

    name = "adapter"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        from peft import PeftModel  # takes seconds to import

        self._peft: Any = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
        if self._peft is None:
            raise _no_peft_model(model)
        self._paths: list[str] = []
        self._is_used = False  # by this one
        self._is_empty = True

    def prepare(self, edits: Sequence[Edit]) -> None:
        modules = {delta.path: fitting_module(self.edited.model, delta.path, delta.shape) for edit in edits for delta in edit.deltas}
        if not modules:  # edits of what the model says already
            return
        factors = self._factors(edits)
        rank = max(1, *(len(a) for a, _ in factors.values()))
        if ADAPTER in self._peft.peft_config:
            if self._peft in _IN_USE or not self._fits(list(modules), rank) or not self._holds_no_others(edits, factors):
                raise _adapter_is_taken()
            self._is_empty = False  # left by an earlier run
        else:
            self._is_used = True  # said before it is true, so that `settle` takes out what an interrupt leaves
            self._add(modules, rank)
        self._is_used = True
        _IN_USE.add(self._peft)
        self._paths = list(modules)
        if self._is_empty:
            self._write({})
        self.start()

    def _fits(self, paths: Sequence[str], rank: int) -> bool:
        """An adapter of edits that is there has room for others."""
        layers = self.lora_layers()
        return all(path in layers and layers[path].r.get(ADAPTER, 0) >= rank for path in paths)

    def _holds_no_others(self, edits: Sequence[Edit], factors: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
        """Of an adapter that is there: it is that of these edits, or changes nothing. Solved again they have other factors in the same
        directions v, the rows of A."""
        if self._peft in _HELD:
            return _HELD[self._peft] <= {edit.name for edit in edits}
        for path, layer in self.lora_layers().items():
            if ADAPTER not in layer.lora_A:
                continue
            a, b = (getattr(layer, side)[ADAPTER].weight.detach().cpu() for side in ("lora_A", "lora_B"))
            rows = a.float()[b.any(0)]  # [rank, f] those that change something
            own = factors[path][0].float().mT if path in factors else torch.zeros(a.shape[1], 0)
            basis = torch.linalg.qr(own).Q  # [f, rank]
            if float((rows - rows @ basis @ basis.mT).norm()) > (1e-3 if a.dtype == torch.float32 else 2e-2) * float(rows.norm()):
                return False
        return True

    def _add(self, modules: Mapping[str, nn.Module], rank: int) -> None:
        """Makes the adapter, which changes nothing of what learns."""
        from peft import LoraConfig

        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=list(modules),
            fan_in_fan_out=any(map(is_conv1d, modules.values())),
            task_type=next(iter(self._peft.peft_config.values())).task_type,
        )
        learns = {parameter: parameter.requires_grad for parameter in self._peft.parameters()}
        with torch.random.fork_rng(devices=[]):  # its first values are overwritten
            self._peft.add_adapter(ADAPTER, config)
        config.inference_mode = True
        for parameter in self._peft.parameters():
            parameter.requires_grad_(learns.get(parameter, False))

    def start(self) -> None:
        """Switches it on beside the adapters that are on; a trainer that loads adapters switches it off."""
        if not self._paths:
            return
        learns = {parameter: parameter.requires_grad for parameter in self._peft.parameters()}
        others = [name for name in self._peft.active_adapters if name != ADAPTER]
        self._peft.base_model.set_adapter([*others, ADAPTER])
        for parameter, did_learn in learns.items():
            parameter.requires_grad_(did_learn)

    def put(self, edits: Sequence[Edit]) -> list[Edit]:
        self._write(self._factors(edits))
        self._is_empty = False
        if self._paths:
            _HELD[self._peft] = frozenset(edit.name for edit in edits)
        return list(edits)

    def exchange(self, edits: Sequence[Edit]) -> None:
        self._write(self._factors(edits))

    def restore(self, edits: Sequence[Edit], saved: SavedWeights, before: Mapping[str, Tensor]) -> bool:
        self.put(edits)
        return True

    def withdraw(self, edits: Sequence[Edit], saved: SavedWeights) -> None:
        self._write({})
        self._is_empty = True
        _HELD.pop(self._peft, None)

    def settle(self) -> None:
        """One that no edit came into is taken out again."""
        if not self._is_used:
            return
        self._is_used = False
        _IN_USE.discard(self._peft)
        if self._is_empty and ADAPTER in self._peft.peft_config:
            learns = {parameter: parameter.requires_grad for parameter in self._peft.parameters()}
            others = [name for name in self._peft.active_adapters if name != ADAPTER]
            self._peft.delete_adapter(ADAPTER)
            _HELD.pop(self._peft, None)
            self._peft.base_model.set_adapter(others)
            for parameter in self._peft.parameters():
                parameter.requires_grad_(learns[parameter])

    def saved(self, edits: Sequence[Edit]) -> SavedWeights:
        return SavedWeights()  # the base stays as it is

    def _hashes(self, edits: Sequence[Edit]) -> dict[str, str]:
        return {}

    def _factors(self, edits: Sequence[Edit]) -> dict[str, tuple[Tensor, Tensor]]:
        by_path: dict[str, list[WeightDelta]] = {}
        for edit in edits:
            for delta in edit.deltas:
                by_path.setdefault(delta.path, []).append(delta)
        return {path: adapter_factors(deltas) for path, deltas in by_path.items()}

    @torch.no_grad()
    def _write(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Writes factors, wholly or not at all; zeros where there are none."""
        layers = self.lora_layers()
        new: list[tuple[Tensor, Tensor]] = []  # parameter, values
        for path in self._paths:
            a, b = (getattr(layers[path], side)[ADAPTER].weight for side in ("lora_A", "lora_B"))  # [rank, f], [d, rank]
            values_a, values_b = torch.zeros_like(a), torch.zeros_like(b)
            if path in factors:
                rank = len(factors[path][0])
                values_a[:rank], values_b[:, :rank] = factors[path][0].to(a), factors[path][1].to(b)
            new += [(a, values_a), (b, values_b)]
        old = [(parameter, parameter.detach().clone()) for parameter, _ in new]
        is_written = False

        def put_back() -> None:
            for parameter, values in () if is_written else old:
                parameter.copy_(values)

        with restoring(put_back):
            for parameter, values in new:
                parameter.copy_(values)
            is_written = True


# ---- errors


def _no_peft_model(model: nn.Module) -> ConfigError:
    return ConfigError(
        "there is no adapter beside which an adapter of edits could be put",
        expected="a model with PEFT adapters (LoRA), for into='adapter'",
        found=type(model).__name__,
        remedy="pass into='base', or wrap the model first: peft.get_peft_model(model, LoraConfig(...))",
    )


def _adapter_is_taken() -> ConfigError:
    return ConfigError(
        f"the model has an adapter called '{ADAPTER}'",
        expected="none of that name, or that of these edits",
        found=f"'{ADAPTER}'",
        remedy="merge or delete it (model.delete_adapter('edits')), pass all edits to one callback, or pass into='base'",
    )
