"""Calibration from pairs alone: what the model says decides, loops and unlikely neutral text rule out, and the test pairs are seen once."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from families import FAMILIES
from tiny_tokenizer import tiny_tokenizer

import steer
from steer.directions import Direction, Directions
from steer.directions.contrast import text_digest
from steer.errors import ConfigError, ContrastError
from steer.experiment import calibrate as module
from steer.experiment.calibrate import _Talk, _try_doses, _try_layers, _until_end, calibrate, candidate_sites
from steer.experiment.complete import greedy_tokens
from steer.model.estimates import Estimate
from steer.model.site import Site
from steer.model.tokens import Row

TOKENIZER = tiny_tokenizer()
NOUNS = "cat dog house tree fire water earth sun moon star day night food game song bird".split()
PAIRS = [{"prompt": f"what is the {noun} ?", "positive": f"the {noun} is cold", "negative": f"the {noun} is warm"} for noun in NOUNS]
NEUTRAL = ["the dog ran in the house", "we like the blue water"]
SITES = [Site.parse(f"layers.{layer}.output") for layer in (0, 1)]
TINY: dict[str, Any] = {"sites": SITES, "neutral": NEUTRAL, "max_new_tokens": 8, "progress": False}


def controlled() -> Any:
    """A tiny model that says 'warm', and 'cold' where its residual stream is moved along the difference of their embeddings."""
    model = FAMILIES["llama"]()
    v = torch.randn(32, generator=torch.Generator().manual_seed(7))
    warm, cold = TOKENIZER.convert_tokens_to_ids(["warm", "cold"])
    with torch.no_grad():
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        for block in model.model.layers:  # what is written to the stream reaches the end
            block.self_attn.o_proj.weight.mul_(0.1)
            block.mlp.down_proj.weight.mul_(0.1)
        for token, sign in ((warm, 1), (cold, -1)):
            embeddings[token] += sign * v / v.norm()
            head[token] += 2 * sign * v / v.norm()
    return model


class Spoken:
    """In the place of the model's own answers: how far each layer moves them at each dose, and which doses make them loop."""

    plain_loops = 0
    tokenizer = None

    def __init__(self, moves: dict[int, float], looping: set[tuple[int, float]] = frozenset()) -> None:
        metrics = {"activation_norm": 1.0}
        entries = [Direction(site, torch.ones(4) / 2, "m", "response", metrics) for site in SITES]
        self.directions = Directions(entries, "cold", {})
        self.moves, self.looping = moves, looping
        self.asked: list[tuple[int, float]] = []

    def answers(self, steps: list[tuple[Direction, float]]) -> tuple[list[list[Row]], torch.Tensor]:
        said, moved = [], []
        for direction, strength in steps:
            place = (direction.site.layer, round(strength, 6))
            self.asked.append(place)
            said.append([Row((1, *([5, 6, 7, 8] * 6 if place in self.looping else range(10, 34))), 1)] * 3)
            moved.append(self.moves[direction.site.layer] * strength + torch.tensor([-0.01, 0.0, 0.01]))
        return said, torch.stack(moved)


def ratios(*of_layers: dict[float, float]) -> dict[Site, dict[float, float]]:
    return dict(zip(SITES, of_layers, strict=True))


def test_every_layer_is_tried_at_the_largest_dose_that_neutral_text_allows() -> None:
    spoken = Spoken({0: 1.0, 1: 2.0})
    tried = _try_layers(spoken, ratios({0.1: 1.1, 0.2: 1.4, 0.3: 1.9}, {0.1: 1.6, 0.2: 2.0, 0.3: 3.0}), 1.5)  # type: ignore[arg-type]
    assert [(point.site.layer, point.dose) for point in tried] == [(0, 0.2)] and spoken.asked == [(0, 0.2)]


