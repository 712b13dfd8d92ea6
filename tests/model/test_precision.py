"""Precision of matrix products: what `auto` settles on, and what is cast."""

from __future__ import annotations

import pytest
import torch

from steer.errors import ConfigError
from steer.model import precision
from steer.model.precision import AUTO, BF16, FLOAT32, products_in, settled_precision


@pytest.mark.parametrize(
    ("speed", "dtype", "expected"), [(2.1, torch.float32, BF16), (1.2, torch.float32, FLOAT32), (2.1, torch.bfloat16, FLOAT32)]
)
def test_auto_is_bf16_where_it_is_faster_and_something_is_to_be_gained(
    monkeypatch: pytest.MonkeyPatch, speed: float, dtype: torch.dtype, expected: str
) -> None:
    monkeypatch.setattr(precision, "_speed_of_bf16", lambda: speed)
    assert settled_precision(AUTO, dtype) == expected
    assert settled_precision(AUTO, dtype, "mps") == FLOAT32
    assert settled_precision(FLOAT32, dtype) == FLOAT32 and settled_precision(BF16, dtype) == BF16


def test_the_trial_leaves_the_number_of_threads_as_it_was() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert 0 < precision._speed_of_bf16() < float("inf")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_products_alone_are_cast() -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    with products_in(BF16, x.device):
        product, total = torch.nn.functional.linear(x, weight), x + 1
    with products_in(FLOAT32, x.device):
        whole = torch.nn.functional.linear(x, weight)
    assert (product.dtype, total.dtype, whole.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(product.float(), whole, atol=0.1, rtol=0.02)


def test_another_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="precision"):
        settled_precision("bf16")
