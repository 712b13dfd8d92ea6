"""Rows: tokenised texts that know which of their tokens are the response, and padded batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import of_type, whole_number
from steer.errors import ConfigError, TokenizerError
from steer.model.context import CHAT_ROLES


@dataclass(frozen=True)
class Row:
    """One text. `ids` are its tokens, of which the first `prompt` are the prompt."""

    ids: tuple[int, ...]
    prompt: int

    def __post_init__(self) -> None:
        of_type(self.ids, tuple, "the tokens of a row", "pass a tuple of token ids, or make the row with steer.model.tokens.encode")
        for token in self.ids:
            if type(token) is not int or token < 0:
                whole_number(token, "a token id of a row")
        whole_number(self.prompt, "the number of prompt tokens of a row")
        if self.prompt > len(self.ids):
            raise _prompt_error(self)

    @property
    def response(self) -> int:
        """Number of response tokens."""
        return len(self.ids) - self.prompt

    def starting_at(self, token: int) -> Row:
        """The text without its first tokens."""
        return Row(self.ids[token:], max(self.prompt - token, 0))


def check_rows(rows: Any, what: str) -> None:
    """Raises ConfigError unless these are rows."""
    remedy = "tokenise them with steer.model.tokens.encode, or plain for running text"
    of_type(rows, (list, tuple), what, f"pass a list of rows; {remedy}")
    for row in rows:
        of_type(row, Row, f"one of {what}", remedy)


def check_tokenizer(tokenizer: Any) -> None:
    """Raises ConfigError unless this can tokenise."""
    if not callable(tokenizer) or isinstance(tokenizer, nn.Module):
        raise _type_error(tokenizer)


def pad_id(tokenizer: Any) -> int:
    """Raises TokenizerError when the tokenizer has no pad token."""
    if tokenizer.pad_token_id is None:
        raise _pad_error(tokenizer)
    return tokenizer.pad_token_id


def encode(tokenizer: Any, prompt: str, answer: str | None = None) -> Row:
    """Tokenises a chat turn.

    Args:
        prompt: the user's message; put through the chat template when the tokenizer has one, else taken as plain text.
        answer: the assistant's message; the end-of-turn (or end-of-text) token is appended and belongs to the response.

    Raises:
        TokenizerError: text that gives no tokens. ConfigError: no tokenizer, or no text.
    """
    check_tokenizer(tokenizer)
    of_type(prompt, str, "the prompt", "pass the user's message as text")
    of_type(answer, (str, type(None)), "the answer", "pass the assistant's message as text, or leave it out")
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        head = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(head, add_special_tokens=False).input_ids
    else:
        ids = tokenizer(prompt).input_ids
    tail: list[int] = []
    if answer is not None:
        tail = tokenizer(answer, add_special_tokens=False).input_ids
        if tokenizer.eos_token_id is not None:
            tail = [*tail, tokenizer.eos_token_id]
    if not ids or (answer is not None and not tail):
        raise _empty_error(prompt, answer)
    return Row(tuple(ids) + tuple(tail), len(ids))


def encode_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokenises a conversation.

    Args:
        tokenizer: one with a chat template that renders a conversation as the start of every longer one.
        messages: turns with `role` and `content`.
        add_generation_prompt: open the assistant's next turn.

    Returns:
        Token ids, and for each the index into `CHAT_ROLES` of the turn it belongs to, its template marks included. What the template
        itself puts before the first turn, such as a system message of its own, is the system's.

    Raises:
        TokenizerError: no chat template, a role that is not known, or a template that rewrites earlier turns.
        ConfigError: no tokenizer, or no turns.
    """
    check_tokenizer(tokenizer)
    example = "pass [{'role': 'user', 'content': 'Who are you?'}]"
    of_type(messages, (list, tuple), "the turns of a conversation", example)
    for message in messages:
        of_type(message, Mapping, "a turn of a conversation", example)
        if not {"role", "content"} <= message.keys():
            raise ConfigError("a turn of a conversation lacks a part", expected="role and content", found=message, remedy=example)
    if not getattr(tokenizer, "chat_template", None):
        raise _template_error(tokenizer)
    ids: list[int] = []
    roles: list[int] = []
    for stop, message in enumerate(messages, 1):
        if message["role"] not in CHAT_ROLES:
            raise _role_error(message["role"])
        opened = add_generation_prompt and stop == len(messages)
        longer = _rendered(tokenizer, messages[:stop], opened)[1]
        if longer[: len(ids)] != ids:
            raise _rewritten_error(stop)
        closed = len(_rendered(tokenizer, messages[:stop])[1]) if opened else len(longer)
        roles += [CHAT_ROLES.index(message["role"])] * (closed - len(ids)) + [CHAT_ROLES.index("assistant")] * (len(longer) - closed)
        ids = longer
    preamble = _preamble(tokenizer, messages[0]) if messages else 0
    return tuple(ids), (*(CHAT_ROLES.index("system") for _ in range(preamble)), *roles[preamble:])


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]], opened: bool = False) -> tuple[str, list[int]]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opened)
    return text, tokenizer(text, add_special_tokens=False).input_ids


