"""How the components of each block read the residual stream: through which norm, and before or after what attention adds.

What is found in a pass over a few random tokens is proven on them: the norm's input is the stream at that place, its output is what the
projections take, and its formula is known. Nothing is taken from the names of modules but that a norm is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steer.circuits.linear import COARSE, TOLERANCE, NormFormula, norm_formula
from steer.errors import AnatomyError
from steer.model import hooks
from steer.model.anatomy import Anatomy
from steer.model.capture import evaluating
from steer.model.devices import input_device
from steer.model.own_calls import texts_call
from steer.model.restoring import restoring, restoring_all
from steer.model.site import Site

TRIAL = (2, 6)  # rows, tokens
IDENTITY = None  # the stream is read as it is


@dataclass(frozen=True, eq=False)
class BlockReaders:
    """Of one block.

    Attributes:
        attention, mlp: formula of the norm before each; None where the stream is read as it is.
        parallel: the MLP reads the stream before attention adds to it.
        post_norm: formula of the norm that the output of attention goes through before it is added; None for none.
        attention_norm, mlp_norm: the norms themselves, whose weights may be in training.
    """

    attention: NormFormula | None
    mlp: NormFormula | None
    parallel: bool
    post_norm: NormFormula | None
    attention_norm: nn.Module | None = None
    mlp_norm: nn.Module | None = None


@dataclass(eq=False)
class _Seen:
    """What the modules of one block took and gave."""

    sites: dict[str, Tensor]
    norms: list[tuple[nn.Module, Tensor, Tensor]]


def stream_readers(model: nn.Module, anatomy: Anatomy) -> tuple[BlockReaders, ...]:
    """Runs the model over a few random tokens.

    Raises:
        AnatomyError: what a part of a block reads is no norm of the stream that is known. SiteError: a block without heads or MLP.
    """
    return tuple(_of_block(anatomy, layer, seen) for layer, seen in enumerate(_observed(model, anatomy)))


def _observed(model: nn.Module, anatomy: Anatomy) -> list[_Seen]:
    seen = [_Seen({}, []) for _ in range(anatomy.n_layers)]
    points = []
    for layer, of_block in enumerate(seen):
        for part in ("input", "attn.output", "mlp.input"):

            def keep(h: Tensor, ctx: Any, *, to: dict[str, Tensor] = of_block.sites, name: str = part) -> None:
                to[name] = h.detach()

            points.append((anatomy.point(Site(part, layer)), keep))
    vocabulary = getattr(anatomy.embedding, "num_embeddings", None) or len(anatomy.embedding.weight)  # type: ignore[union-attr, arg-type]
    ids = torch.randint(vocabulary, TRIAL, generator=torch.Generator().manual_seed(0)).to(input_device(model))
    installation = hooks.Installation(model, anatomy, points)
    with restoring_all() as stack:
        stack.enter_context(restoring(installation.remove))
        installation.install()
        for layer, of_block in enumerate(seen):
            for module in anatomy.blocks[layer].modules():
                if "norm" in type(module).__name__.lower():
                    stack.callback(module.register_forward_hook(partial(_keep_norm, of_block)).remove)
            projection = anatomy.point(Site("attn.q", layer)).module
            stack.callback(projection.register_forward_pre_hook(partial(_keep_read, of_block)).remove)
        stack.enter_context(evaluating(model))
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            texts_call(model, anatomy)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return seen


def _keep_norm(seen: _Seen, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
        seen.norms.append((module, args[0].detach(), output.detach()))


def _keep_read(seen: _Seen, module: nn.Module, args: tuple[Any, ...]) -> None:
    seen.sites["attn.read"] = args[0].detach()


def _of_block(anatomy: Anatomy, layer: int, seen: _Seen) -> BlockReaders:
    before, added = seen.sites["input"], seen.sites["attn.output"]
    after = before + added.to(before.device)
    attention, norm, _ = _reading(anatomy, layer, "attention", seen, seen.sites["attn.read"], [before])
    mlp, mlp_norm, place = _reading(anatomy, layer, "the MLP", seen, seen.sites["mlp.input"], [after, before])
    return BlockReaders(attention, mlp, place == 1, _post_norm(anatomy, layer, seen), norm, mlp_norm)


def _reading(
    anatomy: Anatomy, layer: int, what: str, seen: _Seen, read: Tensor, streams: list[Tensor]
) -> tuple[NormFormula | None, nn.Module | None, int]:
    """The norm between one of the streams and what is read, and which stream that is."""
    for place, stream in enumerate(streams):
        if _same(stream, read):
            return IDENTITY, None, place
    for place, stream in enumerate(streams):
        for module, given, output in seen.norms:
            if _same(output, read) and _same(given, stream):
                return norm_formula(module, given.reshape(stream.shape), output.reshape(stream.shape)), module, place
    raise _unknown_reading(anatomy, layer, what, seen)


def _post_norm(anatomy: Anatomy, layer: int, seen: _Seen) -> NormFormula | None:
    module = anatomy.post_norm(layer, anatomy.writer(layer, "attn"))
    if module is None:
        return None
    for norm, given, output in seen.norms:
        if norm is module:
            return norm_formula(module, given, output)
    raise _unknown_reading(anatomy, layer, "what attention adds", seen)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, whether tokens are [rows, tokens, width] or one list."""
    if a.numel() != b.numel():
        return False
    a, b = a.reshape(-1).float(), b.to(a.device).reshape(-1).float()
    return bool((a - b).abs().max() <= TOLERANCE.get(a.dtype, COARSE) * b.abs().max())


def _unknown_reading(anatomy: Anatomy, layer: int, what: str, seen: _Seen) -> AnatomyError:
    return AnatomyError(
        f"how {what} in block {layer} of this {anatomy.kind} reads the residual stream is not known",
        expected="the stream itself, or a norm of it, before or after what attention adds",
        found=f"norms {[type(module).__name__ for module, _, _ in seen.norms]}, none between the two",
        remedy="attribute to nodes alone, edges=False",
    )
