"""Chat templates: conversations as text, and whose turn each character of it belongs to.

A template is a program: it may put marks around a turn, fold the system message into a user's, or drop what an assistant thought once
the user has answered. So turns are found by rendering: the text of the turns up to one is the start of the whole wherever the template
only appends; elsewhere a message is replaced by a word that is easy to find, in the conversation as it is.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from steer.checks import of_type
from steer.errors import ConfigError, TokenizerError

PROBE = "Quokka7319"  # a word that no template says by itself
ROLES = {  # of messages, and the one of `CHAT_ROLES` that each is
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",  # the older name
    "ipython": "tool",  # Llama's
}
_WITHIN_ANOTHER = ("system", "tool")  # of messages that a template may put into the turn of a user
_EXAMPLE = "pass [{'role': 'user', 'content': 'Who are you?'}]"

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """Characters [start, stop) of a rendered conversation and the role that they belong to."""

    role: str
    start: int
    stop: int


def check_messages(messages: Any) -> None:
    """Raises ConfigError unless these have a form that transformers gives to chat templates, TokenizerError for a role of no turn."""
    of_type(messages, (list, tuple), "the turns of a conversation", _EXAMPLE)
    for message in messages:
        of_type(message, Mapping, "a turn of a conversation", _EXAMPLE)
        speaks_otherwise = any(message.get(key) for key in ("tool_calls", "reasoning_content", "thinking", "reasoning"))
        if "role" not in message or (message.get("content") is None and not speaks_otherwise):
            raise _incomplete_message(message)
        if not isinstance(message["role"], str) or message["role"] not in ROLES:
            raise _role_error(message["role"])
        content = message.get("content")
        of_type(content, (str, list, tuple, Mapping, type(None)), "what a turn of a conversation says", "pass text, or a list of parts")
        if isinstance(content, (list, tuple)):
            for part in content:
                of_type(part, (str, Mapping), "a part of a turn", "pass {'type': 'text', 'text': 'Hello'}")


class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
        reads_text, reads_parts: the forms of content that it says, rather than nothing or Python's notation of it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.reads_text = self._says(PROBE)
        self.reads_parts = self._says(_parts(PROBE))

    def render(self, messages: Sequence[Message], opened: bool = False) -> str:
        """The text of a conversation.

        Args:
            messages: text becomes a part for a template that reads nothing else, and parts text for one that reads no parts.
            opened: with the start of the assistant's next turn.

        Raises:
            TokenizerError: the template refuses the conversation, or would print Python's notation of it.
        """
        messages = [self._in_its_form(message) for message in messages]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
        except ImportError:  # Jinja is not there
            raise
        except Exception as error:  # a template is a program, which fails with whatever its author or Jinja raises
            raise _refused(error, messages) from error

    def try_render(self, messages: Sequence[Message], opened: bool = False) -> str | None:
        """None where the template refuses these messages."""
        try:
            return self.render(messages, opened)
        except TokenizerError:
            return None

    def starts(self, messages: Sequence[Message]) -> Iterator[str]:
        """The text of turns, as it may begin a conversation that goes on: at its end a template may put an end of text, or other marks."""
        alone = self.try_render(messages)
        if alone is not None:
            yield alone
        opened = self.try_render(messages, opened=True) if self._opening else None
        if opened is not None and opened.endswith(self._opening):
            yield opened.removesuffix(self._opening)
        if alone is not None:
            yield alone.removesuffix(self._end_of_text)

    @property
    def _end_of_text(self) -> str:
        return getattr(self.tokenizer, "eos_token", None) or ""

    @cached_property
    def _opening(self) -> str:
        """How a template opens the assistant's turn; empty where that cannot be told."""
        asked = [{"role": "user", "content": PROBE}]
        alone, opened = self.try_render(asked) or "", self.try_render(asked, opened=True) or ""
        ends = (start for start in (alone, alone.removesuffix(self._end_of_text)) if opened.startswith(start))
        return opened.removeprefix(next(ends, opened))

    def _in_its_form(self, message: Message) -> dict[str, Any]:
        content = message.get("content")
        if isinstance(content, (list, tuple)) and not self.reads_parts:
            texts = [part if isinstance(part, str) else part.get("text") for part in content]
            if any(not isinstance(text, str) for text in texts):
                raise _no_parts_read(content)
            return {**message, "content": "".join(texts)}
        if isinstance(content, str) and self.reads_parts and not self.reads_text:
            return {**message, "content": _parts(content)}
        return dict(message)

    def _says(self, content: Any) -> bool:
        try:
            text = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except Exception:  # as above
            return False
        before, found, _ = text.partition(PROBE)
        return bool(found) and not before.endswith(("'", '"'))


