"""Runs of edits beside other edits of the model, several at once, and one after the other in one process."""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from callback_helpers import loader, same_weights
from edit_training import PATH, TOKENIZER, solved_edit, tiny_model, weight
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from steer.edits import Fact
from steer.edits.edit import Edit
from steer.edits.edited_weights import EditedWeights
from steer.errors import ConfigError, DamagedFileError, EditError
from steer.training.edit_hosts import ADAPTER, EditNotAppliedWarning
from steer.training.edit_readings import target_probability
from steer.training.edit_run import EditRun
from steer.training.ranks import Ranks

SIZES = {"num_hidden_layers": 2}
MODEL = tiny_model(**SIZES)
HOME = solved_edit(MODEL)
OTHER = solved_edit(
    MODEL, "other", size=10.0, facts=(Fact.of("you want the {}", "sun", "fire"), Fact.of("we ran to the {}", "tree", "stone"))
)
BELOW = solved_edit(MODEL, "below", layer=0)

pytestmark = pytest.mark.filterwarnings("ignore::steer.training.edit_run.EditFadesWarning")


def lora() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return get_peft_model(tiny_model(**SIZES), config)


class Training:
    """A plain loop with any number of runs of edits."""

    def __init__(self, *runs: EditRun, model: nn.Module | None = None, rate: float = 3e-3) -> None:
        self.model = tiny_model(**SIZES) if model is None else model
        self.runs = runs
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=rate)

    @property
    def applied(self) -> list[str]:
        return [edit.name for edit in EditedWeights.of(self.model).applied]

    def train(self, steps: int, first: int = 0, states: list[dict[str, Tensor]] | None = None) -> Training:
        batches = (list(loader()) * 4)[first : first + steps]
        for number, run in enumerate(self.runs):
            run.attach(self.model, Ranks())
            if states is not None:
                run.load_state_dict(states[number], is_first_rank=True)
            run.start(first, [self.optimizer])
        for step, batch in enumerate(batches, first + 1):
            self.model(**batch, use_cache=False).loss.backward()
            for run in self.runs:
                run.before_step()
            self.optimizer.step()
            self.optimizer.zero_grad()
            for run in self.runs:
                run.advance(step)
        return self

    def checkpoint(self, names: str = "") -> dict[str, Any]:
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items() if names in name}
        states = [{name: tensor.clone() for name, tensor in run.state_dict().items()} for run in self.runs]
        return {"weights": weights, "optimizer": deepcopy(self.optimizer.state_dict()), "states": states}

    def resume(self, checkpoint: dict[str, Any], steps: int, first: int) -> Training:
        for run in self.runs:
            run.renew()
            run.attach(self.model, Ranks())
        self.model.load_state_dict(checkpoint["weights"], strict=False)
        self.optimizer.load_state_dict(deepcopy(checkpoint["optimizer"]))
        return self.train(steps, first, checkpoint["states"])

    def detach(self) -> Training:
        for run in self.runs:
            run.detach()
        return self


def run(edit: Edit = HOME, **options: Any) -> EditRun:
    return EditRun(edit, TOKENIZER, **{"every_n_steps": 2, **options})


def same_edits(training: Training, of: Training) -> bool:
    """The same edits, and the same weights without them."""
    one, other = (EditedWeights.of(each.detach().model) for each in (training, of))
    assert [edit.digest for edit in one.applied] == [edit.digest for edit in other.applied]
    paths = {delta.path for edit in one.applied for delta in edit.deltas}
    return all(torch.allclose(one.original(path).double(), other.original(path).double(), atol=1e-9) for path in paths)


# ---- one after the other in one process


def test_an_edit_over_which_weights_were_loaded_is_no_edit_of_the_next_run() -> None:
    training = Training(run())
    initial = training.checkpoint()["weights"]
    training.train(2).detach()
    training.model.load_state_dict(initial)
    with pytest.raises(EditError, match=r"something else has changed[\s\S]*forget\(\)"):
        training.train(1)
    EditedWeights.of(training.model).forget()
    training.runs[0].renew()
    training.train(0)
    assert training.applied == ["home"] and target_probability(training.model, TOKENIZER, [HOME])[0] > 0.05
    training.detach()
    EditedWeights.of(training.model).clear()
    assert torch.equal(weight(training.model), initial[f"{PATH}.weight"])


