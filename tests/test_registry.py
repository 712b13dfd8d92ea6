"""A new method of any kind is one new file, or one entry point of another package: found by plan files and the command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from steer.errors import ConfigError
from steer.registry import REGISTRIES, Registry

ROOT = Path(__file__).resolve().parents[1]
# folder -> place when installed
ROOMS = {"steer": "steer", "callbacks": "steer/callbacks", "kernels": "steer/kernels", "conf": "steer/conf"}

# kind -> (the folder of the kind, a file that adds `new_<kind>` to it)
FILES = {
    "operator": (
        "steer/intervene/operators",
        """
        from steer.intervene.operator import OPERATORS
        from steer.intervene.operators.add import Add

        @OPERATORS.register("new_operator")
        class NewOperator(Add):
            '''h + strength * v, under another name.'''
        """,
    ),
    "gate": (
        "steer/intervene/gates",
        """
        from steer.intervene.gate import GATES
        from steer.intervene.gates.probe import ProbeGate

        @GATES.register("new_gate")
        class NewGate(ProbeGate):
            '''Opens as a probe does.'''
        """,
    ),
    "schedule": (
        "steer/intervene/schedules",
        """
        from dataclasses import dataclass
        from steer.intervene.schedule import SCHEDULES, Schedule

        @SCHEDULES.register("new_schedule")
        @dataclass(frozen=True)
        class NewSchedule(Schedule):
            '''1 at even steps, 0 at odd ones.'''

            def __call__(self, step):
                return float(step % 2 == 0)
        """,
    ),
    "extractor": (
        "steer/directions/extractors",
        """
        from steer.directions.extractor import extractor

        @extractor("new_extractor")
        def new_extractor(moments):
            '''Difference of the class means, once more.'''
            return moments.gap
        """,
    ),
    "objective": (
        "steer/directions/objectives",
        """
        from steer.directions.trained import objective

        @objective("new_objective", runs=(("positive", 1),))
        def new_objective(scores):
            '''The vector makes the positive answers likely.'''
            return -scores.steered["positive", 1].mean()
        """,
    ),
    "import format": (
        "steer/directions/importers",
        """
        from steer.directions.importer import IMPORTERS, Importer

        @IMPORTERS.register("new_import format")
        class NewImporter(Importer):
            '''Reads nothing so far.'''

            makes, looks_for = "directions", "a file that nobody writes"

            @classmethod
            def recognises(cls, source):
                return False
        """,
    ),
    "drift metric": (
        "steer/drift/metrics",
        """
        from steer.drift.metric import drift_metric

        @drift_metric("new_drift metric", needs=("effect_sd",))
        def new_drift_metric(site):
            '''Square of the effect.'''
            return site.values["effect_sd"].square()
        """,
    ),
}

USE = """
    import torch
    import steer
    from steer.directions import EXTRACTORS, IMPORTERS, OBJECTIVES

    intervention = steer.Intervention(steer.NewOperator(torch.ones(8)), "layers.0.output", gate=steer.NewGate(torch.ones(8)),
                                      schedule={"name": "new_schedule"})
    steer.Plan(intervention).save("plan")
    (loaded,) = steer.Plan.load("plan").interventions
    print(type(loaded.operator).__name__, loaded.gate, loaded.schedule, EXTRACTORS.get("new_extractor").direction.__name__)
    print(OBJECTIVES.get("new_objective").loss.__name__, IMPORTERS.get("new_import format").__name__)
    assert "NewOperator" in dir(steer)
