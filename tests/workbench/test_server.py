"""Who is answered by the server of the workbench, what is refused, and that what is refused harms nothing."""

from __future__ import annotations

import json
import socket
import struct
import threading
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from workbench.workbench_helpers import TEXT, ask, asked, serving, workbench

from steer.errors import ConfigError
from steer.workbench import Workbench, WorkbenchServer
from steer.workbench.server import MOST_BYTES
from steer.workbench.workbench import LONGEST


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return workbench(folder=tmp_path_factory.mktemp("workbench") / "plans", prompts=["where is the cat"])


def error_of(answer: tuple[int, str, dict[str, str]]) -> dict[str, str]:
    return json.loads(answer[1])["error"]


def test_the_page_and_its_state_come_under_the_token(bench: Workbench) -> None:
    with serving(bench) as server:
        status, html, headers = ask(server, "")
        assert status == 200 and html.startswith("<!doctype html>") and headers["Content-Type"] == "text/html; charset=utf-8"
        state = json.loads(ask(server, "state")[1])
    assert server.url == f"http://127.0.0.1:{server.server_port}/{server.token}/" and len(server.token) >= 24
    assert state["plan"]["text"] == TEXT and state["prompts"] == ["where is the cat"] and state["folder"].endswith("plans")
    assert {(each["kind"], each["name"]) for each in state["readings"]} == {
        *(("projection", name) for name in ("warm", "cold", "deep")),
        ("feature", "sae"),
    }


def test_every_answer_forbids_other_sources_frames_and_caches(bench: Workbench) -> None:
    with serving(bench) as server:
        answers = [ask(server, name) for name in ("", "state", "no")]
        answers += [ask(server, "plan", {"text": "warm"}), ask(server, "", path="/")]
    for _, _, headers in answers:
        policy = headers["Content-Security-Policy"].split("; ")
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "connect-src 'self'" in policy
        assert "unsafe" not in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
        assert (headers["Referrer-Policy"], headers["Cache-Control"]) == ("no-referrer", "no-store")
        assert not any(name.startswith("Access-Control") for name in headers)


def test_head_is_answered_as_get_without_a_body(bench: Workbench) -> None:
    with serving(bench) as server:
        for name in ("", "state", "no"):
            connection = HTTPConnection("127.0.0.1", server.server_port, timeout=30)
            connection.request("HEAD", f"/{server.token}/{name}")
            response = connection.getresponse()
            status, text, headers = ask(server, name)
            assert response.status == status and response.read() == b"" and response.headers["Content-Length"] == headers["Content-Length"]
            connection.close()


def test_two_servers_have_two_tokens(bench: Workbench) -> None:
    with serving(bench) as one, serving(bench) as other:
        assert one.token != other.token
        assert ask(one, "", path=f"/{other.token}/")[0] == 403


WITHOUT_TOKEN = ["/", "", "//", "/state", "/wrong/state", "/{token}x/"]
ELSEWHERE = ["/{token}", "/{token}/x/state", "/{token}/../{token}/state", "/{token}/page.html", "/{token}/state?a=b"]
FILES = ["/{token}/%2e%2e/etc/passwd", "/{token}/../../../../etc/passwd", "/{token}//etc/passwd"]


@pytest.mark.parametrize("path", [*WITHOUT_TOKEN, *ELSEWHERE, *FILES])
def test_nothing_else_is_there(bench: Workbench, path: str) -> None:
    with serving(bench) as server:
        status, text, _ = ask(server, "", path=path.replace("{token}", server.token) or "x")
    assert status in (403, 404) and "root:" not in text and server.token not in text


OTHER_HOSTS = ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost", "[::1]:{port}", "0.0.0.0:{port}", ""]
OTHER_ORIGINS = ["http://evil.example", "https://127.0.0.1:{port}", "http://127.0.0.1:1", "null", "http://127.0.0.1:{port}.evil.example"]


