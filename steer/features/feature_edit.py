"""Edits of features: h + sum_j (f'_j - f_j) W_j, with the error of the dictionary kept.

A decoder is linear. Replacing the reconstruction of h by one with other features, and keeping what the dictionary could not reconstruct,
is therefore the same as adding what those features changed by: every other feature, the bias of the decoder and the error cancel. So a
clamp of a few features reads a few rows, its gradient is that of the formula, and a token whose features stay as they are keeps every bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import linear

from steer.errors import ConfigError, SiteError
from steer.features.activation import ACTIVATIONS, Activation
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.dictionary import Dictionary, Features, probe
from steer.features.edit_autograd import EditFeatures, pre_activations
from steer.features.encoder import NORMS, TILE, Encoder, chosen, is_among
from steer.intervene.low_rank import widened, without_autocast
from steer.intervene.operator import Operator, RowTensors
from steer.intervene.scope import Scope
from steer.kernels import TopFeatures, topk_encode
from steer.kernels.dispatch import needs_pytorch_operations
from steer.model.site import Site

LISTED = 8  # first tokens that a scope names one by one, which leaves its own window movable; more of them are named by a slice
ACTIVATION = "activation_"  # before the names of the activation's tensors


class FeatureEdit(Operator):
    """h + mask * strength * sum_j (f'_j - f_j) W_j over chosen features; a subclass says in `change` what f' - f is.

    It holds the rows and biases of the chosen features and works without the dictionary, in a file too. Top-k kinds and `groupmax` need
    the whole encoder, since the other features decide whether one is on; it is held then. Tokens that the dictionary was not trained on
    are left alone: the first ones of a text by the scope, outliers by their norm.

    Attributes:
        features: which, in the order of the tensors.
        origin: where the dictionary is from, JSON-able.
        activation, activation_settings, norm: of the encoder.
        first, max_norm: see `Untrained`.

    Raises:
        ConfigError: a dictionary or features that it cannot be made of.
    """

    parts: ClassVar[tuple[str, ...]] = ("decoder",)
    settings: ClassVar[tuple[str, ...]] = ("features", "origin", "activation", "activation_settings", "norm", "first", "max_norm")
    linear_in_strength = True

    def __init__(
        self, dictionary: Dictionary, features: Features, own: Mapping[str, Tensor], *, reads: bool = True, whole: bool = False
    ) -> None:
        """
        Args:
            own: tensors of the subclass, [slots, ...].
            reads: f' - f depends on f, so that the encoder is needed.
            whole: `change` is about all features of the dictionary, not the chosen ones.
        """
        check_dictionary(dictionary, self.name)
        source = of_one_site(dictionary, self.name)
        indices = distinct(features, dictionary.width)
        encoder = source.encoder
        self.features = tuple(indices.tolist())
        self.origin = origin_of(dictionary)
        self.activation, self.activation_settings, self.norm = encoder.activation.name, dict(encoder.activation.settings), encoder.norm
        self.first, self.max_norm = dictionary.untrained.first, dictionary.untrained.max_norm
        decoder = source.decoder.all(probe()).clone() if whole else source.decoder_rows(indices)
        tensors = {"decoder": decoder.detach()[None], **own}
        if reads:
            tensors.update(_encoder_tensors(encoder, None if whole else indices))
        super().__init__(tensors, source.d_out)
        self._activation = self._bare_activation()

    def change(self, f: Tensor | None, per_row: RowTensors) -> Tensor:
        """f' - f, [batch, tokens, chosen] or what broadcasts to it.

        Args:
            f: [batch, tokens, chosen] features, fp32 or fp64; None without an encoder.
            per_row: as in `Operator.delta`.
        """
        raise NotImplementedError

    def slope(self, f: Tensor, per_row: RowTensors) -> Tensor | float | None:
        """d change / d f, which broadcasts to f, where it is constant between jumps; None leaves it to autograd, which takes longer."""
        return None

    def apply(self, h: Tensor, strength: Tensor, mask: Tensor | None, per_row: RowTensors) -> Tensor:
        with without_autocast(h):
            wide = widened(h)
            read = widened(per_row["read"]) if "read" in per_row else wide  # of a transcoder, the input of the MLP
            normalised = NORMS[self.norm](read)
            factor = strength if mask is None else strength * mask  # [batch or 1, tokens or 1, 1]
            if normalised.scale is not None and self.reads_at is None:  # the unit in which the features of each token count
                factor = factor * normalised.scale
            if self.max_norm is not None:
                factor = factor * (read.detach().norm(dim=-1, keepdim=True) <= self.max_norm)
            edited = self.moved(wide, normalised.x, factor, per_row)
        return edited if wide is h else edited.to(h.dtype)

    def moved(self, h: Tensor, x: Tensor, factor: Tensor, per_row: RowTensors) -> Tensor:
        """h + factor * (f' - f) W, [batch, tokens, width].

        Args:
            h: [batch, tokens, width] fp32 or fp64. x: what is encoded, with the norm of the dictionary applied.
            factor: [batch or 1, tokens or 1, 1].
        """
        if x is h and h.requires_grad and (edited := self._moved_in_one_node(h, factor, per_row)) is not None:
            return edited
        f = self.encoded(x, per_row) if "encoder" in per_row else None
        change = (factor * self.change(f, per_row)).to(h.dtype).expand(*h.shape[:-1], -1)  # [batch, tokens, chosen]
        rows = per_row["decoder"][0].to(h.dtype)
        return torch.addmm(h.reshape(-1, h.shape[-1]), change.reshape(-1, change.shape[-1]), rows).view(h.shape)

    def _moved_in_one_node(self, h: Tensor, factor: Tensor, per_row: RowTensors) -> Tensor | None:
        """As `moved`, with a gradient that is faster than autograd's; None where autograd is needed.

        That is where something besides h is differentiated, where features depend on each other, and where somebody looks at the
        operations: a compiler, a function transform, a counter.
        """
        if "encoder" not in per_row or "shift" in per_row or "places" in per_row or not torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling() or factor.requires_grad or needs_pytorch_operations(h):
            return None
        if any(tensor.requires_grad for tensor in per_row.values()):
            return None
        activation = self._with_numbers(per_row, h.dtype)
        bias = per_row["encoder_bias"][0].to(h.dtype) if "encoder_bias" in per_row else None
        rows, decoder = (per_row[name][0].to(h.dtype) for name in ("encoder", "decoder"))
        flat = h.reshape(-1, h.shape[-1])
        with torch.no_grad():
            pre = pre_activations(flat, rows, bias).view(*h.shape[:-1], -1)  # [batch, tokens, chosen]
            f = activation(pre)
            slope, of_activation = self.slope(f, per_row), activation.slope(pre, f)
            if slope is None or of_activation is None:
                return None
            change, slope = ((factor * part).to(h.dtype) for part in (self.change(f, per_row), slope * of_activation))
        flat = EditFeatures.apply(flat, *(part.expand(pre.shape).reshape(len(flat), -1) for part in (change, slope)), rows, decoder)
        return flat.view(h.shape)

    def encoded(self, x: Tensor, per_row: RowTensors) -> Tensor:
        """[batch, tokens, chosen] features. x: [batch, tokens, width] with the norm of the dictionary applied."""
        activation = self._with_numbers(per_row, x.dtype)
        rows = per_row["encoder"][0].to(x.dtype)
        bias, shift = (per_row[name][0].to(x.dtype) if name in per_row else None for name in ("encoder_bias", "shift"))
        x = x if shift is None else x - shift
        if "places" not in per_row:
            return activation(linear(x, rows, bias))
        places = per_row["places"][0]
        with torch.no_grad():
            is_on = _is_on(x, rows, bias, activation, places)
        return linear(x, rows[places], None if bias is None else bias[places]) * is_on

    def _with_numbers(self, per_row: RowTensors, dtype: torch.dtype) -> Activation:
        """The activation with its tensors."""
        of_activation = {
            name.removeprefix(ACTIVATION): tensor[0].to(dtype) for name, tensor in per_row.items() if name.startswith(ACTIVATION)
        }
        return self._activation.with_tensors(of_activation)

    @property
    def reads_at(self) -> Site | None:
        return None if self.origin["reads"] == self.origin["writes"] else Site.parse(self.origin["reads"][0])

    def narrowed(self, scope: Scope) -> Scope:
        return without_first(scope, self.first)

    def check_site(self, site: Site) -> None:
        check_written(self.name, self.origin, site)

    def words(self) -> dict[str, Any] | None:
        numbers = self.numbers()
        return None if self.slots > 1 else {**feature_words(self.features), **{name: number_words(n) for name, n in numbers.items()}}

    def numbers(self) -> dict[str, Tensor]:
        """Tensors that the constructor makes of numbers, [slots, 1, chosen] each, by the name of its argument."""
        return {}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> Self:
        restored = super().restore(tensors, options)
        restored._activation = restored._bare_activation()
        return restored

    def _bare_activation(self) -> Activation:
        """The activation without its tensors, which are among those of the operator."""
        kind = ACTIVATIONS.get(self.activation)
        bare = kind.__new__(kind)
        Activation.__init__(bare, None, **self.activation_settings)
        return bare

    def listed(self) -> str:
        """Its features in words."""
        return listed(self.features, self.origin)


def _encoder_tensors(encoder: Encoder, indices: Tensor | None) -> dict[str, Tensor]:
    """What features are computed from, with a slot dimension: their own rows, or all where the others have a say.

    Args:
        indices: [chosen] of the features; None for all.
    """
    is_chosen = encoder.activation.elementwise and indices is not None
    rows = encoder.rows.all(probe()).clone() if indices is None or not is_chosen else encoder.rows.select(indices, probe())
    bias = None if encoder.bias is None else encoder.bias.float()
    of_activation = {name: tensor.float() for name, tensor in encoder.activation.tensors.items()}
    if is_chosen:
        bias = None if bias is None else bias[indices]
        of_activation = {name: tensor if len(tensor) == 1 else tensor[indices] for name, tensor in of_activation.items()}
    tensors = {"encoder": rows, **{ACTIVATION + name: tensor for name, tensor in of_activation.items()}}
    if encoder.shift is not None and is_chosen:  # (x - shift) E^T = x E^T - shift E^T
        shifted = -(rows.double() @ encoder.shift.double())
        bias = (shifted if bias is None else bias.double() + shifted).float()
    elif encoder.shift is not None:
        tensors["shift"] = encoder.shift.float()
    if bias is not None:
        tensors["encoder_bias"] = bias
    if indices is not None and not is_chosen:
        tensors["places"] = indices
    return {name: tensor.detach()[None] for name, tensor in tensors.items()}


def _is_on(x: Tensor, rows: Tensor, bias: Tensor | None, activation: Activation, places: Tensor) -> Tensor:
    """[..., chosen] where whole encoding gives chosen features another number than 0, a few tokens at a time."""
    if activation.top is not None and not torch.compiler.is_compiling():
        pre, indices = topk_encode(x, rows, bias, min(activation.top, len(rows)))
        return is_among(TopFeatures(activation.of_top(pre), indices), places, len(rows))
    tokens = x.reshape(-1, x.shape[-1])
    parts = [activation(linear(part, rows, bias))[:, places] != 0 for part in tokens.split(max(1, TILE // rows.shape[0]))]
    return torch.cat(parts).view(*x.shape[:-1], len(places))


# ---- what constructors make of their arguments


def check_dictionary(dictionary: object, operator: str) -> None:
    """Raises ConfigError for what is no dictionary."""
    if not isinstance(dictionary, Dictionary):
        raise _no_dictionary(dictionary, operator)


def of_one_site(dictionary: Dictionary, operator: str) -> SparseAutoencoder:
    """The dictionary, when it reads one site and writes one: an autoencoder or a transcoder. Raises ConfigError for others."""
    if not isinstance(dictionary, SparseAutoencoder) or len(dictionary.reads) != 1 or len(dictionary.writes) != 1:
        raise _several_sites(dictionary, operator)
    if dictionary.d_in != dictionary.d_out:
        raise _two_widths(dictionary, operator)
    return dictionary


def distinct(features: Features, width: int) -> Tensor:
    """[chosen] indices, at least one and each once. Raises ConfigError."""
    indices = chosen(features, width)
    if len(indices) == 0 or len(indices.unique()) != len(indices):
        raise _not_distinct(indices)
    return indices.cpu()


def origin_of(dictionary: Dictionary) -> dict[str, Any]:
    """Where a dictionary is from, JSON-able, without reading its files."""
    source = dictionary.source
    return {
        "architecture": dictionary.name,
        "width": dictionary.width,
        "reads": [str(site) for site in dictionary.reads],
        "writes": [str(site) for site in dictionary.writes],
        **{name: getattr(source, name) for name in ("format", "place", "revision", "model")},
    }


def without_first(scope: Scope, first: int) -> Scope:
    """The scope without the tokens at the start of a text that a dictionary was not trained on."""
    if not first:
        return scope
    positions = ",".join(map(str, range(first))) if first <= LISTED else f":{first}"
    return scope.without(f"positions[{positions}]")


def check_written(operator: str, origin: Mapping[str, Any], site: Site) -> None:
    """Raises SiteError for a site that the dictionary does not write."""
    if str(site) not in origin["writes"]:
        raise _another_site(operator, origin, site)


def feature_words(features: tuple[int, ...]) -> dict[str, Any]:
    """Features as a text names them."""
    return {"feature": features[0]} if len(features) == 1 else {"features": list(features)}


def number_words(numbers: Tensor) -> float | list[float]:
    """Numbers of features as a text says them: one where all are the same."""
    listed = numbers.flatten().tolist()
    return listed[0] if len(set(listed)) == 1 else listed


def listed(features: tuple[int, ...], origin: Mapping[str, Any]) -> str:
    """Features in words."""
    shown = ", ".join(map(str, features[:6])) + (", ..." if len(features) > 6 else "")
    return f"feature{'s' * (len(features) > 1)} {shown}" + (f" of {origin['place']}" if origin["place"] else "")


# ---- errors


def _no_dictionary(found: object, operator: str) -> ConfigError:
    return ConfigError(
        f"'{operator}' is made of no dictionary",
        expected="a steer.features.Dictionary",
        found=f"{type(found).__name__} {str(found)[:60]!r}",
        remedy="load one with steer.load_dictionary",
    )


def _several_sites(dictionary: Dictionary, operator: str) -> ConfigError:
    return ConfigError(
        f"'{operator}' cannot edit features of this {dictionary.name}",
        expected="a dictionary that reads one site and writes one",
        found=f"one that reads {', '.join(map(str, dictionary.reads))} and writes {', '.join(map(str, dictionary.writes))}",
        remedy="use an autoencoder or a transcoder; the decoder rows of others are steering vectors, see steer.AddDecoder",
    )


def _two_widths(dictionary: Dictionary, operator: str) -> ConfigError:
    return ConfigError(
        f"'{operator}' cannot edit features of a {dictionary.name} whose sites differ in width",
        expected="one width of both sites, as the input and the output of an MLP have",
        found=f"{dictionary.d_in} and {dictionary.d_out}",
        remedy="the decoder rows are steering vectors, see steer.AddDecoder",
    )


def _not_distinct(indices: Tensor) -> ConfigError:
    return ConfigError(
        "features are to be edited together",
        expected="at least one feature, each named once",
        found=indices.tolist()[:20] or "none",
        remedy="name every feature once, with one number for each",
    )


def _another_site(operator: str, origin: Mapping[str, Any], site: Site) -> SiteError:
    return SiteError(
        f"'{operator}' is not for the site '{site}'",
        expected=f"{' or '.join(origin['writes'])}, which the dictionary {origin['place'] or 'in memory'} writes",
        found=str(site),
        remedy="steer that site, or load the dictionary with reads= and writes= if its file names the wrong one",
    )
