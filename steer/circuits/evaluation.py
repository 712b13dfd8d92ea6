"""Evaluation of a circuit: the target while nodes are ablated, and every one of some nodes ablated exactly.

Ablations act on the pass that runs: features are those of the activation as earlier ablations leave it, not of an unedited pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from scipy.stats import spearmanr
from torch import Tensor

from steer.circuits.attribution import REST, Key
from steer.circuits.baselines import Baseline, seen
from steer.circuits.passes import Act, Passes
from steer.circuits.split_site import SplitSite
from steer.circuits.targets import Target
from steer.circuits.texts import NO_ROLE, Batch

# (split site, batch) -> where features [rows or 1, roles, features] and the rest [rows or 1, roles] are ablated
Ablated = Callable[[SplitSite, Batch], tuple[Tensor, Tensor]]


def share_of(value: float, full: float, empty: float) -> float:
    """(value - empty) / (full - empty); NaN where ablating everything changes nothing."""
    return (value - empty) / (full - empty) if full != empty else float("nan")


@dataclass(frozen=True)
class Faithfulness:
    """Means of the target over prompts, in its units, with different nodes ablated; everything else runs as it is.

    Attributes:
        full, empty: in units of the target, with nothing ablated, and with all features and errors.
        circuit, circuit_alone, errors_alone: in units of the target, with all features but the circuit's ablated, with also all errors,
            and with all features, but no error.
        without_circuit: in units of the target, with the circuit's features ablated.
        random, random_alone, without_random: the same, in units of the target, for as many features drawn at random at each site and role,
            of those that were on there; means over draws, NaN without any.
        drawn_share: number of random features / number of the circuit's; below 1 where too few others were on, and what is random is then
            a smaller circuit.

    Example:
        >>> found = steer.feature_circuit(model, {"sae": dictionary}, texts, target, nodes=4, edges=4, draws=1)
        >>> found.faithfulness.share("circuit"), found.faithfulness.share("random")
    """

    full: float
    empty: float
    circuit: float
    circuit_alone: float
    errors_alone: float
    without_circuit: float
    random: float
    random_alone: float
    without_random: float
    drawn_share: float = 1.0

    def share(self, name: str) -> float:
        """(value - empty) / (full - empty) of one of them: 1 for the model as it is, 0 where everything is ablated."""
        return share_of(getattr(self, name), self.full, self.empty)

    def shares(self) -> dict[str, float]:
        """Of all of them."""
        return {name: self.share(name) for name in asdict(self) if name != "drawn_share"}


@dataclass(frozen=True, eq=False)
class ExactEffects:
    """What ablating single nodes costs, beside what attribution said.

    Attributes:
        names: of the nodes. attributed, exact: [nodes] fp32, the score, and the target less what is left of it without the node.
        of: what they are, nodes or edges.

    Example:
        >>> found = steer.feature_circuit(model, {"sae": dictionary}, texts, target, nodes=4, edges=4, exact=4, draws=1)
        >>> found.exact.names, found.exact.correlation  # of what attribution said with what ablation does
    """

    names: tuple[str, ...]
    attributed: Tensor
    exact: Tensor
    of: str = "nodes"

    @property
    def correlation(self) -> float:
        """Pearson's; NaN for fewer than two nodes, or where one of both does not vary."""
        if len(self.names) < 2:
            return float("nan")
        return float(torch.corrcoef(torch.stack([self.attributed.double(), self.exact.double()]))[0, 1])

    @property
    def rank_correlation(self) -> float:
        """Spearman's; NaN likewise."""
        return float(spearmanr(self.attributed, self.exact).statistic) if len(self.names) > 1 else float("nan")

    def __repr__(self) -> str:
        return f"ExactEffects({len(self.names)} {self.of}, correlation {self.correlation:.3f}, of ranks {self.rank_correlation:.3f})"


