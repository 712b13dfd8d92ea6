"""Passes of causal tracing over one prompt: its clean run in row 0, its corrupted runs in the rows behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.edits.tracing.prompts import TracedPrompt
from steer.errors import AnatomyError
from steer.model.anatomy import Anatomy
from steer.model.context import ForwardContext
from steer.model.devices import input_device
from steer.model.hooks import HookFunction, Installation
from steer.model.own_calls import texts_call
from steer.model.prefix import CachedPrefix, empty_prefix, replaced_forwards
from steer.model.restoring import restoring
from steer.model.site import Site

KeysValues = tuple[Tensor, Tensor]  # [1 + samples, heads, tokens, head_dim] each


@dataclass(frozen=True, eq=False)
class Record:
    """The clean and the corrupted runs of a prompt; all tensors have the clean run in row 0.

    Attributes:
        logits: [1 + samples, vocabulary] of the last token.
        values: by site, [1 + samples, tokens, width]: the inputs of all blocks, and what the parts give that are restored or severed.
        keys_values: of every layer; None where they were not asked for.
    """

    logits: Tensor
    values: dict[Site, Tensor]
    keys_values: tuple[KeysValues, ...] | None

    @property
    def samples(self) -> int:
        return len(self.logits) - 1

    def prefix(self, anatomy: Anatomy, tokens: int) -> CachedPrefix:
        """The first tokens of the corrupted runs as a model has read them. Its mask has one row, like a pass over one row that goes on."""
        assert self.keys_values is not None
        empty = empty_prefix(anatomy, 1)
        for layer, (keys, values) in zip(empty.cache.layers if tokens else (), self.keys_values, strict=False):
            layer.update(keys[1:, :, :tokens], values[1:, :, :tokens])
        return CachedPrefix(empty.cache, torch.ones(1, tokens, dtype=torch.long))


class Passes:
    """Runs a prompt and corruptions of it, whole.

    Args:
        sites: whose values a record holds beside the inputs of blocks.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, sites: list[Site]) -> None:
        self.model, self.anatomy, self.sites = model, anatomy, sites
        self.device = input_device(model)
        self._call = texts_call(model, anatomy)

    def clean_logits(self, prompt: TracedPrompt) -> Tensor:
        """[vocabulary] of the last token of the prompt as it is."""
        return self._last_logits(self._call(**self._batch(prompt, 1), use_cache=False), 1)[0]

    def logits(self, prompt: TracedPrompt, corrupted: Tensor, functions: Mapping[Site, HookFunction], cache: Any = None) -> Tensor:
        """[1 + samples, vocabulary] of the last token, in a pass with functions at sites.

        Args:
            corrupted: [samples, subject tokens, width] embeddings of the subject.
            cache: an empty one that the pass fills; None for none.
        """
        rows = 1 + len(corrupted)
        with self.functions_at(functions), self._corrupted(prompt, corrupted):
            output = self._call(**self._batch(prompt, rows), past_key_values=cache, use_cache=cache is not None)
        return self._last_logits(output, rows)

    def record(self, prompt: TracedPrompt, corrupted: Tensor, *, with_cache: bool) -> Record:
        """Both runs of a prompt. with_cache: keys and values too, in a pass that a cache takes part in."""
        values: dict[Site, Tensor] = {}
        inputs = [Site("input", layer) for layer in range(self.anatomy.n_layers)]
        functions = {site: _keeping(values, site) for site in dict.fromkeys([*inputs, *self.sites])}
        if not with_cache:
            return Record(self.logits(prompt, corrupted, functions), values, None)
        cache = empty_prefix(self.anatomy, 1 + len(corrupted)).cache
        kept = _kept_updates(cache)
        logits = self.logits(prompt, corrupted, functions, cache)
        return Record(logits, values, tuple(kept[layer] for layer in range(len(cache.layers))))

    @contextmanager
    def functions_at(self, functions: Mapping[Site, HookFunction]) -> Iterator[None]:
        """Functions at sites, off again on every way out."""
        points = [(self.anatomy.point(site), function) for site, function in functions.items()]
        installation = Installation(self.model, self.anatomy, points)
        with restoring(installation.remove):
            installation.install()
            yield

    @contextmanager
    def _corrupted(self, prompt: TracedPrompt, corrupted: Tensor) -> Iterator[None]:
        """The token embedding gives other values for the subject in all rows but the first. Raises AnatomyError where it is not asked."""
        embedding = self.anatomy.embedding
        assert embedding is not None
        forward, asked = embedding.forward, []

        def embed(*args: Any, **kwargs: Any) -> Tensor:
            embedded = forward(*args, **kwargs)  # [1 + samples, tokens, width]
            if embedded.shape[:2] != (1 + len(corrupted), len(prompt.ids)):
                return embedded
            asked.append(True)
            embedded = embedded.clone()
            embedded[1:, prompt.first : prompt.last + 1] = corrupted.to(embedded)
            return embedded

        with replaced_forwards({embedding: embed}):
            yield
        if not asked:
            raise _not_embedded(self.anatomy)

    def _batch(self, prompt: TracedPrompt, rows: int) -> dict[str, Tensor]:
        ids = torch.tensor([prompt.ids] * rows, device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _last_logits(self, output: Any, rows: int) -> Tensor:
        """[rows, vocabulary]. Raises AnatomyError for a model that gives no logits."""
        logits = getattr(output, "logits", output[0] if isinstance(output, tuple | list) else output)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or len(logits) != rows:
            raise _no_logits(self.anatomy, output)
        return logits[:, -1]


def _keeping(values: dict[Site, Tensor], site: Site) -> HookFunction:
    def keep(h: Tensor, context: ForwardContext) -> None:
        values[site] = h.detach().clone()  # some models add to the stream in place

    return keep


def _kept_updates(cache: Any) -> dict[int, KeysValues]:
    """Keeps the keys and values that a cache is given in its first pass, of all tokens: one of a sliding window would drop some."""
    kept: dict[int, KeysValues] = {}

    def keeping(layer: int) -> Callable[..., KeysValues]:
        def update(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> KeysValues:
            kept[layer] = keys, values
            return keys, values

        return update

    for number, layer in enumerate(cache.layers):
        layer.update = keeping(number)
    return kept


# ---- errors


def _not_embedded(anatomy: Anatomy) -> AnatomyError:
    return AnatomyError(
        f"the token embedding of this {anatomy.kind} was not called with the prompt, so that nothing was corrupted",
        expected="a module that gives an embedding for each token of each row",
        found=type(anatomy.embedding).__name__,
        remedy="say which module embeds the tokens: steer.describe(model, embed=...)",
    )


def _no_logits(anatomy: Anatomy, output: object) -> AnatomyError:
    return AnatomyError(
        f"this {anatomy.kind} gives no logits, from which causal tracing reads the probability of an answer",
        expected="[batch, tokens, vocabulary]",
        found=type(output).__name__,
        remedy="load the model with its language-model head, e.g. AutoModelForCausalLM",
    )
