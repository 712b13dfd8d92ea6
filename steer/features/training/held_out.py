"""Measures dictionaries on rows that they were not trained on: error, features on, and the loss of the model on reconstructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steer.errors import ConfigError
from steer.features.dictionary import Dictionary
from steer.model import hooks
from steer.model.anatomy import resolve
from steer.model.annotations import response_tokens
from steer.model.capture import evaluating
from steer.model.devices import input_device
from steer.model.own_calls import texts_call
from steer.model.restoring import restoring
from steer.model.site import Site

if TYPE_CHECKING:
    from steer.features.training.passes import Passes

Sums = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Measured:
    """A dictionary as it is measured.

    Attributes:
        mean: [width] of the activations at each site that is written, which take their place when everything is ablated.
        max_norm_written: length above which what is written is an outlier; None for no limit.
    """

    dictionary: Dictionary
    mean: Mapping[Site, Tensor]
    max_norm_written: float | None = None


class HeldOutPass:
    """A few rows of tokens, run once as they are and twice for each dictionary: with reconstructions, and with means.

    Args:
        passes: over the held-out rows.
        number: of the pass.
        counts: its sums are measured; otherwise they are 0.
    """

    def __init__(self, passes: Passes, number: int, *, counts: bool = True) -> None:
        self.passes, self.counts = passes, counts
        self.ids = passes.ids(number).long()  # [rows, context]

    def measure(self, dictionaries: Mapping[str, Measured]) -> dict[str, Sums]:
        """Sums over the tokens of the pass, from which `figures` makes what is reported."""
        clean: dict[Site, Tensor] = {}
        plain = self._loss(reading=clean)
        ablated: dict[Any, Tensor] = {}
        found = {name: self._measure(measured, clean, plain, ablated) for name, measured in dictionaries.items()}
        return found if self.counts else {name: {key: torch.zeros_like(sum) for key, sum in sums.items()} for name, sums in found.items()}

    def _measure(self, measured: Measured, clean: dict[Site, Tensor], plain: Tensor, ablated: dict[Any, Tensor]) -> Sums:
        dictionary = measured.dictionary
        h, target = (_stacked(clean, sites) for sites in (dictionary.reads, dictionary.writes))
        kept = self._kept(dictionary, h, target, measured.max_norm_written)  # [rows, tokens]
        with torch.no_grad():
            f = dictionary.encode(h[kept])
            made = dictionary.decode(f, h[kept])  # [kept, (sites,) width]
            made = made if len(dictionary.writes) > 1 else made.unsqueeze(-2)
            true = target[kept] if len(dictionary.writes) > 1 else target[kept].unsqueeze(-2)
            sums = {"squared_error": (made - true).double().square().sum((0, 2)), "squares": true.double().square().sum((0, 2))}
            sums |= {"sum": true.double().sum(0), "on": (f != 0).sum(0), "tokens": kept.sum(), "predicted": torch.tensor(self._predicted)}
        means = {site: measured.mean[site].to(true.device).expand(len(true), -1) for site in dictionary.writes}
        places = (dictionary.reads, dictionary.writes, dictionary.untrained, measured.max_norm_written)
        if places not in ablated:
            ablated[places] = self._loss(writing=_at(kept, means, clean))
        made_at = {site: made[:, place] for place, site in enumerate(dictionary.writes)}
        replaced = self._loss(writing=_at(kept, made_at, clean))
        return {name: tensor.cpu() for name, tensor in {**sums, "plain": plain, "replaced": replaced, "ablated": ablated[places]}.items()}

    def _kept(self, dictionary: Dictionary, h: Tensor, target: Tensor, longest: float | None) -> Tensor:
        positions = torch.arange(h.shape[1], device=h.device).expand(len(h), -1)
        several = len(dictionary.reads) > 1
        inside = dictionary.untrained.trained_on(h, positions.unsqueeze(-1) if several else positions)
        kept = torch.ones_like(positions, dtype=torch.bool) if inside is None else inside.all(-1) if several else inside
        if longest is not None:
            short = target.norm(dim=-1) <= longest
            kept = kept & (short.all(-1) if len(dictionary.writes) > 1 else short)
        return kept

    @property
    def _predicted(self) -> int:
        """Number of tokens whose loss is summed: those that follow a token on which dictionaries act."""
        first = self.passes.first
        return self.ids[:, first + 1 :].numel()

    def _loss(self, reading: dict[Site, Tensor] | None = None, writing: Mapping[Site, Tensor] | None = None) -> Tensor:
        """Summed cross-entropy of the rows, in nats.

        Args:
            reading: takes the activations [rows, tokens, width] of all sites.
            writing: activations that take the place of the model's.
        """
        sites = self.passes.sites if writing is None else list(writing)
        anatomy, points = resolve(self.passes.model, sites)

        def function(site: Site) -> Any:
            if writing is not None:
                return lambda h, context: writing[site].to(h.device, h.dtype)
            return lambda h, context: reading.__setitem__(site, h.detach().float()) if reading is not None else None

        functions = [(point, function(site)) for point, site in zip(points, sites, strict=True)]
        installation = hooks.Installation(self.passes.model, anatomy, functions)
        ids = self.ids.to(input_device(self.passes.model))
        with restoring(installation.remove):
            installation.install()
            with evaluating(self.passes.model), response_tokens(self.passes.model, torch.ones_like(ids, dtype=torch.bool)):
                output = texts_call(self.passes.model, anatomy)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None:
            raise _no_logits(output)
        first = self.passes.first
        wanted = ids[:, first + 1 :]  # [rows, predicted]
        return nn.functional.cross_entropy(logits[:, first:-1].float().transpose(1, 2), wanted, reduction="sum").double()


def figures(sums: Sums) -> dict[str, float]:
    """What is reported of sums: FVU (mean over the sites), L0, losses in nats a token, and the share of the loss that is recovered."""
    tokens, predicted = float(sums["tokens"]), float(sums["predicted"])
    variance = sums["squares"] - sums["sum"].square().sum(-1) / max(tokens, 1)  # [sites]
    plain, replaced, ablated = (float(sums[name]) / max(predicted, 1) for name in ("plain", "replaced", "ablated"))
    lost = ablated - plain
    return {
        "fvu": float((sums["squared_error"] / variance.clamp_min(1e-12)).mean()),
        "l0": float(sums["on"].sum()) / max(tokens, 1),
        "ce": plain,
        "ce_reconstructed": replaced,
        "ce_ablated": ablated,
        "ce_added": replaced - plain,
        "ce_recovered": (ablated - replaced) / lost if lost > 0 else float("nan"),
        "tokens": tokens,
    }


def _stacked(clean: dict[Site, Tensor], sites: Sequence[Site]) -> Tensor:
    """[rows, tokens, width] of one site, [rows, tokens, sites, width] of several."""
    return clean[sites[0]] if len(sites) == 1 else torch.stack([clean[site] for site in sites], -2)


def _at(kept: Tensor, values: Mapping[Site, Tensor], clean: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    """The clean activations, with values [kept, width] at the tokens that a mask keeps."""
    return {site: clean[site].index_put((kept,), new.to(clean[site].dtype)) for site, new in values.items()}


# ---- errors


def _no_logits(output: object) -> ConfigError:
    remedy = "train dictionaries on the whole language model, not on a part of it"
    return ConfigError("the model gives no logits", expected="an output with logits", found=type(output).__name__, remedy=remedy)