def answer_marks(template: ChatTemplate, messages: Sequence[Message], answer: str) -> tuple[str, str, str]:
    """The assistant's answer to messages as a template has it: what comes before the answer, the answer, what comes after.

    Raises:
        TokenizerError: the template refuses them, or does not say the answer.
    """
    text = template.render([*messages, {"role": "assistant", "content": answer}])
    probe = _unsaid(text)
    before, found, after = template.render([*messages, {"role": "assistant", "content": probe}]).rpartition(probe)
    opened = template.render(messages, opened=True)
    for said in (answer, answer.strip()):
        if found and text == before + said + after:
            space = before.removeprefix(opened)
            if space.isspace() and opened + space == before:  # it is the model that has to say it, mostly in one token with a word
                return opened, space + said, after
            return before, said, after
    # the answer is not as it was given: a template may set its thoughts apart
    if found and text.startswith(opened) and text.endswith(after) and len(opened) + len(after) <= len(text):
        return opened, text[len(opened) : len(text) - len(after)], after
    raise _lost_turn(len(messages) + 1)


def find_turns(template: ChatTemplate, messages: Sequence[Message], opened: bool) -> tuple[str, list[Turn]]:
    """The text of a conversation and its turns, each with its marks; where two have a character, it belongs to the later one in the list.

    What the template itself puts before the first turn, such as a system message of its own, is the system's.

    Args:
        messages: at least one.
        opened: with the start of the assistant's next turn.

    Raises:
        TokenizerError: the template refuses the conversation, leaves a message out, or gives no way to tell where it is.
    """
    text = template.render(messages, opened)
    turns = [Turn("system", 0, _preamble(template, messages[0], text))]
    inside = []  # messages that stand within the turn of another
    for i, message in enumerate(messages):
        role, start = ROLES[message["role"]], turns[-1].stop
        around = _around_probe(template, messages, i, opened)
        content = _content_span(text, around)
        stop = len(text) if i == len(messages) - 1 and not opened else _end_of_turn(template, messages, i, text, around)
        if stop is not None and _is_turn_of(message, start, stop, content, left_out=around == ("", "")):
            _check_calls(message, text[start:stop], i)
            turns.append(Turn(role, start, stop))
        elif content is not None and role in _WITHIN_ANOTHER:
            inside.append(Turn(role, *content))
        else:
            raise _lost_turn(i + 1)
    return text, [*turns, Turn("assistant", turns[-1].stop, len(text)), *inside]


# ---- where turns are


def _around_probe(template: ChatTemplate, messages: Sequence[Message], i: int, opened: bool) -> tuple[str, str] | None:
    """What a template puts before and after what the i-th message says; both empty where it leaves that out, None where it refuses."""
    probe = _unsaid(str(messages))
    rendered = template.try_render([*messages[:i], {**messages[i], "content": probe}, *messages[i + 1 :]], opened)
    if rendered is None:
        return None
    before, found, after = rendered.rpartition(probe)
    return (before, after) if found else ("", "")


def _end_of_turn(template: ChatTemplate, messages: Sequence[Message], i: int, text: str, around: tuple[str, str] | None) -> int | None:
    """The character behind the i-th turn, None where it cannot be told."""
    for start in template.starts(messages[: i + 1]):
        if text.startswith(start):
            return len(start)
    if around is None or not any(around):
        return None
    after = around[1]
    as_last = _around_probe(template, messages[: i + 1], i, opened=False)
    end = "" if as_last is None else as_last[1]  # a system message that only opens a user's turn has no end
    if not after.startswith(end) or not text.endswith(after):
        return None
    return len(text) - len(after) + len(end)


