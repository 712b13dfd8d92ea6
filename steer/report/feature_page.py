"""A page to read features on: one HTML file with a search box, examples, histograms and logit weights, that works without a network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from steer.features.reading import FeatureCard, FeatureReading
from steer.files import atomic_write
from steer.report import palette
from steer.report.extra import extra

LEVELS = 9  # of a token's shade


def write_feature_page(
    path: str | Path,
    reading: FeatureReading,
    *,
    features: Iterable[int] | None = None,
    title: str | None = None,
) -> Path:
    """Writes the page of a reading of features.

    Everything is inside the file, and its content security policy lets nothing be loaded. 4,096 features with 15 examples each make about
    13 MB; choose features of larger dictionaries.

    Args:
        path: of the HTML file; an existing one is replaced as a whole.
        features: that are on it; all that were read when None.
        title: the dictionary's sites when None.

    Raises:
        ConfigError: jinja2 is missing; a feature that was not read. StorageFullError.

    Example:
        >>> from steer.report import write_feature_page
        >>> reading = steer.read_features(model, dictionary, texts, tokenizer=tokenizer, features=[3], context=16)
        >>> write_feature_page("features.html", reading)
        PosixPath('features.html')
    """
    jinja, markup = extra("jinja2"), extra("markupsafe").Markup
    environment = jinja.Environment(loader=jinja.PackageLoader("steer.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    cards = [reading[feature] for feature in (reading.features if features is None else features)]
    style = "\n".join([palette.css(), _resource("style.css"), _resource("features.css")])
    script = _resource("element.js") + _resource("features.js")
    facts = reading.facts
    sites = ", ".join(facts["reads"]) + ("" if facts["reads"] == facts["writes"] else f" to {', '.join(facts['writes'])}")
    page = environment.get_template("features.html").render(
        title=title or f"Features of {sites}",
        facts=facts,
        sites=sites,
        shown=len(cards),
        dead=sum(card.density == 0 for card in cards),
        named_by=reading.named_by,
        style=markup(style),
        script=markup(script),
        policy=f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'",
        data=markup(_json(_content(cards))),
    )
    return atomic_write(path, page)


def _content(cards: list[FeatureCard]) -> dict[str, Any]:
    """What the script shows: tokens by their place in one table, values as digits from 0 to `LEVELS`."""
    table: dict[str, int] = {}

    def number(token: str) -> int:
        return table.setdefault(token, len(table))

    features = [_feature(card, number) for card in cards]
    return {"tokens": list(table), "levels": LEVELS, "features": features}


def _feature(card: FeatureCard, number: Any) -> dict[str, Any]:
    scale = card.maximum or 1.0
    return {
        "i": card.feature,
        "name": card.name or "",
        "density": card.density,
        "mean": _short(card.mean),
        "max": _short(card.maximum),
        "bars": card.histogram[1],
        "up": [[number(token), _short(logit)] for token, logit in card.promoted],
        "down": [[number(token), _short(logit)] for token, logit in card.suppressed],
        "near": [[feature, round(cosine, 3)] for feature, cosine in card.nearest],
        "examples": [
            {
                "t": [number(token) for token in example.tokens],
                "v": "".join(str(_level(value / scale)) for value in example.values),
                "p": example.peak,
                "m": _short(example.maximum),
                "top": int(example.is_top),
            }
            for example in card.examples
        ],
    }


def _level(share: float) -> int:
    """0 where the feature is off, 1 to `LEVELS` where it is on."""
    return 0 if share <= 0 else min(LEVELS, max(1, round(share * LEVELS)))


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _json(content: dict[str, Any]) -> str:
    """JSON that can stand within an element of HTML: nothing in it ends the element or begins another one."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return (
        text.replace("&", "\\u0026")
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def _resource(name: str) -> str:
    return (files("steer.report") / name).read_text(encoding="utf-8")
