"""Ablation: what takes the place of a component. Zero, a mean over texts, what another prompt gives, or a constant that was learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from steer.circuits.component_pass import written_sites
from steer.circuits.text_overlap import window_hashes
from steer.circuits.text_passes import TextPasses, warn_of_plan
from steer.circuits.texts import NO_ROLE, Positions, Prompts, Texts, rows_of
from steer.errors import ConfigError, WrongModelError
from steer.model.anatomy import Anatomy
from steer.model.fingerprint import differing
from steer.model.site import Site
from steer.model.tokens import rows_hash

ZERO, MEAN, RESAMPLE, OPTIMAL = KINDS = ("zero", "mean", "resample", "optimal")


@dataclass(frozen=True, eq=False)
class Ablation:
    """What takes the place of components.

    Attributes:
        kind: `zero`; `mean` over texts; `resample`, the value on the counterfactual prompt; `optimal`, constants that were learned.
        values: [width] fp32 constants by site, or [positions, width] where prompts align; empty for `zero` and `resample`.
        facts: which texts, how many tokens, JSON-able.

    Example:
        >>> ablation = mean_ablation(model, texts)
        >>> ablation.kind, ablation.values[steer.Site.parse("layers.12.attn.z")].shape  # [width]
    """

    kind: str
    values: Mapping[Site, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def per_position(self) -> bool:
        return any(value.dim() == 2 for value in self.values.values())

    def check_model(self, anatomy: Anatomy) -> None:
        """Raises WrongModelError where its constants are what another model writes; those of a cast copy are taken."""
        known = self.facts.get("model")  # constants of one's own and older files do not say it
        if known is not None and differing(known, found := anatomy.fingerprint()):
            raise _other_model(self.kind, known, found)

    def constants(self) -> Callable[[Site, int], Tensor]:
        """(site, width) -> [width]. Raises ConfigError for `resample`, and for means of positions, which a text of any length lacks."""
        if self.kind == RESAMPLE:
            raise _no_constants(self.kind)
        if self.per_position:
            raise _no_constants("mean per position")

        def constant(site: Site, width: int) -> Tensor:
            if self.kind == ZERO:
                return torch.zeros(width)
            if site not in self.values:
                raise _no_value(site, self.values)
            if self.values[site].shape != (width,):
                raise _other_width(site, width, self.values[site])
            return self.values[site]

        return constant

    def file_form(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Manifest and tensors."""
        return {"kind": self.kind, "facts": self.facts}, {str(site): value for site, value in self.values.items()}

    @classmethod
    def from_file(cls, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Rebuilds it from what `file_form` gave."""
        return cls(manifest["kind"], {Site.parse(name): tensor for name, tensor in tensors.items()}, manifest["facts"])


def zero_ablation() -> Ablation:
    """Components write nothing.

    Example:
        >>> plan = circuit.with_ablation(zero_ablation()).ablation_plan(model)
    """
    return Ablation(ZERO)


def resample_ablation() -> Ablation:
    """Components write what they write on the counterfactual prompt.

    Example:
        >>> evaluation = ComponentEvaluation(model, pairs, target, resample_ablation())
    """
    return Ablation(RESAMPLE)


def mean_ablation(
    model: nn.Module,
    texts: Prompts,
    *,
    tokenizer: Any = None,
    positions: Positions = "sum",
    per_position: bool = False,
    max_tokens: int = 2048,
) -> Ablation:
    """Components write their mean over the tokens of texts.

    The texts should be used neither for choosing the circuit nor for measuring what its ablation costs: constants that were fitted on the
    text of the measurement hide that cost.

    Args:
        positions: see `Texts`; tokens without a role are left out.
        per_position: a mean for each position, of prompts of one length.

    Raises:
        ConfigError: no texts, or with per_position texts of different length, or a position at which no text has a role.

    Example:
        >>> ablated = circuit.with_ablation(mean_ablation(model, other_texts))
        >>> plan = ablated.ablation_plan(model)
    """
    anatomy = Anatomy.find(model)
    warn_of_plan(model, "means are those of")
    rows = rows_of(model, texts, tokenizer)
    passes = TextPasses(model, anatomy, Texts(rows, positions), max_tokens=max_tokens)
    if per_position and len(set(passes.texts.lengths)) > 1:
        raise _different_lengths(passes.texts.lengths)
    sums: dict[Site, Tensor] = {}
    count: int | Tensor = 0
    sites = [site for site in written_sites(anatomy.n_layers, neurons=True) if _has(anatomy, site)]
    for chosen in passes.batches(range(len(passes.texts))):
        batch = passes.batch(chosen)
        is_in = batch.roles != NO_ROLE  # [rows, tokens]

        def add(site: Site, is_in: Tensor = is_in) -> Callable[[Tensor, Any], None]:
            def function(h: Tensor, ctx: Any) -> None:
                weight = is_in.to(h.device, torch.float64).unsqueeze(-1)
                total = (h.double() * weight).sum(0 if per_position else (0, 1)).cpu()
                sums[site] = sums[site] + total if site in sums else total

            return function

        passes.run_batch(batch, {site: add(site) for site in sites}, gradients=False, last_token=True)
        count = count + (is_in.sum(0).unsqueeze(-1).cpu() if per_position else int(is_in.sum()))
    if empty := (torch.as_tensor(count).flatten() == 0).nonzero().flatten().tolist():
        raise _no_tokens_at(empty)
    texts_facts = {"texts": len(rows), "tokens": sum(passes.texts.lengths), "hash": rows_hash(rows), "windows": window_hashes(rows)}
    facts = {**texts_facts, "model": anatomy.fingerprint()}
    return Ablation(MEAN, {site: (total / count).float() for site, total in sums.items()}, facts)


def _has(anatomy: Anatomy, site: Site) -> bool:
    """Neurons are no one tensor in a mixture of experts."""
    return site.part != "mlp.neurons" or anatomy.writer(site.layer or 0, "mlp").projection is not None


# ---- errors


def _other_model(kind: str, known: Any, found: Any) -> WrongModelError:
    return WrongModelError(f"the constants of this {kind} ablation are those of another model", expected=known, found=found,
                           remedy="make them on this model, e.g. mean_ablation(model, texts)")  # fmt: skip


def _no_constants(kind: str) -> ConfigError:
    return ConfigError(
        f"ablation '{kind}' has no constant that a text of any length could take",
        expected="zero, mean or optimal ablation, one vector for each site",
        found=kind,
        remedy="ablate to a mean over texts: circuit.with_ablation(mean_ablation(model, texts))",
    )


def _no_value(site: Site, known: Mapping[Site, Tensor]) -> ConfigError:
    return ConfigError(f"the ablation has no constant for '{site}'", expected=f"one of {len(known)} sites", found=str(site),
                       remedy="make it with mean_ablation on the same model")  # fmt: skip


def _other_width(site: Site, width: int, found: Tensor) -> ConfigError:
    return ConfigError(f"the constant of the ablation for '{site}' is that of another model", expected=[width], found=list(found.shape),
                       remedy="make it with mean_ablation on the same model")  # fmt: skip


def _different_lengths(lengths: list[int]) -> ConfigError:
    return ConfigError(
        "means per position need prompts that align",
        expected="prompts of one length",
        found=f"{min(lengths)} to {max(lengths)} tokens",
        remedy="leave out per_position, or use prompts of one template",
    )


def _no_tokens_at(positions: list[int]) -> ConfigError:
    return ConfigError("there is no mean at a position where no token has a role", expected="a role for some token of each position",
                       found=f"none at {positions[:8]}", remedy="give labels there in `positions`, or leave out per_position")  # fmt: skip
