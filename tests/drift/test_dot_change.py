"""The drift metric of lenses: how far a token's logit moved, by hand."""

import math

import torch
from hand import ids

from steer.drift import DriftTracker
from steer.lens import LogitLens
from steer.model.tokens import Row

SITE = "layers.1.output"


def test_it_is_the_change_of_the_logit_before_the_final_norm(tiny):
    model = tiny("llama")
    token = LogitLens.of(model).directions([7], [SITE], name="seven")
    prompts = [Row(tuple(ids(1, 6, seed)[0].tolist()), 6) for seed in range(4)]
    tracker = DriftTracker({"seven": token}, probe=prompts, span="last", controls=4)
    with tracker.attached(model):
        assert {record.dot_change for record in tracker.measure(0) if record.direction == "seven"} == {0.0}
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.add_(0.3)
        records = {record.direction: record for record in tracker.measure(1) if record.kind == "named"}
    changed = []
    for row in prompts:
        states = []
        for weight in (0.0, 0.3):
            with torch.no_grad():
                model.model.layers[1].mlp.down_proj.weight.add_(weight - 0.3)
                states.append(model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[2][0, -1])
                model.model.layers[1].mlp.down_proj.weight.add_(0.3 - weight)
        changed.append(float((states[1] - states[0]) @ model.lm_head.weight[7].detach()))
    assert math.isclose(records["seven"].dot_change, sum(changed) / 4, rel_tol=1e-3) and abs(sum(changed)) > 0.01
