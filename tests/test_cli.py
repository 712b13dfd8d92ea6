"""`steer`: its help, its errors without a traceback, and what it leaves on the disk. Everything runs in this process."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hand import vector
from omegaconf import OmegaConf
from tiny_experiment import write_model
from transformers import AutoModelForCausalLM

from steer import __version__
from steer.cli import COMMANDS, main
from steer.commands import ab, bias, edit, features_train, generate, info, say, show, trace, train
from steer.commands.config import dtype_named, listed
from steer.commands.verbs import VERBS
from steer.directions import Direction, Directions
from steer.directions.text import plan_from_text
from steer.errors import ConfigError, NonFiniteError
from steer.experiment.complete import complete
from steer.intervene import GATES
from steer.model.anatomy import Anatomy
from steer.model.load import load
from steer.model.site import Site

Run = Callable[..., tuple[int, str, str]]
EXPERIMENTS = ", ".join(sorted(path.stem for path in (Path(__file__).parents[1] / "conf" / "experiment").glob("*.yaml")))
WITH_VERB = [f"{command} {verb}" for command, verbs in VERBS.items() for verb in verbs]


@pytest.fixture
def steer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """`steer("info")` runs in an empty folder and gives exit status, stdout and stderr. Hydra's logging is taken back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(arguments)
        return status, *capsys.readouterr()

    yield run
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Puts a list of received configurations in the place of `steer train`."""
    received: list[Any] = []
    monkeypatch.setattr(train, "run", received.append)
    return received


# ---- help


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_help_lists_every_command_with_an_example(steer: Run, arguments: tuple[str, ...]) -> None:
    status, out, err = steer(*arguments)
    assert (status, err) == (0, "")
    assert all(command in out and example in out for command, (_, example) in COMMANDS.items())


def test_version(steer: Run) -> None:
    assert steer("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("command", [*COMMANDS, *WITH_VERB])
def test_the_help_of_a_command_is_about_steer_and_names_every_key(steer: Run, tmp_path: Path, command: str) -> None:
    status, out, err = steer(*command.split(), "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"steer {command}: ") and f"usage: steer {command}" in out
    assert "powered by Hydra" not in out
    assert "$" not in re.sub(r"outputs/(ab|bias)/\$\{experiment\.name\}", "", out).replace("${oc.select:experiment.name,experiment}", "")
    assert not list(tmp_path.iterdir())
    for key in {
        "train": (
            "seed: 0",
            "learning_rate:",
            "every_n_steps:",
            f"experiment: {EXPERIMENTS}",
        ),
        "ab": ("seeds:", "do: run", "draws: null", "folder: outputs/ab/", "[run|plan|lock|report]"),
        "bias": ("seeds:", "do: run", "folder: outputs/bias/", "[run|plan|lock|report]", "steer bias experiment=gender_pronoun"),
        "generate": ("run: ???", "prompts: null"),
        "features": ("seeds:", "do: run", *(f"steer features {verb} " for verb in VERBS["features"])),
        "features train": ("data: ???", "sparsifier: batchtopk", "dictionary: batchtopk, cross_layer_transcoder"),
        "trace": ("prompt: null", "facts: null", "window: 10", "corruption: noise", "does not choose the layers of an edit"),
        "say": ("steer: ???", "directions: {}", "gates: {}", "name: smollm2-135m", "docs/scopes.md"),
        "show": ("steer: ???", "port: 0", "browser: null", "folder: outputs/show", "docs/workbench.md"),
    }.get(command, ()):
        assert key in out


def test_the_help_of_no_command_imports_torch_or_lightning(tmp_path: Path) -> None:
    """All in one process: the first one that imported them would be the first to say so."""
    code = f"""
        import contextlib, io, sys
        from steer.cli import main
        heavy = {{"torch", "numpy", "transformers", "peft", "pytorch_lightning", "matplotlib"}}
        for command in {[*COMMANDS, *WITH_VERB]}:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                main([*command.split(), "--help"])
            print(command, out.getvalue().startswith(f"steer {{command}}: "), sorted(heavy & set(sys.modules)))
    """
    code = textwrap.dedent(code)
    printed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [f"{command} True []" for command in (*COMMANDS, *WITH_VERB)]


def test_the_example_of_each_command_can_be_parsed(steer: Run, jobs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "run", jobs.append)
    monkeypatch.setattr(say, "run", jobs.append)
    monkeypatch.setattr(ab, "run", jobs.append)
    monkeypatch.setattr(features_train, "run", jobs.append)
    for module in (bias, edit, show, trace):
        monkeypatch.setattr(module, "run", jobs.append)
    for command, (_, example) in COMMANDS.items():
        words = shlex.split(re.sub("<[a-z]+>", "2031-04-05", example))
        assert words[:2] == ["steer", command] and steer(*words[1:])[0] == 0
    assert jobs[0].seed == 1
    assert list(jobs[1].seeds) == [0, 1, 2, 3, 4] and jobs[1].folder == "outputs/ab/tone" and jobs[1].do == "run"
    assert jobs[2].run == "outputs/tone/2031-04-05" and list(jobs[2].prompts) == ["How do I boil an egg?"]
    assert jobs[3].steer == "0.4 warm@response" and jobs[3].directions == {"warm": "2031-04-05"}
    assert (jobs[4].steer, jobs[4].directions, jobs[4].port) == (jobs[3].steer, jobs[3].directions, 0)
    assert (jobs[5].data, list(jobs[5].width), jobs[5].dictionary.sparsifier) == ("book.txt", [4096], "batchtopk")
    assert (jobs[-3].experiment.name, jobs[-2].target, jobs[-2].truth) == ("gender_pronoun", "English", None)
    assert (jobs[-1].prompt, jobs[-1].subject, jobs[-1].window) == ("The Eiffel Tower is in the city of", "Eiffel Tower", 10)


def test_features_run_an_experiment_as_ab_does(steer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Any] = []
    monkeypatch.setattr(ab, "run", received.append)
    assert steer("features", "experiment=tone", "seeds=[3]")[0] == steer("features", "plan", "experiment=tone", "seeds=[3]")[0] == 0
    assert steer("ab", "experiment=tone", "seeds=[3]", "folder=outputs/features/tone")[0] == 0
    assert received[0] == received[2] and received[1] == {**received[0], "do": "plan"}


@pytest.mark.parametrize("action", ["run", "plan", "lock", "report"])
def test_what_ab_does_is_its_first_word(steer: Run, action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Any] = []
    monkeypatch.setattr(ab, "run", received.append)
    assert steer("ab", action, "seeds=[3]")[0] == steer("ab", f"do={action}", "seeds=[3]")[0] == 0
    assert steer("ab", action, "--config-dir", ".", "seeds=[3]")[0] == steer("ab", action, "seeds=[3]", "--config-dir", ".")[0] == 0
    assert [(config.do, list(config.seeds)) for config in received] == [(action, [3])] * 4


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["say", "--help"], ["train", "--cfg", "job"]])
def test_output_that_nobody_reads_ends_quietly(tmp_path: Path, arguments: list[str], unbuffered: str) -> None:
    """As for `steer --help | head -3`: 141 is what a shell reports of a program that SIGPIPE ended."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "steer.cli", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_of_the_work_itself_is_not_passed_over(steer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "a worker has died")

    monkeypatch.setattr(info, "run", broken)
    monkeypatch.setattr("steer.cli._stdout_is_closed", lambda: False)
    with pytest.raises(BrokenPipeError, match="a worker has died"):
        steer("info")


