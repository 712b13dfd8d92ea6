"""Where the edits of a training run live: in the weights of the model, or in a PEFT adapter of their own beside the one that learns."""

from __future__ import annotations

import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from steer.edits.base_modules import base_path, dense_weight, find_module, fitting_module, matrix_hash
from steer.edits.edit import Edit, WeightDelta
from steer.edits.edit_adapter import adapter_factors
from steer.edits.edited_weights import EditedWeights
from steer.edits.make_edit import mapped
from steer.errors import ConfigError, DamagedFileError
from steer.intervene.deploy.weight_edit import is_conv1d
from steer.model.restoring import restoring
from steer.training.edit_state import SavedWeights

ADAPTER = "edits"  # name of the adapter
_HELD: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()  # names of the edits in it, by PEFT model
_IN_USE: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # PEFT models whose adapter of edits belongs to a run that goes on


class EditNotAppliedWarning(UserWarning):
    """Edits that are not in the model at the end of training, or after a checkpoint was loaded that never had them."""


class EditHost(ABC):
    """Puts edits into a model that is trained, and changes them there."""

    name: ClassVar[str]

    def __init__(self, model: nn.Module) -> None:
        self.edited = EditedWeights.of(model)
        self.is_training = False  # what changes weights is training, from the start of a run on

    @abstractmethod
    def prepare(self, edits: Sequence[Edit]) -> None:
        """Before optimisers and DDP see the model. Raises where the edits do not fit it."""

    @abstractmethod
    def put(self, edits: Sequence[Edit]) -> list[Edit]:
        """Applies the edits; those that are on the model already are returned as they are there."""

    @abstractmethod
    def exchange(self, edits: Sequence[Edit]) -> None:
        """Puts edits in the place of those of the same names."""

    @abstractmethod
    def restore(self, edits: Sequence[Edit], saved: SavedWeights, before: Mapping[str, Tensor]) -> None:
        """After a checkpoint was loaded: the edits that were on the model when it was saved are on it again.

        Args:
            before: what `weights` gave before the checkpoint was loaded.
        """

    @abstractmethod
    def withdraw(self, edits: Sequence[Edit], saved: SavedWeights) -> None:
        """After a checkpoint was loaded that was saved before these edits were applied: they are not on the model any more."""

    def solved_elsewhere(self, edits: Sequence[Edit], before: Mapping[str, Tensor]) -> dict[str, list[str]]:
        """By the name of each edit that was solved for other weights, the paths where these differ; one on the model already is no such.

        What an edit has no hash of, or what is not here (sharded weights), is not compared.

        Args:
            before: what `weights` gave before a checkpoint was loaded; weights that fit these were trained by the run that goes on.
        """
        on = {edit.name for edit in self.edited.applied}
        other: dict[str, list[str]] = {}
        for edit in edits:
            for path, digest in edit.base.items() if edit.name not in on else ():
                found = self.edited.base_hash(path)
                if found not in (None, digest) and (path not in before or matrix_hash(before[path]) != digest):
                    other.setdefault(edit.name, []).append(path)
        return other

    def weights(self, edits: Sequence[Edit]) -> dict[str, Tensor]:
        """Copies of the matrices that edits change in place, without any edit, by path."""
        return {}

    def start(self) -> None:  # noqa: B027 - weights need nothing
        """Before the first step, after the trainer has loaded what it loads."""

    def check_unchanged(self) -> None:  # noqa: B027
        """Raises EditError where something other than runs of edits has changed weights that hold some."""

    def settle(self) -> None:  # noqa: B027
        """At the end of training."""

    def saved(self, edits: Sequence[Edit]) -> SavedWeights:
        """What is to be known of the weights when they are in a checkpoint."""
        own = {edit.name for edit in edits}
        return SavedWeights(self._hashes(edits), frozenset(edit.name for edit in self.edited.applied if edit.name not in own))

    def check_restored(self, edits: Sequence[Edit], saved: SavedWeights) -> None:
        """Once all runs of edits have gone on from a checkpoint.

        Raises:
            ConfigError: an edit that was on the model is not. DamagedFileError: other weights.
        """
        if missing := saved.others - {edit.name for edit in self.edited.applied}:
            raise _other_edit_is_missing(min(missing))
        if other := [path for path, digest in self._hashes(edits).items() if saved.hashes.get(path) != digest]:
            raise _other_weights(other)

    def _hashes(self, edits: Sequence[Edit]) -> dict[str, str]:
        """Of every matrix of the base that these edits are in."""
        return {path: matrix_hash(dense_weight(find_module(self.edited.model, path))) or "" for path in _paths(edits)}

    def lora_layers(self) -> dict[str, Any]:
        """PEFT's LoRA layers around linear maps, by the base paths of these."""
        named = self.edited.model.named_modules()
        return {base_path(path): module for path, module in named if hasattr(module, "base_layer") and hasattr(module, "lora_A")}

    @torch.no_grad()
    def given(self, path: str, keys: Tensor) -> Tensor:
        """[n, d] what a map gives for keys [n, f], without its bias: its weight, and the adapters that are on around it."""
        total = mapped(find_module(self.edited.model, path), keys)
        if (layer := self.lora_layers().get(path)) is not None:
            for name in layer.active_adapters:
                if name in layer.lora_A:
                    a, b = (getattr(layer, side)[name].weight.detach().cpu().double() for side in ("lora_A", "lora_B"))
                    total = total + (layer.scaling[name] * (keys.double() @ a.mT) @ b.mT).float()
        return total