@pytest.mark.parametrize("host", OTHER_HOSTS)
def test_another_name_of_this_machine_is_refused(bench: Workbench, host: str) -> None:
    """DNS rebinding: a name that resolves to 127.0.0.1 makes a page of another site the page's neighbour."""
    with serving(bench) as server:
        host = host.replace("{port}", str(server.server_port))
        assert [ask(server, "state", Host=host)[0], ask(server, "plan", {"text": "warm"}, Host=host)[0]] == [403, 403]
        assert ask(server, "state", Host=f"localhost:{server.server_port}")[0] == 200


@pytest.mark.parametrize("origin", OTHER_ORIGINS)
def test_pages_of_other_origins_are_refused(bench: Workbench, origin: str) -> None:
    with serving(bench) as server:
        origin = origin.replace("{port}", str(server.server_port))
        for name, request in (("plan", {"text": "warm"}), ("answers", asked()), ("save", {"text": "warm"}), ("stop", {}), ("state", None)):
            assert ask(server, name, request, Origin=origin)[0] == 403
        assert ask(server, "plan", {"text": "warm"}, Origin=f"http://127.0.0.1:{server.server_port}")[0] == 200


def test_what_a_form_can_send_is_refused(bench: Workbench) -> None:
    with serving(bench) as server:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json", ""):
            assert ask(server, "save", {"text": "warm"}, Content_Type=kind)[0] == 415
        assert ask(server, "plan", {"text": "warm"}, Content_Type="application/json; charset=utf-8")[0] == 200
        assert ask(server, "plan")[0] == 404  # by GET, which an image can send


@pytest.mark.parametrize("body", [b"", b"[]", b"3", b"{", b"\xff", b"[" * 100_000, b'{"text": "\\ud800"}', b"null"])
def test_bodies_that_are_no_json_object_are_refused(bench: Workbench, body: bytes) -> None:
    with serving(bench) as server:
        status, text, _ = ask(server, "plan", body)
    assert (status, text) == (400, "send a JSON object\n")


SIZES = [(str(MOST_BYTES + 1), 413), ("9" * 5000, 413), ("-1", 411), ("", 411), ("1e3", 411), ("\N{SUPERSCRIPT TWO}", 411)]


@pytest.mark.parametrize(("size", "status"), SIZES)
def test_the_size_of_a_request_is_limited_before_it_is_read(bench: Workbench, size: str, status: int) -> None:
    with serving(bench) as server:
        connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.putrequest("POST", f"/{server.token}/plan")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", size.encode("latin-1"))
        connection.endheaders()
        assert connection.getresponse().status == status
        connection.close()


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH"])
def test_other_methods_are_not_there(bench: Workbench, method: str) -> None:
    with serving(bench) as server:
        connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.request(method, f"/{server.token}/plan")
        assert connection.getresponse().status == 501
        connection.close()


def test_errors_come_as_they_are_and_the_server_lives_on(bench: Workbench) -> None:
    with serving(bench) as server:
        status, _, _ = answer = ask(server, "plan", {"text": "0.4 wram@response"})
        assert status == 400 and error_of(answer)["type"] == "ConfigError" and "did you mean 'warm'" in error_of(answer)["remedy"]
        answer = ask(server, "plan", {"text": TEXT, "changes": [{"term": 0, "scope": "respons"}]})
        assert answer[0] == 400 and set(error_of(answer)) == {"type", "what", "expected", "found", "remedy"}
        last = json.loads(ask(server, "answers", asked("warm + deep"))[1].splitlines()[-1])
        assert last["event"] == "error" and last["error"]["type"] == "SiteError"
        assert json.loads(ask(server, "plan", {"text": TEXT, "changes": [{"term": 0, "strength": 1}]})[1])["text"].startswith("1 warm")


