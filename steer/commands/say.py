"""`steer say`: what a model says as it is, and steered by a text, side by side."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text
from torch import nn

from steer.commands.config import dtype_named, listed
from steer.commands.side_by_side import side_by_side
from steer.errors import ConfigError
from steer.experiment.complete import asks_for_roles, complete, turns_announced
from steer.experiment.steering import plan_from_config
from steer.intervene import Plan
from steer.model.load import load


def run(config: DictConfig) -> None:
    """Prints what the plain and the steered model answer to each prompt, and on how many tokens each intervention acted."""
    prompts = listed(config.prompts)
    if prompts is None:
        raise ConfigError("'steer say' has nothing to answer", expected="prompts", found="none", remedy="e.g. 'prompts=[Who are you?]'")
    sections: Any = OmegaConf.to_container(config, resolve=True)
    named = [sections[kind] or {} for kind in ("directions", "gates", "dictionaries")]
    plan, text = plan_from_config(str(config.steer), *named)
    model, tokenizer = load(config.model.name, dtype=dtype_named(config.model.dtype))
    answers = {"plain": complete(model, tokenizer, prompts, max_new_tokens=config.max_new_tokens)}
    with plan.attached(model) as attachment:
        answers["steered"] = _steered(model, tokenizer, prompts, plan, config.max_new_tokens)
    console = Console()
    console.print(Text(text))
    console.print(Text(", ".join(f"{name} acted on {count} tokens" for name, count in attachment.fired().items())))
    side_by_side(console, prompts, answers)


def _steered(model: nn.Module, tokenizer: Any, prompts: list[str], plan: Plan, max_new_tokens: int) -> list[str]:
    """Answers under an attached plan. Where a scope of it asks whose turn a token is, that is announced, one prompt at a time."""
    if not asks_for_roles(plan):
        return complete(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    answers = []
    for prompt in prompts:
        with turns_announced(model, tokenizer, plan, prompt):
            answers += complete(model, tokenizer, [prompt], max_new_tokens=max_new_tokens)
    return answers
