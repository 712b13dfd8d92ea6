"""Fingerprints: a copy in a narrower type is the same model, other weights are another one, whichever of the two was there first."""

import copy
import json
import warnings

import pytest
import torch

from steer.model.anatomy import Anatomy
from steer.model.fingerprint import CASTS, DIGEST, cast_between, differing, warn_of_cast


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
