"""EditCallback and HFEditCallback under real trainers: the same weights from both, and from a run that was killed and went on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from callback_helpers import Module, examples, loader, make_trainer, same_weights
from edit_training import FACTS, PATH, TOKENIZER, solved_edit, tiny_model, weight
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainingArguments

import steer.callbacks.hf as hf
from steer.callbacks import EditCallback, HFEditCallback
from steer.edits.edited_weights import EditedWeights
from steer.errors import ConfigError
from steer.training.edit_run import EditNotAppliedWarning
from steer.training.metric_crossing import MetricCrossing

SIZES = {"num_hidden_layers": 2}
EDIT = solved_edit(tiny_model(**SIZES))
PROBABILITY = "edit/home/probability"
PROTECT = ("alarm", "resolve", "project", "freeze", "damp")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning", "ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::steer.training.edit_run.EditFadesWarning", "ignore::UserWarning:peft"),
]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def lora() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return get_peft_model(tiny_model(**SIZES), config)


def model_of(kind: str) -> nn.Module:
    return tiny_model(**SIZES) if kind == "base" else lora()


class AdamW(Module):
    """AdamW with decay."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return optimizer_of(self.model)


class InOrder(Trainer):
    """Batches in their order, and the loss that the model gives."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        output = model(**inputs, use_cache=False)
        return (output.loss, output) if kwargs.get("return_outputs") or (args and args[0] is True) else output.loss


class Rest:
    """The batches after a step; Lightning goes on counting where it was, but begins with the first batch that it gets."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[2 * number, 2 * number + 1] for number in range(self.first, 8)])

    def __len__(self) -> int:
        return 8


def options_of(protect: str, kind: str, **options: Any) -> dict[str, Any]:
    into = "adapter" if kind == "adapter" else "base"
    return {"at_step": 2, "every_n_steps": 2, "protect": protect, "into": into, "keep": 1.0, **options}


