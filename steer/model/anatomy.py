"""Anatomy: the sites of a model, raw or wrapped (PEFT, torch.compile, DDP, FSDP2, checkpointing, LightningModule).

Wrappers only add prefixes to module paths, so nothing is unwrapped: the module objects found are the ones that run. What is a block, and
what writes to its residual stream, is seen in trial passes over a few random tokens, see `steer.model.stacks` and `steer.model.writers`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from steer.errors import AnatomyError, SiteError
from steer.model.block_sites import AS_MODULE, heads_of, part_point, writer_of
from steer.model.description import described_parts
from steer.model.find_stack import FoundStack, check_model, find_stack, path_of_decoder
from steer.model.fingerprint import configured_kv_heads, embedding_digests
from steer.model.heads import Heads
from steer.model.hook_points import HookPoint, module_point, out_width
from steer.model.other_stacks import stack_named
from steer.model.site import LAYER_PARTS, Site, expand, is_pattern, stack_of
from steer.model.trial_pass import ROWS, TOKENS, obstacle_around
from steer.model.writers import BlockParts, Writer, block_parts


class Anatomy:
    """The parts of one stack of residual blocks, and the model around it.

    Attributes:
        model: the model as it was given; `path` leads from it to `decoder`, the module that is called with the tokens.
        blocks: the residual blocks, checkpoint wrappers included.
        width: size of the residual stream.
        main: the stack that the tokens of a text go through, which may be this one.
        found: where the blocks lie; `Anatomy.find` finds it and makes the anatomy.

    Example:
        >>> anatomy = steer.Anatomy.find(model)
        >>> anatomy.n_layers, anatomy.width, anatomy.sites("layers.1-3.mlp.output")
    """

    def __init__(self, model: nn.Module, found: FoundStack, main: Anatomy | None = None) -> None:
        stack = found.stack
        self.main = self if main is None else main
        self._found = found
        self._others: dict[str, Anatomy] = {}
        self.model = model
        self.runner = model.get_submodule(found.runner)
        self._obstacle = obstacle_around(model, found.runner)
        self._description = found.description
        self.stack = stack
        self.path = path_of_decoder(model, found)
        self.decoder = model.get_submodule(self.path)
        self.blocks: list[nn.Module] = [self.runner.get_submodule(path) for path in stack.block_paths]
        self.width: int = math.prod(size for axis, size in enumerate(stack.shape) if axis not in (stack.axes or (0, 1))[:2])

    @classmethod
    def find(cls, model: nn.Module) -> Anatomy:
        """Runs a model over a few random tokens when it is new, or has new modules.

        Raises:
            AnatomyError: no stack of residual blocks was seen, or several; it lists what was tried.
        """
        check_model(model)
        return cls(model, find_stack(model))

    def of_stack(self, name: str | None) -> Anatomy:
        """The anatomy of a stack by its name (`encoder`, `vision`, a path); None for the main one. Raises SiteError where there is none."""
        if name is None:
            return self.main
        if self.main is not self:
            return self.main.of_stack(name)
        if name not in self._others:
            found = stack_named(self.model, name, self._found)
            known = {other.stack.path: other for other in self._others.values()}
            self._others[name] = self if found is self._found else known.get(found.stack.path) or Anatomy(self.model, found, self)
        return self._others[name]

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def config(self) -> Any:
        """The config of the decoder, that of its text where it has several. Raises AnatomyError when there is none."""
        for module in reversed(self.chain):
            if (config := getattr(module, "config", None)) is not None:
                return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        raise _no_config(self)

    @property
    def kind(self) -> str:
        """What messages call this model."""
        return next(
            (t for m in reversed(self.chain) if (t := getattr(getattr(m, "config", None), "model_type", None))), type(self.model).__name__
        )

    # ---- heads

    @cached_property
    def _heads(self) -> list[Heads]:
        """Of every attention module whose heads are known."""
        return [writer.heads for parts in self.parts for writer in parts.attention() if writer.heads is not None]

    def _same_in_all_layers(self, name: str) -> int:
        values = {getattr(heads, name) for heads in self._heads}
        if len(values) != 1:
            raise _no_one_number_of_heads(self, name, values)
        return values.pop()

    @property
    def n_heads(self) -> int:
        """Query heads. Raises AnatomyError where layers differ, or none has attention."""
        return self._same_in_all_layers("n_heads")

    @property
    def n_kv_heads(self) -> int:
        """Key-value heads, fewer under grouped-query attention."""
        return self._same_in_all_layers("n_kv_heads")

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self._same_in_all_layers("head_dim")

    # ---- around the blocks

    @cached_property
    def embedding(self) -> nn.Module | None:
        """Token embedding, [vocabulary, width]; None where no token ids are taken."""
        if self._description is not None and self._description.embed is not None:
            return self._seen(self.stack.embedding)
        if self.main is not self and not self.stack.takes_ids:
            return None
        for module in reversed(self._own_chain):
            try:
                embedding = getattr(module, "get_input_embeddings", lambda: None)()
            except NotImplementedError:
                continue
            if isinstance(embedding, nn.Module) and isinstance(getattr(embedding, "weight", None), Tensor):
                return embedding
        return self._seen(self.stack.embedding)

    @cached_property
    def final_norm(self) -> nn.Module | None:
        """The norm between the last block and the unembedding; None where there is none."""
        return self._seen(self.stack.final_norm)

    @cached_property
    def unembedding(self) -> nn.Module | None:
        """The module that makes logits, None for a bare decoder."""
        if self.main is not self:
            return None
        for module in reversed(self.chain):
            if isinstance(head := getattr(module, "get_output_embeddings", lambda: None)(), nn.Module):
                return head
            if isinstance(head := getattr(module, "lm_head", None), nn.Module):
                return head
        return self._seen(self.stack.unembedding)

    def _seen(self, path: str | None) -> nn.Module | None:
        return None if path is None else self.runner.get_submodule(path)

    @property
    def _own_chain(self) -> list[nn.Module]:
        """What belongs to this stack alone."""
        return self.chain if self.main is self else self.chain[-1:]

    @cached_property
    def chain(self) -> list[nn.Module]:
        """Modules from the given model down to the decoder, each holding the next."""
        names = self.path.split(".") if self.path else []
        return [self.model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]

    def __repr__(self) -> str:
        return f"Anatomy({type(self.model).__name__}: {self.n_layers} blocks of width {self.width} in '{self.path}')"

    @cached_property
    def _paths(self) -> dict[int, str]:
        return {id(module): path for path, module in self.model.named_modules()}

    def fingerprint(self) -> dict[str, Any]:
        """What makes this model itself: its shape, and digests of 16 embedding rows (stable under LoRA, moved by full training)."""
        config = self.config if any(getattr(module, "config", None) is not None for module in self.chain) else None
        n_heads = getattr(config, "num_attention_heads", None)
        return {
            "model_type": self.kind,
            "n_layers": self.n_layers,
            "width": self.width,
            "n_heads": n_heads if isinstance(n_heads, int) else None,
            "n_kv_heads": configured_kv_heads(config, n_heads) if isinstance(n_heads, int) else None,
            "vocabulary": getattr(config, "vocab_size", getattr(self.embedding, "num_embeddings", None)),
            **embedding_digests(self.embedding),
        }

    # ---- parts of blocks

    @cached_property
    def parts(self) -> tuple[BlockParts, ...]:
        """What writes to the residual stream in each block; the model runs for that when it is new."""
        parts = block_parts(self.runner, self.stack, self._obstacle)
        return parts if self._description is None else described_parts(parts, self._description, self.blocks)

    @property
    def moe(self) -> bool:
        """True when an MLP has no down projection of its own: a mixture of experts, whose neurons are not one tensor."""
        return any(writer.projection is None for parts in self.parts for writer in parts.mlp())

    def writer(self, layer: int, part: str) -> Writer:
        """The one writer that is `attn`, `mlp` or `mixer` in a block. Raises SiteError where there is none, or not one alone."""
        return writer_of(self, layer, part)

    def module_in_block(self, layer: int, path: str) -> nn.Module:
        """A module by its path within a block."""
        return self.blocks[layer].get_submodule(path)

    def post_norm(self, layer: int, writer: Writer) -> nn.Module | None:
        """The norm that a writer's part goes through before it is added."""
        inside = writer.path == writer.part or writer.path.startswith(writer.part + ".")
        return None if inside else self.module_in_block(layer, writer.path)

    def sites(self, *patterns: str | Site) -> list[Site]:
        """Expands patterns such as `layers.*.attn.output` to the layers that have that part.

        Without any: every residual site, and what attention and MLP add where that is known.

        Raises:
            SiteError: no layer of a pattern has the part.
        """
        chosen = patterns or ("embed", "layers.*.attn.output", "layers.*.mlp.output", "layers.*.output", "final_norm")
        return [site for pattern in chosen for site in self._expanded(pattern, may_lack=not patterns)]

    def _expanded(self, pattern: str | Site, *, may_lack: bool) -> list[Site]:
        sites = expand(pattern, self.of_stack(stack_of(pattern)).n_layers if self.main is self else self.n_layers)
        if not is_pattern(pattern) and not may_lack:
            return sites
        found, errors = [], []
        for site in sites:
            try:
                self.point(site)
                found.append(site)
            except SiteError as error:
                errors.append(error)
        if not found and not may_lack:
            raise errors[0]
        return found

    def written_sites(self) -> list[Site]:
        """The sites of all that is added to the residual stream, and its start. Raises SiteError where those of a block are not known."""
        sites = [Site("embed")]
        for layer, parts in enumerate(self.parts):
            known = {writer.path: Site(f"{part}.output", layer) for part, of in (("mixer", parts.mixers()), ("attn", parts.attention()),
                     ("mlp", parts.mlp())) if len(of) == 1 for writer in of}  # fmt: skip
            if not parts.writers or len(known) < len(parts.writers) or any(writer.scale != 1 for writer in parts.writers):
                raise _unknown_writers(self, layer, [writer.path for writer in parts.writers if writer.path not in known])
            sites += [known[writer.path] for writer in parts.writers]
        return sites

    def head_outputs(self, layer: int, z: Tensor) -> Tensor:
        """What each head adds to the residual stream.

        Args:
            z: [batch, tokens, heads * head_dim], captured at `layers.<layer>.attn.z`.

        Returns:
            [heads + 1, batch, tokens, width]; the last row is the bias of W_O. A post-norm is applied with its scale frozen at the value it
            has for the whole attention output, which makes the rows add up to `layers.<layer>.attn.output`.
        """
        writer, heads = self.writer(layer, "attn"), heads_of(self, layer)
        assert writer.projection is not None
        project = self.module_in_block(layer, writer.projection)
        masked = z.new_zeros((heads.n_heads + 1, *z.shape))
        for head in range(heads.n_heads):
            columns = slice(head * heads.head_dim, (head + 1) * heads.head_dim)
            masked[head, ..., columns] = z[..., columns]
        written = project(masked)
        written = torch.cat([written[:-1] - written[-1], written[-1:]])
        post_norm = self.post_norm(layer, writer)
        if post_norm is None:
            return written
        total = written.sum(0)
        normed = post_norm(total)
        return written * torch.where(total == 0, 0.0, normed / torch.where(total == 0, 1.0, total))

    # ---- hook points

    def point(self, site: str | Site) -> HookPoint:
        """Resolves a site. Raises SiteError when the layer is out of range, or the part is missing or not proven in this model."""
        site = Site.parse(site)
        if site.module is not None:
            return module_point(self.model, site)
        if site.stack is not None and self.main is self:
            anatomy = self.of_stack(site.stack)
            if anatomy is not self:
                return anatomy.point(site)
        if site.layer is None:
            return self._model_point(site)
        if not -self.n_layers <= site.layer < self.n_layers:
            last = self.n_layers - 1
            remedy = f"layers are numbered from 0; the last of this model is layers.{last}, which is also layers.-1"
            raise SiteError(f"layer of '{site}' is out of range", expected=f"0 to {last}", found=site.layer, remedy=remedy)
        layer = site.layer % self.n_layers
        site = replace(site, layer=layer)
        if site.part in ("input", "output"):
            return self._stream_point(site, self.blocks[layer], site.part)
        return part_point(self, site, layer)

    def _stream_point(self, site: Site, module: nn.Module, side: str) -> HookPoint:
        if self.stack.axes is None:
            raise _no_tokens_in_stream(self, site)
        return replace(self.hook_point(site, module, side, self.width), argument=self.stack.argument)

    def _model_point(self, site: Site) -> HookPoint:
        if site.part == "embed":
            return self._stream_point(site, self.blocks[0], "input")
        module = self.final_norm if site.part == "final_norm" else self.unembedding
        if module is None:
            raise _no_model_part(self, site)
        width = self.width if site.part == "final_norm" else out_width(module)
        return HookPoint(site, module, self.path_of(module, site), "output", width, anatomy=self)

    def path_of(self, module: nn.Module, site: Site) -> str:
        """Name of a module in the model."""
        return self._paths.get(id(module), str(site))

    def hook_point(self, site: Site, module: nn.Module, side: str, width: int | None, columns: slice | Tensor | None = None) -> HookPoint:
        """A site at a side of a module, in the order of axes of this stack.

        Args:
            side, width: as of `HookPoint`.
            columns: of a fused projection that belong to the site, a slice or their indices [columns]; None for all.
        """
        axes = None if self.stack.axes in (None, (0, 1, 2)) else self.stack.axes
        return HookPoint(site, module, self.path_of(module, site), side, width, columns, axes, anatomy=self)