def test_trained_outside_of_a_run_has_to_be_said() -> None:
    training = Training(run()).train(2).detach()
    with torch.no_grad():
        weight(training.model).mul_(1.01)
    with pytest.raises(EditError, match=r"something else has changed[\s\S]*rebase\(\)"):
        training.train(0)
    EditedWeights.of(training.model).rebase()
    training.train(1)
    assert training.applied == ["home"]


@pytest.mark.parametrize("kind", ["full", "lora without its base"])
def test_back_to_a_checkpoint_from_before_the_application_in_the_same_process(kind: str) -> None:
    def training() -> Training:
        return Training(run(at_step=4), model=None if kind == "full" else lora())

    whole, first, again = training().train(6), training().train(2), training().train(6)
    checkpoint = first.checkpoint("lora_" if kind != "full" else "")
    assert again.applied == ["home"]
    again.detach().resume(checkpoint, 1, first=2)
    assert again.applied == [] and not again.runs[0].is_applied
    again.detach().resume(checkpoint, 4, first=2)
    assert same_weights(again.model, whole.model) and same_edits(again, whole)


def test_an_edit_in_an_adapter_goes_back_as_well() -> None:
    def training() -> Training:
        return Training(run(at_step=4, into="adapter"), model=lora())

    whole, first, again = training().train(6), training().train(2), training().train(6)
    again.detach().resume(first.checkpoint("default"), 4, first=2)
    assert same_weights(again.model, whole.model)


def test_the_adapter_of_other_edits_is_not_written_over() -> None:
    training = Training(run(into="adapter"), model=lora()).train(1).detach()
    before = target_probability(training.model, TOKENIZER, [HOME])
    for model in (training.model, _loaded_anew(training.model)):
        with pytest.raises(ConfigError, match=r"adapter called 'edits'[\s\S]*delete_adapter"):
            Training(run(OTHER, into="adapter"), model=model).train(0)
        assert target_probability(model, TOKENIZER, [HOME]) == before
    Training(run(into="adapter"), model=training.model).train(1)  # the same edit goes on
    training.model.delete_adapter(ADAPTER)
    Training(run(OTHER, into="adapter"), model=training.model).train(0)


def _loaded_anew(model: nn.Module) -> nn.Module:
    """The same in a process that does not know what its adapter of edits holds."""
    new = lora()
    new.add_adapter(ADAPTER, model.peft_config[ADAPTER])  # type: ignore[operator, index]
    new.load_state_dict(model.state_dict())
    new.base_model.set_adapter(["default", ADAPTER])  # type: ignore[union-attr, operator]
    return new


def test_an_edit_that_changes_nothing_needs_no_room_in_an_adapter() -> None:
    training = Training(run(replace(HOME, deltas=(), of=None), into="adapter"), model=lora()).train(2)
    assert training.runs[0].is_applied


# ---- beside others


@pytest.mark.parametrize("other", [OTHER, BELOW], ids=["the same matrix", "another matrix"])
@pytest.mark.parametrize("kind", ["full", "lora without its base"])
def test_a_resumed_run_keeps_the_edits_of_the_user(kind: str, other: Edit) -> None:
    def training() -> Training:
        model = tiny_model(**SIZES) if kind == "full" else lora()
        EditedWeights.of(model).apply(other)
        return Training(run(at_step=1, protect="resolve", keep=1.0), model=model)

    whole, first, second = training().train(6), training().train(3), training()
    second.resume(first.checkpoint("" if kind == "full" else "lora_"), 3, first=3)
    assert second.applied == whole.applied == [other.name, "home"] and same_weights(second.model, whole.model)
    assert same_edits(second, whole)


@pytest.mark.parametrize("other", [OTHER, BELOW], ids=["the same matrix", "another matrix"])
@pytest.mark.parametrize("kind", ["full", "lora without its base"])
def test_two_runs_go_on_together(kind: str, other: Edit) -> None:
    def training() -> Training:
        return Training(run(), run(other, at_step=2), model=None if kind == "full" else lora())

    names = "" if kind == "full" else "lora_"
    whole, first, second = training().train(6), training().train(3), training()
    checkpoint = first.checkpoint(names)
    second.resume(checkpoint, 3, first=3)
    assert second.applied == whole.applied == ["home", other.name] and same_weights(second.model, whole.model)
    assert same_edits(second, whole)
    second.detach().resume(checkpoint, 3, first=3)  # in the same process
    assert second.applied == whole.applied and same_weights(second.model, whole.model)
    alone = Training(run(), model=None if kind == "full" else lora())
    with pytest.raises((ConfigError, DamagedFileError), match="edit 'other' on the model, too|edit 'below' on the model, too"):
        alone.resume({**checkpoint, "optimizer": alone.optimizer.state_dict(), "states": checkpoint["states"][:1]}, 1, first=3)


