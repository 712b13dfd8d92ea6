"""Exact activation patching: runs of prompts in which some components, edges or sites have the value of another run.

Several patches of a prompt stand in one batch, each row with its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.checks import of_type, one_of
from steer.circuits.ablation import Ablation, resample_ablation
from steer.circuits.component_pass import values_at, written_sites
from steer.circuits.component_run import CHANGE_BYTES, ComponentRun, TakenOut
from steer.circuits.edge_ablation import SiteFunction
from steer.circuits.pairs import Pairs
from steer.circuits.targets import Target
from steer.circuits.text_passes import TextPasses
from steer.circuits.texts import NO_ROLE, Batch
from steer.model.context import ForwardContext
from steer.model.hooks import HookFunction
from steer.model.site import Site

NOISING, DENOISING = DIRECTIONS = ("noising", "denoising")


@dataclass(frozen=True, eq=False)
class Patch:
    """What has the value of the other run.

    Attributes:
        parts: components and edges. site: a whole activation; None for none.
        roles: numbers of the roles of the tokens at which it has; None for all that have one.
    """

    parts: TakenOut
    site: Site | None = None
    roles: tuple[int, ...] | None = None


class PatchedRun:
    """Runs patches.

    Args:
        direction: `noising` runs the clean prompts and inserts what is written on the corrupted ones, `denoising` the other way round.
        ablation: constants to insert instead; None for the other prompt of a pair.
        max_tokens: padded tokens of a batch.

    Attributes:
        run: of the prompts into which values are inserted.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Pairs,
        target: Target,
        *,
        direction: str = NOISING,
        ablation: Ablation | None = None,
        max_tokens: int = 512,
    ) -> None:
        of_type(pairs, Pairs, "the pairs of patching", "make them with Pairs.of(model, clean, corrupted)")
        one_of(direction, DIRECTIONS, "the direction of patching")
        both = pairs if direction == NOISING else Pairs(pairs.corrupted, pairs.clean)
        self.run = ComponentRun(model, both, target, resample_ablation() if ablation is None else ablation, max_tokens=max_tokens)
        self.others = TextPasses(model, self.run.anatomy, both.corrupted, max_tokens=max_tokens)
        self.max_tokens = max_tokens

    def __len__(self) -> int:
        return len(self.run)

    @torch.no_grad()
    def ends(self) -> tuple[Tensor, Tensor]:
        """[prompts] fp64 of the target without a patch, and on the other prompts of the pairs."""
        found = torch.zeros(2, len(self), dtype=torch.float64)
        for number, passes in enumerate((self.run.passes, self.others)):
            for prompts in self.run.batches([]):
                batch = passes.batch(prompts)
                found[number, prompts] = target_of(self.run, batch, {})
        return found[0], found[1]

    @torch.no_grad()
    def values(self, patches: Sequence[Patch], bar: tqdm | None = None) -> Tensor:
        """[patches, prompts] fp64 of the target, each with one patch. bar: counts them."""
        found = torch.zeros(len(patches), len(self), dtype=torch.float64)
        chunks = self.run.batches([patch.parts for patch in patches])
        for prompts in chunks:
            values = self.counterfactual(prompts, patches)
            for chosen in self.groups(patches, prompts):
                found[chosen.start : chosen.stop, prompts] = self.values_of(patches[chosen.start : chosen.stop], prompts, values)
                if bar is not None:
                    bar.update(len(chosen) * len(prompts))
        return found

    def counterfactual(self, prompts: Sequence[int], patches: Sequence[Patch]) -> dict[Site, Tensor]:
        """[prompts, tokens, width] by site, what is inserted; empty where constants are."""
        if self.run.counterfactuals is None:
            return {}
        sites = {patch.site: None for patch in patches if patch.site is not None}
        if any(patch.site is None for patch in patches):
            sites |= dict.fromkeys(written_sites(self.run.anatomy.n_layers))
        return values_at(self.run.counterfactuals, self.run.counterfactuals.batch(prompts), [*sites])

    def groups(self, patches: Sequence[Patch], prompts: Sequence[int]) -> Iterator[range]:
        """Places of the patches that stand in one batch."""
        tokens = len(prompts) * max(self.run.passes.texts.lengths[i] for i in prompts)
        size = max(1, self.max_tokens // tokens)
        with_edges = [patch.parts.edges.any(1) for patch in patches if patch.parts.edges is not None]
        if with_edges:
            writers = max(1, int(torch.stack(with_edges).any(0).sum()))
            size = max(1, min(size, CHANGE_BYTES // (4 * writers * self.run.anatomy.width * tokens)))
        for first in range(0, len(patches), size):
            yield range(first, min(first + size, len(patches)))

    def values_of(self, patches: Sequence[Patch], prompts: Sequence[int], values: dict[Site, Tensor]) -> Tensor:
        """[patches, prompts] of one batch. values: what is inserted, of these prompts."""
        batch = self.run.passes.batch([*prompts] * len(patches))
        roles = torch.cat([_only(batch.roles[: len(prompts)], patch.roles) for patch in patches])
        batch = replace(batch, roles=roles)
        rows = torch.arange(len(prompts)).repeat(len(patches))
        replacement = self.run.replacement(batch, RowsOf(values, rows))
        parts = patches[0].parts if len(patches) == 1 else TakenOut.by_row([patch.parts for patch in patches], len(prompts))
        functions = self.run.functions(parts, replacement)
        for site in {patch.site for patch in patches if patch.site is not None}:
            is_patched = torch.tensor([patch.site == site for patch in patches]).repeat_interleave(len(prompts))
            functions[site] = SiteFunction(_inserted(site, is_patched, replacement))
        return target_of(self.run, batch, functions).view(len(patches), len(prompts))


class RowsOf(dict[Site, Tensor]):
    """Values by site, of some rows, which are taken when they are looked up: all sites at once would be as much again for every patch."""

    def __init__(self, values: dict[Site, Tensor], rows: Tensor) -> None:
        super().__init__(values)
        self.rows = rows

    def __getitem__(self, site: Site) -> Tensor:
        values = super().__getitem__(site)
        return values[self.rows.to(values.device)]


def target_of(run: ComponentRun, batch: Batch, functions: dict[Site, HookFunction]) -> Tensor:
    """[rows] fp64 of the target in a pass with functions at sites."""
    last = bool(getattr(run.target, "at_last_token", False))
    logits = run.passes.run_batch(batch, functions, gradients=False, last_token=last)
    assert logits is not None
    return run.passes.values(run.target, batch, logits).double().cpu()


def _only(roles: Tensor, chosen: tuple[int, ...] | None) -> Tensor:
    """[rows, tokens] roles without those that were not chosen."""
    if chosen is None:
        return roles
    return torch.where(torch.isin(roles, torch.tensor(chosen, device=roles.device)), roles, NO_ROLE)


def _inserted(site: Site, is_patched: Tensor, replacement: Callable[[Site, Tensor], Tensor]) -> Callable[[Tensor, ForwardContext], Tensor]:
    def function(h: Tensor, context: ForwardContext) -> Tensor:
        return torch.where(is_patched.to(h.device)[:, None, None], replacement(site, h), h)

    return function
