"""Shared fixtures. Nothing here reaches the network."""

from __future__ import annotations

import os

# before transformers is imported anywhere: it reads these once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable

import hypothesis
import pytest
import torch
from families import FAMILIES
from tiny_tokenizer import tiny_tokenizer as make_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from steer.errors import ModelNotFoundError

torch.set_num_threads(1)  # the suite runs one worker per core
# a shared machine makes any time limit per example flaky
hypothesis.settings.register_profile("steer", deadline=None)
hypothesis.settings.load_profile("steer")


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded SmolLM2-135M-Instruct in float32 and its tokenizer; leave the model as you found it."""
    from steer.model.load import load

    try:
        return load("smollm2-135m")
    except ModelNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def tiny() -> Callable[[str], PreTrainedModel]:
    """`tiny("llama")` is a new tiny random model of that family, the same weights each time; see `families.FAMILIES`."""
    return lambda family: FAMILIES[family]()


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()
