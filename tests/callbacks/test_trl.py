"""The Hugging Face callbacks under TRL's trainers: supervised, preference (policy and reference pass), and reinforcement (generation)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_helpers import SITE, make_plan, make_tracker, n_hooks
from families import FAMILIES
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny_tokenizer import tiny_tokenizer
from torch import nn

from steer.callbacks import HFDriftCallback, HFSteeringCallback
from steer.model.context import ForwardContext
from steer.model.load import load
from steer.model.watcher import watcher_of

pytest.importorskip("trl", reason="trl is an extra: pip install 'torchsteer[dev]'")
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
NAME = f"add@{SITE}"
LOGGED = f"steer/add/{SITE}"  # prefix of its metrics


def options(out: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        **more,
    }


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def with_adapter() -> PeftModel:
    """A LoRA model whose adapter has been trained already, which makes TRL keep a frozen copy of it as the reference."""
    model = get_peft_model(FAMILIES["llama"](), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


class Passes:
    """What the forward passes of a model were, from the first training step on: (phase, role, rows, response tokens)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, int, int]] = []

    def __call__(self, ctx: ForwardContext) -> None:
        self.seen.append((ctx.phase, ctx.role, ctx.batch, 0 if ctx.labelled is None else int(ctx.labelled.sum())))


def watched(callback: HFSteeringCallback) -> Passes:
    """Listens to the watcher of a model once the callback has attached its plan."""
    passes, begin = Passes(), callback.begin

    def began(model: nn.Module, ranks: Any) -> None:
        begin(model, ranks)
        watcher = watcher_of(model)
        assert watcher is not None
        watcher.on_close.append(passes)

    callback.begin = began  # type: ignore[method-assign]
    return passes


# ---- supervised fine-tuning

SFT_ROWS = [{"prompt": "the cat", "completion": "sat on the mat"}, {"prompt": "the big dog ran", "completion": "in the house"}] * 4


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_sft_steers_the_completions(tmp_path: Path, packing: bool) -> None:
    plan, tracker = make_plan(), make_tracker()
    trainer = trl.SFTTrainer(
        model=FAMILIES["llama"](),
        args=trl.SFTConfig(**options(tmp_path, packing=packing, max_length=24, max_steps=1)),
        train_dataset=Dataset.from_list(SFT_ROWS),
        processing_class=tiny_tokenizer(),
    )
    steering = HFSteeringCallback(plan).attach(trainer)
    HFDriftCallback(tracker).attach(trainer)
    passes = watched(steering)
    trainer.train()
    (trained,) = [seen for seen in passes.seen if seen[0] == "train"]
    assert steering.attachment.fired() == {NAME: trained[3]} and trained[3] > 0
    assert {record.n for record in tracker.latest if record.mode == "stream"} == {trained[3]}
    assert n_hooks(trainer.model) == 0


def test_sft_on_conversations_steers_the_assistant(tmp_path: Path) -> None:
    plan = make_plan()
    talk = [{"role": "user", "content": "what is the moon"}, {"role": "assistant", "content": "it is big"}]
    trainer = trl.SFTTrainer(
        model=FAMILIES["llama"](),
        args=trl.SFTConfig(**options(tmp_path, assistant_only_loss=True, max_steps=1)),
        train_dataset=Dataset.from_list([{"messages": talk}] * 4),
        processing_class=tiny_tokenizer(),
    )
    steering = HFSteeringCallback(plan).attach(trainer)
    trainer.train()
    assert steering.attachment.fired() == {NAME: 2 * 4}  # "it is big <eos>", two rows


# ---- preferences

DPO_ROWS = [{"prompt": "the cat", "chosen": "sat on the mat", "rejected": "ran"}] * 8
COMPLETIONS = 2 * (5 + 2)  # a batch of two pairs, each completion with its end of sequence


def dpo(out: Path, *, adapter: bool, **more: Any) -> Any:
    return trl.DPOTrainer(
        model=with_adapter() if adapter else FAMILIES["llama"](),
        args=trl.DPOConfig(**options(out, max_steps=1, **more)),
        train_dataset=Dataset.from_list(DPO_ROWS),
        processing_class=tiny_tokenizer(),
        peft_config=None if adapter else lora(),
    )


def first(trainer: Any, name: str) -> float:
    return next(entry[name] for entry in trainer.state.log_history if name in entry)


@pytest.mark.parametrize("adapter", [False, True], ids=["adapters off", "copy of the adapter"])
@pytest.mark.parametrize("phases", [("train",), ("train", "validate")], ids="+".join)
def test_dpo_steers_the_policy_and_never_the_reference(tmp_path: Path, adapter: bool, phases: tuple[str, ...]) -> None:
    bare = dpo(tmp_path, adapter=adapter)
    bare.train()
    assert first(bare, "loss") == pytest.approx(math.log(2), abs=1e-5)  # policy and reference agree at the first step

    plan, trainer = make_plan(strength=3.0), dpo(tmp_path, adapter=adapter)
    assert ("ref" in trainer.model.peft_config) == adapter
    steering = HFSteeringCallback(plan, phases=phases).attach(trainer)
    passes = watched(steering)
    trainer.train()
    assert passes.seen == [("train", "policy", 4, COMPLETIONS), ("validate", "reference", 4, COMPLETIONS)]
    assert steering.attachment.fired() == {NAME: COMPLETIONS}
    assert first(trainer, "loss") != pytest.approx(math.log(2), abs=1e-3)  # they would agree if both were steered, or neither
    assert n_hooks(trainer.model) == 0


