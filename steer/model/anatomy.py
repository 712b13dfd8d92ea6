"""Anatomy: the sites of a model, raw or wrapped (PEFT, torch.compile, DDP, FSDP2, checkpointing, LightningModule).

Wrappers only add prefixes to module paths, so nothing is unwrapped: the module objects found are the ones that run. What is a block, and
what writes to its residual stream, is seen in trial passes over a few random tokens, see `steer.model.stacks` and `steer.model.writers`.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import of_type
from steer.errors import AnatomyError, SiteError
from steer.model.heads import Heads
from steer.model.site import LAYER_PARTS, Site, expand, is_pattern
from steer.model.stacks import LISTS, Stack, survey
from steer.model.trial_pass import ROWS, TOKENS, obstacle_around, runners
from steer.model.writers import BlockParts, Writer, block_parts


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
    """

    site: Site
    module: nn.Module
    path: str
    side: str
    width: int | None
    columns: slice | Tensor | None = None
    axes: tuple[int, ...] | None = None


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


def check_model(model: Any) -> None:
    """Raises ConfigError unless this is a model."""
    of_type(model, nn.Module, "the model", "pass the model itself; steer.load returns (model, tokenizer)")


def _find_stack(model: nn.Module) -> tuple[str, Stack]:
    """The stack that the tokens of a text go through, and the path of the module whose trial pass showed it.

    Of several stacks in one model (encoder and decoder) it is the one that ends last.
    """
    found: list[tuple[str, Stack]] = []
    failures: list[str] = []
    waiting = runners(model)
    while waiting and not found:
        inner: list[tuple[str, nn.Module]] = []
        for path, module in waiting:
            seen = survey(module, obstacle_around(model, path))
            failures += [f"{type(module).__name__} with {failure}" for failure in seen.failures]
            if seen.stacks:
                found.append((path, max(seen.stacks, key=lambda stack: stack.end)))
            else:
                inner += [(f"{path}.{name}" if path else name, part) for name, part in module.named_children() if _holds_lists(part)]
        waiting = inner
    for preferred in (lambda entry: entry[1].embedding is not None, lambda entry: _is_text(".".join((entry[0], entry[1].path)))):
        if len(found) > 1 and len(chosen := [entry for entry in found if preferred(entry)]) == 1:
            found = chosen
    if len(found) == 1:
        return found[0]
    raise _no_single_stack(model, [f"{path}.{stack.path}".strip(".") for path, stack in found], failures)


def _holds_lists(module: nn.Module) -> bool:
    return any(isinstance(part, LISTS) for part in module.modules())


def _is_text(path: str) -> bool:
    return any(mark in path for mark in ("language_model", "text_model", "decoder"))


def _decoder_path(model: nn.Module, runner: str, stack: Stack) -> str:
    """The innermost module around the stack that is called with the tokens; else the innermost that is more than a list."""
    names = stack.path.split(".") if stack.path else []
    around = [".".join(names[:depth]) for depth in range(len(names), -1, -1)]
    paths = [f"{runner}.{path}".strip(".") for path in around]
    modules = [(path, model.get_submodule(path)) for path in paths]
    for path, module in modules:
        if not {"input_ids", "inputs_embeds"}.isdisjoint(inspect.signature(module.forward).parameters):
            return path
    return next((path for path, module in modules if not isinstance(module, LISTS)), modules[-1][0])


