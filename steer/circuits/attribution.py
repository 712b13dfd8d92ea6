"""Attribution of a target to features of dictionaries and to what these leave over (Marks et al. 2024, arXiv 2403.19647).

Score of a node: (value - baseline) times the gradient of the target, which is what its ablation costs to first order; with `steps` the
gradient is the mean over a straight way from the baseline of all nodes of its place to their values (integrated gradients). Weight of an
edge: the part of the source's score that goes through the receiver and through no other node on the way. The weights of all edges out of
a node, to every feature, error and the target, therefore add up to its score, where gradients are not integrated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.circuits.passes import Act, Passes
from steer.circuits.places import Place
from steer.circuits.targets import Target
from steer.circuits.texts import NO_ROLE, Batch
from steer.model.resume import StoppedPass

REST = -1  # column of what is no feature: the error of a dictionary, or the whole embedding


@dataclass(frozen=True)
class Key:
    """A node by its place, the number of its role and its feature; REST for what is none. The target has the place after the last."""

    place: int
    role: int
    column: int


@dataclass(frozen=True, eq=False)
class Baseline:
    """What stands in the place of an ablated node. features: [features] fp32. rest: [width of the site] fp32."""

    features: Tensor
    rest: Tensor


class Attribution:
    """Scores of all nodes, and of edges between chosen ones.

    Args:
        passes: of the prompts. target: see there.
        baselines: by name of the place.
        steps: of integrated gradients; 0 for the gradient at the values alone.

    Attributes:
        scores: by name of the place, [roles, features + 1] fp32, the last column being the rest; means over the prompts.
        value: of the target, mean over the prompts.
        was_on: by name of the place, [features] bool, whether a feature was on in any prompt.
    """

    def __init__(self, passes: Passes, target: Target, baselines: dict[str, Baseline], *, steps: int) -> None:
        self.passes, self.target, self.baselines, self.steps = passes, target, baselines, steps
        roles = len(passes.texts.role_names)
        self.scores = {place.name: torch.zeros(roles, place.width + 1) for place in passes.places}
        self.was_on = {place.name: torch.zeros(place.width, dtype=torch.bool) for place in passes.places}
        self.value = 0.0
        # of each prompt, by name of the place: [tokens, width of the site], the gradient of the target by that activation
        self.gradients: list[dict[str, Tensor]] = [{} for _ in passes.texts.rows]
        everything = range(len(passes.texts))
        for chosen in passes.batches(everything):
            self._score([everything[i] for i in chosen])

    # ---- nodes

    def _score(self, prompts: Sequence[int]) -> None:
        """Adds the scores of a batch."""
        recorded: dict[str, tuple[Tensor, Tensor]] = {}
        zeros: dict[str, Tensor] = {}

        def act(place: Place, x: Tensor, y: Tensor, batch: Batch) -> Tensor:
            recorded[place.name] = (x.detach(), y.detach())
            zeros[place.name] = torch.zeros_like(y, requires_grad=True)  # its gradient is that of y, whatever y depends on
            return y + zeros[place.name]

        batch, logits = self.passes.run(prompts, act, gradients=True)
        assert logits is not None
        with torch.enable_grad():
            values = self.passes.values(self.target, batch, logits)
            found = torch.autograd.grad(values.sum(), list(zeros.values()), allow_unused=True)
        gradients = {name: _or_zeros(g, zeros[name]) for name, g in zip(zeros, found, strict=True)}
        self.value += float(values.detach().double().sum()) / len(self.passes.texts)
        for place in self.passes.places:
            x, y = recorded[place.name]
            g = gradients[place.name] if not self.steps else self._integrated(prompts, place)
            for row, prompt in enumerate(prompts):
                self.gradients[prompt][place.name] = batch.of(row, g).cpu()
            self._add_scores(place, x, y, g, batch)

    def _add_scores(self, place: Place, x: Tensor, y: Tensor, g: Tensor, batch: Batch) -> None:
        roles = place.roles(batch, x)
        f, of_features, of_rest = self.node_scores(place, x, y, g, batch)
        scores = self.scores[place.name]
        is_in = roles != NO_ROLE
        columns = torch.cat([of_features, of_rest.unsqueeze(-1)], -1)[is_in]  # [tokens with a role, features + 1]
        scores.index_add_(0, roles[is_in].cpu(), columns.float().cpu() / len(self.passes.texts))
        self.was_on[place.name] |= (f[is_in] != 0).any(0).cpu()

    def node_scores(self, place: Place, x: Tensor, y: Tensor, g: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Features [rows, tokens, features], the scores of all of them at each token, and those of the rest [rows, tokens].

        Args:
            g: [rows, tokens, width] gradient of what is attributed by y.
        """
        base = self.baselines[place.name]
        with torch.no_grad():
            f = place.encode(x, batch)
            rest = y.to(f.dtype) - place.decode(f, x)
            g = g.to(f.dtype)
            of_rest = (g * (rest - base.rest.to(rest.device))).sum(-1)
        return f, (f - base.features.to(f.device)) * by_features(place, f, x, g), of_rest

    def _integrated(self, prompts: Sequence[int], place: Place) -> Tensor:
        """Mean gradient by the activation of one place, while that goes from its baseline to its value (midpoint rule)."""
        total: Tensor | None = None
        for step in range(self.steps):
            shifts: list[Tensor] = []
            act = self._on_the_way(place, (step + 0.5) / self.steps, shifts)
            batch, logits = self.passes.run(prompts, act, gradients=True)
            assert logits is not None
            with torch.enable_grad():
                value = self.passes.values(self.target, batch, logits).sum()
                (found,) = torch.autograd.grad(value, shifts, allow_unused=True)
            g = _or_zeros(found, shifts[0]) / self.steps
            total = g if total is None else total + g
        assert total is not None
        return total

    def _on_the_way(self, integrated: Place, share: float, shifts: list[Tensor]) -> Act:
        """Puts one place at a share of the way from its baseline. shifts: gets a tensor of zeros whose gradient is wanted."""

        def act(place: Place, x: Tensor, y: Tensor, batch: Batch) -> Tensor:
            if place is not integrated:
                return y
            with torch.no_grad():
                start = self.at_baseline(place, x, batch)
                is_in = (place.roles(batch, x) != NO_ROLE).unsqueeze(-1)
                moved = torch.where(is_in, (start + share * (y - start)).to(y.dtype), y)
            shifts.append(torch.zeros_like(y, requires_grad=True))
            return moved + shifts[-1]

        return act

    def at_baseline(self, place: Place, x: Tensor, batch: Batch) -> Tensor:
        """[rows, tokens, width] activation with all nodes of a place at their baselines."""
        base = self.baselines[place.name]
        f = base.features.to(x.device).expand(*x.shape[:-1], -1)
        return place.decode(f, x) + base.rest.to(x.device)

    # ---- edges

    def edges(self, keys: Sequence[Key]) -> Tensor:
        """[nodes + 1, nodes + 1] weights from the node of a row to that of a column, means over the prompts; the last is the target.

        One backward pass for each receiver and prompt, as many together as fit in a batch, which ends at the receiver's place.
        """
        weights = torch.zeros(len(keys) + 1, len(keys) + 1, dtype=torch.float64)
        places = self.passes.places
        numbers = range(len(self.passes.texts))
        for receiver in range(1, len(places) + 1):
            columns = [len(keys)] if receiver == len(places) else [c for c, key in enumerate(keys) if key.place == receiver]
            pairs = [(prompt, column) for prompt in numbers for column in columns]
            for chosen in self.passes.batches([prompt for prompt, _ in pairs]):
                self._add_weights(weights, keys, [pairs[i] for i in chosen], receiver)
        return (weights / len(self.passes.texts)).float()

    def _add_weights(self, weights: Tensor, keys: Sequence[Key], pairs: Sequence[tuple[int, int]], receiver: int) -> None:
        """Adds what goes into the nodes of one place in one batch. pairs: (prompt, node) of each row."""
        cut: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # by name of an earlier place: x, y, zeros
        received: list[Tensor] = []
        places = self.passes.places
        prompts = [prompt for prompt, _ in pairs]
        wanted = [] if receiver == len(places) else [keys[column] for _, column in pairs]

        def act(place: Place, x: Tensor, y: Tensor, batch: Batch) -> Tensor:
            if wanted and place is places[receiver]:
                received.append(self._received(place, x, y, batch, wanted))
                raise StoppedPass
            zeros = torch.zeros_like(y, requires_grad=True)
            cut[place.name] = (x.detach(), y.detach(), zeros)
            is_in = (place.roles(batch, x) != NO_ROLE).unsqueeze(-1)
            return torch.where(is_in, y.detach() + zeros, y)  # a node is not looked through; what is no node is

        batch, logits = self.passes.run(prompts, act, gradients=True)
        with torch.enable_grad():
            total = self.passes.values(self.target, batch, logits).sum() if logits is not None else received[0]
            zeros = [zeros for _, _, zeros in cut.values()]
            found = torch.autograd.grad(total, zeros, allow_unused=True) if total.requires_grad else [None] * len(zeros)
        for (name, (x, y, _)), g in zip(cut.items(), found, strict=True):
            source = next(i for i, place in enumerate(places) if place.name == name)
            rows = [row for row, key in enumerate(keys) if key.place == source]
            if g is not None and rows:
                weights[rows] += self._sent(places[source], [keys[row] for row in rows], x, y, g, batch, pairs, weights.shape[1])

    def _received(self, place: Place, x: Tensor, y: Tensor, batch: Batch, wanted: Sequence[Key]) -> Tensor:
        """A number whose gradient is what the receivers of all rows pass on of the target: their change times its gradient by them."""
        roles = place.roles(batch, x)
        f = place.encode(x, batch)
        is_rest = torch.tensor([key.column == REST for key in wanted], device=f.device)[:, None, None]
        column = torch.tensor([max(key.column, 0) for key in wanted], device=f.device)
        role = torch.tensor([key.role for key in wanted], device=f.device)
        g = torch.zeros_like(y, dtype=f.dtype)
        for row, prompt in enumerate(batch.prompts.tolist()):
            g[row, batch.mask[row].bool()] = self.gradients[prompt][place.name].to(g.device, g.dtype)
        g = g * (roles == role[:, None]).unsqueeze(-1)  # [rows, tokens, width], at the tokens of the receiver
        constant = x.detach()  # what decoding takes from it beside the features, a norm or a skip connection, counts with the rest
        chosen = torch.nn.functional.one_hot(column, max(place.width, 1))[:, None, : place.width]
        through = torch.where(is_rest, y.to(f.dtype) - place.decode(f, constant), place.decode(f * chosen, constant))
        return (g * through).sum()

    def _sent(
        self, place: Place, keys: Sequence[Key], x: Tensor, y: Tensor, g: Tensor, batch: Batch, pairs: Sequence[tuple[int, int]], size: int
    ) -> Tensor:
        """[keys, size] what each source of one place passes to the receivers, whose column each row of the batch has in `pairs`."""
        _, of_features, of_rest = self.node_scores(place, x, y, g, batch)
        columns = torch.tensor([key.column for key in keys])
        scores = of_rest.unsqueeze(-1).expand(-1, -1, len(keys)).clone()  # [rows, tokens, keys]
        is_feature = columns != REST
        scores[..., is_feature.to(scores.device)] = of_features[..., columns[is_feature].to(scores.device)].to(scores.dtype)
        at = place.roles(batch, x).unsqueeze(-1) == torch.tensor([key.role for key in keys], device=scores.device)
        summed = (scores * at).sum(1).double().cpu()  # [rows, keys]
        return torch.zeros(len(keys), size, dtype=torch.float64).index_add_(1, torch.tensor([column for _, column in pairs]), summed.T)


def by_features(place: Place, f: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """[rows, tokens, features] gradient by features, from g [rows, tokens, width] by their sum."""
    if not place.width:
        return torch.zeros_like(f)
    with torch.enable_grad():
        leaf = f.detach().requires_grad_()
        (of_features,) = torch.autograd.grad(place.decode(leaf, x), leaf, g)
    return of_features


def _or_zeros(g: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if g is None else g.detach()
