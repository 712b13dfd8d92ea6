"""`steer ab`: cells run once, resumed to the same bit after a kill at any point, read without a model, locked before the first."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_helpers import command, read_metrics, without_times
from processes import ended, started
from tiny_experiment import SMALL, ab_overrides, write_data, write_model

from steer import Add, Intervention, Plan
from steer.commands import cell_run, experiment_run
from steer.experiment.cells import CellFolder
from steer.experiment.result import Result
from steer.experiment.sft import SFTModule
from steer.files import sealed

# two trained arms with controls of the second, and one that uses the weights of the first
FEW = [*SMALL, "experiment.arms.prompt=null", "experiment.train.checkpoint_every=1"]
CELLS = 1 + 2 * (1 + 1 + 2 + 1)  # the base, and of each seed plain, preventative, two draws of random, inference
Steer = Callable[..., int]
REPORT = Result.report


class Killed(BaseException):
    """As a kill: nothing of the library's catches it."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return write_model(folder / "model"), write_data(folder / "data")


def ab(parts: tuple[Path, Path], folder: Path, *more: str, do: str | None = None) -> int:
    return command("ab", *([do] if do else []), *ab_overrides(*parts, folder, *FEW), *more)


@pytest.fixture(scope="module")
def whole(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An experiment that ran without an interruption."""
    folder = tmp_path_factory.mktemp("whole") / "folder"
    assert ab(parts, folder) == 0
    return folder, read_metrics(folder)


@pytest.fixture(autouse=True)
def page_is_drawn_where_it_is_looked_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is half of what a tiny experiment takes."""
    if "page" not in request.node.name:
        monkeypatch.setattr(Result, "report", lambda result, path: path)


def never(*_: Any, **__: Any) -> Any:
    pytest.fail("no cell is run, and no model loaded, for this")


def cells(folder: Path) -> list[str]:
    return sorted(file.parent.name for file in folder.glob("cells/*/done.json"))


# ---- a whole experiment


def test_cells_of_every_arm_draw_and_seed(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = whole
    found = sorted((cell["arm"], cell["draw"], cell["seed"]) for cell in metrics["cells"].values())
    arms = [("plain", 0), ("preventative", 0), ("random", 0), ("random", 1), ("inference", 0)]
    assert found == sorted([("base", 0, 0), *((arm, draw, seed) for arm, draw in arms for seed in (0, 1))])
    assert cells(folder) == sorted(metrics["cells"]) and len(found) == CELLS
    assert metrics["design"]["seeds"] == [0, 1] and metrics["question"]["seeds"] == [0, 1]
    assert metrics["contrasts"][0]["seeds"] == 2 and len(metrics["contrasts"][0]["by_seed"]) == 2
    random_arm = next(arm for arm in metrics["arms"] if arm["name"] == "random")
    assert len(random_arm["outcomes"]["behaviour_gap"]["by_draw"]) == 2 == len(random_arm["matched_in"]["draws"])
    assert not list(folder.glob("cells/*/checkpoints")), "what a finished cell was resumed from is not kept"


def test_every_arm_of_a_seed_starts_from_the_same_adapters_and_sees_the_same_batches(whole: tuple[Path, dict[str, Any]]) -> None:
    """Nothing is steered in the first step's batch but by the plan: the plain arm and the two seeds tell them apart."""
    losses = {(cell["arm"], cell["draw"], cell["seed"]): cell["loss"] for cell in whole[1]["training"].values()}
    assert losses["plain", 0, 0] != losses["plain", 0, 1]
    assert losses["random", 0, 0][0] != losses["random", 1, 0][0] != losses["plain", 0, 0][0]


def test_an_arm_that_uses_the_weights_of_another_differs_by_its_plan_alone(
    parts: tuple[Path, Path], whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    same = "experiment.arms.inference.treatment.plan='1e-30 gushing@response'"
    assert ab(parts, tmp_path / "f", "seeds=[0]", same) == 0
    arms = {arm["name"]: arm["outcomes"] for arm in read_metrics(tmp_path / "f")["arms"]}
    assert arms["inference"]["behaviour_gap"]["mean"] == arms["plain"]["behaviour_gap"]["mean"]
    steered = {arm["name"]: arm["outcomes"] for arm in whole[1]["arms"]}
    assert steered["inference"]["behaviour_gap"]["mean"] != steered["plain"]["behaviour_gap"]["mean"]


# ---- once more


def test_what_is_done_is_not_run_again(
    parts: tuple[Path, Path], whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, metrics = whole
    before = {file: file.stat().st_mtime_ns for file in folder.glob("cells/*/done.json")}
    monkeypatch.setattr("steer.commands.ab.run_cell", never)
    assert ab(parts, folder) == 0
    assert {file: file.stat().st_mtime_ns for file in folder.glob("cells/*/done.json")} == before
    assert without_times(read_metrics(folder)) == without_times(metrics)


def test_a_report_is_the_page_of_the_run_and_needs_no_model(
    parts: tuple[Path, Path], whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, metrics = whole
    page = (folder / "report.html").read_bytes()
    monkeypatch.setattr(experiment_run, "load", never)
    assert ab(parts, folder, do="report") == 0
    assert without_times(read_metrics(folder)) == without_times(metrics) and len((folder / "report.html").read_bytes()) > len(page) * 0.9


def test_labels_and_margins_make_no_new_cells_and_what_matters_does(
    parts: tuple[Path, Path], whole: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = whole

    def missing(*more: str) -> int:
        capsys.readouterr()
        assert ab(parts, folder, *more, do="plan") == 0
        said = capsys.readouterr().out
        return int(said.split(" cells are missing")[0].split()[-1]) if "cells are missing" in said else 0

    for idle in (
        "experiment.arms.plain.label=other words",
        "experiment.outcomes.neutral_loss.margin=0.5",
        "experiment.train.checkpoint_every=2",
        "experiment.trait.description=other",
        "experiment.question=Why?",
    ):
        assert missing(idle) == 0, idle
    assert missing("experiment.train.learning_rate=1e-3") == CELLS
    assert missing("experiment.arms.inference.treatment.plan='-1 gushing@response'") == 2, "one arm, two seeds"
    assert missing("seeds=[0,1,2]") == 5
    assert missing("draws=3") == 2


def test_a_plan_says_what_it_costs_and_what_it_can_show(
    parts: tuple[Path, Path], whole: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert ab(parts, whole[0], do="plan") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"show an effect of {whole[1]['power']['smallest_effect']:.3g}" in said
    assert "preventative - random (primary)" in said and "cells are missing" not in said
    assert ab(parts, tmp_path / "new", do="plan") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{CELLS} cells are missing" in said and "not known before a seed is done" in said
    assert not (tmp_path / "new" / "cells").exists()


# ---- interrupted and resumed

# what is interrupted, and the calls of it after which that happens
POINTS: list[tuple[Any, str, int]] = [
    (SFTModule, "training_step", 2),
    (SFTModule, "training_step", 5),
    (cell_run, "measure_all", 4),
    (cell_run, "_callback_overhead", 2),
    (cell_run.shutil, "rmtree", 2),
    (CellFolder, "finish", 3),
]


@pytest.mark.parametrize(("owner", "name", "call"), POINTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_interrupted_anywhere_and_resumed_it_is_the_same(
    parts: tuple[Path, Path], whole: tuple[Path, dict[str, Any]], tmp_path: Path, owner: Any, name: str, call: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        calls: list[int] = []
        original = getattr(owner, name)

        def interrupted(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                raise Killed
            return original(*arguments, **options)

        patch.setattr(owner, name, interrupted)
        with pytest.raises(Killed):
            ab(parts, tmp_path / "f")
    assert len(cells(tmp_path / "f")) < CELLS and not (tmp_path / "f" / "metrics.json").exists()
    torch.manual_seed(99)
    assert ab(parts, tmp_path / "f") == 0
    assert without_times(read_metrics(tmp_path / "f")) == without_times(whole[1])


def test_ctrl_c_says_what_is_kept(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ctrl_c(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SFTModule, "training_step", ctrl_c)  # Lightning catches it and leaves with another status
    assert ab(parts, tmp_path / "f") == 130
    err = capsys.readouterr().err
    assert f"interrupted: '{tmp_path / 'f'}' keeps 1 finished cell; the same command goes on from there" in err and "Traceback" not in err


def process(parts: tuple[Path, Path], folder: Path) -> ForkProcess:
    def run() -> int:
        Result.report = REPORT  # type: ignore[method-assign]
        return ab(parts, folder)

    return started(run)


def test_two_at_once_on_one_folder_run_no_cell_twice(parts: tuple[Path, Path], whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    running = [process(parts, tmp_path / "f") for _ in range(2)]
    assert ended(running) == [0, 0]
    assert without_times(read_metrics(tmp_path / "f")) == without_times(whole[1])
    logs = list((tmp_path / "f").glob("cells/*/logs/metrics.csv"))
    assert len(logs) == 8
    for log in logs:
        with log.open(newline="") as file:
            steps = [row["step"] for row in csv.DictReader(file) if row["train/loss"]]
        assert steps == ["0", "1", "2"], "trained once"


# ---- the locked question


def test_a_question_is_locked_before_the_first_cell(
    parts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: tuple[Path, dict[str, Any]]
) -> None:
    folder = tmp_path / "f"
    assert whole[1]["design"]["lock"] == {"confirmatory": False, "locked": None, "deviations": []}
    assert ab(parts, folder, do="lock") == 0
    assert ab(parts, folder, do="lock") == 2 and "locked already" in capsys.readouterr().err
    assert ab(parts, folder) == 0
    state = read_metrics(folder)["design"]["lock"]
    assert state["confirmatory"] is True and state["deviations"] == [] and state["locked"] is not None
    assert ab(parts, folder, "experiment.outcomes.neutral_loss.margin=0.5", do="report") == 0
    state = read_metrics(folder)["design"]["lock"]
    assert state["confirmatory"] is False and "outcomes.neutral_loss.margin: locked 0.02, now 0.5" in state["deviations"]
    assert ab(parts, whole[0], do="lock") == 2 and "too late to lock" in capsys.readouterr().err


def test_a_lock_that_was_slipped_in_afterwards_confirms_nothing(
    parts: tuple[Path, Path], whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """A cell was begun, the lock came, and the cell was finished: the time of its folder is later than the lock, its beginning is not."""
    folder = tmp_path / "f"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cell_run, "measure_all", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            ab(parts, folder)
    (folder / "aside").mkdir()
    (folder / "cells").rename(folder / "aside" / "cells")
    assert ab(parts, folder, do="lock") == 0
    (folder / "aside" / "cells").rename(folder / "cells")
    assert ab(parts, folder) == 0
    state = read_metrics(folder)["design"]["lock"]
    assert state["confirmatory"] is False and any("before the lock" in deviation for deviation in state["deviations"])


# ---- what is wrong


def test_an_altered_cell_is_refused(parts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ab(parts, tmp_path / "f", "seeds=[0]", "draws=1") == 0
    file = next((tmp_path / "f").glob("cells/plain*/done.json"))
    text = file.read_text()
    content = json.loads(text)
    for wrong in (text.replace('"seed": 0', '"seed": 1'), "[]", json.dumps(sealed({**content, "key": "0" * 64, "json_sha256": None}))):
        file.write_text(wrong)
        for do in ("report", None):
            assert ab(parts, tmp_path / "f", "seeds=[0]", "draws=1", do=do) == 2
            err = capsys.readouterr().err
            assert err.startswith("DamagedFileError") and "done.json" in err and "remedy: " in err
    file.write_text(text)
    next((tmp_path / "f").glob("cells/inference*/done.json")).unlink()  # to be run again, with the weights of the plain arm
    adapter = file.parent / "adapter" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-100])
    assert ab(parts, tmp_path / "f", "seeds=[0]", "draws=1") == 2
    err = capsys.readouterr().err
    assert f"the adapter of cell '{file.parent.name}' cannot be read" in err and f"remove '{file.parent}'" in err


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("experiment.arms.random.controls=preventive", ("controls 'preventive'", "did you mean 'preventative'")),
        ("experiment.arms.inference.uses=plian", ("uses 'plian'", "not trained")),
        ("experiment.arms.preventative.treatment.kind=plam", ("unknown treatment 'plam'", "did you mean 'plan'")),
        ("experiment.arms.preventative.when=sometimes", ("unknown when 'sometimes'", "never, train, inference, both, baked")),
        ("experiment.outcomes.behaviour_gap.metric=logprob_gp", ("did you mean 'logprob_gap'",)),
        ("experiment.outcomes.neutral_loss.margin=null", ("guardrail 'neutral_loss' has no margin",)),
        ("experiment.outcomes.behaviour_gap.role=secondary", ("one primary outcome", "found: none")),
        ("experiment.primary={arm: preventative, against: preventative}", ("with itself",)),
        ("experiment.primary.arm=prevent", ("names no arm", "'prevent'")),
        ("experiment.secondary=[{arm: plain}]", ("cannot be read", "arm, against, outcome")),
        ("draws=0", ("draws", "1 or more")),
        ("draws=few", ("draws", "few")),
        ("seeds=[]", ("seeds of an experiment",)),
        ("seeds=[0,0]", ("seeds of an experiment",)),
        ("seeds=[-1]", ("cannot be a seed",)),
        ("do=rum", ("cannot do 'rum'", "did you mean 'run'")),
        ("tracker.kind=tensorbord", ("tracker",)),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    parts: tuple[Path, Path],
    tmp_path: Path,
    override: str,
    names: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(experiment_run, "load", never)
    assert ab(parts, tmp_path / "f", override) == 2
    err = capsys.readouterr().err
    assert "Error: " in err.splitlines()[0] and all(name in err for name in names), err
    assert not (tmp_path / "f" / "cells").exists()


def test_a_report_of_nothing(parts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ab(parts, tmp_path / "f", do="report") == 2
    assert "no seed of this experiment is done" in capsys.readouterr().err


# ---- an experiment of one's own


def test_a_plan_and_a_metric_of_ones_own_without_training(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A yaml, a saved plan and a function: no file of the package is touched, and what does not apply is left out."""
    (tmp_path / "own_metric.py").write_text(
        "import torch\n\n\ndef words(model, tokenizer, items):\n"
        '    """Logit of one word."""\n'
        "    found = {}\n"
        "    for item in items:\n"
        "        ids = tokenizer(item['prompt'], return_tensors='pt').input_ids\n"
        "        with torch.no_grad():\n"
        "            found[item['id']] = float(model(ids).logits[0, -1, 20])\n"
        "    return found\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    Plan(Intervention(Add(vector), "layers.1.output")).save(tmp_path / "plan")
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "name: mine\n"
        f"data: {parts[1]}\n"
        "arms:\n"
        f"  warm: {{treatment: {{kind: plan, plan: '{tmp_path / 'plan'}'}}, when: inference}}\n"
        "  bare: {}\n"
        "  noise: {controls: warm, draws: 3}\n"
        "outcomes:\n"
        "  words: {metric: 'own_metric:words', data: heldout, better: higher}\n"
        "completions: {prompts: [who are you], max_new_tokens: 3}\n"
    )
    arguments = ["--config-dir", str(tmp_path / "conf"), "experiment=mine", f"model.name={parts[0]}", f"folder={tmp_path / 'f'}"]
    measured: list[str] = []
    measure = cell_run.measure_all
    monkeypatch.setattr(cell_run, "measure_all", lambda *args, **kwargs: measured.append("") or measure(*args, **kwargs))
    assert command("ab", *arguments) == 0
    assert len(measured) == 5, "the base, warm and three draws of noise: an arm that does nothing is the base"
    metrics = read_metrics(tmp_path / "f")
    assert (metrics["contrasts"][0]["a"], metrics["contrasts"][0]["b"]) == ("warm", "noise")
    assert {cell["arm"] for cell in metrics["cells"].values()} == {"base", "warm", "bare", "noise"}
    arms = {arm["name"]: arm["outcomes"]["words"] for arm in metrics["arms"]}
    assert arms["bare"]["change"] == 0 and arms["warm"]["change"] != 0
    yaml = tmp_path / "conf" / "experiment" / "mine.yaml"
    written = yaml.read_text()
    yaml.write_text(written.replace("  bare: {}", "  base: {}"))
    assert command("ab", *arguments) == 2 and "cannot be called 'base'" in capsys.readouterr().err
    yaml.write_text(written)
    assert command("ab", *arguments, "seeds=[5]", f"folder={tmp_path / 'five'}") == 0, "of an experiment that trains nothing"
    assert read_metrics(tmp_path / "five")["contrasts"][0]["difference"] == metrics["contrasts"][0]["difference"]
    keys = {cell["key"] for cell in metrics["cells"].values() if cell["arm"] == "warm"}
    Plan(Intervention(Add(2 * vector), "layers.1.output")).save(tmp_path / "other")
    for file in (tmp_path / "other").iterdir():
        file.replace(tmp_path / "plan" / file.name)
    assert command("ab", *arguments) == 0
    again = read_metrics(tmp_path / "f")
    assert keys.isdisjoint(cell["key"] for cell in again["cells"].values() if cell["arm"] == "warm"), "another plan under the same path"
    assert next(arm for arm in again["arms"] if arm["name"] == "warm")["outcomes"]["words"]["mean"] != arms["warm"]["mean"]
