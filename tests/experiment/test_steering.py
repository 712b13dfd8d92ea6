"""Plans and their gates from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from features.feature_plans import autoencoder
from hand import vector

from steer.directions.direction import Direction, Directions
from steer.errors import ConfigError, SteerError
from steer.experiment.steering import plan_from_config
from steer.intervene import CosineGate
from steer.model.site import Site


@pytest.fixture
def warm(tmp_path: Path) -> dict[str, str]:
    entries = [
        Direction(Site.parse(f"layers.{layer}.output"), vector(seed=layer), "lda", "last", {"auc": auc, "dprime": 1.0})
        for layer, auc in ((0, 0.9), (1, 0.7))
    ]
    return {"warm": str(Directions(entries, "warm", {}).save(tmp_path / "warm"))}


def test_a_gate_reads_where_its_direction_was_read(warm: dict[str, str]) -> None:
    spec = {"gate": "cosine", "direction": "warm", "threshold": 0.25, "per": "generation", "sharpness": 4.0}
    late = {"gate": "cosine", "direction": "warm", "site": "layers.1.output"}
    plan, text = plan_from_config("2 warm@response ?loud - warm ?late", warm, {"loud": spec, "late": late})
    assert text == "2 warm:layers.0.output@response ?loud - 1 warm:layers.0.output@all ?late"
    first, second = (intervention.gate for intervention in plan.interventions)
    assert isinstance(first, CosineGate) and isinstance(second, CosineGate)
    assert torch.equal(first.tensors["vector"][0], vector(seed=0)) and torch.equal(second.tensors["vector"][0], vector(seed=1))
    assert (str(first.site), str(second.site), first.per) == ("layers.0.output", "layers.1.output", "generation")
    assert float(first.tensors["threshold"]) == 0.25


COSINE = {"gate": "cosine", "direction": "warm"}


@pytest.mark.parametrize(
    ("gate", "says"),
    [
        ({"gate": "cosine"}, r"gate 'loud' is incomplete[\s\S]*gates.loud.direction=<name>[\s\S]*found: gate"),
        ("cosine", r"gate 'loud' is incomplete[\s\S]*found: cosine"),
        ({**COSINE, "gate": "cosin"}, r"unknown gate 'cosin'[\s\S]*did you mean 'cosine'"),
        ({**COSINE, "direction": "wram"}, r"gate 'loud': no direction is called 'wram'[\s\S]*did you mean 'warm'"),
        ({**COSINE, "treshold": 1}, r"gate 'loud' has no option 'treshold'[\s\S]*did you mean 'threshold'"),
        ({**COSINE, "vector": [1.0]}, "gate 'loud' has no option 'vector'"),
        ({**COSINE, "threshold": "high"}, "loud|threshold"),
        ({**COSINE, "site": "layers.2.output"}, "was not read at 'layers.2.output'"),
        ({**COSINE, "per": "day"}, "unknown 'per' of a gate"),
        ({**COSINE, "gate": "call"}, r"unknown gate 'call'[\s\S]*expected: one of cosine, feature, probe\n"),
    ],
)
def test_gates_that_cannot_be_made(warm: dict[str, str], gate: Any, says: str) -> None:
    with pytest.raises(SteerError, match=says):
        plan_from_config("warm?loud", warm, {"loud": gate})


def test_a_gate_of_a_direction_that_was_not_given() -> None:
    with pytest.raises(ConfigError, match=r"a direction, but none was given[\s\S]*directions.warm=<path>"):
        plan_from_config("warm?loud", {}, {"loud": COSINE})


def test_features_of_a_dictionary_are_named_with_its_place(tmp_path: Path) -> None:
    made = autoencoder(site="layers.1.output")
    made.save(tmp_path / "sae")
    plan, text = plan_from_config("clamp(sae, feature=3, to=2)@response", {}, {}, {"sae": str(tmp_path / "sae")})
    assert text.startswith("1 clamp_features(sae, feature=3, to=2):layers.1.output@response")
    assert plan.interventions[0].site == Site.parse("layers.1.output")
    moved = {"path": str(tmp_path / "sae"), "reads": "layers.0.output"}
    for wrong, says in (
        ({"reads": "layers.1.output"}, r"dictionary 'sae' has no place"),
        ({**moved, "read": "x"}, r"dictionary 'sae' has no option 'read'[\s\S]*did you mean 'reads'"),
    ):
        with pytest.raises(ConfigError, match=says):
            plan_from_config("clamp(sae, feature=3, to=2)", {}, {}, {"sae": wrong})
    with pytest.raises(ConfigError, match="both a direction and a dictionary"):
        plan_from_config("sae", {"sae": "a"}, {}, {"sae": str(tmp_path / "sae")})


def test_a_file_of_nothing_but_a_vector_is_named_with_its_site(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vector(seed=3).numpy())
    source = {"path": str(tmp_path / "v.npy"), "site": "layers.1.output"}
    plan, text = plan_from_config("0.5 warm@response", {"warm": source}, {})
    assert text == "0.5 warm:layers.1.output@response"
    assert torch.equal(plan.interventions[0].operator.tensors["vector"][0], vector(seed=3))
    for wrong, says in (
        ({"site": "layers.1.output"}, r"direction 'warm' has no file[\s\S]*directions.warm.path=vector.npy"),
        ({**source, "sites": "x"}, r"direction 'warm' has no option 'sites'[\s\S]*did you mean 'site'"),
        ({"path": source["path"]}, "site="),
    ):
        with pytest.raises(SteerError, match=says):
            plan_from_config("warm", {"warm": wrong}, {})