class BaseHost(EditHost):
    """In the weights, by `EditedWeights`: after training, edits can be reverted from what was trained."""

    name = "base"

    def prepare(self, edits: Sequence[Edit]) -> None:
        for edit in edits:
            self.edited.check(edit)

    def weights(self, edits: Sequence[Edit]) -> dict[str, Tensor]:
        return {path: self.edited.original(path) for path in _paths(edits)}

    def put(self, edits: Sequence[Edit]) -> list[Edit]:
        self.edited.rebase()  # trained by the run: what was changed before it is refused at its start
        on = {edit.name: edit for edit in self.edited.applied}
        self.edited.apply(*(edit for edit in edits if edit.name not in on), on_other_weights=True)
        return [on.get(edit.name, edit) for edit in edits]

    def exchange(self, edits: Sequence[Edit]) -> None:
        self.edited.rebase()
        self.edited.replace(edits)

    def restore(self, edits: Sequence[Edit], saved: SavedWeights, before: Mapping[str, Tensor]) -> None:
        self._drop_lost(edits, saved)
        if self._hashes(edits) == saved.hashes:  # the checkpoint has the weights of the base
            self.edited.adopt(edits, before)
            return
        if self.edited.changed:
            self.edited.forget()
        self._take_out(edits)
        self.edited.apply(*edits, on_other_weights=True)
        if saved.others <= {edit.name for edit in self.edited.applied}:  # otherwise more are put back, before the first step
            try:
                self.check_restored(edits, saved)
            except DamagedFileError:
                self._take_out(edits)
                raise

    def withdraw(self, edits: Sequence[Edit], saved: SavedWeights) -> None:
        self._drop_lost(edits, saved)
        edits = [edit for edit in edits if edit.name not in saved.others]  # on the model before the run
        changed = set(self.edited.changed)
        loaded = [edit for edit in edits if any(delta.path in changed for delta in edit.deltas)]
        if loaded:
            self.edited.forget(*loaded)
        self.edited.rebase()  # others, that were trained with the weights of the checkpoint
        self._take_out(edits)

    def check_unchanged(self) -> None:
        self.edited.check_unchanged()

    def _take_out(self, edits: Sequence[Edit]) -> None:
        on = {edit.name for edit in self.edited.applied}
        self.edited.revert(*(edit.name for edit in edits if edit.name in on))

    def _drop_lost(self, edits: Sequence[Edit], saved: SavedWeights) -> None:
        """Forgets, with a warning, other edits than these over which weights that never had them were loaded."""
        known, changed = saved.others | {edit.name for edit in edits}, set(self.edited.changed)
        for edit in self.edited.applied:
            if edit.name in known or not any(delta.path in changed for delta in edit.deltas):
                continue
            self.edited.forget(edit)
            warnings.warn(
                f"edit '{edit.name}' is not in the weights of the checkpoint that was loaded", EditNotAppliedWarning, stacklevel=2
            )

    def settle(self) -> None:
        if self.is_training:
            self.edited.rebase()


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
        """Of an adapter that is there: it is that of these edits, solved again or not, or changes nothing."""
        if self._peft in _HELD:
            return _HELD[self._peft] <= {edit.name for edit in edits}
        for path, layer in self.lora_layers().items():
            if ADAPTER not in layer.lora_A:
                continue
            a, b = (getattr(layer, side)[ADAPTER].weight.detach().cpu() for side in ("lora_A", "lora_B"))
            own_a, own_b = factors.get(path, (a[:0], b[:, :0]))
            if not torch.allclose(b @ a, (own_b @ own_a).to(a), rtol=1e-3, atol=1e-6) and bool(b.any()):
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
        _HELD[self._peft] = frozenset(edit.name for edit in edits)
        return list(edits)

    def exchange(self, edits: Sequence[Edit]) -> None:
        self._write(self._factors(edits))

    def restore(self, edits: Sequence[Edit], saved: SavedWeights, before: Mapping[str, Tensor]) -> None:
        self.put(edits)

    def withdraw(self, edits: Sequence[Edit], saved: SavedWeights) -> None:
        self._write({})
        self._is_empty = True

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


def _paths(edits: Sequence[Edit]) -> list[str]:
    return list(dict.fromkeys(delta.path for edit in edits for delta in edit.deltas))


HOSTS = {host.name: host for host in (BaseHost, AdapterHost)}


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


def _other_edit_is_missing(name: str) -> ConfigError:
    return ConfigError(
        f"the checkpoint was saved with edit '{name}' on the model, too",
        expected="all edits that were on the model, before the first step",
        found=f"'{name}' is not on it",
        remedy="load that edit and call EditedWeights.of(model).apply(edit) before training goes on, or resume with all callbacks",
    )


def _other_weights(paths: list[str]) -> DamagedFileError:
    return DamagedFileError(
        "the weights are not those that the state of the edits in this checkpoint belongs to",
        expected="weights with the edits in them, or those of the base that they were applied to",
        found=f"other numbers in {', '.join(paths[:3])}",
        remedy="resume from another checkpoint, with the model that the run began with",
    )
