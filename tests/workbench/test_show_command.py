"""`steer show`: one line with the address, the page behind it, and an end by Ctrl-C that leaves nothing."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import socket
import threading
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_experiment import write_model
from workbench.workbench_helpers import METRICS, directions

from steer.cli import main

Run = Callable[..., tuple[int, str, str]]


def interrupted(server: Any) -> None:
    """Takes the place of `serve_forever`."""
    raise KeyboardInterrupt


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """`show("port=0")` runs the command on the tiny model in an empty folder and gives exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    directions(0, METRICS).save(tmp_path / "warm")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores Ctrl-C

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["show", "model.name=model", "directions.warm=warm", "steer=warm:layers.0.output@response", *arguments])
        return status, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGINT, handler)
    root.handlers[:], root.level = handlers, level


def visiting(monkeypatch: pytest.MonkeyPatch, visit: Callable[[str], None]) -> None:
    """Puts a visit of the page, and then a Ctrl-C, in the place of the browser."""

    def opened(url: str) -> None:
        def come_and_go() -> None:
            try:
                visit(url)
            finally:
                os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=come_and_go).start()

    monkeypatch.setattr(webbrowser, "open", opened)


def post(url: str, name: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    sent = urllib.request.Request(url + name, json.dumps(request).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(sent, timeout=30) as response:
        return [json.loads(line) for line in response]


def test_it_prints_one_line_answers_and_ends_by_ctrl_c(show: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def visit(url: str) -> None:
        request = {"text": "4 warm@generated", "prompt": "who", "max_new_tokens": 3}
        seen["url"] = url
        seen["state"] = json.loads(urllib.request.urlopen(url + "state", timeout=30).read())
        seen["events"] = post(url, "answers", request)
        seen["command"] = post(url, "command", request)[0]["command"]
        seen["path"] = post(url, "save", request)[0]["path"]

    visiting(monkeypatch, visit)
    before = sorted(tmp_path.iterdir())
    status, out, err = show("browser=true", "prompts=[who]", "folder=mine", "max_new_tokens=7")
    steps = ["reading the plan", "loading model", "preparing the page"]
    assert (status, err.splitlines()) == (0, [f"steer show: {step}" for step in steps])
    assert out.splitlines()[0] == f"{seen['url']} (Ctrl-C ends it)" and len(out.split()) == 4
    assert seen["state"]["model"] == "model" and seen["state"]["prompts"] == ["who"] and seen["state"]["max_new_tokens"] == 7
    assert seen["events"][-1] == {"event": "end"}
    assert seen["path"] == "mine/plan_1.safetensors" and sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "mine"])
    # the command gives what was on the page
    words = shlex.split(seen["command"])
    assert words[:4] == ["steer", "say", "model.name=model", "directions.warm=warm"] and len(words) == 7
    said = "".join(event["text"] for event in seen["events"] if event["event"] == "token" and event["side"] == "steered")
    assert main(words[1:]) == 0 and said.removesuffix("<eos>").strip()


def test_without_a_terminal_no_browser_is_opened(show: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr("steer.workbench.WorkbenchServer.serve_forever", interrupted)
    assert show()[0] == show("browser=false")[0] == 0 and not opened
    assert show("browser=true")[0] == 0 and len(opened) == 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("steer=0.4 wram",), "did you mean 'warm'?"),
        (("prt=1",), "did you mean 'port'?"),
        (("port=70000",), "the port"),
        (("max_new_tokens=0",), "max_new_tokens"),
        (("steer='0.4 warm:layers.77.output'",), "layers.77.output"),
        (("browser=maybe",), "browser"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_served(
    show: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], part: str
) -> None:
    monkeypatch.setattr("steer.workbench.WorkbenchServer.serve_forever", interrupted)
    status, out, err = show(*arguments)
    assert (status, out) == (2, "") and part in err


def test_a_port_that_is_taken_is_named(show: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, out, err = show(f"port={taken.getsockname()[1]}")
    assert (status, out) == (2, "") and "cannot listen at port" in err and "leave the port out" in err


def test_the_documented_lines_say_what_they_seem_to(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Any] = []
    monkeypatch.setattr("steer.commands.show.run", received.append)
    page = (Path(__file__).resolve().parents[2] / "docs" / "workbench.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.S)
    for line in block.splitlines():
        words = shlex.split(line)
        assert words[:2] == ["steer", "show"] and main(words[1:]) == 0
    assert [config.steer for config in received] == ["0.8 gushing@response", "clamp(sae, feature=2969, to=6)@generated"]
    assert list(received[0].prompts) == ["What does a carpenter do?"] and received[1].dictionaries == {"sae": "smollm2-135m-sae-12"}