"""

USE_DRIFT = """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from steer.directions.direction import Direction
    from steer.drift import DriftStore, DriftTracker
    from steer.model.site import Site
    from steer.model.tokens import Row

    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    direction = Direction(Site.parse("layers.1.output"), torch.ones(8), "mean_difference", "response")
    tracker = DriftTracker({"trait": direction}, probe=[Row((7, 8, 9), 3), Row((9, 8), 2)], store="drift.sqlite")
    with tracker.attached(model):
        for step in (0, 4):
            model.model.layers[1].mlp.down_proj.weight.data += step
            tracker.measure(step)
            model(torch.tensor([[7, 8, 9]]), labels=torch.tensor([[7, 8, 9]]))
    with DriftStore("drift.sqlite") as store:
        for mode in ("probe", "stream"):
            curve = store.series("trait", "layers.1.output", mode)
            print(curve["step"], curve["new_drift metric"] == [effect**2 for effect in curve["effect_sd"]])
    print([key for key in tracker.log_values() if "new_" in key])
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A copy of the package as it lies in site-packages, and nothing of the checkout beside it."""
    for folder, place in ROOMS.items():
        shutil.copytree(ROOT / folder, tmp_path / "site" / place, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "site"


def run(site: Path, cwd: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_one_new_file_of_each_kind_is_found_everywhere(installed, tmp_path):
    for kind, (folder, code) in FILES.items():
        (installed / folder / f"new_{kind.replace(' ', '_')}.py").write_text(textwrap.dedent(code))
    shown = run(installed, tmp_path, "-m", "steer.cli", "info")
    assert all(f"new_{kind}" in shown for kind in FILES)
    printed = run(installed, tmp_path, "-c", textwrap.dedent(USE)).split()
    assert printed == [*"NewOperator new_gate per token NewSchedule() new_extractor".split(), "new_objective", "NewImporter"]
    printed = run(installed, tmp_path, "-c", textwrap.dedent(USE_DRIFT)).splitlines()
    logged = [f"{prefix}/trait@layers.1.output/new_drift metric" for prefix in ("drift", "drift_stream")]
    assert printed == ["[0, 4] True", "[4] True", str(logged)]


def test_entry_points_of_another_package_are_found(installed, tmp_path):
    package = tmp_path / "other"
    (package / "lots-1.0.dist-info").mkdir(parents=True)
    (package / "lots-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lots\nVersion: 1.0\n")
    (package / "lots-1.0.dist-info" / "entry_points.txt").write_text(
        "[steer.operators]\nnew_operator = lots.operator\nplain = lots.plain:Plain\nbroken = lots.nowhere\n"
    )
    (package / "lots").mkdir()
    (package / "lots" / "operator.py").write_text(textwrap.dedent(FILES["operator"][1]))
    (package / "lots" / "plain.py").write_text(
        "from steer.intervene.operators.add import Add\nclass Plain(Add):\n    '''h + strength * v, not registered.'''\n"
    )
    code = """
        import warnings, torch, steer
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            print(sorted(name for name in steer.intervene.OPERATORS if name in ("new_operator", "plain", "broken")))
        print(steer.Plain.name, [str(one.message) for one in told if "lots" in str(one.message)])
        steer.Plan(steer.Intervention(steer.Plain(torch.ones(4)), "layers.0.output")).save("plan")
        print(type(steer.Plan.load("plan").interventions[0].operator).__name__)
    """
    path = os.pathsep.join(map(str, (installed, package)))
    printed = run(Path(path), tmp_path, "-c", "import steer.intervene\n" + textwrap.dedent(code)).splitlines()
    assert printed[0] == "['new_operator', 'plain']" and printed[1].startswith("plain ") and printed[2] == "Plain"
    assert "'broken' of lots (lots.nowhere) cannot be used: ModuleNotFoundError" in printed[1]


def test_every_kind_of_method_has_a_folder_and_entry_points():
    import steer.directions
    import steer.drift.tracker
    import steer.intervene  # noqa: F401

    kinds = {kind: registry for kind, registry in REGISTRIES.items() if registry.package is not None}
    assert set(FILES) <= set(kinds)
    for registry in kinds.values():
        assert registry.entry_points is not None and registry.entry_points.startswith("steer.")
        assert (ROOT / registry.package.replace(".", "/")).is_dir() and list(registry)


def test_a_folder_that_cannot_be_imported_says_so_at_every_look_up(tmp_path, monkeypatch):
    (tmp_path / "broken_methods").mkdir()
    (tmp_path / "broken_methods" / "__init__.py").write_text("")
    (tmp_path / "broken_methods" / "bad.py").write_text("raise RuntimeError('bad file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry: Registry[type] = Registry("thing of a test", "broken_methods")
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="bad file"):
                registry.get("bad")
    finally:
        del REGISTRIES["thing of a test"]


def test_a_name_is_given_once_and_the_nearest_one_is_named():
    registry: Registry[type] = Registry("thing of a test")
    try:
        first = registry.register("first")(type("First", (), {}))
        registry.alias("premier", of="first")
        assert first.name == "first" and registry.get("premier") is first and list(registry) == ["first"]
        assert "premier" in registry and "second" not in registry
        for taken in ("first", "premier"):
            with pytest.raises(ConfigError, match="registered twice"):
                registry.register(taken)(type("Second", (), {}))
        with pytest.raises(ConfigError, match="did you mean 'first'"):
            registry.get("frist")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert registry.table() == [("first", "")]
    finally:
        del REGISTRIES["thing of a test"]
