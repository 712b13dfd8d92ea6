"""Passes that begin where something acts give what whole passes give, and never what other weights, hooks or texts gave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, WIDTH
from torch import Tensor, nn

import steer
from steer.model import shared_blocks
from steer.model.anatomy import Anatomy
from steer.model.hook_registration import OwnHook
from steer.model.likelihood import summed_logprobs
from steer.model.shared_blocks import sharing_lower_blocks, untouched_blocks
from steer.model.tokens import Row

ROWS = [Row((5, 9, 7, 3, 11), 0), Row((6, 8, 4), 1), Row((12, 5, 9, 30, 31, 32, 33), 2)]


def plan(site: str, strength: float = 1.0) -> steer.Plan:
    return steer.Plan(steer.Intervention(steer.Add(torch.linspace(-1, 1, WIDTH)), site, strength=strength))


def scores(model: nn.Module, rows: list[Row] = ROWS) -> Tensor:
    return summed_logprobs(model, rows, pad=0, max_tokens=8)[0]


@pytest.fixture
def llama() -> nn.Module:
    return FAMILIES["llama"]()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_arms_that_act_at_one_place_get_what_whole_passes_give(family: str) -> None:
    model = FAMILIES[family]()
    arms = [plan("layers.1.output", strength) for strength in (1.0, 2.0)] + [plan("layers.2.mlp.output")]

    def measured() -> list[Tensor]:
        found = [scores(model)]
        for arm in arms:
            with arm.attached(model):
                found.append(scores(model))
        return found

    expected = measured()
    with sharing_lower_blocks(model):
        found = measured() + measured()
    for one, other in zip(expected * 2, found, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(expected[1], expected[0])
    assert model not in shared_blocks._SHARED


class CountsRuns(OwnHook):
    """Only follows the passes: no block runs on its account."""

    def __init__(self, layer: int, runs: list[int]) -> None:
        self.layer, self.runs = layer, runs

    def __call__(self, *_: Any) -> None:
        self.runs.append(self.layer)


def kept_batches(model: nn.Module) -> dict[int, int]:
    """Batches by depth."""
    return {depth: len(batches) for depth, batches in shared_blocks._SHARED[model].kept.items()}


def test_what_lies_below_runs_once(llama: nn.Module) -> None:
    calls: list[dict[int, int]] = []
    blocks = Anatomy.find(llama).blocks
    with sharing_lower_blocks(llama):
        for strength in (1.0, 2.0):
            with plan("layers.1.output", strength).attached(llama):
                scores(llama)
                calls.append(kept_batches(llama))
        assert calls == [{2: 3}, {2: 3}]  # of the first arm, read by the second
        next(iter(shared_blocks._SHARED[llama].kept[2].values())).zero_()  # what is read matters
        with plan("layers.1.output").attached(llama):
            wrong = scores(llama)
    with plan("layers.1.output").attached(llama):
        assert not torch.equal(wrong, scores(llama))
    assert all("forward" not in vars(block) for block in blocks)


def test_what_the_plain_model_gave_serves_arms_that_act_higher(llama: nn.Module) -> None:
    runs: list[int] = []
    with sharing_lower_blocks(llama):
        plain = scores(llama)
        assert kept_batches(llama) == {1: 3, 2: 3}  # a third, two thirds and seven eighths of three blocks
        handles = [
            block.mlp.down_proj.register_forward_hook(CountsRuns(layer, runs)) for layer, block in enumerate(Anatomy.find(llama).blocks)
        ]
        for site, ran in {"layers.2.mlp.output": [2] * 3, "layers.1.mlp.output": [1, 2] * 3}.items():
            runs.clear()
            with plan(site).attached(llama):
                found = scores(llama)
            assert runs == ran, site
            assert not torch.equal(found, plain)
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("change", ["in place", "data", "replaced", "buffer"])
def test_changed_weights_are_seen(llama: nn.Module, change: str) -> None:
    attached = plan("layers.1.output")
    with sharing_lower_blocks(llama):
        with attached.attached(llama):
            before = scores(llama)
        parameter = next(iter(Anatomy.find(llama).blocks[0].parameters()))
        if change == "in place":
            with torch.no_grad():
                parameter.mul_(1.5)
        elif change == "data":
            parameter.data.mul_(1.5)
        elif change == "replaced":
            module = next(m for m in Anatomy.find(llama).blocks[0].modules() if isinstance(m, nn.Linear))
            module.weight = nn.Parameter(module.weight.detach() * 1.5)
        else:
            embedding = llama.get_input_embeddings()
            embedding.weight.data.mul_(1.5)
        with attached.attached(llama):
            after = scores(llama)
    with attached.attached(llama):
        assert torch.equal(after, scores(llama))
    assert not torch.equal(after, before)


def test_hooks_of_others_are_seen(llama: nn.Module) -> None:
    anatomy = Anatomy.find(llama)
    attached = plan("layers.2.output")
    with sharing_lower_blocks(llama), attached.attached(llama):
        before = scores(llama)
        handle = anatomy.blocks[0].register_forward_hook(lambda module, args, output: output * 2 if isinstance(output, Tensor) else output)
        after = scores(llama)
        handle.remove()
        again = scores(llama)
    assert torch.equal(before, again) and not torch.equal(before, after)


def test_where_hooks_begin(llama: nn.Module) -> None:
    anatomy = Anatomy.find(llama)
    assert untouched_blocks(llama, anatomy) == 3
    for site, depth in {"layers.1.output": 2, "layers.1.input": 1, "layers.1.mlp.output": 1, "layers.0.attn.output": 0, "embed": 0}.items():
        with plan(site).attached(llama):
            assert untouched_blocks(llama, anatomy) == depth, site
    handle = llama.register_forward_hook(lambda *_: None)  # whoever runs the model a second time does it there
    assert untouched_blocks(llama, anatomy) == 0
    handle.remove()
    block = anatomy.blocks[1]
    block.forward = block.forward  # a wrapper, as accelerate puts it there
    assert untouched_blocks(llama, anatomy) == 1
    del block.forward


def test_a_model_that_cannot_begin_in_its_middle_runs_whole(llama: nn.Module) -> None:
    """An upper block reads what a lower one left: what it reads would be that of another pass."""
    first, last = (Anatomy.find(llama).blocks[layer] for layer in (0, 2))
    left: dict[str, Tensor] = {}
    plain, norm = first.input_layernorm, last.input_layernorm

    class Leaves(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            left["h"] = h.flatten()[0].detach() + left.get("h", 0)
            return plain(h)

    class Reads(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return norm(h) + left["h"]

    first.input_layernorm, last.input_layernorm = Leaves(), Reads()
    with sharing_lower_blocks(llama):
        assert llama not in shared_blocks._SHARED


def test_nothing_is_kept_beyond_the_limit_nor_after_an_interrupt(llama: nn.Module) -> None:
    with sharing_lower_blocks(llama, most_bytes=2 * 5 * WIDTH * 4), plan("layers.1.output").attached(llama):
        expected = scores(llama)
        assert kept_batches(llama) == {2: 2}  # of three
        assert torch.equal(expected, scores(llama))
    with pytest.raises(KeyboardInterrupt), sharing_lower_blocks(llama):
        raise KeyboardInterrupt
    assert llama not in shared_blocks._SHARED
