"""Activations of dictionaries: which pre-activations become features. One file each in `steer.features.activations`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor

from steer.features.rows import check_finite
from steer.registry import Registry


class Activation:
    """A function of the pre-activations [..., features], differentiable in them.

    Attributes:
        name: under which it is registered.
        elementwise: a feature depends on its own pre-activation alone, so that a few features need a few encoder rows. For the others
            (top-k) the whole encoder is computed.
        tensors: [features] each, or [1] for one number that all share.
        settings: what else it takes, JSON-able.

    Example:
        >>> from steer.features.activations.jumprelu import JumpReLU
        >>> JumpReLU(torch.tensor([0.5, 2.0]))(torch.tensor([1.0, 1.0]))
        tensor([1., 0.])
    """

    name: ClassVar[str]
    elementwise: ClassVar[bool] = True

    def __init__(self, tensors: Mapping[str, Tensor] | None = None, **settings: Any) -> None:
        self.tensors = dict(tensors or {})
        self.settings = settings
        for name, tensor in self.tensors.items():
            check_finite(tensor, f"{name} of the activation '{self.name}'")

    @property
    def top(self) -> int | None:
        """k, where the k largest pre-activations of each token are all that counts, so that the others need not be kept; None elsewhere."""
        return None

    def of_top(self, pre: Tensor) -> Tensor:
        """[..., k] features of the pre-activations [..., k] that are the largest of their tokens, where there is a `top`."""
        return pre

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value}' for key, value in self.settings.items())})"

    def __call__(self, pre: Tensor, features: Tensor | None = None) -> Tensor:
        """[..., chosen] features, in the dtype of `pre`.

        Args:
            pre: [..., chosen] pre-activations.
            features: which features they are of, all of them when None; only elementwise activations know a part.
        """
        raise NotImplementedError

    def slope(self, pre: Tensor, f: Tensor) -> Tensor | None:
        """[..., chosen] d f / d pre of elementwise activations that are straight between jumps; None leaves it to autograd.

        Args:
            pre, f: [..., chosen] as of a call without `features`, and what it returned.
        """
        return None

    def threshold(self, pre: Tensor, features: Tensor | None = None) -> Tensor | None:
        """[chosen] what a pre-activation has to exceed for its feature to be on, in the dtype of `pre`; None where others decide."""
        return None

    def of(self, name: str, pre: Tensor, features: Tensor | None) -> Tensor:
        """[chosen or 1] one of the tensors, of the chosen features, in the dtype and on the device of the pre-activations."""
        tensor = self.tensors[name]
        if features is not None and len(tensor) > 1:
            tensor = tensor[features.to(tensor.device)]
        return tensor.to(pre.device, pre.dtype)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same with other tensors, which are not looked at: cheap enough for every call, and compiled code can follow it."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.tensors = dict(tensors)
        return other

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """Rebuilds it from its file form."""
        arguments: dict[str, Any] = {**tensors, **settings}
        return cls(**arguments)


ACTIVATIONS: Registry[type[Activation]] = Registry(
    "dictionary activation", "steer.features.activations", "steer.dictionary_activations", subclass_of=Activation
)
