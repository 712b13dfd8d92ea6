"""The supervised module and its batches: the same order for every arm, the loss of the response tokens, nothing trained that is frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from callback_helpers import make_trainer
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from steer.errors import ConfigError
from steer.experiment.sft import SFTModule, loader
from steer.model.tokens import Row, collate

ROWS = [Row(tuple(range(7 + i, 15 + i)), 2 + i % 3) for i in range(9)]
OPTIONS: dict[str, Any] = {"batch_size": 2, "pad": 0, "seed": 3, "max_length": 32, "steps": 8}  # two epochs


def seen(seed: int = 3, noise: int = 0) -> list[Tensor]:
    torch.manual_seed(noise)  # what happened before in this process must not matter
    return [batch["input_ids"] for batch in loader(ROWS, **{**OPTIONS, "seed": seed})]


def test_every_arm_sees_the_same_batches_in_every_epoch() -> None:
    first, second = seen(noise=1), seen(noise=2)
    assert len(first) == 2 * (len(ROWS) // 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, seen(seed=4), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first[:4], first[4:], strict=True)), "each epoch is shuffled anew"
    for epoch in (first[:4], first[4:]):
        rows = [row.tolist() for batch in epoch for row in batch]
        assert all(rows.count(row) == 1 for row in rows), "no row twice in an epoch"


def test_training_reads_the_response_alone_and_only_the_adapter_learns() -> None:
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["llama"](), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    module = SFTModule(model, learning_rate=1e-2, warmup_steps=2, steps=12)
    with torch.no_grad():
        batch = next(iter(loader(ROWS, **OPTIONS)))
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    token_logprobs = logits.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    expected = -token_logprobs[batch["labels"][:, 1:] != -100].mean()
    make_trainer(max_steps=12).fit(module, loader(ROWS, **{**OPTIONS, "steps": 12}))
    assert len(module.losses) == 12
    assert float(module.losses[0]) == pytest.approx(float(expected), rel=1e-5)
    assert float(torch.stack(module.losses[-4:]).mean()) < float(torch.stack(module.losses[:4]).mean())
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_the_learning_rate_follows_the_schedule() -> None:
    module = SFTModule(FAMILIES["llama"](), learning_rate=1.0, warmup_steps=2, steps=6, schedule="linear")
    optimisers = module.configure_optimizers()
    optimizer, scheduler = optimisers["optimizer"], optimisers["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.75, 0.5, 0.25])
    assert optimisers["lr_scheduler"]["interval"] == "step"


def test_long_rows_are_cut_and_padding_has_no_label() -> None:
    batch = collate([ROWS[0], Row((7, 8, 9), 1)], 0, max_length=5)
    assert batch["input_ids"].shape == (2, 5)
    assert batch["labels"].tolist() == [[-100, -100, 9, 10, 11], [-100, 8, 9, -100, -100]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 10}, "do not fill a batch"),
        ({"batch_size": 0}, "do not fill a batch"),
        ({"max_length": 4}, "leaves no room"),
    ],
)
def test_batches_that_would_train_on_nothing(options: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        loader(ROWS, **{**OPTIONS, **options})
    assert None not in (caught.value.expected, caught.value.found, caught.value.remedy)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": -1}, "steps=-1"),  # Lightning would train for ever
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"schedule": "cosin"}, "unknown learning-rate schedule 'cosin'"),
    ],
)
def test_a_training_that_makes_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        SFTModule(torch.nn.Linear(1, 1), **{"learning_rate": 1e-3, "warmup_steps": 1, "steps": 5, **options})
    assert None not in (caught.value.expected, caught.value.found, caught.value.remedy)


# ---- resumed


STEPS = 7


class Killed(BaseException):
    """As a kill: nothing of the library's catches it."""


def fit(folder: Path, *, kill_after: int | None = None, resume: int | None = None, noise: int = 0) -> SFTModule:
    """A run of seven steps with dropout in the adapters, a checkpoint after each; one that is killed, or resumed."""
    torch.manual_seed(1)  # of the adapters, as `seed_everything` in a cell
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.3, task_type="CAUSAL_LM")
    model = get_peft_model(FAMILIES["llama"](), config).train()
    with torch.no_grad():  # B begins at 0, where dropout would not matter to the first loss
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    module = SFTModule(model, learning_rate=1e-2, warmup_steps=2, steps=STEPS, seed=3)
    checkpoints = ModelCheckpoint(folder, filename="step={step}", auto_insert_metric_name=False, every_n_train_steps=1, save_top_k=-1)

    class Kill(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == kill_after:
                raise Killed

    trainer = make_trainer(
        max_steps=STEPS, max_epochs=-1, callbacks=[checkpoints, Kill()], enable_checkpointing=True, default_root_dir=folder
    )
    torch.manual_seed(noise)  # what happened before in this process must not matter
    batches = loader(ROWS, **{**OPTIONS, "steps": STEPS}, first=resume or 0)
    trainer.fit(module, batches, ckpt_path=None if resume is None else folder / f"step={resume}.ckpt")
    assert trainer.global_step == STEPS
    return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Tensor]]:
    return outcome(fit(tmp_path_factory.mktemp("whole")))


def outcome(module: SFTModule) -> tuple[list[float], dict[str, Tensor]]:
    return [float(loss) for loss in module.losses], {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_run_that_was_killed_goes_on_to_the_same_bit(tmp_path: Path, step: int, whole: tuple[list[float], dict[str, Tensor]]) -> None:
    with pytest.raises(Killed):
        fit(tmp_path, kill_after=step + 1)  # a step more than its checkpoint
    (tmp_path / f"step={step + 1}.ckpt").unlink(missing_ok=True)
    losses, weights = outcome(fit(tmp_path, resume=step, noise=99))
    assert losses == whole[0] and len(losses) == STEPS
    assert all(torch.equal(weights[name], wanted) for name, wanted in whole[1].items())


def test_a_finished_run_is_resumed_without_a_step(tmp_path: Path, whole: tuple[list[float], dict[str, Tensor]]) -> None:
    fit(tmp_path)
    losses, weights = outcome(fit(tmp_path, resume=STEPS, noise=99))
    assert losses == whole[0] and all(torch.equal(weights[name], wanted) for name, wanted in whole[1].items())


def test_a_checkpoint_holds_what_is_trained_alone(tmp_path: Path) -> None:
    fit(tmp_path)
    held = torch.load(tmp_path / "step=2.ckpt", weights_only=False)["state_dict"]
    assert held and all("lora_" in name for name in held)


def test_what_is_random_in_a_step_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    first, again = (fit(tmp_path / str(noise), noise=noise).losses for noise in (1, 2))
    assert first == again and len({float(loss) for loss in first}) == STEPS


def test_the_batches_of_a_resumed_run_are_those_that_are_left() -> None:
    def ids(first: int) -> list[list[list[int]]]:
        return [batch["input_ids"].tolist() for batch in loader(ROWS, **{**OPTIONS, "steps": STEPS}, first=first)]

    assert all(ids(first) == ids(0)[first:] for first in range(STEPS + 1)) and len(ids(0)) == STEPS
