"""A plan in the weights, and the way back."""

from __future__ import annotations

from types import TracebackType
from weakref import WeakSet

import torch
from torch import Tensor, nn

from steer.errors import DeployError
from steer.files import tensor_hash
from steer.intervene.deploy.weight_edit import WeightEdit
from steer.model.anatomy import Anatomy
from steer.model.tied import SETTING, give_own_weight, tied_head, tying_configs

_SEALED: WeakSet[Baked] = WeakSet()  # bakes that are in weights now


class Baked:
    """A plan in the weights, which `undo` takes out again.

    Attributes:
        changed: names of the parameters that it changed or added.
        error: relative difference of the final hidden states from those of the plan, or of the logits where that is larger, when it
            was tried.

    Example:
        >>> with steer.bake(plan, model) as baked:
        ...     print(baked.changed, baked.error)
    """

    def __init__(self) -> None:
        self.error = 0.0
        self._weights: list[tuple[str, nn.Module, str, Tensor]] = []  # name, module, attribute, old value
        self._biases: list[tuple[str, nn.Module]] = []  # those that are new
        self._heads: list[tuple[str, nn.Module, nn.Parameter]] = []  # name and module of those untied, and the weight they shared
        self._settings: list[tuple[object, str, object]] = []  # configuration, name, old value
        self._sealed: dict[str, object] = {}  # digests of what was written, by name

    def __repr__(self) -> str:
        return f"Baked({len(self.changed)} parameters, error {self.error:.2g})"

    @property
    def changed(self) -> list[str]:
        return [*(name for name, *_ in self._weights), *(name for name, *_ in self._heads), *(name for name, _ in self._biases)]

    @property
    def new_biases(self) -> list[str]:
        """Paths of the maps that had no bias before."""
        return [name.removesuffix(".bias") for name, _ in self._biases]

    @torch.no_grad()
    def apply(self, weight_edit: WeightEdit) -> None:
        """Writes a weight edit into its map."""
        change = weight_edit.change()
        if not weight_edit.changes_bias_only:
            self._write(weight_edit, weight_edit.weight_name, weight_edit.changed_weight(change))
        if weight_edit.kind == "linear" and change.shifts:
            if weight_edit.bias is None:
                self.add_bias(weight_edit.path, weight_edit.module, change.bias)
            else:
                self._write(weight_edit, "bias", weight_edit.bias.to(change.bias) + change.bias)

    def add_bias(self, path: str, module: nn.Module, value: Tensor | float) -> None:
        """Gives a map without a bias one that is not trained. value: [out] in units of what the map gives, or one number for all."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        out = weight.shape[0] if isinstance(module, nn.Linear) else weight.shape[1]
        bias = torch.empty(out, dtype=weight.dtype, device=weight.device)
        bias.copy_(torch.as_tensor(value))
        self._biases.append((f"{path}.bias", module))  # before it is there, so that an interrupt takes it away
        module.register_parameter("bias", nn.Parameter(bias, requires_grad=False))

    def untie(self, anatomy: Anatomy) -> None:
        """Gives a head that shares the weight of the embedding a copy of it, and lets the configuration say that they are not tied."""
        head = tied_head(anatomy)
        if head is not None:
            path = next(path for path, module in anatomy.model.named_modules() if module is head)
            self._heads.append((f"{path}.weight", head, head.weight))  # type: ignore[arg-type]
            give_own_weight(head)
        for config in tying_configs(anatomy):
            self.set(config, SETTING, False)

    def set(self, config: object, name: str, value: object) -> None:
        """Changes a setting of the model."""
        self._settings.append((config, name, getattr(config, name)))
        setattr(config, name, value)

    def seal(self) -> None:
        """Remembers what it wrote; from now on `undo` refuses to throw anything else away."""
        self._sealed = self._digests()
        _SEALED.add(self)

    @torch.no_grad()
    def undo(self) -> None:
        """Puts every weight back to the bit; doing it again does nothing.

        Raises:
            DeployError: a weight, a new bias or a setting was changed since, and would lose that; nothing is undone.
        """
        current = self._digests() if self._sealed else {}
        changed_since = [name for name, digest in self._sealed.items() if current[name] != digest]
        if changed_since:
            raise _changed_after_bake(changed_since, self._baked_over(changed_since))
        _SEALED.discard(self)
        self._sealed.clear()  # where this is interrupted, it may be done again
        for _, module, attribute, old in self._weights:
            module._parameters[attribute].copy_(old)  # type: ignore[union-attr]
        for _, module in self._biases:
            module.register_parameter("bias", None)
        for _, head, shared in self._heads:
            head.weight = shared
        for config, name, value in reversed(self._settings):
            setattr(config, name, value)
        self._weights.clear()
        self._biases.clear()
        self._heads.clear()
        self._settings.clear()

    def _baked_over(self, names: list[str]) -> list[Baked]:
        """Bakes that wrote these parameters of the same model, and are in them as they wrote them."""
        own = {(id(module), name) for name, module, *_ in (*self._weights, *self._heads, *self._biases) if name in names}
        others = [other for other in _SEALED if other is not self]
        return [
            other
            for other in others
            if any((id(module), name) in own for name, module, *_ in (*other._weights, *other._heads, *other._biases))
            and other._digests() == other._sealed
        ]

    def _write(self, weight_edit: WeightEdit, attribute: str, new: Tensor) -> None:
        parameter: nn.Parameter = getattr(weight_edit.module, attribute)
        self._weights.append((f"{weight_edit.path}.{attribute}", weight_edit.module, attribute, parameter.detach().clone()))
        parameter.copy_(new)

    def _digests(self) -> dict[str, object]:
        """What now stands where it wrote. Versions of tensors would not do: they do not count what is written through `.data`."""
        digests: dict[str, object] = {name: _digest(module, attribute) for name, module, attribute, _ in self._weights}
        digests |= {name: _digest(head, "weight") for name, head, _ in self._heads}
        digests |= {name: _digest(module, "bias") for name, module in self._biases}
        digests |= {f"config.{name}": getattr(config, name, None) for config, name, _ in self._settings}
        return digests

    def __enter__(self) -> Baked:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.undo()
        except BaseException:  # an interrupt may have left a part
            self.undo()
            raise


def _digest(module: nn.Module, attribute: str) -> str | None:
    """Hash of a parameter; None for one that is gone, or is held elsewhere."""
    parameter = module._parameters.get(attribute)
    return None if parameter is None or parameter.is_meta else tensor_hash({"": parameter.detach().cpu()})


# ---- errors


def _changed_after_bake(names: list[str], others: list[Baked]) -> DeployError:
    if others:
        return DeployError(
            f"{len(names)} of the weights of this bake were changed by another one after it",
            expected="bakes undone in the opposite order, the last one first",
            found=f"{' and '.join(map(repr, others))}, which changed {names[0]} too",
            remedy="undo that bake first, by its own `undo()`, then this one",
        )
    return DeployError(
        "weights or settings were changed after the bake",
        expected="what the bake wrote",
        found=f"{len(names)} others, e.g. {names[0]}",
        remedy="undo before training, loading or converting weights; what was changed since would be lost",
    )
