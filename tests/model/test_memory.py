"""Work that goes on in halves where memory runs out: nothing is lost, nothing comes twice, and what is too large alone is said."""

import pytest
import torch

from steer.model.devices import seeded
from steer.model.memory import in_halves


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_what_does_not_fit_at_once_is_done_in_halves(error):
    tried = []

    def squares(part):
        tried.append(len(part))
        if len(part) > 2:
            raise error
        return [number**2 for number in part]

    parts = list(in_halves(range(7), squares))
    assert [number for part, _ in parts for number in part] == list(range(7)) and tried == [7, 3, 1, 2, 4, 2, 2]
    assert all(found == [number**2 for number in part] for part, found in parts)


def test_what_does_not_fit_alone_is_an_error_and_so_is_any_other():
    def failing(error):
        def run(part):
            raise error

        return run

    for error in (MemoryError, KeyboardInterrupt):
        with pytest.raises(error):
            list(in_halves([1, 2], failing(error)))


def test_what_is_drawn_depends_on_the_seed_and_disturbs_nobody():
    state = torch.random.get_rng_state()
    drawn = []
    for _ in range(2):
        with seeded(3, torch.device("cpu")):
            drawn.append(torch.rand(4))
    with pytest.raises(KeyboardInterrupt), seeded(4, torch.device("cpu")):
        torch.rand(1)
        raise KeyboardInterrupt
    assert torch.equal(*drawn) and torch.equal(torch.random.get_rng_state(), state)
