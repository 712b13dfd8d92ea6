"""Scopes against a mask written out token by token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer.errors import ConfigError, ContextError
from steer.intervene.scope import KINDS, Scope
from steer.model.context import ForwardContext, build

PLAIN = [kind for kind in KINDS if "[" not in kind]
SCOPES = st.one_of(
    st.sampled_from(PLAIN),
    st.lists(st.integers(-9, 9), min_size=1, max_size=4).map(lambda numbers: f"positions[{','.join(map(str, numbers))}]"),
)


@st.composite
def texts(draw, most: int = 4):
    """Texts as (prompt tokens, response tokens)."""
    return draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=most))


def wanted(scope: Scope, index: int, prompt: int, size: int) -> bool:
    """Whether token `index` of a training text of `size` tokens is meant."""
    return {
        "all": True,
        "prompt": index < prompt,
        "response": index >= prompt,
        "generated": False,
        "last": index == size - 1,
        "positions": index in scope.positions or index - size in scope.positions,
    }[scope.kind]


def as_list(mask, ctx: ForwardContext) -> list[list[bool]]:
    return (torch.full((ctx.batch, ctx.tokens), mask) if isinstance(mask, bool) else mask).tolist()


@given(texts(), SCOPES, st.sampled_from(["left", "right"]), st.booleans(), st.booleans())
def test_training_batches(rows, name, side, with_positions, announced):
    scope = Scope.parse(name)
    width = max(prompt + response for prompt, response in rows)
    mask, labels, expected, position_ids = [], [], [], []
    for prompt, response in rows:
        size = prompt + response
        gap = [0] * (width - size)
        text = [1] * size
        marks = [-100] * prompt + [5] * response
        hits = [wanted(scope, i, prompt, size) for i in range(size)]
        join = (lambda pad, real: pad + real) if side == "left" else (lambda pad, real: real + pad)
        mask.append(join(gap, text))
        labels.append(join([-100 for _ in gap], marks))
        expected.append(join([False for _ in gap], hits))
        position_ids.append(join(gap, list(range(size))))
    given_ = {"input_ids": torch.ones(len(rows), width, dtype=torch.long), "attention_mask": torch.tensor(mask)}
    if with_positions:
        given_["position_ids"] = torch.tensor(position_ids)
    response_mask = torch.tensor(labels) != -100
    if not announced:
        given_["labels"] = torch.tensor(labels)
    ctx = build(given_, response_mask if announced else None, False)
    assert as_list(scope.mask(ctx), ctx) == expected


@given(texts(), SCOPES)
def test_packed_batches(rows, name):
    scope = Scope.parse(name)
    position_ids = [i for prompt, response in rows for i in range(prompt + response)]
    labels = [mark for prompt, response in rows for mark in [-100] * prompt + [5] * response]
    expected = [wanted(scope, i, prompt, prompt + response) for prompt, response in rows for i in range(prompt + response)]
    ids = torch.ones(1, len(labels), dtype=torch.long)
    ctx = build({"input_ids": ids, "position_ids": torch.tensor([position_ids]), "labels": torch.tensor([labels])}, None, False)
    assert as_list(scope.mask(ctx), ctx) == [expected]


class Cache:
    def __init__(self, length, static: bool) -> None:
        self.length, self.static = length, static

    def get_seq_length(self):
        return torch.tensor(self.length) if self.static else self.length


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 3), SCOPES, st.booleans(), st.booleans())
def test_generation(prompts, steps, name, static, with_positions):
    """Left-padded prompts, then one token a step."""
    scope = Scope.parse(name)
    width = max(prompts)
    for step in range(steps + 1):
        tokens = 1 if step else width
        seen = 0 if step == 0 else width + step - 1
        mask = torch.tensor([[0] * (width - size) + [1] * (size + step) for size in prompts])
        given_ = {"input_ids": torch.ones(len(prompts), tokens, dtype=torch.long), "attention_mask": mask}
        given_ |= {"past_key_values": Cache(seen, static), "use_cache": True}
        if with_positions:
            given_["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -tokens:]
        ctx = build(given_, None, False)
        expected = []
        for size in prompts:
            row = []
            for column in range(seen, seen + tokens):
                index, real = column - (width - size), column >= width - size
                decoded = column >= width
                hit = {
                    "all": True,
                    "prompt": not decoded,
                    "response": decoded,
                    "generated": decoded,
                    "last": decoded or index == size - 1,
                    "positions": index in scope.positions or (not decoded and index - size in scope.positions),
                }[scope.kind]
                row.append(real and hit)
            expected.append(row)
        assert as_list(scope.mask(ctx), ctx) == expected


@given(SCOPES)
def test_what_is_printed_is_read_back(name):
    scope = Scope.parse(name)
    assert Scope.parse(str(scope)) == scope and Scope.parse(scope) is scope


@pytest.mark.parametrize("name", ["respons", "", "positions", "positions[]", "positions[a]", "positions[1.5]", "positions[...]"])
def test_an_unknown_scope_lists_the_known_ones(name):
    with pytest.raises(ConfigError, match=rf"unknown scope[\s\S]*{'response'}"):
        Scope.parse(name)


def test_the_nearest_name_is_offered():
    with pytest.raises(ConfigError, match="did you mean 'response'"):
        Scope.parse("respons")


@pytest.mark.parametrize("name", ["prompt", "response", "generated"])
def test_a_pass_that_does_not_say_is_an_error(name):
    ctx = build({"input_ids": torch.ones(1, 3, dtype=torch.long)}, None, False)
    with pytest.raises(ContextError, match="cannot tell prompt from response"):
        Scope.parse(name).mask(ctx)
