"""Attribution of a target to the components of a model and to the edges between them, on raw models with grouped-query attention.

Score of a node: what it writes in the clean run less what it writes in the corrupted one, times the gradient of the target by what is
written. Score of an edge: the same, times the gradient where the reader reads, brought back through its projection and norm. Positive: the
target is higher with it. Sums over tokens, means over prompts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.checks import of_type
from steer.circuits.ablation import RESAMPLE, Ablation, resample_ablation
from steer.circuits.attribution_method import ATTRIBUTION_METHODS, AttributionMethod, GradientPass, Values
from steer.circuits.backward_rule import BACKWARD_RULES, BackwardRule
from steer.circuits.component_pass import Record, constant_target, differences, record, values_at, written_sites
from steer.circuits.component_scores import ComponentScores
from steer.circuits.components import ComponentGraph
from steer.circuits.edge_attachment import check_no_edges_ablated
from steer.circuits.edge_contraction import EdgeContraction
from steer.circuits.pairs import Pairs
from steer.circuits.stream_readers import BlockReaders, stream_readers
from steer.circuits.targets import Target, target_words
from steer.circuits.text_overlap import window_hashes
from steer.circuits.text_passes import TextPasses, warn_of_plan
from steer.circuits.texts import Batch
from steer.errors import ConfigError, NonFiniteError
from steer.model.anatomy import Anatomy
from steer.model.devices import check_weights_are_there
from steer.model.site import Site


def attribute(
    model: nn.Module,
    pairs: Pairs,
    target: Target,
    *,
    method: str | AttributionMethod = "eap_ig",
    edges: bool = True,
    neurons: bool = False,
    ablation: Ablation | None = None,
    rule: str | BackwardRule = "plain",
    max_tokens: int = 512,
    progress: bool = True,
) -> ComponentScores:
    """Scores of all components, and of all edges.

    Memory: of a batch, about 11 times blocks x width numbers for each token beside what autograd keeps, and 64 MiB for the edges.

    Args:
        pairs: prompts and counterfactuals. With a mean or zero ablation the counterfactuals are not run.
        target: a number of the logits of each prompt, e.g. `LogitDifference`.
        method: name of an attribution method, or one with settings, e.g. `EAPIG(steps=10)`.
        edges: edges too; False for nodes alone.
        neurons: neurons of the MLPs, too.
        ablation: what takes the place of a component; the counterfactual prompt for None.
        rule: name of a backward rule, by which gradients go back: `plain`, `gim` or `relp`.
        max_tokens: padded tokens of a batch.

    Raises:
        ConfigError: a target that is constant or not differentiable, a method that needs counterfactuals without them, a counterfactual
            that is its prompt, scores that are all zero. AnatomyError: one
            whose reading of the stream is not known, with edges, or on which the rule is not proven. AttachError: with edges, a model
            of which edges are ablated. DeployError: weights that are
            offloaded. NonFiniteError: a target or gradients that are not finite.

    Example:
        >>> pairs = Pairs.of(model, ["The nurse said that"], ["The person said that"], tokenizer=tokenizer)
        >>> he, she = (tokenizer.encode(word)[0] for word in (" he", " she"))
        >>> scores = attribute(model, pairs, LogitDifference(he, she))
        >>> circuit = scores.top_edges(200)
    """
    of_type(model, nn.Module, "the model of an attribution", "pass the model itself")
    check_weights_are_there(model, "an attribution to components")
    of_type(pairs, Pairs, "the pairs of an attribution", "make them with Pairs.of(model, clean, corrupted)")
    chosen = ATTRIBUTION_METHODS.get(method)() if isinstance(method, str) else method
    of_type(chosen, AttributionMethod, "the method of an attribution", "e.g. 'eap_ig', or EAPIG(steps=10)")
    ablation = resample_ablation() if ablation is None else ablation
    of_type(ablation, Ablation, "the ablation of an attribution", "e.g. zero_ablation(), or mean_ablation(model, texts)")
    ablation.check_model(Anatomy.find(model))
    if chosen.needs_pairs and ablation.kind != RESAMPLE:
        raise _needs_pairs(chosen, ablation)
    if ablation.kind == RESAMPLE and (equal := pairs.equal()):
        raise _equal_prompts(equal, len(pairs))
    backward = BACKWARD_RULES.get(rule)() if isinstance(rule, str) else rule
    of_type(backward, BackwardRule, "the backward rule of an attribution", "'plain', 'gim' or 'relp'")
    warn_of_plan(model, "scores are those of")
    with torch.inference_mode(False):  # of the caller, in which nothing has a gradient
        run = _Attribution(model, pairs, target, chosen, backward, ablation, edges, neurons, max_tokens)
        batches = list(run.passes.batches(range(len(pairs))))
        for prompts in tqdm(batches, desc="attribution", unit="batch", disable=None if progress else True):
            run.add(prompts)
        return run.scores()


class _Attribution:
    """Sums of scores over batches."""

    def __init__(
        self,
        model: nn.Module,
        pairs: Pairs,
        target: Target,
        method: AttributionMethod,
        rule: BackwardRule,
        ablation: Ablation,
        edges: bool,
        neurons: bool,
        max_tokens: int,
    ) -> None:
        self.anatomy = Anatomy.find(model)
        self.pairs, self.target, self.method, self.rule, self.ablation = pairs, target, method, rule, ablation
        self.passes = TextPasses(model, self.anatomy, pairs.clean, max_tokens=max_tokens)
        self.counterfactuals = TextPasses(model, self.anatomy, pairs.corrupted, max_tokens=max_tokens)
        blocks: tuple[BlockReaders, ...] = stream_readers(model, self.anatomy)
        self.graph = ComponentGraph.of(self.anatomy, [block.parallel for block in blocks])
        if edges:
            check_no_edges_ablated(self.anatomy)  # the stream that a reader with cut edges reads is none that is seen
        self.contraction = EdgeContraction(self.anatomy, self.graph, blocks, rule.constant_denominators) if edges else None
        self.written = written_sites(self.anatomy.n_layers, neurons=neurons)
        roles = len(pairs.clean.role_names)
        writers, readers = len(self.graph.writers), len(self.graph.readers)
        self.nodes = torch.zeros(roles, writers, dtype=torch.float64)
        self.edges = torch.zeros(roles, writers, readers, dtype=torch.float64) if edges else None
        self.neurons: dict[int, Tensor] = {}
        self.value = self.corrupted_value = 0.0
        self.has_gradient = False  # of any component in any pass

    def add(self, prompts: list[int]) -> None:
        """Adds the scores of a batch."""
        batch = self.passes.batch(prompts)
        corrupted = self._corrupted(prompts, batch)
        clean: Values = {} if self.method.starts_clean else values_at(self.passes, batch, self.written, self._clean_value)
        for number, step in enumerate(self.method.passes(clean, corrupted)):
            found = self._record(batch, step)
            self.has_gradient = self.has_gradient or any(bool(gradient.any()) for gradient in found.gradients.values())
            if self.method.starts_clean and number == 0:
                clean = found.values
                self.value += float(found.target.double().sum())
            if step.into is not None:
                step.into.values, step.into.gradients, step.into.target = found.values, found.gradients, found.target
            if step.weight == 0:
                continue
            change = differences(clean if step.start is None else step.start, corrupted, self.written)
            self._add_nodes(batch, step, change, found)
            self._add_edges(batch, step, change, found)
        sums = [self.nodes, *([] if self.edges is None else [self.edges]), *self.neurons.values()]
        if not all(bool(torch.isfinite(each).all()) for each in sums):
            raise _not_finite(prompts)

    def _clean_value(self, batch: Batch, logits: Tensor) -> None:
        self.value += float(self.passes.values(self.target, batch, logits).detach().double().sum())

    def _corrupted_value(self, batch: Batch, logits: Tensor) -> None:
        self.corrupted_value += float(self.counterfactuals.values(self.target, batch, logits).detach().double().sum())

    def _corrupted(self, prompts: list[int], batch: Batch) -> Values:
        """[rows, tokens, width] by site: what takes the place of what is written."""
        if self.ablation.kind == RESAMPLE:
            return values_at(self.counterfactuals, self.counterfactuals.batch(prompts), self.written, self._corrupted_value)
        constants, device = self.ablation.constants(), batch.ids.device
        width_of = {site: self.anatomy.point(site).width or self.anatomy.width for site in self.written}
        return {site: constants(site, width).to(device).expand(*batch.ids.shape, -1) for site, width in width_of.items()}

    def _record(self, batch: Batch, step: GradientPass) -> Record:
        contraction = self.contraction
        return record(
            self.passes,
            batch,
            self.target,
            values=[*self.written, *(contraction.streams() if contraction else [])],
            gradients=[*self.written, *(contraction.readers() if contraction else [])],
            edit=step.edit,
            rule=self.rule.applied(self.anatomy),
        )

    def _add_nodes(self, batch: Batch, step: GradientPass, change: Mapping[Site, Tensor], found: Record) -> None:
        for site in self.written:
            if step.only not in (None, site):
                continue
            products = change[site] * found.gradients[site].float()  # [rows, tokens, width]
            roles = batch.roles.to(products.device)
            by_role = torch.stack([products[roles == role].double().sum(0) for role in range(len(self.nodes))]).cpu() * step.weight
            layer = site.layer or 0
            if site.part == "mlp.neurons":
                self.neurons[layer] = self.neurons[layer] + by_role if layer in self.neurons else by_role
            elif site.part == "attn.z":
                heads = self.graph.heads_at(layer)
                self.nodes[:, heads] += by_role.unflatten(-1, (heads.stop - heads.start, -1)).sum(-1)
            else:
                place = 0 if site.part == "embed" else self.graph.mlp_at(layer)
                self.nodes[:, place] += by_role.sum(-1)

    def _add_edges(self, batch: Batch, step: GradientPass, change: Mapping[Site, Tensor], found: Record) -> None:
        if self.contraction is None or self.edges is None:
            return
        for role in range(len(self.edges)):
            self.edges[role] += step.weight * self.contraction(change, found, batch.roles == role, only=step.only)

    def scores(self) -> ComponentScores:
        """Means over the prompts. Raises ConfigError where no gradient was other than zero."""
        if not self.has_gradient:
            raise constant_target("gradients that are zero at every component, for every prompt")
        if not any(bool(scores.any()) for scores in (self.nodes, *self.neurons.values())):
            raise _all_zero(self.ablation)
        count = len(self.pairs)
        facts = {
            "method": {"name": self.method.name, **self.method.facts()},
            "rule": self.rule.name,
            "target": target_words(self.target),
            "value": self.value / count,
            "corrupted_value": self.corrupted_value / count if self.ablation.kind == RESAMPLE else None,
            "ablation": self.ablation.kind,
            "sign": "positive: the target is higher with it",
            "pairs": {
                "count": count,
                "hash": self.pairs.hash(),
                "windows": window_hashes([*self.pairs.clean.rows, *self.pairs.corrupted.rows]),
            },
            "model": self.anatomy.fingerprint(),
        }
        neurons = {layer: scores / count for layer, scores in sorted(self.neurons.items())}
        edges = None if self.edges is None else self.edges / count
        return ComponentScores(self.graph, self.nodes / count, edges, neurons, tuple(self.pairs.clean.role_names), count, facts)


# ---- errors


def _needs_pairs(method: AttributionMethod, ablation: Ablation) -> ConfigError:
    return ConfigError(
        f"attribution method '{method.name}' goes from the counterfactual prompt to the clean one",
        expected="resample ablation",
        found=f"{ablation.kind} ablation",
        remedy="leave out `ablation`, or take a method that goes from constants, e.g. 'eap' or 'eap_ig_activations'",
    )


def _equal_prompts(equal: list[int], pairs: int) -> ConfigError:
    return ConfigError(
        "a counterfactual is the same prompt, whose components differ in nothing",
        expected="another prompt in each pair",
        found=f"the same tokens twice in {len(equal)} of {pairs} pairs: {', '.join(map(str, equal[:8]))}",
        remedy="change the word that the target depends on, or leave the pair out; a mean or zero ablation needs no counterfactual",
    )


def _all_zero(ablation: Ablation) -> ConfigError:
    return ConfigError(
        "every component scores zero: nothing was attributed",
        expected=f"components that write something else in the {ablation.kind} ablation, and a target that depends on them",
        found="0 for all of them",
        remedy="look at the pairs, at the labels of their tokens (`positions`) and at the target",
    )


def _not_finite(prompts: list[int]) -> NonFiniteError:
    return NonFiniteError(
        f"the gradient of the target at prompts {prompts[:8]} is not finite",
        expected="finite gradients",
        found="NaN or infinity",
        remedy="look at the derivative of the target there, e.g. of a root or a logarithm at 0; run the model in float32 or bfloat16",
    )
