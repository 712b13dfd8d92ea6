"""Modules of the model below its wrappers (PEFT, compilation, DDP), by the paths that they have in the model as it was loaded."""

from __future__ import annotations

from torch import Tensor, nn

from steer.errors import WrongModelError, did_you_mean
from steer.files import tensor_hash
from steer.intervene.deploy.transformers_model import transformers_model
from steer.intervene.deploy.weight_edit import is_conv1d
from steer.model.anatomy import Anatomy

_OF_WRAPPERS = ("base_layer", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # parts of paths that wrappers add
_OF_PEFT = "base_model.model."  # before every path of a PEFT model


def base_model(model: nn.Module) -> nn.Module:
    """The model below wrappers: transformers' own, or the module that runs where it is none of theirs. Raises AnatomyError."""
    anatomy = Anatomy.find(model)
    found = transformers_model(anatomy)
    return anatomy.runner if found is None else found


def base_path(path: str) -> str:
    """The path of a module without what PEFT, compilation and checkpointing add to it.

    Example:
        >>> base_path("base_model.model.model.layers.3.mlp.down_proj.base_layer")
        'model.layers.3.mlp.down_proj'
    """
    inner = path.removeprefix(_OF_PEFT)
    return ".".join(part for part in inner.split(".") if part not in _OF_WRAPPERS)


def weight_modules(base: nn.Module) -> dict[str, nn.Module]:
    """The linear maps below wrappers, and other modules with a matrix, by their base paths; for a LoRA layer it is the map inside it."""
    named = base.named_modules(remove_duplicate=False)
    return {base_path(path): module for path, module in named if weight_of(module) is not None or _is_packed_map(module)}


def find_module(base: nn.Module, path: str) -> nn.Module:
    """The map at a base path. Raises WrongModelError where there is none."""
    modules = weight_modules(base)
    if path not in modules:
        raise _no_such_matrix(path, list(modules))
    return modules[path]


def weight_of(module: nn.Module) -> nn.Parameter | None:
    """The matrix of a module; None where it has none, or keeps it in a packed form of its own (GPTQ, AWQ)."""
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.dim() == 2 else None


def dense_weight(module: nn.Module) -> Tensor:
    """The matrix of a module that is known to be whole and in memory, detached."""
    weight = weight_of(module)
    assert weight is not None
    return weight.detach()


def shape_of(module: nn.Module) -> tuple[int, int]:
    """[d, f] of a linear map: width out, width in, in whatever way its weight is stored."""
    if isinstance(getattr(module, "in_features", None), int):
        return module.out_features, module.in_features  # type: ignore[return-value]
    weight = weight_of(module)
    assert weight is not None  # of `weight_modules`
    out, into = weight.shape
    return (into, out) if is_conv1d(module) else (out, into)


def sharing_modules(base: nn.Module, module: nn.Module) -> list[str]:
    """Paths at which a weight is used where that is more than one: other modules have it, too, or the module itself stands twice."""
    weight = weight_of(module)
    users = [
        base_path(path)
        for path, other in base.named_modules(remove_duplicate=False)
        if any(parameter is weight for parameter in other._parameters.values())
    ]
    return users if len(users) > 1 else []


def matrix_hash(weight: Tensor) -> str | None:
    """SHA-256 of the numbers of a weight as they are stored, packed ones too; None where they are not here (offloaded, sharded)."""
    if type(weight.data) is not Tensor or weight.is_meta:
        return None
    return tensor_hash({"": weight.detach().cpu()})


def _is_packed_map(module: nn.Module) -> bool:
    """A linear map without `weight`; layers of PEFT's, which have these numbers too, hold the map."""
    has_widths = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
    return has_widths and not hasattr(module, "base_layer") and module._parameters.get("weight") is None


# ---- errors


def _no_such_matrix(path: str, known: list[str]) -> WrongModelError:
    return WrongModelError(
        f"the model has no matrix '{path}'",
        expected="a linear map, by its path in the model as it was loaded",
        found=f"{len(known)} others",
        remedy=did_you_mean(path, known) or "use the edit with the model that it was made for",
    )
