"""Two threads on one steered model: what one pass knows of its tokens must not get into the other."""

import threading

import pytest
import torch
from hand import ids, vector

from steer.errors import ContextError
from steer.intervene import Add, Intervention, Plan


def test_a_second_thread_is_refused_and_the_first_goes_on(tiny):
    model = tiny("llama").eval()
    tokens = ids(2, 6)
    with torch.no_grad(), Plan(Intervention(Add(vector()), "layers.1.output")).attached(model) as plan:
        expected, refused = model(tokens).logits, []

        def second() -> None:
            try:
                model(tokens[:1])
            except ContextError as error:
                refused.append(error)

        def while_running(*_: object) -> None:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

        handle = model.model.layers[0].register_forward_hook(while_running)
        actual = model(tokens).logits
        handle.remove()
        assert torch.equal(actual, expected) and plan.fired() == {"add@layers.1.output": 24}
        second()
        assert len(refused) == 1 and plan.fired() == {"add@layers.1.output": 30}
    with pytest.raises(ContextError, match=r"two threads call a steered model at a time[\s\S]*lock"):
        raise refused[0]


def test_one_thread_after_the_other(tiny):
    model = tiny("llama").train()
    with Plan(Intervention(Add(vector()), "layers.1.output")).attached(model) as plan:
        for _ in range(2):
            thread = threading.Thread(target=lambda: model(ids(2, 3)).logits.sum().backward())
            thread.start()
            thread.join()
        model(ids(2, 3))
        assert plan.fired() == {"add@layers.1.output": 18}
