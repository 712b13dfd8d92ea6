"""The screen finds the texts that a direction moves the wrong way."""

import json

import pytest
import torch
from directions.direction_helpers import controlled, pairs, running_text

from steer.directions import ContrastSet, dose_curve, extract, screen
from steer.directions.dose import side_effects
from steer.directions.screening import wilson
from steer.directions.sweep import pair_gaps
from steer.errors import ConfigError, ContrastError


def test_pairs_that_move_the_wrong_way_are_counted():
    model, direction = controlled()
    right = pairs(6)
    mixed = ContrastSet((*right.positive[:4], *right.negative[4:]), (*right.negative[:4], *right.positive[4:]), True)
    assert screen(model, direction, right, progress=False).anti_fraction == 0
    screening = screen(model, direction, mixed, dose=0.4, progress=False)
    assert screening.anti_fraction == pytest.approx(2 / 6) and [slope < 0 for slope in screening.slopes] == [False] * 4 + [True] * 2
    assert screening.anti_interval[0] < 1 / 3 < screening.anti_interval[1]
    assert json.loads(json.dumps(screening.to_dict()))["doses"] == [-0.4, -0.2, 0.0, 0.2, 0.4]


def test_a_slope_is_that_of_the_line_through_the_doses():
    model, direction = controlled()
    contrast = pairs(4)
    screening = screen(model, direction, contrast, dose=1.0, progress=False)
    doses = torch.tensor(screening.doses, dtype=torch.float64)
    gaps = pair_gaps(model, direction, contrast, direction.strength_of(1.0) * doses.float()[:, None] * direction.vector)
    line = torch.linalg.lstsq(torch.stack([torch.ones(5, dtype=torch.float64), doses], 1), gaps).solution[1]
    assert screening.slopes == pytest.approx(line.tolist(), abs=1e-6)
    assert screening.steerability == pytest.approx(float(line.mean()), abs=1e-6)


def test_texts_that_made_the_direction_may_not_screen_it():
    model, _ = controlled()
    contrast = pairs(8)
    direction = extract(model, contrast, ["layers.1.output"], name="x", progress=False)["layers.1.output"]
    with pytest.raises(ContrastError, match="the direction was made from"):
        screen(model, direction, contrast, progress=False)


def test_the_interval_of_a_share():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3) and wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)


@pytest.mark.parametrize("scope", ["generated", "prompt|generated[:4]", "all!generated"])
def test_decoded_tokens_are_not_measured_where_none_are(scope):
    """Whether counted or not, the measured tokens would differ from the steered ones."""
    model, direction = controlled()
    for measure in (
        lambda: screen(model, direction, pairs(4), scope=scope, progress=False),
        lambda: dose_curve(model, direction, pairs(4), running_text(), scope=scope, progress=False),
        lambda: side_effects(model, direction, running_text(), direction.vector[None], scope=scope),
    ):
        with pytest.raises(ConfigError, match="means decoded tokens"):
            measure()
