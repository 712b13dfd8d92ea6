"""Feature circuits: which features of several dictionaries a target depends on, and how they depend on one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import of_type, one_of, whole_number
from steer.circuits.attribution import REST, Attribution, Key
from steer.circuits.baselines import BASELINES, mean_baselines, zero_baselines
from steer.circuits.evaluation import Evaluation, ExactEffects, Faithfulness
from steer.circuits.graph import TARGET, Graph, Node, joined_edges
from steer.circuits.passes import Passes
from steer.circuits.places import Place, places_of
from steer.circuits.targets import Target, target_words
from steer.circuits.texts import Positions, Prompts, Texts, rows_of
from steer.errors import ConfigError, WrongModelError
from steer.features.dictionary import Dictionary
from steer.features.feature_edit import origin_of
from steer.features.operators.ablate_features import AblateFeatures
from steer.intervene import Intervention, Plan
from steer.model.anatomy import Anatomy
from steer.model.context import PHASES
from steer.reading import check_kinds, damage_of

GRADIENTS = ("plain", "linear")


@dataclass(frozen=True, eq=False)
class FeatureCircuit:
    """A graph of features, errors and embeddings with a target, and the dictionaries whose features they are.

    Attributes:
        graph: pruned.
        dictionaries: by the names in the graph.
        error_share: by name of the dictionary, the share of the absolute scores of all nodes there that errors carry; pruned nodes count.
        faithfulness: see there; None where it was not measured.
        exact: single nodes ablated exactly; None where none were. A file does not keep it.
    """

    graph: Graph
    dictionaries: Mapping[str, Dictionary]
    error_share: Mapping[str, float]
    faithfulness: Faithfulness | None = None
    exact: ExactEffects | None = None

    def __repr__(self) -> str:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in self.error_share.items())
        return f"FeatureCircuit({len(self.graph.nodes)} nodes, {len(self.graph.weights)} edges, carried by errors: {shares})"

    @property
    def features(self) -> dict[str, list[int]]:
        """Features of each dictionary that are in the circuit, at whatever tokens."""
        found: dict[str, set[int]] = {name: set() for name in self.dictionaries}
        for node in self.graph.of_kind("feature"):
            assert node.index is not None
            found[node.part].add(node.index)
        return {name: sorted(indices) for name, indices in found.items() if indices}

    def ablation_plan(self, strength: float = 1.0, *, scope: str = "all", phases: Sequence[str] = PHASES) -> Plan:
        """A plan that ablates the features of the circuit, in training and generation: h - strength * sum_j f_j W_j at each site.

        It acts at all tokens of the scope, also where the circuit has a feature at some positions alone, since a plan is used on other
        texts. Its text form needs the dictionaries by the names that they have here: `ablate_features(sae, features=[3,40])`.

        Raises:
            ConfigError: a circuit without features.
        """
        if not self.features:
            raise _no_features(self)
        return Plan(
            [
                Intervention(AblateFeatures(dictionary, self.features[name]), dictionary.writes[0], scope, strength, phases, name=name)
                for name, dictionary in self.dictionaries.items()
                if name in self.features
            ]
        )

    def save(self, path: str | Path) -> Path:
        """Writes the graph, what was measured, and which dictionaries it is of, without their numbers."""
        origins = {name: origin_of(dictionary) for name, dictionary in self.dictionaries.items()}
        measured = None if self.faithfulness is None else vars(self.faithfulness)
        return self.graph.save(path, dictionaries=origins, error_share=dict(self.error_share), faithfulness=measured)

    @classmethod
    def load(cls, path: str | Path, dictionaries: Mapping[str, Dictionary]) -> FeatureCircuit:
        """Reads what `save` wrote.

        Args:
            dictionaries: the same ones by the same names.

        Raises:
            WrongModelError: dictionaries of other sites or widths. DamagedFileError and likewise: see `Graph.load`.
        """
        of_type(dictionaries, Mapping, "the dictionaries of a circuit", "pass {name: dictionary}, as it was made with")
        graph, manifest = Graph.read(path)
        with damage_of(path, "a feature circuit with its dictionaries and error shares"):
            more = {key: manifest[key] for key in ("dictionaries", "error_share", "faithfulness")}
            check_kinds(more, {"dictionaries": dict, "error_share": dict, "faithfulness": (dict, type(None))})
            faithfulness = None if more["faithfulness"] is None else Faithfulness(**more["faithfulness"])
            for name, origin in more["dictionaries"].items():
                _check_same(name, origin, dictionaries)
            return cls(graph, {name: dictionaries[name] for name in more["dictionaries"]}, more["error_share"], faithfulness)


def feature_circuit(
    model: nn.Module,
    dictionaries: Mapping[str, Dictionary],
    prompts: Prompts,
    target: Target,
    *,
    tokenizer: Any = None,
    positions: Positions = "sum",
    baseline: str = "zero",
    reference: Prompts | None = None,
    gradient: str = "plain",
    steps: int = 0,
    embedding: bool = True,
    nodes: int = 60,
    edges: int = 200,
    evaluate: bool = True,
    exact: int = 0,
    draws: int = 3,
    seed: int = 0,
    max_tokens: int = 2048,
) -> FeatureCircuit:
    """Attributes a target to features, and prunes to the nodes and edges that carry most of it.

    Scores are means over the prompts. Tokens that a dictionary was not trained on have no nodes, and run as they are.

    Args:
        model: anything `Plan.attach` takes. Plans that are attached stay in force.
        dictionaries: autoencoders and transcoders of it, by names of your own.
        prompts: texts, rows, or a padded batch of a tokenizer.
        target: `LogitDifference`, `LogProbability`, or any function of the logits [tokens, vocabulary] of a prompt and its number.
        tokenizer: for texts; that of `steer.load` when None.
        positions: `sum` adds a feature's scores over the tokens of a prompt; `each` keeps the tokens apart, for prompts of one length;
            labels, a list for each prompt, join the tokens that play the same role, and leave alone those labelled None.
        baseline: what stands in the place of an ablated node, `zero` or its `mean` over `reference` (the prompts themselves when None).
        gradient: `plain` follows the model; `linear` takes attention patterns and the denominators of norms as constants.
        steps: of integrated gradients for the scores of nodes, for each dictionary; 0 for the gradient at the values.
        embedding: token embeddings are nodes, too.
        nodes, edges: how many are kept, before those without a path to the target go; nodes are chosen first.
        evaluate: measure faithfulness, with `draws` random circuits of the same size beside it.
        exact: number of nodes that are also ablated one by one: half of them the strongest, half drawn from the others that have a score.
        max_tokens: padded tokens that run together.

    Raises:
        ConfigError, SiteError, WidthError: dictionaries, prompts or a target that do not fit. AnatomyError: no logits, or `linear` on
            a model whose norms are not known.
    """
    one_of(baseline, BASELINES, "`baseline`")
    one_of(gradient, GRADIENTS, "`gradient`")
    for name, number, least in (("nodes", nodes, 1), ("edges", edges, 1), ("steps", steps, 0), ("exact", exact, 0), ("draws", draws, 0)):
        whole_number(number, f"`{name}`", least=least)
    whole_number(max_tokens, "`max_tokens`", least=1)
    if not callable(target):
        raise _no_target(target)
    anatomy = Anatomy.find(model)
    places = places_of(anatomy, dictionaries, embedding=embedding)
    passes_over = partial(Passes, model, anatomy, places, linear=gradient == "linear", max_tokens=max_tokens)
    passes = passes_over(Texts(rows_of(model, prompts, tokenizer), positions))
    baselines = zero_baselines(passes)
    if baseline == "mean":
        others = passes if reference is None else passes_over(Texts(rows_of(model, reference, tokenizer)))
        baselines = mean_baselines(others)
    attribution = Attribution(passes, target, baselines, steps=steps)
    keys = strongest(attribution, nodes)
    facts = {
        "model": anatomy.fingerprint(), "target": target_words(target), "value": attribution.value, "prompts": len(passes.texts),
        "positions": positions if isinstance(positions, str) else "labels", "baseline": baseline, "gradient": gradient, "steps": steps,
    }  # fmt: skip
    graph, kept = _graph(attribution, keys, edges, facts)
    evaluation = Evaluation(passes, target, baselines)
    faithfulness = evaluation.faithfulness(kept, attribution.was_on, draws=draws, seed=seed) if evaluate else None
    effects = _exact_effects(attribution, evaluation, kept, exact, seed) if exact else None
    return FeatureCircuit(graph, dict(dictionaries), error_shares(attribution), faithfulness, effects)


def error_shares(attribution: Attribution) -> dict[str, float]:
    """Share of the absolute scores at each dictionary that its errors carry; 0 where nothing has a score."""
    shares = {}
    for place in attribution.passes.places:
        if place.dictionary is not None:
            size = attribution.scores[place.name].abs().double().sum(0)
            shares[place.name] = float(size[REST] / size.sum()) if float(size.sum()) else 0.0
    return shares


def strongest(attribution: Attribution, count: int) -> list[Key]:
    """The nodes with the largest absolute scores, in the order in which a pass reaches them."""
    found: list[tuple[float, Key]] = []
    for number, place in enumerate(attribution.passes.places):
        scores = attribution.scores[place.name]
        best = scores.abs().flatten().topk(min(count, scores.numel()))
        for size, flat in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if size > 0:
                role, column = divmod(flat, scores.shape[1])
                found.append((size, Key(number, role, REST if column == place.width else column)))
    chosen = [key for _, key in sorted(found, key=lambda pair: -pair[0])[:count]]
    return sorted(chosen, key=lambda key: (key.place, key.role, key.column % (1 << 62)))


def node_of(key: Key, places: Sequence[Place], role_names: Sequence[str]) -> Node:
    """What a key stands for."""
    place, role = places[key.place], role_names[key.role]
    part = "" if place.dictionary is None else place.name
    return Node(place.rest if key.column == REST else "feature", str(place.writes), part, None if key.column == REST else key.column, role)


def _graph(attribution: Attribution, keys: Sequence[Key], edges: int, facts: dict[str, Any]) -> tuple[Graph, list[Key]]:
    """The pruned graph, and the keys of its nodes."""
    places, names = attribution.passes.places, attribution.passes.texts.role_names
    nodes = [*(node_of(key, places, names) for key in keys), Node(TARGET)]
    scores = torch.tensor([*(_score_of(attribution, key) for key in keys), 0.0])
    weights = attribution.edges(keys)
    ends = weights.nonzero()
    whole = Graph(tuple(nodes), scores, *joined_edges([(ends, weights[tuple(ends.T)])]), facts)
    graph = whole.pruned(edges)
    key_of = {node.name: key for node, key in zip(nodes, keys, strict=False)}
    return graph, [key_of[node.name] for node in graph.nodes if node.kind != TARGET]


def _score_of(attribution: Attribution, key: Key) -> float:
    return float(attribution.scores[attribution.passes.places[key.place].name][key.role, key.column])


def _exact_effects(attribution: Attribution, evaluation: Evaluation, kept: Sequence[Key], count: int, seed: int) -> ExactEffects:
    by_size = sorted(kept, key=lambda key: -abs(_score_of(attribution, key)))
    chosen = by_size[: (count + 1) // 2]
    others = [key for key in strongest(attribution, sum(s.numel() for s in attribution.scores.values())) if key not in set(chosen)]
    drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[: count - len(chosen)]
    chosen = [*chosen, *(others[i] for i in drawn.tolist())]
    places, names = attribution.passes.places, attribution.passes.texts.role_names
    attributed: Tensor = torch.tensor([_score_of(attribution, key) for key in chosen])
    return ExactEffects(tuple(node_of(key, places, names).name for key in chosen), attributed, evaluation.exact(chosen))


def _check_same(name: str, origin: Any, dictionaries: Mapping[str, Dictionary]) -> None:
    if name not in dictionaries:
        raise _missing(name, dictionaries)
    found = origin_of(dictionaries[name])
    if differing := [key for key in ("architecture", "width", "reads", "writes") if origin[key] != found[key]]:
        raise _other_dictionary(name, {key: origin[key] for key in differing}, {key: found[key] for key in differing})


# ---- errors


def _no_target(target: object) -> ConfigError:
    return ConfigError(
        "a circuit has no target",
        expected="LogitDifference, LogProbability, or a function of the logits of a prompt and its number",
        found=f"{target!r:.60}",
        remedy="e.g. steer.circuits.LogProbability(token)",
    )


def _no_features(circuit: FeatureCircuit) -> ConfigError:
    return ConfigError(
        "there is nothing to ablate",
        expected="a circuit with at least one feature",
        found=repr(circuit.graph),
        remedy="keep more nodes or edges: feature_circuit(..., nodes=, edges=)",
    )


def _missing(name: str, dictionaries: Mapping[str, Dictionary]) -> WrongModelError:
    return WrongModelError(
        f"the circuit has features of '{name}', which was not given",
        expected=f"dictionaries={{'{name}': ...}}",
        found=", ".join(dictionaries) or "none",
        remedy="pass the dictionaries by the names that the circuit was made with",
    )


def _other_dictionary(name: str, expected: dict[str, Any], found: dict[str, Any]) -> WrongModelError:
    return WrongModelError(f"'{name}' is another dictionary than that of the circuit", expected=expected, found=found,
                           remedy="pass the one that the circuit was made with")  # fmt: skip
