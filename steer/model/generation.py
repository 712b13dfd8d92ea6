"""Continuations: what a model writes behind prompts, many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from steer.errors import ConfigError
from steer.model.capture import batches, evaluating
from steer.model.devices import input_device, seeded
from steer.model.memory import in_halves
from steer.model.tokens import Row, collate


def continuations(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    new_tokens: Sequence[int],
    *,
    pad: int,
    max_tokens: int,
    seed: int,
    progress: bool = False,
    **options: Any,
) -> list[list[int]]:
    """Tokens that a model writes behind each prompt. What is attached to the model stays in force, and its mode is put back.

    Prompts are padded on the left. What is drawn depends on the seed, and on which prompts share a batch; the random state of the caller
    is left as it is.

    Args:
        prompts: token ids. new_tokens: of each, how many are written at most.
        pad: any token id.
        max_tokens: padded tokens of a batch; one that does not fit into memory is halved.
        progress: a bar where the output is a terminal.
        options: of `generate`, such as `do_sample`.

    Raises:
        ConfigError: a model that cannot generate.
    """
    if not hasattr(model, "generate"):
        raise _no_generate(model)

    def written(chosen: Sequence[int]) -> list[list[int]]:
        batch = collate([Row(prompts[i], len(prompts[i])) for i in chosen], pad, side="left")
        inputs = {name: batch[name].to(input_device(model)) for name in ("input_ids", "attention_mask")}
        found = model.generate(**inputs, max_new_tokens=max(new_tokens[i] for i in chosen), pad_token_id=pad, **options)
        return found[:, inputs["input_ids"].shape[1] :].tolist()

    texts: list[list[int]] = [[] for _ in prompts]
    room = [Row(ids + (0,) * most, len(ids)) for ids, most in zip(prompts, new_tokens, strict=True)]
    bar = tqdm(total=len(prompts), desc="continuations", disable=None if progress else True, leave=False)
    with bar, evaluating(model), seeded(seed, input_device(model)):
        for chosen in batches(room, max_tokens):
            for part, found in in_halves(chosen, written):
                for i, ids in zip(part, found, strict=True):
                    texts[i] = ids[: new_tokens[i]]
                bar.update(len(part))
    return texts


# ---- errors


def _no_generate(model: object) -> ConfigError:
    expected, remedy = "a model with `generate`, of transformers", "load it with steer.load, or measure what needs no written text"
    return ConfigError("the model cannot generate texts", expected=expected, found=type(model).__name__, remedy=remedy)
