"""Attention patterns: the weights that each head gives to each token, read layer by layer in one pass and proven there.

The model's own attention runs in its eager form while patterns are read, whatever implementation it has otherwise, since fused ones never
hold the weights. In every batch and layer the weights must add up to 1 over the tokens of the text, and multiplied with the values of the
layer they must give the input of its output projection; what the fused implementation gives for the same texts must be that, too.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steer.circuits.heads.names import Head, attention_layers
from steer.circuits.heads.runs import Keep
from steer.circuits.text_passes import TextPasses
from steer.circuits.texts import Batch, Texts
from steer.errors import AnatomyError
from steer.model.anatomy import Anatomy
from steer.model.block_sites import heads_of
from steer.model.heads import Heads
from steer.model.hook_registration import BEFORE_EDITS
from steer.model.restoring import replaced, restoring_all
from steer.model.resume import StoppedPass
from steer.model.site import Site
from steer.model.stacks import structure_of

# (layer, pattern [rows, heads, tokens, tokens] fp32, batch): rows of a pattern are the tokens that look, columns those looked at; the
# pattern is 0 where either is padding
ReadPattern = Callable[[int, Tensor, Batch], None]
ENTRIES = 2**25  # of one pattern, at most, where a single text does not need more
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # relative, by dtype of the model
COARSE = 0.02  # for halves, in which the model itself rounds its weights
OWN_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}  # of all layers on top of one another, between two implementations
OWN_COARSE = 0.1
FAINT = 0.01  # of the strongest head of the layer
EAGER = "eager"
_CONFIG_KEY = "_attn_implementation_internal"
# by model: what was proven of the eager form, and up to how many tokens
_AGREES: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, int]] = weakref.WeakKeyDictionary()


class PatternReader:
    """Reads the patterns of texts.

    A pattern lives until `read` returns: one layer of one batch is the most that is held, rows * heads * tokens^2 numbers.

    Args:
        layers: those to read, all with attention by default. The pass ends after the last.

    Raises:
        SiteError: the values or the output projection of a layer are not known. AnatomyError: no attention.
    """

    def __init__(self, model: nn.Module, texts: Texts, layers: Sequence[int] | None = None) -> None:
        self.model, self.texts = model, texts
        self.anatomy = Anatomy.find(model)
        self.layers = sorted(set(layers)) if layers is not None else attention_layers(self.anatomy)
        self.heads = {layer: heads_of(self.anatomy, layer) for layer in self.layers}
        for layer in self.layers:
            for part in ("attn.v", "attn.z"):
                self.anatomy.point(Site(part, layer))
        n_heads = max((heads.n_heads for heads in self.heads.values()), default=1)
        self.passes = TextPasses(model, self.anatomy, texts, max_tokens=max(1, ENTRIES // (n_heads * max(texts.lengths))))

    def run(self, read: ReadPattern) -> None:
        """Reads the patterns of all texts.

        Raises:
            AnatomyError: patterns that cannot be proven, or an attention that gives none.
        """
        for numbers in self.passes.batches(range(len(self.texts))):
            batch = self.passes.batch(numbers)
            own = self._own_z(batch)
            kept: dict[Site, Tensor] = {}  # values and z of each layer
            keepers = [Keep(kept, Site("attn.v", layer)) for layer in self.layers]
            keepers += [Keep(kept, Site("attn.z", layer), order=BEFORE_EDITS) for layer in self.layers]
            with self._reading(batch, kept, read, keep_z=own is not None):
                self.passes.run_batch(batch, {keep.site: keep for keep in keepers}, gradients=False)
            if own is not None:
                self._agree(own, kept, batch)

    @contextmanager
    def _reading(self, batch: Batch, kept: dict[Site, Tensor], read: ReadPattern, *, keep_z: bool) -> Iterator[None]:
        """Passes within run in the eager form and hand the weights of each layer to `read`."""
        seen: set[int] = set()

        def hook_of(layer: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                seen.add(layer)
                site = Site("attn.z", layer)
                heads = self.heads[layer]
                shape = (len(batch.ids), heads.n_heads, batch.ids.shape[1], batch.ids.shape[1])
                pattern = _weights_in(self.anatomy, layer, module, output, shape)
                has_sink = isinstance(getattr(module, "sinks", None), Tensor)
                values, z = kept.pop(Site("attn.v", layer)), kept[site] if keep_z else kept.pop(site)
                read(layer, self._proven(layer, pattern, values, z, batch, has_sink=has_sink), batch)
                if layer == self.layers[-1]:
                    raise StoppedPass

            return hook

        with restoring_all() as stack:
            for config in _configs(self.model):
                stack.enter_context(replaced(config, _CONFIG_KEY, EAGER))
            for layer in self.layers:
                module = self.anatomy.module_in_block(layer, self.anatomy.writer(layer, "attn").part)
                if "output_attentions" in inspect.signature(module.forward).parameters:
                    stack.callback(module.register_forward_pre_hook(_ask_for_weights, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(hook_of(layer)).remove)
            yield
        if missing := set(self.layers) - seen:
            raise _did_not_run(self.anatomy, sorted(missing))

    def _proven(self, layer: int, pattern: Tensor, values: Tensor, z: Tensor, batch: Batch, *, has_sink: bool) -> Tensor:
        """The pattern in fp32, without padding. Raises AnatomyError where it is not what the layer mixes its values by."""
        tolerance = TOLERANCE.get(pattern.dtype, COARSE)
        real = batch.mask.bool().to(pattern.device)
        exact = pattern.double() if pattern.dtype == torch.float64 else pattern.float()
        exact = exact * (real[:, None, :, None] & real[:, None, None, :])  # [rows, heads, tokens, tokens]
        sums = exact.sum(-1).transpose(1, 2)[real]  # [real tokens, heads]
        excess = sums - 1
        worst = float((excess if has_sink else excess.abs()).max())
        if not worst <= 10 * tolerance:
            raise _sums_differ(self.anatomy, layer, worst)
        mixed = mixed_values(exact, values.to(exact.dtype), self.heads[layer])
        error, head = _worst_head(mixed[real], z.to(exact.dtype)[real], self.heads[layer])
        if not error <= tolerance:
            raise _unproven(self.anatomy, Head(layer, head), error, tolerance)
        return exact.float()

    def _own_z(self, batch: Batch) -> dict[Site, Tensor] | None:
        """What the model's own implementation gives before W_O; None where it is the eager one, or was compared on texts as long."""
        if all(name == EAGER for name in self._implementations()):
            return None
        if _AGREES.setdefault(self.model, {}).get(self._key(), 0) >= batch.ids.shape[1]:
            return None
        z: dict[Site, Tensor] = {}
        last = self.layers[-1]
        keepers = [Keep(z, Site("attn.z", layer), order=BEFORE_EDITS, stop=layer == last) for layer in self.layers]
        self.passes.run_batch(batch, {keep.site: keep for keep in keepers}, gradients=False)
        return z

    def _agree(self, own: dict[Site, Tensor], eager: dict[Site, Tensor], batch: Batch) -> None:
        for site, expected in own.items():
            real = batch.mask.bool().to(expected.device)
            assert site.layer is not None
            error, head = _worst_head(eager[site].double()[real], expected.double()[real], self.heads[site.layer])
            if not error <= OWN_TOLERANCE.get(expected.dtype, OWN_COARSE):
                raise _other_than_own(self.anatomy, Head(site.layer, head), error)
        _AGREES[self.model][self._key()] = batch.ids.shape[1]

    def _implementations(self) -> tuple[str | None, ...]:
        return tuple(getattr(config, _CONFIG_KEY) for config in _configs(self.model))

    def _key(self) -> Hashable:
        return structure_of(self.model), self._implementations(), tuple(self.layers)


