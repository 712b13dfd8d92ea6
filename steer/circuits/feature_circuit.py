"""Feature circuits: which features of several dictionaries a target depends on, and how they depend on one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isnan, nan
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steer.checks import of_type, one_of, whole_number
from steer.circuits.attribution import REST, Attribution, Key
from steer.circuits.baselines import BASELINES, Baseline, seen, zero_baselines
from steer.circuits.evaluation import Evaluation, ExactEffects, Faithfulness
from steer.circuits.graph import TARGET, Graph, Node, joined_edges
from steer.circuits.passes import Passes
from steer.circuits.split_site import SplitSite, split_sites_of
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
        error_share: by name of the dictionary, the share of the absolute scores at single tokens that its errors carry, all nodes counted.
        faithfulness: see there; None where it was not measured.
        exact: single nodes ablated exactly; None where none were. A file does not keep it.

    Example:
        >>> found = steer.feature_circuit(model, {"sae": dictionary}, texts, target, nodes=4, edges=4, draws=1)
        >>> found.features, found.error_share
        >>> with found.ablation_plan().attached(model):
        ...     model.generate(**prompt, max_new_tokens=2)
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

    def faithfulness_on(
        self,
        model: nn.Module,
        prompts: Prompts,
        target: Target,
        *,
        tokenizer: Any = None,
        positions: Positions = "sum",
        baseline: str = "zero",
        reference: Prompts | None = None,
        draws: int = 3,
        seed: int = 0,
        max_tokens: int = 2048,
    ) -> Faithfulness:
        """Faithfulness on other prompts than those of the attribution; arguments as there.

        Raises:
            ConfigError: prompts without a role that the circuit has features at.
        """
        task = _task(model, self.dictionaries, prompts, target, tokenizer, positions, baseline, reference, "plain", False, max_tokens)
        names = [split.name for split in task.passes.splits]
        roles = task.passes.texts.role_names
        nodes = self.graph.of_kind("feature")
        if missing := sorted({node.role for node in nodes} - set(roles)):
            raise _no_such_role(missing, roles)
        keys = [Key(names.index(node.part), roles.index(node.role), node.index) for node in nodes if node.index is not None]
        return task.evaluation.faithfulness(keys, draws=draws, seed=seed)

    def save(self, path: str | Path) -> Path:
        """Writes the graph, what was measured, and which dictionaries it is of, without their numbers."""
        origins = {name: origin_of(dictionary) for name, dictionary in self.dictionaries.items()}
        measured = None if self.faithfulness is None else {name: None if isnan(x) else x for name, x in vars(self.faithfulness).items()}
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
            faithfulness = None
            if more["faithfulness"] is not None:
                faithfulness = Faithfulness(**{name: nan if x is None else x for name, x in more["faithfulness"].items()})
            for name, origin in more["dictionaries"].items():
                _check_same(name, origin, dictionaries)
            return cls(graph, {name: dictionaries[name] for name in more["dictionaries"]}, more["error_share"], faithfulness)


@torch.inference_mode(False)  # of the caller, in which nothing has a gradient
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
    nodes: int = 30,
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
        nodes: the strongest at each site that are looked at. edges: between these and to the target, of which so many are kept.
        evaluate: measure faithfulness, with `draws` random circuits of the same size beside it.
        exact: number of nodes that are also ablated one by one: half of them the strongest, half drawn from the others that have a score.
        max_tokens: padded tokens that run together.

    Raises:
        ConfigError, SiteError, WidthError: dictionaries, prompts or a target that do not fit. AnatomyError: no logits, or `linear` on
            a model whose norms are not known.

    Example:
        >>> found = steer.feature_circuit(model, {"sae": dictionary}, texts, target, nodes=4, edges=4, draws=1)
        >>> found.save("circuit")
        >>> steer.report.write_circuit("circuit.html", found)
    """
    for name, number, least in (("nodes", nodes, 1), ("edges", edges, 1), ("steps", steps, 0), ("exact", exact, 0), ("draws", draws, 0)):
        whole_number(number, f"`{name}`", least=least)
    task = _task(model, dictionaries, prompts, target, tokenizer, positions, baseline, reference, gradient, embedding, max_tokens)
    passes = task.passes
    attribution = Attribution(passes, target, task.baselines, steps=steps)
    keys = strongest(attribution, nodes)
    facts = {
        "model": passes.anatomy.fingerprint(),
        "target": target_words(target),
        "value": attribution.value,
        "prompts": len(passes.texts),
        "tokens": list(passes.texts.rows[0].ids) if len(passes.texts) == 1 else None,
        "positions": positions if isinstance(positions, str) else "labels",
        "roles": passes.texts.role_names,
        "baseline": baseline,
        "gradient": gradient,
        "steps": steps,
    }
    graph, kept = _graph(attribution, keys, edges, facts)
    faithfulness = task.evaluation.faithfulness(kept, draws=draws, seed=seed) if evaluate else None
    effects = _exact_effects(attribution, task.evaluation, kept, exact, seed) if exact else None
    return FeatureCircuit(graph, dict(dictionaries), error_shares(attribution), faithfulness, effects)


