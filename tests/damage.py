"""Damage, as disks, downloads and editors do it: flipped bits, cut ends, JSON that says something else. All follows from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

ODD = (None, True, -1, 0, 1.5, 10**400, -1e308, float("nan"), float("inf"), "", "x", "\ud800", [], {}, [[1]], {"a": 1}, ["x", 3])


def flipped(data: bytes, chance: random.Random) -> bytes:
    """One to three flipped bits."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(data: bytes, chance: random.Random) -> bytes:
    """A part of the file: its beginning, its end, or all but a piece of the middle."""
    a, b = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return chance.choice((data[:a], data[b:], data[:a] + data[b:], data + data[a:b], data[:a] + bytes(b - a) + data[b:]))


def places(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in JSON."""
    for key, inner in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*at, key)
        yield from places(inner, (*at, key))


def rewritten(data: bytes, chance: random.Random) -> bytes:
    """JSON with one value replaced, removed, doubled, renamed or nested, or with a key twice."""
    content = json.loads(data)
    listed = list(places(content))
    if not listed:
        return data
    *above, key = chance.choice(listed)
    parent = content
    for step in above:
        parent = parent[step]
    how = chance.randrange(7)
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent[chance.choice(("x", f"{key} ", f"{key}s"))] = parent.pop(key)
    elif how == 2 and isinstance(parent, dict) and isinstance(parent[key], int | float | str):
        text = json.dumps(content)
        return text.replace(f"{json.dumps(key)}:", f"{json.dumps(key)}: {json.dumps(chance.choice(ODD))}, {json.dumps(key)}:", 1).encode()
    elif how == 3:
        depth = chance.choice((3, 100, 20_000))
        return json.dumps(content).replace(json.dumps(parent[key]), "[" * depth + "]" * depth, 1).encode()
    elif how == 4 and isinstance(parent, list):
        parent.append(parent[key])
    elif isinstance(parent[key], float | int) and not isinstance(parent[key], bool):
        parent[key] = chance.choice((parent[key] + 1, -parent[key], str(parent[key]), *ODD))
    else:
        parent[key] = chance.choice(ODD)
    return json.dumps(content).encode()


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {"flipped": flipped, "cut": cut, "rewritten": rewritten}
