"""Head effects: what changes in a target when heads are ablated, or look elsewhere than they do. A pattern alone explains nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import one_of
from steer.circuits.heads.names import Head, HeadName, head_named, heads_named, is_pair
from steer.circuits.heads.patterns import PatternReader
from steer.circuits.heads.runs import Keep, texts_of
from steer.circuits.targets import Target, target_words
from steer.circuits.text_passes import TextPasses
from steer.circuits.texts import Batch, Prompts, Texts
from steer.errors import ConfigError
from steer.model.anatomy import Anatomy
from steer.model.block_sites import heads_of
from steer.model.context import ForwardContext
from steer.model.hooks import HookFunction
from steer.model.site import Site
from steer.model.tokens import Row

ABLATIONS = ("zero", "mean", "uniform_pattern", "mean_pattern")
OF_PATTERNS = ("uniform_pattern", "mean_pattern")
Group = tuple[Head, ...]  # heads that are ablated together


@dataclass(frozen=True, eq=False)
class HeadEffects:
    """Change of a target when heads are ablated.

    Attributes:
        clean: [texts] fp64, the target of the model as it is.
        changes: by ablation, [groups, texts] fp64: target ablated less clean.
        groups: the heads ablated together in each row.
        facts: target, texts, and those that means were taken over.

    Example:
        >>> effects = steer.head_effects(model, ["18.6", "20.1"], texts, ablations=["zero"])
        >>> effects.changes["zero"].shape  # [groups, texts]
    """

    clean: Tensor
    changes: Mapping[str, Tensor]
    groups: tuple[Group, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def mean(self, ablation: str) -> Tensor:
        """[groups] over texts."""
        return self.changes[one_of(ablation, tuple(self.changes), "the ablation of heads")].mean(1)

    def of(self, head: HeadName) -> dict[str, float]:
        """Mean change over texts by ablation, for a head that was ablated alone. Raises ConfigError for another one."""
        group = (head_named(head),)
        if group not in self.groups:
            raise _not_ablated(group[0], self.groups)
        return {ablation: float(self.mean(ablation)[self.groups.index(group)]) for ablation in self.changes}

    def __str__(self) -> str:
        lines = [f"{self.facts.get('target', 'target')}: {float(self.clean.mean()):.3f}; changes by"]
        for row, group in enumerate(self.groups):
            changes = ", ".join(f"{name.replace('_', ' ')} {float(change[row].mean()):+.3f}" for name, change in self.changes.items())
            lines.append(f"{' '.join(map(str, group))}: {changes}")
        return "\n".join(lines)


def head_effects(
    model: nn.Module,
    heads: Sequence[HeadName | Sequence[HeadName]],
    texts: Prompts,
    target: Target | None = None,
    *,
    ablations: Sequence[str] = ABLATIONS,
    means_from: Prompts | None = None,
    tokenizer: Any = None,
    max_tokens: int = 4096,
) -> HeadEffects:
    """Ablates heads, one after the other, in the whole of every text.

    `zero` takes away what a head puts out before W_O; `mean` puts its mean over tokens there; `uniform_pattern` lets it look at all tokens
    that it can see alike; `mean_pattern` gives it its mean pattern over the texts, by places of both tokens.

    Args:
        heads: names of heads; a list of names within is ablated together.
        target: of the logits [tokens, vocabulary] of one text and its number; by default the mean log-probability of the text's own tokens.
        means_from: texts of the means and the mean patterns, these texts by default. Means of the texts that an ablation is judged on hide
            some of its cost.
        max_tokens: padded tokens of a batch.

    Raises:
        ConfigError: an unknown head or ablation, or too few texts for a mean pattern. AnatomyError: patterns that cannot be proven.

    Example:
        >>> effects = steer.head_effects(model, ["18.6", ["20.1", "20.2"]], texts, target, ablations=["zero", "mean"])
        >>> effects.of("18.6"), effects.mean("mean")  # by ablation; [groups]
    """
    anatomy = Anatomy.find(model)
    groups = tuple(tuple(heads_named(anatomy, [*entry] if isinstance(entry, list) else entry)) for entry in _listed(heads))
    if not groups:
        raise _no_heads()
    for ablation in ablations:
        one_of(ablation, ABLATIONS, "the ablation of heads")
    judged = texts_of(model, texts, tokenizer)
    mean_texts = judged if means_from is None else texts_of(model, means_from, tokenizer)
    if "mean_pattern" in ablations and len(mean_texts) < 2:
        raise _one_text()
    runs = _AblatedRuns(TextPasses(model, anatomy, judged, max_tokens=max_tokens), own_tokens(judged.rows) if target is None else target)
    mean_passes = TextPasses(model, anatomy, mean_texts, max_tokens=max_tokens)
    constants = _Constants(runs.passes, mean_passes, sorted({head for group in groups for head in group}), ablations)
    clean = runs.values(lambda batch: {})
    changes = {
        ablation: torch.stack([runs.values(constants.functions(ablation, group)) for group in groups]) - clean for ablation in ablations
    }
    facts = {
        "target": "log-probability of the text" if target is None else target_words(target),
        "texts": len(judged),
        "means_from": "the same texts" if means_from is None else f"{len(mean_texts)} other texts",
    }
    return HeadEffects(clean, changes, groups, facts)


def own_tokens(rows: Sequence[Row]) -> Target:
    """Target: mean log-probability of a text's own tokens from the second on, in nats. Raises ConfigError for a text of one token."""
    if (shortest := min((len(row.ids) for row in rows), default=2)) < 2:
        raise _too_short(shortest)

    def log_probability_of_the_text(logits: Tensor, prompt: int) -> Tensor:
        ids = torch.tensor(rows[prompt].ids[1:], device=logits.device)
        return logits[:-1].log_softmax(-1).gather(-1, ids[:, None]).mean()

    return log_probability_of_the_text


