"""What tests of compiled code share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from steer.model.hooks import undo_prepare_compile


class Backend:
    """Runs the traced graph as it is, and counts how often something was traced."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        self.graphs += 1
        return graph

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        return self  # generate copies its configuration, and the copy would be the one that counts


@pytest.fixture
def new_process() -> Iterator[None]:
    """Resets to the state of a new process: nothing compiled, and dynamo at its default of ignoring hooks."""
    torch._dynamo.reset()
    counters.clear()
    undo_prepare_compile()
    yield
    torch._dynamo.reset()
    undo_prepare_compile()


@pytest.fixture
def unbroken(new_process: None) -> Iterator[None]:
    """No graph is broken."""
    yield
    assert not counters["graph_break"], dict(counters["graph_break"])


@pytest.fixture
def backend(unbroken: None) -> Backend:
    return Backend()
