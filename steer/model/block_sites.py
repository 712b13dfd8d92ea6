"""Sites in a block: which module each part is, once what writes to the residual stream is proven."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from steer.errors import SiteError
from steer.model.heads import Heads
from steer.model.hook_points import HookPoint, in_width
from steer.model.site import Site
from steer.model.writers import Writer

if TYPE_CHECKING:
    from steer.model.anatomy import Anatomy

AS_MODULE = "'module:<dotted path>:<input|output>' always exists"


def writer_of(anatomy: Anatomy, layer: int, part: str) -> Writer:
    """The one writer that is `attn`, `mlp` or `mixer` in a block. Raises SiteError where there is none, or not one alone."""
    parts = anatomy.parts[layer]
    found = {"attn": parts.attention, "mlp": parts.mlp, "mixer": parts.mixers}[part]()
    if len(found) != 1:
        raise _no_writer(anatomy, layer, part, found)
    return found[0]


def heads_of(anatomy: Anatomy, layer: int, part: str = "attn.z") -> Heads:
    """Heads of the attention of a block. Raises SiteError where they are not known."""
    heads = writer_of(anatomy, layer, "attn").heads
    if heads is None:
        raise _no_heads(anatomy, layer, part)
    return heads


def part_point(anatomy: Anatomy, site: Site, layer: int) -> HookPoint:
    """Resolves a site of attention, mixer or MLP. Raises SiteError where the part is missing or not proven."""
    part, _, tensor = site.part.partition(".")
    writer = writer_of(anatomy, layer, part)
    if tensor == "output":
        if abs(writer.scale - 1) > 0:
            raise _scaled(anatomy, site, writer)
        return anatomy.hook_point(site, anatomy.module_in_block(layer, writer.path), "output", anatomy.width)
    if tensor in ("z", "neurons"):
        if writer.projection is None:
            raise _no_projection(anatomy, site, writer)
        module = anatomy.module_in_block(layer, writer.projection)
        return anatomy.hook_point(site, module, "input", in_width(module))
    if tensor == "input":
        return anatomy.hook_point(site, _mlp_reading(anatomy, site, layer, writer), "input", anatomy.width)
    heads = heads_of(anatomy, layer, site.part)
    path = heads.path(tensor)
    if path is None:
        raise _no_heads(anatomy, layer, site.part)
    return anatomy.hook_point(site, anatomy.module_in_block(layer, path), "output", heads.width(tensor), heads.columns(tensor))


def _mlp_reading(anatomy: Anatomy, site: Site, layer: int, writer: Writer) -> nn.Module:
    """The module that takes the input of an MLP: the MLP, or the first of two linear maps that lie in the block themselves."""
    if writer.part != writer.projection:
        return anatomy.module_in_block(layer, writer.part)
    if writer.part.rpartition(".")[2] == "fc2":
        return anatomy.module_in_block(layer, writer.part.removesuffix("fc2") + "fc1")
    raise _no_mlp_input(anatomy, site, writer)


# ---- errors


def _no_writer(anatomy: Anatomy, layer: int, part: str, found: list[Writer]) -> SiteError:
    parts = anatomy.parts[layer]
    if not parts.writers:
        return SiteError(
            f"what '{part}' adds to the residual stream in block {layer} of this {anatomy.kind} is no module's output",
            expected="modules whose outputs add up to the change of the stream",
            found=parts.reason,
            remedy=f"use 'layers.{layer}.input' or 'layers.{layer}.output'; {AS_MODULE}",
        )
    what = f"several parts that could be '{part}'" if found else f"no '{part}'"
    return SiteError(
        f"block {layer} of this {anatomy.kind} has {what}",
        expected=f"one module that is '{part}'",
        found=", ".join(_named(writer) for writer in found or parts.writers),
        remedy=f"hybrid blocks lack some sites; 'layers.{layer}.output' and {AS_MODULE}",
    )


def _scaled(anatomy: Anatomy, site: Site, writer: Writer) -> SiteError:
    assert site.layer is not None
    path = anatomy.path_of(anatomy.module_in_block(site.layer, writer.path), site)
    return SiteError(
        f"what '{site}' of this {anatomy.kind} means is no module's output",
        expected="a module whose output is added to the residual stream as it is",
        found=f"'{writer.path}', of whose output {writer.scale:.4g} times is added",
        remedy=f"use 'layers.{site.layer}.output', or 'module:{path}:output' at 1 / {writer.scale:.4g} of the strength",
    )


def _named(writer: Writer) -> str:
    role = "attention" if writer.mixes and writer.attends else "mixer.output" if writer.mixes else "mlp.output"
    return f"{writer.path} ({role})"


def _no_projection(anatomy: Anatomy, site: Site, writer: Writer) -> SiteError:
    return SiteError(
        f"block {site.layer} of this {anatomy.kind} has no '{site.part}'",
        expected="one linear map at the end of the part",
        found=f"'{writer.part}', which ends in none",
        remedy=f"mixture-of-experts and hybrid blocks lack some sites; '{site.part.partition('.')[0]}.output' and {AS_MODULE}",
    )


def _no_heads(anatomy: Anatomy, layer: int, part: str) -> SiteError:
    return SiteError(
        f"block {layer} of this {anatomy.kind} has no '{part}' that is known",
        expected="projections named q_proj, k_proj and v_proj, or a fused one whose layout could be proven",
        found=[name for name, _ in anatomy.module_in_block(layer, anatomy.writer(layer, "attn").part).named_children()],
        remedy=f"use 'layers.{layer}.attn.output'; {AS_MODULE}",
    )


def _no_mlp_input(anatomy: Anatomy, site: Site, writer: Writer) -> SiteError:
    return SiteError(
        f"block {site.layer} of this {anatomy.kind} has no '{site.part}' that is known",
        expected="a module that is the MLP",
        found=f"'{writer.part}', its last linear map",
        remedy=f"{AS_MODULE}",
    )
