"""One answer of a model, token by token, with what was read of each token and where the plan acted."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

from steer.intervene.attachment import Attachment
from steer.model.capture import evaluating
from steer.model.devices import input_device
from steer.model.token_texts import TokenTexts, token_texts
from steer.model.tokens import Row, pad_id
from steer.workbench.readings import TokenReader

Emit = Callable[[dict[str, Any]], None]


def answer(
    model: nn.Module,
    tokenizer: Any,
    row: Row,
    side: str,
    emit: Emit,
    stop: Event,
    *,
    max_new_tokens: int,
    reader: TokenReader | None = None,
    attachment: Attachment | None = None,
) -> None:
    """Answers greedily and says what happens as it happens; the events are JSON-able.

    `start` has the tokens of the prompt. Each `token` has its text, and of the pass that chose it `values` (of the tokens which that pass
    read: the whole prompt first, then the token before) and `acted` (on how many of those tokens each intervention acted). `done` has the
    totals. The last token of an answer is read by no pass, so it has no value.

    Args:
        row: the prompt.
        side: `plain` or `steered`, named in every event.
        emit: called with each event.
        stop: ends the answer after the token that is being chosen.
    """
    emit({"event": "start", "side": side, "prompt": token_texts(tokenizer, row.ids)})
    device = input_device(model)
    inputs = {"input_ids": torch.tensor([row.ids], device=device)}  # [1, tokens]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    told = _TokenByToken(tokenizer, side, emit, stop, reader, attachment)
    begin = time.perf_counter()
    with evaluating(model), torch.random.fork_rng(devices=[]):
        model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad_id(tokenizer), stopping_criteria=[told]
        )
    totals = {"fired": {} if attachment is None else attachment.fired(), "seconds": round(time.perf_counter() - begin, 3)}
    emit({"event": "done", "side": side, "tokens": told.tokens, "stopped": stop.is_set(), **totals})


class _TokenByToken(StoppingCriteria):
    """Says each token, and ends the answer once an event is set.

    `generate` asks its stopping criteria once after each pass; to a streamer it hands tokens a pass later on some devices.
    """

    def __init__(
        self, tokenizer: Any, side: str, emit: Emit, stop: Event, reader: TokenReader | None, attachment: Attachment | None
    ) -> None:
        self._texts = TokenTexts(tokenizer)
        self._special = frozenset(tokenizer.all_special_ids)
        self._side, self._emit, self._stop, self._reader, self._attachment = side, emit, stop, reader, attachment
        self._fired: dict[str, int] = {}
        self.tokens = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Any:
        token = int(input_ids[0, -1])
        self.tokens += 1
        self._emit(
            {
                "event": "token",
                "side": self._side,
                "text": self._texts.add(token),
                "special": token in self._special,
                "values": [] if self._reader is None else self._reader.take(),
                "acted": self._acted(),
            }
        )
        return torch.full((len(input_ids),), self._stop.is_set(), dtype=torch.bool, device=input_ids.device)

    def _acted(self) -> dict[str, int]:
        if self._attachment is None:
            return {}
        before, self._fired = self._fired, self._attachment.fired()
        return {name: count - before.get(name, 0) for name, count in self._fired.items()}
