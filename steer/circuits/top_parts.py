"""Parts of heads that move a target most: the leading directions of its gradient at what each head writes with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import whole_number
from steer.circuits.circuit import Circuit
from steer.circuits.component_pass import constant_target, record
from steer.circuits.components import HEAD
from steer.circuits.pairs import Pairs
from steer.circuits.targets import Target, target_words
from steer.circuits.text_overlap import window_hashes
from steer.circuits.text_passes import TextPasses
from steer.circuits.texts import NO_ROLE
from steer.errors import ConfigError
from steer.model.anatomy import Anatomy
from steer.model.block_sites import heads_of
from steer.model.site import Site


def top_parts(model: nn.Module, pairs: Pairs, target: Target, heads: Sequence[str], rank: int = 1, *, max_tokens: int = 2048) -> Circuit:
    """The circuit of the directions of some heads in which the target's gradient is largest: eigenvectors of the sum of g g^T.

    g is the gradient at `attn.z` of a head, at every token that has a role, of the clean and of the corrupted prompts. Where a head does
    several things its part of low rank takes out the one that the target reads, and leaves the rest.

    Args:
        heads: names, `a3.h5`. rank: directions of each, at most the width of a head.

    Returns:
        A circuit with amounts of 1. `facts["carried"]` has the share of sum |g|^2 that lies in the directions of each head.

    Raises:
        ConfigError: no heads, other names, a higher rank, or a target without a gradient there.

    Example:
        >>> names = scores.top_nodes(5).node_names
        >>> circuit = top_parts(model, pairs, target, names).with_ablation(mean_ablation(model, texts))
    """
    anatomy = Anatomy.find(model)
    whole = Circuit.of_nodes(model, heads)
    chosen = [whole.graph.writers[whole.graph.writer_place(name)] for name in dict.fromkeys(heads)]
    if others := [writer.name for writer in chosen if writer.kind != HEAD]:
        raise _no_heads(others)
    widths = {writer.layer or 0: heads_of(anatomy, writer.layer or 0).head_dim for writer in chosen}
    whole_number(rank, "the rank of parts", least=1)
    if rank > min(widths.values()):
        raise _high_rank(rank, min(widths.values()))
    with torch.inference_mode(False):  # of the caller, in which nothing has a gradient
        sums = _squared_gradients(model, anatomy, pairs, target, sorted(widths), max_tokens)
    parts, carried = {}, {}
    for writer in chosen:
        of_head = sums[writer.layer or 0][writer.head or 0]
        if not bool(of_head.any()):
            raise constant_target(f"a gradient that is zero at every token of '{writer.name}'")
        values, vectors = torch.linalg.eigh(of_head)  # ascending
        parts[writer.name] = vectors[:, -rank:].flip(1).T.contiguous()  # [rank, head_dim], the leading one first
        carried[writer.name] = float(values[-rank:].sum() / values.sum())
    facts: dict[str, Any] = {
        "method": {"name": "top_parts", "rank": rank},
        "target": target_words(target),
        "carried": carried,
        "pairs": {"count": len(pairs), "hash": pairs.hash(), "windows": window_hashes(pairs.rows)},
        "model": anatomy.fingerprint(),
    }
    return Circuit(whole.graph, whole.nodes, parts=parts, facts=facts)


def _squared_gradients(
    model: nn.Module, anatomy: Anatomy, pairs: Pairs, target: Target, layers: list[int], max_tokens: int
) -> dict[int, Tensor]:
    """[heads, head_dim, head_dim] fp64 by block: sum over tokens of g g^T."""
    sums: dict[int, Tensor] = {}
    sites = [Site("attn.z", layer) for layer in layers]
    for texts in (pairs.clean, pairs.corrupted):
        passes = TextPasses(model, anatomy, texts, max_tokens=max_tokens)
        for prompts in passes.batches(range(len(texts))):
            batch = passes.batch(prompts)
            found = record(passes, batch, target, values=[], gradients=sites)
            is_in = batch.roles != NO_ROLE  # [rows, tokens]
            for layer, site in zip(layers, sites, strict=True):
                gradient = found.gradients[site]
                by_head = gradient[is_in.to(gradient.device)].double().cpu().unflatten(-1, (heads_of(anatomy, layer).n_heads, -1))
                squares = torch.einsum("thi,thj->hij", by_head, by_head)
                sums[layer] = sums[layer] + squares if layer in sums else squares
    return sums


# ---- errors


def _no_heads(names: list[str]) -> ConfigError:
    return ConfigError("parts are parts of heads", expected="names of heads, a<layer>.h<head>", found=", ".join(names),
                       remedy="leave these out")  # fmt: skip


def _high_rank(rank: int, width: int) -> ConfigError:
    return ConfigError("a part of a head has at most as many directions as the head has channels", expected=f"1 to {width}", found=rank,
                       remedy="take a lower rank")  # fmt: skip
