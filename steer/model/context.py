"""ForwardContext: what one forward pass says about its tokens, for everything that acts at a site.

Which tokens are padding, prompt, response or generated cannot be read off an activation. It is read off the arguments of the forward pass
(attention mask, labels, position ids, cache) by a pre-hook on each module from the model down to its decoder, once per pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steer.errors import ContextError
from steer.model.cache import OUTSIDE, memory_of, note_pass

Mask = Tensor | bool  # [batch, tokens] bool; True = every token, False = none, known without looking at a tensor

PHASES = ("train", "validate", "generate")
ROLES = ("policy", "reference")
CHAT_ROLES = ("system", "user", "assistant", "tool")
# the arguments of a forward pass that tell tokens apart
SEEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache", "labels", "logits_to_keep")


@dataclass(eq=False)
class ForwardContext:
    """The tokens of one forward pass.

    Attributes:
        batch, tokens: shape of the pass; 0 beside a decoder, where there are no tokens.
        phase: `generate` when a cache is used or built on request, else `train` with gradients, `validate` without. Never from
            `model.training`: GRPO generates in training mode and DPO runs its reference in it.
        role: `reference` when a PEFT model runs with its adapters switched off outside generation, else `policy`.
        decoding: one token per row on top of a cache.
        unclear: the passes so far could be those of assisted decoding, whose candidates cannot be told from a prompt.
        attention: [batch, tokens] bool, False on padding; True when nothing is padded.
        labelled: [batch, tokens] bool, True on response tokens; None when neither labels nor a response mask were given.
        position_ids: [batch or 1, tokens] as given, or None.
        past: tokens in the cache before this pass; a tensor for static caches.
        virtual: how many more the cache holds that are no tokens of any text (prefix tuning).
        padded_past: [batch, cache + tokens or more] the attention mask over all of them, or None.
        outside: the phase in which the prompt of this cache ran, when it was not `generate`.
        kept: the positions that the unembedding sees: all (0), the last so many, or these.
        ids: [batch, tokens] token ids; None when embeddings were given.
        turns: index into `CHAT_ROLES` of the turn that each token belongs to, as announced by `chat_roles`; else None. [batch, tokens]
            where what was announced fits the pass.
        memory: what was worked out on the prompt and holds for the whole generation. It lives on the KV cache and is copied with it, so it
            is mixed up with another batch, call or model no more than the cache itself.
        opened: what gates decided in this pass; `blind` names soft decisions that were made where no gradients are recorded.
        masks: the tokens that each user of this context acts on, worked out once per pass under a name of its own;
            `columns` holds some of them as [batch, tokens, 1] numbers, ready to multiply with.
        sums: [batch, 1, width] of what is added to the only token of a pass, by intervention, where that was worked out in advance.
    """

    batch: int
    tokens: int
    phase: str
    role: str = "policy"
    decoding: bool = False
    unclear: bool = False
    attention: Mask = True
    labelled: Tensor | None = None
    position_ids: Tensor | None = None
    past: Tensor | int = 0
    virtual: int = 0
    padded_past: Tensor | None = None
    outside: str | None = None
    kept: Tensor | int = 0
    device: torch.device | None = None
    ids: Tensor | None = None
    turns: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    opened: dict[str, Tensor] = field(default_factory=dict)
    blind: set[str] = field(default_factory=set)
    masks: dict[str, Mask] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def positions(self) -> Tensor:
        """[batch or 1, tokens]: index of each token in its own text: 0 at the first real token, starting over in every packed segment."""
        ids = self.position_ids
        if ids is not None and self.virtual:
            ids = ids - self.virtual
        if self.padded_past is None:
            return (torch.arange(self.tokens, device=self.device) + self.past)[None] if ids is None else ids
        real = columns_of(self.padded_past.cumsum(1), self.tokens, self.past + self.virtual) - 1 - self.virtual
        return real if ids is None else torch.minimum(real, ids)  # which start over in packed rows, and may count padding

    def remember(self, name: str, fresh: Callable[[], Tensor]) -> Tensor:
        """A tensor with one entry per row that the prompt decides and every later pass of the generation uses.

        Args:
            fresh: works it out from this pass.

        Raises:
            ContextError: the prompt went through the model before anything was attached to it, or cannot be told from what follows.
        """
        self._check_told()
        held = self.memory.get(name)
        if not self.decoding:
            held = self.memory[name] = fresh()
        elif isinstance(self.past, Tensor):  # the first token of a one-token prompt looks like a decoded one
            new = fresh()
            if held is not None:
                held = torch.where(self.past.to(held.device) > 0, held, new)
            elif torch.compiler.is_compiling():
                torch._assert_async(self.past == 0, "the prompt of this cache was not seen: attach before the prompt is run")
                held = new
            elif self.past == 0:
                held = new
            if held is not None:
                self.memory[name] = held
        if held is None or held.shape[0] not in (1, self.batch):
            raise ContextError(
                "the prompt of this generation was not seen",
                expected=f"a cache of {self.batch} rows that was filled while the plan was attached",
                found="a cache from before the attach" if held is None else f"one of {held.shape[0]} rows",
                remedy="run the prompt and the generation with the plan attached, on one cache",
            )
        return held

    @property
    def prompt_length(self) -> Tensor:
        """[batch or 1, 1]: number of prompt tokens of each text of a generation."""
        return self.remember("prompt", lambda: (self.positions * self.real).amax(1, keepdim=True) + 1)

    def kept_of(self, per_token: Tensor, count: int) -> Tensor:
        """[batch, count, ...]: of what there is for each token that for the tokens which the unembedding gets."""
        return per_token[:, self.kept] if isinstance(self.kept, Tensor) else per_token[:, -count:]

    @property
    def starts(self) -> Tensor | None:
        """[batch, tokens]: True where a packed segment (or the row's text) begins; None when nothing is packed."""
        return None if self.position_ids is None else self.real & (self.position_ids == self.virtual)

    def _check_told(self) -> None:
        if self.unclear:
            raise ContextError(
                "given and decoded tokens cannot be told apart in this generation",
                expected="a prompt in one pass (or two, the first from a copied cache), then one token per pass",
                found="passes of several tokens after each other, or a cache that lost some, as in assisted decoding or a prompt in chunks",
                remedy="generate without assistant_model, prompt_lookup_num_tokens and prefill_chunk_size, give a prefix as a deep copy of "
                "its cache, or use scope='all'",
            )

    @property
    def generated(self) -> Mask:
        """[batch, 1] or a constant: tokens that were decoded rather than given. Only meaningful in the phase `generate`."""
        self._check_told()
        if not self.decoding or not isinstance(self.past, Tensor):
            return self.decoding
        return (self.past > 0).view(1, 1).expand(self.batch, 1)

    @property
    def last(self) -> Mask:
        """[batch, tokens]: True on the last real token of each row and of each packed segment."""
        self._check_told()
        if self.decoding:
            return self.attention
        real = self.real
        follows = torch.zeros_like(real)
        follows[:, :-1] = real[:, 1:]
        if self.position_ids is not None:
            follows[:, :-1] &= self.position_ids[:, 1:] != self.virtual
        return real & ~follows

    @property
    def from_end(self) -> Tensor:
        """[batch, tokens]: -1 on the last real token of each row or packed segment, -2 on the one before, ..."""
        index = torch.arange(self.tokens, device=self.device).expand(self.batch, -1)
        last = self.last
        ends = torch.where(last if isinstance(last, Tensor) else self.real, index, self.tokens)
        return index - ends.flip(1).cummin(1).values.flip(1) - 1

    @property
    def real(self) -> Tensor:
        """[batch, tokens] bool: the tokens that are not padding."""
        if isinstance(self.attention, Tensor):
            return self.attention
        return torch.ones(self.batch, self.tokens, dtype=torch.bool, device=self.device)


def index_within(member: Tensor, starts: Tensor | None) -> Tensor:
    """[batch, tokens]: how many members come before each token in its own text.

    Args:
        member: [batch, tokens] bool.
        starts: where texts begin in a packed row, None when each row is one text.
    """
    before = member.long().cumsum(1) - member.long()
    return before if starts is None else before - torch.where(starts, before, 0).cummax(1).values


def in_backward() -> bool:
    """True while autograd runs, that is while gradient checkpointing recomputes a forward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def align(mask: Tensor, batch: int, tokens: int, what: str) -> Tensor:
    """Fits an announced mask to a pass: a narrower one belongs to the right end (GRPO passes the completion's mask only)."""
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] > tokens:
        raise ContextError(
            f"{what} does not fit the forward pass",
            expected=f"[{batch}, {tokens}] or a narrower completion mask",
            found=list(mask.shape),
            remedy="announce the mask of exactly the rows that this forward pass gets",
        )
    return torch.nn.functional.pad(mask, (tokens - mask.shape[1], 0)) if mask.shape[1] < tokens else mask


def turns_of(announced: Tensor, batch: int, tokens: int, past: Tensor | int) -> Tensor:
    """The announced chat roles of a prompt: beams follow their row, and what is in the cache already may be announced with it."""
    if announced.dim() != 2:
        return announced
    if announced.shape[0] and batch % announced.shape[0] == 0:
        announced = announced.repeat_interleave(batch // announced.shape[0], 0)
    return announced[:, past:] if isinstance(past, int) and announced.shape[1] == past + tokens else announced


def columns_of(over_all: Tensor, tokens: int, past: Tensor | int) -> Tensor:
    """The columns of this pass, [batch, tokens], of what there is for cache and pass, or for the whole length of a static cache."""
    width = over_all.shape[1]
    if isinstance(past, int):
        return over_all[:, past : past + tokens] if width > past + tokens else over_all[:, -tokens:]
    if width == tokens:
        return over_all
    return over_all[:, (torch.arange(tokens, device=over_all.device) + past.to(over_all.device)).clamp_max(width - 1)]


def padding(attention_mask: Any, tokens: int, past: Tensor | int) -> Mask:
    """Real tokens of this pass, from a 2-D mask over cache and pass, or from the diagonal of a 4-D mask (static caches get one)."""
    if isinstance(attention_mask, dict):  # one mask per kind of layer; a sliding one may have dropped its oldest columns
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values())))
    if not isinstance(attention_mask, Tensor):
        return True
    if attention_mask.dim() == 2:
        return columns_of(attention_mask, tokens, past).bool()
    if tokens == 1:
        return True
    rows = torch.arange(tokens, device=attention_mask.device)
    diagonal = attention_mask[:, 0, rows, rows + past]
    return diagonal if diagonal.dtype is torch.bool else diagonal == 0


