"""The server of the workbench: HTTP on the loopback interface, for whoever has the address that was printed.

Any page that a browser shows can send requests to a port of this machine, under any name that resolves to it. So the path begins with a
random token, a request has to name this host and port, and what it asks for has to be JSON, which no other origin can send unasked. No
file is ever served: the page is made in memory, and `save` writes to the one folder of its workbench, under a name of its own.
"""

from __future__ import annotations

import errno
import hmac
import json
import secrets
import sys
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from steer.checks import number_within, of_type
from steer.errors import AttachError, ConfigError, SteerError
from steer.workbench.page import page
from steer.workbench.workbench import Workbench

HOST = "127.0.0.1"
MOST_BYTES = 256 * 1024  # of a request: a long prompt
QUIET_SECONDS = 30  # after which a connection that says nothing is dropped


class WorkbenchServer(ThreadingHTTPServer):
    """Serves one workbench on 127.0.0.1.

    Args:
        workbench: what it asks.
        port: 0 takes one that is free.

    Attributes:
        url: the address of the page, with its token.

    Raises:
        ConfigError: the port is taken, is no port, or may not be used.

    Example:
        >>> from steer.workbench import Workbench
        >>> workbench = Workbench(model, tokenizer, {"warm": direction}, {}, "0.5 warm")
        >>> with WorkbenchServer(workbench) as server:
        ...     print(server.url)  # server.serve_forever() answers what the page asks
        http://127.0.0.1:...
    """

    daemon_threads = True  # a connection that says nothing must not keep the process from ending; `server_close` waits for answers

    def __init__(self, workbench: Workbench, port: int = 0) -> None:
        number_within(port, "the port", 0, 65535)
        of_type(port, int, "the port", "give a whole number, 0 for one that is free")
        self.workbench = workbench
        self.token = secrets.token_urlsafe(18)
        self.page, self.policy = page()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise _no_port(port, error) from error
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    def server_bind(self) -> None:
        """Without the look-up of this machine's name that the base class makes, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints what went wrong in a thread, but not that a page was closed or reloaded before it had read its answer."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        """Closes the port, stops the answer that is being made, and waits until the model is as it was."""
        super().server_close()
        self.workbench.close()


class _Handler(BaseHTTPRequestHandler):
    server: WorkbenchServer
    server_version = "steer"
    sys_version = ""
    timeout = QUIET_SECONDS

    def do_GET(self) -> None:
        if not self._is_ours():
            return
        if self._name() == "":
            self._send(HTTPStatus.OK, self.server.page.encode(), "text/html; charset=utf-8")
        elif self._name() == "state":
            self._answer(lambda: self.server.workbench.state())
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")

    def do_HEAD(self) -> None:
        """As GET, without the body."""
        self.do_GET()

    def do_POST(self) -> None:
        if not self._is_ours():
            return
        bench = self.server.workbench
        actions: dict[str, Callable[[dict[str, Any]], Any]] = {
            "plan": bench.plan,
            "command": lambda request: {"command": bench.command(request)},
            "save": lambda request: {"path": str(bench.save(request))},
            "stop": lambda request: _stopped(bench, request),
        }
        name = self._name()
        if name != "answers" and name not in actions:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")
            return
        request = self._request()
        if request is None:
            return
        if name == "answers":
            self._stream(request)
        else:
            self._answer(lambda: actions[name](request))

    # ---- who asks, and what

    def _is_ours(self) -> bool:
        """Refuses other names of this machine (DNS rebinding), other origins, and who does not have the token."""
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in self.server.hosts:
            self._refuse(HTTPStatus.FORBIDDEN, f"this server answers as {HOST} alone; tunnel it to the same port")
        elif origin is not None and origin.removeprefix("http://") not in self.server.hosts:
            self._refuse(HTTPStatus.FORBIDDEN, "this server answers its own page alone")
        elif not hmac.compare_digest(self.path.split("/")[1].encode() if "/" in self.path else b"", self.server.token.encode()):
            self._refuse(HTTPStatus.FORBIDDEN, "open the address that 'steer show' printed: it holds a token")
        else:
            return True
        return False

    def _name(self) -> str | None:
        """What stands behind the token; None where that is more or less than one part."""
        parts = self.path.split("/")
        return parts[2] if len(parts) == 3 else None

    def _request(self) -> dict[str, Any] | None:
        """The JSON object of the body; None where it was refused."""
        size = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json":  # which a form of another page cannot send
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        elif not (size.isascii() and size.isdigit()):
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "send a Content-Length")
        elif len(size) > 12 or int(size) > MOST_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"send at most {MOST_BYTES} bytes")
        elif (request := _json_object(self.rfile.read(int(size)))) is None:
            self._refuse(HTTPStatus.BAD_REQUEST, "send a JSON object")
        else:
            return request
        return None

    # ---- answers

    def _answer(self, work: Callable[[], Any]) -> None:
        try:
            status, content = HTTPStatus.OK, work()
        except SteerError as error:
            status = HTTPStatus.CONFLICT if isinstance(error, AttachError) else HTTPStatus.BAD_REQUEST
            content = {"error": _said(error)}
        self._send(status, _json(content), "application/json")

    def _stream(self, request: dict[str, Any]) -> None:
        """Sends events as lines of JSON, each as it happens; the last is `end` or `error`. When nobody reads them any more, it stops."""
        self._head(HTTPStatus.OK, "application/x-ndjson")
        is_read = True

        def emit(event: dict[str, Any]) -> None:
            nonlocal is_read
            if not is_read:
                return
            try:
                self.wfile.write(_json(event) + b"\n")
            except OSError:  # the page was closed
                is_read = False
                self.server.workbench.stop()

        try:
            self.server.workbench.answers(request, emit)
            emit({"event": "end"})
        except SteerError as error:
            emit({"event": "error", "error": _said(error)})

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._send(status, f"{why}\n".encode(), "text/plain; charset=utf-8")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self._head(status, kind, len(content))
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, status: HTTPStatus, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """The terminal keeps the one line with the address."""


def _stopped(workbench: Workbench, request: Mapping[str, Any]) -> dict[str, Any]:
    workbench.stop(request.get("number"))
    return {}


def _json_object(body: bytes) -> dict[str, Any] | None:
    """None for anything else."""
    try:
        content = json.loads(body)
        json.dumps(content, ensure_ascii=False).encode()  # half a character, which JSON can hold, is no text
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _said(error: SteerError) -> dict[str, str]:
    parts = {name: str(getattr(error, name)) for name in ("what", "expected", "found", "remedy")}
    return {"type": type(error).__name__, **parts}


def _json(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


# ---- errors


def _no_port(port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen at port {port}",
        expected="a port that is free, and that a user may open",
        found=error.strerror,
        remedy="leave the port out, which takes one that is free, or choose another",
    )
