"""Interchange interventions (Geiger et al. 2021, arXiv 2106.02997): a subspace of an activation is exchanged for that of another prompt,
and the output compared with what the other prompt's value of a variable should make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steer.checks import integer, of_type, tensor_of, whole_number
from steer.circuits.component_pass import values_at
from steer.circuits.edge_ablation import SiteFunction
from steer.circuits.pairs import Pairs
from steer.circuits.text_passes import TextPasses
from steer.circuits.texts import NO_ROLE, Batch
from steer.errors import ConfigError, WidthError
from steer.intervene.low_rank import orthonormal
from steer.model.anatomy import Anatomy
from steer.model.context import ForwardContext
from steer.model.site import Site


@dataclass(frozen=True, eq=False)
class Interchange:
    """What a model says after an interchange.

    Attributes:
        labels: [pairs] token that it should say. swapped, before: [pairs] token that it says with the swap, and without.
        choices: tokens among which the one with the highest logit is what it says.

    Example:
        >>> found = interchange(model, "layers.12.output", pairs, labels)
        >>> found.accuracy, found.accuracy_before
    """

    labels: Tensor
    swapped: Tensor
    before: Tensor
    choices: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Interchange intervention accuracy: the share of pairs with the label as output."""
        return float((self.swapped == self.labels).double().mean())

    @property
    def accuracy_before(self) -> float:
        """The share of pairs that have it without a swap."""
        return float((self.before == self.labels).double().mean())

    def __repr__(self) -> str:
        return (
            f"Interchange(accuracy {self.accuracy:.3f}, without a swap {self.accuracy_before:.3f}, chance {1 / len(self.choices):.3f}, "
            f"{len(self.labels)} pairs)"
        )


def interchange(
    model: nn.Module,
    site: Site | str,
    pairs: Pairs,
    labels: Sequence[int],
    subspace: Tensor | None = None,
    *,
    choices: Sequence[int] | None = None,
    max_tokens: int = 512,
) -> Interchange:
    """Swaps a subspace at a site: the clean prompts run with what the corrupted ones have there, at tokens with a role.

    Args:
        pairs: clean prompts are the base, corrupted ones the source; `Pairs.of(..., positions=...)` says which tokens are swapped.
        labels: token id that should follow the base with the source's value of the variable, of each pair.
        subspace: [rank, width] rows, made orthonormal here; the whole activation for None.
        choices: token ids among which the model chooses; the different labels for None.
        max_tokens: padded tokens of a batch.

    Raises:
        ConfigError: labels that do not fit the pairs, or are all the same; no token with a role. WidthError: another width. SiteError.

    Example:
        >>> interchange(model, "layers.12.output", pairs, labels).accuracy
    """
    swap = Swap(model, site, pairs, labels, choices, max_tokens=max_tokens)
    if subspace is None:
        return swap.result(range(len(pairs)), None)
    rows = orthonormal(subspace, "the subspace of an interchange")[0].float()  # [rank, width]
    if rows.shape[-1] != swap.width:
        raise _other_width(swap.site, swap.width, rows.shape[-1])
    return swap.result(range(len(pairs)), rows)


