"""Weights between features without any input: decoder rows of one dictionary times encoder rows of a later one (Dunefsky et al. 2024,
arXiv 2406.11944).

Left out is what depends on the input: attention patterns, the denominators of norms, MLPs and other dictionaries in between, and which
features are on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.circuits.linear import norm_formula, norms_of
from steer.errors import SiteError
from steer.features.dictionary import Dictionary, Features
from steer.features.encoder import chosen
from steer.features.feature_edit import check_dictionary, of_one_site
from steer.model.anatomy import Anatomy
from steer.model.capture import evaluating
from steer.model.devices import input_device
from steer.model.own_calls import texts_call
from steer.model.restoring import restoring_all
from steer.model.site import Site

ADDED = ("attn.output", "mlp.output", "mixer.output")  # parts that are added to the residual stream
Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class FeatureWeights:
    """How much features of a dictionary feed features of a later one, per unit of their values.

    Attributes:
        features, receivers: [n], [m] indices in their dictionaries.
        direct: [n, m] fp32 along the residual stream: decoder row times encoder row. Where the later dictionary reads behind a norm, its
            gain is folded in, and the number is divided by the norm's denominator at each token, which is positive.
        heads: by layer, [heads, n, m] fp32, the part that a head moves to a token per unit of its attention to the token of the feature;
            to be divided likewise by the denominator of the norm before attention.

    Example:
        >>> weights = steer.feature_weights(model, dictionary, later_dictionary, [3, 40], [1, 2])
        >>> weights.direct.shape, {layer: heads.shape for layer, heads in weights.heads.items()}  # [n, m]; [heads, n, m]
    """

    features: Tensor
    receivers: Tensor
    direct: Tensor
    heads: dict[int, Tensor]

    def __repr__(self) -> str:
        return f"FeatureWeights({len(self.features)} to {len(self.receivers)} features, heads of {len(self.heads)} layers)"

    def strongest(self, count: int = 10) -> list[tuple[int, int, float]]:
        """(feature, receiver, weight) of the largest direct weights."""
        best = self.direct.abs().flatten().topk(min(count, self.direct.numel())).indices.tolist()
        places = [divmod(place, self.direct.shape[1]) for place in best]
        return [(int(self.features[i]), int(self.receivers[j]), float(self.direct[i, j])) for i, j in places]


def feature_weights(
    model: nn.Module, earlier: Dictionary, later: Dictionary, features: Features, receivers: Features, *, heads: bool = True
) -> FeatureWeights:
    """Weights from features of a dictionary to features of a later one.

    The model runs over a few tokens, to prove which norms lie where and what they compute.

    Args:
        earlier: it writes the residual stream, or something that is added to it.
        later: it reads the residual stream, or the input of an MLP.
        heads: also through the heads of each attention between, one at a time.
        features, receivers: indices in the earlier and in the later dictionary.

    Raises:
        SiteError: dictionaries of other sites, or in the other order. AnatomyError: a norm that is none of those known.

    Example:
        >>> weights = steer.feature_weights(model, dictionary, later_dictionary, [3, 40], [1, 2])
        >>> weights.strongest(2)  # (feature, receiver, weight)
    """
    for dictionary in (earlier, later):
        check_dictionary(dictionary, "feature_weights")
        of_one_site(dictionary, "feature_weights")
    anatomy = Anatomy.find(model)
    wrote, read = (anatomy.point(site).site for site in (earlier.writes[0], later.reads[0]))
    if wrote.part not in ("input", "output", *ADDED) and wrote != Site("embed"):
        raise _not_in_stream(wrote, "writes", ", ".join(("input", "output", *ADDED)))
    if read.part not in ("input", "output", "mlp.input"):
        raise _not_in_stream(read, "reads", "input, output, mlp.input")
    columns, rows = chosen(features, earlier.width), chosen(receivers, later.width)
    written = earlier.decoder_rows(columns) * _scale(anatomy, wrote)  # [n, width], as it is in the stream
    seen = _Trial(anatomy)
    encoder = later.encoder_rows(rows)
    reader, at = _reader(seen, read, encoder)
    if wrote.order >= at:
        raise _not_before(wrote, read)
    paths = _heads(seen, wrote, at, written, reader) if heads else {}
    return FeatureWeights(columns, rows, reader(written), paths)


def _reader(seen: _Trial, read: Site, encoder: Tensor) -> tuple[Linear, tuple[int, int]]:
    """A map from what is in the stream [..., width] to pre-activations [..., m], and the order of the place where the stream is read."""
    if read.part != "mlp.input":
        return lambda h: h @ encoder.mT, read.order
    assert read.layer is not None
    norm, x = seen.before(read.layer, seen.mlp_inputs[read.layer])
    is_parallel = torch.equal(x, seen.inputs[read.layer])  # the MLP reads what attention of its block has not written to yet
    return lambda h: norm(h) @ encoder.mT, (read.layer, 0) if is_parallel else read.order


def _heads(seen: _Trial, wrote: Site, at: tuple[int, int], written: Tensor, reader: Linear) -> dict[int, Tensor]:
    """[heads, n, m] of each layer whose attention reads behind `wrote` and writes before the order `at`."""
    found = {}
    for layer, values in seen.values.items():
        if not (wrote.order <= (layer, 0) and Site("attn.output", layer).order < at):
            continue
        norm, _ = seen.before(layer, values)
        writer = seen.anatomy.writer(layer, "attn")
        heads = writer.heads
        assert heads is not None and (path := heads.path("v")) is not None
        if writer.projection is None or seen.anatomy.post_norm(layer, writer) is not None:
            raise _no_linear_heads(seen.anatomy, layer)
        value = _without_bias(seen.anatomy.module_in_block(layer, path), norm(written))[..., heads.columns("v") or slice(None)]
        grouped = value.unflatten(-1, (heads.n_kv_heads, heads.head_dim)).repeat_interleave(heads.n_heads // heads.n_kv_heads, -2)
        only = grouped.new_zeros(heads.n_heads, len(written), heads.n_heads, heads.head_dim)
        for head in range(heads.n_heads):
            only[head, :, head] = grouped[:, head]
        out = _without_bias(seen.anatomy.module_in_block(layer, writer.projection), only.flatten(2)) * writer.scale
        found[layer] = reader(out)  # [heads, n, m]
    return found


class _Trial:
    """What a pass over a few tokens showed: inputs of blocks, value projections and MLPs, and what norms took and gave.

    Attributes:
        inputs, mlp_inputs, values: by layer, [1, tokens, width].
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.inputs: dict[int, Tensor] = {}
        self.mlp_inputs: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._norms: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}
        size = getattr(anatomy.embedding, "num_embeddings", None) or anatomy.config.vocab_size
        ids = torch.arange(8)[None] * 7 % size
        with restoring_all() as stack:
            self._hook(stack)
            stack.enter_context(evaluating(anatomy.model))
            ids = ids.to(input_device(anatomy.model))
            texts_call(anatomy.model, anatomy)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    def _hook(self, stack: ExitStack) -> None:
        for norm in norms_of(self.anatomy):
            stack.callback(norm.register_forward_hook(self._of_norm).remove)
        for layer, block in enumerate(self.anatomy.blocks):
            self._record(stack, block, self.inputs, layer)
            parts = self.anatomy.parts[layer]
            for writer in parts.attention():
                if writer.heads is not None and (path := writer.heads.path("v")) is not None:
                    self._record(stack, self.anatomy.module_in_block(layer, path), self.values, layer)
            try:
                point = self.anatomy.point(Site("mlp.input", layer))
            except SiteError:
                continue
            self._record(stack, point.module, self.mlp_inputs, layer)

    def _of_norm(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._norms[id(module)] = (module, args[0].detach(), output.detach())

    @staticmethod
    def _record(stack: ExitStack, module: nn.Module, records: dict[int, Tensor], layer: int) -> None:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
            records[layer] = given.detach()

        stack.callback(module.register_forward_pre_hook(record, with_kwargs=True).remove)

    def before(self, layer: int, read: Tensor) -> tuple[Linear, Tensor]:
        """The norm that gave what was read in a block, as a linear map without its denominator, and what it took.

        Raises SiteError: none gave it, since something else lies between.
        """
        for module, x, y in self._norms.values():
            if y.shape == read.shape and torch.equal(y, read):
                return norm_formula(module, x, y).numerator, x
        if torch.equal(read, self.inputs[layer]):
            return lambda h: h, read
        raise _no_norm(self.anatomy, layer)


def _without_bias(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        weight = next(module.parameters())
        x = x.to(weight.device, weight.dtype)
        return (module(x) - module(torch.zeros_like(x))).float().cpu()


def _scale(anatomy: Anatomy, wrote: Site) -> float:
    """What the model multiplies an added part by."""
    if wrote.part not in ADDED:
        return 1.0
    assert wrote.layer is not None
    return float(anatomy.writer(wrote.layer, wrote.part.partition(".")[0]).scale)


# ---- errors


def _not_in_stream(site: Site, verb: str, expected: str) -> SiteError:
    return SiteError(
        f"weights between features are not known for a dictionary that {verb} '{site}'",
        expected=f"a site of the residual stream that the tokens go through: layers.<n>.<{expected}>",
        found=str(site),
        remedy="use feature_circuit, which follows the model on prompts",
    )


def _not_before(wrote: Site, read: Site) -> SiteError:
    return SiteError(
        "the features of one dictionary do not reach those of the other",
        expected=f"an earlier dictionary that writes before '{read}' is read",
        found=f"one that writes '{wrote}'",
        remedy="pass the earlier dictionary first",
    )


def _no_linear_heads(anatomy: Anatomy, layer: int) -> SiteError:
    return SiteError(
        f"heads of layer {layer} of this {anatomy.kind} add nothing linear to the residual stream",
        expected="an output projection with no norm behind it",
        found="a norm behind it, or no projection of its own",
        remedy="leave heads out: feature_weights(..., heads=False)",
    )


def _no_norm(anatomy: Anatomy, layer: int) -> SiteError:
    return SiteError(
        f"what block {layer} of this {anatomy.kind} reads is no norm of its residual stream",
        expected="the output of a norm in the block, or the stream itself",
        found="neither, in a pass over a few tokens",
        remedy="use feature_circuit, which follows the model on prompts",
    )