def mixed_values(pattern: Tensor, values: Tensor, heads: Heads) -> Tensor:
    """Values mixed by a pattern, which is what comes before W_O.

    Args:
        pattern: [rows, heads, tokens, tokens]. values: [rows, tokens, key-value heads * head_dim].

    Returns:
        [rows, tokens, heads * head_dim].
    """
    values = values.unflatten(-1, (heads.n_kv_heads, heads.head_dim))
    grouped = pattern.unflatten(1, (heads.n_kv_heads, -1))  # query heads of a group follow one another and share its values
    return torch.einsum("bgrqk,bkgd->bqgrd", grouped, values).flatten(2)


def _worst_head(found: Tensor, expected: Tensor, heads: Heads) -> tuple[float, int]:
    """The largest error of any head, relative to what it puts out, and that head. found, expected: [tokens, heads * head_dim]."""
    of_heads = expected.unflatten(-1, (heads.n_heads, heads.head_dim))
    size = of_heads.norm(dim=(0, 2))  # [heads]
    size = size.clamp_min(max(1e-30, FAINT * float(size.max())))  # rounding is all that a head has that puts out nothing
    errors = (found.unflatten(-1, (heads.n_heads, heads.head_dim)) - of_heads).norm(dim=(0, 2)) / size
    head = int(errors.nan_to_num(float("inf")).argmax())
    return float(errors[head]), head


