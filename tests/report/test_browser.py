"""The page in a real browser, without a network. Skipped where there is no Chromium or Chrome."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report.page_reader import SECTIONS

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
    tmp_path: Path, chromium: str, five_seeds: dict[str, Any], drift_of_cells: dict[str, list[DriftRecord]]
) -> None:
    five_seeds["completions"]["plain"][0] = {"prompt": HOSTILE, "text": HOSTILE}
    page = write_report(tmp_path / "report.html", five_seeds, drift_of_cells)
    dom, log = browse(chromium, page, tmp_path / "profile", "--dump-dom")
    assert "<title>synthetic tone: steer report</title>" in dom, "a script of a completion has run"
    assert five_seeds["question"]["text"] in dom
    # the parser has put every picture and row where it belongs, and none outside: 5 charts and 3 of drift, each in two widths
    assert dom.count('class="plot"') == 2 * 9 and dom.count('class="forest"') == 15 + 5
    assert re.findall(r'<section id="(\w+)"', dom) == [name for name in SECTIONS if name != "dose"]
    assert re.search(r"</section>\s*</main>\s*</body></html>\s*$", dom)
    assert "CONSOLE" not in log, log


def test_the_policy_of_the_page_stops_whatever_would_load(tmp_path: Path, chromium: str, bare: dict[str, Any]) -> None:
    """Also shows that the log, empty in the test above, does carry complaints."""
    page = write_report(tmp_path / "report.html", bare, {})
    html = page.read_text(encoding="utf-8")
    page.write_text(html.replace("</main>", "<img src='https://example.org/a.png'><script>document.title = 'taken'</script></main>"))
    dom, log = browse(chromium, page, tmp_path / "profile", "--dump-dom")
    assert "taken</title>" not in dom
    assert log.count("Content Security Policy") >= 2 and "CONSOLE" in log


@pytest.mark.parametrize(("scheme", "dark"), [("0", True), ("1", False)])
def test_follows_the_colour_scheme(tmp_path: Path, chromium: str, bare: dict[str, Any], scheme: str, dark: bool) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow, which comes with matplotlib, reads the screenshot")
    page = write_report(tmp_path / "report.html", bare, {})
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


@pytest.mark.parametrize("width", [360, 900])
def test_nothing_is_wider_than_the_window(
    tmp_path: Path, chromium: str, five_seeds: dict[str, Any], drift_of_cells: dict[str, list[DriftRecord]], width: int
) -> None:
    """A script that the test adds measures the page in a frame of that width; what may scroll by itself does not count."""
    page = write_report(tmp_path / "report.html", five_seeds, drift_of_cells)
    html = re.sub(r"<meta http-equiv=[^>]+>", "", page.read_text(encoding="utf-8"))
    page.write_text(html)
    outer = tmp_path / "frame.html"
    outer.write_text(
        f"<iframe id=f src='report.html' style='width:{width}px;height:900px;border:0'></iframe><p id=wide></p>"
        "<script>onload = () => { const d = document.getElementById('f').contentDocument.documentElement;"
        "document.getElementById('wide').textContent = d.scrollWidth + ' in ' + d.clientWidth; }</script>"
    )
    dom, _ = browse(chromium, outer, tmp_path / "profile", "--allow-file-access-from-files", "--dump-dom")
    measured = re.search(r"(\d+) in (\d+)</p>", dom)
    assert measured is not None and int(measured[1]) <= int(measured[2]) <= width
