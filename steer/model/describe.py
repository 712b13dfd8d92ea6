"""steer.describe: the parts of a model of one's own, said in one line and proven at once."""

from __future__ import annotations

from typing import Any

from torch import nn

from steer.model.anatomy import Anatomy
from steer.model.description import checked_description, set_description
from steer.model.find_stack import check_model
from steer.model.stacks import forget_survey


def describe(
    model: nn.Module,
    layers: str,
    *,
    embed: str | None = None,
    norm: str | None = None,
    attn: str | None = None,
    mlp: str | None = None,
    example: Any = None,
) -> Anatomy:
    """Says where the parts of a model of your own are, where its structure does not tell, or not what you mean.

    It is proven at once, in a pass over a few random tokens, and holds for this model and everything around it. The same arguments may
    stand in a class attribute `steer_description`, a dictionary, of the model or of a LightningModule.

    Args:
        layers: dotted path of the list of blocks.
        embed, norm: of the token embedding, and of the norm behind the last block.
        attn, mlp: paths in a block, of the modules that add to the residual stream.
        example: what the forward takes, where that cannot be guessed: a tensor, a tuple, or a dictionary by name, with two rows of two
            tokens at least.

    Raises:
        AnatomyError: there is no such module, or a pass shows that it is none of the kind.

    Example:
        >>> steer.describe(own_model, layers="transformer.h", embed="transformer.wte", norm="transformer.ln_f", attn="mix", mlp="think")
    """
    check_model(model)
    said = {"layers": layers, "embed": embed, "norm": norm, "attn": attn, "mlp": mlp, "example": example}
    before = set_description(model, checked_description(model, said))
    forget_survey(model)
    try:
        anatomy = Anatomy.find(model)
        _ = anatomy.parts  # proves what was said of a block
        return anatomy
    except BaseException:
        set_description(model, before)
        forget_survey(model)
        raise