class Anatomy:
    """The parts of one stack of residual blocks, and the model around it.

    Attributes:
        model: the model as it was given; `path` leads from it to `decoder`, the module that is called with the tokens.
        blocks: the residual blocks, checkpoint wrappers included.
        width: size of the residual stream.
    """

    def __init__(self, model: nn.Module, runner: str, stack: Stack) -> None:
        self.model = model
        self.runner = model.get_submodule(runner)
        self._obstacle = obstacle_around(model, runner)
        self.stack = stack
        self.path = _decoder_path(model, runner, stack)
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
        return cls(model, *_find_stack(model))

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
        for module in reversed(self.chain):
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
        for module in reversed(self.chain):
            if isinstance(head := getattr(module, "get_output_embeddings", lambda: None)(), nn.Module):
                return head
            if isinstance(head := getattr(module, "lm_head", None), nn.Module):
                return head
        return self._seen(self.stack.unembedding)

    def _seen(self, path: str | None) -> nn.Module | None:
        return None if path is None else self.runner.get_submodule(path)

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
        """What makes this model itself: its shape, and a digest of 16 embedding rows (stable under LoRA, moved by full training)."""
        config = self.config if any(getattr(module, "config", None) is not None for module in self.chain) else None
        n_heads = getattr(config, "num_attention_heads", None)
        return {
            "model_type": self.kind,
            "n_layers": self.n_layers,
            "width": self.width,
            "n_heads": n_heads if isinstance(n_heads, int) else None,
            "n_kv_heads": _configured_kv_heads(config, n_heads) if isinstance(n_heads, int) else None,
            "vocabulary": getattr(config, "vocab_size", getattr(self.embedding, "num_embeddings", None)),
            "embedding_digest": _digest(self.embedding),
        }

    # ---- parts of blocks

    @cached_property
    def parts(self) -> tuple[BlockParts, ...]:
        """What writes to the residual stream in each block; the model runs for that when it is new."""
        return block_parts(self.runner, self.stack, self._obstacle)

    @property
    def moe(self) -> bool:
        """True when an MLP has no down projection of its own: a mixture of experts, whose neurons are not one tensor."""
        return any(writer.projection is None for parts in self.parts for writer in parts.mlp())

    def writer(self, layer: int, part: str) -> Writer:
        """The one writer that is `attn`, `mlp` or `mixer` in a block. Raises SiteError where there is none, or not one alone."""
        parts = self.parts[layer]
        found = {"attn": parts.attention, "mlp": parts.mlp, "mixer": parts.mixers}[part]()
        if len(found) != 1:
            raise _no_writer(self, layer, part, found)
        return found[0]

    def module_in_block(self, layer: int, path: str) -> nn.Module:
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
        sites = expand(pattern, self.n_layers)
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
        writer, heads = self.writer(layer, "attn"), self._heads_of(layer)
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

    def _heads_of(self, layer: int) -> Heads:
        heads = self.writer(layer, "attn").heads
        if heads is None:
            raise _no_heads(self, layer, "attn.z")
        return heads

    # ---- hook points

    def point(self, site: str | Site) -> HookPoint:
        """Resolves a site. Raises SiteError when the layer is out of range, or the part is missing or not proven in this model."""
        site = Site.parse(site)
        if site.module is not None:
            return module_point(self.model, site)
        if site.layer is None:
            return self._model_point(site)
        if not -self.n_layers <= site.layer < self.n_layers:
            last = self.n_layers - 1
            remedy = f"layers are numbered from 0; the last of this model is layers.{last}, which is also layers.-1"
            raise SiteError(f"layer of '{site}' is out of range", expected=f"0 to {last}", found=site.layer, remedy=remedy)
        layer = site.layer % self.n_layers
        site = Site(site.part, layer)
        if site.part in ("input", "output"):
            return self._stream_point(site, self.blocks[layer], site.part)
        part, _, tensor = site.part.partition(".")
        writer = self.writer(layer, part)
        if tensor == "output":
            if abs(writer.scale - 1) > 0:
                raise _scaled(self, site, writer)
            return self._hook_point(site, self.module_in_block(layer, writer.path), "output", self.width)
        if tensor in ("z", "neurons"):
            if writer.projection is None:
                raise _no_projection(self, site, writer)
            module = self.module_in_block(layer, writer.projection)
            return self._hook_point(site, module, "input", in_width(module))
        if tensor == "input":
            return self._hook_point(site, self._mlp_reading(site, writer), "input", self.width)
        heads = self._heads_of(layer)
        path = heads.path(tensor)
        if path is None:
            raise _no_heads(self, layer, site.part)
        return self._hook_point(site, self.module_in_block(layer, path), "output", heads.width(tensor), heads.columns(tensor))

    def _mlp_reading(self, site: Site, writer: Writer) -> nn.Module:
        """The module that takes the input of an MLP: the MLP, or the first of two linear maps that lie in the block themselves."""
        assert site.layer is not None
        if writer.part != writer.projection:
            return self.module_in_block(site.layer, writer.part)
        if writer.part.rpartition(".")[2] == "fc2":
            return self.module_in_block(site.layer, writer.part.removesuffix("fc2") + "fc1")
        raise _no_mlp_input(self, site, writer)

    def _stream_point(self, site: Site, module: nn.Module, side: str) -> HookPoint:
        if self.stack.axes is None:
            raise _no_tokens_in_stream(self, site)
        return self._hook_point(site, module, side, self.width)

    def _model_point(self, site: Site) -> HookPoint:
        if site.part == "embed":
            return self._stream_point(site, self.blocks[0], "input")
        module = self.final_norm if site.part == "final_norm" else self.unembedding
        if module is None:
            raise _no_model_part(self, site)
        width = self.width if site.part == "final_norm" else out_width(module)
        return HookPoint(site, module, self._path_of(module, site), "output", width)

    def _path_of(self, module: nn.Module, site: Site) -> str:
        return self._paths.get(id(module), str(site))

    def _hook_point(self, site: Site, module: nn.Module, side: str, width: int | None, columns: slice | Tensor | None = None) -> HookPoint:
        axes = None if self.stack.axes in (None, (0, 1, 2)) else self.stack.axes
        return HookPoint(site, module, self._path_of(module, site), side, width, columns, axes)


def _configured_kv_heads(config: Any, n_heads: int) -> int:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    number = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    return number if isinstance(number, int) else n_heads