def _preamble(tokenizer: Any, first: Mapping[str, str]) -> int:
    """How many tokens a template puts before the first turn: those that the same turn lacks when it comes third."""
    if first["role"] == "system":
        return 0
    second = {"role": "user" if first["role"] == "assistant" else "assistant", "content": first["content"]}
    alone, ids = _rendered(tokenizer, [first])
    before, third = (_rendered(tokenizer, turns)[0] for turns in ([first, second], [first, second, first]))
    if not third.startswith(before) or not alone.endswith(turn := third[len(before) :]):
        return 0
    own = tokenizer(alone[: len(alone) - len(turn)], add_special_tokens=False).input_ids
    return len(own) if ids[: len(own)] == own else 0


def plain(tokenizer: Any, text: str) -> Row:
    """Tokenises running text; all of it but the first token counts as response (the first is predicted from nothing)."""
    check_tokenizer(tokenizer)
    of_type(text, str, "running text", "pass one text; for several, call it for each")
    ids = tokenizer(text).input_ids
    if len(ids) < 2:
        raise _short_error(text, len(ids))
    return Row(tuple(ids), 1)


def collate(rows: Sequence[Row], pad: int, *, side: str = "right", max_length: int | None = None) -> dict[str, Tensor]:
    """Pads rows to one batch.

    Args:
        rows: at least one.
        pad: token id to pad with.
        side: `right` for training and scoring, `left` for generation.
        max_length: rows are cut at this length.

    Returns:
        input_ids, attention_mask, labels, each [batch, tokens]; labels are -100 outside the response.
    """
    cut = [row.ids[:max_length] for row in rows]
    length = max(map(len, cut))
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), -100)
    for i, (row, tokens) in enumerate(zip(rows, cut, strict=True)):
        start = 0 if side == "right" else length - len(tokens)
        ids[i, start : start + len(tokens)] = torch.tensor(tokens)
        mask[i, start : start + len(tokens)] = 1
        labels[i, start + row.prompt : start + len(tokens)] = torch.tensor(tokens[row.prompt :], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _prompt_error(row: Row) -> ConfigError:
    return ConfigError(
        "a row has fewer tokens than its prompt",
        expected=f"0 to {len(row.ids)} prompt tokens",
        found=row.prompt,
        remedy="`ids` holds prompt and response; `prompt` says how many of them are the prompt",
    )


def _type_error(tokenizer: object) -> ConfigError:
    return ConfigError(
        "wrong type for the tokenizer",
        expected="a tokenizer of transformers",
        found=type(tokenizer).__name__,
        remedy="pass the second of what steer.load returns, which is (model, tokenizer)",
    )


def _pad_error(tokenizer: Any) -> TokenizerError:
    return TokenizerError(
        f"tokenizer '{getattr(tokenizer, 'name_or_path', '')}' has no pad token",
        expected="a pad token, to batch texts of different length",
        found="tokenizer.pad_token_id is None",
        remedy="set tokenizer.pad_token = tokenizer.eos_token (padding is masked, so its identity does not matter)",
    )


def _empty_error(prompt: str, answer: str | None) -> TokenizerError:
    return TokenizerError(
        "text gives no tokens",
        expected="at least one token in the prompt, and in the answer if there is one",
        found={"prompt": prompt, "answer": answer},
        remedy="leave this text out, or say something in it",
    )


def _template_error(tokenizer: Any) -> TokenizerError:
    return TokenizerError(
        f"tokenizer '{getattr(tokenizer, 'name_or_path', '')}' has no chat template",
        expected="a chat template, to tell the turns of a conversation apart",
        found="none",
        remedy="set tokenizer.chat_template, or announce response tokens only",
    )


def _role_error(role: object) -> TokenizerError:
    return TokenizerError(
        "unknown chat role", expected=f"one of {', '.join(CHAT_ROLES)}", found=role, remedy="rename the role of this turn"
    )


def _rewritten_error(turn: int) -> TokenizerError:
    return TokenizerError(
        "the chat template rewrites earlier turns",
        expected="a template that only appends",
        found=f"another text before turn {turn}",
        remedy="announce the roles of its tokens yourself with steer.chat_roles",
    )


def _short_error(text: str, tokens: int) -> TokenizerError:
    return TokenizerError(
        "text gives fewer than two tokens",
        expected="two or more: the first is predicted from nothing",
        found=f"{tokens} in {text!r}",
        remedy="leave this text out, or join it with the next",
    )
