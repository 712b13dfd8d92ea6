"""Protection of edits against the optimiser: steps without a share along their keys, or layers below them that learn less or nothing.

A projected gradient protects nothing under Adam, which scales entries one by one, and weight decay takes from an edit without any gradient.
So it is the step that is projected, after the optimiser has made it. That keeps W k for the stored keys k; the keys themselves move when
lower layers learn, which only freezing or damping these prevents.

All keys have a large part in common, their mean, along which a layer sets what it gives to every token. A step without any share in the
span of some keys could not learn that any more, and a hot fine-tune went astray. So the projection is oblique: of all changes that take the
step back at the keys it is the one that changes least what other tokens get, as the edit itself was solved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steer.edits.base_modules import dense_weight, find_module, weight_of
from steer.edits.edit import Edit
from steer.edits.weights_state import paths_of
from steer.errors import ConfigError
from steer.intervene.deploy.weight_edit import is_conv1d
from steer.model.anatomy import Anatomy
from steer.training.edit_hosts import ADAPTER, EditHost

_RANK = 1e-6  # share of the largest singular value below which keys count as dependent
_LEAST_COSINE = 0.05  # between the keys and the directions of edits; below, a projection along these would be 20 times as large as a step
_PARTS = ("keys", "directions", "given")  # tensors of a ProtectedMap


class Protection(ABC):
    """What is done around the steps of optimisers while edits are on the model.

    Args:
        model: that is trained. host: where the edits are.
        damping: of `damp`.
    """

    name: ClassVar[str]

    def __init__(self, model: nn.Module, host: EditHost, damping: float) -> None:
        self.model, self.host, self.damping = model, host, damping
        self._handles: list[Any] = []

    def check(self, edits: Sequence[Edit]) -> None:  # noqa: B027 - most protect any edit
        """Raises ConfigError for edits that it cannot protect."""

    @abstractmethod
    def protect(self, edits: Sequence[Edit]) -> None:
        """Protects these edits, as they are on the model now, from now on."""

    def hook(self, optimizers: Sequence[Optimizer]) -> None:
        """Follows the steps of optimisers until the detach."""
        optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]  # below accelerate's and Lightning's
        self._handles += [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]

    def before_step(self) -> None:  # noqa: B027
        """When gradients are complete, before an optimiser uses them."""

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:  # noqa: B027
        """When an optimiser has changed weights."""

    def detach(self) -> None:
        """Leaves the optimisers alone."""
        while self._handles:
            self._handles.pop().remove()

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor], edits: Sequence[Edit]) -> None:
        """Goes on protecting edits that are on the model again."""
        self.protect(edits)


class Alarm(Protection):
    """Does nothing to the training."""

    name = "alarm"

    def protect(self, edits: Sequence[Edit]) -> None:
        pass


class Resolve(Alarm):
    """Does nothing to the training either: edits that faded are solved again by `EditRun`."""

    name = "resolve"

    def check(self, edits: Sequence[Edit]) -> None:
        refuse_dora(self.host, edits, self.name)


@dataclass
class ProtectedMap:
    """A matrix with edits.

    Attributes:
        module: the linear map. layer: PEFT's around it, or None.
        keys: [f, n] fp64, orthonormal columns that span the keys of its edits.
        directions: [f, n] fp64, in which they are changed: directions^T keys = I, see `dual_directions`.
        given: [d, n] fp64, what the map gives for `keys`, to which every step returns.
    """

    module: nn.Module
    layer: Any
    keys: Tensor
    directions: Tensor
    given: Tensor

    @torch.no_grad()
    def put_back(self, stepped: set[nn.Parameter]) -> None:
        """Takes the share along the keys out of what a step did to the weight, and to the adapters on it."""
        weight = weight_of(self.module)
        if weight is not None and weight in stepped:
            keys, directions, given = (each.to(weight.device) for each in (self.keys, self.directions, self.given))
            wide = (weight.mT if is_conv1d(self.module) else weight).double()  # [d, f]
            wide = wide - (wide @ keys - given) @ directions.mT
            weight.copy_(wide.mT if is_conv1d(self.module) else wide)
        for name, linear in getattr(self.layer, "lora_A", {}).items():
            if name != ADAPTER and linear.weight in stepped:
                blind(linear.weight, self)


@torch.no_grad()
def blind(a: Tensor, protected: ProtectedMap) -> None:
    """Takes the keys Q out of what a LoRA A [rank, f] reads: A <- A - (A Q) D^T, so that the adapter gives nothing for them."""
    keys, directions = protected.keys.to(a.device), protected.directions.to(a.device)
    wide = a.double()
    a.copy_(wide - (wide @ keys) @ directions.mT)


class Project(Protection):
    """Steps that change nothing at the keys: dW <- dW - (dW Q) D^T, weight decay included; Q spans the keys of the edits of a matrix.

    D, with D^T Q = I, lies in the directions v = C^-1 k of the edits, in which other tokens have the least share, see `dual_directions`.
    As W Q is kept, and every step brought back to it, roundings of many steps do not add up, and no weights of the step before are needed.
    A LoRA adapter on the same map is kept from seeing the keys, A <- A - (A Q) D^T, and gives up what it had learnt for them before.
    """

    name = "project"

    def __init__(self, model: nn.Module, host: EditHost, damping: float) -> None:
        super().__init__(model, host, damping)
        self.maps: dict[str, ProtectedMap] = {}

    def check(self, edits: Sequence[Edit]) -> None:
        for edit in edits:
            if any(delta.keys is None for delta in edit.deltas):
                raise no_keys(edit, self.name)
        refuse_dora(self.host, edits, self.name)

    @torch.no_grad()
    def protect(self, edits: Sequence[Edit]) -> None:
        self.maps = {}
        for path in paths_of(edits):
            deltas = [delta for edit in edits if (delta := edit.delta(path)) is not None]
            keys = orthonormal(torch.cat([delta.keys for delta in deltas if delta.keys is not None]))
            directions = dual_directions(keys, torch.cat([delta.v for delta in deltas], 1))
            module = find_module(self.host.edited.model, path)
            weight = dense_weight(module).cpu().double()
            given = (weight.mT if is_conv1d(module) else weight) @ keys
            self._set(path, module, keys, directions, given)
            for name, linear in getattr(self.maps[path].layer, "lora_A", {}).items():
                if name != ADAPTER and linear.weight.requires_grad:
                    blind(linear.weight, self.maps[path])

    def _set(self, path: str, module: nn.Module, *tensors: Tensor) -> None:
        """tensors: of the map, in the order of `_PARTS`."""
        device = dense_weight(module).device
        self.maps[path] = ProtectedMap(module, self.host.lora_layers().get(path), *(tensor.to(device) for tensor in tensors))

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self.maps:
            stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            for protected in self.maps.values():
                protected.put_back(stepped)

    def detach(self) -> None:
        super().detach()
        self.maps = {}

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{part}/{path}": getattr(each, part).cpu() for path, each in self.maps.items() for part in _PARTS}

    def load_state_dict(self, state: Mapping[str, Tensor], edits: Sequence[Edit]) -> None:
        paths = paths_of(edits)
        if not all(f"{part}/{path}" in state for path in paths for part in _PARTS):  # of a run that protected otherwise
            self.protect(edits)
            return
        for path in paths:
            self._set(path, find_module(self.host.edited.model, path), *(state[f"{part}/{path}"] for part in _PARTS))


class Freeze(Protection):
    """Blocks up to the last edited one, and the embeddings, learn nothing: no gradient, no decay, no momentum."""

    name = "freeze"

    def __init__(self, model: nn.Module, host: EditHost, damping: float) -> None:
        super().__init__(model, host, damping)
        self.parameters: list[nn.Parameter] = []

    def protect(self, edits: Sequence[Edit]) -> None:
        self.parameters = [parameter for parameter in below(self.model, edits) if parameter.requires_grad]
        for parameter in self.parameters:
            self._handles.append(parameter.register_post_accumulate_grad_hook(_without_gradient))

    def before_step(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None  # optimisers pass over it

    def detach(self) -> None:
        super().detach()
        self.parameters = []


class Damp(Protection):
    """Blocks up to the last edited one, and the embeddings, move by a share of each step. A smaller gradient would not do: Adam divides by
    its size. Keeps a copy of their weights during a step."""

    name = "damp"

    def __init__(self, model: nn.Module, host: EditHost, damping: float) -> None:
        super().__init__(model, host, damping)
        self.parameters: list[nn.Parameter] = []
        self._before: dict[nn.Parameter, Tensor] = {}

    def protect(self, edits: Sequence[Edit]) -> None:
        self.parameters = [parameter for parameter in below(self.model, edits) if parameter.requires_grad]

    def before_step(self) -> None:
        self._before = {parameter: parameter.detach().clone() for parameter in self.parameters}

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            before = self._before.pop(parameter, None)
            if before is not None:
                parameter.copy_(torch.lerp(before, parameter, self.damping))

    def detach(self) -> None:
        super().detach()
        self.parameters, self._before = [], {}


PROTECTIONS: dict[str, Callable[[nn.Module, EditHost, float], Protection]] = {
    protection.name: protection for protection in (Alarm, Resolve, Project, Freeze, Damp)
}


def orthonormal(keys: Tensor) -> Tensor:
    """[f, rank] fp64, orthonormal columns that span keys [n, f]; keys that depend on others add none."""
    u, s, _ = torch.linalg.svd(keys.double().mT, full_matrices=False)
    return u[:, s > _RANK * s.max()]


def dual_directions(keys: Tensor, v: Tensor) -> Tensor:
    """[f, n] D with D^T Q = I, in the span of the directions of edits where these tell the keys apart, else the keys themselves.

    For v = C^-1 Q, which covers editors with a covariance, D = C^-1 Q (Q^T C^-1 Q)^-1: of all changes X that have X Q = A, A D^T is the one
    of the least tr(X C X^T), the mean square of what it adds to the outputs for ordinary keys.

    Args:
        keys: [f, n] fp64, Q, orthonormal columns. v: [f, m] right factors of the deltas.
    """
    basis = orthonormal(v.mT)  # [f, m]
    cosines = basis.mT @ keys  # [m, n]; its singular values are the cosines of the angles between the two spans
    if basis.shape[1] < keys.shape[1] or float(torch.linalg.svdvals(cosines).min()) < _LEAST_COSINE:
        return keys
    return basis @ torch.linalg.pinv(cosines).mT


def refuse_dora(host: EditHost, edits: Sequence[Edit], protection: str) -> None:
    """Raises ConfigError for a map with edits under a DoRA adapter, which gives more than the sum of its parts."""
    layers = host.lora_layers()
    for path in paths_of(edits):
        if any(getattr(layers.get(path), "use_dora", {}).values()):
            raise _dora(path, protection)


def below(model: nn.Module, edits: Sequence[Edit]) -> list[nn.Parameter]:
    """Parameters on which the keys of edits depend: embeddings and the blocks up to the last edited one, adapters in them included."""
    anatomy = Anatomy.find(model)
    last = max((delta.layer for edit in edits for delta in edit.deltas), default=-1)
    modules: list[nn.Module] = [module for module in anatomy.decoder.modules() if isinstance(module, nn.Embedding)]
    modules += [module for module in (anatomy.embedding, *anatomy.blocks[: last + 1]) if module is not None]
    return list(dict.fromkeys(parameter for module in modules for parameter in module.parameters()))


def _without_gradient(parameter: Tensor) -> None:
    """So that a norm that is clipped is that of what learns; DDP waits for gradients that are there."""
    if parameter.grad is not None:
        parameter.grad.zero_()


# ---- errors


def _dora(path: str, protection: str) -> ConfigError:
    return ConfigError(
        f"protect='{protection}' cannot tell what '{path}' gives: its adapter is a DoRA, which scales the weight below it",
        expected="LoRA without use_dora on maps with edits",
        found="use_dora=True",
        remedy="leave this map out of target_modules, or use protect='freeze', 'damp' or 'alarm'",
    )


def no_keys(edit: Edit, protection: str, what: str = "keys") -> ConfigError:
    return ConfigError(
        f"protect='{protection}' needs the {what} of edit '{edit.name}'",
        expected=f"an edit that was solved from keys, with its {what}",
        found=f"one by '{edit.editor}' without them",
        remedy="use protect='freeze', 'damp' or 'alarm', or an edit as it was saved (an adapter keeps no keys)",
    )
