"""EditedWeights: the edits in the weights of a model, each of which can be taken out again without a trace of it.

Subtracting what was added does not give back the same floating-point numbers. So every weight that edits touch is recomputed from the one
that was there before the first of them, W0: the sum W0 + u v^T + ... runs over the edits in the order of their names, rank by rank, in fp64
(where a product of two fp32 numbers is exact), and is rounded once. After any sequence of `apply` and `revert` the weights are therefore a
function of W0 and of the set of edits that remain, to the bit, on any device and with any number of threads.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from steer.checks import of_type
from steer.edits.base_modules import (
    base_model,
    dense_weight,
    find_module,
    fitting_module,
    matrix_hash,
    sharing_modules,
    weight_modules,
    weight_of,
)
from steer.edits.edit import Edit
from steer.edits.exact_sum import exact_sum, relative_size
from steer.edits.weights_state import WeightsState, deltas_of, hash_of, paths_of, write
from steer.errors import EditError, NonFiniteError, WrongModelError, did_you_mean
from steer.intervene.deploy.weight_edit import is_dense
from steer.model.restoring import restoring


class EditedWeights:
    """The edits in the weights of one model: apply, revert, clear. `EditedWeights.of(model)` gives the same object for a model every time.

    Changes are all or nothing: every new weight is computed before the first is written, and an error or interrupt while they are written
    puts the old ones back. One copy is kept of each matrix that is touched, W0, and dropped with the last edit of it. Wrappers (PEFT,
    compilation, DDP, a LightningModule) lead to the same object; under a LoRA layer it is the base weight that is edited.

    Weights that something else has changed since (a training step, a checkpoint that was loaded) are noticed by their hash, and `apply`,
    `revert` and `clear` refuse to guess what they hold. Say it: `rebase()` when the edits are still in them (they were trained), `forget()`
    when they are not (they were loaded anew). Casts of the model (`model.half()`, and back) are told from these, to the bit, and W0 is cast
    with it: what edits are taken out of is the model as the casts would have left it without them. Casts are told by what they did to the
    edited weights, whenever somebody looks (`changed` does). One that did nothing to them cannot be told: bf16 weights that became fp16 and
    then something else count as cast once, though numbers of W0 below 8e-6 may have been rounded on the way. Look in between.

    Example:
        >>> other = steer.edit_facts(model, tokenizer, facts[1], editor="rome", layers=[8], covariance=covariance)
        >>> edited = EditedWeights.of(model)
        >>> edited.apply(edit)
        >>> edited.apply(other)
        >>> edited.revert(edit)  # the weights are now those of a model to which `other` alone was applied, to the bit
        >>> edited.clear()
    """

    def __init__(self, base: nn.Module) -> None:
        self._model = weakref.ref(base)  # a strong one would keep every model that was ever edited
        self._state = WeightsState()

    @classmethod
    def of(cls, model: nn.Module) -> EditedWeights:
        """The edits of a model, raw or wrapped. Raises AnatomyError where no model is found in it."""
        base = base_model(model)
        if base not in _OF_MODELS:
            _OF_MODELS[base] = cls(base)
        return _OF_MODELS[base]

    def __repr__(self) -> str:
        return f"EditedWeights({', '.join(repr(edit.name) for edit in self.applied) or 'no edits'})"

    @property
    def applied(self) -> tuple[Edit, ...]:
        """The edits that are in the weights, in the order in which they were applied."""
        return self._state.edits

    @property
    def rounding(self) -> dict[str, float]:
        """What the dtype of the weights has cost, by path: |W - (W0 + dW)| / |dW|, W being rounded. About 1e-6 in fp32, 0.05 in bf16."""
        return dict(self._state.rounding)

    @property
    def rebased(self) -> list[str]:
        """Paths whose W0 was worked out from trained weights (`rebase`): without edits they are right to one rounding, not to the bit."""
        return sorted(self._state.rebased)

    @property
    def model(self) -> nn.Module:
        """The model below its wrappers. Raises EditError when it is gone."""
        model = self._model()
        if model is None:
            raise _model_is_gone()
        return model

    # ---- edits on and off

    def apply(self, *edits: Edit, on_other_weights: bool = False) -> None:
        """Adds an edit, or several in one step.

        Args:
            on_other_weights: of a model like the one that it was solved for, whose matrices hold other numbers (it was fine-tuned). What
                the edit then does is not what was solved for: measure it.

        Raises:
            EditError: it is applied already, or another of its name is; quantised, offloaded, sharded or tied weights; weights that
                something else has changed. WrongModelError: a model of another shape, or matrices that it was not solved for.
            NonFiniteError: a sum beyond the range of the dtype.
        """
        on = {edit.name for edit in self.applied}
        for edit in edits:
            of_type(edit, Edit, "an edit", "pass an Edit, as steer.edit_facts makes it")
            if edit.name in on:
                raise _applied_already(edit)
            self.check(edit)
            if not on_other_weights:
                self.check_weights(edit)
            on.add(edit.name)
        self._become((*self.applied, *edits))

    def revert(self, *edits: Edit | str) -> None:
        """Takes an edit out, itself or by name, or several in one step; the others stay. Raises EditError for one that is not applied,
        otherwise as `apply`."""
        for edit in edits:
            of_type(edit, (Edit, str), "an edit to be reverted", "pass an Edit, or its name")
        names = [edit if isinstance(edit, str) else edit.name for edit in edits]
        on = [other.name for other in self.applied]
        if missing := [name for name in names if name not in on]:
            raise _not_applied(missing[0], on)
        self._become(tuple(other for other in self.applied if other.name not in names))

    def replace(self, edits: Sequence[Edit]) -> None:
        """Puts edits in the place of those of their names that are applied, in one step. Raises as `revert`.

        Raises:
            EditError: an edit that is not on the model.
        """
        new = {edit.name: edit for edit in edits}
        if missing := set(new) - {edit.name for edit in self.applied}:
            raise _not_applied(min(missing), [edit.name for edit in self.applied])
        for edit in edits:
            self.check(edit)
        self._become(tuple(new.get(edit.name, edit) for edit in self.applied))

    def clear(self) -> None:
        """Takes all edits out; without any it does nothing."""
        self._become(())

    @contextmanager
    def with_edit(self, edit: Edit, *, on_other_weights: bool = False) -> Iterator[EditedWeights]:
        """An edit that is applied inside a `with` block, whatever ends it. Others may come and go in it."""
        before = self._state

        def put_back() -> None:
            is_new = not any(other.name == edit.name for other in before.edits)
            if is_new and any(other.name == edit.name for other in self.applied):
                self.revert(edit)

        with restoring(put_back):
            self.apply(edit, on_other_weights=on_other_weights)
            yield self

    # ---- weights that something else has changed

    @property
    def changed(self) -> list[str]:
        """Paths of the matrices with edits that hold something else than what was written, cast or not: trained, loaded or merged since."""
        modules = self._followed()
        return [path for path, digest in self._state.written.items() if path not in modules or hash_of(modules[path]) != digest]

    def rebase(self) -> list[str]:
        """Takes what training made of the edited weights as the edits on top of a trained W0; no weight changes.

        From now on W0 is W - dW, kept in fp64. Reverting an edit then leaves the trained weight without it, rounded once.

        Returns:
            The paths where something had changed.
        """
        changed = self.changed
        self._work_out(changed, self._state, {})
        return changed

    def adopt(self, edits: Sequence[Edit], originals: Mapping[str, Tensor] | None = None) -> None:
        """Takes the weights as they are for weights that hold these edits, beside those that are on the model; no weight changes.

        As after a checkpoint was loaded. One of a name that is on the model takes the place of that one.

        Args:
            originals: weights that may be W0, by path; one that does not give the weights to the bit with all edits is not used.
        """
        for edit in edits:
            self.check(edit)
        self._followed()
        new = {edit.name: edit for edit in edits}
        replaced = [edit for edit in self.applied if edit.name in new]
        becomes = tuple(new.pop(edit.name, edit) for edit in self.applied) + tuple(new.values())
        self._work_out(paths_of((*replaced, *edits)), replace(self._state, edits=becomes), originals or {})

    def forget(self, *edits: Edit | str) -> None:
        """Takes the weights as they are for weights without these edits, or without any when none is named; no weight changes.

        As after a checkpoint was loaded into them. What is not on the model is passed over.
        """
        names = {edit if isinstance(edit, str) else edit.name for edit in edits}
        left = tuple(edit for edit in self.applied if edits and edit.name not in names)
        if not left:
            self._state = WeightsState()
            return
        gone = paths_of([edit for edit in self.applied if edit.name in names])
        self._work_out(gone, replace(self._state, edits=left), {})

    def _work_out(self, paths: Sequence[str], state: WeightsState, likely: Mapping[str, Tensor]) -> None:
        """Makes a state with W0 = W - dW at these paths that of the model. likely: W0, where it fits; or the one that is known."""
        modules = weight_modules(self.model)
        self._check_places(paths, modules)
        originals, written, dtypes, rebased = dict(state.originals), dict(state.written), dict(state.dtypes), set(state.rebased)
        casts = {path: dtypes for path, dtypes in state.casts.items() if path not in paths}
        for path in paths:
            weight, deltas, module = dense_weight(modules[path]), deltas_of(state.edits, path), modules[path]
            if not deltas:
                for kept in (originals, written, dtypes):
                    kept.pop(path, None)
                rebased.discard(path)
                continue
            if path in likely and torch.equal(exact_sum(likely[path], deltas, module).to(weight), weight):
                originals[path] = likely[path].clone()
                rebased.discard(path)
            elif hash_of(module) != written.get(path) or deltas != deltas_of(self.applied, path):
                originals[path] = exact_sum(weight, deltas, module, sign=-1)
                rebased.add(path)
            else:
                originals[path] = self._state.original(path)
            written[path], dtypes[path] = hash_of(module), weight.dtype
        rounding = {path: size for path, size in state.rounding.items() if path in originals}
        self._state = WeightsState(state.edits, originals, written, dtypes, rounding, frozenset(rebased), casts)

    # ---- checks

    def check(self, edit: Edit) -> None:
        """Raises EditError or WrongModelError where the maps of an edit are not there, are of another shape, or cannot be edited."""
        modules = {delta.path: fitting_module(self.model, delta.path, delta.shape) for delta in edit.deltas}
        self._check_places(list(modules), modules)

    def check_weights(self, edit: Edit) -> None:
        """Raises WrongModelError where the matrices, without any edit, are not those that an edit was solved for."""
        if other := [path for path, digest in edit.base.items() if self.base_hash(path) != digest]:
            raise _other_weights(edit, other)

    def base_hash(self, path: str) -> str | None:
        """Hash of a matrix without any edit, see `Edit.base`; None where its numbers are not here. Raises EditError for no such matrix."""
        self._followed()
        if path in self._state.originals:
            return matrix_hash(self._state.original(path))
        return hash_of(find_module(self.model, path))

    def original(self, path: str) -> Tensor:
        """[d, f] or, in a Conv1D, [f, d]: a copy of a matrix without any edit, fp64 where it was worked out (`rebased`).

        Raises:
            EditError: no such matrix.
        """
        self._followed()
        known = path in self._state.originals
        return (self._state.original(path) if known else dense_weight(find_module(self.model, path))).clone()

    def check_unchanged(self) -> None:
        """Raises EditError where something else has changed weights that hold edits."""
        if changed := self.changed:
            raise _changed_since(changed)

    # ---- how weights change

    def _followed(self) -> dict[str, nn.Module]:
        """The maps of the model, after casts of it were taken note of."""
        modules = weight_modules(self.model)
        self._state = self._state.after_casts(modules)
        return modules

    @torch.no_grad()
    def _become(self, edits: tuple[Edit, ...]) -> None:
        """Writes what the weights are with these edits alone, wholly or not at all."""
        changed, modules, was = self.changed, weight_modules(self.model), self._state
        self._check_places([path for path in changed if path in modules], modules)  # sharded or offloaded since
        if changed:
            raise _changed_since(changed)
        paths = paths_of((*was.edits, *edits))
        moved = [path for path in paths if path in was.casts or deltas_of(was.edits, path) != deltas_of(edits, path)]
        self._check_places(moved, modules)
        originals, written, dtypes, rounding = dict(was.originals), dict(was.written), dict(was.dtypes), dict(was.rounding)
        new: dict[str, Tensor] = {}
        for path in moved:
            weight, deltas = dense_weight(modules[path]), deltas_of(edits, path)
            original = was.original(path) if path in was.originals else weight
            exact = exact_sum(original, deltas, modules[path])
            new[path] = exact.to(weight)
            if not bool(torch.isfinite(new[path]).all()):
                raise _out_of_range(path, weight) if bool(torch.isfinite(original).all()) else _no_numbers(path)
            if deltas:
                originals[path] = original if path in was.originals else original.clone()
                rounding[path] = relative_size(new[path].to(exact) - exact, exact - original.to(exact))
                written[path], dtypes[path] = matrix_hash(new[path]), weight.dtype
            else:
                for kept in (originals, written, dtypes, rounding):
                    kept.pop(path, None)
        becomes = WeightsState(edits, originals, written, dtypes, rounding, was.rebased & originals.keys())
        old = {path: dense_weight(modules[path]).clone() for path in new}

        def put_back() -> None:
            if self._state is not becomes:
                write(modules, old)

        with restoring(put_back):
            write(modules, new)
            self._state = becomes

    def _check_places(self, paths: Sequence[str], modules: Mapping[str, nn.Module]) -> None:
        """Raises EditError for weights that cannot be edited."""
        for path in paths:
            weight = weight_of(modules[path])
            if not is_dense(weight):
                raise _not_plain(path, modules[path], weight)
            if users := sharing_modules(self.model, modules[path]):
                raise _tied(path, users)


_OF_MODELS: weakref.WeakKeyDictionary[nn.Module, EditedWeights] = weakref.WeakKeyDictionary()


# ---- errors


def _model_is_gone() -> EditError:
    return EditError(
        "the model of these edits is gone",
        expected="the model that they were applied to",
        found="nothing refers to it any more",
        remedy="call EditedWeights.of(model) with the model that is used now",
    )


def _applied_already(edit: Edit) -> EditError:
    return EditError(
        f"an edit called '{edit.name}' is on this model already",
        expected="each edit once, by its name",
        found=f"'{edit.name}' again",
        remedy="revert it first, or apply another edit under another name: edit.named('...')",
    )


def _not_applied(name: str, names: list[str]) -> EditError:
    return EditError(
        f"no edit called '{name}' is on this model",
        expected=f"one of {', '.join(names)}" if names else "edits that were applied to this object",
        found=name if names else "none",
        remedy=did_you_mean(name, names)
        or "look at EditedWeights.of(model).applied; a copy of an edited model does not know of its edits until adopt([edit]) tells it",
    )


def _changed_since(paths: list[str]) -> EditError:
    return EditError(
        "something else has changed weights that hold edits",
        expected="the weights as they were when edits were last applied or reverted",
        found=f"other numbers in {', '.join(paths[:3])}",
        remedy="call EditedWeights.of(model).rebase() when they were trained with the edits in them; "
        "forget() when they were loaded anew and hold no edits",
    )


def _other_weights(edit: Edit, paths: list[str]) -> WrongModelError:
    return WrongModelError(
        f"edit '{edit.name}' was solved for other weights",
        expected="the matrices whose hashes it holds, edits aside",
        found=f"other numbers in {', '.join(paths[:3])}",
        remedy="solve it for this model, as it is now (a cast changes them, too); to try it as it is: apply(edit, on_other_weights=True)",
    )


def _not_plain(path: str, module: nn.Module, weight: Tensor | None) -> EditError:
    if weight is not None and (weight.is_meta or hasattr(weight, "device_mesh")):
        found, remedy = ("offloaded weights", "load the model whole (device_map=None)") if weight.is_meta else (
            "weights sharded over ranks", "apply and revert edits before the model is sharded"
        )  # fmt: skip
    else:
        kind = "packed" if weight is None else str(weight.dtype).removeprefix("torch.")
        found = f"a {type(module).__name__} of {kind} numbers"
        remedy = "put the edit beside the weights: to_adapter(edit, model, folder), then PeftModel.from_pretrained(model, folder)"
    return EditError(f"'{path}' cannot be edited in place", expected="floating-point weights in memory", found=found, remedy=remedy)


def _tied(path: str, users: list[str]) -> EditError:
    return EditError(
        f"'{path}' shares its weight, so that an edit would change other maps, too",
        expected="a matrix that one module has",
        found=f"one of {', '.join(users)}",
        remedy="edit another layer, or untie them first (steer.model.tied.untie for an embedding and its head)",
    )


def _no_numbers(path: str) -> NonFiniteError:
    return NonFiniteError(
        f"the weights of '{path}' are not finite without any edit",
        expected="finite numbers",
        found="NaN or infinity in the model itself",
        remedy="load the model again; look at the training that it comes from",
    )


def _out_of_range(path: str, weight: Tensor) -> NonFiniteError:
    return NonFiniteError(
        f"the edited weights of '{path}' are beyond the range of {str(weight.dtype).removeprefix('torch.')}",
        expected="finite numbers",
        found="infinity",
        remedy="look at the norm of the edit: one as large as that disables the model",
    )
