"""The page in a real browser, without a network. Skipped where there is no Chromium or Chrome."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from steer.drift.records import DriftRecord
from steer.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def chromium() -> str:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser on the PATH (looked for {', '.join(NAMES)})")
    return path


def browse(chromium: str, page: Path, profile: Path, *arguments: str) -> tuple[str, str]:
    """Opens a page with every address outside the machine unreachable; returns the browser's output and its log."""
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--proxy-server=127.0.0.1:9",
        "--enable-logging=stderr",
        f"--user-data-dir={profile}",
        *arguments,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "LANG": "C.UTF-8"})
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_renders_without_network_and_without_complaint(
    tmp_path: Path, chromium: str, synthetic_metrics: dict[str, Any], synthetic_drift: dict[str, list[DriftRecord]]
) -> None:
    metrics = copy.deepcopy(synthetic_metrics)
    metrics["arms"][0]["completions"][0] = {"prompt": HOSTILE, "text": HOSTILE}
    page = write_report(tmp_path / "report.html", metrics, synthetic_drift)
    dom, log = browse(chromium, page, tmp_path / "profile", "--dump-dom")
    assert "<title>synthetic tone: steer report</title>" in dom, "a script of a completion has run"
    assert metrics["specificity"]["statement"] in dom
    # the parser has put every picture and row where it belongs, and none outside
    assert dom.count('class="plot"') == 5 and dom.count('class="forest"') == 12 + 18
    sections = re.findall(r'<section id="(\w+)"', dom)
    assert sections == ["arms", "comparisons", "drift", "direction", "training", "completions", "reading", "provenance"]
    assert re.search(r"</section>\s*</main>\s*</body></html>\s*$", dom)
    assert "CONSOLE" not in log, log


def test_the_policy_of_the_page_stops_whatever_would_load(tmp_path: Path, chromium: str, synthetic_metrics: dict[str, Any]) -> None:
    """Also shows that the log, empty in the test above, does carry complaints."""
    page = write_report(tmp_path / "report.html", synthetic_metrics, {})
    html = page.read_text(encoding="utf-8")
    page.write_text(html.replace("</main>", "<img src='https://example.org/a.png'><script>document.title = 'taken'</script></main>"))
    dom, log = browse(chromium, page, tmp_path / "profile", "--dump-dom")
    assert "taken</title>" not in dom
    assert log.count("Content Security Policy") >= 2 and "CONSOLE" in log


@pytest.mark.parametrize(("scheme", "dark"), [("0", True), ("1", False)])
def test_follows_the_colour_scheme(
    tmp_path: Path, chromium: str, synthetic_metrics: dict[str, Any], synthetic_drift: dict[str, list[DriftRecord]], scheme: str, dark: bool
) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow, which comes with matplotlib, reads the screenshot")
    page = write_report(tmp_path / "report.html", synthetic_metrics, synthetic_drift)
    shot = tmp_path / "shot.png"
    browse(
        chromium,
        page,
        tmp_path / "profile",
        f"--blink-settings=preferredColorScheme={scheme}",
        "--window-size=1320,2400",
        f"--screenshot={shot}",
    )
    pixels = image.open(shot).convert("RGB")
    assert (sum(pixels.getpixel((4, 4))) < 150) is dark
    assert len(pixels.getcolors(1 << 24)) > 50, "an empty page"