def test_the_help_of_say_names_the_gates_that_there_are(steer: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = sorted(set(GATES) - {"call"})
    assert f"gate={', '.join(own[:-1])} or {own[-1]};" in steer("say", "--help")[1]
    (tmp_path / "lots-1.0.dist-info").mkdir()
    (tmp_path / "lots-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lots\nVersion: 1.0\n")
    (tmp_path / "lots-1.0.dist-info" / "entry_points.txt").write_text("[steer.gates]\nzz_norm = lots.norm:Norm\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert f"gate={', '.join(own)} or zz_norm;" in steer("say", "--help")[1]


# ---- info


def test_info_says_what_is_there_and_leaves_nothing(steer: Run, tmp_path: Path) -> None:
    status, out, err = steer("info")
    assert (status, err) == (0, "")
    for name, version in info.versions().items():
        assert name in out and version in out
    assert "mean_difference" in out and "warmup_decay" in out and "positions[...]" in out
    assert f"{torch.get_num_threads()} threads" in out and "PyTorch only" in out
    assert not list(tmp_path.iterdir())


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("trian",), ("unknown command 'trian'", "did you mean 'train'?")),
        (("frobnicate",), ("unknown command 'frobnicate'", ", ".join(COMMANDS))),
        (("train", "experiment.train.stpes=3"), ("no key 'experiment.train.stpes'", "did you mean 'experiment.train.steps'?")),
        (("train", "stpes=3"), ("no key 'stpes'", "did you mean 'experiment.train.steps'?")),
        (("train", "sede=3"), ("no key 'sede'", "did you mean 'seed'?")),
        (
            ("train", "experiment=tne"),
            (
                "no experiment is called 'tne'",
                f"one of {EXPERIMENTS}",
                "did you mean 'tone'?",
            ),
        ),
        (("train", "sede"), ("cannot read 'sede'", "key=value")),
        (("train", "-m", "sede=1,2"), ("no key 'sede'", "did you mean 'seed'?")),
        (("train", "seed=1,2", "sede=3", "-m"), ("no key 'sede'", "did you mean 'seed'?")),
        (("train", "+sede=1"), ("no key 'sede'", "did you mean 'seed'?")),
        (("train", "++experiment.train.stpes=3"), ("no key 'experiment.train.stpes'", "did you mean 'experiment.train.steps'?")),
        (("train", "+trainer.max_steps=3"), ("no key 'trainer.max_steps'",)),
        (("train", "trainer=null"), ("configuration of 'steer train' is wrong", "must be a string")),
        (("train", "=1"), ("configuration of 'steer train' is wrong",)),
        (("say", "prompts=[null]", "steer=warm"), ("no text", "null")),
        (("say", "prompts=[[hello]]", "steer=warm"), ("no text", "hello")),
        (("generate", "run=x", "arms=[plain,null]"), ("no text", "null")),
        (("-m", "trian"), ("unknown command 'trian'",)),
        (("info", "verbose=1"), ("no key 'verbose'",)),
        (("features",), ("was not told what to do", ", ".join(VERBS["features"]), "experiment=<name>")),
        (("features", "train"), ("'steer features train' needs the key 'data'",)),
        (("features", "train", "experiment=tone"), ("'steer features train' has no key 'experiment'",)),
        (("features", "widht=[3]"), ("'steer features' has no key 'widht'",)),
        (("generate", "rnu=x"), ("no key 'rnu'", "did you mean 'run'?")),
        (("generate",), ("needs the key 'run'",)),
        (("generate", "run=no/such/run"), ("'no/such/run' is no finished run", "metrics.json", "no such folder")),
        (("say",), ("needs the key 'prompts'",)),
        (("say", "prompts=hello"), ("needs the key 'steer'",)),
        (("say", "prompts=[]", "steer=warm"), ("has nothing to answer",)),
        (("say", "prompts=hello", "ster=warm"), ("no key 'ster'", "did you mean 'steer'?")),
        (("say", "prompts=hello", "steer=0.4 warm@response"), ("no direction is called 'warm', at character 5", "no direction was given")),
        (("say", "prompts=hello", "steer=0.4 warm@prompt[-4:]"), ("cannot read 'steer=0.4 warm@prompt[-4:]'", "quote a value")),
        (("say", "prompts=hello", "steer=warm", "directions.warm=no/such"), ("no file or folder no/such",)),
        (("say", "prompts=hello", "steer=warm", "directions=warm"), ("'directions' cannot be 'warm'", "a section of keys")),
        (("train", "experiment.train.steps=abc"), ("'experiment.train.steps' cannot be 'abc'", "a whole number")),
        (("train", "experiment.train.steps=1.5"), ("'experiment.train.steps' cannot be 1.5", "a whole number")),
        (("train", "experiment.train.learning_rate=high"), ("'experiment.train.learning_rate' cannot be 'high'", "a number")),
        (("train", "experiment.drift.stream=maybe"), ("'experiment.drift.stream'", "true or false")),
        (("train", "experiment.drift.sites=layers.3.output"), ("'experiment.drift.sites'", "a list")),
        (("train", "experiment.arms.plain=3"), ("'experiment.arms.plain'", "a section of keys")),
        (("train", "experiment.data=no/such/set"), ("no data set 'no/such/set'",)),
        (("train", "model.name=no/such/model/here"), ("no model at no/such/model/here",)),
    ],
)
def test_a_mistake_is_named_without_a_traceback(
    steer: Run, arguments: tuple[str, ...], names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, err = steer(*arguments)
    assert status == 2
    assert re.match(r"[A-Za-z]+Error: ", err) and "Traceback" not in err and "Error executing job" not in err
    assert all(name in err for name in names), err
    assert "\n  expected: " in err and "\n  found: " in err and "\n  remedy: " in err


def test_unknown_flags_end_with_a_usage_line(steer: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--bogus"])
    assert caught.value.code == 2 and "unrecognized arguments: --bogus" in capsys.readouterr().err


def test_typed_errors_of_a_run_end_it_and_other_ones_are_not_hidden(steer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(_: Any) -> None:
        raise NonFiniteError("loss is not finite", expected="a number", found="nan", remedy="lower the rate")

    def bug(_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(train, "run", diverge)
    status, _, err = steer("train")
    assert (status, err) == (2, "NonFiniteError: loss is not finite\n  expected: a number\n  found: nan\n  remedy: lower the rate\n")
    monkeypatch.setattr(train, "run", bug)
    with pytest.raises(ZeroDivisionError):
        steer("train")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_anywhere_in_a_run(steer: Run, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(_: Any) -> None:
        raise OSError(code, "no space", "logs/metrics.csv")

    monkeypatch.setattr(train, "run", full)
    status, _, err = steer("train")
    assert status == 2 and err.startswith("StorageFullError: no room to write logs/metrics.csv") and "remedy: free some space" in err


# ---- runs


def test_values_that_are_meant_to_vary_in_kind(steer: Run, jobs: list[Any]) -> None:
    """Lightning takes numbers and words for its keys, a span is a word or an index, a whole number is a number, null may stand anywhere."""
    free = ["trainer.devices=auto", "trainer.precision=16", "experiment.trait.span=-1", "experiment.train.learning_rate=1"]
    status, _, err = steer("train", *free, "experiment.trait.site=null", "peft.layers=[1,2]", "experiment.arms.random=null")
    assert (status, err) == (0, "")
    assert jobs[0].trainer.devices == "auto" and jobs[0].experiment.trait.span == -1 and jobs[0].experiment.arms.random is None


def test_an_experiment_of_your_own(steer: Run, jobs: list[Any], tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("name: mine\nsteps: 3\n")
    assert steer("train", "--config-dir", "conf", "experiment=mine", "experiment.steps=5")[0] == 0
    assert OmegaConf.to_container(jobs[0].experiment) == {"name": "mine", "steps": 5}
    status, _, err = steer("train", "--config-dir", "conf", "experiment=mine", "experiment.steps=five")
    assert status == 2 and "a whole number, such as 3" in err


@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_multirun_runs_every_combination_into_a_folder_of_its_own(
    steer: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: int
) -> None:
    from hydra.core.hydra_config import HydraConfig

    seen = []
    monkeypatch.setattr(
        train, "run", lambda config: seen.append((config.seed, config.experiment.train.steps, HydraConfig.get().runtime.output_dir))
    )
    words = ["train", "seed=1,2,3", "experiment.train.steps=4,5", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    status, _, err = steer(*words[:place], "-m", *words[place:])
    assert (status, err) == (0, "")
    assert [job[:2] for job in seen] == [(seed, steps) for seed in (1, 2, 3) for steps in (4, 5)]
    folders = {Path(folder) for _, _, folder in seen}
    assert len(folders) == 6 and all(folder.parent == tmp_path / "sweep" and folder.is_dir() for folder in folders)


def test_a_failed_job_of_a_multirun_is_the_exit_status(steer: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = []

    def sometimes(config: Any) -> None:
        if config.seed == 1:
            raise NonFiniteError("loss is not finite", expected="a number", found="nan", remedy="lower the rate")
        done.append(config.seed)

    monkeypatch.setattr(train, "run", sometimes)
    status, _, err = steer("train", "-m", "seed=1,2", f"hydra.sweep.dir={tmp_path}")
    assert status == 2 and "loss is not finite" in err and done == [2]


# ---- the folder of a run


@pytest.mark.parametrize(
    ("content", "says"),
    [('{"schema": 1', "is damaged"), ("[]", "is damaged"), ("{}", "is damaged"), (json.dumps({"schema": 99}), "is of another schema")],
)
def test_metrics_that_cannot_be_read(steer: Run, tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "metrics.json").write_text(content)
    status, _, err = steer("generate", "run=.")
    assert status == 2 and f"'metrics.json' {says}" in err and "expected: " in err and "found: " in err


@pytest.mark.parametrize(
    ("value", "texts"), [(None, None), ([], None), (["a", 3], ["a", "3"]), ("How are you?", ["How are you?"]), (3, ["3"])]
)
def test_one_prompt_is_a_list_of_one(value: Any, texts: Any) -> None:
    assert listed(OmegaConf.create({"x": value}).x) == texts


@pytest.mark.parametrize("name", ["float23", "int64", "Tensor", "", 16])
def test_an_unknown_dtype(name: Any) -> None:
    with pytest.raises(ConfigError, match=f"unknown dtype '{name}'"):
        dtype_named(name)
    assert dtype_named("bfloat16") is torch.bfloat16


# ---- steer say


@pytest.fixture
def talker(tmp_path: Path) -> Path:
    """A folder with a model, and directions at two of its sites, one of which separates better."""
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model"))
    entries = [
        Direction(Site.parse(f"layers.{layer}.output"), 8 * vector(seed=layer), "mean_difference", "last", {"auc": auc, "dprime": 1.0})
        for layer, auc in ((0, 0.9), (1, 0.7))
    ]
    Directions(entries, "warm", {"model": Anatomy.find(model).fingerprint()}).save(tmp_path / "warm")
    return tmp_path


def answers(out: str) -> dict[str, list[str]]:
    """The cells of the tables, who -> what was said, words joined."""
    cells: dict[str, list[str]] = {}
    for who, text in re.findall(r"^│ (\w*) +│ (.*?) +│$", out, re.M):
        cells.setdefault(who, []).append(text)
    return cells


# as in a shell; within its quotes the text has double quotes of its own, unless it holds none of [ , ! ~ & ^
LOUD = "gates.loud.gate=probe gates.loud.direction=warm gates.loud.bias=-1e6 gates.loud.per=row"
LINES = [
    ("""'steer="4 warm@generated - 2 warm:layers.1.output@generated[:3]"'""", "4 warm:{}@generated - 2 warm:layers.1.output@generated[:3]"),
    ("""'steer="-4 warm @ prompt[-2:] | last ! tokens[5, 7] ~ 32 ^"'""", "-4 warm:{}@prompt[-2:]|last!tokens[5,7]~32 ^"),
    ("""'steer="4 warm@role[user]&prompt[0:3]"'""", "4 warm:{}@role[user]&prompt[0:3]"),
    (f"'steer=4 warm?loud - ablate warm?loud' {LOUD}", "4 warm:{}@all ?loud - 1 ablate warm:{}@all ?loud"),
    ("steer=-warm:layers.1.output@response", "-1 warm:layers.1.output@response"),
]


@pytest.mark.parametrize(("line", "canonical"), LINES)
def test_say_answers_side_by_side(steer: Run, talker: Path, line: str, canonical: str) -> None:
    rest = f"model.name={talker / 'model'} directions.warm={talker / 'warm'} 'prompts=[where is the cat, who]' max_new_tokens=6"
    before = sorted(talker.rglob("*"))
    canonical = canonical.replace("{}", "layers.0.output")
    status, out, err = steer("say", *shlex.split(f"{line} {rest}"))
    assert (status, err) == (0, "") and sorted(talker.rglob("*")) == before
    assert out.splitlines()[0] == canonical and "where is the cat" in out
    said = answers(out)
    model, tokenizer = load(talker / "model")
    prompts = ["where is the cat", "who"]
    plain = complete(model, tokenizer, prompts, max_new_tokens=6)
    assert said["plain"] == plain
    fired = {name: int(count) for name, count in re.findall(r"(\S+) acted on (\d+) tokens", out)}
    if "?loud" in canonical:
        assert said["steered"] == plain and fired == {"warm": 0, "warm#2": 0}
    elif "role" in canonical:
        assert fired == {"warm": 3 + 2}  # <user> where is, <user> who
    else:
        plan = plan_from_text(canonical, {"warm": Directions.load(talker / "warm")})
        with plan.attached(model) as attachment:
            assert said["steered"] == complete(model, tokenizer, prompts, max_new_tokens=6)
        assert fired == attachment.fired() and all(fired.values())


def test_say_takes_a_file_of_vectors_with_its_site(steer: Run, talker: Path) -> None:
    torch.save(8 * vector(seed=0), talker / "v.pt")
    text = """'steer="4 warm@generated"'"""
    line = f"model.name={talker / 'model'} {text} directions.warm.path={talker / 'v.pt'} 'prompts=[who]' max_new_tokens=4"
    status, out, err = steer("say", *shlex.split(line), "directions.warm.site=layers.0.output")
    assert (status, err) == (0, "") and out.splitlines()[0] == "4 warm:layers.0.output@generated"
    status, _, err = steer("say", *shlex.split(line))
    assert status == 2 and "site=" in err


def test_the_documented_lines_say_what_they_seem_to(steer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Any] = []
    monkeypatch.setattr(say, "run", received.append)
    page = (Path(__file__).resolve().parents[1] / "docs" / "scopes.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.S)
    lines = [shlex.split(line) for line in block.replace("\\\n", "").splitlines()]
    for words in lines:
        assert words[:2] == ["steer", "say"] and steer(*words[1:])[0] == 0
    assert [config.steer for config in received] == [words[2].removeprefix("steer=").strip('"') for words in lines]
    assert len(received) == 4 and list(received[1].prompts) == ["Who are you?", "What is an egg?"]
    assert received[2].directions == {"refuse": "my/refuse", "harm": "my/harm"}
    assert received[2].gates == {"harm": {"gate": "cosine", "direction": "harm", "threshold": 0.1}}


def test_a_plan_in_a_file_of_the_user(steer: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In YAML no text needs the second pair of quotes."""
    received: list[Any] = []
    monkeypatch.setattr(say, "run", received.append)
    (tmp_path / "conf" / "plan").mkdir(parents=True)
    (tmp_path / "conf" / "plan" / "mine.yaml").write_text(
        "# @package _global_\nsteer: -0.4 warm@prompt[-4:]|last ! tokens[5] ~ 32 ?harm ^\ndirections: {warm: a/folder}\nmax_new_tokens: 9\n"
    )
    assert steer("say", "--config-dir", "conf", "+plan=mine", "prompts=hello")[0] == 0
    assert received[0].steer == "-0.4 warm@prompt[-4:]|last ! tokens[5] ~ 32 ?harm ^"
    assert received[0].directions == {"warm": "a/folder"} and received[0].max_new_tokens == 9
