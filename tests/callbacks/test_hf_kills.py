"""A Hugging Face run that is killed while it saves: a resume has the whole state, or says which file is missing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_helpers import SITE, examples, learner, make_plan, make_tracker, n_hooks, only
from families import FAMILIES
from torch import Tensor, nn
from transformers import Trainer, TrainerState, TrainingArguments

import steer.callbacks.hf as hf
from steer.callbacks import HFDriftCallback, HFSteeringCallback, SteeringCallback
from steer.errors import ConfigError, DamagedFileError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning")


def run(out: Path, *, resume: Any = None, steps: int = 6, drift: bool = True, **options: Any) -> tuple[Tensor, Any, Trainer]:
    """A frozen model, and a vector that is learned: its values, the drift of the last step, the trainer."""
    arguments = {"output_dir": str(out), "max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 2}
    arguments |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 1, "lr_scheduler_type": "constant", "logging_steps": 3}
    trainer = Trainer(model=FAMILIES["llama"](), args=TrainingArguments(**{**arguments, **options}), train_dataset=examples())  # type: ignore[arg-type]
    steering = HFSteeringCallback(learner(), learning_rate=0.1, every_n_steps=2).attach(trainer)
    tracker = make_tracker(out.parent / f"{out.name}.sqlite")
    if drift:
        HFDriftCallback(tracker, every_n_steps=4).attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return only(steering.plan), tracker.log_values(), trainer


class Killed(BaseException):
    """Stands for a kill: nothing of the library may catch it."""


def die_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, after: bool) -> None:
    """Kills at the first call of a function that belongs to checkpoint 4, before or after its work."""
    original = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if not any("checkpoint-4" in str(value) for value in (*args, *kwargs.values())):
            return original(*args, **kwargs)
        if after:
            original(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(owner, name, dying)


MOMENTS = {
    "our state": (hf, "save_artifact"),
    "the weights": (Trainer, "save_model"),
    "the optimiser": (Trainer, "_save_optimizer_and_scheduler"),
    "the random state": (Trainer, "_save_rng_state"),
    "the state of the trainer": (TrainerState, "save_to_json"),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_any_point_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, after: bool) -> None:
    want, values, _ = run(tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        die_at(patched, *MOMENTS[moment], after=after)
        run(tmp_path / "killed")
    is_whole = (moment, after) == ("the state of the trainer", True)
    with pytest.warns(UserWarning, match=r"checkpoint-2.*checkpoint-4.*not finished" if not is_whole else ""):
        got, resumed_values, trainer = run(tmp_path / "killed", resume=True)
        if is_whole:
            hf.warnings.warn("none is expected", stacklevel=1)
    assert torch.equal(got, want) and resumed_values == values and trainer.state.global_step == 6
    with pytest.raises(DamagedFileError, match=r"not finished[\s\S]*trainer_state.json") if not is_whole else monkeypatch.context():
        (tmp_path / "again" / "checkpoint-4").mkdir(parents=True)
        run(tmp_path / "again", resume=str(tmp_path / ("killed" if is_whole else "again") / "checkpoint-4"))


def test_an_older_checkpoint_of_that_name_is_not_whole_while_it_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "out")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        die_at(patched, Trainer, "save_model", after=True)
        run(tmp_path / "out")
    assert not hf.is_whole(tmp_path / "out" / "checkpoint-4") and hf.is_whole(tmp_path / "out" / "checkpoint-2")


def test_the_only_checkpoint_that_is_kept_has_the_state(tmp_path: Path) -> None:
    want, _, _ = run(tmp_path / "whole")
    run(tmp_path / "killed", steps=4, save_total_limit=1)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["checkpoint-4"]
    assert torch.equal(run(tmp_path / "killed", resume=True)[0], want)


@pytest.mark.parametrize("n_written", [0, 90])
def test_a_kill_while_the_last_file_is_written(tmp_path: Path, n_written: int) -> None:
    """Trainers do not write it at one stroke."""
    want, _, _ = run(tmp_path / "whole", drift=False)
    run(tmp_path / "killed", steps=4, drift=False)
    last = tmp_path / "killed" / "checkpoint-4" / "trainer_state.json"
    last.write_text(last.read_text()[:n_written])
    with pytest.raises(DamagedFileError, match="not finished"):
        run(tmp_path / "again", resume=str(last.parent), drift=False)
    with pytest.warns(UserWarning, match=r"checkpoint-4.*not finished"):
        assert torch.equal(run(tmp_path / "killed", resume=True, drift=False)[0], want)


def test_the_state_of_another_step_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "out", steps=4, drift=False)
    (file,) = (tmp_path / "out" / "checkpoint-4").glob("steer_*.safetensors")
    file.write_bytes((tmp_path / "out" / "checkpoint-2" / file.name).read_bytes())
    with pytest.raises(DamagedFileError, match=r"after step 4[\s\S]*after step 2"):
        run(tmp_path / "out", resume=True, drift=False)


def test_nothing_to_resume_from_but_a_torn_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(DamagedFileError, match="not finished"):
        run(tmp_path / "out", resume=True)


@pytest.mark.parametrize("kind", ["steering_state", "drift_state"])
def test_a_missing_state_is_named(tmp_path: Path, kind: str) -> None:
    run(tmp_path / "out", steps=4)
    (file,) = (tmp_path / "out" / "checkpoint-4").glob(f"steer_{kind}.*.safetensors")
    file.unlink()
    with pytest.raises(ConfigError, match=rf"holds no [\s\S]*expected: .*{re.escape(file.name)}[\s\S]*remedy: ") as caught:
        run(tmp_path / "out", resume=True)
    assert "checkpoint-4" in str(caught.value)


def test_metrics_on_their_way_to_the_log_survive_a_kill(tmp_path: Path) -> None:
    def logged(trainer: Trainer) -> dict[int, dict[str, float]]:
        entries = {}
        for entry in trainer.state.log_history:
            entries[entry["step"]] = {name: value for name, value in entry.items() if name.startswith(("steer/", "drift"))}
        return entries

    whole = run(tmp_path / "whole", drift=False)[2]  # measured at 2 and 4, logged at 3 and 6
    run(tmp_path / "killed", steps=2, drift=False)
    resumed = run(tmp_path / "killed", resume=True, drift=False)[2]
    assert logged(whole)[3] == logged(resumed)[3] != {}


def test_a_best_checkpoint_without_the_state_is_said_so(tmp_path: Path) -> None:
    trainer = run(tmp_path / "out", steps=2)[2]
    steering = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, HFSteeringCallback))
    trainer.args.load_best_model_at_end = True
    trainer.state.best_model_checkpoint = str(tmp_path / "nowhere")
    with pytest.warns(UserWarning, match="best checkpoint lacks steer_steering_state"):
        steering.on_train_end(trainer.args, trainer.state, trainer.control)


def test_lightning_refuses_a_plan_that_learns_without_its_state(tmp_path: Path) -> None:
    from callback_helpers import Module, loader, make_trainer

    plain = make_trainer(max_steps=2)
    plain.fit(Module(), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    module: nn.Module = Module()
    with pytest.raises(ConfigError, match=r"no state of a plan that learns[\s\S]*SteeringCallback[\s\S]*plain.ckpt[\s\S]*remedy"):
        steering = SteeringCallback(learner(), learning_rate=0.1)
        make_trainer(steering, max_steps=4).fit(module, loader(), ckpt_path=tmp_path / "plain.ckpt")  # type: ignore[arg-type]
    assert n_hooks(module) == 0
    with pytest.warns(UserWarning, match=rf"no state of this plan.*{SITE}"):
        make_trainer(SteeringCallback(make_plan()), max_steps=3).fit(Module(), loader(), ckpt_path=tmp_path / "plain.ckpt")