@pytest.mark.parametrize("is_first", [True, False], ids=["home first", "home last"])
@pytest.mark.parametrize("kind", ["full", "lora without its base"])
def test_two_runs_go_back_to_before_the_second_was_applied(kind: str, is_first: bool) -> None:
    def training() -> Training:
        runs = run(), run(OTHER, at_step=4)
        return Training(*(runs if is_first else runs[::-1]), model=None if kind == "full" else lora())

    whole, first, again = training().train(6), training().train(2), training().train(6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EditNotAppliedWarning)  # each goes back by itself, and none is lost
        again.detach().resume(first.checkpoint("" if kind == "full" else "lora_"), 1, first=2)
        assert again.applied == ["home"]
        again.detach().resume(first.checkpoint("" if kind == "full" else "lora_"), 4, first=2)
    assert again.applied == whole.applied and same_weights(again.model, whole.model) and same_edits(again, whole)


@pytest.mark.parametrize("order", [1, -1])
def test_a_run_that_is_new_at_a_checkpoint_goes_on_beside_one_that_was_there(order: int) -> None:
    """Also where it applies its edit at once, and where an edit of the user was trained in another matrix."""
    first = Training(run())
    EditedWeights.of(first.model).apply(BELOW)
    checkpoint = first.train(2).checkpoint()
    for at_step, expected in ((2, ["below", "home", "other"]), (9, ["below", "home"])):
        second = Training(*(run(), run(OTHER, at_step=at_step))[::order])
        EditedWeights.of(second.model).apply(BELOW)
        for each in second.runs:
            each.attach(second.model, Ranks())
        second.model.load_state_dict(checkpoint["weights"])
        for each in second.runs:
            each.attach(second.model, Ranks())
            if each.name == "home":
                each.load_state_dict(checkpoint["states"][0], is_first_rank=True)
            each.start(2, [second.optimizer])
        for each in second.runs:
            each.before_step()
        assert sorted(second.applied) == expected
        second.detach()
        EditedWeights.of(second.model).clear()


def test_an_application_at_the_step_of_the_checkpoint_is_no_other_state() -> None:
    checkpoint = Training(run(at_step=9)).train(2).checkpoint()
    again = Training(run(at_step=2)).resume(checkpoint, 2, first=2)
    assert again.applied == ["home"]


def test_a_best_checkpoint_with_an_edit_that_the_model_does_not_know_is_said() -> None:
    checkpoint = Training(run(), run(OTHER)).train(2).checkpoint()
    alone = Training(run()).train(3)
    alone.model.load_state_dict(checkpoint["weights"])
    with pytest.warns(EditNotAppliedWarning, match="edit 'other' is in the weights, and not on the model"):
        alone.runs[0].reload(checkpoint["states"][0])


def test_an_adapter_of_an_edit_that_was_solved_again_is_known_in_another_process() -> None:
    training = Training(run(into="adapter", protect="resolve", keep=1.0), model=lora()).train(4).detach()
    assert not torch.equal(training.runs[0].edits[0].deltas[0].u, HOME.deltas[0].u)
    again = Training(run(into="adapter"), model=_loaded_anew(training.model)).train(0)
    assert again.runs[0].is_applied


def test_an_edit_of_the_user_over_which_a_checkpoint_was_loaded_is_said() -> None:
    first, second = Training(run()).train(3), Training(run())
    EditedWeights.of(second.model).apply(OTHER)
    with pytest.warns(EditNotAppliedWarning, match="'other' is not in the weights of the checkpoint"):
        second.resume(first.checkpoint(), 1, first=3)
    assert second.applied == ["home"]


def test_edits_after_steps_are_solved_for_the_weights_of_then() -> None:
    training = Training(run(at_step=4, protect="resolve", keep=0.0), rate=1e-2).train(4)
    delta = training.runs[0].edits[0].deltas[0]
    given = training.runs[0]._host.given(PATH, delta.keys)  # type: ignore[union-attr]
    torch.testing.assert_close(given, delta.values, atol=1e-3, rtol=1e-3)
    assert not torch.equal(delta.keys, HOME.deltas[0].keys)
