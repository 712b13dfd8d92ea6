"""Sums over the keys of running text: an accumulator for `capture`, and the texts as rows of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from steer.checks import of_type
from steer.edits.locate import text_ids
from steer.errors import EditError
from steer.model.tokens import Row

MASSIVE = 10.0  # times the size of the usual key of its text: a token on which attention rests
NEAR = 0.1  # of the size of the first token: another one of its kind (a full stop, a line break)


class KeySums:
    """Accumulator of one layer: sum of k k^T over the ordinary tokens of texts.

    A pass adds up in fp32 where the model is; `take_in` brings that to the CPU in fp64, once for several passes.

    Attributes:
        total: [f, f] fp64. tokens: keys in it.
    """

    def __init__(self, width: int, total: Tensor | None = None, tokens: int = 0) -> None:
        self.total = torch.zeros(width, width, dtype=torch.float64) if total is None else total.clone()
        self.tokens = tokens
        self._block: Tensor | None = None
        self._count: Tensor | None = None

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        """Takes one batch of whole texts, padded on the right. h: [batch, tokens, f]; weight: [batch, tokens], 0 on padding."""
        h = h.float()
        ordinary = ordinary_tokens(torch.linalg.vector_norm(h, dim=-1), weight > 0)
        keys = torch.where(ordinary[..., None], h, 0).flatten(0, 1)  # [batch * tokens, f]
        if self._block is None or self._count is None:
            self._block = keys.new_zeros(keys.shape[1], keys.shape[1])
            self._count = torch.zeros((), dtype=torch.long, device=h.device)
        self._block.addmm_(keys.mT, keys)
        self._count += ordinary.sum()

    def drop(self) -> None:
        """Forgets what came since the last time, as of a pass that memory did not suffice for."""
        self._block = self._count = None

    def take_in(self) -> None:
        """Adds what came since the last time."""
        if self._block is not None and self._count is not None:
            self.total += self._block.to("cpu", torch.float64)
            self.tokens += int(self._count)
        self.drop()


def ordinary_tokens(norms: Tensor, real: Tensor) -> Tensor:
    """[batch, tokens] bool: the tokens whose keys count.

    The first token of a text does not, whatever it is: attention rests on it, and in some layers its key is a thousand times as large as
    others and nearly the same in all texts (massive activations, Sun et al. 2024, arXiv 2402.17762). Where it is so, neither do massive
    tokens that come near its size. Each text is judged alone, so that sums over texts do not depend on how they were put into batches.

    Args:
        norms: [batch, tokens] sizes of the keys. real: [batch, tokens], False on padding.
    """
    first = norms[:, :1]
    others = real.clone()
    others[:, 0] = False
    typical = norms.masked_fill(~others, torch.nan).nanmedian(1, keepdim=True).values  # [batch, 1]
    return others & ~((torch.minimum(first, norms) > MASSIVE * typical) & (norms > NEAR * first))


def text_rows(tokenizer: Any, texts: Sequence[str | Row], length: int, max_tokens: int) -> list[Row]:
    """Texts cut into rows of at most `length` tokens, until there are `max_tokens` behind the first token of each.

    Every row begins with the start-of-text token where its text does. Rows of one token are left out.

    Raises:
        EditError: no texts. ConfigError: what is neither text nor Row. TokenizerError.
    """
    of_type(texts, (list, tuple), "the texts of a covariance", "pass a list of texts, or of rows of tokens")
    rows: list[Row] = []
    left = max_tokens
    for text in texts:
        of_type(text, (str, Row), "a text of a covariance", "pass text, or a row of steer.model.tokens")
        if not left:
            break
        for ids in _pieces(text.ids if isinstance(text, Row) else text_ids(tokenizer, text), tokenizer.bos_token_id, length):
            if left and len(ids) > 1:
                rows.append(Row(ids[: left + 1], 0))
                left -= len(rows[-1].ids) - 1
    if not rows:
        raise _no_texts(len(texts))
    return rows


def _pieces(ids: tuple[int, ...], bos: int | None, length: int) -> Iterator[tuple[int, ...]]:
    start = ids[:1] if ids and ids[0] == bos else ()
    body = ids[len(start) :]
    size = length - len(start)
    return ((*start, *body[at : at + size]) for at in range(0, len(body), size))


# ---- errors


def _no_texts(number: int) -> EditError:
    return EditError(
        "there are no texts to fit a covariance on",
        expected="running text, of which each line has two tokens or more",
        found=f"{number} texts without any",
        remedy="pass some hundred paragraphs",
    )
