"""ForwardContext: what one forward pass says about its tokens, for everything that acts at a site.

An activation does not say which tokens are padding, prompt, response or generated. The arguments of the forward pass do (attention mask,
labels, position ids, cache); `steer.model.context_builder` reads them once per pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from steer.errors import ContextError
from steer.model.cache import GenerationMemory

Mask = Tensor | bool  # [batch, tokens] bool; True = every token, False = none, known without looking at a tensor

PHASES = ("train", "validate", "generate")
ROLES = ("policy", "reference")
CHAT_ROLES = ("system", "user", "assistant", "tool")


class Decision(NamedTuple):
    """What a gate decided in a pass.

    Attributes:
        opened: [batch, tokens or 1, 1] from 0 to 1, how far the gate is open.
        closed: [batch, tokens or 1, 1] how far it is closed; None for 1 - opened. Both are 0 where there was no token to decide by, so
            that the negation of such a gate does not open.
    """

    opened: Tensor
    closed: Tensor | None = None


@dataclass(eq=False)
class PassScratch:
    """Scratch space of one forward pass: what was worked out in it and is needed again before it ends.

    Attributes:
        masks: token mask of every scope that was asked for, by the key of the scope's user.
        weights: [batch, tokens, 1] such masks as factors, faded where the scope fades.
        decisions: what gates decided, by name.
        without_gradient: names of soft decisions that were made where no gradients are recorded.
        positions: [batch or 1, tokens] see `ForwardContext.positions`.
        lengths_noted: the length of every text was noted on the cache in this pass.
        readings: activations that edits at later sites depend on, by name.
    """

    masks: dict[str, Mask] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    decisions: dict[str, Decision] = field(default_factory=dict)
    without_gradient: set[str] = field(default_factory=set)
    positions: Tensor | None = None
    lengths_noted: bool = False
    readings: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ForwardContext:
    """Facts about the tokens of one forward pass.

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
        past: number of tokens in the cache before this pass; a tensor for static caches.
        is_uncounted: a cache of an unknown kind holds it is not known how many tokens before this pass.
        virtual: number of cache entries before every text that are no tokens of it (prefix tuning, soft prompts of an earlier pass).
        leading: number of positions at the start of this pass that are none either (a soft prompt).
        is_paged: continuous batching: one row with tokens of many requests, some of their prompts, some decoded.
        full_mask: [batch, cache + tokens or more] attention mask over cache and pass, or None.
        prompt_phase: phase in which the prompt of this cache ran, when it was not `generate`.
        unembedded: positions that the unembedding sees: all (0), the last so many, or these.
        device: of the token ids; None beside a decoder.
        ids: [batch, tokens] token ids; None when embeddings were given.
        image_ids: token ids that stand for images in the text; () for a model that reads none.
        turns: [batch, tokens] index into `CHAT_ROLES` of the turn that each token belongs to, from `chat_roles`; else None.
        memory: what the prompt decided for the whole generation. It lives on the KV cache and is copied with it, so that two generations
            are mixed up no more than their caches are.
        scratch: scratch space of this pass.
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
    is_uncounted: bool = False
    virtual: int = 0
    leading: int = 0
    is_paged: bool = False
    full_mask: Tensor | None = None
    prompt_phase: str | None = None
    unembedded: Tensor | int = 0
    device: torch.device | None = None
    ids: Tensor | None = None
    image_ids: tuple[int, ...] = ()
    turns: Tensor | None = None
    memory: GenerationMemory = field(default_factory=GenerationMemory)
    scratch: PassScratch = field(default_factory=PassScratch)

    # ---- where tokens stand in their texts

    @property
    def positions(self) -> Tensor:
        """[batch or 1, tokens]: index of each token in its own text: 0 at the first real token, starting over in every packed segment."""
        scratch = self.scratch
        if scratch.positions is None:
            scratch.positions = self._positions()
        return scratch.positions

    def _positions(self) -> Tensor:
        if self.is_uncounted:
            raise _unknown_cache()
        position_ids = self.position_ids
        before_text = self.virtual + self.leading
        if position_ids is not None and before_text:
            position_ids = position_ids - before_text
        counts = self._position_ids_count
        if self.full_mask is None:
            if position_ids is not None:
                return position_ids if counts is None else torch.where(counts, position_ids, self._places)
            if isinstance(self.attention, Tensor):
                raise _unknown_positions()
            return self._places
        length = self.memory.length_before(self.past) if self.decoding and isinstance(self.past, int) else None
        if length is not None and length.shape[0] == self.batch:
            counted = length + self.attention - 1  # [batch, 1]
        else:
            counted = columns_of(self.full_mask.cumsum(1), self.tokens, self.past + self.virtual) - 1 - before_text
        if position_ids is None:
            return counted
        # position ids start over in packed rows, and may count padding
        return (
            torch.minimum(counted, position_ids) if counts is None else torch.where(counts, torch.minimum(counted, position_ids), counted)
        )

    @property
    def _places(self) -> Tensor:
        """[1, tokens]: index of each token in cache and pass."""
        return (torch.arange(self.tokens, device=self.device) + self.past - self.leading)[None]

    @property
    def _position_ids_count(self) -> Tensor | None:
        """[batch or 1, 1]: rows whose position ids tell tokens apart; None where all do. Some models give the same for all tokens."""
        position_ids = self.position_ids
        if position_ids is None or self.tokens == 1:
            return None
        return (position_ids != position_ids[:, :1]).any(1, keepdim=True)

    @property
    def starts(self) -> Tensor | None:
        """[batch, tokens]: True where a packed segment (or the row's text) begins; None when nothing is packed."""
        if self.position_ids is None:
            return None
        real, counts = self.real, self._position_ids_count
        starts = self.position_ids == self.virtual + self.leading
        return real & (starts if counts is None else torch.where(counts, starts, real.cumsum(1) == 1))

    @property
    def in_text(self) -> Mask:
        """[1, tokens] bool or True: the positions that a text may have, those of a soft prompt left out."""
        return torch.arange(self.tokens, device=self.device)[None] >= self.leading if self.leading else True

    def __repr__(self) -> str:
        return f"ForwardContext({self.batch} x {self.tokens} tokens, {self.phase}, {self.role})"

    @property
    def real(self) -> Tensor:
        """[batch, tokens] bool: the tokens of the texts, without padding and soft prompts."""
        real = self.attention
        if not isinstance(real, Tensor):
            real = torch.ones(self.batch, self.tokens, dtype=torch.bool, device=self.device)
        return real & self.in_text if self.leading else real

    @property
    def last(self) -> Mask:
        """[batch, tokens]: True on the last real token of each row and of each packed segment."""
        self.check_generation_is_clear()
        if self.decoding:
            return self.attention
        real = self.real
        return real & (self._real_tokens_after(real) == 0)

    def _real_tokens_after(self, real: Tensor) -> Tensor:
        """[batch, tokens]: how many tokens of the same text follow; a mask may have holes, so the next one may stand further on."""
        starts = self.starts
        after = real.flip(1).long().cumsum(1).flip(1) - real.long()  # in the whole row
        if starts is None:
            return after
        index = torch.arange(self.tokens, device=self.device)
        following = torch.where(starts, index, self.tokens).roll(-1, 1)  # [batch, tokens]
        following[:, -1] = self.tokens
        next_start = following.flip(1).cummin(1).values.flip(1)  # the first start after each token
        ahead = torch.nn.functional.pad(after + real.long(), (0, 1))  # [batch, tokens + 1] from each token on, itself included
        return after - ahead.gather(1, next_start)

    @property
    def from_end(self) -> Tensor:
        """[batch, tokens]: -1 on the last real token of each row or packed segment, -2 on the one before, ..."""
        self.check_generation_is_clear()
        if self.decoding:
            return torch.full((self.batch, self.tokens), -1, device=self.device)
        return -1 - self._real_tokens_after(self.real)

    # ---- prompt and generated tokens

    @property
    def generated(self) -> Mask:
        """[batch, 1] or a constant: tokens that were decoded rather than given. Only meaningful in the phase `generate`."""
        self.check_generation_is_clear()
        if not self.decoding or not isinstance(self.past, Tensor):
            return self.decoding
        return (self.past > 0).view(1, 1).expand(self.batch, 1)

    @property
    def prompt_length(self) -> Tensor:
        """[batch or 1, 1]: number of prompt tokens of each text of a generation."""
        return self._prompt_length()

    def _prompt_length(self) -> Tensor:
        return self.remember("prompt", lambda: (self.positions * self.real).amax(1, keepdim=True) + 1)

    def note_lengths(self, *, of_prompt: bool) -> None:
        """Notes on the cache, when a pass opens, what scopes that count tokens need in later passes: how long each text is so far, and how
        long its prompt was."""
        if self.phase != "generate":
            return
        if of_prompt:
            self._prompt_length()
        mask, past = self.full_mask, self.past
        if self.scratch.lengths_noted or torch.compiler.is_compiling():
            return
        if mask is None or not isinstance(past, int):
            return
        self.scratch.positions = self.positions  # worked out before the length that they come from moves on
        length = self.memory.length_before(past)
        if length is None or length.shape[0] != self.batch:
            length = mask[:, : past + self.virtual].sum(1, keepdim=True) - self.virtual  # [batch, 1]
        self.scratch.lengths_noted = True
        own = self.attention.sum(1, keepdim=True) if isinstance(self.attention, Tensor) else self.tokens
        self.memory.set_length(length + own - self.leading, past + self.tokens - self.leading)

    def remember(self, name: str, from_prompt: Callable[[], Tensor]) -> Tensor:
        """A tensor with one entry per row that the prompt decides and every later pass of the generation uses.

        Args:
            from_prompt: works it out from this pass.

        Raises:
            ContextError: the prompt went through the model before anything was attached to it, or cannot be told from what follows.
        """
        self.check_generation_is_clear()
        remembered = self.memory.tensors.get(name)
        if not self.decoding:
            remembered = self.memory.tensors[name] = from_prompt()
        elif isinstance(self.past, Tensor):  # the first token of a one-token prompt looks like a decoded one
            remembered = self._remember_on_static_cache(remembered, from_prompt())
            if remembered is not None:
                self.memory.tensors[name] = remembered
        if remembered is None or remembered.shape[0] not in (1, self.batch):
            raise _unseen_prompt(self.batch, remembered)
        return remembered

    def _remember_on_static_cache(self, remembered: Tensor | None, fresh: Tensor) -> Tensor | None:
        assert isinstance(self.past, Tensor)
        if remembered is not None:
            return torch.where(self.past.to(remembered.device) > 0, remembered, fresh)
        if torch.compiler.is_compiling():
            torch._assert_async(self.past == 0, "the prompt of this cache was not seen: attach before the prompt is run")
            return fresh
        return fresh if self.past == 0 else None

    def check_generation_is_clear(self) -> None:
        """Raises ContextError where given and decoded tokens cannot be told apart."""
        if self.is_paged:
            raise _continuous_batching()
        if self.unclear:
            raise _unclear_generation()

    def at_unembedded(self, per_token: Tensor, count: int) -> Tensor:
        """[batch, count, ...]: the entries of `per_token` at the tokens that the unembedding gets."""
        return per_token[:, self.unembedded] if isinstance(self.unembedded, Tensor) else per_token[:, -count:]


