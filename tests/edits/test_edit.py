"""The edit object: factors, files, what tells two edits apart."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from edits.edit_helpers import DOWN, fact, random_edit
from families import FAMILIES
from torch import nn

from steer.edits.edit import Edit, WeightDelta
from steer.errors import ConfigError, DamagedFileError, EditError, NonFiniteError, WrongKindError

PATH = DOWN["llama"].format(1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return FAMILIES["llama"](num_hidden_layers=2)


def delta(rank: int = 3, seed: int = 0, **options: torch.Tensor) -> WeightDelta:
    generator = torch.Generator().manual_seed(seed)
    return WeightDelta(PATH, 1, torch.randn(4, rank, generator=generator), torch.randn(6, rank, generator=generator), **options)


# ---- deltas


def test_norm_and_angle_come_from_the_factors_alone() -> None:
    a, b = delta(3), delta(2, seed=1)
    assert a.norm == pytest.approx(float((a.u @ a.v.T).norm()), rel=1e-5) and a.rank == 3 and a.shape == (4, 6)
    assert a.inner(b) == pytest.approx(float((a.change() * b.change()).sum()), rel=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_a_dense_change_is_kept_exactly(shape: tuple[int, int]) -> None:
    change = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    dense = WeightDelta.of_change(PATH, 1, change)
    assert torch.equal(dense.change(), change) and dense.rank == 4 and dense.is_dense and not delta(3).is_dense


def test_tensors_are_taken_over_as_fp32_copies() -> None:
    u = torch.randn(4, 2, dtype=torch.float64)
    taken = WeightDelta(PATH, 1, u, torch.ones(6, 2, dtype=torch.bfloat16, requires_grad=True))
    u.zero_()
    assert taken.u.any() and taken.u.dtype == taken.v.dtype == torch.float32 and not taken.v.requires_grad


def test_shapes_that_do_not_fit_are_named() -> None:
    u, v = torch.ones(4, 2), torch.ones(6, 2)
    for name, wrong in {
        "u": lambda: WeightDelta(PATH, 1, u[:, 0], v),
        "v": lambda: WeightDelta(PATH, 1, u, v[:, :1]),
        "keys": lambda: WeightDelta(PATH, 1, u, v, torch.ones(3, 4)),
        "values": lambda: WeightDelta(PATH, 1, u, v, torch.ones(3, 6), torch.ones(2, 4)),
    }.items():
        with pytest.raises(EditError, match=rf"`{name}` of the delta of '{PATH}' does not fit"):
            wrong()
    with pytest.raises(EditError, match="`values`"):
        WeightDelta(PATH, 1, u, v, values=torch.ones(2, 4))
    with pytest.raises(NonFiniteError, match="`u` of the delta"):
        WeightDelta(PATH, 1, u * math.nan, v)
    with pytest.raises(ConfigError, match="wrong type for `u`"):
        WeightDelta(PATH, 1, [[1.0]], v)  # type: ignore[arg-type]


# ---- edits


def test_an_edit_says_what_it_is(model: nn.Module) -> None:
    edit = random_edit(model, layers=(0, 1))
    assert repr(edit) == "Edit('a': 1 facts by random, rank 2 in layers 0, 1)"
    assert repr(edit.deltas[0]).startswith(f"WeightDelta('{DOWN['llama'].format(0)}': 32 x 64 of rank 2, norm ")
    assert edit.delta(PATH) is edit.deltas[1] and edit.delta("elsewhere") is None
    assert edit.model["model_type"] == "llama" and set(edit.base) == {each.path for each in edit.deltas}


def test_without_a_name_it_is_called_by_what_it_changes(model: nn.Module) -> None:
    edit = random_edit(model)
    first, same, other = (Edit((), "x", (d,)) for d in (edit.deltas[0], edit.deltas[0], random_edit(model, seed=5).deltas[0]))
    assert first.name == same.name != other.name and first.name.startswith("x-") and first.digest == same.digest
    assert first.named("b").name == "b" and first.named("b").digest == first.digest


def test_two_deltas_of_one_matrix_are_refused() -> None:
    with pytest.raises(EditError, match=r"two deltas of[\s\S]*torch.cat"):
        Edit((), "x", (delta(), delta(seed=1)))
    with pytest.raises(ConfigError, match="one of `facts`"):
        Edit(("cat",), "x", ())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`settings` of an edit"):
        Edit((), "x", (), settings={"device": torch.device("cpu")})


def test_what_two_edits_do_differently(model: nn.Module) -> None:
    first, second = random_edit(model, "a", layers=(0, 1)), random_edit(model, "b", layers=(1,), seed=3)
    same = first.diff(first)
    assert not same.facts and not same.other_facts and not same.settings
    assert [each.cosine for each in same.matrices.values()] == pytest.approx([1.0, 1.0])
    difference = first.diff(second)
    assert [each.target for each in difference.facts] == ["a"] and [each.target for each in difference.other_facts] == ["b"]
    assert difference.settings == {"seed": (0, 3)}
    only_here, both = difference.matrices[DOWN["llama"].format(0)], difference.matrices[PATH]
    assert only_here.other_norm == 0 and math.isnan(only_here.cosine) and abs(both.cosine) < 0.9
    assert "facts: 1 only here, 1 only there" in str(difference) and "seed: 0 here, 3 there" in str(difference)


# ---- files


@pytest.mark.parametrize("name", ["edit", "edit.safetensors"])
def test_a_saved_edit_is_the_same_edit(model: nn.Module, tmp_path: Path, name: str) -> None:
    edit = random_edit(model, layers=(0, 1))
    edit = Edit(edit.facts, "x", (*edit.deltas[:1], delta()), contexts={"prefixes": ["The"], "seed": 0}, provenance={"over": ["b"]})
    again = Edit.load(edit.save(tmp_path / name))
    assert again.as_json() == edit.as_json() and again.facts == edit.facts and again.digest == edit.digest
    for ours, theirs in zip(edit.deltas, again.deltas, strict=True):
        for part in ("u", "v", "keys", "values"):
            mine, other = getattr(ours, part), getattr(theirs, part)
            assert (mine is None and other is None) or torch.equal(mine, other)
    json.dumps(edit.as_json())


def test_files_that_are_no_edits(model: nn.Module, tmp_path: Path) -> None:
    from steer.files import save_artifact

    save_artifact(tmp_path / "plan", "plan", {}, {})
    with pytest.raises(WrongKindError):
        Edit.load(tmp_path / "plan")
    edit = random_edit(model)
    content = edit.as_json()
    tensors = {"0/u": edit.deltas[0].u, "0/v": edit.deltas[0].v}
    for number, (wrong, held) in enumerate(
        [
            ({**content, "facts": None}, tensors),
            ({**content, "deltas": [{"path": PATH}]}, tensors),
            (content, {"0/u": tensors["0/u"]}),
            (content, {**tensors, "1/u": tensors["0/u"]}),
            ({**content, "facts": [{**fact().as_json(), "prompt": 3}]}, tensors),
        ]
    ):
        save_artifact(tmp_path / f"wrong{number}", "edit", held, wrong)
        with pytest.raises((DamagedFileError, ConfigError), match=f"wrong{number}"):
            Edit.load(tmp_path / f"wrong{number}")
