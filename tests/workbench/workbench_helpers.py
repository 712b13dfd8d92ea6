"""A workbench on the tiny llama: two directions at two sites, a dictionary, a gate, and what asks its server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from drift.feature_helpers import dictionary
from families import FAMILIES
from hand import vector
from tiny_tokenizer import tiny_tokenizer
from torch.nn.functional import normalize

from steer.directions import Direction, Directions
from steer.intervene.gates.probe import ProbeGate
from steer.model.site import Site
from steer.workbench import Workbench, WorkbenchServer

TEXT = "4 warm:layers.0.output@generated - 2 cold:layers.1.output@all"
METRICS = {"auc": 0.9, "dprime": 1.0, "gap": 8.0, "mean": 0.5, "activation_norm": 20.0}


def directions(seed: int, metrics: dict[str, float] | None = None) -> Directions:
    vectors = [8 * normalize(vector(seed=seed + layer), dim=0) for layer in (0, 1)]
    sites = [Site.parse(f"layers.{layer}.output") for layer in (0, 1)]
    entries = [Direction(site, v, "mean_difference", "last", metrics or {}) for site, v in zip(sites, vectors, strict=True)]
    return Directions(entries, "tiny", {})


def names() -> dict[str, Any]:
    """`deep` is of a block that the model does not have."""
    deep = Direction(Site.parse("layers.9.output"), vector(seed=2), "mean_difference", "last")
    return {"warm": directions(0, METRICS), "cold": directions(5), "deep": deep, "sae": dictionary()}


def workbench(text: str = TEXT, folder: Path | None = None, **more: Any) -> Workbench:
    """Its gate `never` is closed."""
    gates = {"never": ProbeGate(vector(seed=0), bias=-1e6)}
    return Workbench(FAMILIES["llama"](), tiny_tokenizer(), names(), gates, text, folder=folder, **more)


def asked(text: str = TEXT, **more: Any) -> dict[str, Any]:
    return {"text": text, "prompt": "where is the cat", "max_new_tokens": 5, **more}


def answers(bench: Workbench, **more: Any) -> list[dict[str, Any]]:
    """The events of an answer."""
    events: list[dict[str, Any]] = []
    bench.answers(asked(**more), events.append)
    return events


def tokens(events: list[dict[str, Any]], side: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "token" and event["side"] == side]


@contextmanager
def serving(bench: Workbench) -> Iterator[WorkbenchServer]:
    with WorkbenchServer(bench) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(
    server: WorkbenchServer, name: str, request: Any = None, *, path: str | None = None, **headers: str
) -> tuple[int, str, dict[str, str]]:
    """Status, text and headers of an answer: GET without a request, else POST."""
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    path = f"/{server.token}/{name}" if path is None else path
    given = {key.replace("_", "-"): value for key, value in headers.items()}
    if request is None:
        connection.request("GET", path, headers=given)
    else:
        body = request if isinstance(request, bytes) else json.dumps(request).encode()
        connection.request("POST", path, body, {"Content-Type": "application/json"} | given)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text, dict(response.getheaders())
