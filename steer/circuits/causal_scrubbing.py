"""Causal scrubbing (Chan et al. 2022): what is left of a target when everything that a hypothesis calls equivalent is exchanged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.checks import of_type, whole_number
from steer.circuits.ablation import zero_ablation
from steer.circuits.component_pass import values_at, written_sites
from steer.circuits.component_run import ComponentRun, TakenOut
from steer.circuits.components import ComponentGraph
from steer.circuits.edge_ablation import EdgeAblation, Replacement
from steer.circuits.evaluation import share_of
from steer.circuits.patch_effects import edge_place, nodes_mask
from steer.circuits.patched_run import target_of
from steer.circuits.targets import Target, target_words
from steer.circuits.texts import NO_ROLE, Batch, Prompts, Texts, rows_of
from steer.errors import ConfigError
from steer.model.block_sites import heads_of
from steer.model.hooks import HookFunction
from steer.model.site import Site
from steer.model.tokens import rows_hash

# (number of a prompt) -> what a node or edge is said to depend on; or that of each prompt in a list
Key = Callable[[int], Hashable] | Sequence[Hashable]


def causal_scrubbing(
    model: nn.Module,
    hypothesis: Mapping[str, Key],
    prompts: Prompts | Texts,
    target: Target,
    *,
    resamplings: int = 10,
    seed: int = 0,
    tokenizer: Any = None,
    max_tokens: int = 1024,
    progress: bool = True,
) -> CausalScrubbing:
    """Exchanges activations between prompts that a hypothesis calls equivalent, all others between any prompts, and runs the model.

    A hypothesis says on what each node or edge depends, e.g. `{"a23.h3": names, "a17.h4": lambda prompt: sentences[prompt]}`.

    - Of nodes: a node writes what it writes on another prompt with the same key. All other nodes of the same kinds (heads, MLPs, the input)
      write what they write on one random prompt. Kinds that the hypothesis does not name run on.
    - Of edges: the reader reads what the writer writes in the scrubbed run of another prompt with the same key, so that keys hold along
      whole paths, as far as the edges of the hypothesis go back. All other edges carry what is written on one random prompt. A node in a
      hypothesis of edges stands for all edges out of it, with one draw.

    Prompts are drawn within a batch, and a prompt may be drawn for itself.

    Args:
        hypothesis: by name of a node `a3.h5` or edge `a3.h5->m7`, a function of the number of a prompt, or a list with a key for each.
        prompts: of one length in tokens, so that positions align. Those with a role are scrubbed, see `Texts`.
        resamplings: how often everything is drawn anew; the interval is over them.
        max_tokens: padded tokens of a batch.

    Raises:
        ConfigError: an empty hypothesis, an unknown name, keys that do not fit the prompts or of which each stands for a single prompt,
            prompts of different lengths.

    Example:
        >>> lengths = [len(text.split()[1]) for text in texts]  # what the head is said to depend on: the length of the noun
        >>> found = causal_scrubbing(model, {"a23.h3": lengths}, texts, target, resamplings=2)
        >>> found.recovered, found.interval
    """
    of_type(hypothesis, Mapping, "a hypothesis", "pass {node or edge: key of each prompt}")
    if not hypothesis:
        raise _empty()
    whole_number(resamplings, "the number of resamplings", least=1)
    texts = prompts if isinstance(prompts, Texts) else Texts(rows_of(model, prompts, tokenizer))
    if len(set(texts.lengths)) > 1:
        raise _other_lengths(texts.lengths)
    run = ComponentRun(model, texts, target, zero_ablation(), max_tokens=max_tokens)
    keys = {name: _keys_of(name, key, len(texts)) for name, key in hypothesis.items()}
    if all(len(set(of_prompts)) == len(of_prompts) for of_prompts in keys.values()):
        raise _nothing_to_exchange(len(texts))
    scrubbing = _Scrubbing(run, keys, torch.Generator().manual_seed(seed))
    scrubbed = torch.zeros(resamplings, len(texts), dtype=torch.float64)
    random, whole = torch.zeros_like(scrubbed), torch.zeros(len(texts), dtype=torch.float64)
    size = max(1, max_tokens // texts.lengths[0])
    with torch.no_grad():
        for number in tqdm(range(resamplings), desc="causal scrubbing", unit="resampling", disable=None if progress else True):
            for chosen in torch.randperm(len(texts), generator=scrubbing.generator).split(size):
                of_batch = scrubbing.values(chosen.tolist())
                whole[chosen], random[number, chosen], scrubbed[number, chosen] = of_batch
    facts = {
        "method": "causal scrubbing",
        "of": "edges" if scrubbing.has_edges else "nodes",
        "hypothesis": list(hypothesis),
        "target": target_words(target),
        "prompts": {"count": len(texts), "hash": rows_hash(texts.rows)},
        "drawn_for_itself": scrubbing.own / max(1, scrubbing.drawn),
        "batch": min(size, len(texts)),
        "seed": seed,
        "model": run.anatomy.fingerprint(),
    }
    return CausalScrubbing(whole, scrubbed, random, facts)


@dataclass(frozen=True, eq=False)
class CausalScrubbing:
    """The target of each prompt.

    Attributes:
        model: [prompts] of the model as it is.
        scrubbed: [resamplings, prompts]. random: [resamplings, prompts] with the logits of a random prompt.
        facts: hypothesis, target, prompts, and `drawn_for_itself`, the share of draws that exchanged nothing; JSON-able.

    Example:
        >>> found = causal_scrubbing(model, {"a23.h3": [len(text) % 2 for text in texts]}, texts, target, resamplings=2)
        >>> found.scrubbed.shape, found.facts["drawn_for_itself"]  # [resamplings, prompts], share that exchanged nothing
    """

    model: Tensor
    scrubbed: Tensor
    random: Tensor
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def recovered(self) -> float:
        """(E scrubbed - E random) / (E model - E random): 1 where the hypothesis loses nothing, 0 where it explains nothing."""
        return share_of(float(self.scrubbed.mean()), float(self.model.mean()), float(self.random.mean()))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % for `recovered`, by Student's t over resamplings; NaN with one."""
        each = [share_of(float(values.mean()), float(self.model.mean()), float(self.random.mean())) for values in self.scrubbed]
        if len(each) < 2:
            return float("nan"), float("nan")
        half = float(stats.t.ppf(0.975, len(each) - 1) * torch.tensor(each).std() / len(each) ** 0.5)
        return self.recovered - half, self.recovered + half

    def __repr__(self) -> str:
        low, high = self.interval
        return (
            f"CausalScrubbing(recovered {self.recovered:.3f} [{low:.3f}, {high:.3f}]; target {float(self.model.mean()):.3g}, scrubbed "
            f"{float(self.scrubbed.mean()):.3g}, random {float(self.random.mean()):.3g}; {len(self.model)} prompts, {len(self.scrubbed)} "
            f"resamplings, {self.facts.get('drawn_for_itself', 0):.0%} drawn for themselves)"
        )


