"""Rollouts that another engine makes: they never see the plan, and the callback says so before the first step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from callback_helpers import examples, make_plan, n_hooks
from families import FAMILIES
from transformers import Trainer, TrainingArguments

from steer.callbacks import HFSteeringCallback
from steer.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def make_trainer(out: Path, on_trainer: dict[str, Any], on_arguments: dict[str, Any]) -> Trainer:
    """A trainer with the attributes by which TRL's say who samples; vLLM itself needs a GPU."""
    arguments = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    trainer = Trainer(FAMILIES["llama"](), TrainingArguments(str(out), **arguments), train_dataset=examples())  # type: ignore[arg-type]
    for owner, attributes in ((trainer, on_trainer), (trainer.args, on_arguments)):
        for name, value in attributes.items():
            object.__setattr__(owner, name, value)
    return trainer


ENGINES = {
    "vLLM (colocate)": ({"use_vllm": True, "vllm_mode": "colocate"}, {}),
    "vLLM (server)": ({}, {"use_vllm": True, "vllm_mode": "server"}),
    "a rollout_func": ({"rollout_func": print}, {"use_vllm": False}),
    "a vLLM server": ({}, {"vllm_server_base_url": "http://localhost:8000"}),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_said_at_the_start(tmp_path: Path, engine: str) -> None:
    trainer = make_trainer(tmp_path, *ENGINES[engine])
    HFSteeringCallback(make_plan()).attach(trainer)
    with pytest.warns(UserWarning) as said:
        trainer.train()
    assert any(f"sampled by {engine}, which never sees the plan" in str(warning.message) for warning in said)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plan_that_shall_act_in_them_is_refused(tmp_path: Path, engine: str) -> None:
    trainer = make_trainer(tmp_path, *ENGINES[engine])
    HFSteeringCallback(make_plan(), phases=("train", "generate")).attach(trainer)
    with pytest.raises(ConfigError, match=r"never sees the plan[\s\S]*found: [\s\S]*add@layers.1.output[\s\S]*remedy: [\s\S]*steer.bake"):
        trainer.train()
    assert trainer.state.global_step == 0 and n_hooks(trainer.model) == 0


@pytest.mark.parametrize(
    "arguments", [{}, {"use_vllm": False, "vllm_server_base_url": "http://localhost:8000"}], ids=["no GRPO", "no vLLM"]
)
def test_rollouts_of_the_model_itself_are_no_case_of_it(tmp_path: Path, arguments: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, {}, arguments)
    HFSteeringCallback(make_plan(), phases=("train", "generate")).attach(trainer)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    assert not [warning for warning in said if "never sees the plan" in str(warning.message)] and trainer.state.global_step == 1
