"""What would give a wrong table in silence is refused: a group called all, files of another data set, adapters of another model."""

from __future__ import annotations

import pytest
from bias.bias_helpers import Bigram, words_tokenizer, write_crows, write_lines
from families import FAMILIES
from tiny_tokenizer import tiny_tokenizer

import steer.bias
from steer.errors import ConfigError, DamagedFileError, WrongModelError

PAIRS = [("he is rude", "she is rude", "stereo", "gender"), ("she is kind", "he is kind", "antistereo", "gender")]
FACTS = {"pairs": [("father", "mother")], "templates": ["The {} did a mistake and everyone scolded"], "pronouns": (" him", " her")}


@pytest.fixture
def model() -> Bigram:
    return Bigram({("<s>", "he"): 1.0})


@pytest.fixture
def tokenizer():
    return words_tokenizer()


def test_a_group_of_the_name_of_the_row_of_all_is_refused(model, tokenizer, tmp_path):
    path = write_crows(tmp_path / "pairs.csv", [*PAIRS, ("he sat", "she sat", "stereo", "all")])
    with pytest.raises(ConfigError, match="name of the row of all items"):
        steer.bias.measure(model, "crows_pairs", tokenizer, path=path, progress=False)


def test_one_source_of_data_and_facts_of_the_right_kind(model, tokenizer, tmp_path):
    path = write_crows(tmp_path / "pairs.csv", PAIRS)
    factual = steer.bias.factual_gender(model, tokenizer, **FACTS, progress=False)
    data = steer.bias.load("crows_pairs", path=path)
    assert steer.bias.measure(model, data, tokenizer, factual=factual, progress=False)["all"]["log-ratio"].n == 2
    with pytest.raises(ConfigError, match="from two places"):
        steer.bias.measure(model, data, tokenizer, path=path, factual=factual, progress=False)
    with pytest.raises(ConfigError, match="factual gender"):
        steer.bias.measure(model, data, tokenizer, factual=0.9, progress=False)
    with pytest.raises(ConfigError, match="the model of a bias measurement"):
        steer.bias.measure("smollm2-135m", data, tokenizer, progress=False)
    for pronouns in [(" him",), (" him", " her", " it"), "him"]:
        with pytest.raises(ConfigError, match="compared of two words"):
            steer.bias.factual_gender(model, tokenizer, **{**FACTS, "pronouns": pronouns}, progress=False)


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.txt"])
def test_a_file_of_another_data_set_has_no_items(tmp_path, name):
    path = write_lines(tmp_path / name, [{"a": 1}])
    with pytest.raises(DamagedFileError, match="at least one item"):
        steer.bias.load("bbq", path=path)


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("sent_more,sent_more,sent_less,stereo_antistereo,bias_type\nhe sat,she sat,a cat,stereo,gender\n")
    with pytest.raises(DamagedFileError, match="'sent_more' twice"):
        steer.bias.load("crows_pairs", path=path)


def test_an_adapter_of_another_model_does_not_act():
    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    fitted = steer.bias.fit_mitigation("cda", model, ["she can run"], tokenizer=tokenizer, steps=1, batch_size=1)
    with fitted.acting(model) as adapted:
        assert adapted is not model
    with pytest.raises(WrongModelError, match="trained on another model"), fitted.acting(FAMILIES["mistral"]()):
        pass
