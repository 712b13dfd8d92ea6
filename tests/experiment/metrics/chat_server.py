"""A local OpenAI-compatible server with answers as a test wants them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any], int], Any]


class ChatServer:
    """Attributes: url, the base address; requests, what was sent so far, with headers; answer, what makes a reply of (request, number)."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.answer: Answer = lambda request, number: "50"
        self.lock = threading.Lock()
        self.url = ""


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    """An answer may be text (a good completion), bytes (a body as it is), a number (a status), (status, headers), or seconds to wait."""
    told = ChatServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with told.lock:
                told.requests.append({"path": self.path, "key": self.headers.get("Authorization"), **request})
                number = len(told.requests)
            answer, headers, status = told.answer(request, number), {}, 200
            if isinstance(answer, float):
                time.sleep(answer)
                answer = "50"
            if isinstance(answer, tuple):
                answer, headers = answer
            if isinstance(answer, int):
                status, answer = answer, b'{"error": {"message": "no such thing"}}'
            if isinstance(answer, str):
                usage = {"prompt_tokens": 100, "completion_tokens": 2}
                answer = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}], "usage": usage}).encode()
            try:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(answer)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)
            except (BrokenPipeError, ConnectionResetError):
                pass  # who asked has gone

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    told.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
