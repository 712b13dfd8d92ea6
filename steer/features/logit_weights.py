"""Logit weights: which tokens a feature makes likelier, its decoder row read as the model reads its last residual stream."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from steer.errors import WidthError
from steer.features.dictionary import Dictionary
from steer.lens.readout import Readout

CHUNK = 2**23  # logits at a time


def logit_weights(model: nn.Module, dictionary: Dictionary, features: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of ([n] features, [n, vocabulary] logits fp32 on the CPU) over all features, or chosen ones.

    The decoder row goes through the model's own final norm and unembedding (and scale or cap of its logits), as if nothing else were in the
    stream: what later blocks do with the row is not seen. Of several sites that are written, the last one's row is read.

    Raises:
        WidthError: the dictionary does not write the residual stream. AnatomyError: a model without a readout, see `Readout`.
    """
    readout = Readout.of(model)
    if dictionary.d_out != readout.width:
        raise _other_width(dictionary, readout.width)
    parameter = next(readout.head.parameters())
    chosen = torch.arange(dictionary.width) if features is None else features
    size = max(1, CHUNK // readout.unembedding.shape[0])
    for part in chosen.split(size):
        rows = dictionary.decoder_rows(part)
        rows = rows if rows.dim() == 2 else _last_written(rows)  # [n, width]
        with torch.no_grad():
            yield part, readout.logits(rows.to(parameter.device, parameter.dtype)).float().cpu()


def _last_written(rows: Tensor) -> Tensor:
    """[n, width] of [n, sites, width]: the last site to which a feature writes anything."""
    writes = (rows != 0).any(-1)  # [n, sites]
    last = writes.shape[1] - 1 - writes.flip(1).int().argmax(1)
    return rows[torch.arange(len(rows)), last]


# ---- errors


def _other_width(dictionary: Dictionary, width: int) -> WidthError:
    return WidthError(
        "the decoder rows of this dictionary are no part of the residual stream, so that they have no logit weights",
        expected=f"rows of {width} numbers",
        found=f"{dictionary.d_out}, at {', '.join(map(str, dictionary.writes))}",
        remedy="search by='activation', or use a dictionary of the residual stream or of what is added to it",
    )
