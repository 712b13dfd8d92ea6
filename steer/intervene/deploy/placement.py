"""Placement: which maps of a model carry the edits of a plan, and which edits none can carry."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from steer.errors import DeployError, SiteError
from steer.intervene.affine import Affine
from steer.intervene.deploy.constant import AT_RUN_TIME, cannot_carry
from steer.intervene.deploy.weight_edit import WeightEdit, is_conv1d, is_dense
from steer.intervene.intervention import Intervention
from steer.model.anatomy import Anatomy
from steer.model.site import Site
from steer.model.writers import Writer

_NOTHING = 1e-5  # share of a row that counts as nothing left to read; directions are orthonormal to fp32


def check_sites(edits: list[tuple[Intervention, Affine]], carrier: str) -> None:
    """Raises DeployError for a site that no map alone takes or gives, in any model."""
    for intervention, _ in edits:
        site = intervention.single_site
        if site.module is not None or site.part in ("mlp.input", "final_norm", "logits"):
            raise _no_map_at_site(intervention, carrier)


def weight_edits(anatomy: Anatomy, edits: list[tuple[Intervention, Affine]], carrier: str) -> list[WeightEdit]:
    """Moves edits into the maps of a model, in the order in which a pass reaches them.

    Args:
        edits: as `constant_edits` gives them, at sites that `check_sites` let pass, of the widths of those.
        carrier: for the errors.

    Raises:
        DeployError: an edit that no map of this model can carry exactly.
    """
    placement = _Placement(anatomy, carrier)
    placed = [(placement.canonical_site(intervention), intervention, edit) for intervention, edit in edits]
    # on one tensor first what is done at the output of a block, then at the input of the next; at one site in the order of the plan
    placed.sort(key=lambda entry: (entry[0].order, entry[0].part == "output" and entry[1].single_site.part == "input"))
    for site, intervention, edit in placed:
        placement.place(site, intervention, edit)
    return list(placement.weight_edits.values())


class _Placement:
    """Finds the map that carries an edit, and adds the edit to those of the map.

    Attributes:
        weight_edits: by the path of the map.
    """

    def __init__(self, anatomy: Anatomy, carrier: str) -> None:
        self.anatomy = anatomy
        self.carrier = carrier
        self.weight_edits: dict[str, WeightEdit] = {}
        self.paths = {id(module): path for path, module in anatomy.model.named_modules()}

    def canonical_site(self, intervention: Intervention) -> Site:
        """One name for each tensor: the input of a block is the output of the block before; the input of the first is the embedding."""
        site = self.anatomy.point(intervention.single_site).site
        if site.part != "input" or site.layer is None:
            return site
        return Site("embed") if site.layer == 0 else Site("output", site.layer - 1)

    def place(self, site: Site, intervention: Intervention, edit: Affine) -> None:
        """Adds an edit to the map that carries it. Raises DeployError where there is none."""
        if site.part == "embed":
            self._place_in_embedding(intervention, edit)
        elif site.part == "output":
            self._place_in_residual_stream(site, intervention, edit)
        elif site.part in ("attn.output", "mixer.output", "mlp.output"):
            self._last_map(site, intervention, edit).add_to_output(edit)
        else:
            self._place_in_projection(site, intervention, edit)

    def _place_in_embedding(self, intervention: Intervention, edit: Affine) -> None:
        """Tokens and learned positions add up, so both are projected, and one of them gets the constant."""
        width = self.anatomy.width
        embeddings = self._embeddings()
        for module in embeddings:
            if not (isinstance(module, nn.Embedding) and is_dense(module.weight) and module.embedding_dim == width):
                raise _no_dense_embeddings(intervention, self.carrier, embeddings, width)
        *first, last = embeddings
        if edit.rank:
            projection = Affine(edit.right, edit.left, torch.zeros_like(edit.shift))
            for module in first:
                self._weight_edit(module, "embedding").add_to_output(projection)
        self._weight_edit(last, "embedding").add_to_output(edit)  # positions where there are any: they are never tied to the unembedding

    def _place_in_residual_stream(self, site: Site, intervention: Intervention, edit: Affine) -> None:
        """Adds the constant after a block to the bias of the last map that wrote to the stream."""
        assert site.layer is not None
        if edit.rank and not self._nothing_to_read(site.layer, edit):
            raise _written_directions(intervention, self.carrier, site)
        if edit.shifts:
            constant = Affine.adding(edit.shift)
            self._last_map(Site("mlp.output", site.layer), intervention, constant).add_to_output(constant)

    def _place_in_projection(self, site: Site, intervention: Intervention, edit: Affine) -> None:
        """Edits the input or output of a linear map, or its columns of a fused projection."""
        point = self.anatomy.point(site)
        weight_edit = self._linear(point.module, intervention, edit, reads=point.side == "input")
        if point.columns is not None:
            edit = edit.within(point.columns, weight_edit.weight.shape[0])
        if point.side == "input":
            weight_edit.add_to_input(edit)
        else:
            weight_edit.add_to_output(edit)

    def _nothing_to_read(self, layer: int, edit: Affine) -> bool:
        """Nothing up to the end of this block writes to the residual stream along the rows that an edit reads."""
        writers = self._embeddings()
        for number, parts in enumerate(self.anatomy.parts[: layer + 1]):
            for writer in parts.writers:
                module = self._last_module(number, writer)
                if module is None or writer.scale != 1:
                    return False
                writers.append(module)
            if not parts.writers:
                return False
        size = float(edit.right.norm())
        for module in writers:
            weight_edit = self.weight_edits.get(self.paths[id(module)])
            if weight_edit is None or weight_edit.of_output is None:
                return False
            rows, constant = weight_edit.of_output.read_by(edit.right)  # [rank, width], [rank]
            if float(rows.norm()) > _NOTHING * size:
                return False
            if float(constant.norm()) > _NOTHING * size * float(weight_edit.of_output.shift.norm()):
                return False
        return True

    # ---- which maps

    def _last_map(self, site: Site, intervention: Intervention, edit: Affine) -> WeightEdit:
        """The last linear map of attention or MLP, or the experts of a mixture."""
        assert site.layer is not None
        try:
            writer = self.anatomy.writer(site.layer, site.part.partition(".")[0])
        except SiteError as error:
            raise _no_last_map(intervention, self.carrier, str(error.found)) from error
        if writer.scale != 1:
            raise _no_last_map(intervention, self.carrier, f"{writer.scale:.3g} times what '{writer.path}' gives is added")
        if self.anatomy.post_norm(site.layer, writer) is not None:
            raise _norm_behind(intervention, self.carrier, self.anatomy, writer.path)
        module = self._last_module(site.layer, writer)
        if module is None and not hasattr(self.anatomy.module_in_block(site.layer, writer.part), "experts"):
            raise _no_last_map(intervention, self.carrier, f"'{writer.part}', which scales or gates what its last linear map gives")
        if module is None or (writer.projection is None and (edit.rank == 0 or edit.shifts)):
            raise _weighted_by_router(intervention, self.carrier, site.layer)
        return self._linear(module, intervention, edit) if writer.projection is not None else self._weight_edit(module, "experts")

    def _last_module(self, layer: int, writer: Writer) -> nn.Module | None:
        """The last linear map of a writer, or its experts."""
        if writer.projection is not None:
            return self.anatomy.module_in_block(layer, writer.projection)
        return self._experts(self.anatomy.module_in_block(layer, writer.part))

    def _experts(self, mlp: nn.Module) -> nn.Module | None:
        """The experts of an MLP when nothing else writes its output, and their weights are stacked as [experts, out, in]."""
        experts = getattr(mlp, "experts", None)
        stack = getattr(experts, "down_proj", None)
        stacked = isinstance(stack, nn.Parameter) and stack.ndim == 3 and stack.shape[1] == self.anatomy.width
        plain = stacked and not getattr(experts, "is_transposed", False) and not getattr(experts, "has_bias", False)
        alone = {name for name, _ in mlp.named_children()} <= {"experts", "gate", "router"}
        return experts if plain and alone else None

    def _embeddings(self) -> list[Any]:
        """The embeddings that add up: tokens, then learned positions."""
        tokens = self.anatomy.embedding
        positions = [part for part in self.anatomy.decoder.children() if isinstance(part, nn.Embedding) and part is not tokens]
        return [tokens, *positions]

    def _linear(self, module: nn.Module, intervention: Intervention, edit: Affine, reads: bool = False) -> WeightEdit:
        """The weight edit of a linear map. reads: the edit is one of the input of the map."""
        path = self.paths[id(module)]
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module):  # of PEFT: W x + b + B A x
            if reads or edit.rank or not hasattr(module, "lora_A"):
                raise _map_with_adapter(intervention, self.carrier, module, path)
            path = f"{path}.base_layer"
            module = base
        if not (isinstance(module, nn.Linear) or is_conv1d(module)) or not is_dense(getattr(module, "weight", None)):
            raise _no_dense_map(intervention, self.carrier, module, path)
        return self._weight_edit(module, "linear", path)

    def _weight_edit(self, module: nn.Module, kind: str, path: str | None = None) -> WeightEdit:
        path = self.paths[id(module)] if path is None else path
        return self.weight_edits.setdefault(path, WeightEdit(path, module, kind))


# ---- errors


def _no_map_at_site(intervention: Intervention, carrier: str) -> DeployError:
    return cannot_carry(
        intervention,
        carrier,
        expected="embed, or a layer's input, output, attn.output, .z, .q, .k, .v, mlp.output or .neurons",
        found=f"'{intervention.site}'",
        remedy="steer another site",
    )


def _no_dense_embeddings(intervention: Intervention, carrier: str, embeddings: list[Any], width: int) -> DeployError:
    return cannot_carry(
        intervention,
        carrier,
        expected=f"dense embeddings of width {width}",
        found=", ".join(type(module).__name__ for module in embeddings),
        remedy="steer layers.0.output",
    )


def _written_directions(intervention: Intervention, carrier: str, site: Site) -> DeployError:
    return cannot_carry(
        intervention,
        carrier,
        expected="at a residual site a constant, or an edit that reads only what nothing before it writes",
        found=f"'{intervention.operator.name}' at '{site}', along directions that blocks before it write",
        remedy="ablate at embed and at every layers.*.attn.output and layers.*.mlp.output",
    )


def _norm_behind(intervention: Intervention, carrier: str, anatomy: Anatomy, norm: str) -> DeployError:
    return cannot_carry(
        intervention,
        carrier,
        expected="a family without norms after attention and MLP",
        found=f"{anatomy.kind}, where '{norm}' follows the last linear map",
        remedy="steer attn.z or mlp.neurons",
    )


def _no_last_map(intervention: Intervention, carrier: str, found: str) -> DeployError:
    return cannot_carry(
        intervention,
        carrier,
        expected="a last linear map whose output is added to the residual stream as it is; this family scales or gates it",
        found=found,
        remedy=AT_RUN_TIME,
    )


def _weighted_by_router(intervention: Intervention, carrier: str, layer: int) -> DeployError:
    return cannot_carry(
        intervention,
        carrier,
        expected="one down projection, or an edit without a constant",
        found=f"a mixture of experts in block {layer}, whose outputs are weighted by the router",
        remedy="steer attn.output",
    )


def _map_with_adapter(intervention: Intervention, carrier: str, module: nn.Module, path: str) -> DeployError:
    return cannot_carry(
        intervention,
        carrier,
        expected="a plain linear map",
        found=f"{type(module).__name__} of PEFT at '{path}'",
        remedy="merge the adapter first: model.merge_and_unload()",
    )


def _no_dense_map(intervention: Intervention, carrier: str, module: nn.Module, path: str) -> DeployError:
    weight = getattr(module, "weight", None)
    return cannot_carry(
        intervention,
        carrier,
        expected="a linear map with a dense weight in floating point",
        found=f"{type(module).__name__} of {getattr(weight, 'dtype', 'no weight')} at '{path}'",
        remedy="load the model without quantisation",
    )
