"""Docstrings of the public names have the shapes, units, errors and sources that the site promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from docstring_promises import METHOD_KINDS, Documented, documented, without_raises, without_shape, without_source, without_unit
from test_docs import script

from steer.registry import REGISTRIES


@cache
def source() -> Any:
    return script("public_names").package()


@cache
def public() -> dict[str, Documented]:
    return {of.title: of for of in documented(source())}


def lacking(rule: Callable[[Documented], list[str]]) -> str:
    found = {title: rule(of) for title, of in public().items()}
    return "\n".join(f"{title}: {', '.join(names)}" for title, names in found.items() if names)


def test_tensors_have_a_shape() -> None:
    assert not (found := lacking(without_shape)), f"no shape is said of\n{found}"


def test_floats_have_a_unit() -> None:
    assert not (found := lacking(without_unit)), f"no unit or range is said of\n{found}"


def test_typed_errors_are_in_raises() -> None:
    assert not (found := lacking(lambda of: without_raises(source(), of))), f"`Raises` lacks\n{found}"


def test_methods_have_a_source() -> None:
    found = without_source(source(), script("public_names").cited)
    assert not found, "no publication, no library and no word that it is ours, here or at the top of the file:\n" + "\n".join(found)


def test_every_kind_of_method_is_looked_at_or_left_out_for_a_reason() -> None:
    left_out = {
        *("FORMATS", "IMPORTERS"),  # files of other programs, which they name
        *("KERNELS", "METRICS", "SCHEDULES"),  # formulas, which they state
        *("EXPLAINERS", "TREATMENTS"),  # what is compared or asked in an experiment
    }
    known = {name.registry for name in source().public if name.registry is not None}
    assert known == METHOD_KINDS | left_out
    assert len(known) + 1 >= sum(registry.package is not None for registry in REGISTRIES.values()), "a kind is not read from the source"


@pytest.mark.parametrize(
    ("title", "words", "rule", "found"),
    [
        ("steer.ProbeGate", "[width]", without_shape, ["vector"]),
        ("steer.Direction.unit", "[width]", without_shape, ["the result"]),
        ("steer.directions.extractors.pca.pca", "[width]", without_shape, ["the result"]),
        ("steer.Scope", "response tokens", without_unit, ["half_life"]),
        ("steer.circuits.DAS.accuracy", "Share", without_unit, ["the result"]),
        ("steer.circuits.acdc", "ConfigError", lambda of: without_raises(source(), of), ["ConfigError"]),
        ("steer.Site.parse", "SiteError", lambda of: without_raises(source(), of), ["SiteError"]),
    ],
)
def test_what_is_missing_is_found_out(title: str, words: str, rule: Callable[[Documented], list[str]], found: list[str]) -> None:
    of = public()[title]
    assert rule(of) == []
    assert rule(replace(of, said=of.said.replace(words, "..."), around="")) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Angular steering (Vu & Nguyen 2025). It keeps norms.", "Angular steering (Vu & Nguyen 2025)."),
        ("Keeps norms.\n\nThe form of arXiv 2510.26243, with\na gate.", "The form of arXiv 2510.26243, with a gate."),
        ("One feature of each group, which sparsify offers.", "One feature of each group, which sparsify offers."),
        ("A gate. Ours, after CAST.", "Ours, after CAST."),
        ("Adds v to 1024 tokens at once.", ""),
    ],
)
def test_sentences_that_say_where_a_method_comes_from(text: str, found: str) -> None:
    assert script("public_names").cited(text) == found
