"""Parameters of a circuit: which rows and columns of which weights belong to its heads, MLPs and neurons.

A head has its rows of the query projection and its columns of the output projection, and the rows of the keys and values that it shares
with the other heads of its group. A neuron has its rows of the maps that lead to it, as a gradient shows, and its column of the map behind
it. Biases and norms that all heads or neurons share belong to none of them; a whole MLP has all parameters in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from steer.circuits.circuit import Circuit
from steer.errors import AnatomyError, ConfigError
from steer.intervene.deploy.weight_edit import is_conv1d, is_dense
from steer.model.anatomy import Anatomy
from steer.model.block_sites import heads_of
from steer.model.restoring import restoring_all
from steer.model.site import Site
from steer.model.trial_pass import without_hooks

_TOKENS = 32  # of the trial that shows which rows lead to which neuron
Masks = dict[nn.Parameter, Tensor]  # bool, True at the entries of a circuit; of the shape of the parameter, or what broadcasts to it


def circuit_masks(model: nn.Module, circuit: Circuit) -> Masks:
    """The entries of parameters that belong to a circuit, those of adapters where there are (PEFT's LoRA), otherwise of the weights.

    Raises:
        WrongModelError: the circuit of another model. ConfigError: an empty circuit, or weights that are quantised, sharded, offloaded or
            tied. SiteError, AnatomyError: heads or neurons whose weights are not known.
    """
    anatomy = circuit.check_model(model)
    if circuit.is_empty:
        raise _empty()
    circuit.check_whole("a choice of weights")
    masks: Masks = {}
    for layer in range(anatomy.n_layers):
        for module, rows, columns in (*_of_heads(anatomy, circuit, layer), *_of_neurons(anatomy, circuit, layer)):
            _add_map(masks, module, rows, columns)
        if circuit.nodes[circuit.graph.mlp_at(layer)]:
            # two maps may lie in the block itself, of which the first is where the MLP is read (OPT)
            parts = [anatomy.module_in_block(layer, anatomy.writer(layer, "mlp").part), anatomy.point(Site("mlp.input", layer)).module]
            for parameter in [parameter for part in parts for parameter in part.parameters()]:
                masks[parameter] = torch.ones((1,) * parameter.dim(), dtype=torch.bool)
    if circuit.nodes[0] and anatomy.embedding is not None:
        for parameter in anatomy.embedding.parameters():
            masks[parameter] = torch.ones((1,) * parameter.dim(), dtype=torch.bool)
    _check(model, masks)
    return masks


Map = tuple[nn.Module, Tensor | None, Tensor | None]  # a map, [out] bool and [in] bool of the circuit


def _of_heads(anatomy: Anatomy, circuit: Circuit, layer: int) -> Iterator[Map]:
    chosen = circuit.nodes[circuit.graph.heads_at(layer)] != 0  # [heads]
    if not bool(chosen.any()):
        return
    heads = heads_of(anatomy, layer, "attn.q")
    per_group = heads.n_heads // heads.n_kv_heads
    groups = chosen.unflatten(0, (heads.n_kv_heads, per_group)).any(1)  # [groups]
    for part in "qkv":
        point = anatomy.point(Site(f"attn.{part}", layer))
        inside = (chosen if part == "q" else groups).repeat_interleave(heads.head_dim)  # [width of the part]
        if point.columns is not None:  # of a fused projection
            wide = torch.zeros(_sizes(point.module)[0], dtype=torch.bool)
            wide[point.columns] = inside
            inside = wide
        yield point.module, inside, None
    yield anatomy.point(Site("attn.z", layer)).module, None, chosen.repeat_interleave(heads.head_dim)


def _of_neurons(anatomy: Anatomy, circuit: Circuit, layer: int) -> Iterator[Map]:
    amounts = circuit.neurons.get(layer)
    if amounts is None or not bool(amounts.any()):
        return
    chosen = amounts != 0  # [neurons]
    writer = anatomy.writer(layer, "mlp")
    behind = anatomy.point(Site("mlp.neurons", layer)).module
    mlp = anatomy.module_in_block(layer, writer.part)
    if mlp is behind:
        raise _unknown_neurons(anatomy, layer)
    found = list(_rows_to_neurons(mlp, behind, chosen, anatomy.width))
    if not found:
        raise _unknown_neurons(anatomy, layer)
    yield from found
    yield behind, None, chosen


def _rows_to_neurons(mlp: nn.Module, behind: nn.Module, chosen: Tensor, width: int) -> Iterator[Map]:
    """Maps of an MLP whose rows lead to neurons of their own, with those of the chosen.

    Proven by gradients: those of the chosen neurons, and those of a half of all, are zero in the rows of others.
    """
    n = len(chosen)
    half = torch.rand(n, generator=torch.Generator().manual_seed(0)) < 0.5
    for module in mlp.modules():
        if module is behind or not _is_map(module):
            continue
        out, _ = _sizes(module)
        for layout in _layouts(n, out):
            if all(_leads_only_to(mlp, behind, module, some, layout(some), width) for some in (half, ~half)):
                yield module, layout(chosen), None
                break


def _layouts(n: int, out: int) -> list[Callable[[Tensor], Tensor]]:
    """How the rows of a map may stand for neurons: one each; or two, of a gate and what it multiplies, in blocks or side by side."""
    if out == n:
        return [lambda some: some]
    if out == 2 * n:
        return [lambda some: some.repeat(2), lambda some: some.repeat_interleave(2)]
    return []


def _leads_only_to(mlp: nn.Module, behind: nn.Module, module: nn.Module, some: Tensor, rows: Tensor, width: int) -> bool:
    """The gradient of some neurons is zero in all rows of a map but these, and not zero throughout."""
    weight = _base(module).weight
    neurons: list[Tensor] = []
    with without_hooks(mlp, lambda hook: True), restoring_all() as restore, torch.enable_grad(), torch.random.fork_rng(devices=[]):
        for parameter in mlp.parameters():
            if parameter.is_floating_point():
                restore.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(parameter is weight)
        hook = behind.register_forward_pre_hook(lambda _, args: neurons.append(args[0]))
        restore.callback(hook.remove)
        x = torch.randn(1, _TOKENS, width, generator=torch.Generator().manual_seed(1))
        mlp(x.to(weight.device, weight.dtype))
        (gradient,) = torch.autograd.grad(neurons[0][..., some.to(weight.device)].float().square().sum(), weight, allow_unused=True)
    if gradient is None:
        return False
    by_row = gradient.abs().amax(0 if is_conv1d(_base(module)) else 1).cpu()  # [out]
    return bool(by_row.any()) and not bool(by_row[~rows].any())


def _base(module: nn.Module) -> Any:
    """A map without the adapter around it."""
    return getattr(module, "base_layer", module)


def _is_map(module: nn.Module) -> bool:
    base = _base(module)
    return (isinstance(base, nn.Linear) or is_conv1d(base)) and is_dense(getattr(base, "weight", None))


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Out and in."""
    shape = _base(module).weight.shape
    return (shape[1], shape[0]) if is_conv1d(_base(module)) else (shape[0], shape[1])


def _add_map(masks: Masks, module: nn.Module, rows: Tensor | None, columns: Tensor | None) -> None:
    """Adds the entries of a map: rows of weight and bias, columns of the weight; rows of B or columns of A of its adapters."""

    def add(parameter: nn.Parameter | None, mask: Tensor) -> None:
        if parameter is not None:
            masks[parameter] = masks[parameter] | mask if parameter in masks else mask

    if hasattr(module, "lora_A"):
        whole = torch.ones(1, 1, dtype=torch.bool)
        adapted: Any = module
        for name, a in adapted.lora_A.items():
            b = adapted.lora_B[name]
            add(a.weight, whole if columns is None else columns[None])  # [rank, in]
            add(b.weight, whole if rows is None else rows[:, None])  # [out, rank]
            if rows is not None:
                add(b.bias, rows)
        return
    if not _is_map(module):
        raise _no_dense_map(module)
    base = _base(module)
    mask = rows[:, None] if rows is not None else columns[None] if columns is not None else torch.zeros(1, 1, dtype=torch.bool)
    add(base.weight, mask.T if is_conv1d(base) else mask)
    if rows is not None:
        add(base.bias, rows)


def _check(model: nn.Module, masks: Masks) -> None:
    """Raises ConfigError for parameters that are not here as a whole, or that stand in several places."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter in masks:
        if not is_dense(parameter):
            raise _not_here(names[parameter][0], parameter)
        if len(names[parameter]) > 1:
            raise _tied(names[parameter])


# ---- errors


def _empty() -> ConfigError:
    return ConfigError("an empty circuit has no parameters", expected="at least one node or neuron", found="none",
                       remedy="choose more components, or a lower threshold")  # fmt: skip


def _unknown_neurons(anatomy: Anatomy, layer: int) -> AnatomyError:
    return AnatomyError(
        f"which weights lead to which neuron in block {layer} of this {anatomy.kind} is not known",
        expected="linear maps in the module of the MLP, with one row for each neuron or two",
        found=type(anatomy.module_in_block(layer, anatomy.writer(layer, "mlp").part)).__name__,
        remedy=f"take the whole MLP, 'm{layer}', into the circuit instead of its neurons",
    )


def _no_dense_map(module: nn.Module) -> ConfigError:
    weight = getattr(_base(module), "weight", None)
    return ConfigError(
        "a map of the circuit has no weight with rows and columns of its own here",
        expected="nn.Linear or Conv1D with a dense weight in floating point, neither sharded nor offloaded nor quantised",
        found=f"{type(_base(module)).__name__} of {getattr(weight, 'dtype', None)}",
        remedy="train a LoRA restricted to the circuit (steer.circuits.lora_config), or load the model whole in floating point",
    )


def _not_here(name: str, parameter: nn.Parameter) -> ConfigError:
    return ConfigError(
        f"'{name}' cannot be masked",
        expected="a dense parameter in floating point that is here as a whole",
        found=f"{type(parameter.data).__name__} of {parameter.dtype}{' on meta' if parameter.is_meta else ''}",
        remedy="mask before the model is sharded, with a strategy that keeps parameters whole (DDP)",
    )


def _tied(names: list[str]) -> ConfigError:
    return ConfigError(
        f"'{names[0]}' belongs to the circuit and is tied to other modules, which would learn or stay with it",
        expected="a weight of its own",
        found=f"one weight in {' and '.join(names)}",
        remedy="steer.load(..., untie=True), or leave the input out of the circuit",
    )
