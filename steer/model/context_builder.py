"""Construction of a ForwardContext from the arguments of a forward pass, one fact after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steer.errors import ContextError
from steer.model.cache import PROMPT_PHASE, GenerationMemory, cached_tokens, memory_of, note_pass, takes_notes
from steer.model.context import ForwardContext, Mask, PassScratch, columns_of
from steer.model.peft_state import NONE, VirtualTokens

# what a cache is called: by most models, by those of state spaces, and by transformers from 5.24 on (before, that of continuous batching)
CACHE_NAMES = ("past_key_values", "cache_params", "cache")
# the arguments of a forward pass that tell tokens apart -> the one name that each has here
TOKEN_ARGUMENTS = {
    **{name: name for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", "labels", "logits_to_keep")},
    **dict.fromkeys(CACHE_NAMES, "past_key_values"),
}
# those that hold for one stack only: where its own forward has them, what an outer module got under that name is not its own
OWN_ARGUMENTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values")
# what outer modules got instead, which may tell more: ids where embeddings follow, a plain mask where an expanded one follows
OUTER_IDS = "outer input_ids"
OUTER_MASK = "outer attention_mask"


def build_context(
    arguments: dict[str, Any],
    response: Tensor | None,
    *,
    is_reference: bool = False,
    turns: Tensor | None = None,
    virtual: VirtualTokens = NONE,
    image_ids: tuple[int, ...] = (),
) -> ForwardContext:
    """Makes the context of one pass of a decoder.

    Args:
        arguments: those of `TOKEN_ARGUMENTS` that were seen on the way down to the decoder, under the names they have here; the innermost
            module's win.
        response: response mask from `response_tokens`, which wins over labels.
        is_reference: PEFT adapters are switched off.
        turns: chat roles from `chat_roles`.
        virtual: positions before every text that are no tokens of it.
        image_ids: see `ForwardContext`.

    Raises:
        ContextError: a mask that belongs to other tokens than those of this pass.
    """
    cache = arguments.get("past_key_values")
    is_paged = _is_paged(cache)
    if is_paged:
        cache = None  # it belongs to many requests, and says nothing of the tokens of one
    is_uncounted = not takes_notes(cache)
    if is_uncounted:
        cache = None
    leading, in_cache = _virtual_positions(virtual, cache, arguments) if virtual.number else (0, 0)
    past = _cached_tokens(cache, in_cache)
    generating = is_paged or _is_generating(arguments, response, past, in_cache)
    phase = _phase(generating)
    role = "reference" if is_reference and not generating else "policy"
    token_tensor = _token_tensor(arguments)
    if token_tensor is None:
        return tokenless_context(phase, role)
    batch, tokens = token_tensor.shape[:2]
    follows = is_uncounted or not (isinstance(past, int) and past == 0)
    decoding = generating and not is_paged and tokens == 1 and follows
    mask = None if is_paged else _plain_mask(arguments, batch, tokens)
    return ForwardContext(
        batch=batch,
        tokens=tokens,
        phase=phase,
        role=role,
        decoding=decoding,
        unclear=is_uncounted and tokens > 1 or generating and not is_paged and _is_unclear(arguments, cache, past, tokens - leading),
        attention=_attention(mask, tokens, _columns_before(mask, tokens) if is_uncounted else past + in_cache),
        labelled=_response_mask(arguments, response, token_tensor),
        position_ids=_position_ids(arguments),
        past=past,
        is_uncounted=is_uncounted,
        virtual=in_cache,
        leading=leading,
        is_paged=is_paged,
        full_mask=mask if isinstance(mask, Tensor) and mask.dim() == 2 else None,
        prompt_phase=getattr(cache, PROMPT_PHASE, None),
        unembedded=arguments.get("logits_to_keep", 0),
        device=token_tensor.device,
        ids=_ids(arguments, batch, tokens, leading),
        image_ids=image_ids,
        turns=_turns(turns, token_tensor, past, leading, is_prompt=generating and not decoding),
        memory=memory_of(cache) if generating else GenerationMemory({}, None, -1),
        scratch=PassScratch({}, {}, {}, set(), None, False, {}),
    )


def context_beside_decoder(arguments: dict[str, Any], response: Tensor | None, *, is_reference: bool) -> ForwardContext:
    """The context of a module that is no part of the decoder and has no tokens (a vision tower, an action head)."""
    cache = arguments.get("past_key_values")
    past = _cached_tokens(cache, 0) if takes_notes(cache) else 0
    generating = _is_generating(arguments, response, past, 0)
    return tokenless_context(_phase(generating), "reference" if is_reference and not generating else "policy")


def tokenless_context(phase: str, role: str = "policy") -> ForwardContext:
    """The context of a pass that says nothing of tokens."""
    return ForwardContext(0, 0, phase, role, memory=GenerationMemory({}, None, -1), scratch=PassScratch({}, {}, {}, set(), None, False, {}))


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


def _is_paged(cache: Any) -> bool:
    """The cache of continuous batching, whose class is not imported for that in every pass."""
    return type(cache).__name__ == "PagedAttentionCache"


def _virtual_positions(virtual: VirtualTokens, cache: Any, arguments: dict[str, Any]) -> tuple[int, int]:
    """How many of the virtual tokens run through this pass, and how many are in the cache."""
    if virtual.in_cache:
        return 0, virtual.number if cache is not None else 0
    entries = 0 if cache is None else cached_tokens(cache)
    embeds = arguments.get("inputs_embeds")
    if embeds is not None and (isinstance(entries, Tensor) or entries == 0):
        return virtual.number, 0
    return 0, virtual.number if cache is not None else 0


def _is_unclear(arguments: dict[str, Any], cache: Any, past: Tensor | int, tokens: int) -> bool:
    """See `ForwardContext.unclear`. The first pass of assisted decoding has candidates behind the prompt, all of which get logits."""
    if torch.compiler.is_compiling():
        return False
    n_logits = arguments.get("logits_to_keep", 0)
    has_candidates = tokens > 1 and isinstance(n_logits, int) and n_logits > 1
    return note_pass(cache, past, tokens) or has_candidates


def _plain_mask(arguments: dict[str, Any], batch: int, tokens: int) -> Any:
    """The attention mask of the stack; the plain one of an outer module in place of one that was expanded from it."""
    mask = arguments.get("attention_mask")
    follows_cache = arguments.get("past_key_values") is not None
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        outer = arguments.get(OUTER_MASK)
        return outer if outer is not None and _fits(outer, batch, tokens, follows_cache) else mask
    if mask is not None and not _fits(mask, mask.shape[0] if mask.shape[0] == 1 else batch, tokens, follows_cache):
        raise _unfitting_mask(mask, batch, tokens)
    return mask


def _fits(mask: Tensor, rows: int, tokens: int, follows_cache: bool) -> bool:
    """A 2-D mask is that of a pass; nothing but a cache has tokens before those of the pass."""
    return mask.shape[0] == rows and (mask.shape[1] >= tokens if follows_cache else mask.shape[1] == tokens)


def _position_ids(arguments: dict[str, Any]) -> Tensor | None:
    """[batch or 1, tokens]; those of the text where an image has more than one position a token, the first of four."""
    position_ids = arguments.get("position_ids")
    if not isinstance(position_ids, Tensor):
        return None
    if position_ids.dim() == 3 and position_ids.shape[0] == 4:
        return position_ids[0]
    return position_ids if position_ids.dim() == 2 else None


def _ids(arguments: dict[str, Any], batch: int, tokens: int, leading: int) -> Tensor | None:
    """[batch, tokens]: token ids, -1 for a soft prompt; those that an outer module embedded where they fit what it made of them."""
    ids = arguments.get("input_ids")
    if ids is not None:
        return ids
    outer = arguments.get(OUTER_IDS)
    if outer is None or outer.shape != (batch, tokens - leading):
        return None
    return torch.nn.functional.pad(outer, (leading, 0), value=-1) if leading else outer


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


def _turns(turns: Tensor | None, token_tensor: Tensor, past: Tensor | int, leading: int, *, is_prompt: bool) -> Tensor | None:
    """The chat roles of a pass: beams follow their row, and what is in the cache already may be named with the rest."""
    if turns is None:
        return None
    turns = turns.to(token_tensor.device)
    if leading and turns.dim() == 2:
        turns = torch.nn.functional.pad(turns, (leading, 0), value=-1)
    batch, tokens = token_tensor.shape[:2]
    if not is_prompt or turns.dim() != 2:
        return turns
    if turns.shape[0] and batch % turns.shape[0] == 0:
        turns = turns.repeat_interleave(batch // turns.shape[0], 0)
    return turns[:, past:] if isinstance(past, int) and turns.shape[1] == past + tokens else turns


def _columns_before(mask: Any, tokens: int) -> int:
    """Columns of a mask over cache and pass that belong to the cache, where that does not say how much it holds."""
    return mask.shape[1] - tokens if isinstance(mask, Tensor) and mask.dim() == 2 else 0


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


def _unfitting_mask(mask: Tensor, batch: int, tokens: int) -> ContextError:
    return ContextError(
        "the attention mask is not that of this forward pass",
        expected=f"{batch} rows and {tokens} tokens, and those of a cache before them",
        found=list(mask.shape),
        remedy="pass the mask of the tokens that this stack of blocks gets",
    )
