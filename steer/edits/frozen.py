"""A model that is looked at with gradients of other things than its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from steer.model.capture import evaluating
from steer.model.restoring import restoring


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients of parameters, and no compiled code, which would be traced anew; all is put back on every way out.

    Gradients are off inside: `torch.enable_grad()` switches them on where they are wanted.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def put_back() -> None:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)

    with restoring(put_back), evaluating(model), torch.compiler.set_stance("force_eager"):
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