def build(
    given: dict[str, Any],
    announced: Tensor | None,
    reference: bool,
    *,
    turns: Tensor | None = None,
    decoder: bool = True,
    virtual: int = 0,
) -> ForwardContext:
    """Makes the context of one pass.

    Args:
        given: the arguments seen on the way down, the innermost module's winning.
        announced: response mask from `response_tokens`, which wins over labels.
        reference: PEFT adapters are switched off.
        turns: chat roles from `chat_roles`.
        decoder: False for a module beside the decoder, which has no tokens.
        virtual: entries of a cache that are no tokens, see `ForwardContext`.
    """
    cache, labels = given.get("past_key_values"), given.get("labels")
    virtual = virtual if cache is not None else 0
    past = cache.get_seq_length() - virtual if cache is not None else 0
    cached = cache is not None and not (virtual and past == 0) or given.get("use_cache") is True
    generating = cached and labels is None and announced is None
    phase = "generate" if generating else "train" if torch.is_grad_enabled() else "validate"
    role = "reference" if reference and not generating else "policy"
    tensor = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if tensor is None or not decoder:
        return ForwardContext(0, 0, phase, role)
    batch, tokens = tensor.shape[:2]
    announced, turns = (None if one is None else one.to(tensor.device) for one in (announced, turns))
    if isinstance(past, Tensor):
        past = past.clone()  # static caches count up in place while the pass runs
    unclear = generating and not torch.compiler.is_compiling() and note_pass(cache, past, tokens)
    attention_mask, ids = given.get("attention_mask"), given.get("position_ids")
    labelled = None
    if announced is not None:
        labelled = align(announced, batch, tokens, "the announced response mask")
    elif labels is not None and labels.shape == (batch, tokens):  # a classifier's labels are not tokens
        labelled = labels != -100
    decoding = generating and tokens == 1 and not (isinstance(past, int) and past == 0)
    if turns is not None and generating and not decoding:
        turns = turns_of(turns, batch, tokens, past)
    return ForwardContext(
        batch=batch,
        tokens=tokens,
        phase=phase,
        role=role,
        decoding=decoding,
        unclear=unclear,
        attention=padding(attention_mask, tokens, past + virtual),
        labelled=labelled,
        position_ids=ids if isinstance(ids, Tensor) and ids.dim() == 2 else None,
        past=past,
        virtual=virtual,
        outside=getattr(cache, OUTSIDE, None),
        padded_past=attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None,
        kept=given.get("logits_to_keep", 0),
        device=tensor.device,
        ids=given.get("input_ids"),
        turns=turns,
        memory=memory_of(cache) if generating else {},
    )