def test_the_layer_that_moves_answers_most_is_taken_at_its_largest_dose_without_loops() -> None:
    spoken = Spoken({0: 1.0, 1: 2.0}, looping={(1, 0.2)})
    allowed = ratios(*[{0.1: 1.1, 0.15: 1.2, 0.2: 1.3, 0.3: 1.4, 0.5: 2.0}] * 2)
    tried = _try_layers(spoken, allowed, 1.5)  # type: ignore[arg-type]
    tried, chosen = _try_doses(spoken, allowed, 1.5, tried)  # type: ignore[arg-type]
    assert chosen is not None and (chosen.site.layer, chosen.dose, chosen.loops) == (1, 0.3, 0)
    rejected = {point.dose: point.rejected for point in tried if point.site.layer == 1}
    assert rejected == {0.3: "", 0.1: "", 0.15: "", 0.2: "loops, unsteered 0/3"}
    assert next(point for point in tried if point.dose == 0.2).reading.value == 0, "an answer that loops moved nowhere"


def test_where_every_dose_of_the_best_layer_loops_the_next_one_is_tried() -> None:
    spoken = Spoken({0: 1.0, 1: -1.0}, looping={(0, 0.1), (0, 0.2)})
    allowed = ratios({0.1: 1.1, 0.2: 1.2}, {0.1: 1.1, 0.2: 1.2})
    tried, chosen = _try_doses(spoken, allowed, 1.5, _try_layers(spoken, allowed, 1.5))  # type: ignore[arg-type]
    assert chosen is None and {point.site.layer for point in tried} == {0, 1}
    assert {point.rejected for point in tried if point.site.layer == 1} == {"answers do not move"}


def test_answers_of_one_batch_are_those_of_one_plan_at_a_time() -> None:
    model = controlled()
    directions = steer.extract(model, steer.ContrastSet.from_pairs(TOKENIZER, PAIRS), SITES, name="cold", progress=False)
    pairs = steer.ContrastSet.from_pairs(TOKENIZER, PAIRS[:3])
    talk = _Talk(model, TOKENIZER, directions, pairs, "all", 8)
    steps = [(directions[site], sign * directions[site].strength_of(2.0)) for site, sign in zip(SITES, (1, -1), strict=True)]
    said, moved = talk.answers(steps)
    assert moved.shape == (2, 3)
    prompts = [Row(row.ids[: row.prompt], row.prompt) for row in pairs.positive]

    def alone(*interventions: steer.Intervention) -> list[tuple[int, ...]]:
        with steer.Plan([*interventions]).attached(model):
            tokens = greedy_tokens(model, TOKENIZER, prompts, 8).tolist()
        return [(*row.ids, *_until_end(answer, {2})) for row, answer in zip(prompts, tokens, strict=True)]

    assert [row.ids for row in talk.plain] == alone(steer.Intervention(steer.Add(torch.zeros(32)), SITES[0]))
    for (direction, strength), answers in zip(steps, said, strict=True):
        steered = alone(steer.Intervention(steer.Add(direction.vector), direction.site, strength=strength))
        assert [row.ids for row in answers] == steered
    assert said[0] != said[1]
    assert moved[0].mean() > 0 and moved[1].mean() <= 0


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> steer.experiment.calibration.Calibration:
    monkeypatch.setattr(module, "LOOP", 2.0)  # a tiny model says one word over and over
    return calibrate(controlled(), TOKENIZER, PAIRS, name="cold", doses=(0.1, 1.0), max_perplexity_ratio=1e6, **TINY)


def test_a_calibration_says_what_was_chosen_tried_and_tested(found: Any) -> None:
    assert found.n_pairs == (8, 4, 4) and found.effect.n == len(found.answers) == 4
    assert found.effect.low > 0 and found.over_random.low > 0 and found.reading.value > 0
    assert found.dose == max(point.dose for point in found.tried if point.site == found.site and not point.rejected)
    assert found.strength == pytest.approx(found.dose / found.direction.relative_dose())
    (intervention,) = found.plan.interventions
    assert intervention.site == found.site and intervention.strength == (pytest.approx(found.strength),)
    assert str(found).count("chosen") == 1 and "4 pairs kept for the test" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["tried"][0]["rejected"] == found.tried[0].rejected


