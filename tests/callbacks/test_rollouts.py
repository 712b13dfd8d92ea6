"""Rollouts that another engine makes: they never see the plan, which is said before the first step, unless the weights hand it over."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from callback_helpers import examples, make_plan, n_hooks
from families import FAMILIES
from hand import ids, vector
from tiny_tokenizer import tiny_tokenizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from steer.callbacks import HFSteeringCallback
from steer.errors import ConfigError, DeployError
from steer.intervene import Ablate, Add, Intervention, Plan
from steer.model.watcher import watcher_of

trl = pytest.importorskip("trl", reason="trl is an extra: pip install 'torchsteer[dev]'")
from datasets import Dataset  # noqa: E402
from trl.generation.vllm_generation import VLLMGeneration  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
BOTH = ("train", "generate")


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


def ablation(**options: Any) -> Plan:
    return Plan([Intervention(Ablate(vector()), f"layers.*.{part}", name=part, **options) for part in ("attn.output", "mlp.output")])


class CopiedModel(VLLMGeneration):
    """TRL's own synchronisation, into a model of the same class in place of vLLM's."""

    def _init_vllm(self) -> None:
        self.copy = FAMILIES["llama"]()
        self.logits_after_sync: list[torch.Tensor] = []
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load))
        self.llm = SimpleNamespace(
            llm_engine=SimpleNamespace(model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))),
            reset_prefix_cache=self._note,
        )

    def _load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            self.copy.get_parameter(name).data.copy_(weight)

    def _note(self) -> None:
        with torch.no_grad():
            self.logits_after_sync.append(self.copy(ids(2, 7)).logits)

    def generate(self, prompts: list[list[int]], **_: Any) -> Any:
        completions = [
            self.copy.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :].tolist() for prompt in prompts
        ]
        return prompts, completions, [[[0.0]] * len(completion) for completion in completions], None


def grpo(out: Path) -> Any:
    trainer = trl.GRPOTrainer(
        model=FAMILIES["llama"](),
        reward_funcs=lambda completions, **_: [float(n % 3) for n, _ in enumerate(completions)],
        args=trl.GRPOConfig(
            output_dir=str(out),
            per_device_train_batch_size=2,
            max_steps=3,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
            gradient_checkpointing=False,
            num_generations=2,
            max_completion_length=4,
        ),
        train_dataset=Dataset.from_list([{"prompt": "the cat"}, {"prompt": "what is the moon"}] * 4),
        processing_class=tiny_tokenizer(),
    )
    trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, "colocate", -1
    trainer.vllm_importance_sampling_correction = False
    trainer.vllm_generation = CopiedModel(trainer.model, trainer.accelerator, tiny_tokenizer())
    return trainer


def test_each_synchronisation_hands_over_the_plan(tmp_path: Path) -> None:
    trainer, plan = grpo(tmp_path), ablation(schedule={"name": "linear", "steps": 2})
    steering = HFSteeringCallback(plan, phases=BOTH, bake_rollouts=True).attach(trainer)
    engine = trainer.vllm_generation
    steered, plain = [], []

    class Twin(TrainerCallback):
        """Runs the trained model itself where the engine is synchronised: at the start of each step."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            attachment = steering.attachment
            steered.append(trainer.model(ids(2, 7)).logits.detach())  # a pass with gradients is one of training
            attachment.enable(False)
            plain.append(trainer.model(ids(2, 7)).logits.detach())
            attachment.enable(True)

    trainer.add_callback(Twin())
    trainer.train()
    assert len(engine.logits_after_sync) == 3 == trainer.state.global_step
    for step, (of_engine, own, without) in enumerate(zip(engine.logits_after_sync, steered, plain, strict=True)):
        assert torch.allclose(of_engine, own, atol=1e-4)
        assert torch.allclose(own, without, atol=1e-4) == (step == 0)  # the schedule begins at 0
    assert not torch.allclose(plain[0], plain[-1], atol=1e-3)  # it trained
    assert n_hooks(trainer.model) == 0 and "sync_weights" not in vars(engine) and watcher_of(trainer.model) is None


def test_what_weights_cannot_carry_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = grpo(tmp_path)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    HFSteeringCallback(Plan(Intervention(Add(vector()), "layers.1.output")), phases=BOTH, bake_rollouts=True).attach(trainer)
    with pytest.raises(DeployError, match=r"layers.1.mlp.down_proj' by a constant"):
        trainer.train()
    after = trainer.model.state_dict()
    assert trainer.state.global_step == 0 and n_hooks(trainer.model) == 0 and all(torch.equal(after[name], before[name]) for name in before)
    assert "sync_weights" not in vars(trainer.vllm_generation)


def test_an_engine_whose_weights_come_from_elsewhere_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, *ENGINES["a rollout_func"])
    HFSteeringCallback(ablation(), phases=BOTH, bake_rollouts=True).attach(trainer)
    with pytest.raises(ConfigError, match=r"not known where it gets the weights[\s\S]*steer.Handover"):
        trainer.train()


def test_it_needs_a_plan_that_acts_in_rollouts() -> None:
    with pytest.raises(ConfigError, match="bake_rollouts=True is for a plan that acts in rollouts"):
        HFSteeringCallback(ablation(), bake_rollouts=True)


def test_a_trainer_that_samples_by_itself_needs_no_handover(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, {}, {})
    HFSteeringCallback(ablation(), phases=BOTH, bake_rollouts=True).attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 1