def _digest(embedding: nn.Module | None) -> str | None:
    """Of 16 rows; None for a DTensor shard, which does not hold the same rows on every rank."""
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or type(weight.data) is not Tensor or weight.is_meta:
        return None
    rows = torch.linspace(0, weight.shape[0] - 1, 16).long()
    return hashlib.sha256(weight.detach()[rows.to(weight.device)].float().cpu().numpy().tobytes()).hexdigest()[:16]


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


_AS_MODULE = "'module:<dotted path>:<input|output>' always exists"


def _no_single_stack(model: nn.Module, stacks: list[str], failures: list[str]) -> AnatomyError:
    lists = [f"{path} ({len(m)} x {type(m[0]).__name__})" for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    tried = f"; tried {'; '.join(failures)}" if failures else ""
    return AnatomyError(
        f"{type(model).__name__} has {'several decoders' if stacks else 'no decoder'} that could be recognised",
        expected="one stack of residual blocks: a list of modules of which each takes what the one before gave",
        found=f"{stacks or lists or 'no nn.ModuleList at all'}{tried}",
        remedy="pass the one that is meant" if stacks else "address its tensors as 'module:<dotted path>:<input|output>'",
    )


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


def _no_writer(anatomy: Anatomy, layer: int, part: str, found: list[Writer]) -> SiteError:
    parts = anatomy.parts[layer]
    if not parts.writers:
        return SiteError(
            f"what '{part}' adds to the residual stream in block {layer} of this {anatomy.kind} is no module's output",
            expected="modules whose outputs add up to the change of the stream",
            found=parts.reason,
            remedy=f"use 'layers.{layer}.input' or 'layers.{layer}.output'; {_AS_MODULE}",
        )
    what = f"several parts that could be '{part}'" if found else f"no '{part}'"
    return SiteError(
        f"block {layer} of this {anatomy.kind} has {what}",
        expected=f"one module that is '{part}'",
        found=", ".join(_named(writer) for writer in found or parts.writers),
        remedy=f"hybrid blocks lack some sites; 'layers.{layer}.output' and {_AS_MODULE}",
    )


def _scaled(anatomy: Anatomy, site: Site, writer: Writer) -> SiteError:
    assert site.layer is not None
    path = anatomy._path_of(anatomy.module_in_block(site.layer, writer.path), site)
    return SiteError(
        f"what '{site}' of this {anatomy.kind} means is no module's output",
        expected="a module whose output is added to the residual stream as it is",
        found=f"'{writer.path}', of whose output {writer.scale:.4g} times is added",
        remedy=f"use 'layers.{site.layer}.output', or 'module:{path}:output' at 1 / {writer.scale:.4g} of the strength",
    )


def _named(writer: Writer) -> str:
    role = "attention" if writer.mixes and writer.attends else "mixer.output" if writer.mixes else "mlp.output"
    return f"{writer.path} ({role})"


def _unknown_writers(anatomy: Anatomy, layer: int, paths: list[str]) -> SiteError:
    return SiteError(
        f"not all that block {layer} of this {anatomy.kind} adds to the residual stream has a site",
        expected="one mixer and one MLP in every block",
        found=f"also {paths}" if paths else anatomy.parts[layer].reason,
        remedy="act on 'layers.*.output' instead",
    )


def _no_projection(anatomy: Anatomy, site: Site, writer: Writer) -> SiteError:
    return SiteError(
        f"block {site.layer} of this {anatomy.kind} has no '{site.part}'",
        expected="one linear map at the end of the part",
        found=f"'{writer.part}', which ends in none",
        remedy=f"mixture-of-experts and hybrid blocks lack some sites; '{site.part.partition('.')[0]}.output' and {_AS_MODULE}",
    )


def _no_heads(anatomy: Anatomy, layer: int, part: str) -> SiteError:
    return SiteError(
        f"block {layer} of this {anatomy.kind} has no '{part}' that is known",
        expected="projections named q_proj, k_proj and v_proj, or a fused one whose layout could be proven",
        found=[name for name, _ in anatomy.module_in_block(layer, anatomy.writer(layer, "attn").part).named_children()],
        remedy=f"use 'layers.{layer}.attn.output'; {_AS_MODULE}",
    )


def _no_mlp_input(anatomy: Anatomy, site: Site, writer: Writer) -> SiteError:
    return SiteError(
        f"block {site.layer} of this {anatomy.kind} has no '{site.part}' that is known",
        expected="a module that is the MLP",
        found=f"'{writer.part}', its last linear map",
        remedy=f"{_AS_MODULE}",
    )


def _no_tokens_in_stream(anatomy: Anatomy, site: Site) -> SiteError:
    return SiteError(
        f"'{site}' of this {anatomy.kind} is no tensor with one entry per token",
        expected="[batch, tokens, width]",
        found=f"{list(anatomy.stack.shape)} in a pass over {ROWS} texts of {TOKENS} tokens",
        remedy=f"{_AS_MODULE}",
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
