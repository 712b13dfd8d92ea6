"""Where the edits of a training run live: in the weights of the model, or in a PEFT adapter of their own beside the one that learns."""

from __future__ import annotations

import warnings
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from steer.edits.base_modules import base_path, dense_weight, find_module, matrix_hash
from steer.edits.edit import Edit
from steer.edits.edited_weights import EditedWeights
from steer.edits.make_edit import mapped
from steer.edits.weights_state import paths_of
from steer.errors import ConfigError, DamagedFileError
from steer.training.edit_state import SavedWeights

ADAPTER = "edits"  # name of the adapter
_OF_RUNS: weakref.WeakKeyDictionary[nn.Module, Counter[str]] = weakref.WeakKeyDictionary()  # names of edits of runs that are attached


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
    def restore(self, edits: Sequence[Edit], saved: SavedWeights, before: Mapping[str, Tensor]) -> bool:
        """After a checkpoint was loaded: the edits that were on the model when it was saved are on it again.

        Args:
            before: what `weights` gave before the checkpoint was loaded.

        Returns:
            The weights are those that were saved. False where that can be told when other runs have gone on as well.
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
        return SavedWeights(self._hashes(edits), self._others(edits))

    def missing(self, saved: SavedWeights) -> frozenset[str]:
        """Names of other edits that were on the model when it was saved, and are not."""
        return saved.others - {edit.name for edit in self.edited.applied}

    def check_restored(self, edits: Sequence[Edit], saved: SavedWeights) -> None:
        """Once all runs of edits have gone on from a checkpoint. Edits that came since tell nothing of it.

        Raises:
            ConfigError: an edit that was on the model is not. DamagedFileError: other weights.
        """
        if missing := self.missing(saved):
            raise _other_edit_is_missing(min(missing))
        if self._others(edits) == saved.others:
            self._check_hashes(edits, saved)

    def _check_hashes(self, edits: Sequence[Edit], saved: SavedWeights) -> None:
        found = self._hashes(edits)
        if other := [path for path, digest in saved.hashes.items() if found.get(path) != digest]:
            raise _other_weights(other)

    def _others(self, edits: Sequence[Edit]) -> frozenset[str]:
        own = {edit.name for edit in edits}
        return frozenset(edit.name for edit in self.edited.applied if edit.name not in own)

    def _hashes(self, edits: Sequence[Edit]) -> dict[str, str]:
        """Of every matrix of the base that these edits are in."""
        return {path: matrix_hash(dense_weight(find_module(self.edited.model, path))) or "" for path in paths_of(edits)}

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

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._names: set[str] = set()

    def prepare(self, edits: Sequence[Edit]) -> None:
        for edit in edits:
            self.edited.check(edit)
        self._names = {edit.name for edit in edits}
        _OF_RUNS.setdefault(self.edited.model, Counter()).update(self._names)

    def weights(self, edits: Sequence[Edit]) -> dict[str, Tensor]:
        return {path: self.edited.original(path) for path in paths_of(edits)}

    def put(self, edits: Sequence[Edit]) -> list[Edit]:
        self.edited.rebase()  # trained by the run: what was changed before it is refused at its start
        on = {edit.name: edit for edit in self.edited.applied}
        self.edited.apply(*(edit for edit in edits if edit.name not in on), on_other_weights=True)
        return [on.get(edit.name, edit) for edit in edits]

    def exchange(self, edits: Sequence[Edit]) -> None:
        self.edited.rebase()
        self.edited.replace(edits)

    def restore(self, edits: Sequence[Edit], saved: SavedWeights, before: Mapping[str, Tensor]) -> bool:
        self._drop_lost(edits, saved)
        if self._hashes(edits) == saved.hashes:  # the checkpoint has the weights of the base
            self.edited.adopt(edits, before)
            self.edited.rebase()  # other edits, that were trained with these weights
            return True
        if self.edited.changed:
            self.edited.forget()
        self._take_out(edits)
        self.edited.apply(*edits, on_other_weights=True)
        if self._others(edits) != saved.others:  # other runs put theirs back, or take them out, before the first step
            return False
        try:
            self._check_hashes(edits, saved)
        except DamagedFileError:
            self._take_out(edits)
            raise
        return True

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
            if _OF_RUNS.get(self.edited.model, Counter())[edit.name]:  # its own run goes back as well
                continue
            warnings.warn(
                f"edit '{edit.name}' is not in the weights of the checkpoint that was loaded", EditNotAppliedWarning, stacklevel=2
            )

    def settle(self) -> None:
        _OF_RUNS.get(self.edited.model, Counter()).subtract(self._names)
        self._names = set()
        if self.is_training:
            self.edited.rebase()


# ---- errors


def _other_edit_is_missing(name: str) -> ConfigError:
    return ConfigError(
        f"the checkpoint was saved with edit '{name}' on the model, too",
        expected="all edits that were on the model, before the first step",
        found=f"'{name}' is not on it",
        remedy="load that edit and call EditedWeights.of(model).apply(edit) before the checkpoint is loaded, as before training began; or "
        "resume with all callbacks",
    )


def _other_weights(paths: list[str]) -> DamagedFileError:
    return DamagedFileError(
        "the weights are not those that the state of the edits in this checkpoint belongs to",
        expected="weights with the edits in them, or those of the base that they were applied to",
        found=f"other numbers in {', '.join(paths[:3])}",
        remedy="resume from another checkpoint, with the model that the run began with",
    )
