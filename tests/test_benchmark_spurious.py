"""What benchmarks/spurious_features.py makes of sentences and of activations."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

MUSIC = "She sang a song for the band and the album was made of songs. Her next album with that band had one single and four songs on it."
FILM = "He was an actor in a film and then in two films more. The film was a role for his favourite actress, and a movie for Hollywood."


@pytest.fixture(scope="module")
def spurious() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "spurious_features.py"
    spec = importlib.util.spec_from_file_location("spurious_features_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sentences_have_one_kind_of_pronoun_and_a_section_of_one_topic(spurious: ModuleType, tmp_path: Path) -> None:
    mixed = "He and she sang a song of that band, an album and songs. " * 2
    rows = [
        {"passage": text} for text in (f"{MUSIC} CANNOTANSWER", MUSIC, FILM, mixed, f"{MUSIC} {FILM}", "He walked home and she did not.")
    ]
    (tmp_path / "quac.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = spurious.sentences(tmp_path / "quac.jsonl")
    assert [(each.topic, each.pronoun) for each in found] == [("music", "she")] * 2 + [("film", "he")] * 2
    assert all("CANNOTANSWER" not in each.text for each in found) and len({each.section for each in found}) == 2


def test_what_is_judged_comes_from_other_sections(spurious: ModuleType) -> None:
    kinds = (*spurious.AGREE, *spurious.DISAGREE)
    found = [spurious.Sentence(f"{topic} {section}", topic, pronoun, section) for section in range(40) for topic, pronoun in kinds]
    fit_on, judge = spurious.chosen_sentences(found, 6, seed=1)
    assert not {each.section for each in fit_on} & {each.section for each in judge}
    assert all(sum((each.topic, each.pronoun) == kind for each in part) == 6 for part in (fit_on, judge) for kind in kinds)


def test_a_head_takes_the_spurious_attribute_until_it_is_gone(spurious: ModuleType) -> None:
    kinds = (*spurious.AGREE, *spurious.DISAGREE)
    sentences = [spurious.Sentence("", *kinds[i % 4], i) for i in range(160)]
    random = torch.Generator().manual_seed(0)
    x = torch.randn(160, 6, generator=random)
    x[:, 0] = torch.tensor([1.0 if each.topic == "music" else -1.0 for each in sentences]) + 1.5 * x[:, 0]  # the weak, intended one
    x[:, 1] = torch.tensor([4.0 if each.pronoun == "he" else -4.0 for each in sentences])
    without = x.clone()
    without[:, 1] = 0
    apart = torch.tensor([(each.topic, each.pronoun) in spurious.DISAGREE for each in sentences])
    on_it = spurious.judged(x, x, sentences, sentences, spurious.AGREE, 20, 3)
    gone = spurious.judged(without, without, sentences, sentences, spurious.AGREE, 20, 3)
    assert float(on_it[apart].mean()) < 0.2 < 0.6 < float(gone[apart].mean()) and float(on_it[~apart].mean()) > 0.9
    row = spurious.row("gone", gone, on_it, apart)
    assert row["change"][1] > 0 and row["disagree"][0] == pytest.approx(float(gone[apart].mean()))
