"""Learned feature steering by an adapter: how much there is to be of each feature is read off the token (FSRL, arXiv 2509.12934)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from steer.checks import one_of
from steer.errors import ConfigError
from steer.features.dictionary import Dictionary, Features
from steer.features.encoder import NORMS
from steer.features.feature_edit import FeatureEdit, check_dictionary, distinct
from steer.features.statistics import read_tokens
from steer.intervene.operator import OPERATORS, RowTensors, same_slots, slotted
from steer.model.site import Site
from steer.model.tokens import Row

KINDS = ("gain", "offset")


class AdaptedFeature(NamedTuple):
    """What an adapter does with one feature on texts: by how much its gain differs from 1, or what is added to it, over the tokens."""

    feature: int
    mean: float
    least: float
    most: float


@OPERATORS.register("feature_adapter")
class FeatureAdapter(FeatureEdit):
    """h + strength * sum_j a_j(h) f_j W_j, or with offsets sum_j a_j(h) W_j: learns a linear map a from the token to changes of features.

    a(h) = A x + b, where x is h at the length sqrt(width), so that one learning rate goes with every model. A and b begin at 0, which
    leaves h as it is. A gain changes a feature where it is on; an offset, as in FSRL, also where it is off. `FeatureGains` is the same for
    all tokens, and `steer.features.GainPenalty` keeps changes few or small.

    Args:
        dictionary: an autoencoder of the site that is edited, or a transcoder that writes it.
        features: one index or several.
        kind: `gain` or `offset`.
        adapter, bias: A and b where they begin, [chosen, width] and [chosen], or with row slots in front.

    Raises:
        ConfigError: features that are none or named twice; a dictionary of several sites; matrices of another shape.

    Example:
        >>> learned = steer.Plan(steer.Intervention(steer.FeatureAdapter(dictionary, [5, 7, 40]).train(), dictionary.writes[0]))
        >>> learned.interventions[0].operator.table(model, rows)  # afterwards, the features that it changes most first
    """

    learnable = ("adapter", "bias")
    settings = (*FeatureEdit.settings, "kind")

    def __init__(
        self,
        dictionary: Dictionary,
        features: Features,
        kind: str = KINDS[0],
        *,
        adapter: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        check_dictionary(dictionary, self.name)
        self.kind = one_of(kind, KINDS, "what a feature adapter gives")
        count, width = len(distinct(features, dictionary.width)), dictionary.d_in
        own = {
            "adapter": _checked(adapter, (count, width), "adapter"),
            "bias": _checked(bias, (count,), "bias").unsqueeze(1),
        }
        same_slots(self.name, **own)
        super().__init__(dictionary, features, own, reads=kind == "gain")

    def moved(self, h: Tensor, x: Tensor, factor: Tensor, per_row: RowTensors) -> Tensor:
        return super().moved(h, x, factor, {**per_row, "changes": _changes(x, per_row)})

    def change(self, f: Tensor | None, per_row: RowTensors) -> Tensor:
        changes = per_row["changes"]
        return changes if f is None else changes * f

    def changes(self, h: Tensor) -> Tensor:
        """[..., chosen] a(h): what is added to the gain 1 of each feature, or to the feature. h: [..., width], of the site that is read."""
        return _changes(NORMS[self.norm](h).x, {name: self.tensors[name].to(h.device) for name in self.learnable})

    def table(self, model: nn.Module, rows: Sequence[Row], *, span: str | int = "all") -> list[AdaptedFeature]:
        """Feature by feature what it does on texts, those that it changes most first, by the mean of the absolute changes.

        Args:
            model: without the plan of this operator. rows, span: as of `feature_statistics`.

        Raises:
            As `steer.capture`.
        """
        site = self.reads_at or Site.parse(self.origin["writes"][0])
        h = read_tokens(model, site, rows, span=span, first=self.first, max_norm=self.max_norm)  # [tokens, width]
        with torch.no_grad():
            changes = torch.cat([self.changes(part).cpu() for part in h.split(4096)])  # [tokens, chosen]
        columns = (changes.mean(0).tolist(), changes.amin(0).tolist(), changes.amax(0).tolist())
        order = changes.abs().mean(0).argsort(descending=True, stable=True).tolist()
        return [AdaptedFeature(self.features[place], *(column[place] for column in columns)) for place in order]

    def words(self) -> None:
        return None  # no text holds what it has learned

    def describe(self) -> str:
        return f"{self.kind}s by an adapter of {self.listed()}"


def _checked(given: Tensor | None, shape: tuple[int, ...], what: str) -> Tensor:
    """[slots, *shape] fp32, a copy; zeros when nothing is given."""
    tensor = slotted(torch.zeros(shape) if given is None else given, len(shape) + 1, f"`{what}` of a feature adapter")
    if tuple(tensor.shape[1:]) != shape:
        raise _wrong_shape(what, tensor, shape)
    return tensor


def _changes(x: Tensor, per_row: RowTensors) -> Tensor:
    """[..., tokens, chosen] of x [..., tokens, width]."""
    adapter, bias = per_row["adapter"].to(x.dtype), per_row["bias"].to(x.dtype)
    length = x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / x.shape[-1] ** 0.5
    adapter, bias = (adapter, bias) if x.dim() > 2 else (adapter[0], bias[0])
    return (x / length) @ adapter.mT + bias


# ---- errors


def _wrong_shape(what: str, tensor: Tensor, shape: tuple[int, ...]) -> ConfigError:
    return ConfigError(
        f"`{what}` of a feature adapter has another shape",
        expected=f"{list(shape)}, or row slots in front",
        found=list(tensor.shape),
        remedy="give a row for each feature, in their order",
    )
