"""`steer ab -m` by Hydra's launchers: jobs that share a folder find what one process finds, and a job that was ended goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from experiment_helpers import command, read_metrics, without_times
from tiny_experiment import SMALL, ab_overrides, write_data, write_model

from steer.experiment.result import Result
from steer.experiment.sft import SFTModule

FEW = [*SMALL, "experiment.arms.prompt=null", "experiment.arms.inference=null", "draws=1"]
# enough steps to be caught in the middle of them
LONG = ["experiment.train.steps=20", "experiment.train.checkpoint_every=1"]
Parts = tuple[Path, Path]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("parts")
    return write_model(folder / "model"), write_data(folder / "data")


def in_one_process(parts: Parts, folder: Path, *more: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Result, "report", lambda result, path: path)
        assert command("ab", *ab_overrides(*parts, folder, *FEW, *more)) == 0
    return comparable(folder)


def comparable(folder: Path) -> Any:
    """Metrics and scores; each job has its own list of seeds."""
    metrics = read_metrics(folder)
    metrics["config"].pop("seeds")
    return without_times(metrics), (folder / metrics["scores"]).read_bytes()


@pytest.fixture(scope="module")
def workers() -> Iterator[None]:
    """Joblib keeps its processes for the next sweep, which finds torch imported in them; none outlives this file."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install torchsteer[dev]")
    yield
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True)


def swept(parts: Parts, folder: Path, *more: str) -> int:
    """Exit status of a sweep in this process, whose jobs, one for each choice of seeds, joblib runs in processes of its own."""
    return command("ab", "-m", "hydra/launcher=joblib", *ab_overrides(*parts, folder, *FEW, "seeds=[0],[1]", *more))


def sweep(parts: Parts, folder: Path, launcher: str, *more: str) -> subprocess.Popen[str]:
    """A process that lets a launcher run a job for each choice of seeds."""
    line = [sys.executable, "-m", "steer.cli", "ab", "-m", f"hydra/launcher={launcher}", *ab_overrides(*parts, folder, *FEW, *more)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.usefixtures("workers")
def test_jobs_of_joblib_write_the_page_of_one_process(parts: Parts, tmp_path: Path) -> None:
    one = in_one_process(parts, tmp_path / "one", "seeds=[0,1]")
    assert swept(parts, tmp_path / "jobs") == 0
    assert comparable(tmp_path / "jobs") == one and (tmp_path / "jobs" / "report.html").is_file()


@pytest.mark.slow
def test_jobs_of_submitit_write_the_page_of_one_process(parts: Parts, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install torchsteer[dev]")
    running = sweep(parts, tmp_path / "jobs", "submitit_local", "seeds=[0],[1]")
    one = in_one_process(parts, tmp_path / "one", "seeds=[0,1]")
    err = running.communicate()[1]
    assert running.returncode == 0, err[-3000:]
    assert comparable(tmp_path / "jobs") == one and (tmp_path / "jobs" / "report.html").is_file()


@pytest.mark.usefixtures("workers")
def test_a_job_that_is_wrong_says_what_as_in_one_process(parts: Parts, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert swept(parts, tmp_path / "f", "experiment.outcomes.neutral_loss.margin=null") == 2
    err = capfd.readouterr().err
    assert "guardrail 'neutral_loss' has no margin" in err and "Traceback" not in err, err[-3000:]


def test_a_launcher_that_ends_a_job_in_training_is_not_taken_for_ctrl_c(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit tells a job that is queued again by its status."""
    monkeypatch.setattr(SFTModule, "training_step", lambda *_: sys.exit(144))
    with pytest.raises(SystemExit) as ended:
        command("ab", *ab_overrides(*parts, tmp_path / "f", *FEW, "seeds=[0]"))
    assert ended.value.code == 144


@pytest.mark.slow
def test_a_job_that_is_preempted_goes_on_by_itself_and_one_that_is_killed_by_the_same_line(parts: Parts, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install torchsteer[dev]")
    folder = tmp_path / "jobs"
    running = sweep(parts, folder, "submitit_local", "seeds=[0]", *LONG)
    one = in_one_process(parts, tmp_path / "one", "seeds=[0]", *LONG)

    def end(arm: str, how: signal.Signals) -> None:
        """Sends a signal to the job in the middle of the training of an arm."""
        while not list(folder.glob(f"cells/{arm}*/checkpoints/step=*.ckpt")):
            assert running.poll() is None, running.communicate()[1][-3000:]
            time.sleep(0.01)
        os.kill(json.loads(next(folder.glob(f"cells/{arm}*/lease.*.json")).read_text())["pid"], how)
        assert not list(folder.glob(f"cells/{arm}*/done.json")), "it was to be in the middle"

    end("plain", signal.SIGUSR2)  # as SLURM, before it takes the machine away
    end("preventative", signal.SIGKILL)
    assert running.wait() != 0
    done = {file: file.stat().st_mtime_ns for file in folder.glob("cells/*/done.json")}
    assert {file.parent.name.partition(".")[0] for file in done} == {"base", "plain"}
    again = sweep(parts, folder, "submitit_local", "seeds=[0]", *LONG)
    err = again.communicate()[1]
    assert again.returncode == 0, err[-3000:]
    assert {file: file.stat().st_mtime_ns for file in done} == done, "what is done is not run again"
    assert comparable(folder) == one
    held = {arm: next(folder.glob(f"cells/{arm}*/lease.*.json")).name for arm in ("base", "plain", "preventative", "random")}
    assert held == {"base": "lease.1.json", "plain": "lease.2.json", "preventative": "lease.2.json", "random": "lease.1.json"}


def test_the_options_of_the_slurm_recipe_are_those_of_the_launcher() -> None:
    launchers = pytest.importorskip("hydra_plugins.hydra_submitit_launcher.config", reason="pip install torchsteer[dev]")
    text = (Path(__file__).parents[1] / "docs" / "experiments.md").read_text(encoding="utf-8")
    named = set(re.findall(r"hydra\.launcher\.(\w+)", text))
    known = {field.name for field in dataclasses.fields(launchers.SlurmQueueConf)}
    assert {"partition", "max_num_timeout"} <= named <= known
