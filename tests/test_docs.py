"""The documentation is true: its code runs, its tables and numbers are up to date, its links lead somewhere, every error is in it."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import sqlite3
import sys
import textwrap
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from types import ModuleType

import pytest
from callback_helpers import vector
from experiment_helpers import command
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from stand_ins import PAGE_MAKERS, StandIns, keep_registries
from tiny_experiment import SMALL, overrides, write_data, write_model

import steer
import steer.commands.info  # imports every registry, which have to be there before a page adds to one
from steer.directions.moments import NEEDS
from steer.drift import METRICS
from steer.drift.writer import DriftWriter
from steer.files import load_artifact
from steer.intervene.scope import KINDS
from steer.model.site import LAYER_PARTS
from steer.registry import REGISTRIES, Registry

ROOT = Path(__file__).resolve().parents[1]
README, METHODS = ROOT / "README.md", ROOT / "docs" / "methods.md"
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

SHOWN = {README, ROOT / "docs" / "index.md", *(ROOT / "docs" / "guides").glob("*.md")}  # run in test_shown.py


def name_in_repository(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def script(name: str) -> ModuleType:
    """A script of docs/, which is no package."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "docs"))


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def code_lines(block: str) -> int:
    return sum(bool(line.strip()) for line in block.splitlines())


# ---- code


@pytest.mark.parametrize("page", [page for page in PAGES if page not in SHOWN and blocks(page)], ids=name_in_repository)
def test_code_in_docs_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's blocks run one after the other, with the names that its text takes for granted; whatever else they say, they import."""
    monkeypatch.chdir(tmp_path)
    keep_registries(monkeypatch)  # a page may register a method of its own
    names = StandIns(makers=PAGE_MAKERS)
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


# ---- tables and numbers


def test_generated_tables_are_up_to_date() -> None:
    for path, text in script("make_tables").updated().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: run python docs/make_tables.py"


def test_a_new_method_is_in_the_table_of_its_kind_and_a_new_kind_in_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = script("make_tables")
    operators = steer.intervene.OPERATORS
    operators.load()
    monkeypatch.setattr(operators, "_entries", dict(operators._entries))

    @operators.register("of_a_test")
    class OfATest(steer.Add):
        """h + 1: adds one."""

    kind: Registry[type] = Registry("kind of a test")
    try:
        kind.register("a_method")(type("Method", (), {"__doc__": "What it is."}))
        texts = tables.updated()
        assert "| `of_a_test` | `steer.OfATest` | `h + 1` | adds one. |" in texts[ROOT / "docs" / "operators.md"]
        assert "| kind of a test | `a_method` | What it is. |" in texts[METHODS]
        assert "| kind of a test | `a_method` | below |" in texts[METHODS] and "`of_a_test`" in texts[METHODS]
    finally:
        del REGISTRIES["kind of a test"]


def test_every_kind_with_a_page_is_listed_there() -> None:
    tables = script("make_tables")
    assert set(tables.listed_kinds()) == set(tables.PLACES) & set(tables.methods()), "a page lacks the markers of its table"


def test_the_demo_section_follows_from_its_measurement() -> None:
    figures = script("make_figures")
    demo, text = json.loads(figures.QUOTED.read_text()), figures.PAGE.read_text(encoding="utf-8")
    assert script("make_tables").between(text, "demo", figures.section(demo)) == text, "run python docs/make_figures.py --run <folder>"
    assert figures.PICTURE.is_file()


def test_the_demo_was_measured_with_the_experiment_that_ships() -> None:
    with initialize_config_module("steer.conf", version_base="1.3"):
        shipped = OmegaConf.to_container(compose("train").experiment, resolve=True)
    demo = json.loads(script("make_figures").QUOTED.read_text())
    assert demo["config"] == shipped, "run the demo again, then docs/make_figures.py"


def test_the_figures_can_be_made_from_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_run: Path) -> None:
    figures = script("make_figures")
    page = tmp_path / "demo_page.md"
    page.write_text("before\n<!-- demo:begin -->\nold\n<!-- demo:end -->\nafter\n")
    for name, path in {"ROOT": tmp_path, "PAGE": page, "QUOTED": tmp_path / "demo.json", "PICTURE": tmp_path / "drift.svg"}.items():
        monkeypatch.setattr(figures, name, path)
    monkeypatch.setattr(sys, "argv", ["make_figures.py", "--run", str(tiny_run)])
    figures.main()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| plain fine-tuning |" in text and "No effect shown" in text and "4 items" in text
    assert "layers.2.output" in (tmp_path / "drift.svg").read_text(), "the last tracked site that is not steered"


@pytest.fixture
def tiny_run(tmp_path: Path) -> Path:
    """The folder of `steer train` on a tiny model."""
    parts = write_model(tmp_path / "model"), write_data(tmp_path / "data")
    assert command("train", *overrides(*parts, tmp_path / "run", *SMALL)) == 0
    return tmp_path / "run"


# ---- completeness


def error_names() -> set[str]:
    for module in pkgutil.walk_packages(steer.__path__, "steer."):
        if ".errors" in module.name or ".store" in module.name:
            importlib.import_module(module.name)

    def below(cls: type) -> Iterator[str]:
        for sub in cls.__subclasses__():
            yield from (sub.__name__, *below(sub))

    return {name for name in below(steer.SteerError) if name[0] != "_"}