def test_the_reference_of_a_trained_soft_prompt_is_never_steered(tmp_path: Path) -> None:
    """TRL keeps the trained prompt as an adapter called `ref`, in a model that has no adapter layers."""
    model = get_peft_model(FAMILIES["llama"](), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**options(tmp_path, max_steps=1)),
        train_dataset=Dataset.from_list(DPO_ROWS),
        processing_class=tiny_tokenizer(),
    )
    steering = HFSteeringCallback(make_plan(strength=3.0), phases=("train", "validate")).attach(trainer)
    passes = watched(steering)
    trainer.train()
    assert passes.seen == [("train", "policy", 4, COMPLETIONS), ("validate", "reference", 4, COMPLETIONS)]
    assert steering.attachment.fired() == {NAME: COMPLETIONS}


def test_full_dpo_on_a_loaded_model_makes_its_reference_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load("llama")  # a relative path
    monkeypatch.chdir("/")
    rows = Dataset.from_list(DPO_ROWS)
    trainer = trl.DPOTrainer(model, args=trl.DPOConfig(**options(tmp_path, max_steps=1)), train_dataset=rows, processing_class=tokenizer)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), trainer.ref_model.parameters(), strict=True))
    steering = HFSteeringCallback(make_plan(strength=3.0), phases=("train", "validate")).attach(trainer)
    trainer.train()
    assert steering.attachment.fired() == {NAME: COMPLETIONS}


def test_dpo_with_a_reference_model_of_its_own(tmp_path: Path) -> None:
    plan = make_plan(strength=3.0)
    trainer = trl.DPOTrainer(
        model=FAMILIES["llama"](),
        ref_model=FAMILIES["llama"](),
        args=trl.DPOConfig(**options(tmp_path, max_steps=1)),
        train_dataset=Dataset.from_list(DPO_ROWS),
        processing_class=tiny_tokenizer(),
    )
    steering = HFSteeringCallback(plan, phases=("train", "validate")).attach(trainer)
    trainer.train()
    assert steering.attachment.fired() == {NAME: COMPLETIONS}
    assert first(trainer, "loss") != pytest.approx(math.log(2), abs=1e-3)


def test_dpo_drift_reads_the_policy_only(tmp_path: Path) -> None:
    trainer, tracker = dpo(tmp_path, adapter=False, gradient_checkpointing=True), make_tracker()
    HFDriftCallback(tracker).attach(trainer)
    trainer.train()
    assert {record.n for record in tracker.latest if record.mode == "stream"} == {COMPLETIONS}


def test_strength_zero_dpo_is_the_same_to_the_bit(tmp_path: Path) -> None:
    trained = []
    for steered in (False, True):
        trainer = dpo(tmp_path, adapter=False)
        if steered:
            HFSteeringCallback(make_plan(strength=0.0)).attach(trainer)
            HFDriftCallback(make_tracker()).attach(trainer)
        trainer.train()
        trained.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


# ---- reinforcement


def test_grpo_steers_the_policy_pass_and_not_what_it_samples(tmp_path: Path) -> None:
    masks: list[int] = []

    class Noting(trl.GRPOTrainer):
        def _compute_loss(self, model: nn.Module, inputs: Any) -> Any:
            masks.append(int(inputs["completion_mask"].sum()))
            return super()._compute_loss(model, inputs)

    plan, tracker = make_plan(strength=3.0), make_tracker()
    trainer = Noting(
        model=FAMILIES["llama"](),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=trl.GRPOConfig(**options(tmp_path, num_generations=2, max_completion_length=4, beta=0.04)),
        train_dataset=Dataset.from_list([{"prompt": "the cat"}, {"prompt": "what is the moon"}] * 4),
        processing_class=tiny_tokenizer(),
        peft_config=lora(),
    )
    steering = HFSteeringCallback(plan, every_n_steps=1).attach(trainer)
    HFDriftCallback(tracker, every_n_steps=1).attach(trainer)
    passes = watched(steering)
    trainer.train()
    assert {seen[:2] for seen in passes.seen} == {("generate", "policy"), ("validate", "reference"), ("train", "policy")}
    assert [seen[3] for seen in passes.seen if seen[0] == "train"] == masks and sum(masks) > 0
    assert steering.attachment.fired() == {NAME: sum(masks)}
    assert {record.n for record in tracker.latest if record.mode == "stream"} == {masks[-1]}
    assert first(trainer, f"{LOGGED}/tokens") == masks[0]
    assert n_hooks(trainer.model) == 0