class Swap:
    """Runs base prompts with a subspace of the source prompts.

    Attributes:
        site: that is swapped. width: of it. choices: [choices] token ids. labels: [pairs] places of the labels among them.
        source: [pairs] of [tokens, width] what the source prompts have there.
    """

    def __init__(
        self,
        model: nn.Module,
        site: Site | str,
        pairs: Pairs,
        labels: Sequence[int],
        choices: Sequence[int] | None = None,
        *,
        max_tokens: int = 512,
    ) -> None:
        of_type(pairs, Pairs, "the pairs of an interchange", "make them with Pairs.of(model, base, source)")
        self.anatomy = Anatomy.find(model)
        self.site = self.anatomy.point(site).site
        self.choices, self.labels = _choices(labels, choices, len(pairs))
        if not any(bool((roles != NO_ROLE).any()) for roles in pairs.clean.roles):
            raise _no_tokens()
        self.passes = TextPasses(model, self.anatomy, pairs.clean, max_tokens=max_tokens)
        sources = TextPasses(model, self.anatomy, pairs.corrupted, max_tokens=max_tokens)
        found: dict[int, Tensor] = {}
        for prompts in sources.batches(range(len(pairs))):
            batch = sources.batch(prompts)
            h = values_at(sources, batch, [self.site])[self.site]
            for row, prompt in enumerate(prompts):
                found[prompt] = batch.of(row, h).clone()  # [tokens, width]
        self.source = [found[prompt] for prompt in range(len(pairs))]
        self.width = self.source[0].shape[-1]

    def logits(self, prompts: Sequence[int], subspace: Tensor | None, *, swaps: bool = True, gradients: bool = False) -> Tensor:
        """[prompts, choices] fp32 at the last token. subspace: [rank, width] orthonormal rows; the whole activation for None."""
        batch = self.passes.batch(prompts)
        functions = {self.site: SiteFunction(self._function(batch, subspace))} if swaps else {}
        logits = self.passes.run_batch(batch, functions, gradients=gradients, last_token=True)
        assert logits is not None
        return logits[:, -1].float()[:, self.choices.to(logits.device)]

    def _function(self, batch: Batch, subspace: Tensor | None) -> Callable[[Tensor, ForwardContext], Tensor]:
        at = (batch.roles != NO_ROLE).unsqueeze(-1)

        def function(h: Tensor, context: ForwardContext) -> Tensor:
            source = torch.zeros_like(h)
            for row, prompt in enumerate(batch.prompts.tolist()):
                source[row, batch.mask[row].bool()] = self.source[prompt].to(h)
            if subspace is None:
                return torch.where(at.to(h.device), source, h)
            rows = subspace.to(h.device)
            change = ((source - h).to(rows.dtype) @ rows.T) @ rows  # [rows, tokens, width]
            return torch.where(at.to(h.device), h + change.to(h.dtype), h)

        return function

    @torch.no_grad()
    def result(self, prompts: Sequence[int], subspace: Tensor | None, labels: Tensor | None = None) -> Interchange:
        """Of some pairs. labels: [pairs] places among the choices instead of the pairs' own."""
        prompts = list(prompts)
        said = torch.zeros(2, len(prompts), dtype=torch.long)
        for chosen in self.passes.batches(prompts):
            of_batch = [prompts[place] for place in chosen]
            for number, swaps in enumerate((True, False)):
                said[number, chosen] = self.logits(of_batch, subspace, swaps=swaps).argmax(-1).cpu()
        expected = (self.labels if labels is None else labels)[prompts]
        return Interchange(self.choices[expected], self.choices[said[0]], self.choices[said[1]], tuple(self.choices.tolist()))


def _choices(labels: Sequence[int], choices: Sequence[int] | None, count: int) -> tuple[Tensor, Tensor]:
    """[choices] token ids, and [pairs] places of the labels among them. Raises ConfigError."""
    tokens = [integer(token) for token in _listed(labels, "the labels of an interchange")]
    among = sorted(set(tokens)) if choices is None else [integer(token) for token in _listed(choices, "the choices of an interchange")]
    for token in (*tokens, *among):
        whole_number(token, "a label of an interchange")
    if len(tokens) != count:
        raise _other_count(count, len(tokens))
    if len(set(tokens)) < 2:
        raise _one_class(tokens)
    if missing := [token for token in tokens if token not in among]:
        raise _not_among(missing[0], among)
    return torch.tensor(among), torch.tensor([among.index(token) for token in tokens])


def _listed(tokens: Sequence[int] | Tensor, what: str) -> list[int]:
    if isinstance(tokens, Tensor):
        return tensor_of(tokens, what, "pass a list of token ids").tolist()
    of_type(tokens, (list, tuple), what, "pass a list of token ids")
    return list(tokens)


# ---- errors


def _other_width(site: Site, width: int, found: int) -> WidthError:
    return WidthError(f"the subspace does not fit the activation at '{site}'", expected=f"rows of width {width}", found=found,
                      remedy="take a subspace of this site of this model")  # fmt: skip


def _no_tokens() -> ConfigError:
    return ConfigError("no token of the pairs has a role, so that nothing would be swapped", expected="a role at those that are",
                       found="None everywhere", remedy="label them in Pairs.of(..., positions=...)")  # fmt: skip


def _other_count(count: int, found: int) -> ConfigError:
    return ConfigError("the labels do not fit the pairs", expected=f"{count} labels, one for each pair", found=found,
                       remedy="give the token that should follow each base prompt after the swap")  # fmt: skip


def _one_class(labels: Sequence[int]) -> ConfigError:
    return ConfigError("the labels are all of one class, so that any subspace can be right", expected="at least two different labels",
                       found=f"{sorted(set(labels))}", remedy="add pairs whose outputs should differ")  # fmt: skip


def _not_among(label: int, choices: Sequence[int]) -> ConfigError:
    return ConfigError("a label is none of the choices", expected=f"one of {list(choices)[:8]}", found=label,
                       remedy="add it to the choices, or leave them out")  # fmt: skip
