"""Shared fixtures. Nothing here reaches the network."""

from __future__ import annotations

import os

# before transformers is imported anywhere: it reads these once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import sqlite3
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:  # the process that hands the tests out to workers needs neither torch nor transformers, which take seconds to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# a shared machine makes any time limit per example flaky
hypothesis.settings.register_profile("steer", deadline=None)
hypothesis.settings.load_profile("steer")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported and collected stays until the end: no collection of garbage goes through it, then or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what is slow, unless it is asked for."""
    if "STEER_SLOW_TESTS" not in os.environ:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; STEER_SLOW_TESTS=1 runs it"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The suite runs one worker per core."""
    if torch := sys.modules.get("torch"):  # some file of tests has imported it
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """No test cuts the power, and what a killed process has written is with the system: nothing waits until it is on the disk."""
    connect = sqlite3.connect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(sqlite3, "connect", lambda *arguments, **options: connect(*arguments, **{"factory": Unsynced, **options}))
        yield


class Unsynced(sqlite3.Connection):
    """A database that leaves it to the system when its pages are written, whatever the program asks for."""

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:  # type: ignore[override]
        return super().execute("PRAGMA synchronous = OFF" if sql.startswith("PRAGMA synchronous") else sql, *parameters)


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded SmolLM2-135M-Instruct in float32 and its tokenizer; leave the model as you found it."""
    from steer.errors import ModelNotFoundError
    from steer.model.load import load

    try:
        return load("smollm2-135m")
    except ModelNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def tiny() -> Callable[[str], PreTrainedModel]:
    """`tiny("llama")` is a new tiny random model of that family, the same weights each time; see `families.FAMILIES`."""
    from families import FAMILIES

    return lambda family: FAMILIES[family]()


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    from tiny_tokenizer import tiny_tokenizer

    return tiny_tokenizer()
