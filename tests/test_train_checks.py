"""`steer train` says at once what is wrong, refuses a folder that holds a run, and ends in order when it is interrupted."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from families import FAMILIES
from omegaconf import OmegaConf
from tiny_experiment import SMALL, overrides, write_data, write_model

from steer.cli import main
from steer.commands import ab, cell_run, experiment_run, train, train_checks
from steer.errors import ConfigError, SiteError
from steer.experiment.sft import SFTModule
from steer.model.anatomy import Anatomy

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return write_model(folder / "model"), write_data(folder / "data")


@pytest.fixture
def steer(parts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`steer("seed=1")` trains into tmp_path/out and gives the exit status and stderr."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs with the signal ignored

    def run(*more: str) -> tuple[int, str]:
        status = main(["train", *overrides(*parts, tmp_path / "out", *SMALL), *more])
        return status, capsys.readouterr().err

    yield run
    root.handlers[:], root.level = handlers, level
    signal.signal(signal.SIGINT, ctrl_c)


def never(*_: Any, **__: Any) -> Any:
    pytest.fail("too late")


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("seed=-1", ("seed", "from 0 to 4294967295", "found: -1")),
        ("seed=4294967296", ("seed", "found: 4294967296")),
        ("seed=null", ("seed", "found: None")),
        ("experiment.completions.prompts=[]", ("nothing to answer", "experiment.completions.prompts")),
        ("experiment.completions.prompts=null", ("nothing to answer", "experiment.completions.prompts")),
        ("experiment.completions.prompts=[a,'']", ("nothing to answer",)),
        ("experiment.completions.max_new_tokens=0", ("max_new_tokens >= 1", "experiment.completions.max_new_tokens")),
        ("experiment.train.steps=0", ("steps >= 1", "steps=0")),
        ("experiment.train.steps=null", ("steps >= 1", "steps=None")),
        ("experiment.train.batch_size=5", ("batch_size 1 to 4", "found: 5")),
        ("experiment.train.batch_size=0", ("batch_size 1 to 4", "found: 0")),
    ],
)
def test_what_needs_no_model_is_checked_before_it_is_loaded(
    steer: Run, override: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment_run, "load", never)
    status, err = steer(override)
    assert status == 2 and err.startswith("ConfigError: ") and all(name in err for name in names), err


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("peft.targets=[nope]", ("peft.targets", "q_proj", "found: ['nope']")),
        ("peft.targets=[q_proj,v_prj]", ("did you mean 'v_proj'?", "found: ['v_prj']")),
        ("peft.targets=[]", ("peft.targets", "found: none")),
        ("peft.layers=[3]", ("peft.layers", "0 to 2")),
        ("peft.r=0", ("r >= 1", "r=0")),
        ("peft.dropout=2", ("dropout < 1", "dropout=2")),
        ("experiment.drift.sites=[]", ("experiment.drift.sites", "found: none")),
        ("experiment.drift.sites=[layers.9.output]", ("no direction is read at layers.9.output", "experiment.drift.sites")),
        ("experiment.drift.sites=[layers.1.outptu]", ("layers.1.outptu", "layers.1.output")),
        ("experiment.trait.site=layers.1.mlp.output", ("no direction is read at layers.1.mlp.output", "experiment.trait.site")),
        ("experiment.train.max_length=3", ("max_length >",)),
    ],
)
def test_what_needs_the_model_is_checked_before_a_cell_is_run(
    steer: Run, override: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment_run, "extract", never)
    monkeypatch.setattr(ab, "run_cell", never)
    status, err = steer(override)
    assert status == 2 and "Error: " in err.splitlines()[0] and all(name in err for name in names), err


def test_tracked_sites_may_be_patterns() -> None:
    anatomy = Anatomy.find(FAMILIES["llama"]())
    config = OmegaConf.create(
        {"trait": {"sites": ["layers.*.output"], "site": None}, "drift": {"sites": ["layers.1-2.output", "layers.0.output"]}}
    )
    assert sorted(map(str, train_checks.tracked_sites(anatomy, config))) == [f"layers.{layer}.output" for layer in range(3)]
    config.trait.sites = ["layers.1-2.output"]
    with pytest.raises(SiteError, match=r"at layers\.0\.output, which experiment\.drift\.sites names"):
        train_checks.tracked_sites(anatomy, config)


@pytest.mark.parametrize("left", ["metrics.json", "report.html", "adapters", "plans"])
def test_a_folder_that_holds_a_run_is_refused_and_left_alone(
    steer: Run, tmp_path: Path, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "ExperimentRun", never)
    (tmp_path / "out" / "config").mkdir(parents=True)
    (tmp_path / "out" / "config" / "config.yaml").write_text("the old one")
    (tmp_path / "out" / left).mkdir()
    before = sorted(tmp_path.rglob("*"))
    status, err = steer()
    assert status == 2 and "holds a run already" in err and f"found: {left}" in err and "remedy: leave hydra.run.dir out" in err
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "out" / "config" / "config.yaml").read_text() == "the old one"


def test_the_configuration_is_kept_beside_the_run(steer: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise ConfigError("far enough", expected="-", found="-", remedy="-")

    monkeypatch.setattr(experiment_run.ExperimentRun, "prepare", stop)
    assert steer("seed=7")[0] == 2
    kept = OmegaConf.load(tmp_path / "out" / "config" / "config.yaml")
    assert kept.seed == 7 and list(kept.seeds) == [7]


def test_a_place_where_no_folder_can_be_made(steer: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, err = steer(f"hydra.run.dir={tmp_path / 'file' / 'x'}")
    assert status == 2 and err.startswith("ConfigError: the output folder cannot be made") and "hydra.run.dir" in err


def test_a_sweep_numbers_its_folders(steer: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The overrides themselves hold slashes, and are longer than a name may be."""
    seen: list[int] = []
    monkeypatch.setattr(train, "run", lambda config: seen.append(config.seed))
    status, err = steer("seed=1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}", f"experiment.trait.description={'long ' * 60}", "-m")
    assert (status, err, seen) == (0, "", [1, 2])
    assert sorted(folder.name for folder in (tmp_path / "sweep").iterdir() if folder.is_dir()) == ["0", "1"]