class _AblatedRuns:
    """Targets of texts while functions are at sites."""

    def __init__(self, passes: TextPasses, target: Target) -> None:
        self.passes, self.target = passes, target
        self.last_token = bool(getattr(target, "at_last_token", False))

    def values(self, functions: Callable[[Batch], Mapping[Site, HookFunction]]) -> Tensor:
        """[texts] fp64. functions: those of a batch."""
        values = torch.zeros(len(self.passes.texts), dtype=torch.float64)
        for numbers in self.passes.batches(range(len(values))):
            batch = self.passes.batch(numbers)
            logits = self.passes.run_batch(batch, functions(batch), gradients=False, last_token=self.last_token)
            assert logits is not None  # no function ends a pass
            values[numbers] = self.passes.values(self.target, batch, logits).double().cpu()
        return values


class _Constants:
    """What takes the place of a head's output or of its pattern."""

    def __init__(self, judged: TextPasses, means_from: TextPasses, heads: Sequence[Head], ablations: Sequence[str]) -> None:
        self.anatomy = judged.anatomy
        self.means: dict[Site, Tensor] = {}  # [heads * head_dim] fp32 by layer
        self.patterns: dict[Head, Tensor] = {}  # [tokens, tokens] fp32, mean over texts
        self.visible: dict[int, list[Tensor]] = {}  # by layer, [tokens, tokens] bool of each text
        if "mean" in ablations:
            self._read_means(means_from, sorted({head.layer for head in heads}))
        if "mean_pattern" in ablations:
            self._read_mean_patterns(judged.model, means_from.texts, heads)
        if "uniform_pattern" in ablations:
            self._read_visible(judged.model, judged.texts, sorted({head.layer for head in heads}))

    def _read_means(self, passes: TextPasses, layers: Sequence[int]) -> None:
        sums: dict[Site, Tensor] = {}
        sites = [Site("attn.z", layer) for layer in layers]
        for numbers in passes.batches(range(len(passes.texts))):
            batch, kept = passes.batch(numbers), dict[Site, Tensor]()
            passes.run_batch(batch, {site: Keep(kept, site, stop=site == sites[-1]) for site in sites}, gradients=False)
            for site, z in kept.items():
                total = z[batch.mask.bool().to(z.device)].double().sum(0)
                sums[site] = sums.get(site, torch.zeros_like(total)) + total
        self.means = {site: (total / sum(passes.texts.lengths)).float() for site, total in sums.items()}

    def _read_mean_patterns(self, model: nn.Module, texts: Texts, heads: Sequence[Head]) -> None:
        most = max(texts.lengths)
        counts = torch.tensor([sum(length > place for length in texts.lengths) for place in range(most)]).clamp_min(1)
        self.patterns = {head: torch.zeros(most, most) for head in heads}

        def read(layer: int, pattern: Tensor, batch: Batch) -> None:
            length = pattern.shape[-1]  # texts are padded at the right, and patterns are 0 there
            for head in heads:
                if head.layer == layer:
                    self.patterns[head][:length, :length] += (pattern[:, head.head].sum(0).cpu()) / counts[:length, None]

        PatternReader(model, texts, [head.layer for head in heads]).run(read)

    def _read_visible(self, model: nn.Module, texts: Texts, layers: Sequence[int]) -> None:
        self.visible = {layer: [torch.empty(0)] * len(texts) for layer in layers}

        def read(layer: int, pattern: Tensor, batch: Batch) -> None:
            seen = (pattern > 0).any(1).cpu()  # [rows, tokens, tokens] a weight may be too small for a number in one head, not in all
            for row, text in enumerate(batch.prompts.tolist()):
                length = texts.lengths[text]
                self.visible[layer][text] = seen[row, :length, :length].clone()

        PatternReader(model, texts, layers).run(read)

    def functions(self, ablation: str, group: Group) -> Callable[[Batch], Mapping[Site, HookFunction]]:
        """The functions that ablate a group, for `_AblatedRuns.values`."""
        layers = {layer: [head for head in group if head.layer == layer] for layer in sorted({head.layer for head in group})}

        def of_batch(batch: Batch) -> Mapping[Site, HookFunction]:
            functions: dict[Site, HookFunction] = {}
            values: dict[Site, Tensor] = {}
            for layer, heads in layers.items():
                if ablation in OF_PATTERNS:
                    functions[Site("attn.v", layer)] = Keep(values, Site("attn.v", layer))
                functions[Site("attn.z", layer)] = self._function(ablation, layer, heads, batch, values)
            return functions

        return of_batch

    def _function(self, ablation: str, layer: int, heads: Sequence[Head], batch: Batch, values: dict[Site, Tensor]) -> HookFunction:
        """Puts something else into the columns of some heads of `attn.z`."""
        layout, site = heads_of(self.anatomy, layer), Site("attn.z", layer)

        def ablate(h: Tensor, ctx: ForwardContext) -> Tensor:
            new = h.clone()
            for head in heads:
                columns = slice(head.head * layout.head_dim, (head.head + 1) * layout.head_dim)
                if ablation == "zero":
                    new[..., columns] = 0
                elif ablation == "mean":
                    new[..., columns] = self.means[site][columns].to(h)
                else:
                    group = head.head // (layout.n_heads // layout.n_kv_heads)  # query heads of a group share its values
                    v = values[Site("attn.v", layer)][..., group * layout.head_dim : (group + 1) * layout.head_dim]
                    new[..., columns] = self._other_pattern(ablation, head, batch).to(h) @ v  # [rows, tokens, head_dim]
            return new

        return ablate

    def _other_pattern(self, ablation: str, head: Head, batch: Batch) -> Tensor:
        """[rows, tokens, tokens], 0 at padding."""
        tokens = batch.ids.shape[1]
        patterns = torch.zeros(len(batch.ids), tokens, tokens)
        for row, text in enumerate(batch.prompts.tolist()):
            length = int(batch.mask[row].sum())
            weights = self.visible[head.layer][text].float() if ablation == "uniform_pattern" else self._mean_pattern(head, length)
            patterns[row, :length, :length] = weights / weights.sum(-1, keepdim=True)
        return patterns

    def _mean_pattern(self, head: Head, length: int) -> Tensor:
        known = len(self.patterns[head])
        if length > known:
            raise _longer_than_means(length, known)
        return self.patterns[head][:length, :length]