def test_pairs_that_made_the_direction_neither_choose_nor_test(found: Any) -> None:
    made = found.direction.fitted_on
    contrast = steer.ContrastSet.from_pairs(TOKENIZER, PAIRS)
    used = [pair["prompt"] for pair, row in zip(PAIRS, contrast.positive, strict=True) if text_digest(row) in made]
    assert len(made) == 2 * len(used) == 16 and not set(used) & {answer.prompt for answer in found.answers}


def test_nothing_that_moves_is_refused_with_what_was_tried() -> None:
    with pytest.raises(ConfigError, match=r"moves the model's answers towards 'cold'[\s\S]*layers.\d.output at dose 0.1") as caught:
        calibrate(controlled(), TOKENIZER, PAIRS, name="cold", doses=(0.1,), max_perplexity_ratio=20.0, **TINY)
    assert "clearer or more pairs" in caught.value.remedy
    with pytest.raises(ConfigError, match="no dose that leaves neutral text likely enough"):
        calibrate(controlled(), TOKENIZER, PAIRS, doses=(90.0,), max_perplexity_ratio=1.0, **TINY)


def test_what_the_test_does_not_confirm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOP", 2.0)
    monkeypatch.setattr(module, "_tested", lambda *_: (Estimate(0.1, -0.1, 0.3, 4),) * 2)
    with pytest.raises(ConfigError, match=r"does not move the pairs kept for the test[\s\S]*0.100 \[-0.100, 0.300\]"):
        calibrate(controlled(), TOKENIZER, PAIRS, doses=(1.0,), max_perplexity_ratio=1e6, **TINY)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"pairs": PAIRS[:11]}, ContrastError),
        ({"pairs": "warm"}, ConfigError),
        ({"doses": ()}, ConfigError),
        ({"doses": (0.0,)}, ConfigError),
        ({"doses": 0.1}, ConfigError),
        ({"max_perplexity_ratio": 0.9}, ConfigError),
        ({"max_new_tokens": 2}, ConfigError),
        ({"neutral": []}, ContrastError),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], error: type[Exception]) -> None:
    arguments = {**TINY, "pairs": PAIRS, **options}
    with pytest.raises(error) as caught:
        calibrate(FAMILIES["llama"](), TOKENIZER, arguments.pop("pairs"), **arguments)
    assert caught.value.remedy and caught.value.expected


def test_candidates_lie_in_the_middle_of_the_model() -> None:
    assert candidate_sites(FAMILIES["llama"]()) == ["layers.0.output", "layers.1.output", "layers.2.output"]
    assert candidate_sites(FAMILIES["llama"](num_hidden_layers=30)) == [f"layers.{layer}.output" for layer in (9, 12, 16, 20, 24)]


def test_a_calibration_is_drawn(found: Any) -> None:
    layers, doses = found.plot().axes
    assert [label.get_text() for label in layers.get_xticklabels()] == ["layers.0.output\ndose 1", "layers.1.output\ndose 1"]
    assert doses.get_title(loc="left") == f"doses at {found.site}"


def test_the_suggested_strength_is_a_dose() -> None:
    direction = Direction(SITES[0], torch.ones(4), "m", "response", {"activation_norm": 10.0})
    assert direction.relative_dose(direction.suggested_strength) == pytest.approx(0.2)
    with pytest.raises(ConfigError, match="was not measured"):
        Direction(SITES[0], torch.ones(4), "m", "response").suggested_strength  # noqa: B018


def test_an_answer_ends_with_the_token_that_ends_it() -> None:
    assert _until_end([5, 6, 2, 0, 0], {2}) == [5, 6, 2] and _until_end([5, 6], {2}) == [5, 6]