@pytest.mark.parametrize("where", ["training", "elsewhere", "before"])
def test_interrupted(steer: Run, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ctrl_c(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "training":  # Lightning catches it and leaves with another status
            patch.setattr(SFTModule, "training_step", ctrl_c)
        elif where == "elsewhere":
            patch.setattr(cell_run, "measure_all", ctrl_c)
        else:
            patch.setattr(experiment_run, "extract", ctrl_c)
        status, err = steer()
    assert status == 130 and "Traceback" not in err
    (said,) = [line for line in err.splitlines() if line.startswith("interrupted: ")]
    assert f"'{tmp_path / 'out'}' keeps {'1 finished cell' if where == 'training' else 'what was begun'}" in said
    assert f"the same command with 'hydra.run.dir={tmp_path / 'out'}' goes on from there" in said
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    if where == "training":
        assert steer()[0] == 0, "it does go on"
        assert (tmp_path / "out" / "metrics.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("train", "bogus"), ("cannot read 'bogus'", "add '=' and a value: bogus=...")),
        (("generate", "run=x", "prompts=hello, world"), ("'prompts' has several values", "quote", "'prompts=[a,b]'")),
        (("generate", "run=x", "prompts=[hello"), ("cannot read", "quote a value with special characters")),
        (("generate", "run=x", "max_new_tokens=0"), ("max_new_tokens >= 1", "found: 0")),
        (("generate", "run=x", "max_new_tokens=-1"), ("max_new_tokens >= 1", "found: -1")),
        (("generate", "run=x", "max_new_tokens=null"), ("max_new_tokens >= 1",)),
    ],
)
def test_remedies_of_the_command_line(
    steer: Run, arguments: tuple[str, ...], names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert all(name in err for name in names), err


@pytest.mark.parametrize(("is_terminal", "wanted", "bars"), [(False, True, 0), (True, True, 1), (True, False, 0)])
def test_training_shows_one_bar_of_tqdm_in_a_terminal_and_none_in_a_pipe(monkeypatch, tmp_path, is_terminal, wanted, bars):
    from pytorch_lightning.callbacks import ProgressBar, TQDMProgressBar

    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: is_terminal, write=len, flush=lambda: None))
    chosen = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "progress": wanted, "strategy": "ddp"}
    experiment = SimpleNamespace(train=SimpleNamespace(steps=1, gradient_clip=1.0, checkpoint_every=1))
    config = SimpleNamespace(values=SimpleNamespace(trainer=SimpleNamespace(**chosen)), experiment=experiment)
    trainer = cell_run._trainer(SimpleNamespace(config=config), tmp_path, tmp_path / "checkpoints", [], None)
    found = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]
    assert [type(bar) for bar in found] == [TQDMProgressBar] * bars
