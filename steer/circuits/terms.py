"""Terms of mask learning: what the circuit's ablation shall change, and what it shall leave alone, as losses of logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from steer.checks import finite_number, number_within, of_type, whole_number
from steer.circuits.targets import Target, check_target, checked_value
from steer.circuits.texts import Prompts, rows_of
from steer.errors import ConfigError
from steer.model.tokens import Row, check_rows

LAST = slice(-1, None)
EVERY = slice(None)


class Term(ABC):
    """A loss of the logits of some prompts, the mean over the items that a step draws.

    Args:
        items: prompts of each item, the same number for all.
        weight: factor in the sum of the terms. per_step: how many items a step draws, all of them where there are fewer.

    Attributes:
        alone: it looks at the circuit alone, with all other candidates ablated; else at the model with the circuit ablated.
        compares: it has to know what the unedited model gives.

    Raises:
        ConfigError: no items, a weight that is not above 0, or no number of items.
    """

    alone: ClassVar[bool] = False
    compares: ClassVar[bool] = True

    def __init__(self, items: Sequence[Sequence[Row]], weight: float, per_step: int) -> None:
        self.name = type(self).__name__
        if not items:
            raise _no_items(self.name)
        self.items = [tuple(item) for item in items]
        finite_number(weight, f"the weight of {self.name}", above=0)
        self.weight = weight
        whole_number(per_step, f"`per_step` of {self.name}", least=1)
        self.per_step = min(per_step, len(self.items))

    def draw(self, random: torch.Generator) -> list[int]:
        """Items of a step."""
        return torch.randperm(len(self.items), generator=random)[: self.per_step].tolist()

    @property
    def tokens(self) -> slice:
        """Which tokens of a prompt it needs logits at."""
        return LAST

    @abstractmethod
    def value(self, logits: Sequence[Tensor], item: int) -> Tensor:
        """What it looks at. logits: [tokens, vocabulary] of each prompt of an item."""

    @abstractmethod
    def cost(self, value: Tensor, unedited: Tensor | None) -> Tensor:
        """A scalar. unedited: the value of the unedited model, None where it does not compare."""


class _OfTarget(Term):
    """A term whose value is a target of prompts, or how much higher it is than on their partners."""

    def __init__(
        self, model: nn.Module, prompts: Prompts, partners: Prompts | None, target: Target, weight: float, per_step: int, tokenizer: object
    ) -> None:
        rows = rows_of(model, prompts, tokenizer)
        others = None if partners is None else rows_of(model, partners, tokenizer)
        if others is not None and len(others) != len(rows):
            raise _other_partners(len(rows), len(others))
        super().__init__([(row,) for row in rows] if others is None else list(zip(rows, others, strict=True)), weight, per_step)
        check_target(target, len(rows))
        self.target = target

    @property
    def tokens(self) -> slice:
        return LAST if getattr(self.target, "at_last_token", False) else EVERY

    def value(self, logits: Sequence[Tensor], item: int) -> Tensor:
        first, *others = (checked_value(self.target(of_prompt.float(), item), item) for of_prompt in logits)
        return first - others[0] if others else first


class Shift(_OfTarget):
    """Squared difference of a target between prompts and their partners, which the ablation shall bring to 0.

    Args:
        prompts, partners: as many of each, of any length, e.g. with a profession, and with "person" in its place.
        target: number of a prompt in it counts the prompts; a partner has that of its prompt.

    Example:
        >>> he, she = (tokenizer.encode(word)[0] for word in (" he", " she"))
        >>> Shift(model, ["The nurse said that"], ["The person said that"], LogitDifference(he, she), tokenizer=tokenizer)
    """

    compares = False

    def __init__(
        self,
        model: nn.Module,
        prompts: Prompts,
        partners: Prompts,
        target: Target,
        *,
        weight: float = 1.0,
        per_step: int = 12,
        tokenizer: object = None,
    ) -> None:
        super().__init__(model, prompts, partners, target, weight, per_step, tokenizer)

    def cost(self, value: Tensor, unedited: Tensor | None) -> Tensor:
        return value.square()


class KeepTarget(_OfTarget):
    """Squared change of a target by the ablation, or only what it falls below a share of what it was.

    Args:
        prompts: partners: with them, it is of the difference between each prompt and its partner, as in `Shift`.
        share: None for the squared change. Else from 0 to 1: max(share * |t0| - t * sign(t0), 0)^2, so that the target may shrink to this
            share of what it was at no cost.

    Example:
        >>> term = KeepTarget(model, texts, target, share=0.65)  # may fall to 65 % of what it was at no cost
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Prompts,
        target: Target,
        *,
        partners: Prompts | None = None,
        share: float | None = None,
        weight: float = 0.1,
        per_step: int = 10,
        tokenizer: object = None,
    ) -> None:
        super().__init__(model, prompts, partners, target, weight, per_step, tokenizer)
        if share is not None:
            number_within(share, "`share` of KeepTarget", 0, 1)
        self.share = share

    def cost(self, value: Tensor, unedited: Tensor | None) -> Tensor:
        assert unedited is not None
        if self.share is None:
            return (value - unedited).square()
        return (self.share * unedited.abs() - value * unedited.sign()).relu().square()