def _listed(heads: Any) -> Sequence[Any]:
    return heads if isinstance(heads, list | tuple) and not is_pair(heads) else [heads]


# ---- errors


def _no_heads() -> ConfigError:
    return ConfigError("no attention heads to ablate", expected="at least one, e.g. '23.3'", found="none",
                       remedy="take some of head_scores(model).top('induction')")  # fmt: skip


def _not_ablated(head: Head, groups: Sequence[Group]) -> ConfigError:
    alone = [str(group[0]) for group in groups if len(group) == 1]
    return ConfigError(f"head {head} was not ablated alone", expected=f"one of {', '.join(alone) or 'none'}", found=str(head),
                       remedy="name it among the heads of head_effects")  # fmt: skip


def _one_text() -> ConfigError:
    return ConfigError("a mean pattern over one text is that text's own", expected="at least two texts", found="one",
                       remedy="pass more texts in `means_from`, or leave 'mean_pattern' out of `ablations`")  # fmt: skip


def _too_short(length: int) -> ConfigError:
    return ConfigError("a text is too short for the log-probability of its own tokens", expected="at least two tokens", found=length,
                       remedy="pass longer texts, or a target")  # fmt: skip


def _longer_than_means(length: int, known: int) -> ConfigError:
    return ConfigError("a text is longer than those of the mean pattern", expected=f"at most {known} tokens", found=length,
                       remedy="pass texts in `means_from` that are as long")  # fmt: skip
