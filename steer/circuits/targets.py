"""Targets of attribution: one number of a prompt's logits, whose causes are looked for. Any function of the same arguments is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steer.checks import integer, of_type, whole_number
from steer.errors import ConfigError, NonFiniteError

# (logits [tokens, vocabulary] of one prompt, number of that prompt) -> a scalar
Target = Callable[[Tensor, int], Tensor]
Tokens = int | Sequence[int]


@dataclass(frozen=True)
class LogitDifference:
    """Logit of a token less that of another one, at the last token of a prompt.

    Args:
        right, wrong: token ids, one for all prompts or one for each.

    Raises:
        ConfigError: no token ids, or the same token on both sides.

    Example:
        >>> he, she = (tokenizer.encode(word)[0] for word in (" he", " she"))
        >>> target = steer.LogitDifference(he, she)
        >>> scores = attribute(model, pairs, target)
    """

    at_last_token: ClassVar[bool] = True  # logits of other tokens need not be computed

    right: Tokens
    wrong: Tokens

    def __post_init__(self) -> None:
        _check(self.right)
        _check(self.wrong)
        sides = [[side] if isinstance(side, int) else list(side) for side in (self.right, self.wrong)]
        longest = max(map(len, sides))
        sides = [side * longest if len(side) == 1 else side for side in sides]
        if same := [number for number, (right, wrong) in enumerate(zip(*sides, strict=False)) if right == wrong]:
            raise _same_token(sides[0][same[0]], same)

    def __call__(self, logits: Tensor, prompt: int) -> Tensor:
        return logits[-1, _of(self.right, prompt, logits)] - logits[-1, _of(self.wrong, prompt, logits)]


@dataclass(frozen=True)
class LogProbability:
    """Log-probability of a token after the last token of a prompt, in nats.

    Args:
        token: its id, one for all prompts or one for each.

    Example:
        >>> target = steer.LogProbability(tokenizer.encode(" he")[0])
        >>> scores = attribute(model, pairs, target)
    """

    at_last_token: ClassVar[bool] = True

    token: Tokens

    def __post_init__(self) -> None:
        _check(self.token)

    def __call__(self, logits: Tensor, prompt: int) -> Tensor:
        return logits[-1].log_softmax(-1)[_of(self.token, prompt, logits)]


def check_target(target: Target, prompts: int) -> None:
    """Raises ConfigError for a target that is no function, or whose tokens are those of more or fewer prompts."""
    if not callable(target):
        raise _no_function(target)
    fields = {LogitDifference: ("right", "wrong"), LogProbability: ("token",)}.get(type(target), ())
    for name in fields:
        tokens = getattr(target, name)
        if not isinstance(tokens, int) and len(tokens) != prompts:
            raise _other_count(len(tokens), prompts)


def checked_value(value: object, prompt: int) -> Tensor:
    """Raises ConfigError for a target that gives no number, NonFiniteError for NaN or infinity."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise _no_number(value)
    if not bool(torch.isfinite(value.detach())):
        raise _not_finite(value, prompt)
    return value.reshape(())


def target_words(target: Target) -> str:
    """A target in words, for files and pages."""
    if isinstance(target, LogitDifference):
        return "logit difference"
    if isinstance(target, LogProbability):
        return "log-probability"
    return getattr(target, "__name__", type(target).__name__)


def _check(tokens: Tokens) -> None:
    of_type(tokens, (int, list, tuple), "the token of a target", "pass a token id, or one for each prompt")
    for token in [tokens] if isinstance(tokens, int) else tokens:
        whole_number(integer(token), "a token of a target")


def _of(tokens: Tokens, prompt: int, logits: Tensor) -> int:
    if not isinstance(tokens, int) and prompt >= len(tokens):
        raise _other_count(len(tokens), f"a number {prompt}")
    token = tokens if isinstance(tokens, int) else tokens[prompt]
    if token >= logits.shape[-1]:
        raise _no_such_token(token, logits.shape[-1])
    return token


# ---- errors


def _same_token(token: int, prompts: list[int]) -> ConfigError:
    return ConfigError(
        "a logit difference of a token and itself is zero",
        expected="another token on the other side",
        found=f"token {token} on both" + (f", for prompts {prompts[:8]}" if prompts != [0] else ""),
        remedy="look at the ids: two words may begin with the same token, or one may lack its space, as in tokenizer.encode(' she')[0]",
    )


def _no_number(value: object) -> ConfigError:
    found = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    return ConfigError(
        "the target of a circuit gives no number",
        expected="a tensor with one number, made of logits [tokens, vocabulary]",
        found=found,
        remedy="e.g. lambda logits, prompt: logits[-1, 5] - logits[-1, 7]",
    )


def _not_finite(value: Tensor, prompt: int) -> NonFiniteError:
    return NonFiniteError(
        f"the target of prompt {prompt} is not finite",
        expected="a finite number",
        found=value.item(),
        remedy="look at the logits of this prompt; run the model in float32 or bfloat16",
    )


def _other_count(found: int, prompts: int | str) -> ConfigError:
    expected = f"one for each of {prompts} prompts, or one for all"
    return ConfigError("the tokens of a target are not those of these prompts", expected=expected,
                       found=found, remedy="give the tokens of these prompts; of a chunk, those of its own")  # fmt: skip


def _no_function(target: object) -> ConfigError:
    return ConfigError("the target of a circuit is no function", expected="a function of logits and the number of a prompt",
                       found=type(target).__name__, remedy="e.g. LogitDifference(right, wrong)")  # fmt: skip


def _no_such_token(token: int, size: int) -> ConfigError:
    return ConfigError("the token of a target does not exist", expected=f"0 to {size - 1}", found=token,
                       remedy="take its id from the tokenizer of this model")  # fmt: skip