def _weights_in(anatomy: Anatomy, layer: int, module: nn.Module, output: Any, shape: tuple[int, ...]) -> Tensor:
    """The one tensor of the shape of a pattern in what attention gives."""
    entries = output if isinstance(output, tuple | list) else [output]
    found = [entry for entry in entries if isinstance(entry, Tensor) and entry.shape == shape]
    if len(found) != 1:
        raise _no_weights(anatomy, layer, module, entries, shape)
    return found[0]


def _ask_for_weights(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "output_attentions": True}


def _configs(model: nn.Module) -> list[Any]:
    """Configs that name an implementation of attention, each once."""
    found = {id(config): config for module in model.modules() if hasattr(config := getattr(module, "config", None), _CONFIG_KEY)}
    return list(found.values())


# ---- errors


def _no_weights(anatomy: Anatomy, layer: int, module: nn.Module, entries: Sequence[Any], shape: tuple[int, ...]) -> AnatomyError:
    return AnatomyError(
        f"the attention of block {layer} of this {anatomy.kind} gives no pattern",
        expected=f"a {type(module).__name__} that returns one tensor {list(shape)} beside its output",
        found=[list(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__ for entry in entries],
        remedy="let its forward return the weights after its output, where output_attentions=True asks for them",
    )


def _did_not_run(anatomy: Anatomy, layers: list[int]) -> AnatomyError:
    return AnatomyError(
        f"the attention of this {anatomy.kind} did not run as a module",
        expected="every attention module called once a pass",
        found=f"not so in blocks {layers}",
        remedy="read patterns of the plain model, without a wrapper that calls parts of it",
    )


def _sums_differ(anatomy: Anatomy, layer: int, worst: float) -> AnatomyError:
    return AnatomyError(
        f"the pattern of block {layer} of this {anatomy.kind} cannot be proven",
        expected="weights that add up to 1 over the tokens of the text",
        found=f"sums that are {worst:.3g} off",
        remedy="this attention is no softmax over tokens alone: read 'attn.z' and ablate heads instead of looking at patterns",
    )


def _unproven(anatomy: Anatomy, head: Head, error: float, tolerance: float) -> AnatomyError:
    return AnatomyError(
        f"the pattern of head {head} of this {anatomy.kind} cannot be proven",
        expected=f"pattern @ values = input of the output projection, to {tolerance:g} of its length",
        found=f"{error:.3g} of its length off",
        remedy="this attention does more than mix its values (a gate, a norm of values, dropout, a plan that is attached); "
        "detach plans, or ablate heads instead of looking at patterns",
    )


def _other_than_own(anatomy: Anatomy, head: Head, error: float) -> AnatomyError:
    return AnatomyError(
        f"the eager attention of this {anatomy.kind} is another function than the one that it runs with",
        expected="the same input of the output projection, up to rounding",
        found=f"{error:.3g} of its length off at head {head}",
        remedy="load the model with attn_implementation='eager', whose patterns are then its own",
    )
