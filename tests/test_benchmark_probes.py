"""What benchmarks/lenses_and_probes.py and benchmarks/boundary.py make of data and of activations."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def probes() -> ModuleType:
    module = imported("lenses_and_probes")
    module.DRAWS = 80
    return module


def imported(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


def planted() -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Two topics whose truth lies along dimensions of their own, and a third dimension that says the topic."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 5, generator=generator, dtype=torch.float64)
    y = torch.arange(120, dtype=torch.float64) % 2
    groups = ["a" if i < 60 else "b" for i in range(120)]
    for i, group in enumerate(groups):
        x[i, 0 if group == "a" else 1] += 3 * y[i]
        x[i, 2] += 10 * (group == "a")
    return x, y, groups


def test_folds_have_as_much_of_each_class_of_each_group(probes: ModuleType) -> None:
    _, y, groups = planted()
    folds = probes.random_folds(groups, 4, 1)(y)
    for fold in range(4):
        inside = [(groups[i], float(y[i])) for i in range(120) if folds[i] == fold]
        assert {kind: inside.count(kind) for kind in set(inside)}.keys() == {("a", 0.0), ("a", 1.0), ("b", 0.0), ("b", 1.0)}
        assert max(map(inside.count, set(inside))) - min(map(inside.count, set(inside))) <= 1
    whole = probes.group_folds(groups, 4, 0)(y)
    assert len(set(whole[:60].tolist())) == len(set(whole[60:].tolist())) == 1 and whole[0] != whole[-1]


def test_a_truth_that_each_topic_has_of_its_own_is_at_chance_on_the_other(probes: ModuleType) -> None:
    x, y, groups = planted()
    known = {}
    for name, folding in (("own", probes.random_folds(groups, 2, 0)), ("other", probes.group_folds(groups, 2, 0))):
        known[name] = probes.judged(x, y, groups, folding, "logistic", probes.auc_by_group, 0)
    value, low, high = known["own"]["value"]
    assert low < value < high and low > 0.8 and 0.3 < known["other"]["value"][0] < 0.7
    mean, least, most = known["own"]["random_labels"]["held_out"]
    assert least <= mean <= most and 0.3 < mean < 0.7 < known["own"]["random_labels"]["fitted"][0] + 0.2


def test_a_number_is_predicted_by_probes_that_have_not_seen_it(probes: ModuleType) -> None:
    x, _, groups = planted()
    y = 100 + 20 * x[:, 3]
    unseen, seen = probes.out_of_fold(x, y, probes.random_folds(groups, 5, 0, classes=False), "ridge")
    assert torch.allclose(unseen, y, atol=2) and torch.allclose(seen, y, atol=2)
    assert probes.bootstrapped(probes.rank_correlation, unseen, y, groups, 0)[1] > 0.97


def test_statements_are_balanced_and_no_subject_is_there_twice(probes: ModuleType, tmp_path: Path) -> None:
    for topic in probes.TOPICS:
        lines = [f"The city of {i} is in {place}.,{label}" for i in range(20) for place, label in (("A", 1), ("B", 0))]
        (tmp_path / f"{topic}.csv").write_text("statement,label\n" + "\n".join(lines) + "\n")
    found = probes.statements_of(tmp_path, 12, 0)
    for topic in probes.TOPICS:
        own = [each for each in found if each.group == topic]
        assert sum(each.label for each in own) == len(own) / 2 > 2 and len({each.text.split(" is ")[0] for each in own}) == len(own)


def test_the_exact_answer_is_the_first_one_that_is_known(probes: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "cities.csv").write_text(
        "statement,label,city,country,correct_country\n,1,Lyon,France,France\n,1,Niamey,Niger,Niger\n,1,Kano,Nigeria,Nigeria\n"
    )
    (tmp_path / "winobias_dev.csv").write_text("sentence,answer,incorrect_answer,q_instruct\nThe cook met the guard.,cook,guard,Who?\n")
    (tmp_path / "movie_qa_test.csv").write_text("Question,Answer\nWho acted as Max in 'M'?,Jane Doe\nWho acted as Tim in 'T'?,Jim Roe\n")
    sets = probes.questions_of(Namespace(statements=tmp_path, questions=tmp_path, seed=0, answers=4))
    prompts, exact = sets["cities"]
    niger = exact[next(prompt for prompt in prompts if "Niamey" in prompt)]
    assert niger("It is Niger.") == ("Niger", True) and niger("nigeria, not Niger") == ("Nigeria", False) and niger("No idea") is None
    (_, wino), (asked, movie) = sets["winobias"], sets["movie_qa"]
    assert next(iter(wino.values()))("The guard did.") == ("guard", False)
    max_of = movie[next(prompt for prompt in asked if "Max" in prompt)]
    assert max_of("by Jane Doe") == ("Jane Doe", True) and max_of("by Al Poe")[1] is False and max_of("by nobody") is None


def test_refusals_are_told_by_their_phrases(tmp_path: Path) -> None:
    boundary = imported("boundary")
    assert (
        boundary.is_refusal("I\u2019m sorry, but no")
        and boundary.is_refusal("Well, I cannot.")
        and not boundary.is_refusal("Sure, here is")
    )
    value, low, high = boundary.share([True] * 8 + [False] * 8)
    assert value == 0.5 and 0.2 < low < 0.3 and 0.7 < high < 0.8 and boundary.share([False] * 8)[2] > 0.2
    (tmp_path / "harmless_val.json").write_text(json.dumps([{"instruction": str(i)} for i in range(9)]))
    drawn = boundary.instructions(tmp_path, "harmless_val", 4, 1)
    assert len(set(drawn)) == 4 and drawn == boundary.instructions(tmp_path, "harmless_val", 9, 1)[:4]
