"""The experiment of docs/experiments.md, as it stands there, on a tiny model and data of one's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from experiment_helpers import command, read_metrics
from tiny_experiment import write_data, write_model

from steer.experiment.result import Result

PAGE = Path(__file__).parent.parent / "docs" / "experiments.md"


def test_the_yaml_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (yaml,) = [block for block in re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.M | re.S) if block.startswith("name: mine")]
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(yaml.replace("layers.16", "layers.1").replace("0.25", "0.5"))
    write_data(tmp_path / "mydata")
    model = write_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Result, "report", lambda result, path: path)
    assert command("ab", "--config-dir", "conf", "experiment=mine", f"model.name={model}", "folder=out", "draws=2") == 0
    metrics = read_metrics(tmp_path / "out")
    assert {arm["name"] for arm in metrics["arms"]} == {"plain", "formal", "random"}
    assert metrics["design"]["trained"] is False
