"""Workbench: a model, what plans on it may name, and one answer at a time."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import Any

from torch import nn

from steer.checks import number_within, of_type
from steer.directions.text import Gates, Names
from steer.errors import AttachError, ConfigError
from steer.experiment.complete import check_completions, turns_announced
from steer.intervene import Plan
from steer.intervene.attachment import Attachment
from steer.model.tokens import encode
from steer.workbench import readings
from steer.workbench.answering import Emit, answer
from steer.workbench.terms import described, moved, spelt_out

LONGEST = 2048  # tokens of an answer; Stop ends one before


class Workbench:
    """What the page asks for, without HTTP: plans as text, answers as events, files in one folder.

    The model is loaded once. Each answer attaches its plan and takes the hooks off again, so that between two answers the model is as it
    was. One answer is made at a time.

    Args:
        model, tokenizer: as `steer.load` gives them.
        names, gates: what plans may name, as for `plan_from_text`.
        text: of the plan that the page begins with.
        prompts: that the page offers; the first is filled in.
        max_new_tokens: that the page begins with.
        folder: where plans are saved; None offers no saving.
        command: words of the command line that loads the same model and names, e.g. ("steer", "say", "directions.warm=my/warm").

    Raises:
        ConfigError, SiteError, WidthError, WrongModelError: the plan cannot be read, or does not fit the model.

    Example:
        >>> bench = Workbench(model, tokenizer, {"warm": directions}, {}, "0.4 warm@response")
        >>> bench.answers({"text": "0.4 warm@response", "prompt": "Who are you?", "max_new_tokens": 8}, print)
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        names: Names,
        gates: Gates,
        text: str,
        *,
        prompts: Sequence[str] = (),
        max_new_tokens: int = 48,
        folder: str | Path | None = None,
        command: Sequence[str] = ("steer", "say"),
    ) -> None:
        self._model, self._tokenizer, self._names, self._gates = model, tokenizer, names, gates
        self._prompts, self._max_new_tokens = list(prompts), _checked_length(max_new_tokens)
        self._folder = None if folder is None else Path(folder)
        self._command = list(command)
        self._generating, self._stop = Lock(), Event()
        self._answered: Any = None  # number of the request that is being answered, or was last
        self._plain: tuple[Any, list[dict[str, Any]]] | None = None  # what was asked, and the whole answer of the plain model to it
        plan, self._text = spelt_out(text, names, gates)
        plan.validate(model)

    def state(self) -> dict[str, Any]:
        """What the page begins with, JSON-able."""
        return {
            "model": str(getattr(self._model, "name_or_path", "") or type(self._model).__name__),
            "prompts": self._prompts,
            "max_new_tokens": self._max_new_tokens,
            "longest": LONGEST,
            "folder": None if self._folder is None else str(self._folder),
            "readings": readings.offered(self._names),
            "gates": {name: str(gate) for name, gate in self._gates.items()},
            "plan": self.plan({"text": self._text}),
        }

    def plan(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The plan of a `text`, after `changes` of its terms: its text with every site and scope, and its terms.

        Raises:
            ConfigError, SiteError, WrongModelError: as `plan_from_text`, and as `terms.moved`.
        """
        plan, text = self._read(request)
        if request.get("changes"):
            plan, text = spelt_out(moved(text, request["changes"], self._names, self._gates), self._names, self._gates)
        return {"text": text, "terms": described(plan, text, self._names)}

    def answers(self, request: Mapping[str, Any], emit: Emit) -> None:
        """The answers of the plain and of the steered model to a prompt, as events (see `answering.answer`).

        Args:
            request: `text` of the plan, `prompt`, `max_new_tokens`, `reading` (one of those in `state`, or None), and perhaps
                a `number` by which `stop` may name it.
            emit: called with each event, in this thread.

        Raises:
            AttachError: another answer is being made. Whatever reading the plan and attaching it raise.
        """
        plan, _ = self._read(request)
        prompt, max_new_tokens = self._asked(request)
        choice = request.get("reading")
        reading = readings.reading_of(choice, self._names)
        row = encode(self._tokenizer, prompt)
        said = {"site": str(reading.site), "unit": reading.unit, "zero": reading.zero, "signed": reading.is_signed} if reading else None
        with self._one_at_a_time(request.get("number")):
            emit({"event": "reading", "reading": said})

            def ask(side: str, emit: Emit, attachment: Attachment | None = None) -> None:
                with readings.tokens_read(self._model, reading) as reader:
                    asked = (self._model, self._tokenizer, row, side, emit, self._stop)
                    answer(*asked, max_new_tokens=max_new_tokens, reader=reader, attachment=attachment)

            question = (prompt, max_new_tokens, choice)
            if self._plain is None or self._plain[0] != question:
                events: list[dict[str, Any]] = []
                self._plain = None
                ask("plain", _both(events.append, emit))
                if self._stop.is_set():
                    return
                self._plain = question, events
            else:
                for event in self._plain[1]:
                    emit(event)
            with plan.attached(self._model) as attachment, turns_announced(self._model, self._tokenizer, plan, prompt):
                ask("steered", emit, attachment)

    def stop(self, number: Any = None) -> None:
        """Ends the answer that is being made, if there is one, after the token that is being chosen.

        Args:
            number: of the request that is meant; a stop that comes when the next one is answered already does nothing. None for any.
        """
        if number is None or number == self._answered:
            self._stop.set()

    def close(self) -> None:
        """Stops the answer that is being made and waits until the model is as it was."""
        while not self._generating.acquire(timeout=0.1):
            self._stop.set()
        self._generating.release()

    def save(self, request: Mapping[str, Any]) -> Path:
        """Writes the plan of a `text` to the first free `plan_<n>.safetensors` of the folder, for `Plan.load`.

        Raises:
            ConfigError: there is no folder. FileError, StorageFullError.
        """
        plan, _ = self._read(request)
        if self._folder is None:
            raise _no_folder()
        numbers = (re.fullmatch(r"plan_(\d{1,9})\.safetensors", path.name) for path in self._folder.glob("plan_*"))
        taken = [int(found[1]) for found in numbers if found]
        return plan.save(self._folder / f"plan_{max(taken, default=0) + 1}.safetensors")

    def command(self, request: Mapping[str, Any]) -> str:
        """The line for a shell that gives the same answers: `steer say` with the plan, the prompt and the length of the answer."""
        _, text = self._read(request)
        prompt, max_new_tokens = self._asked(request)
        words = [f"steer={_for_hydra(text)}", f"prompts=[{_for_hydra(prompt)}]", f"max_new_tokens={max_new_tokens}"]
        return shlex.join([*self._command, *words])

    def _read(self, request: Mapping[str, Any]) -> tuple[Plan, str]:
        of_type(request.get("text"), str, "the text of a plan", "send it as `text`")
        return spelt_out(request["text"], self._names, self._gates)

    def _asked(self, request: Mapping[str, Any]) -> tuple[str, int]:
        of_type(request.get("prompt"), str, "the prompt", "send it as `prompt`")
        max_new_tokens = _checked_length(request.get("max_new_tokens"))
        check_completions([request["prompt"]], max_new_tokens)
        return request["prompt"], max_new_tokens

    @contextmanager
    def _one_at_a_time(self, number: Any) -> Iterator[None]:
        if not self._generating.acquire(blocking=False):
            raise _busy()
        try:
            self._answered = number
            self._stop.clear()
            yield
        finally:
            self._generating.release()


def _both(first: Emit, second: Emit) -> Emit:
    def emit(event: dict[str, Any]) -> None:
        first(event)
        second(event)

    return emit


def _checked_length(max_new_tokens: Any) -> int:
    number_within(max_new_tokens, "max_new_tokens", 1, LONGEST)
    of_type(max_new_tokens, int, "max_new_tokens", "give a whole number of tokens")
    return int(max_new_tokens)


def _for_hydra(text: str) -> str:
    """Text in double quotes, as Hydra reads it: backslashes count before a quote and at the end, and `${` would be looked up."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f'"{escaped.replace("${", chr(92) + "${")}"'


# ---- errors


def _busy() -> AttachError:
    return AttachError(
        "the model is busy",
        expected="one answer at a time",
        found="an answer that is being made, perhaps for another window",
        remedy="press Stop, or wait until it is done",
    )


def _no_folder() -> ConfigError:
    return ConfigError("there is no folder to save to", expected="folder=...", found="none", remedy="start with 'steer show folder=plans'")
