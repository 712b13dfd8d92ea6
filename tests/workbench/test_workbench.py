"""Answers are those of the model, values are those of its activations, and between two answers nothing is on the model."""

from __future__ import annotations

import shlex
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from workbench.workbench_helpers import TEXT, answers, asked, tokens, workbench

from steer.directions.text import plan_from_text
from steer.errors import AttachError, ConfigError, SiteError
from steer.experiment.complete import complete
from steer.intervene import Plan
from steer.model.tokens import encode
from steer.workbench import Workbench
from steer.workbench.workbench import LONGEST

PROJECTION = {"kind": "projection", "name": "warm", "site": "layers.0.output"}


def hooks_of(bench: Workbench) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in bench._model.modules())


def ids_of(bench: Workbench, events: list[dict[str, Any]], side: str) -> list[int]:
    said = [token["text"].strip() for token in tokens(events, side)]
    return [*encode(bench._tokenizer, "where is the cat").ids, *bench._tokenizer.convert_tokens_to_ids(said)]


def values_of(events: list[dict[str, Any]], side: str) -> list[float]:
    return [value for token in tokens(events, side) for value in token["values"]]


def hidden(bench: Workbench, ids: list[int], layer: int) -> torch.Tensor:
    """[tokens, width] after block `layer`, without a hook."""
    with torch.no_grad():
        return bench._model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0].double()


def test_answers_are_those_of_the_plain_and_of_the_steered_model() -> None:
    bench = workbench()
    events = answers(bench, reading=PROJECTION)
    model, tokenizer = bench._model, bench._tokenizer
    plan = plan_from_text(TEXT, bench._names)
    plain = complete(model, tokenizer, ["where is the cat"], max_new_tokens=5)
    with plan.attached(model) as attachment:
        steered = complete(model, tokenizer, ["where is the cat"], max_new_tokens=5)
    said = {side: "".join(token["text"] for token in tokens(events, side) if not token["special"]).strip() for side in ("plain", "steered")}
    assert said == {"plain": plain[0], "steered": steered[0]} and plain != steered
    (done,) = [event for event in events if event["event"] == "done" and event["side"] == "steered"]
    assert done["fired"] == attachment.fired() == {"warm": 4, "cold": len(encode(tokenizer, "where is the cat").ids) + 4}
    assert hooks_of(bench) == 0


def test_where_the_plan_acted_adds_up_to_what_fired() -> None:
    bench = workbench()
    events = answers(bench)
    acted = [token["acted"] for token in tokens(events, "steered")]
    prompt = len(encode(bench._tokenizer, "where is the cat").ids)
    assert acted == [{"warm": 0, "cold": prompt}] + [{"warm": 1, "cold": 1}] * 4
    assert not any(token["acted"] for token in tokens(events, "plain"))
    assert [event["acted"] for event in tokens(answers(bench, text="4 warm@all ?never"), "steered")] == [{"warm": 0}] * 5


def test_values_are_projections_in_class_gaps_after_the_edit() -> None:
    bench = workbench()
    events = answers(bench, text="4 warm:layers.0.output@generated", reading=PROJECTION)
    direction = bench._names["warm"]["layers.0.output"]  # type: ignore[index]
    prompt = len(encode(bench._tokenizer, "where is the cat").ids)
    for side, moved_by in (("plain", 0.0), ("steered", 4 * 8 / 8.0)):
        ids = ids_of(bench, events, side)
        values = (hidden(bench, ids, 0) @ direction.unit.double() - 0.5) / 8.0
        values[prompt:] += moved_by
        assert values_of(events, side) == pytest.approx(values[:-1].tolist(), abs=1e-5)  # no pass read the last token
    assert events[0]["reading"] == {"site": "layers.0.output", "unit": "class gaps", "zero": events[0]["reading"]["zero"], "signed": True}


def test_without_a_measured_gap_values_are_in_the_unit_of_the_activation() -> None:
    bench = workbench()
    events = answers(bench, reading={"kind": "projection", "name": "cold", "site": "layers.1.output"})
    values = hidden(bench, ids_of(bench, events, "plain"), 1) @ bench._names["cold"]["layers.1.output"].unit.double()  # type: ignore[index]
    assert values_of(events, "plain") == pytest.approx(values[:-1].tolist(), abs=1e-5)
    assert events[0]["reading"]["unit"].startswith("h ")


def test_values_are_activations_of_a_feature_after_the_edit() -> None:
    bench = workbench()
    dictionary: Any = bench._names["sae"]
    rows = (dictionary.encoder_rows(list(range(dictionary.width))) * dictionary.decoder_rows(list(range(dictionary.width)))).sum(1)
    feature = int(rows.argmax())  # reads what it writes, which no other feature of a random dictionary does
    layer = int(str(dictionary.reads[0]).split(".")[1])
    prompt = len(encode(bench._tokenizer, "where is the cat").ids)
    choice = {"kind": "feature", "name": "sae", "feature": feature}
    events = answers(bench, text=f"add(sae, feature={feature}, amount=9)@generated", reading=choice)
    for side, amount in (("plain", 0.0), ("steered", 9.0)):
        h = hidden(bench, ids_of(bench, events, side), layer).float()
        h[prompt:] += amount * dictionary.decoder_rows([feature])[0]
        f = dictionary.encode(h)[:-1, feature]
        assert values_of(events, side) == pytest.approx(f.tolist(), abs=1e-3)
        assert (f[prompt:] > 1).all() if amount else True
    assert events[0]["reading"]["signed"] is False


