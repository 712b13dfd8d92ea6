"""A new method of any kind is one new file, or one entry point of another package: found by plan files and the command line."""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from steer.errors import ConfigError
from steer.registry import REGISTRIES, Registry, public_classes

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

        @IMPORTERS.register("new_import_format")
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

        @drift_metric("new_drift_metric", needs=("effect_sd",))
        def new_drift_metric(site):
            '''Square of the effect.'''
            return site.values["effect_sd"].square()
        """,
    ),
    "metric": (
        "steer/experiment/metrics",
        """
        from steer.experiment.metric import METRICS, Metric

        @METRICS.register("new_metric")
        class NewMetric(Metric):
            '''Counts the items.'''

            def items(self, model, tokenizer, items):
                return {item["id"]: float(len(items)) for item in items}
        """,
    ),
    "treatment": (
        "steer/experiment/treatments",
        """
        from steer.experiment.treatment import TREATMENTS, Treatment

        @TREATMENTS.register("new_treatment")
        class NewTreatment(Treatment):
            '''Changes nothing.'''

            when = ("inference",)

            def describe(self):
                return "nothing new"

            def spec(self):
                return {}
        """,
    ),
    "mitigation": (
        "steer/bias/mitigation",
        """
        from steer.bias.debiasing import MITIGATIONS

        @MITIGATIONS.register("new_mitigation")
        def new_mitigation(model, texts, tokenizer):
            '''Mitigates nothing so far.'''
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
    print(OBJECTIVES.get("new_objective").loss.__name__, IMPORTERS.get("new_import_format").__name__)
    assert "NewOperator" in dir(steer)

    from steer.experiment.metric import measured, metric_of
    print(measured(metric_of("new_metric"), torch.nn.Identity(), None, [{"id": "one"}]))

    from steer.experiment.arms import treatment_of
    print(treatment_of("new_treatment", "an arm").describe())
"""

INFO = """
    from steer.cli import main

    assert main(["info"]) == 0
    print("---- used")
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
            print(curve["step"], curve["new_drift_metric"] == [effect**2 for effect in curve["effect_sd"]])
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
    code = "\n".join(map(textwrap.dedent, (INFO, USE, USE_DRIFT)))  # in one process, which imports torch once
    shown, _, printed = run(installed, tmp_path, "-c", code).partition("---- used\n")
    assert all(f"new_{kind.replace(' ', '_')}" in shown for kind in FILES)
    *used, on_probes, on_batches, logged_keys = printed.splitlines()
    used, printed = " ".join(used), [on_probes, on_batches, logged_keys]
    assert used == "NewOperator new_gate per token NewSchedule() new_extractor new_objective NewImporter {'one': 1.0} nothing new"
    logged = [f"{prefix}/trait/layers.1.output/new_drift_metric" for prefix in ("drift", "drift_stream")]
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
    import steer.bias
    import steer.directions
    import steer.drift.tracker
    import steer.experiment.metric
    import steer.experiment.treatment
    import steer.intervene  # noqa: F401

    kinds = {kind: registry for kind, registry in REGISTRIES.items() if registry.package is not None}
    assert set(FILES) <= set(kinds)
    for registry in kinds.values():
        assert registry.entry_points is not None and registry.entry_points.startswith("steer.")
        assert (ROOT / registry.package.replace(".", "/")).is_dir() and list(registry)


# ---- a folder that cannot be loaded


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Registry[type]]]:
    """`folder(bad="1 / 0")` makes a registry of a folder with such a file, beside a good one that registers `good`."""
    count = itertools.count()
    before = dict(REGISTRIES)
    monkeypatch.syspath_prepend(tmp_path)

    def make(**files: str) -> Registry[type]:
        package = f"methods_{next(count)}"
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
        head = f"from steer.registry import REGISTRIES\nTHINGS = REGISTRIES['{package}']\n"
        for name, code in {"good": "@THINGS.register('good')\nclass Good: pass", **files}.items():
            (tmp_path / package / f"{name}.py").write_text(f"{head}{code}\n")
        importlib.invalidate_caches()
        return Registry(package, package)

    yield make
    for kind in set(REGISTRIES) - set(before):
        del REGISTRIES[kind]
    for module in [name for name in sys.modules if name.startswith("methods_")]:
        del sys.modules[module]