def resolve(model: nn.Module, sites: list[Site]) -> tuple[Anatomy | None, list[HookPoint]]:
    """Hook points of sites; a model that is no decoder is fine as long as all of them are `module:` sites."""
    check_model(model)
    if all(site.module is not None for site in sites):
        try:
            anatomy: Anatomy | None = Anatomy.find(model)
        except AnatomyError:
            anatomy = None
        return anatomy, [module_point(model, site) for site in sites]
    anatomy = Anatomy.find(model)
    return anatomy, [anatomy.point(site) for site in sites]


# ---- errors


def _no_config(anatomy: Anatomy) -> AnatomyError:
    return AnatomyError(
        f"the decoder '{anatomy.path}' has no config",
        expected="the decoder of a transformers model, with its config",
        found=f"a {type(anatomy.decoder).__name__} without one",
        remedy="give it the config of its model",
    )


def _no_one_number_of_heads(anatomy: Anatomy, name: str, values: set[int]) -> AnatomyError:
    return AnatomyError(
        f"this {anatomy.kind} has no one {name}",
        expected="attention with known heads, the same number and size in every layer that has it",
        found=f"{sorted(values)} in different layers" if values else "no attention whose heads are known",
        remedy="use the sites of single layers, whose widths are those of the layer",
    )


