"""Self-debiasing (Schick, Udupa and Schütze 2021, arXiv 2103.00453, section 3): at decoding, words that a prefix describing the bias makes
likelier are made less likely.

p'(w | x) is proportional to a(p(w | x) - p(w | prefix x)) p(w | x), with a(d) = 1 for d >= 0 and max(epsilon, exp(decay d)) below.
Nothing of the model's activations or weights is edited, so it costs a second pass for every token.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from steer.bias.debiasing import MITIGATIONS, Mitigation
from steer.bias.mitigation._common_start import CommonStart
from steer.bias.mitigation._prefix import Prefix, checked_mask, places_of
from steer.checks import finite_number, number_within, of_type
from steer.errors import ConfigError, ContextError
from steer.model.anatomy import Anatomy
from steer.model.restoring import restoring

PREFIX = "The following text discriminates against people because of their gender:\n"


@MITIGATIONS.register("self_debias")
def self_debias(
    model: nn.Module, texts: None, tokenizer: Any, *, prefix: str = PREFIX, decay: float = 50.0, epsilon: float = 0.01
) -> SelfDebias:
    """Self-debiasing at decoding: words that a prefix describing the bias makes likelier become less likely.

    Args:
        texts: none; the method is fitted on no text.
        prefix: describes the bias, and comes before every text.
        decay: how fast probability falls with the difference that the prefix makes.
        epsilon: the least factor on a probability; 0 for none.

    Raises:
        ConfigError: texts, no prefix, a model with an encoder, or numbers out of range.
    """
    if texts is not None:
        raise _texts_given()
    of_type(prefix, str, "the prefix of self_debias", "describe the bias as text")
    finite_number(decay, "`decay` of self_debias")
    number_within(decay, "`decay` of self_debias", 0)
    number_within(epsilon, "`epsilon` of self_debias", 0, 1)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise _has_encoder(model)
    tokens = Prefix.of(tokenizer, prefix)
    facts = {
        "method": "self_debias",
        "model": Anatomy.find(model).fingerprint(),
        "prefix": prefix,
        "prefix_sha256": hashlib.sha256(json.dumps(tokens.ids).encode()).hexdigest(),
        "decay": decay,
        "epsilon": epsilon,
    }
    pad = getattr(tokenizer, "pad_token_id", None)
    return SelfDebias(name="self_debias", facts=facts, model=model, prefix=tokens, decay=decay, epsilon=epsilon, pad=pad)


@dataclass(frozen=True, eq=False, kw_only=True)
class SelfDebias(Mitigation):
    """Self-debiasing with one prefix: `acting` for scores of whole texts and of next tokens, `logits_processor` for `generate`."""

    model: nn.Module = field(repr=False)
    prefix: Prefix = field(repr=False)
    decay: float
    epsilon: float
    pad: int | None = field(repr=False)

    def describe(self) -> str:
        return f"Self-Debias, decay {self.decay:g}, prefix {self.facts['prefix'].strip()!r}"

    def rescaled(self, logits: Tensor, biased: Tensor) -> Tensor:
        """Logits whose softmax is p'. logits, biased: [..., vocabulary], of the text alone and behind the prefix; up to a constant."""
        less = (logits.float().softmax(-1) - biased.float().softmax(-1)).clamp(max=0)  # 0 where the prefix makes a word no likelier
        log_factor = self.decay * less  # the logarithm of exp(decay d), and of epsilon where that is more
        return logits + (log_factor.clamp(min=math.log(self.epsilon)) if self.epsilon else log_factor).to(logits.dtype)

    @contextmanager
    def acting(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model whose logits are those of self-debiasing, at every token of a pass that has no cache; padding at either side.

        Raises:
            ContextError: a pass with a cache (`generate` takes `logits_processor`), with labels, with embeddings in place of tokens,
                without logits, or with an attention mask that is not [batch, tokens].
        """
        second = _SecondPass(self)
        with restoring(lambda: handle.remove()):
            handle = model.register_forward_hook(second, with_kwargs=True)
            yield model
        if not second.passes:
            warnings.warn("self_debias was in force, and no pass went through the model that it was put on", stacklevel=3)

    def logits_processor(self, attention_mask: Tensor | None = None) -> SelfDebiasProcessor:
        """A processor for one call of `model.generate(..., logits_processor=[processor])`, greedy, sampling or with beams.

        Args:
            attention_mask: [prompts, tokens] of the batch, as `generate` gets it; needed where prompts are padded.

        Raises:
            ContextError: a mask that is padded at the right.
        """
        return SelfDebiasProcessor(self, attention_mask)


class _SecondPass:
    """Forward hook on the whole model: runs it once more behind the prefix, and rescales the logits.

    Attributes:
        passes: how many it has rescaled.
    """

    def __init__(self, mitigation: SelfDebias) -> None:
        self.mitigation = mitigation
        self.passes = 0
        self._is_second = False
        self._behind = CommonStart(self)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._is_second:
            return None
        ids = _tokens_of(kwargs.get("input_ids", args[0] if args else None), kwargs, output)
        mask = checked_mask(ids, kwargs.get("attention_mask"))
        kept = output.logits.shape[1]  # as many tokens as the caller wants logits of, the last ones
        new_ids, new_mask, starts = self.mitigation.prefix.insert(ids, mask)
        self._is_second = True
        try:
            biased = self._behind.logits(model, new_ids, new_mask, kept)
        finally:
            self._is_second = False
        places = torch.arange(ids.shape[1], device=ids.device)[-kept:]
        is_text = (mask[:, -kept:] > 0) & (places >= starts[:, None])  # [batch, kept]
        output.logits = torch.where(is_text[..., None], self.mitigation.rescaled(output.logits, biased), output.logits)
        self.passes += 1
        return output


class SelfDebiasProcessor(LogitsProcessor):
    """Self-debiasing in `generate`. It has a cache of its own for the texts behind the prefix, and follows the beams.

    Args:
        mitigation: what is fitted.
        attention_mask: [prompts, tokens]; None where no prompt is padded.
    """

    def __init__(self, mitigation: SelfDebias, attention_mask: Tensor | None = None) -> None:
        if attention_mask is not None:
            checked_mask(attention_mask, attention_mask)
            if not bool(attention_mask[:, -1].all()):
                raise _padded_right()
        self.mitigation = mitigation
        self.attention_mask = attention_mask
        self._seen: Tensor | None = None  # [rows, tokens] of the last call
        self._mask = torch.empty(0)  # [rows, prefix + tokens] of the texts in the cache
        self._cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of the next token, [rows, vocabulary]; rows are prompts, times beams or returned sequences. input_ids: [rows, tokens]."""
        with torch.no_grad():
            parents = self._parents(input_ids)
            biased = self._restart(input_ids) if parents is None else self._step(input_ids, parents)
        self._seen = input_ids.clone()
        return self.mitigation.rescaled(scores, biased.to(scores.device))

    def _parents(self, ids: Tensor) -> Tensor | None:
        """[rows] which row of the last call each row goes on from; None where a row goes on from none of its own prompt, or nothing is
        cached."""
        seen = self._seen
        if seen is None or self._cache is None or ids.shape != (seen.shape[0], seen.shape[1] + 1):
            return None
        same_text = (ids[:, None, :-1] == seen[None]).all(-1)  # [rows, rows of before]
        prompt = torch.arange(len(ids), device=ids.device) // self._rows_per_prompt(len(ids))
        matches = same_text & (prompt[:, None] == prompt[None])
        return matches.long().argmax(1) if bool(matches.any(1).all()) else None

    def _rows_per_prompt(self, rows: int) -> int:
        prompts = 1 if self.attention_mask is None else len(self.attention_mask)  # without padding, equal tokens are equal texts
        return rows // prompts

    def _restart(self, ids: Tensor) -> Tensor:
        """[rows, vocabulary] from a pass over the whole texts."""
        new_ids, self._mask, _ = self.mitigation.prefix.insert(ids, self._mask_of(ids))
        return self._pass(new_ids, places_of(self.mitigation.model, self._mask), None)

    def _step(self, ids: Tensor, parents: Tensor) -> Tensor:
        """[rows, vocabulary] from a pass over the last tokens alone."""
        if not torch.equal(parents, torch.arange(len(parents), device=parents.device)):
            self._cache.reorder_cache(parents)
            self._mask = self._mask[parents]
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], 1)
        places = {name: of_all[:, -1:] for name, of_all in places_of(self.mitigation.model, self._mask).items()}
        return self._pass(ids[:, -1:], places, self._cache)

    def _pass(self, ids: Tensor, places: dict[str, Tensor], cache: Any) -> Tensor:
        output = self.mitigation.model(input_ids=ids, attention_mask=self._mask, past_key_values=cache, use_cache=True, **places)
        self._cache = getattr(output, "past_key_values", None)  # without one, every step is a pass over the whole texts
        return output.logits[:, -1]

    def _mask_of(self, ids: Tensor) -> Tensor:
        """[rows, tokens] attention mask of texts at any step. Raises ContextError where it cannot be the batch that was announced."""
        pad, mask = self.mitigation.pad, self.attention_mask
        if mask is None:
            if pad is not None and bool((ids[:, 0] == pad).any()):
                raise _mask_needed()
            return torch.ones_like(ids)
        prompts, tokens = mask.shape
        if len(ids) % prompts or ids.shape[1] < tokens:
            raise _other_batch(mask, ids)
        rows = mask.to(ids.device).long().repeat_interleave(len(ids) // prompts, 0)
        if pad is not None and bool(((ids[:, :tokens] != pad) & (rows == 0)).any()):
            raise _other_batch(mask, ids)
        return torch.cat([rows, torch.ones_like(ids[:, tokens:])], 1)


def _tokens_of(ids: Any, kwargs: dict[str, Any], output: Any) -> Tensor:
    """[batch, tokens] ids of a pass. Raises ContextError where its logits cannot be rescaled."""
    if not isinstance(ids, Tensor) or kwargs.get("inputs_embeds") is not None:
        raise _refused("embeddings in place of tokens", "pass input_ids")
    if kwargs.get("past_key_values") is not None:
        raise _refused(
            "a cache", "outside `acting`, give `generate` the fitted.logits_processor(attention_mask); score with use_cache=False"
        )
    if kwargs.get("labels") is not None:
        raise _refused("labels, whose loss is that of the model alone", "take the loss from the logits yourself")
    if isinstance(kwargs.get("logits_to_keep"), Tensor):
        raise _refused("logits at chosen tokens", "pass a number as logits_to_keep")
    if not isinstance(getattr(output, "logits", None), Tensor):
        raise _refused(f"an output without logits, {type(output).__name__}", "call the language model with return_dict=True")
    return ids


# ---- errors


def _texts_given() -> ConfigError:
    return ConfigError(
        "self_debias is fitted on no texts", expected="texts=None", found="some", remedy="leave them out, and describe the bias in `prefix`"
    )


def _has_encoder(model: nn.Module) -> ConfigError:
    return ConfigError(
        "self_debias needs a decoder alone",
        expected="a model that reads its prompt and goes on with it",
        found=f"{type(model).__name__}, which has an encoder",
        remedy="use a mitigation that is a plan",
    )


def _refused(found: str, remedy: str) -> ContextError:
    return ContextError(
        "self_debias cannot rescale the logits of this pass", expected="a pass over whole texts", found=found, remedy=remedy
    )


def _padded_right() -> ContextError:
    return ContextError(
        "prompts of `generate` are padded at the right",
        expected="padding at the left, so that every row goes on at its end",
        found="an attention mask that ends in 0",
        remedy="set tokenizer.padding_side = 'left'",
    )


def _mask_needed() -> ContextError:
    return ContextError(
        "self_debias does not know which tokens of the prompts are padding",
        expected="the attention mask of the batch",
        found="a row that begins with the pad token, and no mask",
        remedy="fitted.logits_processor(batch['attention_mask'])",
    )


def _other_batch(mask: Tensor, ids: Tensor) -> ContextError:
    return ContextError(
        "this logits processor was made for another batch",
        expected=f"prompts like those of its mask, {list(mask.shape)}, times beams or returned sequences",
        found=f"tokens {list(ids.shape)}" + (", with text where the mask has padding" if ids.shape[1] >= mask.shape[1] else ""),
        remedy="make a processor for each batch: fitted.logits_processor(batch['attention_mask'])",
    )
