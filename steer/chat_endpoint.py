"""Chat endpoint: one reply at a time from a model behind an OpenAI-compatible address, repeated where that may help, cached on disk."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep
from typing import Any
from urllib.parse import urlsplit

from steer.errors import ConfigError, JudgeError
from steer.files import SEAL, atomic_write, check_seal, sealed
from steer.reading import check_kinds, damage_of, read_json

log = logging.getLogger(__name__)

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # states of a server that pass
LONGEST_WAIT = 60.0  # s


@dataclass(frozen=True)
class Reply:
    """What a model said, and the tokens that it counted; None where the server does not say."""

    text: str
    tokens_in: int | None = None
    tokens_out: int | None = None


@dataclass(frozen=True)
class ChatEndpoint:
    """An OpenAI-compatible server.

    Attributes:
        url: base, such as `http://localhost:8000/v1`.
        key: sent as a bearer token; neither shown nor stored.
        timeout: s for one call.
        retries: further calls after one that failed in a way that may pass.
        first_wait: s before the first of them; each later one waits twice as long, or as long as the server asks.
        role: what the model behind it is, for errors. key_variable: environment variable from which users set the key.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    retries: int = 4
    first_wait: float = 1.0
    role: str = "judge"
    key_variable: str = "STEER_JUDGE_KEY"

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise _bad_address(self, self.host if parts.hostname else self.url)

    @property
    def host(self) -> str:
        """The name of the server alone, which errors may show."""
        return urlsplit(self.url).hostname or ""

    def reply(self, request: Mapping[str, Any]) -> Reply:
        """Asks for one completion. Raises JudgeError when the server cannot be reached or refuses, after all retries."""
        wait = self.first_wait
        for attempt in range(self.retries + 1):
            asked_for = None
            try:
                return _parsed(self._post(request))
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(2000).decode(errors="replace").strip()
                problem, cause = f"HTTP {error.code} {error.reason}: {said[:200]}", error
                if error.code not in AGAIN:
                    raise _refused(self, error.code, problem) from error
                asked_for = error.headers.get("Retry-After")
            except (OSError, http.client.HTTPException, ValueError) as error:  # no answer, a cut one, or one that is none
                problem, cause = f"{type(error).__name__}: {getattr(error, 'reason', error)}", error  # type: ignore[assignment]
            if attempt < self.retries:
                pause = min(float(asked_for) if asked_for and asked_for.isdigit() else wait, LONGEST_WAIT)
                log.warning("%s gives no reply (%s); asked again in %.0f s", self.host, problem, pause)
                sleep(pause)
                wait *= 2
        raise _unreachable(self, self.retries + 1, problem) from cause

    def _post(self, request: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "steer"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        url = f"{self.url.rstrip('/')}/chat/completions"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(request).encode(), headers), timeout=self.timeout) as response:
            return response.read()


class ReplyCache:
    """Replies on disk, one file each under the hash of what was asked.

    Args:
        folder: made when the first reply is kept. Programs may share it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def key(self, endpoint: ChatEndpoint, request: Mapping[str, Any]) -> str:
        """SHA-256 of the address and all that is sent there but the key."""
        text = json.dumps([endpoint.url.rstrip("/"), request], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> str | None:
        """The text of a reply, None when it was not asked for yet. Raises DamagedFileError for a file that was altered."""
        path = self._path(key)
        if not path.exists():
            return None
        record = read_json(path)
        with damage_of(path, "a reply of a judge", remedy="delete it, and the judge is asked again"):
            check_kinds(record, {"request": dict, "reply": str, SEAL: str})
            check_seal(record, path, is_required=True)
        return record["reply"]

    def put(self, key: str, request: Mapping[str, Any], reply: str) -> None:
        """Raises FileError, StorageFullError."""
        atomic_write(self._path(key), json.dumps(sealed({"request": dict(request), "reply": reply}), ensure_ascii=False, indent=1) + "\n")

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def _parsed(body: bytes) -> Reply:
    """Raises ValueError for anything but a chat completion."""
    answer = json.loads(body)
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"no chat completion: {body[:100]!r}") from None
    if not isinstance(text, str):
        raise ValueError(f"a chat completion without text: {body[:100]!r}")
    usage = answer.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    return Reply(text, *(count if type(count) is int and count >= 0 else None for count in counts))


# ---- errors


def _bad_address(endpoint: ChatEndpoint, url: str) -> ConfigError:
    remedy = f"pass the base address, e.g. http://localhost:8000/v1, and a key by the environment variable {endpoint.key_variable}"
    return ConfigError(
        f"the address of the {endpoint.role} cannot be used",
        expected="http(s)://host/..., without user or password",
        found=url,
        remedy=remedy,
    )


def _refused(endpoint: ChatEndpoint, code: int, problem: str) -> JudgeError:
    remedy = f"set {endpoint.key_variable}" if code in (401, 403) else "check base_url and the name of the model"
    return JudgeError(f"the {endpoint.role} at {endpoint.host} refuses", expected="a chat completion", found=problem, remedy=remedy)


def _unreachable(endpoint: ChatEndpoint, calls: int, problem: str) -> JudgeError:
    return JudgeError(
        f"the {endpoint.role} at {endpoint.host} gives no reply",
        expected="a chat completion",
        found=f"{problem}, in {calls} calls",
        remedy="look at the server and the address, then run again: what was answered is in the cache",
    )