def _unknown_writers(anatomy: Anatomy, layer: int, paths: list[str]) -> SiteError:
    return SiteError(
        f"not all that block {layer} of this {anatomy.kind} adds to the residual stream has a site",
        expected="one mixer and one MLP in every block",
        found=f"also {paths}" if paths else anatomy.parts[layer].reason,
        remedy="act on 'layers.*.output' instead",
    )


def _no_tokens_in_stream(anatomy: Anatomy, site: Site) -> SiteError:
    return SiteError(
        f"'{site}' of this {anatomy.kind} is no tensor with one entry per token",
        expected="[batch, tokens, width]",
        found=(call.problem if (call := anatomy.stack.own_call) else "")
        or f"{list(anatomy.stack.shape)} in a pass over {ROWS} texts of {TOKENS} tokens",
        remedy=f"{AS_MODULE}",
    )


def _no_model_part(anatomy: Anatomy, site: Site) -> SiteError:
    head = site.part == "logits"
    return SiteError(
        f"{type(anatomy.model).__name__} has no '{site}'",
        expected="a model with a language-model head" if head else "a norm after the last block",
        found=[name for name, _ in anatomy.model.named_children()],
        remedy="attach to the model with its language-model head" if head else f"use 'layers.{anatomy.n_layers - 1}.output'",
    )


__all__ = ["LAYER_PARTS", "Anatomy", "HookPoint", "module_point", "resolve"]
