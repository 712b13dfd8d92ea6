"""A cell is named by all that its result depends on: also by what lies in files that keep their names."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from experiment_helpers import command
from hydra import compose, initialize_config_module
from safetensors.torch import load_file, save_file
from tiny_experiment import SMALL, ab_overrides, write_data, write_model

Keys = Callable[..., dict[str, str]]


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    """Locks the experiment anew, and gives the keys of its cells: no model is loaded for that."""
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data")
    monkeypatch.syspath_prepend(tmp_path)

    def locked(*more: str, name: str | Path = model) -> dict[str, str]:
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        assert command("ab", "lock", *ab_overrides(name, data, folder, *SMALL), *more) == 0
        return json.loads((folder / "prereg.json").read_text())["design"]["cells"]

    return locked


def test_weights_that_change_in_place_make_other_cells(keys: Keys, tmp_path: Path) -> None:
    before = keys()
    assert keys() == before, "nothing changed"
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][0, 0] += 1.0  # shape, size and name of the file stay
    save_file(tensors, weights, {"format": "pt"})
    after = keys()
    assert not set(before.values()) & set(after.values())


def test_a_copy_of_the_model_is_the_same_one_but_for_its_name(keys: Keys, tmp_path: Path) -> None:
    """Time stamps and places of files are no part of a digest."""
    from steer.model.files_digest import files_digest

    keys()
    copy = shutil.copytree(tmp_path / "model", tmp_path / "copy", copy_function=shutil.copyfile)
    assert files_digest(str(copy)) == files_digest(str(tmp_path / "model"))
    (copy / "notes.md").write_text("seen")
    assert files_digest(str(copy)) == files_digest(str(tmp_path / "model")), "nothing is loaded from it"


def test_the_base_of_an_adapter_counts(tmp_path: Path) -> None:
    from steer.model.files_digest import files_digest

    base = write_model(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = files_digest(str(adapter))
    save_file({"a": torch.ones(1)}, base / "model.safetensors")
    assert files_digest(str(adapter)) != before


@pytest.mark.parametrize("name", ["smollm2-135m", "somebody/a-model-of-the-hub"])
def test_a_model_with_no_files_of_its_own_has_no_digest(name: str) -> None:
    from steer.model.files_digest import files_digest

    assert files_digest(name) is None


def test_a_metric_that_is_edited_is_measured_again(keys: Keys, tmp_path: Path) -> None:
    module = tmp_path / "my_lengths.py"
    module.write_text("def length(model, tokenizer, items):\n    return [len(item['prompt']) for item in items]\n")
    outcome = "+experiment.outcomes.length={metric: function, call: 'my_lengths:length', data: heldout, better: lower, role: secondary}"
    before = keys(outcome)
    assert keys(outcome) == before
    module.write_text(module.read_text().replace("len(item['prompt'])", "2 * len(item['prompt'])"))
    assert not set(before.values()) & set(keys(outcome).values())


def test_the_job_that_comes_second_takes_over_what_the_first_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both looked before either of them had noted anything."""
    from steer.commands.experiment_config import ExperimentConfig
    from steer.model import precision

    speed, settled = iter((2.0, 1.0)), []
    monkeypatch.setattr(precision, "_speed_of_bf16", lambda: next(speed))
    parts = write_model(tmp_path / "model"), write_data(tmp_path / "data")
    with initialize_config_module("steer.conf", version_base=None):
        values = compose("ab", [*ab_overrides(*parts, tmp_path, *SMALL), "+experiment.precision=auto"])
    configs = [ExperimentConfig(copy.deepcopy(values)) for _ in range(2)]
    for config in configs:
        config.settle_precision([tmp_path / "folder"])
        settled.append(config.precision)
    for config in configs:
        config.keep_precision(tmp_path / "folder")
    keys = [{cell.key for cell in config.cells()} for config in configs]
    assert settled == ["bf16-mixed", "32-true"] and keys[0] == keys[1]
    assert {config.precision for config in configs} == {"bf16-mixed"}