def test_every_typed_error_has_a_section() -> None:
    sections = re.findall(r"^## (\w+Error)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    assert set(sections) == error_names() and len(sections) == len(set(sections))


def test_every_module_that_defines_an_error_is_known() -> None:
    """`error_names` imports two kinds of module only."""
    files = {
        file.name for file in (ROOT / "steer").rglob("*.py") if re.search(r"^class \w+\((\w+Error|SteerError)", file.read_text(), re.M)
    }
    files |= {file.name for file in (ROOT / "callbacks").rglob("*.py") if re.search(r"^class \w+\(\w*Error", file.read_text(), re.M)}
    assert files == {"errors.py", "store.py"}


def store_columns(folder: Path) -> set[str]:
    """Tables, views and columns of a drift store."""
    DriftWriter(folder / "d.sqlite", fingerprint={}, tracked=[]).close()
    db = sqlite3.connect(folder / "d.sqlite")
    tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]
    return {*tables, *(row[1] for table in tables for row in db.execute(f"PRAGMA table_info({table})"))}


def test_the_manifest_and_the_store_are_described(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "files.md").read_text()
    plan = steer.Plan(steer.Intervention(steer.Add(vector()), "layers.1.output"), fingerprint={"width": 32})
    manifest, _ = load_artifact(plan.save(tmp_path / "plan"), "plan")
    on_disk = json.loads((tmp_path / "plan" / "manifest.json").read_text())
    for key in (*on_disk, *manifest["interventions"][0], *store_columns(tmp_path)):
        assert f"`{key}`" in text, key
    kinds = {match for file in ROOT.glob("*/*.py") for match in re.findall(r'^    kind = "(\w+)"', file.read_text(), re.M)}
    assert kinds and all(f"`{kind}`" in text for kind in kinds | {"plan", "directions"})


def test_every_metric_of_a_record_is_explained() -> None:
    text = (ROOT / "docs" / "drift.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == set(METRICS)


def test_concepts_name_every_site_and_scope() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text()
    assert all(f"`layers.<n>.{part}`" in text for part in LAYER_PARTS) and all(f"`{kind}`" in text for kind in KINDS)


def test_the_glossary_is_alphabetical_and_has_every_kind_of_method() -> None:
    words = re.findall(r"^\| (?!word|-)([^|]+) \|", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.M)
    plain = [word.strip("`").lower() for word in words]
    assert plain == sorted(plain) and len(set(words)) == len(words)
    assert {*script("make_tables").methods(), "plan", "intervention", "attachment", "site", "direction", "tracker"} <= set(words)


def test_every_kind_of_method_of_ones_own_has_an_example() -> None:
    text = (ROOT / "docs" / "methods_of_your_own.md").read_text(encoding="utf-8")
    for kind, registry in REGISTRIES.items():
        if registry.package is not None:
            assert f"\n## {kind.capitalize()}\n" in text and f"| {kind} |" in text, kind
            assert f"`{registry.package.removeprefix('steer.').replace('.', '/')}/`" in text and f"`{registry.entry_points}`" in text, kind
    assert all(f"| `{need}` |" in text for need in NEEDS)


def cited(page: Path) -> list[tuple[str, str]]:
    """File and name of every `file: name`, and file alone of every `file`, of the package that a page cites in code font."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"`((?:steer|callbacks|kernels|conf)/[\w/]+\.py)(?:: ([\w.]+))?`", text)


@pytest.mark.parametrize("page", [page for page in PAGES if cited(page)], ids=name_in_repository)
def test_cited_functions_are_in_the_cited_files(page: Path) -> None:
    for file, name in cited(page):
        assert (ROOT / file).is_file(), f"{page.name} cites {file}"
        if name:
            folders = file.removesuffix(".py").removesuffix("/__init__").split("/")
            module = importlib.import_module(".".join(folders if folders[0] == "steer" else ["steer", *folders]))
            value = reduce(getattr, name.split("."), module)  # AttributeError says which name is gone
            home = getattr(getattr(value, "fget", value), "__module__", module.__name__)  # of a property's function
            assert home == module.__name__, f"{page.name} cites {name} in {file}, but it is defined in {home}"


def test_the_life_of_a_forward_pass_cites_its_steps() -> None:
    names = [name for _, name in cited(ROOT / "docs" / "life_of_a_forward_pass.md") if name]
    assert len(set(names)) > 50, "the pattern of the citations misses some"


# ---- links, and what must not be there


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_in_repository)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(place), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "demo.json"], ids=name_in_repository)
def test_no_path_of_a_machine_and_no_address_of_a_registry(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(work|tmp|root|home|Users)\b", text)
    assert not re.search(r"pypi\.org|pythonhosted|download\.pytorch|huggingface\.co|--(extra-)?index-url", text)


def test_pages_stay_readable() -> None:
    for page in PAGES:
        outside = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", "", page.read_text(encoding="utf-8"), flags=re.S)
        long = [line for line in outside.splitlines() if len(line) > 150 and not line.startswith("|")]
        assert not long, textwrap.shorten(f"{page.name}: {long[0]}", 200)