class Logged(pl.loggers.Logger):
    """Keeps what is logged, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[int, dict[str, float]] = {}

    name, version = "kept", "0"  # type: ignore[assignment]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        edits = {name: value for name, value in metrics.items() if name.startswith("edit/")}
        if edits:
            self.metrics.setdefault(step or 0, {}).update(edits)


def lightning(folder: Path, kind: str, steps: int = 6, resume: Path | None = None, **options: Any) -> tuple[AdamW, EditCallback, Logged]:
    module, callback, logged = AdamW(model_of(kind)), EditCallback(EDIT, TOKENIZER, **options), Logged()
    saved = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = make_trainer(callback, saved, max_steps=steps, logger=logged, log_every_n_steps=1, gradient_clip_val=1.0)
    first = 0 if resume is None else int(resume.stem.removeprefix("step="))
    trainer.fit(module, DataLoader(examples(), batch_sampler=Rest(first)), ckpt_path=resume)  # type: ignore[arg-type]
    return module, callback, logged


def hugging_face(
    folder: Path, kind: str, steps: int = 6, resume: Any = None, arguments: Any = None, **options: Any
) -> tuple[Trainer, HFEditCallback]:
    model = model_of(kind)
    args = {"output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1}
    args |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 1, "max_grad_norm": 1.0, **(arguments or {})}
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = InOrder(
        model=model,
        args=TrainingArguments(**args),
        train_dataset=examples(),  # type: ignore[arg-type]
        eval_dataset=examples(4),  # type: ignore[arg-type]
        optimizers=(optimizer, schedule),
    )
    callback = HFEditCallback(EDIT, TOKENIZER, **options).attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def logged_by(trainer: Trainer) -> dict[int, dict[str, float]]:
    entries = {
        entry["step"]: {n: v for n, v in entry.items() if n.startswith("edit/")} for entry in trainer.state.log_history if "loss" in entry
    }
    return {step: values for step, values in entries.items() if values}


# ---- twins


@pytest.mark.parametrize("protect", PROTECT)
def test_both_trainers_give_the_same_weights_edits_and_metrics(protect: str, tmp_path: Path) -> None:
    kind = "adapter" if protect == "alarm" else "base"
    module, callback, logged = lightning(tmp_path / "l", kind, **options_of(protect, kind))
    trainer, twin = hugging_face(tmp_path / "h", kind, **options_of(protect, kind))
    assert same_weights(module.model, trainer.model)
    assert [edit.digest for edit in callback.edits] == [edit.digest for edit in twin.edits]
    assert logged.metrics == logged_by(trainer) and sorted(logged.metrics) == [2, 4, 6]
    assert {PROBABILITY, "edit/home/key_drift"} <= set(logged.metrics[2])
    ours, theirs = callback.state_dict(), twin.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("protect", ["resolve", "project"])
def test_mixed_precision(protect: str, tmp_path: Path) -> None:
    """Activations are bf16 where the weights are fp32: readings are near those of a run in full precision."""
    options = options_of(protect, "base")
    plain, _ = hugging_face(tmp_path / "plain", "base", **options)
    mixed, callback = hugging_face(tmp_path / "mixed", "base", arguments={"bf16": True}, **options)
    assert EditedWeights.of(mixed.model).applied == tuple(callback.edits) and callback.edits[0].deltas[0].keys.dtype == torch.float32
    expected, found = logged_by(plain), logged_by(mixed)
    assert found.keys() == expected.keys() and len(found) >= 3
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=0.1, abs=0.02)


def test_edits_at_the_start_and_on_a_metric(tmp_path: Path) -> None:
    crossing = MetricCrossing("loss", below=100.0)
    for options, first in (({"at_step": 0}, 0), ({"on_metric": crossing}, 1)):
        module, callback, logged = lightning(tmp_path / "l", "base", steps=2, **options)
        trainer, twin = hugging_face(tmp_path / "h", "base", steps=2, **options)
        assert same_weights(module.model, trainer.model) and min(logged.metrics) == first and callback._run.is_applied


def test_edits_that_were_never_applied_are_a_warning_at_the_end(tmp_path: Path) -> None:
    with pytest.warns(EditNotAppliedWarning, match="waited for the metric 'loss'"):
        callback, logged = lightning(tmp_path / "n", "base", steps=2, on_metric=MetricCrossing("loss", below=-1.0))[1:]
    assert not callback._run.is_applied and not logged.metrics
    with pytest.warns(EditNotAppliedWarning, match="ended at step 2, and they waited for step 5"):
        hugging_face(tmp_path / "h", "base", steps=2, at_step=5)


def test_a_metric_of_validation_is_enough(tmp_path: Path) -> None:
    class Validated(AdamW):
        def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
            self.log("val_loss", self.loss(batch))

    callback = EditCallback(EDIT, TOKENIZER, on_metric=MetricCrossing("val_loss", above=0.0))
    trainer = make_trainer(callback, max_steps=4, val_check_interval=3, num_sanity_val_steps=1)
    trainer.fit(Validated(tiny_model(**SIZES)), loader(), loader(4))
    assert callback._run.is_applied
    arguments = {"eval_strategy": "steps", "eval_steps": 3}
    twin = hugging_face(tmp_path, "base", steps=4, on_metric=MetricCrossing("eval_loss", above=0.0), arguments=arguments)[1]
    assert twin._run.is_applied and twin._run._at_application


def test_edits_stay_in_the_model_and_can_be_taken_out_of_it(tmp_path: Path) -> None:
    module, callback, _ = lightning(tmp_path, "base", steps=3, at_step=1)
    edited = EditedWeights.of(module.model)
    assert edited.applied == tuple(callback.edits) and not edited.changed
    before = weight(module.model).detach().clone()
    edited.revert("home")
    change = before.double() - weight(module.model).double()
    delta = EDIT.deltas[0]
    assert (change - delta.u.double() @ delta.v.double().T).norm() < 1e-6 * before.norm()


def test_a_second_fit_begins_with_what_is_there(tmp_path: Path) -> None:
    module, callback = AdamW(tiny_model(**SIZES)), EditCallback(EDIT, TOKENIZER)
    for _ in range(2):
        make_trainer(callback, max_steps=2).fit(module, loader())
    assert EditedWeights.of(module.model).applied == (EDIT,)


# ---- kill and resume


@pytest.mark.parametrize(("kind", "protect"), [("base", "project"), ("lora", "resolve"), ("adapter", "resolve")])
def test_a_resumed_run_ends_with_the_same_bits(kind: str, protect: str, tmp_path: Path) -> None:
    options = options_of(protect, kind)
    whole, callback, logged = lightning(tmp_path / "whole", kind, steps=8, **options)
    trainer, twin = hugging_face(tmp_path / "whole_h", kind, steps=8, **options)
    lightning(tmp_path / "killed", kind, steps=4, **options)
    for at in (2, 4):  # the step of the application, whose checkpoint has the edits in it, and a later one
        resumed, again, relogged = lightning(tmp_path / "on", kind, steps=8, resume=tmp_path / "killed" / f"step={at}.ckpt", **options)
        assert same_weights(resumed.model, whole.model), at
        assert [edit.digest for edit in again.edits] == [edit.digest for edit in callback.edits]
        assert relogged.metrics == {step: values for step, values in logged.metrics.items() if step > at}
    hugging_face(tmp_path / "killed_h", kind, steps=4, **options)
    on, on_twin = hugging_face(tmp_path / "killed_h", kind, steps=8, resume=True, **options)
    assert same_weights(on.model, trainer.model)
    assert [edit.digest for edit in on_twin.edits] == [edit.digest for edit in twin.edits]
    assert logged_by(on) == logged_by(trainer)


class Killed(BaseException):
    """Stands for a kill: nothing of the library may catch it."""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("moment", [(hf, "save_artifact"), (Trainer, "save_model")], ids=["our state", "the weights"])
def test_a_kill_between_the_state_of_the_edits_and_the_weights(
    moment: tuple[Any, str], after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of("resolve", "base", at_step=4)
    whole = hugging_face(tmp_path / "whole", "base", **options)[0]
    original = getattr(*moment)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if not any("checkpoint-4" in str(value) for value in (*args, *kwargs.values())):
            return original(*args, **kwargs)
        if after:
            original(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(*moment, dying)
        hugging_face(tmp_path / "killed", "base", **options)
    with pytest.warns(UserWarning, match=r"checkpoint-2.*checkpoint-4.*not finished"):
        resumed = hugging_face(tmp_path / "killed", "base", resume=True, **options)[0]
    assert same_weights(resumed.model, whole.model)


def test_a_checkpoint_without_the_state_is_refused(tmp_path: Path) -> None:
    options = options_of("alarm", "base", at_step=1)
    lightning(tmp_path / "l", "base", steps=2, **options)
    checkpoint = torch.load(tmp_path / "l" / "step=2.ckpt", weights_only=True)
    checkpoint["callbacks"] = {key: value for key, value in checkpoint["callbacks"].items() if not key.startswith("EditCallback")}
    torch.save(checkpoint, tmp_path / "step=2.ckpt")
    with pytest.raises(ConfigError, match=r"holds no state of these edits[\s\S]*EditCallback[\s\S]*step=2.ckpt"):
        lightning(tmp_path / "m", "base", resume=tmp_path / "step=2.ckpt", **options)
    hugging_face(tmp_path / "h", "base", steps=2, **options)
    next((tmp_path / "h" / "checkpoint-2").glob("steer_edit_state.*")).unlink()
    with pytest.raises(ConfigError, match=r"holds no state of these edits[\s\S]*steer_edit_state.home"):
        hugging_face(tmp_path / "h", "base", resume=True, **options)


def test_the_best_checkpoint_is_loaded_with_its_edits(tmp_path: Path) -> None:
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    arguments |= {"greater_is_better": True}  # the first one, since training helps
    trainer, callback = hugging_face(tmp_path, "base", arguments=arguments, **options_of("resolve", "base"))
    best = Path(trainer.state.best_model_checkpoint)
    edited = EditedWeights.of(trainer.model)
    assert best.name != "checkpoint-6" and not edited.changed and edited.applied == tuple(callback.edits)
    again = tiny_model(**SIZES)
    state = callback.load(best)
    assert all(torch.equal(state[f"edit/home/{PATH}/{part}"], getattr(callback.edits[0].deltas[0], part)) for part in ("u", "keys"))
    again.load_state_dict(hf_weights(best))
    assert same_weights(again, trainer.model)


def test_a_best_checkpoint_from_before_the_edits_has_none_and_says_so(tmp_path: Path) -> None:
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    arguments |= {"greater_is_better": False}  # the edits make it worse
    with pytest.warns(EditNotAppliedWarning, match="checkpoint of step 4 is from before they were applied"):
        trainer, _ = hugging_face(tmp_path, "base", arguments=arguments, **{**options_of("alarm", "base"), "at_step": 5})
    best = Path(trainer.state.best_model_checkpoint)
    edited = EditedWeights.of(trainer.model)
    assert best.name == "checkpoint-4" and not edited.changed and edited.applied == ()
    again = tiny_model(**SIZES)
    again.load_state_dict(hf_weights(best))
    assert same_weights(again, trainer.model)


def hf_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_kill_9_and_resume_in_another_process(tmp_path: Path) -> None:
    options = options_of("resolve", "base")
    whole, callback, _ = lightning(tmp_path / "whole", "base", steps=8, **options)
    if (child := os.fork()) == 0:
        steps, step = iter(range(6)), torch.optim.AdamW.step

        def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
            if next(steps) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *args, **kwargs)

        try:
            torch.optim.AdamW.step = killed  # type: ignore[method-assign]
            lightning(tmp_path / "killed", "base", steps=8, **options)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    saved = sorted((tmp_path / "killed").glob("*.ckpt"))
    assert [path.name for path in saved] == ["step=2.ckpt", "step=4.ckpt"]
    resumed, again, _ = lightning(tmp_path / "on", "base", steps=8, resume=saved[-1], **options)
    assert same_weights(resumed.model, whole.model)
    assert [edit.digest for edit in again.edits] == [edit.digest for edit in callback.edits]


RUN = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from callbacks.test_edit_callbacks import AdamW, hugging_face, lightning, options_of
folder, framework, kind, kill_at, resume, out = Path(sys.argv[1]), *sys.argv[2:7]
steps_taken = 0
original = torch.optim.AdamW.step
def step(self, *args, **kwargs):
    global steps_taken
    steps_taken += 1
    if steps_taken == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
torch.optim.AdamW.step = step
options = options_of("resolve", kind)
if framework == "lightning":
    checkpoints = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    model = lightning(folder, kind, steps=8, resume=checkpoints[-1] if resume == "yes" else None, **options)[0].model
else:
    model = hugging_face(folder, kind, steps=8, resume=True if resume == "yes" else None, **options)[0].model
torch.save(dict(model.state_dict()), out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["base", "adapter"])
@pytest.mark.parametrize("framework", ["lightning", "hf"])
def test_kill_9_and_resume_in_new_processes(framework: str, kind: str, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN.format(tests=str(Path(__file__).resolve().parents[1])))

    def run(folder: str, kill_at: int, resume: bool, out: str) -> int:
        arguments = [str(tmp_path / folder), framework, kind, str(kill_at), "yes" if resume else "no", str(tmp_path / out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run([sys.executable, str(script), *arguments], env=environment, capture_output=True).returncode

    assert run("whole", 0, False, "whole.pt") == 0
    assert run("killed", 6, False, "none.pt") == -9 and not (tmp_path / "none.pt").exists()
    assert run("killed", 0, True, "resumed.pt") == 0
    whole, resumed = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "resumed.pt"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


# ---- what they say


def test_they_say_what_they_are() -> None:
    for callback in (EditCallback(EDIT, TOKENIZER, at_step=5), HFEditCallback(EDIT, TOKENIZER, at_step=5)):
        assert repr(callback) == f"{type(callback).__name__}(EditRun(home at step 5, into base, protect=alarm))"
    assert json.loads(json.dumps(EditCallback(EDIT, TOKENIZER).state_key)) == "EditCallback{'edits': 'home'}"
    with pytest.raises(ConfigError, match="give Lightning's Trainer a EditCallback"):
        _ = HFEditCallback(EDIT, TOKENIZER).state_key
    assert {fact.target for fact in FACTS} == {fact.target for fact in EDIT.facts}


def test_strategies_that_keep_copies_of_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pl.strategies.SingleDeviceStrategy, "handles_gradient_accumulation", True)
    with pytest.raises(ConfigError, match="copies of the weights of its own"):
        lightning(tmp_path, "base", steps=1)
