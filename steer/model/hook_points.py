"""Hook points: where and how to read and write a site."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from steer.errors import SiteError
from steer.model.site import Site

if TYPE_CHECKING:
    from steer.model.anatomy import Anatomy


@dataclass(frozen=True)
class HookPoint:
    """Where and how to read and write one site.

    Attributes:
        module, path: the module that is hooked, and its name in the model.
        side: `input` or `output` of that module.
        width: size of the last dimension; None when only a call can tell (module sites).
        columns: which columns of a fused projection belong to the site; None for all.
        axes: order of the tensor's axes that begins with batch and tokens, when it is another one than [batch, tokens, width]; those that
            follow (several residual streams) are put side by side.
        anatomy: of the stack that the site belongs to; None for a module of unknown role.
        argument: place or name of the tensor among the arguments of the module, on the input side; None for the first.
    """

    site: Site
    module: nn.Module
    path: str
    side: str
    width: int | None
    columns: slice | Tensor | None = None
    axes: tuple[int, ...] | None = None
    argument: int | str | None = None
    anatomy: Anatomy | None = field(default=None, repr=False, compare=False)


def out_width(module: nn.Module) -> int | None:
    """Output width of a linear map, an embedding or a norm, as far as its attributes tell."""
    for name in ("out_features", "nf", "embedding_dim"):
        if isinstance(width := getattr(module, name, None), int):
            return width
    weight = getattr(module, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 1 else None


def in_width(module: nn.Module) -> int | None:
    """Input width of a linear map (Conv1D of GPT-2 stores its weight as [in, out])."""
    for name in ("in_features", "nx"):
        if isinstance(width := getattr(module, name, None), int):
            return width
    return None


def module_point(model: nn.Module, site: Site) -> HookPoint:
    """Resolves a `module:` site by its full path, or by a path that ends in it (under a wrapper's prefix)."""
    assert site.module is not None
    named = dict(model.named_modules())
    matches = [site.module] if site.module in named else [path for path in named if path.endswith("." + site.module)]
    if len(matches) != 1:
        near = difflib.get_close_matches(site.module, named, n=3) or list(named)[1:9]
        raise SiteError(
            f"module '{site.module}' is {'ambiguous' if matches else 'not'} in {type(model).__name__}",
            expected="the path of one module, or an end of it that no other has",
            found=matches or f"no such path; near it: {near}",
            remedy="give more of the path" if matches else "take a path of model.named_modules()",
        )
    module = named[matches[0]]
    width = out_width(module) if site.part == "output" else in_width(module)
    return HookPoint(site, module, matches[0], site.part, width)
