"""A plan in the weights, and the way back."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from steer.errors import DeployError
from steer.files import tensor_hash
from steer.intervene.deploy.fold import Fold


class Baked:
    """A plan in the weights.

    Attributes:
        changed: names of the parameters that it changed or made.
        error: relative difference of the final hidden states from those of the plan, when it was tried.
    """

    def __init__(self) -> None:
        self.error = 0.0
        self._weights: list[tuple[str, nn.Module, str, Tensor]] = []
        self._biases: list[tuple[str, nn.Module]] = []
        self._settings: list[tuple[object, str, object]] = []
        self._written: dict[str, object] = {}

    @property
    def changed(self) -> list[str]:
        return [name for name, *_ in self._weights] + [name for name, _ in self._biases]

    @property
    def new_biases(self) -> list[str]:
        """Paths of the maps that had no bias before."""
        return [name.removesuffix(".bias") for name, _ in self._biases]

    @torch.no_grad()
    def apply(self, made: Fold) -> None:
        """Puts one fold into its map."""
        a, b, shift = made.change()
        if not made.keeps_weight:
            new = made.weight.to(a) + b @ a
            if made.kind == "table":
                new += shift[:, None]
            self._write(made, "down_proj" if made.kind == "experts" else "weight", new.mT if made.transposed else new)
        if made.kind == "linear" and bool((shift != 0).any()):
            if made.bias is None:
                self.add_bias(made.path, made.module, shift)
            else:
                self._write(made, "bias", made.bias.to(shift) + shift)

    def add_bias(self, path: str, module: nn.Module, value: Tensor | float) -> None:
        """Gives a map without a bias one that is not trained. value: [out], or a number for all of it."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        out = weight.shape[0] if isinstance(module, nn.Linear) else weight.shape[1]
        bias = torch.empty(out, dtype=weight.dtype, device=weight.device)
        bias.copy_(torch.as_tensor(value))
        module.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
        self._biases.append((f"{path}.bias", module))

    def set(self, config: object, name: str, value: object) -> None:
        """Changes a setting of the model."""
        self._settings.append((config, name, getattr(config, name)))
        setattr(config, name, value)

    def seal(self) -> None:
        """Remembers what it wrote; from now on `undo` refuses to throw anything else away."""
        self._written = self._found()

    @torch.no_grad()
    def undo(self) -> None:
        """Puts every weight back to the bit; doing it again does nothing.

        Raises:
            DeployError: a weight, a new bias or a setting was changed since, and would lose that; nothing is undone.
        """
        found = self._found() if self._written else {}
        if moved := [name for name, written in self._written.items() if found[name] != written]:
            raise DeployError(
                "weights or settings were changed after the bake",
                expected="what the bake wrote",
                found=f"{len(moved)} others, e.g. {moved[0]}",
                remedy="undo before training, loading or converting weights; what was changed since would be lost",
            )
        for _, module, name, old in self._weights:
            module._parameters[name].copy_(old)  # type: ignore[union-attr]
        for _, module in self._biases:
            module.register_parameter("bias", None)
        for config, name, value in reversed(self._settings):
            setattr(config, name, value)
        self._weights, self._biases, self._settings, self._written = [], [], [], {}

    def _write(self, made: Fold, name: str, new: Tensor) -> None:
        parameter: nn.Parameter = getattr(made.module, name)
        self._weights.append((f"{made.path}.{name}", made.module, name, parameter.detach().clone()))
        parameter.copy_(new)

    def _found(self) -> dict[str, object]:
        """What now stands where it wrote. Versions of tensors would not do: they do not count what is written through `.data`."""
        held = [(name, module, kind) for name, module, kind, _ in self._weights] + [(name, module, "bias") for name, module in self._biases]
        found: dict[str, object] = {name: _digest(module._parameters.get(kind)) for name, module, kind in held}
        return found | {f"config.{name}": getattr(config, name, None) for config, name, _ in self._settings}

    def __enter__(self) -> Baked:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def _digest(parameter: nn.Parameter | None) -> str | None:
    """None for one that is gone, or is held elsewhere."""
    return None if parameter is None or parameter.is_meta else tensor_hash({"": parameter.detach().cpu()})
