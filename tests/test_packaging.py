"""What is shipped and what importing it does: the mapped folders, the wheel, the import contract, the public names, the two commands."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest

import steer

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"steer": "steer", "callbacks": "steer/callbacks", "kernels": "steer/kernels", "conf": "steer/conf"}  # folder -> place in the wheel
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code: str, **options) -> str:
    return run(sys.executable, "-c", textwrap.dedent(code), **options)


def sources() -> dict[str, Path]:
    """Place in the wheel -> file, for everything in the four folders."""
    return {
        f"{place}/{file.relative_to(ROOT / folder)}": file
        for folder, place in ROOMS.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """An unpacked wheel, built from a copy, so that no build/ of the checkout gets in or is left behind."""
    copy = tmp_path_factory.mktemp("source")
    for folder in ROOMS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", copy / "out", copy)
    (built,) = (copy / "out").glob("torchsteer-*.whl")
    zipfile.ZipFile(built).extractall(copy / "unpacked")
    return copy / "unpacked"


# ---- the wheel


def test_wheel_holds_every_source_and_data_file_and_nothing_else(wheel):
    packed = {str(file.relative_to(wheel)) for file in wheel.rglob("*") if file.is_file() and ".dist-info" not in str(file)}
    assert packed == set(sources())


def test_wheel_works_without_the_checkout(wheel, tmp_path):
    code = """
        import importlib.resources, pathlib, steer, steer.callbacks, steer.conf, steer.kernels
        for package in (steer, steer.callbacks, steer.conf, steer.kernels):
            print(pathlib.Path(package.__file__).is_relative_to(pathlib.Path.cwd()))
        print((importlib.resources.files("steer.experiment") / "data").is_dir())
        print(any((importlib.resources.files("steer.conf") / "experiment").iterdir()))
    """
    # sys.path of the wheel comes before the hooks of an editable install
    assert python(code, cwd=wheel, env={**os.environ, "PYTHONPATH": str(wheel)}).split() == ["True"] * 6


def test_wheel_metadata(wheel):
    (info,) = wheel.glob("*.dist-info")
    metadata = (info / "METADATA").read_text()
    assert f"\nVersion: {steer.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert "steer = steer.cli:main" in (info / "entry_points.txt").read_text()


def test_the_version_is_the_same_everywhere():
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == steer.__version__
    assert f"version: {steer.__version__}\n" in (ROOT / "CITATION.cff").read_text()


# ---- dependencies


def requirement_name(line: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", line)[0].lower().replace("_", "-")


def test_the_library_pins_nothing_and_the_constraints_pin_every_direct_dependency():
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    wanted = [line for line in wanted if not line.startswith("torchsteer[")]
    assert not [line for line in wanted if re.search("[<=]=|<", line.split(";")[0])]
    lines = [line for line in (ROOT / "constraints" / "cpu.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line for line in lines)
    assert {requirement_name(line) for line in wanted} <= {requirement_name(line) for line in lines}
    assert "torch==2.13.0" in lines


def test_every_import_is_a_declared_dependency():
    """At the top of a module only what is always installed; inside a function also what an extra installs."""
    project = PROJECT["project"]
    always = {requirement_name(line) for line in project["dependencies"]}
    anywhere = always | {requirement_name(line) for extra in project["optional-dependencies"].values() for line in extra}
    for file in sources().values():
        if file.suffix != ".py":
            continue
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            else:
                continue
            for module in {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"steer"}:
                name = {"hydra": "hydra-core"}.get(module, module.replace("_", "-"))
                assert name in (always if node in tree.body else anywhere), f"{file.relative_to(ROOT)} imports {module}"


# ---- importing


def test_import_contract(tmp_path):
    """import-linter walks one folder per package, so it gets a copy in which the mapped folders lie where they are imported."""
    pytest.importorskip("importlinter")
    for folder, place in ROOMS.items():
        shutil.copytree(ROOT / folder, tmp_path / place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "data"))
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--config", ROOT / "pyproject.toml"]
    assert "0 broken" in run(*command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})


def test_importing_steer_is_cheap(tmp_path):
    heavy = "{'torch', 'numpy', 'transformers', 'pytorch_lightning', 'peft', 'triton', 'hydra', 'matplotlib'}"
    assert python(f"import sys, steer; print(sorted({heavy} & set(sys.modules)))", cwd=tmp_path).strip() == "[]"


def test_importing_every_module_asks_no_network_and_downloads_nothing(tmp_path):
    code = """
        import importlib, pkgutil, sys
        asked = []
        sys.addaudithook(lambda event, args: asked.append((event, args)) if event in ("socket.connect", "socket.getaddrinfo") else None)
        import steer
        names = [module.name for module in pkgutil.walk_packages(steer.__path__, "steer.")]
        for room in ("callbacks", "kernels", "conf"):
            package = importlib.import_module(f"steer.{room}")
            names += [module.name for module in pkgutil.walk_packages(package.__path__, f"steer.{room}.")]
        for name in names:
            if not name.endswith("__main__"):
                importlib.import_module(name)
        assert not asked, asked
        print(len(names))
    """
    caches = {"STEER_CACHE": str(tmp_path / "steer"), "HF_HOME": str(tmp_path / "hub")}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | caches
    assert int(python(code, cwd=tmp_path, env=environment)) >= 20
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


@pytest.mark.parametrize("name", steer.__all__)
def test_public_name(name):
    value = getattr(steer, name)
    assert name in dir(steer)
    if name in steer._EXPORTS:
        assert value is getattr(importlib.import_module(steer._EXPORTS[name]), name)


def test_what_the_pages_write_out_is_reached_by_importing_steer_alone(tmp_path):
    """`steer.drift.DriftStore(...)` in a new process: every dotted name of the documentation, and every package."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    texts = [re.sub(r"^\s*(from|import) .*$", "", page.read_text(encoding="utf-8"), flags=re.M) for page in pages]
    written = {name for text in texts for name in re.findall(r"(?<![\w./`-])steer(?:\.\w+){2,}(?=\()", text)}
    packages = {f"steer.{file.parent.name}" for file in (ROOT / "steer").glob("*/__init__.py")} | {"steer.callbacks", "steer.kernels"}
    packages |= {"steer.features.evaluation", "steer.features.search"}
    names = sorted(written | packages - {"steer.commands"})
    code = f"""
        import steer
        for name in {names}:
            value = steer
            for part in name.split(".")[1:]:
                value = getattr(value, part)
    """
    assert "steer.drift.DriftStore" in names and "steer.model.tokens.plain" in names
    python(code, cwd=tmp_path)


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        steer.nothing  # noqa: B018


