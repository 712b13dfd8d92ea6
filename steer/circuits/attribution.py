"""Attribution of a target to features of dictionaries and to what these leave over (Marks et al. 2024, arXiv 2403.19647).

Score of a node: (value - baseline) times the gradient of the target, which is what its ablation costs to first order; with `steps` the
gradient is the mean over a straight way from the baseline of all nodes of its site to their values (integrated gradients). Weight of an
edge: the part of the source's score that goes through the receiver and through no other node on the way. The weights of all edges out of
a node, to every feature, error and the target, therefore add up to its score, where gradients are not integrated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.circuits.baselines import Baseline
from steer.circuits.passes import Act, Passes
from steer.circuits.split_site import SplitSite
from steer.circuits.targets import Target
from steer.circuits.texts import NO_ROLE, Batch
from steer.model.prefix import is_sharded
from steer.model.resume import StoppedPass

REST = -1  # column of what is no feature: the error of a dictionary, or the whole embedding


@dataclass(frozen=True)
class Key:
    """A node by its site, the number of its role and its feature; REST for what is none. The target has the number after the last."""

    split: int
    role: int
    column: int


class Attribution:
    """Scores of all nodes, and of edges between chosen ones.

    Args:
        passes: of the prompts. target: see there.
        baselines: by name of the dictionary.
        steps: of integrated gradients; 0 for the gradient at the values alone.

    Attributes:
        scores: by name of the dictionary, [roles, features + 1] fp32, the last column being the rest; means over the prompts.
        value: of the target, mean over the prompts.
        sizes: by name of the dictionary, absolute scores of single tokens, summed: of features, and of the rest.
    """

    def __init__(self, passes: Passes, target: Target, baselines: dict[str, Baseline], *, steps: int) -> None:
        self.passes, self.target, self.baselines, self.steps = passes, target, baselines, steps
        roles = len(passes.texts.role_names)
        self.scores = {split.name: torch.zeros(roles, split.width + 1) for split in passes.splits}
        self.sizes = {split.name: torch.zeros(2, dtype=torch.float64) for split in passes.splits}
        self.value = 0.0
        # of each prompt, by name of the dictionary: [tokens, width of the site], the gradient of the target by that activation
        self.gradients: list[dict[str, Tensor]] = [{} for _ in passes.texts.rows]
        self._was_on: list[set[Key]] = [set() for _ in passes.texts.rows]  # features of each prompt that are on at a token of the role
        for chosen in passes.batches(range(len(passes.texts))):
            self._score(chosen)

    # ---- nodes

    def _score(self, prompts: Sequence[int]) -> None:
        """Adds the scores of a batch."""
        recorded: dict[str, tuple[Tensor, Tensor]] = {}
        zeros: dict[str, Tensor] = {}

        def act(split: SplitSite, x: Tensor, y: Tensor, batch: Batch) -> Tensor:
            recorded[split.name] = (x.detach(), y.detach())
            zeros[split.name] = torch.zeros_like(y, requires_grad=True)  # its gradient is that of y, whatever y depends on
            return y + zeros[split.name]

        batch, logits = self.passes.run(prompts, act, gradients=True)
        assert logits is not None
        with torch.enable_grad():
            values = self.passes.values(self.target, batch, logits)
            found = torch.autograd.grad(values.sum(), list(zeros.values()), allow_unused=True)
        gradients = {name: _or_zeros(g, zeros[name]) for name, g in zip(zeros, found, strict=True)}
        self.value += float(values.detach().double().sum()) / len(self.passes.texts)
        for split in self.passes.splits:
            x, y = recorded[split.name]
            g = gradients[split.name] if not self.steps else self._integrated(prompts, split)
            for row, prompt in enumerate(prompts):
                self.gradients[prompt][split.name] = batch.of(row, g).cpu()
            self._add_scores(split, x, y, g, batch)

    def _add_scores(self, split: SplitSite, x: Tensor, y: Tensor, g: Tensor, batch: Batch) -> None:
        roles = split.roles(batch, x)
        is_in = roles != NO_ROLE
        of_features, of_rest = (
            scores[is_in].float().cpu() for scores in self.node_scores(split, x, y, g, batch)
        )  # [tokens with a role, ...]
        columns = torch.cat([of_features, of_rest.unsqueeze(-1)], -1) / len(self.passes.texts)
        self.scores[split.name].index_add_(0, roles[is_in].cpu(), columns)
        self.sizes[split.name] += torch.stack([of_features.abs().double().sum(), of_rest.abs().double().sum()])
        number = self.passes.splits.index(split)
        with torch.no_grad():
            on = (split.encode(x, batch) != 0) & is_in.unsqueeze(-1)  # [rows, tokens, features]
        for row, token, column in on.nonzero().tolist():
            self._was_on[int(batch.prompts[row])].add(Key(number, int(roles[row, token]), column))

    def node_scores(self, split: SplitSite, x: Tensor, y: Tensor, g: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores of features [rows, tokens, features] and of the rest [rows, tokens] at each token.

        Args:
            g: [rows, tokens, width] gradient of what is attributed by y.
        """
        base = self.baselines[split.name]
        with torch.no_grad():
            f = split.encode(x, batch)
            rest = y.to(f.dtype) - split.decode(f, x)
            g = g.to(f.dtype)
            of_rest = (g * (rest - base.rest.to(rest.device))).sum(-1)
        return (f - base.features.to(f.device)) * by_features(split, f, x, g), of_rest

    def _integrated(self, prompts: Sequence[int], split: SplitSite) -> Tensor:
        """Mean gradient by the activation of one site, while that goes from its baseline to its value (midpoint rule)."""
        total: Tensor | None = None
        for step in range(self.steps):
            shifts: list[Tensor] = []
            act = self._on_the_way(split, (step + 0.5) / self.steps, shifts)
            batch, logits = self.passes.run(prompts, act, gradients=True)
            assert logits is not None
            with torch.enable_grad():
                value = self.passes.values(self.target, batch, logits).sum()
                (found,) = torch.autograd.grad(value, shifts, allow_unused=True)
            g = _or_zeros(found, shifts[0]) / self.steps
            total = g if total is None else total + g
        assert total is not None
        return total

    def _on_the_way(self, integrated: SplitSite, share: float, shifts: list[Tensor]) -> Act:
        """Puts one site at a share of the way from its baseline. shifts: gets a tensor of zeros whose gradient is wanted."""

        def act(split: SplitSite, x: Tensor, y: Tensor, batch: Batch) -> Tensor:
            if split is not integrated:
                return y
            with torch.no_grad():
                start = self.at_baseline(split, x, batch)
                is_in = (split.roles(batch, x) != NO_ROLE).unsqueeze(-1)
                moved = torch.where(is_in, (start + share * (y - start)).to(y.dtype), y)
            shifts.append(torch.zeros_like(y, requires_grad=True))
            return moved + shifts[-1]

        return act

    def at_baseline(self, split: SplitSite, x: Tensor, batch: Batch) -> Tensor:
        """[rows, tokens, width] activation with all nodes of a site at their baselines."""
        base = self.baselines[split.name]
        f = base.features.to(x.device).expand(*x.shape[:-1], -1)
        return split.decode(f, x) + base.rest.to(x.device)

    # ---- edges

    def edges(self, keys: Sequence[Key]) -> Tensor:
        """[nodes + 1, nodes + 1] weights from the node of a row to that of a column, means over the prompts; the last is the target.

        One backward pass for each receiver and prompt where it is on, in batches, which end at the receiver's site.
        """
        weights = torch.zeros(len(keys) + 1, len(keys) + 1, dtype=torch.float64)
        splits = self.passes.splits
        numbers = range(len(self.passes.texts))
        for receiver in range(1, len(splits) + 1):
            columns = [len(keys)] if receiver == len(splits) else [c for c, key in enumerate(keys) if key.split == receiver]
            pairs = [(prompt, column) for prompt in numbers for column in columns if self._may_receive(prompt, [*keys, None][column])]
            for chosen in self.passes.batches([prompt for prompt, _ in pairs]):
                self._add_weights(weights, keys, [pairs[i] for i in chosen], receiver)
        return (weights / len(self.passes.texts)).float()

    def _may_receive(self, prompt: int, key: Key | None) -> bool:
        """A feature that is off has no gradient: nothing reaches it to first order. None stands for the target."""
        return key is None or key.column == REST or key in self._was_on[prompt]

    def _add_weights(self, weights: Tensor, keys: Sequence[Key], pairs: Sequence[tuple[int, int]], receiver: int) -> None:
        """Adds what goes into the nodes of one site in one batch. pairs: (prompt, node) of each row."""
        cut: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # by name of an earlier site: x, y, zeros
        received: list[Tensor] = []
        splits = self.passes.splits
        prompts = [prompt for prompt, _ in pairs]
        wanted = [] if receiver == len(splits) else [keys[column] for _, column in pairs]

        def act(split: SplitSite, x: Tensor, y: Tensor, batch: Batch) -> Tensor:
            if wanted and split is splits[receiver]:
                received.append(self._received(split, x, y, batch, wanted))
                if not is_sharded(self.passes.model):  # which keeps state from the start of a pass to its end
                    raise StoppedPass
            zeros = torch.zeros_like(y, requires_grad=True)
            cut[split.name] = (x.detach(), y.detach(), zeros)
            is_in = (split.roles(batch, x) != NO_ROLE).unsqueeze(-1)
            return torch.where(is_in, y.detach() + zeros, y)  # a node is not looked through; what is no node is

        batch, logits = self.passes.run(prompts, act, gradients=True)
        with torch.enable_grad():
            if not wanted:
                assert logits is not None
                received.append(self.passes.values(self.target, batch, logits).sum())
            (total,) = received
            zeros = [zeros for _, _, zeros in cut.values()]
            found = torch.autograd.grad(total, zeros, allow_unused=True) if total.requires_grad else [None] * len(zeros)
        for (name, (x, y, _)), g in zip(cut.items(), found, strict=True):
            source = next(i for i, split in enumerate(splits) if split.name == name)
            rows = [row for row, key in enumerate(keys) if key.split == source]
            if g is not None and rows:
                weights[rows] += self._sent(splits[source], [keys[row] for row in rows], x, y, g, batch, pairs, weights.shape[1])

    def _received(self, split: SplitSite, x: Tensor, y: Tensor, batch: Batch, wanted: Sequence[Key]) -> Tensor:
        """A number whose gradient is what the receivers of all rows pass on of the target: their change times its gradient by them."""
        roles = split.roles(batch, x)
        f = split.encode(x, batch)
        is_rest = torch.tensor([key.column == REST for key in wanted], device=f.device)[:, None, None]
        column = torch.tensor([max(key.column, 0) for key in wanted], device=f.device)
        role = torch.tensor([key.role for key in wanted], device=f.device)
        g = torch.zeros_like(y, dtype=f.dtype)
        for row, prompt in enumerate(batch.prompts.tolist()):
            g[row, batch.mask[row].bool()] = self.gradients[prompt][split.name].to(g.device, g.dtype)
        g = g * (roles == role[:, None]).unsqueeze(-1)  # [rows, tokens, width], at the tokens of the receiver
        constant = x.detach()  # what decoding takes from it beside the features, a norm or a skip connection, counts with the rest
        chosen = torch.nn.functional.one_hot(column, max(split.width, 1))[:, None, : split.width]
        through = torch.where(is_rest, y.to(f.dtype) - split.decode(f, constant), split.decode(f * chosen, constant))
        return (g * through).sum()

    def _sent(
        self,
        split: SplitSite,
        keys: Sequence[Key],
        x: Tensor,
        y: Tensor,
        g: Tensor,
        batch: Batch,
        pairs: Sequence[tuple[int, int]],
        size: int,
    ) -> Tensor:
        """[keys, size] what each source of one site passes to the receivers, whose column each row of the batch has in `pairs`."""
        of_features, of_rest = self.node_scores(split, x, y, g, batch)
        columns = torch.tensor([key.column for key in keys])
        scores = of_rest.unsqueeze(-1).expand(-1, -1, len(keys)).clone()  # [rows, tokens, keys]
        is_feature = columns != REST
        scores[..., is_feature.to(scores.device)] = of_features[..., columns[is_feature].to(scores.device)].to(scores.dtype)
        at = split.roles(batch, x).unsqueeze(-1) == torch.tensor([key.role for key in keys], device=scores.device)
        summed = (scores * at).sum(1).double().cpu()  # [rows, keys]
        return torch.zeros(len(keys), size, dtype=torch.float64).index_add_(1, torch.tensor([column for _, column in pairs]), summed.T)


def by_features(split: SplitSite, f: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """[rows, tokens, features] gradient by features, from g [rows, tokens, width] by their sum."""
    if not split.width:
        return torch.zeros_like(f)
    with torch.enable_grad():
        leaf = f.detach().requires_grad_()
        (of_features,) = torch.autograd.grad(split.decode(leaf, x), leaf, g)
    return of_features


def _or_zeros(g: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if g is None else g.detach()
