"""Folding: which maps of a model a plan changes, when its edits are moved from the activations into them.

Edits of what a linear map gives or takes become part of that map: (I + L^T R)(W x + b) + c is again linear. An edit of the residual stream
is another thing. A constant that is added to it goes into the bias of the last map that wrote to it. A projection of it changes what
*earlier* maps wrote for *later* readers only, which no weight can do; it folds just where it has nothing left to do, because everything
that writes to the stream (embedding, every attention and MLP output) is projected itself (Arditi et al. 2024, arXiv 2406.11717,
section 4.1, is that case).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.errors import DeployError
from steer.intervene.affine import Affine
from steer.intervene.deploy.constant import cannot_carry
from steer.intervene.intervention import Intervention
from steer.model.anatomy import Anatomy, child
from steer.model.site import Site

_SILENT = 1e-5  # what may be left of a row that reads nothing; directions are orthonormal to fp32


@dataclass(eq=False)
class Fold:
    """One map of a model, and the edits that go into it.

    Attributes:
        path, module: of the map in the model.
        kind: `linear`; `table`, an embedding, whose rows are what it gives; `experts`, the stacked down projections of a mixture.
        before, after: edits of what the map takes and of what it gives; None for none.
    """

    path: str
    module: nn.Module
    kind: str
    before: Affine | None = None
    after: Affine | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """Its weight, as the module holds it."""
        return getattr(self.module, "down_proj" if self.kind == "experts" else "weight")

    @property
    def transposed(self) -> bool:
        """The module holds [in, out]."""
        return self.kind == "table" or is_conv1d(self.module)

    @property
    def weight(self) -> Tensor:
        """[out, in], or [experts, out, in]."""
        return self.parameter.data.mT if self.transposed else self.parameter.data

    @property
    def bias(self) -> nn.Parameter | None:
        return getattr(self.module, "bias", None) if self.kind == "linear" else None

    @property
    def keeps_weight(self) -> bool:
        """Only the bias changes."""
        return self.kind == "linear" and self.before is None and self.after is not None and self.after.rank == 0

    def change(self) -> tuple[Tensor, Tensor, Tensor]:
        """The change of the map as B A of its weight, and of its bias.

        Returns:
            A [rank, in] ([experts, rank, in] for experts), B [out, rank] and the change of the bias [out], which a table has in every
            row; in fp32, or fp64 for weights in fp64.
        """
        weight = self.weight
        dtype, out = torch.promote_types(weight.dtype, torch.float32), weight.shape[-2]
        a = weight.new_empty(*weight.shape[:-2], 0, weight.shape[-1], dtype=dtype)
        b = weight.new_empty(out, 0, dtype=dtype)
        old = new = b.new_zeros(out) if self.bias is None else self.bias.data.to(dtype)
        wide = a if self.keeps_weight else weight.to(dtype)
        if self.before is not None:
            right, left, shift = (part.to(wide) for part in (self.before.right, self.before.left, self.before.shift))
            a, b, new = right, wide @ left.mT, new + wide @ shift
        if self.after is not None:
            right, left, shift = (part.to(wide) for part in (self.after.right, self.after.left, self.after.shift))
            if self.after.rank:
                b = b + left.mT @ (right @ b)
                a, b = torch.cat([a, right @ wide], dim=-2), torch.cat([b, left.mT], dim=-1)
                new = new + (right @ new) @ left
            new = new + shift
        return a, b, new - old


def check_sites(edits: list[tuple[Intervention, Affine]], carrier: str) -> None:
    """Raises DeployError for a site that is nobody's alone to take or give, in any model."""
    for one, _ in edits:
        if one.site.module is not None or one.site.part in ("mlp.input", "final_norm", "logits"):
            expected = "embed, or a layer's input, output, attn.output, .z, .q, .k, .v, mlp.output or .neurons"
            raise cannot_carry(one, carrier, expected, f"'{one.site}'", "steer another site")