class _Scrubbing:
    """Draws prompts, and runs batches with what is written on them.

    Attributes:
        drawn, own: number of prompts drawn by key, and how many of them for themselves.
    """

    def __init__(self, run: ComponentRun, keys: Mapping[str, list[Hashable]], generator: torch.Generator) -> None:
        self.run, self.keys, self.generator = run, keys, generator
        self.drawn = self.own = 0
        self.has_edges = any("->" in name for name in keys)
        graph = run.graph
        self.edges = {name: _edges(graph, name) for name in keys} if self.has_edges else {}
        named = [name for name in keys if "->" not in name]
        kinds = {graph.writers[graph.writer_place(name)].kind for name in named}
        self.nodes = torch.tensor([float(writer.kind in kinds) for writer in graph.writers], dtype=torch.float64)
        if self.has_edges:
            counts = torch.stack(list(self.edges.values())).sum(0)
            if bool((counts > 1).any()):
                raise _edge_twice(next(graph.edges(counts > 1)))

    def values(self, prompts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """[prompts] each of the target: of the model, with logits of a random prompt, and scrubbed."""
        batch = self.run.passes.batch(prompts)
        last = bool(getattr(self.run.target, "at_last_token", False))
        values: dict[Site, Tensor] = {}
        seen: list[Tensor] = []

        def look(_: Batch, logits: Tensor) -> None:
            rows = torch.arange(len(prompts))
            taken = logits[rows, -1:] if last else logits  # prompts are of one length: none is padded
            other = taken[torch.randint(len(prompts), (len(prompts),), generator=self.generator).to(logits.device)]
            seen.extend(self.run.passes.values(self.run.target, batch, of_rows).double().cpu() for of_rows in (taken, other))

        values = values_at(self.run.passes, batch, written_sites(self.run.anatomy.n_layers), look)
        rows = {name: self._draw([keys[i] for i in prompts]) for name, keys in self.keys.items()}
        any_row = torch.randint(len(prompts), (len(prompts),), generator=self.generator)
        functions = (
            self._edge_functions(batch, values, rows, any_row) if self.has_edges else self._node_functions(batch, values, rows, any_row)
        )
        return seen[0], seen[1], target_of(self.run, batch, functions)

    def _draw(self, keys: list[Hashable]) -> Tensor:
        """[rows] for each row one with the same key."""
        members: dict[Hashable, list[int]] = defaultdict(list)
        for row, key in enumerate(keys):
            members[key].append(row)
        picks = torch.rand(len(keys), generator=self.generator).tolist()
        drawn = torch.tensor([members[key][int(pick * len(members[key]))] for key, pick in zip(keys, picks, strict=True)])
        self.drawn += len(keys)
        self.own += int((drawn == torch.arange(len(keys))).sum())
        return drawn

    def _node_functions(
        self, batch: Batch, values: dict[Site, Tensor], rows: dict[str, Tensor], any_row: Tensor
    ) -> dict[Site, HookFunction]:
        graph, at = self.run.graph, _scrubbed_tokens(batch)
        named: dict[Site, list[tuple[slice, Tensor]]] = defaultdict(list)  # columns and rows of the nodes of each site
        for name, of_name in rows.items():
            writer = graph.writers[graph.writer_place(name)]
            if writer.head is None:
                site = Site("embed") if writer.layer is None else Site("mlp.output", writer.layer)
                named[site].append((slice(None), of_name))
            else:
                width = heads_of(self.run.anatomy, writer.layer or 0).head_dim
                named[Site("attn.z", writer.layer)].append((slice(writer.head * width, (writer.head + 1) * width), of_name))

        def replacement(site: Site, h: Tensor) -> Tensor:
            new = values[site][any_row.to(values[site].device)].to(h)
            for columns, of_name in named.get(site, ()):
                new[..., columns] = values[site][of_name.to(values[site].device)][..., columns].to(h)
            return torch.where(at.to(h.device), new, h)

        return self.run.functions(TakenOut(self.nodes), replacement)

    def _edge_functions(
        self, batch: Batch, values: dict[Site, Tensor], rows: dict[str, Tensor], any_row: Tensor
    ) -> dict[Site, HookFunction]:
        run, at = self.run, _scrubbed_tokens(batch)

        def of_any(site: Site, h: Tensor) -> Tensor:
            return torch.where(at.to(h.device), values[site][any_row.to(values[site].device)].to(h), h)

        def in_this_pass(of_name: Tensor) -> Replacement:
            return lambda site, h: torch.where(at.to(h.device), h[of_name.to(h.device)], h)

        others = run.graph.possible & ~torch.stack(list(self.edges.values())).any(0)
        more = [(edges, in_this_pass(rows[name])) for name, edges in self.edges.items()]
        return EdgeAblation(run.anatomy, run.graph, run.blocks, others, of_any, more=more).functions()


def _scrubbed_tokens(batch: Batch) -> Tensor:
    """[rows, tokens, 1] bool."""
    return (batch.roles != NO_ROLE).unsqueeze(-1)


def _edges(graph: ComponentGraph, name: str) -> Tensor:
    """[writers, readers] bool of an edge, or of all edges out of a node."""
    mask = torch.zeros_like(graph.possible)
    if "->" in name:
        mask[edge_place(graph, name)] = True
        return mask
    chosen = nodes_mask(graph, [name]).bool()
    mask[chosen] = graph.possible[chosen]
    return mask


def _keys_of(name: str, key: Key, count: int) -> list[Hashable]:
    """Of each prompt. Raises ConfigError."""
    found = [key(prompt) for prompt in range(count)] if callable(key) else list(key)
    if len(found) != count:
        raise _other_count(name, count, len(found))
    for each in found:
        if not isinstance(each, Hashable):
            raise _no_key(name, each)
    return found


# ---- errors


def _empty() -> ConfigError:
    return ConfigError("the hypothesis is empty", expected="at least one node or edge", found="none",
                       remedy="e.g. {'a23.h3': [a key for each prompt]}")  # fmt: skip


def _other_lengths(lengths: Sequence[int]) -> ConfigError:
    return ConfigError("activations of prompts of different length cannot be exchanged", expected="prompts of one length in tokens",
                       found=f"{min(lengths)} to {max(lengths)} tokens", remedy="use prompts of one template")  # fmt: skip


def _nothing_to_exchange(count: int) -> ConfigError:
    return ConfigError("every key of the hypothesis stands for one prompt, so that nothing can be exchanged",
                       expected=f"keys that several of the {count} prompts share", found="keys that are all different",
                       remedy="take more prompts, or coarser keys")  # fmt: skip


def _other_count(name: str, count: int, found: int) -> ConfigError:
    return ConfigError(f"the keys of '{name}' do not fit the prompts", expected=f"{count} keys", found=found,
                       remedy="give a key for each prompt, or a function of its number")  # fmt: skip


def _no_key(name: str, found: object) -> ConfigError:
    return ConfigError(f"a key of '{name}' cannot be compared", expected="text, a number, or a tuple of them", found=type(found).__name__,
                       remedy="e.g. the name that the prompt repeats")  # fmt: skip


def _edge_twice(name: str) -> ConfigError:
    return ConfigError("the hypothesis names an edge twice", expected="one key for each edge", found=name,
                       remedy="leave out the node, which stands for all edges out of it, or the edge")  # fmt: skip
