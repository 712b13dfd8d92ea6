"""Mean difference at chosen words: activations where a text says one of them, or is about to, minus those everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from steer.checks import one_of
from steer.errors import ContrastError
from steer.model.capture import capture
from steer.model.site import Site
from steer.model.tokens import Row

AT, BEFORE = POSITIONS = ("at", "before")


class TokenStates:
    """Accumulator of the activation of every token. states: by index of the text, [tokens, width] fp32."""

    def __init__(self) -> None:
        self.states: dict[int, Tensor] = {}

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        for of_text, is_token, row in zip(h, weight.bool(), rows.tolist(), strict=True):
            self.states[row] = of_text[is_token].float().cpu()


def token_states(model: nn.Module, rows: Sequence[Row], site: Site, *, pad: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The activation of every token of some texts at a site, text after text. Raises as `capture`.

    Returns:
        [tokens, width] fp32 activations, [tokens] ids, [tokens] places in their texts.
    """
    read = TokenStates()
    capture(model, rows, {site: read}, span="all", pad=pad, share=False)  # a shared beginning would be read once for all texts
    states = torch.cat([read.states[i] for i in range(len(rows))])
    ids = torch.tensor([token for row in rows for token in row.ids])
    places = torch.cat([torch.arange(len(row.ids)) for row in rows])
    return states, ids, places


def marked(ids: Tensor, places: Tensor, words: Collection[int], where: str) -> Tensor:
    """[tokens] True where a token is one of the words (`at`), or comes right before one in the same text (`before`)."""
    one_of(where, POSITIONS, "the position of a mean difference")
    is_word = torch.isin(ids, torch.tensor(sorted(words)))
    if where == AT:
        return is_word
    follows = is_word & (places > 0)
    return torch.cat([follows[1:], torch.zeros(1, dtype=torch.bool)])


def difference_at_words(
    model: nn.Module,
    rows: Sequence[Row],
    words: Collection[int],
    site: Site,
    *,
    where: str = AT,
    keep: Callable[[Tensor, Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Mean activation at the words, or right before them, minus the mean of all other tokens (supervised counterpart of a feature).

    Args:
        rows: texts in which the words occur among others.
        words: token ids.
        where: `at` or `before`.
        keep: from [tokens, width] activations and [tokens] places to the tokens that count, e.g. `Untrained.trained_on`; all when None.

    Returns:
        [width] fp32.

    Raises:
        ContrastError: no such token, or no other. Otherwise as `capture`.
    """
    states, ids, places = token_states(model, rows, site)
    counts = None if keep is None else keep(states, places)
    counts = torch.ones(len(ids), dtype=torch.bool) if counts is None else counts
    of_words = marked(ids, places, words, where)
    inside, outside = counts & of_words, counts & ~of_words
    if not bool(inside.any()) or not bool(outside.any()):
        raise _one_sided(where, int(inside.sum()), int(outside.sum()))
    return states[inside].mean(0) - states[outside].mean(0)


# ---- errors


def _one_sided(where: str, inside: int, outside: int) -> ContrastError:
    return ContrastError(
        f"there is no mean difference {where} the words",
        expected="tokens of both kinds in the texts",
        found=f"{inside} {where} a word, {outside} elsewhere",
        remedy="give texts in which these words occur, each of them one token",
    )
