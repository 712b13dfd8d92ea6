"""Measures of edits: each number by hand, from answers that are made up; and the answers themselves, from the logits of whole passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from edits.edit_helpers import with_special_tokens
from method_tables import check_table

from steer.edits import EDIT_MEASURES, Fact, FactRecord, Probe
from steer.edits.answer_scores import Answer, AnswerScorer
from steer.edits.measure import FORWARD, Readings, columns_of, measures_of
from steer.edits.measures.consistency import tf_idf_cosine
from steer.edits.measures.fluency import n_gram_entropy
from steer.edits.readings import WRITTEN, EditReader
from steer.errors import ConfigError, EditError, NonFiniteError

NEW, TRUE = "dog", "tree"
RECORD = FactRecord(
    Fact("the cat is a", "cat", NEW, TRUE),
    paraphrases=("one", "two"),
    neighbours=("three", "four"),
    generation_prompts=("the cat can",),
    reference_texts=("a dog ran", "the dog can run"),
    essence_texts=("the cat sat", "a cat ran"),
    portability=(Probe("five", "run on"), Probe("six", "run")),
    locality=(Probe("seven", "the mat"), Probe("eight", "sun")),
)


def answer(probability: float, *hits: bool, predicted: tuple[int, ...] = ()) -> Answer:
    """One that has this probability per token."""
    hits = hits or (False,)
    return Answer((math.log(probability),) * len(hits), predicted or (0,) * len(hits), hits)


def pair(prompt: str, new: Answer, true: Answer) -> dict[tuple[str, str], Answer]:
    return {(prompt, NEW): new, (prompt, TRUE): true}


SEEN = Readings(
    answers={
        **pair("the cat is a", answer(0.6, True), answer(0.1, False)),
        **pair("one", answer(0.5, True, True), answer(0.2, False)),
        **pair("two", answer(0.1, True, False), answer(0.3, True)),
        **pair("three", answer(0.2, False), answer(0.4, True)),
        **pair("four", answer(0.5, True), answer(0.1, False)),
        ("five", "run on"): answer(0.5, True, False),
        ("six", "run"): answer(0.5, True),
        ("seven", "the mat"): answer(0.5, False, True, predicted=(4, 5)),
        ("eight", "sun"): answer(0.5, True, predicted=(6,)),
    },
    greedy={"the cat is a": " dog . a dog", "one": " dog", "two": " doghouse"},
    sampled={"the cat can": " run a b a b"},
    losses={"the cat sat": 1.0, "a cat ran": 3.0},
)
BEFORE = Readings(
    answers={("seven", "the mat"): answer(0.5, True, True, predicted=(9, 5)), ("eight", "sun"): answer(0.5, True, predicted=(6,))}
)

# by hand; neighbours prefer the true object: 0.4 > 0.2, but not 0.1 > 0.5
WORKED_OUT = {
    "efficacy": {
        "efficacy": 1.0,
        "efficacy_magnitude": 0.5,
        "efficacy_accuracy": 1.0,
        "efficacy_token_accuracy": 1.0,
        "efficacy_probability": 0.6,
    },
    "paraphrase": {
        "paraphrase": 0.5,
        "paraphrase_magnitude": (0.3 - 0.2) / 2,
        "paraphrase_accuracy": 0.5,
        "paraphrase_token_accuracy": (1.0 + 0.5) / 2,
        "paraphrase_probability": 0.3,
    },
    "neighbourhood": {
        "neighbourhood": 0.5,
        "neighbourhood_magnitude": (0.2 - 0.4) / 2,
        "neighbourhood_accuracy": 0.5,
        "neighbourhood_token_accuracy": 0.5,
        "neighbourhood_probability": 0.25,
    },
    "portability": {"portability": (0.5 + 1.0) / 2},
    "locality": {"locality": (0.5 + 1.0) / 2, "agreement": (0.5 + 1.0) / 2},
    "free_generation": {"generated": 1.0, "generated_paraphrase": 0.5},
    # "the cat can run a b a b": 7 2-grams, of which "a b" twice; 6 3-grams, all different
    "fluency": {"fluency": 100 * ((2 / 3) * (5 / 7 * math.log2(7) + 2 / 7 * math.log2(7 / 2)) + (4 / 3) * math.log2(6)) / 2},
    "consistency": {"consistency": tf_idf_cosine(["the cat can run a b a b"], RECORD.reference_texts)},
    "essence": {"essence": math.exp(2.0)},
}


def test_every_measure_has_numbers_worked_out_by_hand() -> None:
    check_table(EDIT_MEASURES, WORKED_OUT, "WORKED_OUT of tests/edits/test_measures.py", "the numbers of RECORD, by hand")


@pytest.mark.parametrize("name", WORKED_OUT)
def test_the_numbers_of_a_record(name: str) -> None:
    (measure,) = measures_of(name)
    wanted = measure.wanted(RECORD)
    assert set(wanted.answers) <= set(SEEN.answers) and set(wanted.greedy) <= set(SEEN.greedy)
    assert set(wanted.sampled) <= set(SEEN.sampled) and set(wanted.read) <= set(SEEN.losses)
    assert measure.values(RECORD, SEEN, BEFORE) == pytest.approx(WORKED_OUT[name])
    assert set(measure.values(RECORD, SEEN, BEFORE)) == {column.name for column in measure.columns}


@pytest.mark.parametrize("name", WORKED_OUT)
def test_what_a_record_lacks_is_left_out_rather_than_zero(name: str) -> None:
    (measure,) = measures_of(name)
    bare = FactRecord(Fact("the cat is a", "cat", NEW))
    seen = Readings({("the cat is a", NEW): answer(0.6, True)}, greedy=SEEN.greedy, sampled={"the cat is a": " dog"})
    found = measure.values(bare, seen, None)
    expected = {
        "efficacy": {"efficacy_accuracy": 1.0, "efficacy_token_accuracy": 1.0, "efficacy_probability": 0.6},
        "free_generation": {"generated": 1.0},
        "fluency": found if name == "fluency" else {},  # of the prompt of the edit, for want of others
    }
    assert found == pytest.approx(expected.get(name, {})) and set(measure.wanted(bare).answers) <= set(seen.answers)


def test_the_same_object_on_both_sides_is_not_preferred_to_itself() -> None:
    (measure,) = measures_of("efficacy")
    same = FactRecord(Fact("the cat is a", "cat", NEW, NEW))
    assert measure.wanted(same).answers == (("the cat is a", NEW),)
    found = measure.values(same, SEEN, None)
    assert set(found) == {"efficacy_accuracy", "efficacy_token_accuracy", "efficacy_probability"}


def test_measures_are_chosen_by_name() -> None:
    assert [measure.name for measure in measures_of(None)][:3] == ["efficacy", "paraphrase", "neighbourhood"]
    assert all(measure.needs == FORWARD for measure in measures_of(None)) and len(measures_of("all")) == len(WORKED_OUT)
    names = [column.name for column in columns_of(measures_of("all"))]
    assert len(set(names)) == len(names)
    for wrong in ([], ["efficacy", "nonsense"]):
        with pytest.raises(ConfigError):
            measures_of(wrong)


def test_entropy_and_cosine_by_hand() -> None:
    assert n_gram_entropy("a b a b") == pytest.approx(((2 / 3) * (math.log2(3) - 2 / 3) + 4 / 3) / 2)
    assert n_gram_entropy("") == n_gram_entropy("one") == 0
    assert n_gram_entropy("no no no no no") == 0 < n_gram_entropy("don't stop , stop")
    assert tf_idf_cosine(["the dog ran"], ["the dog ran"]) == pytest.approx(1) and tf_idf_cosine(["one two"], ["the dog ran"]) == 0
    # of one shared word of two in each, all equally frequent in the two documents but for the shared one
    rare, shared = math.log(3 / 2) + 1, 1.0
    assert tf_idf_cosine(["cat ran"], ["dog ran"]) == pytest.approx(shared**2 / (rare**2 + shared**2))


# ---- answers


QUESTIONS = [
    ("the cat is a", "dog"),
    ("the cat is a", "tree and sun"),
    ("the cat is a", "tree"),
    ("one two three four five six", "seven"),
    ("what", "dog cat"),
    ("what", "mat house"),
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("max_tokens", [8, 1024])
def test_answers_are_those_of_whole_passes(tiny: Any, tiny_tokenizer: Any, family: str, max_tokens: int) -> None:
    model = tiny(family)
    found = AnswerScorer(model, tiny_tokenizer, max_tokens=max_tokens, progress=False).scores(QUESTIONS)
    assert list(found) == QUESTIONS
    for (prompt, text), read in found.items():
        start, target = tiny_tokenizer(prompt).input_ids, tiny_tokenizer(text).input_ids
        with torch.no_grad():
            logprobs = model(torch.tensor([[*start, *target]])).logits[0, len(start) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(target)[:, None])[:, 0]
        assert read.logprobs == pytest.approx(expected.tolist(), abs=1e-5) and list(read.predicted) == logprobs.argmax(-1).tolist()
        assert read.hits == tuple(a == b for a, b in zip(read.predicted, target, strict=True))
        assert read.probability == pytest.approx(math.exp(float(expected.mean())), rel=1e-5)


def test_answers_that_begin_alike_are_read_in_one_row(tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny("llama"), []
    forward = type(model).forward

    def counted(self: Any, *args: Any, **given: Any) -> Any:
        rows.append(len(given["input_ids"]))
        return forward(self, *args, **given)

    monkeypatch.setattr(type(model), "forward", counted)
    scorer = AnswerScorer(model, tiny_tokenizer, progress=False)
    rows.clear()
    scorer.scores([("the cat is a", "dog"), ("the cat is a", "tree"), ("the cat is a", "tree and sun"), ("the cat is a", "dog")])
    assert rows == [1]


def test_want_of_memory_halves_a_batch(tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = AnswerScorer(tiny("llama"), tiny_tokenizer, progress=False)
    expected, logits, sizes = scorer.scores(QUESTIONS), AnswerScorer._logits, []

    def small(self: AnswerScorer, rows: Any, places: Any) -> Any:
        sizes.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError
        return logits(self, rows, places)

    monkeypatch.setattr(AnswerScorer, "_logits", small)
    found = scorer.scores(QUESTIONS)
    assert max(sizes) > 1 and list(found) == QUESTIONS
    for question in QUESTIONS:
        assert found[question].logprobs == pytest.approx(expected[question].logprobs, abs=1e-5)


def test_a_prompt_begins_and_does_not_end_with_special_tokens(tiny: Any) -> None:
    tokenizer = with_special_tokens(start=True, end=True)
    scorer = AnswerScorer(tiny("llama"), tokenizer, progress=False)
    cat, is_ = tokenizer("cat is", add_special_tokens=False).input_ids
    assert scorer.prompt_ids("cat is") == (1, cat, is_) and scorer.answer_ids(" cat") == scorer.answer_ids("cat") == (cat,)


def test_answers_of_a_chat_are_what_the_assistant_says(tiny: Any, tiny_tokenizer: Any) -> None:
    model = tiny("llama")
    (read,) = AnswerScorer(model, tiny_tokenizer, chat=True, progress=False).scores([("the cat", "dog")]).values()
    with torch.no_grad():
        logits = model(torch.tensor([tiny_tokenizer("<user> the cat <assistant>").input_ids])).logits[0, -1]
    assert read.logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[tiny_tokenizer("dog").input_ids[0]]), abs=1e-5)


def test_bad_answers(tiny: Any, tiny_tokenizer: Any) -> None:
    model = tiny("llama")
    scorer = AnswerScorer(model, tiny_tokenizer, progress=False)
    with pytest.raises(EditError, match="empty"):
        scorer.scores([("the cat", " ")])
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="log-probabilities of answers"):
        scorer.scores([("the cat", "dog")])


# ---- reading


def test_a_reader_reads_what_measures_want(tiny: Any, tiny_tokenizer: Any) -> None:
    model = tiny("llama")
    reader = EditReader(model, tiny_tokenizer, measures_of("all"), progress=False)
    state = torch.random.get_rng_state()
    seen = reader.read([RECORD])
    again = EditReader(model, tiny_tokenizer, measures_of("all"), progress=False, max_tokens=32).read([RECORD])
    assert torch.equal(torch.random.get_rng_state(), state) and seen.greedy == again.greedy
    with torch.no_grad():
        ids = torch.tensor([tiny_tokenizer("the cat is a").input_ids])
        said = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        loss = float(model(ids[:, :3], labels=ids[:, :3]).loss)
    assert seen.greedy["the cat is a"].split() == tiny_tokenizer.decode(said, skip_special_tokens=True).split()
    assert len(tiny_tokenizer(f"the cat can{seen.sampled['the cat can']}").input_ids) <= WRITTEN
    assert EditReader(model, tiny_tokenizer, [], progress=False)._losses(["the cat is"])["the cat is"] == pytest.approx(loss, abs=1e-5)
    values = reader.values(RECORD, seen, seen)
    assert set(values) == {column.name for column in columns_of(measures_of("all"))} and values["agreement"] == 1
    assert all(math.isfinite(value) for value in values.values())