def index_within(member: Tensor, starts: Tensor | None) -> Tensor:
    """[batch, tokens]: how many members come before each token in its own text.

    Args:
        member: [batch, tokens] bool.
        starts: where texts begin in a packed row, None when each row is one text.
    """
    before = member.long().cumsum(1) - member.long()
    return before if starts is None else before - torch.where(starts, before, 0).cummax(1).values


def columns_of(over_all: Tensor, tokens: int, past: Tensor | int) -> Tensor:
    """The columns of this pass, [batch, tokens], of what there is for cache and pass, or for the whole length of a static cache."""
    width = over_all.shape[1]
    if isinstance(past, int):
        return over_all[:, past : past + tokens] if width > past + tokens else over_all[:, -tokens:]
    if width == tokens:
        return over_all
    return over_all[:, (torch.arange(tokens, device=over_all.device) + past.to(over_all.device)).clamp_max(width - 1)]


def in_backward() -> bool:
    """True while autograd runs, that is while gradient checkpointing recomputes a forward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


# ---- errors


def _unknown_positions() -> ContextError:
    return ContextError(
        "positions cannot be told in this forward pass",
        expected="a 2-D attention mask, or position_ids of shape [batch, tokens]",
        found="padding in an attention mask of another form, and no position_ids",
        remedy="pass the 2-D mask, or position_ids that count each row's tokens",
    )


def _unknown_cache() -> ContextError:
    return ContextError(
        "positions cannot be told in this forward pass",
        expected="a cache that says how many tokens it holds, or none",
        found="one of an unknown kind, such as a list of tensors",
        remedy="use the scopes 'all', 'last', 'generated' or 'tokens[...]', or a cache with get_seq_length() as those of transformers",
    )


def _continuous_batching() -> ContextError:
    return ContextError(
        "given and decoded tokens cannot be told apart in continuous batching",
        expected="the scope 'all' or 'tokens[...]', and gates that decide for each token",
        found="one row with tokens of many requests",
        remedy="use model.generate, whose batches have a row for each prompt, or scope='all'",
    )


def _unseen_prompt(batch: int, remembered: Tensor | None) -> ContextError:
    return ContextError(
        "the prompt of this generation was not seen",
        expected=f"a cache of {batch} rows that was filled while the plan was attached",
        found="a cache from before the attach" if remembered is None else f"one of {remembered.shape[0]} rows",
        remedy="run the prompt and the generation with the plan attached, on one cache",
    )


def _unclear_generation() -> ContextError:
    return ContextError(
        "given and decoded tokens cannot be told apart in this generation",
        expected="a prompt in one pass (or two, the first from a copied cache), then one token per pass",
        found="passes of several tokens after each other, or a cache that lost some, as in assisted decoding or a prompt in chunks",
        remedy="generate without assistant_model, prompt_lookup_num_tokens and prefill_chunk_size, give a prefix as a deep copy of "
        "its cache, or use scope='all'",
    )
