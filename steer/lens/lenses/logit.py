"""Logit lens (nostalgebraist 2020): the stream at any depth, read as if it were that behind the last block."""

from __future__ import annotations

from torch import nn

from steer.lens.lens import LENSES, Lens
from steer.lens.readout import Readout


@LENSES.register("logit")
class LogitLens(Lens):
    """Logit lens: the stream itself, by the model's final norm and unembedding; nothing is fitted.

    Example:
        >>> reading = steer.lens_reading(steer.LogitLens.of(model), rows[0], top=1)
        >>> reading.words(tokenizer)[-1]  # behind the last block, by token
    """

    reads_every_depth = True

    @classmethod
    def of(cls, model: nn.Module) -> LogitLens:
        """The logit lens of a model. Raises AnatomyError where its readout is not proven."""
        return cls(Readout.of(model))
