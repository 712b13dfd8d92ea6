"""Edited maps: the down projections of MLPs, the linear maps that edits of facts change.

An MLP reads as a memory (Geva et al. 2021, arXiv 2012.14913): what its down projection takes is a key, what it gives a value. An edit is
W' = W + U V^T of that map alone, so neither what makes the key (a fused or plain gate, GPT-2's Conv1D, parallel attention) nor a bias
matters. Where a norm follows the MLP (Gemma), a value is still what the map itself gives, before that norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import of_type
from steer.errors import ConfigError, EditError, SiteError
from steer.intervene.deploy.transformers_model import transformers_model
from steer.intervene.deploy.weight_edit import is_conv1d, is_dense
from steer.model.anatomy import Anatomy
from steer.model.hook_points import in_width, out_width
from steer.model.site import Site
from steer.model.writers import Writer

_BASE_LAYER = "base_layer"  # PEFT's name for the map inside its own layer
_WRAPPERS = (_BASE_LAYER, "_orig_mod", "_checkpoint_wrapped_module")


@dataclass(frozen=True, eq=False)
class EditedMap:
    """The down projection of one block: d x f, from the f neurons of an MLP to the d dimensions of the residual stream.

    Attributes:
        layer: of the block, from 0.
        path: of the linear map in the model as it was given; under PEFT that of the base layer.
        name: the same in the model without wrappers (PEFT, torch.compile, DDP, checkpointing).
        module: the linear map, below the layers that PEFT puts around it.
        in_width, out_width: f and d.
        transposed: the module holds [f, d] (Conv1D of GPT-2).
        is_quantised: the weight is no plain matrix of floating-point numbers, so that only an adapter beside it can carry an edit.
        has_post_norm: a norm follows before the stream gets what the map gives.
        scale: factor that the output is multiplied by before it is added to the stream, mostly 1.

    Example:
        >>> (edited_map,) = edited_maps(steer.Anatomy.find(model), [8])
        >>> edited_map.path, str(edited_map.key_site)
        ('model.layers.8.mlp.down_proj', 'layers.8.mlp.neurons')
    """

    layer: int
    path: str
    name: str
    module: nn.Module
    in_width: int
    out_width: int
    transposed: bool
    is_quantised: bool
    has_post_norm: bool
    scale: float

    @property
    def key_site(self) -> Site:
        """What the map itself takes, [batch, tokens, f]: under PEFT the input of the base layer, which an adapter may have changed."""
        return Site("input", module=self.path) if self.path.endswith(_BASE_LAYER) else Site("mlp.neurons", self.layer)

    @property
    def value_site(self) -> Site:
        """What the map itself gives, [batch, tokens, d], bias included, before an adapter adds to it and before a post-norm."""
        return Site("output", module=self.path)

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as the module holds it. Raises EditError for a quantised one."""
        if self.is_quantised:
            raise _quantised(self)
        assert isinstance(self.module.weight, nn.Parameter)
        return self.module.weight

    def weight(self) -> Tensor:
        """[d, f] fp32 copy of the weight, on its device. Raises EditError for a quantised one."""
        held = self.parameter.detach()
        return (held.mT if self.transposed else held).to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def as_held(self, change: Tensor) -> Tensor:
        """A matrix, change: [d, f], in the layout of the module's weight, which may be that of its transpose."""
        return change.mT if self.transposed else change

    def __repr__(self) -> str:
        held = "quantised" if self.is_quantised else "Conv1D" if self.transposed else "Linear"
        return f"EditedMap('{self.path}', {self.out_width} x {self.in_width}, {held})"


def edited_maps(anatomy: Anatomy, layers: Sequence[int]) -> list[EditedMap]:
    """The down projections of some blocks, each once, in ascending order.

    Args:
        layers: blocks, counted from 0; negative from the end.
        anatomy: of the model. layers: of the blocks, from 0.

    Raises:
        EditError: no layers, one that the model does not have, a mixture of experts, an MLP that cannot be found or ends in no linear map,
            a weight that is sharded, offloaded, or used in several places. ConfigError: layers that are no list of integers.

    Example:
        >>> edited_maps(steer.Anatomy.find(model), [8])[0].weight().shape  # [d, f]
    """
    of_type(layers, (list, tuple, range), "the layers of an edit", "pass a list such as [8]")
    for layer in layers:
        check_layer(layer, anatomy.n_layers)
    if not layers:
        raise _no_layers()
    return [_edited_map(anatomy, layer) for layer in sorted({layer % anatomy.n_layers for layer in layers})]


def check_layer(layer: Any, count: int | None) -> None:
    """Raises ConfigError for what is no number of a layer, and EditError for one that a model of so many blocks does not have.

    Args:
        count: None where it is not known yet.
    """
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise _no_number(layer)
    if count is not None and not -count <= layer < count:
        raise _no_layer(count, layer)


