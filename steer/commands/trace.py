"""`steer trace`: causal tracing of a fact on the command line, or of a file of facts: a table, a page and the result as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from steer.checks import one_of, whole_number
from steer.commands.ab import quieten_libraries
from steer.commands.config import as_typed, dtype_named, listed
from steer.edits.fact import Fact
from steer.edits.locate import target_ids, text_ids
from steer.edits.records import load_records
from steer.edits.tracing import TraceResult, causal_trace
from steer.edits.tracing.cells import Restoring
from steer.edits.tracing.corruption import corruption_of
from steer.edits.tracing.result import MEASURES
from steer.errors import ConfigError, EditError
from steer.model.capture import evaluating
from steer.model.devices import input_device
from steer.model.load import load
from steer.report import write_trace

TRACE, PAGE = "trace.safetensors", "trace.html"


def run(config: DictConfig) -> TraceResult:
    """Traces, prints the table, and writes the result and its page."""
    quieten_libraries()
    kinds = listed(config.kinds) or []
    Restoring.of(kinds, config.window, config.severed)  # before a model is loaded
    settings: Any = OmegaConf.to_container(config.settings, resolve=True)
    if config.replacement is not None:
        settings["subjects"] = {as_typed(config, "subject"): as_typed(config, "replacement")}
    whole_number(config.drawn, "`drawn`, the number of facts on a page")
    one_of(str(config.measure), MEASURES, "the measure of a trace")
    corruption = corruption_of(str(config.corruption), settings)
    facts = _facts(config)
    model, tokenizer = load(config.model.name, dtype=dtype_named(config.model.dtype))
    if facts is None:
        facts = [_fact(model, tokenizer, config)]
    options = {name: config[name] for name in ("samples", "seed", "window", "severed", "count", "max_tokens")}
    found = causal_trace(model, tokenizer, facts, kinds=kinds, corruption=corruption, **options)
    console, folder = Console(), Path(config.folder)
    found.save(folder / TRACE)
    if config.facts is None:
        console.print(f"traced: {facts[0].target!r} behind {facts[0].prompt!r}", markup=False, highlight=False, soft_wrap=True)
    console.print(found.table(), markup=False, highlight=False, soft_wrap=True)
    try:
        write_trace(folder / PAGE, found, measure=config.measure, most=config.drawn)
    except ConfigError as error:  # matplotlib and jinja2 are an extra
        console.print(f"no page: {error}", soft_wrap=True)
    console.print(f"trace in {folder}", soft_wrap=True)
    return found


def _facts(config: DictConfig) -> list[Fact] | None:
    """Those of a file, with the answers that are true; None where the command line has one. Raises ConfigError, and as `load_records`."""
    of_one = [name for name in ("prompt", "subject") if config[name] is not None]
    if config.facts is not None and of_one:
        raise _both(of_one)
    if config.facts is not None:
        return [record.fact for record in load_records(str(config.facts), split=config.split)]
    if len(of_one) < 2:
        raise _no_fact(of_one)
    return None


def _fact(model: nn.Module, tokenizer: Any, config: DictConfig) -> Fact:
    """The fact of the command line; its answer is what the model says, where none is given."""
    prompt, subject, target = (as_typed(config, key) for key in ("prompt", "subject", "target"))
    fact = Fact.of(prompt or "", subject or "", "what the model says" if target is None else target)
    return fact.with_target(_own_answer(model, tokenizer, fact.prompt)) if config.target is None else fact


def _own_answer(model: nn.Module, tokenizer: Any, prompt: str) -> str:
    """The most probable next word. Raises EditError where it cannot be an answer, such as a full stop or a new line."""
    ids = torch.tensor([text_ids(tokenizer, prompt)], device=input_device(model))
    with evaluating(model):
        token = int(model(input_ids=ids).logits[0, -1].argmax())
    said = tokenizer.decode([token])
    if not said.strip() or target_ids(tokenizer, said)[0] != token:
        raise _no_answer(prompt, said)
    return said


# ---- errors


def _both(of_one: list[str]) -> ConfigError:
    return ConfigError(
        "'steer trace' has a file of facts and one fact", expected="either", found=f"facts, {', '.join(of_one)}", remedy="leave one out"
    )


def _no_fact(of_one: list[str]) -> ConfigError:
    return ConfigError(
        "'steer trace' has nothing to trace",
        expected="prompt and subject, or facts",
        found=", ".join(of_one) or "none of them",
        remedy="e.g. steer trace 'prompt=The Eiffel Tower is in the city of' 'subject=Eiffel Tower'",
    )


def _no_answer(prompt: str, said: str) -> EditError:
    return EditError(
        f"what the model says after '{prompt}' is no word that could be traced",
        expected="an answer that begins with a blank",
        found=repr(said),
        remedy="end the prompt right before an answer, or give it as target=...",
    )