def test_the_plain_answer_is_made_once_for_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = workbench()
    first = answers(bench)
    passes = []
    bench._model.register_forward_pre_hook(lambda *_: passes.append(1))
    again = answers(bench, text="0 warm")
    assert tokens(again, "plain") == tokens(first, "plain") and len(passes) == 5
    assert [token["text"] for token in tokens(again, "steered")] == [token["text"] for token in tokens(again, "plain")]
    answers(bench, text="0 warm", prompt="who")
    assert len(passes) == 15


def test_an_answer_is_stopped_and_the_model_left_as_it_was() -> None:
    bench = workbench()
    events: list[dict[str, Any]] = []

    def emit(event: dict[str, Any]) -> None:
        events.append(event)
        if len(tokens(events, "plain")) == 2:
            bench.stop()

    bench.answers(asked(max_new_tokens=50), emit)
    assert len(tokens(events, "plain")) == 2 and events[-1]["stopped"] and not tokens(events, "steered") and hooks_of(bench) == 0
    assert len(tokens(answers(bench), "steered")) == 5  # the stop is over, and the half of an answer was not kept


def test_a_stop_that_is_late_does_not_end_the_next_answer() -> None:
    bench = workbench()
    events: list[dict[str, Any]] = []

    def emit(event: dict[str, Any]) -> None:
        events.append(event)
        bench.stop(1)  # of the answer before
        if len(tokens(events, "steered")) == 3:
            bench.stop(2)

    bench.answers({**asked(), "number": 1}, lambda event: None)
    bench.answers({**asked(), "number": 2}, emit)
    assert len(tokens(events, "plain")) == 5 and len(tokens(events, "steered")) == 3


def test_one_answer_at_a_time_and_closing_waits_for_it() -> None:
    bench = workbench()
    begun, more = threading.Event(), threading.Event()

    def emit(event: dict[str, Any]) -> None:
        begun.set()
        more.wait(10)

    thread = threading.Thread(target=bench.answers, args=(asked(max_new_tokens=LONGEST), emit))
    thread.start()
    assert begun.wait(10)
    with pytest.raises(AttachError, match="the model is busy"):
        answers(bench)
    closing = threading.Thread(target=bench.close)
    closing.start()
    more.set()
    closing.join(20)
    thread.join(20)
    assert not closing.is_alive() and not thread.is_alive() and hooks_of(bench) == 0


def test_an_error_in_the_middle_leaves_the_model_as_it_was() -> None:
    bench = workbench()
    with pytest.raises(SiteError):
        answers(bench, text="warm + deep")
    with pytest.raises(RuntimeError, match="the page is gone"):
        bench.answers(asked(), lambda event: (_ for _ in ()).throw(RuntimeError("the page is gone")))
    assert hooks_of(bench) == 0 and len(tokens(answers(bench), "steered")) == 5


def test_turns_are_announced_to_scopes_of_roles() -> None:
    assert tokens(answers(workbench(), text="4 warm@role[user]&prompt[0:3]"), "steered")[0]["acted"] == {"warm": 3}


@pytest.mark.parametrize(
    ("request_", "part"),
    [
        ({"text": "0.4 wram"}, "did you mean 'warm'"),
        ({"text": 3}, "the text of a plan"),
        ({"prompt": " "}, "nothing to answer"),
        ({"prompt": None}, "the prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 10**9}, "max_new_tokens"),
        ({"max_new_tokens": 4.5}, "max_new_tokens"),
        ({"reading": "warm"}, "what tokens are coloured by"),
        ({"reading": {"name": "heat"}}, "name of a reading"),
        ({"reading": {"name": "warm"}}, "site of a reading"),
        ({"reading": {"name": "warm", "site": "layers.2.output"}}, "was not read at"),
        ({"reading": {"name": "sae", "feature": 10**30}}, "feature of 'sae'"),
        ({"reading": {"name": "sae", "feature": "3"}}, "feature of 'sae'"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(request_: dict[str, Any], part: str) -> None:
    with pytest.raises((ConfigError, SiteError), match=part):
        answers(workbench(), **request_)


def test_a_first_plan_that_does_not_fit_the_model_is_refused_at_once() -> None:
    with pytest.raises(SiteError):
        workbench("warm + deep")


def test_plans_are_saved_under_names_of_their_own(tmp_path: Path) -> None:
    bench = workbench(folder=tmp_path / "plans")
    first, second = bench.save(asked()), bench.save({"text": "0 warm", "path": "../../elsewhere"})
    assert (first, second) == (tmp_path / "plans" / "plan_1.safetensors", tmp_path / "plans" / "plan_2.safetensors")
    (tmp_path / "plans" / "plan_1.safetensors").unlink()
    assert bench.save(asked()).name == "plan_3.safetensors"  # no name comes back
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plans"]
    plan = Plan.load(tmp_path / "plans" / "plan_3.safetensors")
    with plan.attached(bench._model):
        said = complete(bench._model, bench._tokenizer, ["where is the cat"], max_new_tokens=5)
    assert "".join(token["text"] for token in tokens(answers(bench), "steered") if not token["special"]).strip() == said[0]
    with pytest.raises(ConfigError, match="no folder to save to"):
        workbench().save(asked())


PROMPTS = ['say "a, b"', "a\nb", "it's ${x} $HOME `ls` \\", '\\"', "[a]{b: c}=~!&^%", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_command_says_the_same_to_the_shell_and_to_hydra(prompt: str) -> None:
    words = shlex.split(workbench(command=["steer", "say", "directions.warm=my folder"]).command(asked(prompt=prompt)))
    assert words[:3] == ["steer", "say", "directions.warm=my folder"]
    parsed = {override.key_or_group: override.value() for override in OverridesParser.create().parse_overrides(words[3:])}
    config = OmegaConf.create({"steer": str(parsed["steer"]), "prompts": [str(text) for text in parsed["prompts"]]})
    assert config.steer == TEXT and list(config.prompts) == [prompt] and parsed["max_new_tokens"] == 5