def test_answers_come_as_lines_while_they_are_made(bench: Workbench) -> None:
    with serving(bench) as server:
        connection = HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        body = json.dumps(asked(max_new_tokens=LONGEST))
        connection.request("POST", f"/{server.token}/answers", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.headers["Content-Type"] == "application/x-ndjson"
        lines = [json.loads(response.readline()) for _ in range(4)]  # of thousands
        assert [line["event"] for line in lines] == ["reading", "start", "token", "token"]
        busy = ask(server, "answers", asked())[1]
        assert json.loads(busy)["error"]["type"] == "AttachError"
        assert ask(server, "stop", {})[0] == 200
        rest = [json.loads(line) for line in response]
        assert rest[-1] == {"event": "end"} and rest[-2]["stopped"]
        connection.close()
        events = [json.loads(line)["event"] for line in ask(server, "answers", asked())[1].splitlines()]
    assert events[-1] == "end" and events.count("token") == 10 and events.count("done") == 2


def test_a_page_that_is_closed_stops_its_answer(bench: Workbench) -> None:
    with serving(bench) as server:
        connection = HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        request = json.dumps(asked(max_new_tokens=LONGEST))
        connection.request("POST", f"/{server.token}/answers", request, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.readline()
        assert not bench._generating.acquire(blocking=False)
        response.close()
        connection.close()
        assert bench._generating.acquire(timeout=10)
        bench._generating.release()


def test_closing_the_server_stops_an_answer_and_restores_the_model(bench: Workbench) -> None:
    with serving(bench) as server:
        connection = HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        request = json.dumps(asked(max_new_tokens=LONGEST))
        connection.request("POST", f"/{server.token}/answers", request, {"Content-Type": "application/json"})
        connection.getresponse().readline()
    assert not bench._generating.locked()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bench._model.modules())


def test_saving_writes_to_the_folder_whatever_the_request_says(bench: Workbench) -> None:
    with serving(bench) as server:
        path = json.loads(ask(server, "save", {"text": "warm", "folder": "/tmp", "path": "../x", "name": "/etc/x"})[1])["path"]
    assert Path(path).parent == bench._folder and Path(path).name.startswith("plan_")


def test_the_loopback_interface_alone_is_bound(bench: Workbench) -> None:
    with serving(bench) as server:
        assert server.socket.getsockname()[0] == "127.0.0.1" and server.server_port > 0


def test_a_port_that_cannot_be_had_is_named(bench: Workbench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ConfigError, match="cannot listen at port .*\n.*\n.*in use"):
            WorkbenchServer(bench, taken.getsockname()[1])
    for port in (-1, 65536, 1.5, "8000", True):
        with pytest.raises(ConfigError, match="the port"):
            WorkbenchServer(bench, port)  # type: ignore[arg-type]


def test_a_silent_connection_keeps_nothing_from_ending(bench: Workbench) -> None:
    with serving(bench) as server:
        silent = socket.create_connection(("127.0.0.1", server.server_port))
        assert ask(server, "state")[0] == 200
    silent.close()
    assert threading.active_count() < 20


def test_a_connection_that_breaks_off_is_no_news_and_a_failure_is(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(bench) as server:
        broken = socket.create_connection(("127.0.0.1", server.server_port))
        broken.send(b"GET /")
        broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        broken.close()
        assert ask(server, "state")[0] == 200
    assert capsys.readouterr() == ("", "")
    for error, is_told in ((ConnectionResetError(), False), (RuntimeError("no memory"), True)):
        try:
            raise error
        except Exception:
            server.handle_error(None, ("127.0.0.1", 1))
        assert ("no memory" in capsys.readouterr().err) is is_told


def test_nothing_of_the_model_or_the_plan_is_in_the_page(bench: Workbench) -> None:
    hostile: Any = "</script><script>document.title = 'taken'</script>"
    bench = workbench(prompts=[hostile])
    with serving(bench) as server:
        assert hostile not in ask(server, "")[1]
        assert json.loads(ask(server, "state")[1])["prompts"] == [hostile]