class _Task(NamedTuple):
    """What attribution and evaluation share."""

    passes: Passes
    baselines: dict[str, Baseline]
    evaluation: Evaluation


def _task(
    model: nn.Module,
    dictionaries: Mapping[str, Dictionary],
    prompts: Prompts,
    target: Target,
    tokenizer: Any,
    positions: Positions,
    baseline: str,
    reference: Prompts | None,
    gradient: str,
    embedding: bool,
    max_tokens: int,
) -> _Task:
    """Checks the arguments of `feature_circuit`, and prepares passes over its prompts."""
    one_of(baseline, BASELINES, "`baseline`")
    one_of(gradient, GRADIENTS, "`gradient`")
    whole_number(max_tokens, "`max_tokens`", least=1)
    if not callable(target):
        raise _no_target(target)
    anatomy = Anatomy.find(model)
    splits = split_sites_of(anatomy, dictionaries, embedding=embedding)
    passes_over = partial(Passes, model, anatomy, splits, linear=gradient == "linear", max_tokens=max_tokens)
    passes = passes_over(Texts(rows_of(model, prompts, tokenizer), positions))
    baselines = zero_baselines(passes)
    if baseline == "mean":
        others = passes if reference is None else passes_over(Texts(rows_of(model, reference, tokenizer)))
        baselines = {name: found.mean for name, found in seen(others).items()}
    return _Task(passes, baselines, Evaluation(passes, target, baselines))


def error_shares(attribution: Attribution) -> dict[str, float]:
    """Share of the absolute scores at single tokens that errors carry, by name of the dictionary; 0 where nothing has a score."""
    shares = {}
    for split in attribution.passes.splits:
        if split.dictionary is not None:
            of_features, of_rest = attribution.sizes[split.name].tolist()
            shares[split.name] = of_rest / (of_features + of_rest) if of_features + of_rest else 0.0
    return shares


def strongest(attribution: Attribution, count: int) -> list[Key]:
    """At each site the nodes with the largest absolute scores, in the order in which a pass reaches them."""
    found: list[Key] = []
    for number, split in enumerate(attribution.passes.splits):
        scores = attribution.scores[split.name]
        best = scores.abs().flatten().topk(min(count, scores.numel()))
        for flat in best.indices[best.values > 0].sort().values.tolist():
            role, column = divmod(flat, scores.shape[1])
            found.append(Key(number, role, REST if column == split.width else column))
    return found


def node_of(key: Key, splits: Sequence[SplitSite], role_names: Sequence[str]) -> Node:
    """What a key stands for."""
    split, role = splits[key.split], role_names[key.role]
    part = "" if split.dictionary is None else split.name
    return Node(split.rest if key.column == REST else "feature", str(split.writes), part, None if key.column == REST else key.column, role)


def _graph(attribution: Attribution, keys: Sequence[Key], edges: int, facts: dict[str, Any]) -> tuple[Graph, list[Key]]:
    """The pruned graph, and the keys of its nodes."""
    splits, names = attribution.passes.splits, attribution.passes.texts.role_names
    nodes = [*(node_of(key, splits, names) for key in keys), Node(TARGET)]
    scores = torch.tensor([*(_score_of(attribution, key) for key in keys), 0.0])
    weights = attribution.edges(keys)
    ends = weights.nonzero()
    whole = Graph(tuple(nodes), scores, *joined_edges([(ends, weights[tuple(ends.T)])]), facts)
    graph = whole.pruned(edges)
    key_of = {node.name: key for node, key in zip(nodes, keys, strict=False)}
    return graph, [key_of[node.name] for node in graph.nodes if node.kind != TARGET]


def _score_of(attribution: Attribution, key: Key) -> float:
    return float(attribution.scores[attribution.passes.splits[key.split].name][key.role, key.column])


def _exact_effects(attribution: Attribution, evaluation: Evaluation, kept: Sequence[Key], count: int, seed: int) -> ExactEffects:
    by_size = sorted(kept, key=lambda key: -abs(_score_of(attribution, key)))
    chosen = by_size[: (count + 1) // 2]
    others = [key for key in strongest(attribution, sum(s.numel() for s in attribution.scores.values())) if key not in set(chosen)]
    drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[: count - len(chosen)]
    chosen = [*chosen, *(others[i] for i in drawn.tolist())]
    splits, names = attribution.passes.splits, attribution.passes.texts.role_names
    attributed: Tensor = torch.tensor([_score_of(attribution, key) for key in chosen])
    return ExactEffects(tuple(node_of(key, splits, names).name for key in chosen), attributed, evaluation.exact(chosen))


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


def _no_such_role(missing: list[str], roles: Sequence[str]) -> ConfigError:
    return ConfigError(
        "the circuit has features at tokens that these prompts do not have",
        expected=f"labels {', '.join(map(repr, missing))} among the roles of the prompts",
        found=", ".join(map(repr, roles)),
        remedy="pass positions= as the circuit was made with",
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