def fold(anatomy: Anatomy, edits: list[tuple[Intervention, Affine]], carrier: str) -> list[Fold]:
    """Moves edits into the maps of a model, in the order in which a pass reaches them.

    Args:
        edits: as `constant_edits` gives them, at sites that `check_sites` let pass, of the widths of those.
        carrier: for the errors.

    Raises:
        DeployError: an edit that no map of this model can carry exactly.
    """
    folding = _Folding(anatomy, carrier)
    placed = [(folding.canonical(one), one, edit) for one, edit in edits]
    # on one tensor first what is done at the output of a block, then at the input of the next; at one site in the order of the plan
    for site, one, edit in sorted(placed, key=lambda entry: (entry[0].order, entry[0].part == "output" and entry[1].site.part == "input")):
        folding.place(site, one, edit)
    return list(folding.folds.values())


class _Folding:
    def __init__(self, anatomy: Anatomy, carrier: str) -> None:
        self.anatomy, self.carrier, self.family = anatomy, carrier, anatomy.family
        self.folds: dict[str, Fold] = {}
        self.paths = {id(module): path for path, module in anatomy.model.named_modules()}

    def canonical(self, one: Intervention) -> Site:
        """One name for each tensor: the input of a block is the output of the one before, that of the first is the embedding."""
        site = self.anatomy.point(one.site).site
        if site.part != "input" or site.layer is None:
            return site
        return Site("embed") if site.layer == 0 else Site("output", site.layer - 1)

    def place(self, site: Site, one: Intervention, edit: Affine) -> None:
        if site.part == "embed":
            self._embed(one, edit)
        elif site.part == "output":
            self._stream(site, one, edit)
        elif site.part in ("attn.output", "mlp.output"):
            _add(self._writer(site, one, edit), edit)
        else:
            point = self.anatomy.point(site)
            made = self._linear(point.module, one, edit, reads=point.side == "input")
            if point.columns is not None:
                edit = edit.within(point.columns, made.weight.shape[0])
            if point.side == "output":
                _add(made, edit)
            else:
                made.before = edit if made.before is None else made.before.then(edit)

    def _embed(self, one: Intervention, edit: Affine) -> None:
        """Tokens and learned positions add up, so both are projected, and one of them gets the constant."""
        tables = self._embeddings()
        if not all(isinstance(one, nn.Embedding) and _is_dense(one.weight) and one.embedding_dim == self.anatomy.width for one in tables):
            found = ", ".join(type(table).__name__ for table in tables)
            raise self._refuse(one, f"dense embeddings of width {self.anatomy.width}", found, "steer layers.0.output")
        *others, last = tables
        for table in others if edit.rank else ():
            _add(self._fold(table, "table"), Affine(edit.right, edit.left, torch.zeros_like(edit.shift)))
        _add(self._fold(last, "table"), edit)  # positions where there are any: they are never tied to the unembedding

    def _stream(self, site: Site, one: Intervention, edit: Affine) -> None:
        """An edit of the residual stream after a block, into the bias of the last map that wrote to it."""
        assert site.layer is not None
        if edit.rank and not self._silent(site.layer, one, edit):
            expected = "at a residual site a constant, or an edit that reads only what nothing before it writes"
            found = f"'{one.operator.name}' at '{site}', along directions that blocks before it write"
            raise self._refuse(one, expected, found, "ablate at embed and at every layers.*.attn.output and layers.*.mlp.output")
        if bool((edit.shift != 0).any()):
            added = Affine.adding(edit.shift)
            _add(self._writer(Site("mlp.output", site.layer), one, added), added)

    def _silent(self, layer: int, one: Intervention, edit: Affine) -> bool:
        """Nothing up to the end of this block writes to the stream along the rows that an edit reads."""
        blocks = self.anatomy.blocks[: layer + 1]
        outputs = [child(block, path) for block in blocks for path in (f"{self.family.attn}.{self.family.out}", self.family.down)]
        experts = [self._experts(block) for block in blocks if child(block, self.family.down) is None]
        size = float(edit.right.norm())
        for module in [*self._embeddings(), *(module for module in (*outputs, *experts) if module is not None)]:
            made = self.folds.get(self.paths[id(module)])
            if made is None or made.after is None:
                return False
            rows, constant = made.after.read_by(edit.right)
            if float(rows.norm()) > _SILENT * size or float(constant.norm()) > _SILENT * size * float(made.after.shift.norm()):
                return False
        return all(self._experts(block) is not None or child(block, self.family.down) is not None for block in blocks)

    # ---- which maps

    def _writer(self, site: Site, one: Intervention, edit: Affine) -> Fold:
        """The last linear map of attention or MLP."""
        assert site.layer is not None
        block, in_attention = self.anatomy.blocks[site.layer], site.part == "attn.output"
        norm = self.family.post_attn if in_attention else self.family.post_mlp
        if norm is not None:
            found = f"{self.anatomy.config.model_type}, where '{norm}' follows the last linear map"
            raise self._refuse(one, "a family without norms after attention and MLP", found, "steer attn.z or mlp.neurons")
        module = child(block, f"{self.family.attn}.{self.family.out}" if in_attention else self.family.down)
        if module is not None:
            return self._linear(module, one, edit)
        experts = self._experts(block)
        if experts is None or edit.rank == 0 or bool((edit.shift != 0).any()):
            found = f"a mixture of experts in block {site.layer}, whose outputs are weighted by the router"
            raise self._refuse(one, "one down projection, or an edit without a constant", found, "steer attn.output")
        return self._fold(experts, "experts")

    def _experts(self, block: nn.Module) -> nn.Module | None:
        """The experts of a block when nothing else writes the output of its MLP, and their weights are stacked as [experts, out, in]."""
        mlp = child(block, self.family.mlp_out)
        experts = child(mlp, "experts") if mlp is not None else None
        stack = getattr(experts, "down_proj", None)
        known = isinstance(stack, nn.Parameter) and stack.ndim == 3 and stack.shape[1] == self.anatomy.width
        plain = known and not getattr(experts, "is_transposed", False) and not getattr(experts, "has_bias", False)
        alone = mlp is not None and {name for name, _ in mlp.named_children()} <= {"experts", "gate", "router"}
        return experts if plain and alone else None

    def _embeddings(self) -> list[Any]:
        """The tables that add up to the embedding: tokens, then learned positions."""
        tokens = self.anatomy.embedding
        return [tokens, *(m for m in self.anatomy.decoder.children() if isinstance(m, nn.Embedding) and m is not tokens)]

    def _linear(self, module: nn.Module, one: Intervention, edit: Affine, reads: bool = False) -> Fold:
        path, base = self.paths[id(module)], getattr(module, "base_layer", None)
        if isinstance(base, nn.Module):  # of PEFT: W x + b + B A x
            if reads or edit.rank or not hasattr(module, "lora_A"):
                found = f"{type(module).__name__} of PEFT at '{path}'"
                raise self._refuse(one, "a plain linear map", found, "merge the adapter first: model.merge_and_unload()")
            path, module = f"{path}.base_layer", base
        weight = getattr(module, "weight", None)
        if not (isinstance(module, nn.Linear) or is_conv1d(module)) or not _is_dense(weight):
            found = f"{type(module).__name__} of {getattr(weight, 'dtype', 'no weight')} at '{path}'"
            raise self._refuse(one, "a linear map with a dense weight in floating point", found, "load the model without quantisation")
        return self._fold(module, "linear", path)

    def _fold(self, module: nn.Module, kind: str, path: str | None = None) -> Fold:
        path = self.paths[id(module)] if path is None else path
        return self.folds.setdefault(path, Fold(path, module, kind))

    def _refuse(self, one: Intervention, expected: object, found: object, remedy: str) -> DeployError:
        return cannot_carry(one, self.carrier, expected, found, remedy)


def transformers_model(anatomy: Anatomy) -> Any:
    """The outermost transformers model around a decoder, which is saved and loaded by name; None where there is none."""
    from transformers import PreTrainedModel  # seconds, unless there is such a model

    return next((module for module in anatomy.chain if isinstance(module, PreTrainedModel)), None)


def is_conv1d(module: nn.Module | None) -> bool:
    """GPT-2's linear map, whose weight is [in, out]; told by its name, since transformers takes seconds to import."""
    return type(module).__name__ == "Conv1D"


def _add(made: Fold, edit: Affine) -> None:
    made.after = edit if made.after is None else made.after.then(edit)


def _is_dense(weight: Any) -> bool:
    """Held here as it is used: neither quantised nor sharded, offloaded or computed from something else."""
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or weight.is_meta:
        return False
    return weight.is_floating_point() and weight.element_size() > 1 and weight.numel() > 0
