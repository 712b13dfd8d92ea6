"""`steer generate`: what the arms of a finished experiment say to the same prompts, side by side."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from peft import PeftModel
from rich.console import Console
from rich.table import Table

from steer.errors import ConfigError, DamagedFileError
from steer.experiment.arms import read_arms
from steer.experiment.complete import complete
from steer.intervene import Plan
from steer.model.load import load


def read_run(folder: Path) -> dict[str, Any]:
    """metrics.json of a finished run. Raises ConfigError when there is none, DamagedFileError when it cannot be read."""
    file = folder / "metrics.json"
    if not file.is_file():
        raise ConfigError(f"'{folder}' is no finished run", expected="the output folder of `steer train`, with metrics.json in it")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DamagedFileError(f"'{file}' is not JSON", found=str(error)) from error


def completions(folder: Path, prompts: list[str] | None, names: list[str] | None, max_new_tokens: int) -> dict[str, list[str]]:
    """Greedy answers of the base model and of each arm; inference arms are steered by their saved plan.

    Args:
        folder: output of `steer train`.
        prompts: user messages, None for those of the experiment.
        names: arms, None for all.
    """
    config = read_run(folder)["config"]
    arms = read_arms(config["experiment"]["arms"])
    unknown = set(names or ()) - {arm.name for arm in arms}
    if unknown:
        raise ConfigError(f"no arm is called {', '.join(sorted(unknown))}", expected=[arm.name for arm in arms])
    prompts = prompts or config["experiment"]["completions"]["prompts"]
    model, tokenizer = load(config["model"]["name"], dtype=getattr(torch, config["model"]["dtype"]))
    said = {"base": complete(model, tokenizer, prompts, max_new_tokens=max_new_tokens)}
    for arm in arms:
        if names and arm.name not in names:
            continue
        adapted = PeftModel.from_pretrained(model, folder / "adapters" / (arm.uses or arm.name))
        steered = Plan.load(folder / "plans" / arm.name).attached(adapted) if arm.when == "inference" else nullcontext()
        with steered:
            said[arm.name] = complete(adapted, tokenizer, prompts, max_new_tokens=max_new_tokens)
        adapted.unload()
    return said


def run(config: DictConfig) -> None:
    prompts = None if config.prompts is None else [str(prompt) for prompt in config.prompts]
    names = None if config.arms is None else [str(name) for name in config.arms]
    folder = Path(config.run)
    said = completions(folder, prompts, names, config.max_new_tokens)
    asked = prompts or read_run(folder)["config"]["experiment"]["completions"]["prompts"]
    console = Console()
    for number, prompt in enumerate(asked):
        table = Table("arm", "completion", title=prompt, title_justify="left", show_lines=True)
        for name, texts in said.items():
            table.add_row(name, texts[number])
        console.print(table)
