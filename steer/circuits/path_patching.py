"""Path patching (Wang et al. 2022, IOI, arXiv 2211.00593; Goldowsky-Dill et al. 2023, arXiv 2304.05969): what senders do to a target
through chosen receivers alone.

Two runs beside the clean and the corrupted one. In the first all heads keep their clean values but for the senders, which have corrupted
ones, and receivers are recorded as they then read the stream, through norms as they come out. In the second the receivers are what was
recorded, and all that follows them runs on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.checks import of_type, one_of
from steer.circuits.component_pass import values_at, written_sites
from steer.circuits.components import LOGITS, MLP, ComponentGraph, Reader
from steer.circuits.edge_ablation import SiteFunction
from steer.circuits.pairs import Pairs
from steer.circuits.patch_effects import ALL_TOKENS, PatchEffects, nodes_mask, patching_facts
from steer.circuits.patched_run import NOISING, PatchedRun, RowsOf, target_of
from steer.circuits.targets import Target
from steer.circuits.texts import Batch
from steer.errors import ConfigError
from steer.model.block_sites import heads_of
from steer.model.context import ForwardContext
from steer.model.hooks import HookFunction
from steer.model.site import Site

HEADS, EVERYTHING = FROZEN = ("heads", "all")
Senders = Sequence[str | Sequence[str]]


def path_patch(
    model: nn.Module,
    pairs: Pairs,
    target: Target,
    senders: Senders,
    receivers: Sequence[str] = (LOGITS,),
    *,
    freeze: str = HEADS,
    direction: str = NOISING,
    max_tokens: int = 512,
    progress: bool = True,
) -> PatchEffects:
    """The effect of each set of senders through the receivers.

    Under grouped-query attention keys and values are receivers of a group, `a23.g1<v>`, as the model has them.

    Args:
        senders: nodes, each on its own; a list of names within the list is a set that is patched together.
        receivers: one set for all senders: queries `a9.h6<q>`, keys `a9.g2<k>`, values `a9.g2<v>`, MLPs `m7`, `logits`.
        freeze: `heads` keeps other heads and lets MLPs between be recomputed, as in IOI; `all` keeps MLPs too: the direct path alone.
        direction: `noising` puts corrupted senders into the clean run, `denoising` clean ones into the corrupted run.
        max_tokens: padded tokens of a batch.

    Returns:
        Effects by set of senders, named `a7.h3+a7.h9` where it has several.

    Raises:
        ConfigError: no senders or receivers, an unknown name, or senders of which none comes before a receiver.

    Example:
        >>> senders = [f"a20.h{head}" for head in range(9)]
        >>> path_patch(model, pairs, target, senders, ["a23.h3<q>"]).plot("into_23.3.svg")
    """
    one_of(freeze, FROZEN, "what path patching freezes")
    patched = PatchedRun(model, pairs, target, direction=direction, max_tokens=max_tokens)
    graph = patched.run.graph
    names, masks = _sender_sets(graph, senders)
    run = _PathRun(patched, _receivers(graph, receivers), freeze == EVERYTHING)
    for name, mask in zip(names, masks, strict=True):
        if not bool(graph.possible[mask.bool()][:, run.places].any()):
            raise _not_before(name, receivers)
    before, other = patched.ends()
    values = torch.zeros(1, len(names), len(pairs), dtype=torch.float64)
    with torch.no_grad(), tqdm(total=len(names) * len(pairs), desc="path patching", unit="run", disable=None if progress else True) as bar:
        for prompts in patched.run.batches([]):
            ends = run.ends(prompts)
            size = max(1, max_tokens // (len(prompts) * max(pairs.clean.lengths[i] for i in prompts)))
            for first in range(0, len(names), size):
                chosen = masks[first : first + size]
                values[0, first : first + size, prompts] = run.values(chosen, prompts, *ends)
                bar.update(len(chosen) * len(prompts))
    clean, corrupted = (before, other) if direction == NOISING else (other, before)
    how = {"freeze": freeze, "receivers": list(receivers)}
    facts = {**patching_facts(patched, pairs, "path patching", direction), **how}
    return PatchEffects(tuple(names), (ALL_TOKENS,), values, clean, corrupted, direction, facts)


class _PathRun:
    """The two runs of path patching.

    Args:
        readers: receivers, with their places among the readers of the graph.
        freezes_mlps: other MLPs keep their values too.
    """

    def __init__(self, patched: PatchedRun, readers: Mapping[int, Reader], freezes_mlps: bool) -> None:
        self.run, self.places, self.freezes_mlps = patched.run, list(readers), freezes_mlps
        anatomy = self.run.anatomy
        self.last = Site("output", anatomy.n_layers - 1)
        self.columns: dict[Site, Tensor] = {}  # [width] bool of each site that receivers read at; True everywhere but for heads
        for reader in readers.values():
            if reader.kind == LOGITS:
                self.columns[self.last] = torch.ones(1, dtype=torch.bool)
            elif reader.kind == MLP:
                self.columns[Site("mlp.input", reader.layer)] = torch.ones(1, dtype=torch.bool)
            else:
                site = Site(f"attn.{reader.kind}", reader.layer)
                heads = heads_of(anatomy, reader.layer or 0, site.part)
                assert reader.index is not None
                count = heads.n_heads if reader.kind == "q" else heads.n_kv_heads
                mask = torch.arange(count).eq(reader.index).repeat_interleave(heads.head_dim)
                self.columns[site] = self.columns.get(site, torch.zeros_like(mask)) | mask

    def ends(self, prompts: Sequence[int]) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
        """[prompts, tokens, width] by site, of both runs: what is kept, and what senders write with."""
        sites = written_sites(self.run.anatomy.n_layers)
        kept = values_at(self.run.passes, self.run.passes.batch(prompts), [*sites, self.last])
        return kept, self.run.counterfactual(prompts)

    def values(self, senders: Sequence[Tensor], prompts: Sequence[int], kept: dict[Site, Tensor], inserted: dict[Site, Tensor]) -> Tensor:
        """[sender sets, prompts] of the target."""
        batch = self.run.passes.batch([*prompts] * len(senders))
        rows = torch.arange(len(prompts)).repeat(len(senders))
        of_rows = RowsOf(kept, rows)
        replacement = self.run.replacement(batch, RowsOf(inserted, rows))
        amounts = torch.stack(list(senders)).repeat_interleave(len(prompts), 0)  # [rows, writers]
        functions: dict[Site, HookFunction] = {}
        for site, is_sender in self._by_site(amounts).items():
            is_kept = site.part == "attn.z" or (self.freezes_mlps and site.part == "mlp.output")
            if is_kept or bool(is_sender.any()):
                functions[site] = SiteFunction(_sent(site, is_sender, replacement, of_rows if is_kept else None))
        if [*self.columns] == [self.last]:
            return target_of(self.run, batch, functions).view(len(senders), len(prompts))
        received = self._received(batch, functions)
        functions = {site: SiteFunction(_replaced(columns, received[site])) for site, columns in self.columns.items() if site != self.last}
        if self.last in self.columns:
            functions[self.last] = SiteFunction(_moved(received[self.last] - of_rows[self.last]))
        return target_of(self.run, batch, functions).view(len(senders), len(prompts))

    def _by_site(self, amounts: Tensor) -> dict[Site, Tensor]:
        """[rows, 1, width or 1] bool by site, whether it is a sender's."""
        graph, is_sender = self.run.graph, amounts.bool().unsqueeze(1)
        found = {Site("embed"): is_sender[..., :1]}
        for layer in range(self.run.anatomy.n_layers):
            heads, mlp = graph.heads_at(layer), graph.mlp_at(layer)
            found[Site("attn.z", layer)] = is_sender[..., heads].repeat_interleave(heads_of(self.run.anatomy, layer).head_dim, -1)
            found[Site("mlp.output", layer)] = is_sender[..., mlp : mlp + 1]
        return found

    def _received(self, batch: Batch, functions: dict[Site, HookFunction]) -> dict[Site, Tensor]:
        """[rows, tokens, width] by site, what receivers read in the first run."""
        found: dict[Site, Tensor] = {}

        def keep(site: Site) -> Callable[[Tensor, ForwardContext], None]:
            return lambda h, context: found.__setitem__(site, h.clone())

        both = {**functions, **{site: SiteFunction(keep(site)) for site in self.columns}}
        self.run.passes.run_batch(batch, both, gradients=False, last_token=True)
        return found