@pytest.mark.parametrize(
    ("code", "cause", "said"),
    [
        ("raise RuntimeError('bad file')", RuntimeError, "RuntimeError: bad file"),
        ("def broken(:", SyntaxError, "SyntaxError: invalid syntax"),
        ("import not_there", ModuleNotFoundError, "No module named 'not_there'"),
        ("raise SystemExit(3)", SystemExit, "SystemExit: 3"),
        ("@THINGS.register('mine')\nclass Mine: pass\nimport not_there", ModuleNotFoundError, "No module named 'not_there'"),
        ("@THINGS.register('good')\nclass Mine: pass", ConfigError, r"methods_0\.good\.Good, and wanted by methods_0\.zz_bad\.Mine"),
        ("from methods_0.good import Good\nTHINGS.register('better')(Good)", ConfigError, r"methods_0\.good\.Good is[^(]*'good'.*'better'"),
        (
            "@THINGS.register('mine')\nclass Good: pass",
            ConfigError,
            r"a class called Good .*methods_0\.good\.Good and methods_0\.zz_bad\.Good",
        ),
        ("@THINGS.register\nclass Mine: pass", ConfigError, r"methods_0\.zz_bad\.Mine is registered as .* without a name"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named_at_every_look_up(folder, code: str, cause: type, said: str):
    registry = folder(zz_bad=code)
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"the methods_0 file .*zz_bad.py cannot be loaded[\\s\\S]*{said}") as caught:
            registry.get("good")
        assert isinstance(caught.value.__cause__, cause)


def test_a_file_that_registers_nothing_is_named_unless_it_is_a_helper(folder):
    for _ in range(2):
        registry = folder(idle="x = 1")
        for _ in range(2):
            with pytest.raises(ConfigError, match=rf"{registry.kind}\.idle registers no"):
                registry.get("good")
    assert list(folder(_helper="x = 1")) == ["good"]


def test_a_look_up_goes_on_after_an_interruption(folder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("INTERRUPT", "yes")
    stopped = "@THINGS.register('mine')\nclass Mine: pass\nimport os\nif os.environ.get('INTERRUPT'): raise KeyboardInterrupt"
    registry = folder(a_first="@THINGS.register('first')\nclass First: pass", stopped=stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            registry.get("first")
    monkeypatch.delenv("INTERRUPT")
    assert list(registry) == ["first", "good", "mine"]


@pytest.mark.parametrize(
    ("code", "command"),
    [
        ("def broken(:", ["info"]),
        ("raise SystemExit(3)", ["say", "steer=warm", "prompts=[hello]"]),
    ],
)
def test_a_broken_file_ends_a_command_without_a_traceback(installed, tmp_path, code: str, command: list[str]):
    (installed / "steer" / "intervene" / "operators" / "zz_bad.py").write_text(f"from steer.intervene.operator import OPERATORS\n{code}\n")
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-m", "steer.cli", *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "zz_bad.py cannot be loaded" in done.stderr and "Traceback" not in done.stderr


# ---- entry points that cannot be used


PLUGIN = """
from steer.intervene import OPERATORS
from steer.intervene.operators.add import Add as Base

class Mine(Base): pass
class Add(Base): pass
NUMBER = 3
class Other: pass
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Registry[Any]]]:
    """`plugin("shrink = lots:Mine")` makes a registry of operators with such entry points of a package `lots`."""
    from steer.intervene import OPERATORS
    from steer.intervene.operator import Operator

    OPERATORS.load()
    before = dict(REGISTRIES)
    monkeypatch.syspath_prepend(tmp_path)

    def make(entry_points: str, code: str = PLUGIN) -> Registry[Any]:
        (tmp_path / "lots-1.0.dist-info").mkdir()
        (tmp_path / "lots-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lots\nVersion: 1.0\n")
        (tmp_path / "lots-1.0.dist-info" / "entry_points.txt").write_text(f"[steer.things]\n{entry_points}\n")
        (tmp_path / "lots.py").write_text(code)
        importlib.invalidate_caches()
        registry: Registry[Any] = Registry("thing", "steer.intervene.operators", "steer.things", subclass_of=Operator)
        registry._entries = dict(OPERATORS._entries)
        return registry

    yield make
    sys.modules.pop("lots", None)
    REGISTRIES.clear()
    REGISTRIES.update(before)


@pytest.mark.parametrize(
    ("entry_points", "code", "said"),
    [
        ("shrink = lots:NUMBER", PLUGIN, "derived from steer.intervene.operator.Operator; found int '3'"),
        ("shrink = lots:Other", PLUGIN, "derived from steer.intervene.operator.Operator; found lots.Other"),
        ("shrink = lots", "x = 1", "the module lots registers no thing"),
        ("shrink = lots", "raise SystemExit(3)", "SystemExit: 3"),
        ("shrink = lots:Nope", PLUGIN, "AttributeError"),
        ("add = lots:Mine", PLUGIN, "'add' is registered twice.*steer.intervene.operators.add.Add, and wanted by lots.Mine"),
        ("a = lots:Mine\nshrink = lots:Mine", PLUGIN, "lots.Mine is registered as thing 'a' already.*'shrink'"),
        ("shrink = steer.intervene.operators.add:Add", PLUGIN, "add.Add is registered as thing 'add' already.*'shrink'"),
        ("two words = lots:Mine", PLUGIN, "'two words' cannot be the name of a thing"),
    ],
)
def test_an_entry_point_that_cannot_be_used_is_a_warning_and_in_the_error_of_whoever_looks_for_it(plugin, entry_points, code, said):
    registry = plugin(entry_points, code)
    with pytest.warns(UserWarning, match=rf"of lots \(.*cannot be used: .*{said}") as told:
        assert registry.get("add").__name__ == "Add"
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match=rf"unknown thing 'missing'[\s\S]*of lots \([\s\S]*{said}[\s\S]*mend the other package"):
            registry.get("missing")


def test_entry_points_go_on_after_an_interruption(plugin, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("INTERRUPT", "yes")
    registering = "from steer.registry import REGISTRIES\nREGISTRIES['thing'].register('mine')(Mine)"
    stopped = f"{PLUGIN}\n{registering}\nimport os\nif os.environ.get('INTERRUPT'): raise KeyboardInterrupt"
    registry = plugin("a = steer.intervene.operators.scale\nb = lots", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            registry.get("mine")
    monkeypatch.delenv("INTERRUPT")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.get("mine").__module__ == "lots"


def test_a_class_of_another_package_never_takes_the_place_of_ours(plugin):
    registry = plugin("shrink = lots:Add")
    assert registry.get("shrink").__module__ == "lots" and public_classes([registry])["Add"] is registry.get("add")


def test_a_script_that_comes_first_does_not_take_a_name_or_an_export_of_ours(installed, tmp_path):
    code = """
        from steer.errors import ConfigError
        from steer.intervene.operator import OPERATORS
        from steer.intervene.schedule import SCHEDULES, Schedule
        from steer.intervene.operators.scale import Scale
        import steer

        @OPERATORS.register("my_add")
        class Add(Scale):
            "x"

        @OPERATORS.register("my_linear")
        class Linear(Scale):
            "x"

        try:
            OPERATORS.register("scale")(type("Mine", (Scale,), {}))
        except ConfigError as error:
            print("refused:", error.found)
        print(steer.Add.name, steer.Linear.name, steer.intervene.Add.name, "Add" in dir(steer), OPERATORS.get("my_add") is Add)
    """
    printed = run(installed, tmp_path, "-c", textwrap.dedent(code)).splitlines()
    assert printed[0].startswith("refused: it is the name of steer.intervene.operators.scale.Scale, and wanted by __main__.Mine")
    assert printed[1] == "add linear add True True"


def test_our_own_exports_have_names_of_their_own():
    import steer
    from steer.intervene import METHODS

    own = [cls.__name__ for registry in METHODS for cls in registry.classes() if registry.is_own(cls)]
    assert len(own) == len(set(own)) and not set(own) & set(steer._EXPORTS)


# ---- names


@pytest.mark.parametrize("name", ["", " ", "a b", "a.b", "1st", "_x", "-x", "Ünd", "a\n", 5, None, ("a",)])
def test_what_cannot_be_a_name_is_refused(folder, name):
    registry = folder()
    for register in (registry.register, lambda name: registry.alias(name, of="good")):
        with pytest.raises(ConfigError, match=r"cannot be the name of a [\s\S]*letters, digits, _ and -"):
            register(name)


def test_a_decorator_without_a_name_is_refused():
    from steer.directions.extractor import extractor
    from steer.directions.trained import objective
    from steer.drift.metric import drift_metric
    from steer.intervene import OPERATORS

    def method(moments):
        return moments.gap

    for decorator in (OPERATORS.register, extractor, lambda function: objective(function, runs=()), drift_metric):
        with pytest.raises(ConfigError, match=r"test_registry\.\S*method is registered as .* without a name[\s\S]*@\w+\.register\('"):
            decorator(method)


def test_a_class_is_registered_once_and_keeps_its_name():
    from steer.intervene import OPERATORS, Add

    with pytest.raises(
        ConfigError, match=r"add\.Add is registered as operator 'add' already[\s\S]*'plus'[\s\S]*OPERATORS\.alias\('plus', of='add'\)"
    ):
        OPERATORS.register("plus")(Add)
    assert Add.name == "add" and "plus" not in OPERATORS


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


# ---- definitions that run again


def test_a_cell_of_a_notebook_may_run_again(monkeypatch):
    import torch

    from steer.intervene import OPERATORS, Add, Intervention, Plan

    OPERATORS.load()
    monkeypatch.setattr(OPERATORS, "_entries", dict(OPERATORS._entries))

    def cell() -> type[Add]:
        @OPERATORS.register("of_a_cell")
        class OfACell(Add):
            pass

        return OfACell

    first, second = cell(), cell()
    assert first is not second and OPERATORS.get("of_a_cell") is second
    assert OPERATORS.name_of(second(torch.ones(4))) == "of_a_cell"
    with pytest.raises(ConfigError, match=r"was defined again after it was made[\s\S]*once more"):
        Plan(Intervention(first(torch.ones(4)), "layers.0.output")).interventions[0].to_dict()

    class Other(Add):
        pass

    with pytest.raises(ConfigError, match="operator 'of_a_cell' is registered twice"):
        OPERATORS.register("of_a_cell")(Other)


def test_a_function_of_a_cell_may_run_again(monkeypatch):
    from steer.directions.extractor import EXTRACTORS, extractor
    from steer.drift.metric import METRICS, drift_metric

    for registry, decorator in ((EXTRACTORS, extractor), (METRICS, drift_metric)):
        registry.load()
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))

        def cell(decorator=decorator):
            @decorator("of_a_cell")
            def method(moments):
                return moments.gap

            return method

        cell()
        second = cell()
        assert registry.get("of_a_cell") is second
        with pytest.raises(ConfigError, match="registered twice"):
            decorator("of_a_cell")(lambda moments: moments.gap)


def test_a_module_may_be_loaded_again(tmp_path, monkeypatch):
    registry: Registry[type] = Registry("thing of a module")
    try:
        code = "from steer.registry import REGISTRIES\n@REGISTRIES['thing of a module'].register('thing')\nclass Thing: pass\n"
        (tmp_path / "loaded_again.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        module = importlib.import_module("loaded_again")
        assert importlib.reload(module).Thing is registry.get("thing")
    finally:
        sys.modules.pop("loaded_again", None)
        del REGISTRIES["thing of a module"]


def test_a_method_without_a_docstring_shows_none(monkeypatch):
    from steer.intervene import OPERATORS, Add

    OPERATORS.load()
    monkeypatch.setattr(OPERATORS, "_entries", dict(OPERATORS._entries))
    OPERATORS.register("undocumented")(type("Undocumented", (Add,), {}))
    table = dict(OPERATORS.table())
    assert table["undocumented"] == "" and table["add"].startswith("h + strength * v")


def test_a_name_that_a_script_gave_is_looked_for_in_its_module(folder):
    with pytest.raises(ConfigError, match="import the module that registers it"):
        folder().get("registered_elsewhere")
