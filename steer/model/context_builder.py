"""Construction of a ForwardContext from the arguments of a forward pass, one fact after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steer.errors import ContextError
from steer.model.cache import PROMPT_PHASE, GenerationMemory, cached_tokens, memory_of, note_pass
from steer.model.context import ForwardContext, Mask, PassScratch, columns_of

# the arguments of a forward pass that tell tokens apart
TOKEN_ARGUMENTS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "cache_params",  # what models of state spaces call it
    "use_cache",
    "labels",
    "logits_to_keep",
)


def build_context(
    arguments: dict[str, Any],
    response: Tensor | None,
    *,
    is_reference: bool = False,
    turns: Tensor | None = None,
    virtual: int = 0,
) -> ForwardContext:
    """Makes the context of one pass of a decoder.

    Args:
        arguments: those of `TOKEN_ARGUMENTS` that were seen on the way down to the decoder, the innermost module's winning.
        response: response mask from `response_tokens`, which wins over labels.
        is_reference: PEFT adapters are switched off.
        turns: chat roles from `chat_roles`.
        virtual: number of cache entries that are no tokens, see `ForwardContext`.
    """
    cache = arguments.get("past_key_values")
    virtual = virtual if cache is not None else 0
    past = _cached_tokens(cache, virtual)
    generating = _is_generating(arguments, response, past, virtual)
    phase = _phase(generating)
    role = "reference" if is_reference and not generating else "policy"
    token_tensor = _token_tensor(arguments)
    if token_tensor is None:
        return tokenless_context(phase, role)
    batch, tokens = token_tensor.shape[:2]
    decoding = generating and tokens == 1 and not (isinstance(past, int) and past == 0)
    attention_mask, position_ids = arguments.get("attention_mask"), arguments.get("position_ids")
    return ForwardContext(
        batch=batch,
        tokens=tokens,
        phase=phase,
        role=role,
        decoding=decoding,
        unclear=generating and not torch.compiler.is_compiling() and note_pass(cache, past, tokens),
        attention=_attention(attention_mask, tokens, past + virtual),
        labelled=_response_mask(arguments, response, token_tensor),
        position_ids=position_ids if isinstance(position_ids, Tensor) and position_ids.dim() == 2 else None,
        past=past,
        virtual=virtual,
        full_mask=attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None,
        prompt_phase=getattr(cache, PROMPT_PHASE, None),
        unembedded=arguments.get("logits_to_keep", 0),
        device=token_tensor.device,
        ids=arguments.get("input_ids"),
        turns=_turns(turns, token_tensor, past, is_prompt=generating and not decoding),
        memory=memory_of(cache) if generating else GenerationMemory({}, None, -1),
        scratch=PassScratch({}, {}, {}, set()),
    )


def context_beside_decoder(arguments: dict[str, Any], response: Tensor | None, *, is_reference: bool) -> ForwardContext:
    """The context of a module that is no part of the decoder and has no tokens (a vision tower, an action head)."""
    past = _cached_tokens(arguments.get("past_key_values"), 0)
    generating = _is_generating(arguments, response, past, 0)
    return tokenless_context(_phase(generating), "reference" if is_reference and not generating else "policy")


def tokenless_context(phase: str, role: str = "policy") -> ForwardContext:
    """The context of a pass that says nothing of tokens."""
    return ForwardContext(0, 0, phase, role, memory=GenerationMemory({}, None, -1), scratch=PassScratch({}, {}, {}, set()))


# ---- one fact each


def _cached_tokens(cache: Any, virtual: int) -> Tensor | int:
    if cache is None:
        return 0
    past = cached_tokens(cache) - virtual
    return past.clone() if isinstance(past, Tensor) else past  # static caches count up in place while the pass runs


def _is_generating(arguments: dict[str, Any], response: Tensor | None, past: Tensor | int, virtual: int) -> bool:
    holds_only_prefix = bool(virtual) and isinstance(past, int) and past == 0
    has_cache = arguments.get("past_key_values") is not None and not holds_only_prefix
    return (has_cache or arguments.get("use_cache") is True) and arguments.get("labels") is None and response is None


def _phase(generating: bool) -> str:
    return "generate" if generating else "train" if torch.is_grad_enabled() else "validate"


def _token_tensor(arguments: dict[str, Any]) -> Tensor | None:
    """[batch, tokens, ...]: token ids, or embeddings where there are none."""
    ids = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if ids is None else ids


def _response_mask(arguments: dict[str, Any], response: Tensor | None, token_tensor: Tensor) -> Tensor | None:
    batch, tokens = token_tensor.shape[:2]
    labels = arguments.get("labels")
    if response is not None:
        return _aligned(response.to(token_tensor.device), batch, tokens)
    if labels is not None and labels.shape == (batch, tokens):  # a classifier's labels are not tokens
        return labels != -100
    return None


def _aligned(mask: Tensor, batch: int, tokens: int) -> Tensor:
    """Fits an announced mask to a pass: a narrower one belongs to the right end (GRPO passes the completion's mask only)."""
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] > tokens:
        raise _unfitting_response_mask(mask, batch, tokens)
    missing = tokens - mask.shape[1]
    return torch.nn.functional.pad(mask, (missing, 0)) if missing else mask  # [batch, tokens]


def _turns(turns: Tensor | None, token_tensor: Tensor, past: Tensor | int, *, is_prompt: bool) -> Tensor | None:
    """The chat roles of a pass: beams follow their row, and what is in the cache already may be named with the rest."""
    if turns is None:
        return None
    turns = turns.to(token_tensor.device)
    batch, tokens = token_tensor.shape[:2]
    if not is_prompt or turns.dim() != 2:
        return turns
    if turns.shape[0] and batch % turns.shape[0] == 0:
        turns = turns.repeat_interleave(batch // turns.shape[0], 0)
    return turns[:, past:] if isinstance(past, int) and turns.shape[1] == past + tokens else turns


def _attention(attention_mask: Any, tokens: int, past: Tensor | int) -> Mask:
    """Real tokens of this pass, from a 2-D mask over cache and pass, or from the diagonal of a 4-D mask (static caches get one)."""
    if isinstance(attention_mask, dict):  # one mask per kind of layer; a sliding one may have dropped its oldest columns
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values())))
    if not isinstance(attention_mask, Tensor):
        return True
    if attention_mask.dim() == 2:
        columns = columns_of(attention_mask, tokens, past)
        # decoded tokens are hardly ever padding, which on a CPU costs nothing to know, and saves several operations
        if tokens == 1 and columns.is_cpu and not torch.compiler.is_compiling() and columns.tolist() == [[1]] * len(columns):
            return True
        return columns.bool()
    if tokens == 1:
        return True
    rows = torch.arange(tokens, device=attention_mask.device)
    diagonal = attention_mask[:, 0, rows, rows + past]  # [batch, tokens]
    return diagonal if diagonal.dtype is torch.bool else diagonal == 0


def _unfitting_response_mask(mask: Tensor, batch: int, tokens: int) -> ContextError:
    return ContextError(
        "the announced response mask does not fit the forward pass",
        expected=f"[{batch}, {tokens}] or a narrower completion mask",
        found=list(mask.shape),
        remedy="announce the mask of exactly the rows that this forward pass gets",
    )