def _edited_map(anatomy: Anatomy, layer: int) -> EditedMap:
    try:
        writer = anatomy.writer(layer, "mlp")
    except SiteError as error:
        raise _no_mlp(anatomy, layer, str(error.found)) from error
    if writer.projection is None:
        raise _no_projection(anatomy, layer, writer)
    module = _base(anatomy.module_in_block(layer, writer.projection))
    path = anatomy.path_of(module, Site("mlp.neurons", layer))
    weight = getattr(module, "weight", None)
    is_matrix = isinstance(module, nn.Linear) or is_conv1d(module)
    if is_matrix and isinstance(weight, Tensor) and (weight.is_meta or hasattr(weight, "device_mesh")):  # a mesh: DTensor
        raise _not_here(path, weight)
    if len(users := _users(anatomy.model, weight)) > 1:
        raise _shared(users)
    neurons, width = in_width(module), out_width(module)
    if neurons is None or width is None:
        raise _unknown_kind(path, module)
    return EditedMap(
        layer=layer,
        path=path,
        name=_plain_name(anatomy, module),
        module=module,
        in_width=neurons,
        out_width=width,
        transposed=is_conv1d(module),
        is_quantised=not (is_matrix and is_dense(weight)),
        has_post_norm=anatomy.post_norm(layer, writer) is not None,
        scale=writer.scale,
    )


def _plain_name(anatomy: Anatomy, module: nn.Module) -> str:
    """The path of a module in the transformers model, or in the model that was given, without the names of wrappers."""
    root = transformers_model(anatomy) or anatomy.model
    path = next(path for path, other in root.named_modules() if other is module)
    return without_wrappers(path)


def without_wrappers(path: str) -> str:
    """The path of a module or parameter without what PEFT, torch.compile and checkpointing put between its parts."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _base(module: nn.Module) -> nn.Module:
    """The linear map inside PEFT's layers."""
    inner = getattr(module, _BASE_LAYER, None)
    return _base(inner) if isinstance(inner, nn.Module) else module


def _users(model: nn.Module, weight: object) -> list[str]:
    """Paths of all modules that hold a weight; a module that stands in two places counts twice."""
    if not isinstance(weight, nn.Parameter):
        return []
    return [path for path, module in model.named_modules(remove_duplicate=False) if module._parameters.get("weight") is weight]


# ---- errors


def _no_layers() -> EditError:
    return EditError(
        "no layer was named to be edited", expected="at least one", found="none", remedy="pass layers=[8], or a list of several"
    )


def _no_number(layer: object) -> ConfigError:
    return ConfigError("wrong value for a layer of an edit", expected="the number of a block", found=repr(layer), remedy="pass layers=[8]")


def _no_layer(count: int, layer: int) -> EditError:
    last = count - 1
    return EditError(
        "a layer to be edited is not in this model",
        expected=f"0 to {last}, or negative from the end",
        found=layer,
        remedy=f"layers are numbered from 0; the last is {last}",
    )


def _no_mlp(anatomy: Anatomy, layer: int, found: str) -> EditError:
    return EditError(
        f"block {layer} of this {anatomy.kind} has no MLP that could be found",
        expected="one MLP whose output is added to the residual stream",
        found=found,
        remedy="edit a layer that has one, or a model whose blocks are attention and MLP",
    )


def _no_projection(anatomy: Anatomy, layer: int, writer: Writer) -> EditError:
    is_mixture = "experts" in dict(anatomy.module_in_block(layer, writer.part).named_children())
    mixture = f"a mixture of experts, '{writer.part}', which sends texts to different maps"
    return EditError(
        f"block {layer} of this {anatomy.kind} has no single down projection to be edited",
        expected="an MLP that ends in one linear map",
        found=mixture if is_mixture else f"'{writer.part}', which ends in none",
        remedy="edit a layer with a dense MLP, where the model has one",
    )


def _unknown_kind(path: str, module: nn.Module) -> EditError:
    return EditError(
        f"'{path}' is no linear map that can be edited",
        expected="a Linear or Conv1D, or a quantised one that says how wide it is",
        found=type(module).__name__,
        remedy="put a torch.nn.Linear in its place",
    )


def _not_here(path: str, weight: object) -> EditError:
    place = "offloaded" if isinstance(weight, Tensor) and weight.is_meta else "sharded, or computed from something else"
    return EditError(
        f"the weight of '{path}' cannot be edited where it is",
        expected="a dense parameter in memory",
        found=f"{type(weight).__name__}, {place}",
        remedy="load the model without offloading and before it is sharded",
    )


def _shared(users: list[str]) -> EditError:
    return EditError(
        f"the weight of '{users[0]}' is used in several places",
        expected="a weight of one block alone",
        found=", ".join(users),
        remedy="an edit would change all of them: give each a copy of its own first",
    )


def _quantised(edited: EditedMap) -> EditError:
    return EditError(
        f"the weight of '{edited.path}' is quantised",
        expected="a matrix of floating-point numbers",
        found=type(edited.module).__name__,
        remedy="export the edit as an adapter, or load the model in bfloat16",
    )