def _content_span(text: str, around: tuple[str, str] | None) -> tuple[int, int] | None:
    """The characters of what a message says, without the marks around it; None where it says nothing."""
    if around is None:
        return None
    before, after = around
    if not any(around) or not text.startswith(before) or not text.endswith(after) or len(before) + len(after) >= len(text):
        return None
    return len(before), len(text) - len(after)


def _is_turn_of(message: Message, start: int, stop: int, content: tuple[int, int] | None, *, left_out: bool) -> bool:
    """These characters are the turn of a message, with what it says among them."""
    if not message.get("content"):
        return start <= stop
    if content is not None:
        return start <= content[0] and content[1] <= stop
    return start < stop and not left_out


def _preamble(template: ChatTemplate, first: Message, text: str) -> int:
    """How many characters a template puts before the first turn: those that the same turn lacks when it comes third."""
    if ROLES[first["role"]] == "system":
        return 0
    second = {"role": "user" if first["role"] == "assistant" else "assistant", "content": _unsaid(str(first))}
    alone, third = template.try_render([first]), template.try_render([first, second, first])
    if alone is None or third is None:
        return 0
    for before in template.starts([first, second]):
        if third.startswith(before) and alone.endswith(turn := third[len(before) :]):
            start = len(alone) - len(turn)
            return start if text.startswith(alone[:start]) else 0
    return _opening_that_is_not_repeated(template, first, second, text)


def _opening_that_is_not_repeated(template: ChatTemplate, first: Message, second: Message, text: str) -> int:
    """How much stands before a message that comes first, and not before the same message as the third of a conversation."""
    as_first = _around_probe(template, [first], 0, opened=False)
    as_third = _around_probe(template, [first, second, first], 2, opened=False)
    if not as_first or not as_third:
        return 0
    start = len(as_first[0]) - len(os.path.commonprefix([as_first[0][::-1], as_third[0][::-1]]))
    return start if text.startswith(as_first[0][:start]) else 0


def _check_calls(message: Message, turn: str, i: int) -> None:
    """Raises TokenizerError where a template leaves out the tools that the assistant calls."""
    for call in message.get("tool_calls") or ():
        name = call.get("function", call).get("name")
        if name is not None and str(name) not in turn:
            raise _lost_turn(i + 1)


def _unsaid(text: str) -> str:
    """A word that is easy to find, and not in a text."""
    return next(word for n in itertools.count() if (word := f"{PROBE}{n or ''}") not in text)


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


# ---- errors


def _incomplete_message(message: Message) -> ConfigError:
    expected = "role and content; content may be missing beside tool_calls or reasoning_content"
    return ConfigError("a turn of a conversation lacks a part", expected=expected, found=dict(message), remedy=_EXAMPLE)


def _role_error(role: object) -> TokenizerError:
    return TokenizerError("unknown chat role", expected=f"one of {', '.join(ROLES)}", found=role, remedy="rename the role of this turn")


def _refused(error: Exception, messages: Sequence[Message]) -> TokenizerError:
    without_system = any(ROLES.get(message["role"]) == "system" for message in messages)
    return TokenizerError(
        "the chat template refuses this conversation",
        expected="turns as the template takes them",
        found=f"{type(error).__name__}: {error}; roles {', '.join(str(message['role']) for message in messages)}",
        remedy="put the system's text at the start of the first user's turn" if without_system else "order the turns as the template asks",
    )


def _no_parts_read(content: Sequence[Any]) -> TokenizerError:
    kinds = {part if isinstance(part, str) else part.get("type") for part in content}
    return TokenizerError(
        "the chat template reads text only",
        expected="parts of the type text",
        found=", ".join(sorted(map(str, kinds))),
        remedy="leave the other parts out, or use the tokenizer of a model that takes them",
    )


def _lost_turn(turn: int) -> TokenizerError:
    return TokenizerError(
        "the chat template rewrites earlier turns",
        expected="a template that says each message, each in a place of its own",
        found=f"no place that is turn {turn}",
        remedy="announce the roles of its tokens yourself with steer.chat_roles",
    )
