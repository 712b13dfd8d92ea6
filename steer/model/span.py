"""Spans: which tokens of a text are read."""

from __future__ import annotations

from steer.errors import ConfigError, ContrastError, did_you_mean
from steer.model.tokens import Row

SPANS = ("response", "prompt", "all", "last", "prompt_last")


def span_of(row: Row, span: str | int) -> tuple[int, int]:
    """First token of a span in a text, and the one after its last.

    Args:
        span: `response`, `prompt`, `all`, `last` (last token), `prompt_last` (last token of the prompt), or a token index (negative
            from the end).

    Raises:
        ContrastError: a text without any token in the span. ConfigError: an unknown span.
    """
    size = len(row.ids)
    if isinstance(span, int):
        index = span if span >= 0 else size + span
        start, stop = index, index + 1
    elif span == "response":
        start, stop = row.prompt, size
    elif span == "prompt":
        start, stop = 0, row.prompt
    elif span == "all":
        start, stop = 0, size
    elif span == "last":
        start, stop = size - 1, size
    elif span == "prompt_last":
        start, stop = row.prompt - 1, row.prompt
    else:
        raise _span_error(span)
    if not 0 <= start < stop <= size:
        raise _empty_span_error(row, span, start, stop)
    return start, stop


def _span_error(span: object) -> ConfigError:
    return ConfigError(
        f"unknown span '{span}'",
        expected=f"one of {', '.join(SPANS)}, or a token index",
        found=repr(span),
        remedy=did_you_mean(str(span), SPANS) or "choose one of these, e.g. 'response'",
    )


def _empty_span_error(row: Row, span: str | int, start: int, stop: int) -> ContrastError:
    size = len(row.ids)
    return ContrastError(
        f"a text of {size} tokens ({row.response} of them response) has no token in the span '{span}'",
        expected="at least one token of every text",
        found=f"tokens {start}:{stop} of {size}",
        remedy="choose another span, or give the text an answer",
    )
