"""`steer generate`: what the arms of a finished experiment say to the same prompts, side by side."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steer.commands.config import dtype_named
from steer.errors import ConfigError, DamagedFileError, NonFiniteError, WrongKindError
from steer.experiment.arms import Arm, read_arms
from steer.experiment.complete import check_completions, complete
from steer.experiment.results import SCHEMA
from steer.files import SEAL, check_seal, contents
from steer.intervene import Plan
from steer.model.load import load
from steer.reading import damage_of, read_json


def run(config: DictConfig) -> None:
    """Prints the completions of a finished run, arm beside arm."""
    prompts = listed(config.prompts)
    folder = Path(config.run)
    answers = completions(folder, prompts, listed(config.arms), config.max_new_tokens)
    side_by_side(Console(), prompts or run_config(folder)["experiment"]["completions"]["prompts"], answers)


def read_run(folder: Path) -> dict[str, Any]:
    """metrics.json of a finished run.

    Raises:
        ConfigError: there is none. DamagedFileError: it cannot be read. WrongKindError: another version wrote it.
    """
    file = folder / "metrics.json"
    if not file.is_file():
        raise _no_run(folder)
    try:
        metrics = read_json(file)
    except (DamagedFileError, NonFiniteError) as error:
        raise _damaged_metrics(file, error.found) from error
    if not isinstance(metrics, dict) or "schema" not in metrics:
        raise _damaged_metrics(file, metrics)
    if metrics["schema"] != SCHEMA:
        raise _other_schema(file, metrics["schema"])
    check_seal(metrics, file)  # older versions wrote none
    metrics.pop(SEAL, None)
    return metrics


def run_config(folder: Path) -> dict[str, Any]:
    """The configuration of a finished run. Raises as `read_run`, and DamagedFileError when it lacks what is read of it here."""
    config: dict[str, Any] = read_run(folder).get("config", {})
    file = folder / "metrics.json"
    with damage_of(file, "the JSON that `steer train` wrote", f"'{file}' is damaged", "run the experiment again"):
        experiment = config["experiment"]
        read_arms(experiment["arms"])
        prompts = experiment["completions"]["prompts"]
        texts = [config["model"]["name"], config["model"]["dtype"], *prompts]
        if not isinstance(prompts, list) or not all(isinstance(text, str) for text in texts):
            raise TypeError("prompts, or a name or dtype of the model, that are no texts")
    return config


def completions(folder: Path, prompts: list[str] | None, names: list[str] | None, max_new_tokens: int) -> dict[str, list[str]]:
    """Greedy answers of the base model and of each arm; inference arms are steered by their saved plan.

    Args:
        folder: output of `steer train`.
        prompts: user messages, None for those of the experiment.
        names: arms, None for all.

    Raises:
        ConfigError: no such run or arm, or no room for an answer. DamagedFileError: an adapter or a plan of the run is missing or damaged.
    """
    check_completions(["?"] if prompts is None else prompts, max_new_tokens)
    config = run_config(folder)
    arms = read_arms(config["experiment"]["arms"])
    if unknown := set(names or ()) - {arm.name for arm in arms}:
        raise _unknown_arms(unknown, arms, names)
    prompts = prompts or config["experiment"]["completions"]["prompts"]
    model, tokenizer = load(config["model"]["name"], dtype=dtype_named(config["model"]["dtype"]))
    answers = {"base": complete(model, tokenizer, prompts, max_new_tokens=max_new_tokens)}
    for arm in arms:
        if names and arm.name not in names:
            continue
        adapted = PeftModel.from_pretrained(model, _adapter(folder, arm.uses or arm.name))
        steered = Plan.load(folder / "plans" / arm.name).attached(adapted) if arm.when == "inference" else nullcontext()
        with steered:
            answers[arm.name] = complete(adapted, tokenizer, prompts, max_new_tokens=max_new_tokens)
        adapted.unload()
    return answers


def _adapter(folder: Path, arm: str) -> Path:
    """The adapter of a trained arm; PEFT would ask the hub for one that is missing."""
    adapter = folder / "adapters" / arm
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise _missing_adapter(folder, arm, adapter / name)
    return adapter


def listed(value: Any) -> list[str] | None:
    """A list of texts; one text alone counts as a list of it, null and an empty list as nothing.

    Raises:
        ConfigError: a null, or anything else that is no text, within the list.
    """
    if value is not None and not isinstance(value, ListConfig):
        return [str(value)]
    for text in value or ():
        if text is None or isinstance(text, (ListConfig, DictConfig)):
            raise _no_text(text)
    return [str(text) for text in value or ()] or None


def side_by_side(console: Console, prompts: list[str], answers: dict[str, list[str]]) -> None:
    """Prints one table for each prompt, one row for each who answers."""
    for number, prompt in enumerate(prompts):
        table = Table("arm", "completion", title=Text(prompt), title_justify="left", show_lines=True)
        for name, texts in answers.items():
            table.add_row(name, Text(texts[number]))  # square brackets are no markup here
        console.print(table)


# ---- errors


def _no_run(folder: Path) -> ConfigError:
    return ConfigError(
        f"'{folder}' is no finished run",
        expected="the output folder of `steer train`, with metrics.json in it",
        found=contents(folder),
        remedy="give the folder that `steer train` printed as its last line, without the name of the report",
    )


def _damaged_metrics(file: Path, found: object) -> DamagedFileError:
    remedy = "restore it from a backup, or run the experiment again"
    return DamagedFileError(f"'{file}' is damaged", expected="the JSON that `steer train` wrote", found=f"{found!r:.80}", remedy=remedy)


def _other_schema(file: Path, schema: Any) -> WrongKindError:
    remedy = "read it with the library version that wrote it"
    return WrongKindError(f"'{file}' is of another schema", expected=f"schema {SCHEMA}", found=f"schema {schema}", remedy=remedy)


def _no_text(entry: object) -> ConfigError:
    found = "null" if entry is None else entry
    return ConfigError("an entry of a list is no text", expected="text", found=found, remedy="leave it out, or quote it: '[\"null\"]'")


def _unknown_arms(unknown: set[str], arms: list[Arm], names: list[str] | None) -> ConfigError:
    return ConfigError(
        f"no arm is called {', '.join(sorted(unknown))}",
        expected=f"some of {', '.join(arm.name for arm in arms)}",
        found=names,
        remedy="name arms of this run in arms=[...], or leave it out to see all of them",
    )


def _missing_adapter(folder: Path, arm: str, file: Path) -> DamagedFileError:
    return DamagedFileError(
        f"the run in '{folder}' lacks the adapter of '{arm}'",
        expected=str(file),
        found=contents(file.parent),
        remedy="run the experiment again, or leave that arm out with arms=[...]",
    )
