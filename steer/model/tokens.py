"""Rows: tokenised texts that know which of their tokens are the response, and padded batches of them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import of_type, whole_number
from steer.errors import ConfigError, TokenizerError
from steer.model.chat import ChatTemplate, answer_marks, check_messages, find_turns
from steer.model.context import CHAT_ROLES


class JoinedTextWarning(UserWarning):
    """Prompt and answer stand side by side with nothing between them."""


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

    def __repr__(self) -> str:
        return f"Row({len(self.ids)} tokens, {self.prompt} of them the prompt)"

    @property
    def response(self) -> int:
        """Number of response tokens."""
        return len(self.ids) - self.prompt

    def starting_at(self, token: int) -> Row:
        """The text without its first tokens."""
        return Row(self.ids[token:], max(self.prompt - token, 0))


def rows_hash(rows: Sequence[Row]) -> str:
    """SHA-256 of the tokens of rows, in their order."""
    return hashlib.sha256("\n".join(" ".join(map(str, row.ids)) for row in rows).encode()).hexdigest()


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


def encode(tokenizer: Any, prompt: str, answer: str | None = None, *, system: str | None = None) -> Row:
    """Tokenises a chat turn.

    Args:
        prompt: the user's message; put through the chat template when the tokenizer has one, else taken as plain text, to which the
            answer is joined as it is: what is to stand between them (a blank, a new line) begins the answer, or ends the prompt. A
            `JoinedTextWarning` says so once where there is nothing.
        answer: the assistant's message; what the template ends a turn with is appended and belongs to the response. The end-of-text
            token where there is no template, or one without such a mark.
        system: the system's message; it stands before the prompt, in a paragraph of its own, where there is no template.

    Raises:
        TokenizerError: text that gives no tokens, or a template that refuses it, or says nothing of the system. ConfigError: no tokenizer,
            or no text.
    """
    check_tokenizer(tokenizer)
    of_type(prompt, str, "the prompt", "pass the user's message as text")
    of_type(answer, (str, type(None)), "the answer", "pass the assistant's message as text, or leave it out")
    of_type(system, (str, type(None)), "the system's message", "pass it as text, or leave it out")
    if getattr(tokenizer, "chat_template", None):
        return _encode_turn(tokenizer, prompt, answer, system)
    ids = tokenizer(prompt if system is None else f"{system}\n\n{prompt}").input_ids
    tail: list[int] = []
    if answer is not None:
        tail = tokenizer(answer, add_special_tokens=False).input_ids
        _warn_if_joined(tokenizer, ids, tail)
        if tokenizer.eos_token_id is not None:
            tail = [*tail, tokenizer.eos_token_id]
    return _turn(ids, tail, prompt, answer)


def _warn_if_joined(tokenizer: Any, ids: list[int], tail: list[int]) -> None:
    """Warns where an answer begins in the word, or at the mark, that the prompt ends with; Python shows one such warning a place."""
    if not ids or not tail or ids[-1] in tokenizer.all_special_ids:
        return
    before, after, both = (tokenizer.decode(tokens) for tokens in (ids[-1:], tail[:1], [ids[-1], tail[0]]))
    if both == before + after and not before[-1:].isspace() and not after[:1].isspace():
        warnings.warn(
            "the tokenizer has no chat template, and nothing stands between prompt and answer: begin the answers with a blank or a new "
            "line, end the prompts with one, or set tokenizer.chat_template",
            JoinedTextWarning,
            stacklevel=3,
        )


def _encode_turn(tokenizer: Any, prompt: str, answer: str | None, system: str | None) -> Row:
    """A turn in the words of the chat template; what that puts between the opened turn and the answer belongs to the prompt."""
    template = ChatTemplate(tokenizer)
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
        if system.strip() not in template.render(messages):
            raise _no_system_error(system)
    if answer is None:
        return _turn(_ids(tokenizer, template.render(messages, opened=True)), [], prompt, answer)
    before, said, after = answer_marks(template, messages, answer)
    end = _ids(tokenizer, after.rstrip())
    marks = [place for place, token in enumerate(end) if token in tokenizer.added_tokens_decoder]
    if marks:
        end = end[: marks[0] + 1]  # a template may start the next turn, or a new line, behind the mark
    elif not end and tokenizer.eos_token_id is not None:
        end = [tokenizer.eos_token_id]
    return _turn(_ids(tokenizer, before), [*_ids(tokenizer, said), *end], prompt, answer)


def _turn(ids: list[int], tail: list[int], prompt: str, answer: str | None) -> Row:
    if not ids or (answer is not None and not tail):
        raise _empty_error(prompt, answer)
    return Row((*ids, *tail), len(ids))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokenises a conversation.

    Args:
        tokenizer: one with a chat template.
        messages: turns with `role` and `content`, in any form that transformers gives to chat templates: text or a list of parts, none
            beside `tool_calls`, `reasoning_content`.
        add_generation_prompt: open the assistant's next turn.

    Returns:
        Token ids, and for each the index into `CHAT_ROLES` of the turn it belongs to, its template marks included. What the template
        itself puts before the first turn, such as a system message of its own, is the system's; a developer is the system, a function
        a tool. Where the template puts a system message into the turn of a user, only what it says is the system's.

    Raises:
        TokenizerError: no chat template, a role that is not known, a template that refuses the conversation, or one that leaves a
            message out.
        ConfigError: no tokenizer, or no turns.
    """
    check_tokenizer(tokenizer)
    check_messages(messages)
    if not getattr(tokenizer, "chat_template", None):
        raise _template_error(tokenizer)
    if not messages:
        return (), ()
    text, turns = find_turns(ChatTemplate(tokenizer), messages, add_generation_prompt)
    ids, starts = _ids_and_starts(tokenizer, text, sorted({turn.start for turn in turns} | {turn.stop for turn in turns}))
    roles = [CHAT_ROLES.index("system")] * len(ids)
    for turn in turns:
        for token, start in enumerate(starts):
            if turn.start <= start < turn.stop:
                roles[token] = CHAT_ROLES.index(turn.role)
    return tuple(ids), tuple(roles)