class Evaluation:
    """Runs prompts with nodes at their baselines."""

    def __init__(self, passes: Passes, target: Target, baselines: Mapping[str, Baseline]) -> None:
        self.passes, self.target, self.baselines = passes, target, baselines

    def mean(self, ablated: Ablated) -> float:
        """Of the target over all prompts."""
        batches = self.passes.batches(range(len(self.passes.texts)))
        return sum(float(self._values(chosen, ablated).double().sum()) for chosen in batches) / len(self.passes.texts)

    def exact(self, keys: Sequence[Key]) -> Tensor:
        """[nodes] mean fall of the target when one node is ablated alone; a row of a batch is a prompt without one node."""
        left, prompts = torch.zeros(len(keys), dtype=torch.float64), len(self.passes.texts)
        pairs = [(prompt, node) for prompt in range(prompts) for node in range(len(keys))]
        for chosen in self.passes.batches([prompt for prompt, _ in pairs]):
            nodes = [pairs[i][1] for i in chosen]
            values = self._values([pairs[i][0] for i in chosen], self._one_each([keys[node] for node in nodes]))
            left.index_add_(0, torch.tensor(nodes), values.double().cpu())
        return (self.mean(self._nothing) - left / prompts).float()

    def faithfulness(self, circuit: Sequence[Key], *, draws: int, seed: int) -> Faithfulness:
        """Of the features among `circuit`, beside features drawn from those that are on at the same roles of these prompts."""
        generator = torch.Generator().manual_seed(seed)
        was_on = {name: found.was_on for name, found in seen(self.passes).items()}
        inside = self._masks(circuit)
        drawn = [self._drawn(circuit, was_on, generator) for _ in range(draws)]

        def random(ablated: Callable[[Mapping[str, Tensor]], Ablated]) -> float:
            return sum(self.mean(ablated(masks)) for masks in drawn) / draws if draws else float("nan")

        nothing = {name: torch.zeros_like(mask) for name, mask in inside.items()}
        return Faithfulness(
            full=self.mean(self._nothing),
            empty=self.mean(self._all_but(nothing, errors=False)),
            circuit=self.mean(self._all_but(inside, errors=True)),
            circuit_alone=self.mean(self._all_but(inside, errors=False)),
            errors_alone=self.mean(self._all_but(nothing, errors=True)),
            without_circuit=self.mean(self._only(inside)),
            random=random(lambda masks: self._all_but(masks, errors=True)),
            random_alone=random(lambda masks: self._all_but(masks, errors=False)),
            without_random=random(self._only),
            drawn_share=_size(drawn[0]) / _size(inside) if drawn and _size(inside) else 1.0,
        )

    # ---- one pass

    def _values(self, prompts: Sequence[int], ablated: Ablated) -> Tensor:
        batch, logits = self.passes.run(prompts, self._act(ablated), gradients=False)
        assert logits is not None
        return self.passes.values(self.target, batch, logits)

    def _act(self, ablated: Ablated) -> Act:
        def act(split: SplitSite, x: Tensor, y: Tensor, batch: Batch) -> Tensor:
            features, rest = (mask.to(y.device) for mask in ablated(split, batch))
            if not bool(features.any()) and not bool(rest.any()):
                return y
            base = self.baselines[split.name]
            roles = split.roles(batch, x)
            f = split.encode(x, batch)
            decoded = split.decode(f, x)
            off = _at(features, roles) & (roles != NO_ROLE).unsqueeze(-1)  # [rows, tokens, features]
            rest_off = _at(rest, roles) & (roles != NO_ROLE)  # [rows, tokens]
            change = split.decode(torch.where(off, base.features.to(f.device), f), x) - decoded
            change = change + rest_off.unsqueeze(-1) * (base.rest.to(f.device) - (y.to(f.dtype) - decoded))
            return torch.where((off.any(-1) | rest_off).unsqueeze(-1), (y + change).to(y.dtype), y)

        return act

    # ---- which nodes

    def _masks(self, keys: Sequence[Key]) -> dict[str, Tensor]:
        """[roles, features] bool by dictionary, True at the features among the keys."""
        masks = {split.name: torch.zeros(len(self.passes.texts.role_names), split.width, dtype=torch.bool) for split in self.passes.splits}
        for key in keys:
            if key.column != REST:
                masks[self.passes.splits[key.split].name][key.role, key.column] = True
        return masks

    def _drawn(self, circuit: Sequence[Key], was_on: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """As many features at each site and role as the circuit has, of those that were on there in any prompt and are not in it; fewer
        where there are not so many."""
        masks = {}
        for name, inside in self._masks(circuit).items():
            masks[name] = torch.zeros_like(inside)
            for role, of_role in enumerate(inside):
                others = (was_on[name][role] & ~of_role).nonzero().flatten()
                masks[name][role, others[torch.randperm(len(others), generator=generator)[: int(of_role.sum())]]] = True
        return masks

    def _nothing(self, split: SplitSite, batch: Batch) -> tuple[Tensor, Tensor]:
        roles = len(self.passes.texts.role_names)
        return torch.zeros(1, roles, split.width, dtype=torch.bool), torch.zeros(1, roles, dtype=torch.bool)

    def _all_but(self, masks: Mapping[str, Tensor], *, errors: bool) -> Ablated:
        """All features but those of the masks. errors: they stay. Embeddings always do."""

        def ablated(split: SplitSite, batch: Batch) -> tuple[Tensor, Tensor]:
            keeps = errors or split.dictionary is None
            return ~masks[split.name][None], torch.full((1, len(self.passes.texts.role_names)), not keeps)

        return ablated

    def _only(self, masks: Mapping[str, Tensor]) -> Ablated:
        return lambda split, batch: (masks[split.name][None], torch.zeros(1, len(self.passes.texts.role_names), dtype=torch.bool))

    def _one_each(self, keys: Sequence[Key]) -> Ablated:
        """One node for each row of the batch."""

        def ablated(split: SplitSite, batch: Batch) -> tuple[Tensor, Tensor]:
            roles = len(self.passes.texts.role_names)
            features = torch.zeros(len(keys), roles, split.width, dtype=torch.bool)
            rest = torch.zeros(len(keys), roles, dtype=torch.bool)
            for row, key in enumerate(keys):
                if self.passes.splits[key.split] is split:
                    (rest if key.column == REST else features)[(row, key.role) if key.column == REST else (row, key.role, key.column)] = (
                        True
                    )
            return features, rest

        return ablated


def _size(masks: Mapping[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def _at(mask: Tensor, roles: Tensor) -> Tensor:
    """[rows, tokens, ...] what a mask [rows or 1, roles, ...] says at the role of each token; anything where there is no role."""
    rows = torch.arange(len(roles), device=roles.device)[:, None] if len(mask) > 1 else 0
    return mask[rows, roles.clamp_min(0)]
