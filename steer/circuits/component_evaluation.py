"""Evaluation of circuits of components: faithfulness, completeness, minimality, curves over sizes, and agreement with exact ablation.

Everything stands beside random circuits of the same size, and says what it depends on: the kind of ablation, nodes or edges, per position
or not, and how prompts were averaged (Miller, Chughtai & Saunders 2024, arXiv 2407.08734, show that all of these change the numbers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import number_within, of_type, whole_number
from steer.circuits.ablation import Ablation
from steer.circuits.circuit import Circuit
from steer.circuits.component_results import SHARES, Completeness, ComponentFaithfulness, FaithfulnessCurve, Minimality
from steer.circuits.component_run import ComponentRun, TakenOut, kinds_of
from steer.circuits.component_scores import ComponentScores, check_order
from steer.circuits.components import HEAD, INPUT, MLP
from steer.circuits.evaluation import ExactEffects
from steer.circuits.pairs import Pairs
from steer.circuits.targets import Target, target_words
from steer.circuits.texts import Prompts, Texts
from steer.errors import ConfigError, WrongModelError
from steer.model.tokens import rows_hash


class ComponentEvaluation:
    """Evaluates circuits on prompts.

    M(C) is the mean of the target over prompts with everything outside a circuit C ablated; outside means all other edges for a circuit of
    edges, and all other components of the kinds that it has for one of nodes.

    Args:
        prompts: pairs, or prompts alone where the ablation needs no counterfactual; best ones that the circuit was not found on.
        target: a number of the logits of each prompt.
        ablation: what takes the place of components.
        max_tokens: padded tokens of a batch.

    Raises:
        ConfigError: a resample ablation without pairs.

    Example:
        >>> evaluation = ComponentEvaluation(model, pairs, target, resample_ablation())
        >>> evaluation.faithfulness(scores.top_edges(20), draws=1).faithfulness
        >>> evaluation.curve(scores, shares=[0.01, 1.0], draws=1).cpr
    """

    def __init__(
        self, model: nn.Module, prompts: Pairs | Texts | Prompts, target: Target, ablation: Ablation, *, max_tokens: int = 512
    ) -> None:
        self.run = ComponentRun(model, prompts, target, ablation, max_tokens=max_tokens)
        texts = self.run.passes.texts
        self._facts = {
            "ablation": {"kind": ablation.kind, "per_position": ablation.per_position, **ablation.facts},
            "target": target_words(target),
            "prompts": len(texts),
            "prompts_hash": prompts.hash() if isinstance(prompts, Pairs) else rows_hash(texts.rows),
            "tokens": "all" if texts.positions == "sum" else "with a role",
            "average": "ratio of means; mean of ratios beside it",
        }

    def faithfulness(self, circuit: Circuit, *, draws: int = 5, seed: int = 0) -> ComponentFaithfulness:
        """How much of the target a circuit keeps when everything else is ablated, beside `draws` random circuits of the same size.

        Raises:
            ConfigError: an empty circuit. WrongModelError: one of another model.
        """
        drawn = self._drawn(circuit, draws, seed)
        kinds = kinds_of(circuit)
        taken_out = [TakenOut.nothing(self.run.graph), TakenOut.all_but(_none_of(circuit), kinds)]
        for each in (circuit, *drawn):
            taken_out += [TakenOut.all_but(each, kinds), TakenOut.circuit(each)]
        full, empty, *values = self.run.values(taken_out)
        alone, without = torch.stack(values[::2]), torch.stack(values[1::2])
        facts = self._about(circuit, draws=draws, seed=seed, size=len(_items(circuit)))
        return ComponentFaithfulness(full, empty, alone[0], without[0], alone[1:], without[1:], facts)

    def completeness(
        self, circuit: Circuit, *, knock_outs: int = 10, greedy: int = 5, candidates: int = 10, draws: int = 3, seed: int = 0
    ) -> Completeness:
        """Whether what is outside a circuit does the same job: |M(C without K) - M(model without K)| for sets K of its components or edges.

        Args:
            knock_outs: random sets, each component with probability one half.
            greedy: the largest set that is built one by one from the component that makes the difference largest; 0 for none.
            candidates: components tried at each of these steps, drawn.
            draws: random circuits of the same size, with `knock_outs` sets each.

        Raises:
            ConfigError: an empty circuit.
        """
        whole_number(knock_outs, "the number of knock-out sets", least=1)
        whole_number(greedy, "the size of the greedy knock-out set")
        whole_number(candidates, "the components tried at each step", least=1)
        generator = torch.Generator().manual_seed(seed)
        sets = [_half(circuit, generator) for _ in range(knock_outs)]
        of_random = []
        for drawn in self._drawn(circuit, draws, seed):
            of_random.append(self._incomplete(drawn, [_half(drawn, generator) for _ in range(knock_outs)]))
        worst, differences = self._greedy(circuit, greedy, candidates, generator)
        facts = self._about(circuit, knock_outs=knock_outs, greedy=greedy, candidates=candidates, draws=draws, seed=seed)
        random = torch.stack(of_random) if of_random else torch.empty(0, knock_outs, dtype=torch.float64)
        return Completeness(self._incomplete(circuit, sets), random, tuple(worst), differences, facts)

    def _incomplete(self, circuit: Circuit, sets: Sequence[Tensor]) -> Tensor:
        """[sets] |M(C without K) - M(model without K)|. sets: places of the items of each K."""
        kinds = kinds_of(circuit)
        taken_out = []
        for chosen in sets:
            taken_out += [TakenOut.all_but(_without(circuit, chosen), kinds), TakenOut.circuit(_only(circuit, chosen))]
        means = self.run.values(taken_out).mean(1)
        return (means[::2] - means[1::2]).abs()

    def _greedy(self, circuit: Circuit, size: int, candidates: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
        """Names of the set, and [steps] the difference at each size."""
        items, chosen, differences = _items(circuit), torch.empty(0, dtype=torch.long), []
        for _ in range(min(size, len(items))):
            left = items[~torch.isin(items, chosen)]
            tried = left[torch.randperm(len(left), generator=generator)[:candidates]]
            found = self._incomplete(circuit, [torch.cat([chosen, item[None]]) for item in tried])
            chosen = torch.cat([chosen, tried[found.argmax()][None]])
            differences.append(found.max())
        return [_name(circuit, int(item)) for item in chosen], torch.stack(differences) if differences else torch.empty(0)

    def minimality(self, circuit: Circuit, *, knock_outs: int = 3, most: int = 200, draws: int = 1, seed: int = 0) -> Minimality:
        """What each component or edge of a circuit adds to it: the largest |M(C without K and v) - M(C without K)| over sets K.

        Args:
            knock_outs: random sets K beside the empty one.
            most: components or edges that are tried; drawn where there are more.
            draws: random circuits of the same size of which the same is taken.

        Raises:
            ConfigError: an empty circuit.
        """
        whole_number(knock_outs, "the number of knock-out sets")
        whole_number(most, "the components or edges that are tried", least=1)
        found = []
        for number, each in enumerate([circuit, *self._drawn(circuit, draws, seed)]):
            generator = torch.Generator().manual_seed(seed)
            items = _items(each)
            tried = items[torch.randperm(len(items), generator=generator)[:most].sort().values]
            sets = [items[:0], *(_half(each, generator) for _ in range(knock_outs))]
            kinds, taken_out = kinds_of(circuit), []
            for chosen in sets:
                taken_out += [TakenOut.all_but(_without(each, chosen[chosen != item]), kinds) for item in tried]
                taken_out += [TakenOut.all_but(_without(each, torch.cat([chosen, item[None]])), kinds) for item in tried]
            means = self.run.values(taken_out).mean(1).view(len(sets), 2, len(tried))
            changes = (means[:, 1] - means[:, 0]).abs().amax(0)
            found.append(changes)
            if number == 0:
                names = tuple(_name(circuit, int(item)) for item in tried)
        facts = self._about(circuit, knock_outs=knock_outs, draws=draws, seed=seed)
        return Minimality(names, found[0], torch.cat(found[1:]) if draws else torch.empty(0), facts)

    def curve(
        self, scores: ComponentScores, *, shares: Sequence[float] = SHARES, absolute: bool = True, draws: int = 1, seed: int = 0
    ) -> FaithfulnessCurve:
        """Faithfulness of the highest-scored edges at several sizes, with the areas CPR and CMD of MIB (Mueller et al. 2025, 2504.13151).

        Args:
            shares: of the possible edges, ascending.
            absolute: edges by the size of their score; else by the score, those that help the target first.
            draws: random orders of the edges beside it.

        Raises:
            ConfigError: scores without edges, or all zero; shares that do not ascend within 0 to 1.
            NonFiniteError: scores that cannot be ordered.
        """
        self._check_model(scores)
        for share in shares:
            number_within(share, "a share of the edges", 0, 1)
        whole_number(draws, "the number of random orders")
        if not shares or list(shares) != sorted(set(shares)):
            raise _not_ascending(shares)
        generator = torch.Generator().manual_seed(seed)
        graph = self.run.graph
        check_order(scores.edge_scores[graph.possible], "edges")
        orders = [scores.edge_scores.abs() if absolute else scores.edge_scores]
        orders += [torch.rand(graph.possible.shape, generator=generator) for _ in range(draws)]
        nothing = torch.zeros(len(graph.writers), dtype=torch.float64)
        taken_out = [TakenOut(nothing), TakenOut(nothing, {}, graph.possible)]
        sizes = []
        for order in orders:
            for share in shares:
                kept = graph.pruned(_highest(order, graph.possible, max(1, int(share * graph.n_edges))))
                sizes.append(int(kept.sum()))
                taken_out.append(TakenOut(nothing, {}, graph.possible & ~kept))
        full, empty, *values = self.run.values(taken_out)
        by_order = torch.stack(values).unflatten(0, (len(orders), len(shares)))  # [orders, shares, prompts]
        facts = {**self._facts, "of": "edges", "absolute": absolute, "draws": draws, "seed": seed, "scores": scores.facts}
        return FaithfulnessCurve(tuple(shares), tuple(sizes[: len(shares)]), full, empty, by_order[0], by_order[1:], facts)

    def exact_effects(self, scores: ComponentScores, count: int = 24, *, edges: bool = False, seed: int = 0) -> ExactEffects:
        """Scores beside what ablating components or edges one by one costs, of some drawn at random.

        Raises:
            ConfigError: scores without edges, or more than there are.
        """
        self._check_model(scores)
        graph = self.run.graph
        possible = graph.possible.flatten() if edges else torch.tensor([writer.kind in (HEAD, MLP, INPUT) for writer in graph.writers])
        whole_number(count, "the number of exact effects", least=1)
        places = possible.nonzero().flatten()
        if count > len(places):
            raise _too_many(count, len(places))
        chosen = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:count]].sort().values
        whole = Circuit(graph, torch.ones(len(graph.writers), dtype=torch.float64), graph.possible if edges else None)
        taken_out = [TakenOut.circuit(_only(whole, place[None])) for place in chosen]
        means = self.run.values([TakenOut.nothing(graph), *taken_out]).mean(1)
        attributed = (scores.edge_scores.flatten() if edges else scores.node_scores)[chosen]
        names = tuple(_name(whole, int(place)) for place in chosen)
        return ExactEffects(names, attributed.float(), (means[0] - means[1:]).float(), "edges" if edges else "nodes")

    def _check_model(self, of: Circuit | ComponentScores) -> None:
        """Raises WrongModelError for what was found in a model of other sizes or another family; training may have changed it."""
        known, here = of.facts.get("model"), self.run.anatomy.fingerprint()
        families = [facts.get("model_type") for facts in (known, here)] if isinstance(known, dict) else []
        if of.graph != self.run.graph or len(set(families)) > 1:
            raise _other_model(known or of.graph.layers, here)

    def _drawn(self, circuit: Circuit, draws: int, seed: int) -> list[Circuit]:
        of_type(circuit, Circuit, "the circuit of an evaluation", "e.g. scores.top_edges(200)")
        self._check_model(circuit)
        if len(_items(circuit)) == 0:
            raise _empty()
        whole_number(draws, "the number of random circuits")
        return [circuit.random(seed + number) for number in range(draws)]

    def _about(self, circuit: Circuit, **how: Any) -> dict[str, Any]:
        of = {"of": "edges"} if circuit.edges is not None else {"of": "nodes", "kinds": list(kinds_of(circuit))}
        return {**self._facts, **of, **how}


# ---- parts of a circuit by place: edges, or nodes and then neurons


def _flat(circuit: Circuit) -> Tensor:
    if circuit.edges is not None:
        return circuit.edges.flatten()
    circuit.check_whole("an exact evaluation")
    return torch.cat([circuit.nodes, *(circuit.neurons[layer] for layer in sorted(circuit.neurons))])


def _items(circuit: Circuit) -> Tensor:
    """[parts] places of what is in it."""
    return _flat(circuit).nonzero().flatten()


def _of_flat(circuit: Circuit, flat: Tensor) -> Circuit:
    if circuit.edges is not None:
        return replace(circuit, edges=flat.view_as(circuit.edges))
    layers = sorted(circuit.neurons)
    nodes, *neurons = flat.split([len(circuit.nodes), *(len(circuit.neurons[layer]) for layer in layers)])
    return replace(circuit, nodes=nodes, neurons=dict(zip(layers, neurons, strict=True)))


def _without(circuit: Circuit, places: Tensor) -> Circuit:
    return _of_flat(circuit, _flat(circuit).index_fill(0, places, 0))


def _only(circuit: Circuit, places: Tensor) -> Circuit:
    flat = _flat(circuit)
    return _of_flat(circuit, torch.zeros_like(flat).index_copy(0, places, flat[places]))


def _none_of(circuit: Circuit) -> Circuit:
    return _of_flat(circuit, torch.zeros_like(_flat(circuit)))


def _half(circuit: Circuit, generator: torch.Generator) -> Tensor:
    """Places of some of it, each with probability one half."""
    items = _items(circuit)
    return items[torch.rand(len(items), generator=generator) < 0.5]


def _name(circuit: Circuit, place: int) -> str:
    graph = circuit.graph
    if circuit.edges is not None:
        writer, reader = divmod(place, len(graph.readers))
        return f"{graph.writers[writer].name}->{graph.readers[reader].name}"
    if place < len(graph.writers):
        return graph.writers[place].name
    place -= len(graph.writers)
    for layer in sorted(circuit.neurons):
        if place < len(circuit.neurons[layer]):
            return f"m{layer}.n{place}"
        place -= len(circuit.neurons[layer])
    raise IndexError(place)


def _highest(scores: Tensor, possible: Tensor, count: int) -> Tensor:
    """[writers, readers] bool."""
    flat = scores.masked_fill(~possible, -torch.inf).flatten()
    chosen = torch.zeros_like(possible).flatten()
    chosen[flat.topk(count).indices] = True
    return chosen.view_as(possible)


# ---- errors


def _other_model(known: Any, found: Any) -> WrongModelError:
    return WrongModelError("what is evaluated was found in another model", expected=found, found=known,
                           remedy="evaluate it on the model that it was found in, or attribute on this one")  # fmt: skip


def _empty() -> ConfigError:
    return ConfigError("the circuit is empty", expected="at least one component or edge", found="none", remedy="choose more of them")


def _too_many(count: int, known: int) -> ConfigError:
    return ConfigError("more exact effects were asked for than there are components", expected=f"at most {known}", found=count,
                       remedy="ask for fewer")  # fmt: skip


def _not_ascending(shares: Sequence[float]) -> ConfigError:
    return ConfigError("shares of the edges do not ascend", expected="one or more, each larger than the one before", found=list(shares),
                       remedy=f"e.g. {list(SHARES)}")  # fmt: skip