class KeepKL(Term):
    """KL divergence of the model with the circuit ablated from the unedited one on neutral text, in nats per token.

    What the unedited model gives is computed once for each row that is drawn, and held in fp16: 2 bytes x vocabulary for each token.

    Args:
        rows: neutral text, used neither for the constants nor for measuring what the ablation costs.
        tokens: which tokens of a row count, e.g. slice(32, None, 2); the last predicts nothing that is known, and counts all the same.

    Example:
        >>> terms = [Shift(model, ["The nurse said that"], ["The person said that"], target), KeepKL(neutral, weight=3.0)]
    """

    def __init__(self, rows: Sequence[Row], *, weight: float = 3.0, per_step: int = 1, tokens: slice = EVERY) -> None:
        check_rows(rows, "the neutral text of KeepKL")
        super().__init__([(row,) for row in rows], weight, per_step)
        of_type(tokens, slice, "`tokens` of KeepKL", "pass e.g. slice(32, None, 2)")
        self._tokens = tokens
        for row in rows:
            if not range(len(row.ids))[tokens]:
                raise _no_tokens(tokens, len(row.ids))

    @property
    def tokens(self) -> slice:
        return self._tokens

    def value(self, logits: Sequence[Tensor], item: int) -> Tensor:
        return logits[0].float().log_softmax(-1)  # [tokens, vocabulary]

    def cost(self, value: Tensor, unedited: Tensor | None) -> Tensor:
        assert unedited is not None
        return _kl(unedited, value)


class Faithful(Term):
    """How far the circuit alone is from the model at the last token of prompts: the loss of subnetwork probing.

    Candidates outside of the circuit are ablated by 1 - amount; what is no candidate stays as it is.

    Args:
        target: squared difference of it; None for the KL divergence of the next token.

    Example:
        >>> circuit = learn_circuit(model, [Faithful(model, texts, target)], scores.top_nodes(10), ablation=zero_ablation(), steps=2)
    """

    alone = True

    def __init__(
        self,
        model: nn.Module,
        prompts: Prompts,
        target: Target | None = None,
        *,
        weight: float = 1.0,
        per_step: int = 12,
        tokenizer: object = None,
    ) -> None:
        super().__init__([(row,) for row in rows_of(model, prompts, tokenizer)], weight, per_step)
        if target is not None:
            check_target(target, len(self.items))
        self.target = target

    @property
    def tokens(self) -> slice:
        return LAST if self.target is None or getattr(self.target, "at_last_token", False) else EVERY

    def value(self, logits: Sequence[Tensor], item: int) -> Tensor:
        if self.target is None:
            return logits[0][-1:].float().log_softmax(-1)  # [1, vocabulary]
        return checked_value(self.target(logits[0].float(), item), item)

    def cost(self, value: Tensor, unedited: Tensor | None) -> Tensor:
        assert unedited is not None
        return (value - unedited).square() if value.dim() == 0 else _kl(unedited, value)


def _kl(unedited: Tensor, log_q: Tensor) -> Tensor:
    """Mean over tokens. unedited: [tokens, vocabulary] log-probabilities, rounded; log_q the same in fp32."""
    log_p = unedited.float().log_softmax(-1)  # of sum 1 again
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


# ---- errors


def _no_items(name: str) -> ConfigError:
    return ConfigError(f"{name} has no prompts", expected="at least one", found="none", remedy="pass texts or rows")


def _other_partners(prompts: int, partners: int) -> ConfigError:
    return ConfigError("prompts and their partners do not pair up", expected=f"{prompts} partners", found=partners,
                       remedy="give one partner for each prompt; several prompts may have the same")  # fmt: skip


def _no_tokens(tokens: slice, length: int) -> ConfigError:
    return ConfigError("a row of KeepKL has no token that counts", expected=f"more than {tokens.start} tokens", found=length,
                       remedy="leave out short rows, or pass other `tokens`")  # fmt: skip