def _ids_and_starts(tokenizer: Any, text: str, cuts: list[int]) -> tuple[list[int], list[int]]:
    """Token ids of a text and the character at which each says something; without offsets, the cut behind which it starts."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        # a space in front of a word is in its token, and may be the last mark of another turn
        spaces = [_leading_spaces(text[start:stop]) for start, stop in encoded.offset_mapping]
        return encoded.input_ids, [start + n for (start, _), n in zip(encoded.offset_mapping, spaces, strict=True)]
    ids = _ids(tokenizer, text)
    starts: list[int] = []
    for start, stop in zip(cuts, [*cuts[1:], len(text)], strict=True):
        known = _ids(tokenizer, text[:stop])
        if known != ids[: len(known)]:
            raise _merged_error(tokenizer, text[:stop])
        starts += [start] * (len(known) - len(starts))
    return ids, starts


def _leading_spaces(token: str) -> int:
    return 0 if token.isspace() else len(token) - len(token.lstrip())


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


def _no_system_error(system: str) -> TokenizerError:
    return TokenizerError(
        "the chat template leaves the system's message out",
        expected="a template that says it",
        found=f"none of {system[:40]!r} in what it gives",
        remedy="put the text before the prompt yourself, or use a model whose template knows a system",
    )


def _merged_error(tokenizer: Any, text: str) -> TokenizerError:
    return TokenizerError(
        "a token reaches over the end of a turn",
        expected="a template whose turns end where a token ends, or a fast tokenizer, which knows where its tokens start",
        found=f"{type(tokenizer).__name__} on {text[-40:]!r}",
        remedy="load the fast tokenizer, or announce the roles yourself with steer.chat_roles",
    )


def _short_error(text: str, tokens: int) -> TokenizerError:
    return TokenizerError(
        "text gives fewer than two tokens",
        expected="two or more: the first is predicted from nothing",
        found=f"{tokens} in {text!r}",
        remedy="leave this text out, or join it with the next",
    )
