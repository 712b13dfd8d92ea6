"""Directions: kept with their provenance, refused when they cannot be used."""

import pytest
import torch
from hand import edited, ids, vector

from steer import files
from steer.directions import Direction, Directions
from steer.errors import ConfigError, DamagedFileError, NonFiniteError, SiteError, UnsafeFileError, WidthError, WrongKindError
from steer.intervene import Add, Intervention, Plan
from steer.model.site import Site


def direction(site: str = "layers.1.output", auc: float = 0.9, dprime: float = 1.0, seed: int = 1) -> Direction:
    metrics = {"auc": auc, "dprime": dprime, "activation_norm": 4.0}
    return Direction(Site.parse(site), vector(seed=seed), "mean_difference", "response", metrics)


def several() -> Directions:
    entries = [direction("layers.0.output", 0.8), direction("layers.1.output", 1.0, 2.0), direction("layers.2.output", 1.0, 3.0, seed=3)]
    return Directions(entries, "tone", {"model": {"model_type": "llama"}, "data_sha256": "abc", "seed": 0})


def test_the_best_separates_best_and_among_equals_most_clearly():
    assert str(several().best().site) == "layers.2.output"


def test_a_site_that_was_not_read_is_named():
    directions = several()
    assert directions["layers.1.output"] is directions[Site.parse("layers.1.output")] and len(directions) == 3
    with pytest.raises(SiteError, match=r"'tone' was not read at 'layers.1.input'[\s\S]*layers.1.output"):
        directions["layers.1.input"]


@pytest.mark.parametrize("name", ["tone", "tone.safetensors"])
def test_saved_directions_come_back_to_the_bit(name, tmp_path):
    directions = several()
    loaded = Directions.load(directions.save(tmp_path / name))
    assert (loaded.name, loaded.provenance) == (directions.name, directions.provenance)
    assert list(loaded) == list(directions)
    for site, entry in directions.items():
        assert torch.equal(loaded[site].vector, entry.vector)
        assert (loaded[site].metrics, loaded[site].method, loaded[site].span) == (entry.metrics, entry.method, entry.span)


def test_a_direction_becomes_a_plan(tiny):
    model, best = tiny("llama"), several().best()
    with torch.no_grad():
        with edited(model.model.layers[2], lambda h: h + 2 * best.vector):
            expected = model(ids()).logits
        with Plan(Intervention(Add(best.vector), best.site, strength=2.0)).attached(model):
            assert torch.allclose(model(ids()).logits, expected, atol=1e-5)
    assert best.unit.norm() == pytest.approx(1.0) and best.relative_dose(-2.0) == pytest.approx(float(best.vector.norm()) / 2)


def test_what_is_no_direction_is_refused():
    site = Site.parse("layers.1.output")
    with pytest.raises(WidthError, match="not a vector"):
        Direction(site, torch.zeros(2, 3), "pca", "all")
    with pytest.raises(NonFiniteError, match="1 of 2"):
        Direction(site, torch.tensor([1.0, float("nan")]), "pca", "all")
    with pytest.raises(ConfigError, match="is zero"):
        Direction(site, torch.zeros(3), "pca", "all")


def test_files_that_hold_no_directions_are_refused(tmp_path):
    torch.save({"x": vector()}, tmp_path / "pickle.safetensors")
    with pytest.raises(UnsafeFileError):
        Directions.load(tmp_path / "pickle.safetensors")
    Plan(Intervention(Add(vector()), "embed")).save(tmp_path / "plan")
    with pytest.raises(WrongKindError):
        Directions.load(tmp_path / "plan")
    files.save_artifact(tmp_path / "parts", "directions", {"embed": vector()}, {"directions": {"layers.0.output": {}}, "name": "x"})
    with pytest.raises(DamagedFileError, match="lack a part"):
        Directions.load(tmp_path / "parts")
    path = several().save(tmp_path / "cut.safetensors")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DamagedFileError):
        Directions.load(path)
