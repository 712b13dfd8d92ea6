"""Anatomy: finds the sites of a decoder, raw or wrapped (PEFT, torch.compile, DDP, FSDP2, checkpointing, LightningModule).

Wrappers only add prefixes to module paths, so nothing is unwrapped: the decoder is searched for among `named_modules()`, and the module
objects found are the ones that run.
"""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import of_type
from steer.errors import AnatomyError, SiteError
from steer.model.families import FAMILIES, Family
from steer.model.site import LAYER_PARTS, Site, expand


@dataclass(frozen=True)
class HookPoint:
    """Where and how to read and write one site.

    Attributes:
        module, path: the module that is hooked, and its name in the model.
        side: `input` or `output` of that module.
        width: size of the last dimension; None when only a call can tell (module sites).
        columns: which columns of a fused projection belong to the site; None for all.
    """

    site: Site
    module: nn.Module
    path: str
    side: str
    width: int | None
    columns: slice | Tensor | None = None


def child(module: nn.Module, path: str) -> nn.Module | None:
    """Sub-module by dotted attribute path, seen through wrappers that forward attributes; None where it is missing."""
    member: Any = module
    for name in path.split("."):
        member = getattr(member, name, None)
    return member if isinstance(member, nn.Module) else None


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


def _fits(module: nn.Module, family: Family) -> bool:
    layers = getattr(module, family.layers, None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or child(module, family.embed) is None:
        return False
    block = layers[0]
    needed = [family.mlp_out, *(name for name in (family.post_attn, family.post_mlp) if name)]
    attn = child(block, family.attn)
    return attn is not None and child(attn, family.out) is not None and all(child(block, name) is not None for name in needed)


def _has_projections(module: nn.Module, family: Family) -> bool:
    attn = child(getattr(module, family.layers)[0], family.attn)
    return all(child(attn, name) is not None for name in family.qkv)  # type: ignore[arg-type]


def _find_decoder(model: nn.Module) -> tuple[str, nn.Module, Family]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    families = sorted(FAMILIES, key=lambda family: model_type not in family.members)
    decoders: list[tuple[str, nn.Module, Family]] = []
    for path, module in model.named_modules():
        if fitting := [family for family in families if _fits(module, family)]:
            decoders.append((path, module, next((family for family in fitting if _has_projections(module, family)), fitting[0])))
    if len(decoders) > 1:
        text = [entry for entry in decoders if any(mark in entry[0] for mark in ("language_model", "text_model", "decoder"))]
        decoders = text if len(text) == 1 else decoders
    if len(decoders) == 1:
        return decoders[0]
    stacks = [f"{path} ({len(m)} x {type(m[0]).__name__})" for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    raise AnatomyError(
        f"{type(model).__name__} has {'no decoder' if not decoders else 'several decoders'} that could be recognised",
        expected="one stack of blocks with attention and MLP named as in one of: " + ", ".join(family.name for family in FAMILIES),
        found=[path for path, *_ in decoders] or stacks or "no nn.ModuleList at all",
        remedy="address its tensors as 'module:<dotted path>:<input|output>', or add one row to steer/model/families.py",
    )


@dataclass(eq=False)
class Anatomy:
    """The parts of one decoder.

    Attributes:
        model: the model as it was given; `path` leads from it to `decoder`.
        blocks: the transformer blocks, checkpoint wrappers included.
        width: size of the residual stream; `head_dim` the size of one head.
        n_heads, n_kv_heads: query heads, and key-value heads (smaller under grouped-query attention).
    """

    model: nn.Module
    path: str
    decoder: nn.Module
    family: Family
    blocks: list[nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = list(getattr(self.decoder, self.family.layers))
        config = getattr(self.decoder, "config", None)
        if config is None:
            raise AnatomyError(
                f"decoder '{self.path}' has no config",
                expected="the decoder of a transformers model, with its config",
                found=f"a {type(self.decoder).__name__} without one",
                remedy="address its tensors as 'module:<dotted path>:<input|output>', or give it the config of its model",
            )
        self.config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.width: int = self.config.hidden_size
        self.n_heads: int = self.config.num_attention_heads
        self.head_dim: int = getattr(self.config, "head_dim", None) or self.width // self.n_heads

    @classmethod
    def find(cls, model: nn.Module) -> Anatomy:
        """Raises AnatomyError, listing every stack of modules it saw, when there is not exactly one decoder."""
        check_model(model)
        return cls(model, *_find_decoder(model))

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @cached_property
    def n_kv_heads(self) -> int:
        attn = self._part(0, self.family.attn)
        if self.family.fused:
            fused = out_width(self._part(0, f"{self.family.attn}.{self.family.qkv[0]}"))
            return (fused // self.head_dim - self.n_heads) // 2 if fused else self.n_heads
        return (out_width(child(attn, self.family.qkv[1])) or self.width) // self.head_dim  # type: ignore[arg-type]

    @property
    def embedding(self) -> nn.Module:
        """Token embedding, [vocabulary, width]."""
        return child(self.decoder, self.family.embed)  # type: ignore[return-value]

    @property
    def final_norm(self) -> nn.Module | None:
        return child(self.decoder, self.family.norm)

    @cached_property
    def unembedding(self) -> nn.Module | None:
        """The module that makes logits, None for a bare decoder."""
        for module in reversed(self.chain):
            if (head := getattr(module, "get_output_embeddings", lambda: None)()) is not None:
                return head
            if (head := child(module, "lm_head")) is not None:
                return head
        return None

    @cached_property
    def chain(self) -> list[nn.Module]:
        """Modules from the given model down to the decoder, each holding the next."""
        names = self.path.split(".") if self.path else []
        return [self.model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]

    @cached_property
    def _paths(self) -> dict[int, str]:
        return {id(module): path for path, module in self.model.named_modules()}

    @property
    def moe(self) -> bool:
        """True when the MLP is a mixture of experts, whose neurons are not one tensor."""
        return any(child(block, self.family.down) is None for block in self.blocks)

    def sites(self, *patterns: str) -> list[Site]:
        """Expands patterns such as `layers.*.output`; without any, every residual, attention and MLP output."""
        chosen = patterns or ("embed", "layers.*.attn.output", "layers.*.mlp.output", "layers.*.output", "final_norm")
        return [site for pattern in chosen for site in expand(pattern, self.n_layers)]

    def fingerprint(self) -> dict[str, Any]:
        """What makes this model itself: its shape, and a digest of 16 embedding rows (stable under LoRA, moved by full training)."""
        weight, digest = self.embedding.weight, None
        # a DTensor shard does not hold the same rows on every rank, an offloaded weight holds none
        if isinstance(weight, Tensor) and type(weight.data) is Tensor and not weight.is_meta:
            rows = torch.linspace(0, weight.shape[0] - 1, 16).long()
            digest = hashlib.sha256(weight.detach()[rows.to(weight.device)].float().cpu().numpy().tobytes()).hexdigest()[:16]
        return {
            "model_type": self.config.model_type,
            "n_layers": self.n_layers,
            "width": self.width,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "vocabulary": self.config.vocab_size,
            "embedding_digest": digest,
        }

    def head_outputs(self, layer: int, z: Tensor) -> Tensor:
        """What each head adds to the residual stream.

        Args:
            z: [batch, tokens, heads * head_dim], captured at `layers.<layer>.attn.z`.

        Returns:
            [heads + 1, batch, tokens, width]; the last row is the bias of W_O. A post-norm is applied with its scale frozen at the value it
            has for the whole attention output, which makes the rows add up to `layers.<layer>.attn.output`.
        """
        project = self._part(layer, f"{self.family.attn}.{self.family.out}")
        masked = z.new_zeros((self.n_heads + 1, *z.shape))
        for head in range(self.n_heads):
            columns = slice(head * self.head_dim, (head + 1) * self.head_dim)
            masked[head, ..., columns] = z[..., columns]
        written = project(masked)
        written = torch.cat([written[:-1] - written[-1], written[-1:]])
        if self.family.post_attn is None:
            return written
        total = written.sum(0)
        normed = self._part(layer, self.family.post_attn)(total)
        return written * torch.where(total == 0, 0.0, normed / torch.where(total == 0, 1.0, total))

    def _part(self, layer: int, path: str) -> nn.Module:
        member = child(self.blocks[layer], path)
        if member is None:
            raise SiteError(
                f"block {layer} of this {self.config.model_type} has no '{path}'",
                expected=f"the sub-modules of the family '{self.family.name}'",
                found=[name for name, _ in self.blocks[layer].named_children()],
                remedy="mixture-of-experts and hybrid blocks lack some sites; 'output', 'mlp.output' or a 'module:' site always exists",
            )
        return member

    def _columns(self, part: str) -> tuple[slice | Tensor | None, int]:
        """Columns and width of `attn.q`, `attn.k` or `attn.v` in its projection."""
        heads, groups, size = self.n_heads, self.n_kv_heads, self.head_dim
        width = {"attn.q": heads, "attn.k": groups, "attn.v": groups}[part] * size
        if self.family.fused is None:
            return None, width
        if self.family.fused == "blocks":
            start = {"attn.q": 0, "attn.k": heads, "attn.v": heads + groups}[part] * size
            return slice(start, start + width), width
        grouped = torch.arange((heads + 2 * groups) * size).view(groups, heads // groups + 2, size)
        rows = {"attn.q": slice(0, -2), "attn.k": slice(-2, -1), "attn.v": slice(-1, None)}[part]
        return grouped[:, rows].flatten(), width

    def point(self, site: str | Site) -> HookPoint:
        """Resolves a site. Raises SiteError when the layer is out of range or the part is missing in this family."""
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
        family, part = self.family, site.part
        if part in ("attn.q", "attn.k", "attn.v"):
            name = family.qkv[0] if family.fused else family.qkv["qkv".index(part[-1])]
            columns, width = self._columns(part)
            return self._hook_point(site, self._part(layer, f"{family.attn}.{name}"), "output", width, columns)
        if part in ("input", "output"):
            return self._hook_point(site, self.blocks[layer], part, self.width)
        paths = {
            "attn.output": (family.post_attn or family.attn, "output"),
            "attn.z": (f"{family.attn}.{family.out}", "input"),
            "mlp.input": (family.mlp_in, "input"),
            "mlp.neurons": (family.down, "input"),
            "mlp.output": (family.post_mlp or family.mlp_out, "output"),
        }
        path, side = paths[part]
        module = self._part(layer, path)
        widths = {"attn.z": self.n_heads * self.head_dim, "mlp.neurons": in_width(module)}
        return self._hook_point(site, module, side, widths.get(part, self.width))

    def _model_point(self, site: Site) -> HookPoint:
        if site.part == "embed":
            return self._hook_point(site, self.blocks[0], "input", self.width)
        module = self.final_norm if site.part == "final_norm" else self.unembedding
        if module is None:
            head = site.part == "logits"
            raise SiteError(
                f"{type(self.model).__name__} has no '{site}'",
                expected=f"a model with a {'language-model head' if head else f'{self.family.norm} after its blocks'}",
                found=[name for name, _ in self.model.named_children()],
                remedy="attach to the model with its language-model head" if head else f"use 'layers.{self.n_layers - 1}.output'",
            )
        return self._hook_point(site, module, "output", self.width if site.part == "final_norm" else out_width(module))

    def _hook_point(self, site: Site, module: nn.Module, side: str, width: int | None, columns: slice | Tensor | None = None) -> HookPoint:
        return HookPoint(site, module, self._paths.get(id(module), str(site)), side, width, columns)


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


__all__ = ["LAYER_PARTS", "Anatomy", "HookPoint", "module_point", "resolve"]