def _sent(
    site: Site, is_sender: Tensor, replacement: Callable[[Site, Tensor], Tensor], kept: RowsOf | None
) -> Callable[[Tensor, ForwardContext], Tensor]:
    """Senders' values where there are some, others as they were, or as they come where nothing is kept."""
    sends = bool(is_sender.any())

    def function(h: Tensor, context: ForwardContext) -> Tensor:
        base = h if kept is None else kept[site].to(h)
        return torch.where(is_sender.to(h.device), replacement(site, base), base) if sends else base

    return function


def _replaced(columns: Tensor, received: Tensor) -> Callable[[Tensor, ForwardContext], Tensor]:
    def function(h: Tensor, context: ForwardContext) -> Tensor:
        return torch.where(columns.to(h.device), received.to(h), h)

    return function


def _moved(change: Tensor) -> Callable[[Tensor, ForwardContext], Tensor]:
    def function(h: Tensor, context: ForwardContext) -> Tensor:
        return h + change.to(h)

    return function


# ---- who sends and receives


def _sender_sets(graph: ComponentGraph, senders: Senders) -> tuple[list[str], list[Tensor]]:
    """Names, and [writers] of each set."""
    of_type(senders, (list, tuple), "the senders of path patching", "pass a list of nodes, e.g. ['a9.h9', 'a9.h6']")
    sets = [[each] if isinstance(each, str) else list(each) for each in senders]
    if not sets or not all(sets):
        raise _none_of("senders", "a9.h9")
    return ["+".join(each) for each in sets], [nodes_mask(graph, each) for each in sets]


def _receivers(graph: ComponentGraph, names: Sequence[str]) -> dict[int, Reader]:
    """By their places among the readers."""
    of_type(names, (list, tuple), "the receivers of path patching", "pass a list of readers, e.g. ['a9.h6<q>', 'logits']")
    if not names:
        raise _none_of("receivers", "logits")
    return {place: graph.readers[place] for place in map(graph.reader_place, names)}


# ---- errors


def _none_of(what: str, example: str) -> ConfigError:
    return ConfigError(f"path patching without {what}", expected="at least one in every set", found="none", remedy=f"e.g. ['{example}']")


def _not_before(name: str, receivers: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"no receiver comes after the senders '{name}', so that they send nothing there",
        expected="senders that write before a receiver reads",
        found=f"receivers {', '.join(receivers)}",
        remedy="leave these senders out, or take later receivers",
    )