# ---- the folder `kernels` and the distribution of that name


def test_status_of_the_kernels():
    from steer import kernels

    status = kernels.status()
    assert status["kernels"] == sorted(kernels.KERNELS)
    assert (status["triton"] is None) == (status["reason"] is not None)


def test_a_checkout_on_the_path_does_not_break_transformers():
    code = """
        import kernels
        assert not hasattr(kernels, "__version__") and not hasattr(kernels, "KERNELS")
        from transformers.utils import is_kernels_available
        assert not is_kernels_available()
        try:
            from kernels import get_kernel
        except ImportError:
            print("refused")
        from steer.registry import REGISTRIES
        assert "kernel" not in REGISTRIES
        import steer.kernels
        assert "kernel" in REGISTRIES
    """
    assert python(code, cwd=ROOT).strip() == "refused"


def test_a_checkout_on_the_path_does_not_hide_the_distribution(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '9.9'\n")
    (tmp_path / "kernels" / "layer.py").write_text("there = True\n")
    code = "import kernels, kernels.layer, steer.kernels; print(kernels.__version__, kernels.layer.there, steer.kernels.KERNELS.kind)"
    assert python(code, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}).split() == ["9.9", "True", "kernel"]


# ---- the two commands


def test_make_names_the_python_that_is_too_old(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(["make", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}", "demo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr and "Python 3.9.1" in done.stderr
    assert not (tmp_path / "venv").exists()


# ---- installation from the public index (.ci/resolve.py, which needs the network; here is what does not)


@pytest.fixture
def resolve():
    spec = importlib.util.spec_from_file_location("resolve", ROOT / ".ci" / "resolve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_change_has_to_resolve_on_the_oldest_and_newest_python(resolve):
    assert resolve.python_versions() == ("3.11", "3.13")
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    started, waited = (next(i for i, line in enumerate(lines) if line.startswith(what)) for what in ("make resolve &", 'wait "$resolving"'))
    assert "set -euo pipefail" in lines and started < waited < lines.index("make test"), "it fails where that fails"


def test_resolving_takes_no_other_place_than_the_public_index(resolve, monkeypatch):
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_NO_INDEX", "PIP_CONSTRAINT", "PIP_PRE", "UV_INDEX"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("PIP_CERT", "certificates")
    environment = resolve.public_environment()
    assert "elsewhere" not in environment.values()
    assert environment["PIP_CERT"] == "certificates" and environment["PIP_CONFIG_FILE"] == os.devnull


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("Retrying after connection broken by 'NewConnectionError'", "cannot be reached"),
        ("ERROR: ResolutionImpossible", "does not resolve"),
    ],
)
def test_what_cannot_be_resolved_fails_and_says_why(resolve, said, cause):
    with pytest.raises(SystemExit, match=f"(?s){re.escape(said)}.*the dry run: .*{cause}"):
        resolve.run([sys.executable, "-c", f"import sys; sys.exit({said!r})"], "the dry run")


def test_a_cpu_build_proves_nothing(resolve):
    assert "torch 2.13.0, triton 3.7.1" in resolve.check_torch({"torch": "2.13.0", "triton": "3.7.1"}, "demo")
    with pytest.raises(SystemExit, match="found torch 2.13.0\\+cpu"):
        resolve.check_torch({"torch": "2.13.0+cpu", "triton": "3.7.1"}, "demo")
