"""Fingerprints: a copy in a narrower type is the same model, other weights are another one, whichever of the two was there first."""

import copy
import json
import warnings

import pytest
import torch

from steer.model.anatomy import Anatomy
from steer.model.fingerprint import CASTS, DIGEST, bits_digest, cast_between, differing, warn_of_cast


def fingerprint(model) -> dict:
    return json.loads(json.dumps(Anatomy.find(model).fingerprint()))  # as it stands in a file


def trained(model, by: float = 1e-5):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(by)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_copy_is_the_same_model_and_says_so(tiny, dtype):
    model = tiny("llama")
    whole, cast = fingerprint(model), fingerprint(copy.deepcopy(model).to(dtype))
    name = str(dtype).removeprefix("torch.")
    assert differing(whole, cast) == differing(cast, whole) == {}
    assert cast_between(whole, cast) == f"this model is a {name} copy of that one"
    assert cast_between(cast, whole) == f"that one is a {name} copy of this model"
    with pytest.warns(UserWarning, match=f"this plan was made on a model in another precision: this model is a {name} copy"):
        warn_of_cast("this plan was", whole, cast)


def test_a_copy_that_is_cast_back_holds_the_same_numbers(tiny):
    narrow = tiny("llama").bfloat16()
    first, back = fingerprint(narrow), fingerprint(copy.deepcopy(narrow).float())
    assert first[DIGEST] == back[DIGEST] and cast_between(first, back) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_cast("this plan was", first, back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trained_weights_are_another_model_in_every_type(tiny, dtype):
    model = tiny("llama")
    other = fingerprint(trained(model, 1e-2).to(dtype))
    assert differing(fingerprint(model), other).keys() == {DIGEST} and cast_between(fingerprint(model), other) is None
    if dtype == torch.float32:
        assert differing(fingerprint(model), fingerprint(trained(model))).keys() == {DIGEST}  # which a cast would not see


def test_older_files_and_shards_say_less(tiny):
    model = tiny("llama")
    whole, cast = fingerprint(model), fingerprint(copy.deepcopy(model).bfloat16())
    older = {key: value for key, value in whole.items() if key != CASTS}
    assert differing(older, whole) == {} and differing(older, cast).keys() == {DIGEST}
    assert differing({**whole, DIGEST: None, CASTS: None}, cast) == {}
    assert differing({**whole, "width": 64}, whole) == {"width": (64, 32)}
    assert differing("llama", whole) == {"fingerprint": ("llama", whole)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize("shape", [(3, 5), (300, 400), (101, 401)])
def test_the_digest_of_bits_sees_every_number_and_its_place(shape, dtype):
    numbers = (torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 40).to(dtype)
    changed = numbers.clone()
    changed[-1, -1] += 1
    swapped = numbers.clone()
    i, j = (0, 0), next((r, c) for r in range(shape[0] - 1, 0, -1) for c in range(shape[1]) if numbers[r, c] != numbers[0, 0])
    swapped[i], swapped[j] = numbers[j], numbers[i]
    others = [changed, swapped, numbers.flip(0), numbers.flip(1), numbers.roll(2, 0), numbers.roll(2, 1), -numbers]
    digests = {bits_digest(each) for each in (numbers, *others)}
    assert len(digests) == 1 + len(others)
    assert bits_digest(numbers) == bits_digest(numbers.mT.contiguous().mT)  # however it lies in memory
    assert bits_digest(numbers) == bits_digest(torch.cat([numbers[:1], numbers])[1:])  # wherever it begins


def test_neurons_in_another_order_are_other_weights(tiny):
    model = tiny("llama")
    order = torch.arange(model.config.intermediate_size).flip(0)
    mlp = model.model.layers[0].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        before = bits_digest(linear.weight)
        linear.weight.data = linear.weight.data[order]
        assert bits_digest(linear.weight) != before
