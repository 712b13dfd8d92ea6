"""Every bias metric against values worked out by hand from a model whose log-probabilities are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bias.bias_helpers import WORDS, Bigram, bbq_row, words_tokenizer
from scipy import stats
from tokenizers import processors

import steer
from steer.bias.datasets.bbq import BBQ
from steer.bias.factual import factual_gender
from steer.bias.items import AssociationTest, BiasData, CoreferencePair, Prompt, SentencePair, StereoTriple, Word
from steer.bias.measuring import measure
from steer.bias.metrics.association import effect_size, permutation_p
from steer.bias.metrics.bbq import measured as bbq_measured
from steer.bias.metrics.generation import gender_polarity
from steer.bias.metrics.stereoset import measured as stereoset_measured
from steer.bias.metrics.winogender import measured as winogender_measured
from steer.bias.scoring import Scorer
from steer.bias.shift import pronoun_shift, sentence_shift
from steer.bias.words import FEMALE, MALE, NATIONALITIES, PROFESSIONS, SELECT, TEST
from steer.errors import ConfigError, NonFiniteError, TokenizerError
from steer.model.estimates import correlation_of, mean_of, percentage_of

FACTS: dict[str, Any] = {"pairs": [("father", "mother"), ("actor", "actress")], "templates": ["The person thanked the {} and helped"]}
GENDERED = Bigram({("father", "him"): 2.0, ("mother", "her"): 3.0, ("actor", "him"): 1.0, ("actress", "her"): -1.0})
STOPPED = ["everyone thanked the {}"]


def scorer(model: Any, **options: Any) -> Scorer:
    return Scorer(model, words_tokenizer(), progress=False, **options)


# ---- scoring


def test_sentence_scores_are_the_sum_the_mean_and_the_published_mean() -> None:
    model = Bigram({("<s>", "the"): 1.0, ("the", "cat"): 2.0, ("cat", "sat"): -1.0})
    expected = model.logprob("<s>", "the", "cat", "sat")
    assert float(scorer(model).sentences(["the cat sat"], "sum")[0]) == pytest.approx(expected, abs=1e-6)
    assert float(scorer(model).sentences(["the cat sat"], "mean")[0]) == pytest.approx(expected / 3, abs=1e-6)
    # a bigram model has no context beyond one word, so that leaving out the start token changes nothing but for a model that looks back
    assert float(scorer(model).sentences(["the cat sat"], "published")[0]) == pytest.approx(expected / 3, abs=1e-6)


def test_published_scoring_takes_the_start_token_out_of_the_context(tiny: Callable[[str], Any]) -> None:
    model, found = tiny("llama"), scorer(tiny("llama"))
    ids = found.ids("the cat sat")
    with torch.no_grad():
        first = model(torch.tensor([[found.start]])).logits[0, -1].double().log_softmax(-1)[ids[0]]
        rest = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    by_hand = (first + rest[0, ids[1]] + rest[1, ids[2]]) / 3
    published = found.sentences(["the cat sat", "the"], "published")
    assert float(published[0]) == pytest.approx(float(by_hand), abs=1e-5)
    assert float(published[0]) != pytest.approx(float(found.sentences(["the cat sat"], "mean")[0]), abs=1e-4)
    assert float(published[1]) == pytest.approx(float(found.sentences(["the"], "sum")[0]), abs=1e-5)  # one token: nothing behind it


def test_scores_do_not_depend_on_the_batch_or_on_the_padding_side(tiny: Callable[[str], Any]) -> None:
    texts = ["the cat sat", "he said the nurse was kind and everyone scolded the doctor .", "she"]
    alone = torch.cat([scorer(tiny("llama")).sentences([text]) for text in texts])
    for side in ("left", "right"):
        together = Scorer(tiny("llama"), words_tokenizer(side), progress=False).sentences(texts)
        assert torch.allclose(together, alone, atol=1e-5)
    odds = [(" him", " her")] * 3
    apart = torch.cat([scorer(tiny("gpt2")).log_odds([text], odds[:1]) for text in texts])
    assert torch.allclose(Scorer(tiny("gpt2"), words_tokenizer("left"), progress=False).log_odds(texts, odds), apart, atol=1e-5)


def test_log_odds_of_single_tokens_equal_the_difference_of_whole_texts(tiny: Callable[[str], Any]) -> None:
    found = scorer(tiny("llama"))
    odds = found.log_odds(["the nurse helped", "the old man thanked"], [(" him", " her")] * 2)
    with torch.no_grad():
        logits = tiny("llama")(torch.tensor([found.ids("the nurse helped")])).logits[0, -1]
    assert float(odds[0]) == pytest.approx(float(logits[WORDS.index("him")] - logits[WORDS.index("her")]), abs=1e-5)
    of_two_words = found.log_odds(["the nurse helped"], [(" him and", " her and")])
    with torch.no_grad():
        him, her = (
            tiny("llama")(torch.tensor([found.ids(f"the nurse helped {word}")])).logits[0].log_softmax(-1) for word in ("him", "her")
        )
    behind = float(him[3, WORDS.index("and")] - her[3, WORDS.index("and")])
    assert float(of_two_words[0]) == pytest.approx(float(odds[0]) + behind, abs=1e-5)


def test_texts_that_differ_from_their_first_token_on_are_predicted_from_the_start_token() -> None:
    found = scorer(Bigram({("<s>", "she"): 2.0, ("<s>", "sun"): 0.5}))
    assert float(found.log_odds(["s"], [("he", "un")])[0]) == pytest.approx(1.5)


def test_words_that_the_tokenizer_does_not_tell_apart_are_refused() -> None:
    with pytest.raises(TokenizerError, match="does not tell"):
        scorer(Bigram()).log_odds(["the nurse"], [(" zebra", " okapi")])


def test_a_diverged_model_and_a_foreign_tokenizer_are_refused() -> None:
    broken = Bigram()
    broken.table.weight.data[WORDS.index("cat")] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        scorer(broken).sentences(["the cat sat"])
    small = Bigram()
    small.table = torch.nn.Embedding(4, 4)
    with pytest.raises(ConfigError, match="not that of the model"):
        scorer(small).sentences(["the cat sat"])
    with pytest.raises(TokenizerError, match="no token that a text starts with"):
        Scorer(Bigram(), words_tokenizer(start=None), progress=False).sentences(["the cat"])


# ---- estimates


def test_intervals_are_those_of_student_wilson_and_fisher() -> None:
    mean = mean_of([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert mean is not None and (mean.value, mean.low, mean.high, mean.n) == (
        pytest.approx(7 / 3),
        pytest.approx(low),
        pytest.approx(high),
        3,
    )
    share = percentage_of([True] * 7 + [False] * 3)
    wilson = stats.binomtest(7, 10).proportion_ci(method="wilson")
    assert (
        share is not None
        and share.value == 70
        and share.low == pytest.approx(100 * wilson.low)
        and share.high == pytest.approx(100 * wilson.high)
    )
    all_hit = percentage_of([True] * 5)
    assert all_hit is not None and all_hit.low is not None and all_hit.high == 100 and 50 < all_hit.low < 60
    r = correlation_of([1, 2, 3, 4, 5], [2, 1, 4, 3, 5])
    assert r is not None and r.value == pytest.approx(0.8) and r.low is not None and r.low < 0
    assert mean_of([]) is None and percentage_of([]) is None and correlation_of([1, 1, 1], [1, 2, 3]) is None
    assert mean_of([3.0]) is not None and mean_of([3.0]).low is None  # type: ignore[union-attr]


# ---- factual gender and shift


def test_factual_gender_is_the_gap_of_log_odds_and_the_accuracy() -> None:
    found = factual_gender(GENDERED, words_tokenizer(), pairs=FACTS["pairs"], templates=STOPPED, progress=False)
    # father 2 - (-3), actor 1 - (+1): the odds behind actress favour him, which is one error in four words
    assert found.gaps == pytest.approx((5.0, 0.0)) and found.gap.value == pytest.approx(2.5)
    assert found.accuracy.value == pytest.approx(75.0) and found.accuracy.n == 4
    assert found.to_dict()["pairs"][0] == {"male": "father", "female": "mother", "gap": pytest.approx(5.0)}


def test_templates_are_repetitions_of_a_word_and_no_further_words() -> None:
    once = factual_gender(GENDERED, words_tokenizer(), pairs=FACTS["pairs"], templates=STOPPED, progress=False)
    twice = factual_gender(GENDERED, words_tokenizer(), pairs=FACTS["pairs"], templates=[*STOPPED, "she saw the {}"], progress=False)
    assert (once.gap, once.accuracy) == (twice.gap, twice.accuracy)


def test_word_pairs_of_selection_and_of_the_report_share_no_word_nor_stem() -> None:
    select, test = ({word for pair in pairs for word in pair} for pairs in (SELECT, TEST))
    assert len(select) == 2 * len(SELECT) and len(test) == 2 * len(TEST) and not select & test
    stems = ("father", "mother", "man", "lady", "son", "daughter", "boy", "girl", "king", "queen", "wife", "prince")
    for stem in stems:
        halves = [any(word.endswith(stem) or word.startswith(stem) for word in half) for half in (select, test)]
        assert halves != [True, True], f"'{stem}' is in both halves"
    assert not MALE & FEMALE
    assert len(set(PROFESSIONS)) == len(PROFESSIONS) and len(set(NATIONALITIES)) == len(NATIONALITIES)
    assert not set(PROFESSIONS) & (select | test)


def test_the_pronoun_shift_is_measured_from_the_baseline() -> None:
    model = Bigram({("nurse", "her"): 2.0, ("guard", "him"): 1.0, ("person", "him"): 0.5})
    found = pronoun_shift(model, ["nurse", "guard"], words_tokenizer(), templates=STOPPED, progress=False)
    assert found.shifts == pytest.approx((-2.5, 0.5)) and found.size.value == pytest.approx(1.5) and found.mean.value == pytest.approx(-1.0)


def test_magnitudes_are_taken_within_a_template() -> None:
    """A profession that leans one way in one sentence and the other way in another is no profession without a shift."""
    model = Bigram({("scolded", "him"): 1.0, ("praised", "her"): 1.0})
    templates = ["The {} and everyone scolded", "The {} and everyone praised"]
    assert pronoun_shift(model, ["nurse"], words_tokenizer(), templates=templates, progress=False).size.value == 0
    apart = Bigram({("nurse", "him"): 1.0})
    found = pronoun_shift(apart, ["nurse"], words_tokenizer(), templates=["The {}"], progress=False)
    assert found.size.value == pytest.approx(1.0) and found.size.low is None


def test_the_shift_in_sentences_is_measured_where_the_pronoun_stands() -> None:
    def item(name: str, occupation: str, text: str) -> CoreferencePair:
        sentences = text.format("he"), text.format("she")
        return CoreferencePair(name, "g", sentences, ("he", "she"), f"the {occupation}", "someone", occupation)

    model = Bigram({("nurse", "she"): 3.0, ("guard", "he"): 1.0, ("person", "he"): 0.5, ("because", "he"): 1.0})
    items = [
        item("0", "nurse", "The guard saw the nurse {} helped ."),
        item("1", "nurse", "The nurse helped someone because {} was kind ."),
        item("2", "guard", "someone saw the guard {} helped ."),
    ]
    found = sentence_shift(model, BiasData("winogender", tuple(items), "by hand"), words_tokenizer(), progress=False)
    assert found.words == ("nurse", "guard")
    assert found.shifts == pytest.approx((-3.5 / 2, 0.5)) and found.magnitudes == pytest.approx((3.5 / 2, 0.5))
    behind = item("3", "nurse", "{} saw the nurse .")
    with pytest.raises(ConfigError, match="in front of its first pronoun"):
        sentence_shift(model, BiasData("winogender", (behind,), "by hand"), words_tokenizer(), progress=False)


@pytest.mark.parametrize(
    "wrong",
    [{"pairs": []}, {"pairs": [("man",)]}, {"pairs": "man"}, {"templates": ["no slot"]}, {"templates": ["{} and {}"]}, {"templates": []}],
)
def test_word_pairs_and_templates_of_another_form_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        factual_gender(GENDERED, words_tokenizer(), **{**FACTS, **wrong}, progress=False)


def test_no_professions_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs words"):
        pronoun_shift(GENDERED, [], words_tokenizer(), progress=False)


# ---- measure


def told(model: Any, name: str, items: list[Any], **options: Any) -> Any:
    factual = factual_gender(GENDERED, words_tokenizer(), pairs=FACTS["pairs"], templates=STOPPED, progress=False)
    return measure(model, BiasData(name, tuple(items), "by hand"), words_tokenizer(), factual=factual, progress=False, **options)


def test_crows_pairs_counts_the_more_stereotyping_sentence_in_both_directions() -> None:
    model = Bigram({("the", "black"): 1.0, ("the", "white"): 3.0})
    pairs = [
        SentencePair("0", "race", "the white cat", "the black cat", "stereo"),  # preferred, by 2 nat
        SentencePair("1", "race", "the black cat", "the white cat", "antistereo"),  # not preferred
        SentencePair("2", "age", "the white dog", "the black dog", "antistereo"),  # preferred
        SentencePair("3", "age", "the cat sat", "the dog sat", "stereo"),  # a tie: in n alone
    ]
    table = told(model, "crows_pairs", pairs)
    assert table["all"]["stereotype preferred"].value == 50 and table["all"]["stereotype preferred"].n == 4
    assert table["all"]["log-ratio"].value == pytest.approx(0.5)
    assert table["race"]["log-ratio"].value == pytest.approx(0.0) and table["age"]["stereotype preferred"].value == 50
    assert table["direction antistereo"]["stereotype preferred"].value == 50
    assert table.notes == ("1 ties",)
    assert told(model, "crows_pairs", pairs, scoring="mean")["all"]["log-ratio"].value == pytest.approx(0.5 / 3)


def test_stereoset_scores_are_means_over_terms() -> None:
    triples = [
        *(StereoTriple(str(i), "gender", "nurse", "s", "a", "u") for i in range(3)),
        StereoTriple("3", "gender", "guard", "s", "a", "u"),
    ]
    # nurse: stereotype wins 2 of 3, related beats unrelated 5 of 6; guard: 0 of 1 and 1 of 2
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 2.5], [1.0, 2.0, 0.0], [1.0, 2.0, 1.5]], dtype=torch.float64)
    row = stereoset_measured(triples, scores).rows[0].values
    ss, lms = (200 / 3 + 0) / 2, (500 / 6 + 50) / 2
    assert row["SS"].value == pytest.approx(ss) and row["LMS"].value == pytest.approx(lms)
    assert row["ICAT"].value == pytest.approx(lms * min(ss, 100 - ss) / 50) and row["SS"].n == 2
    assert row["log-ratio"].value == pytest.approx(0.0) and row["log-ratio"].n == 4


def test_pairs_without_an_unrelated_sentence_have_no_language_model_score() -> None:
    table = told(Bigram({("the", "nurse"): 1.0}), "stereoset", [StereoTriple("0", "gender", "x", "the nurse", "the guard", None)])
    assert table["all"]["SS"].value == 100 and "LMS" not in table["all"] and "no LMS" in table.notes[0]
    with pytest.raises(ConfigError, match="do not fit"):
        stereoset_measured([StereoTriple("0", "gender", "x", "s", "a", None)], torch.zeros(1, 2))


def test_winobias_is_pro_minus_anti() -> None:
    he, she = "the guard thanked the nurse because he was tired .", "the guard thanked the nurse because she was tired ."
    pair = CoreferencePair("0", "type 1 dev", (he, she), ("he", "she"), "the guard", "the nurse", "guard")
    model = Bigram({("because", "he"): 2.0, ("the", "guard"): 1.0})
    table = told(model, "winobias", [pair])
    assert table["all"]["log-ratio"].value == pytest.approx(2.0) and table["all"]["pro preferred"].value == 100
    # a bigram model has no way to see the pronoun: it answers the guard both times
    assert table["all"]["accuracy pro"].value == table["all"]["accuracy anti"].value == 100
    assert table["all"]["gap"].value == 0 and table["all"]["referent log-ratio"].value == pytest.approx(0.0, abs=1e-6)


def test_winogender_pull_is_towards_the_occupation_whoever_is_meant() -> None:
    def item(occupation: str, percent: float, is_meant: bool) -> CoreferencePair:
        people = (f"the {occupation}", "someone")
        referent, other = people if is_meant else people[::-1]
        name = f"{occupation}{is_meant}"
        return CoreferencePair(name, "a" if is_meant else "b", ("he", "she"), ("he", "she"), referent, other, occupation, percent)

    items = [
        item(name, percent, meant)
        for name, percent in (("guard", 10), ("doctor", 40), ("cook", 60), ("nurse", 90))
        for meant in (True, False)
    ]
    # the male pronoun pulls towards the occupation by 1 - share of women / 50; the ratio has the other sign where the other one is meant
    pulls = [1 - share / 50 for share in (10, 40, 60, 90)]
    referents = torch.tensor([[sign * pull, 0.0] for pull in pulls for sign in (1, -1)], dtype=torch.float64)
    table = winogender_measured(items, referents, torch.zeros(8, dtype=torch.float64), torch.arange(8).double() - 4)
    overall = table.rows[0].values
    assert overall["pull to occupation"].value == pytest.approx(sum(pulls) / 4) and overall["r of pull"].value == pytest.approx(-1.0)
    assert "r of log-odds" not in overall  # they do not vary
    assert overall["|shift|"].value == pytest.approx((4 + 3 + 2 + 1 + 0 + 1 + 2 + 3) / 8) and overall["r of shift"].value > 0.9
    assert overall["accuracy male"].value == 50 and overall["accuracy female"].value == 0 and overall["gap"].value == 50


def test_bbq_bias_scores_and_their_conditions() -> None:
    rows = [
        bbq_row(0, "neg", "disambig", 0),
        bbq_row(1, "neg", "disambig", 1),
        bbq_row(2, "nonneg", "disambig", 1),
        bbq_row(3, "nonneg", "disambig", 0),
        *(bbq_row(number, "neg", "ambig", 2) for number in range(4, 8)),
    ]
    items = BBQ().read_rows(rows, "by hand")
    assert [item.biased for item in items] == [0, 0, 1, 1, 0, 0, 0, 0]  # the stereotyped group, the other one where the question is turned
    answers = [0, 0, 1, 0, 0, 0, 2, 1]
    scores = torch.nn.functional.one_hot(torch.tensor(answers), 3).double()
    table = {row.group: row.values for row in bbq_measured(items, scores).rows}
    disambiguated, ambiguous = table["disambiguated Age"], table["ambiguous Age"]
    assert disambiguated["accuracy"].value == 75 and disambiguated["s"].value == pytest.approx(100 * (2 * 3 / 4 - 1))
    # accuracy 1/4; of three answers that name somebody two agree with the stereotype
    assert ambiguous["accuracy"].value == 25 and ambiguous["s"].value == pytest.approx(100 * 0.75 * (2 * 2 / 3 - 1))
    assert ambiguous["biased"].n == 3 and ambiguous["log-ratio"].value == pytest.approx((1 + 1 + 0 - 1) / 4)
    assert disambiguated["log-ratio"].value == pytest.approx((1 + 1 + 1 - 1) / 4)


def test_bbq_scores_answers_per_token_unless_told_otherwise() -> None:
    items = BBQ().read_rows([bbq_row(0, "neg", "ambig", 2)], "by hand")
    model = Bigram({(":", "old"): 1.0, (":", "not"): 1.5, ("not", "known"): 1.5})
    assert told(model, "bbq", items)["ambiguous Age"]["accuracy"].value == 100
    assert told(model, "bbq", items, scoring="sum")["ambiguous Age"]["accuracy"].value == 0


def test_association_effect_size_and_exact_p() -> None:
    a, b = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[0.0, 1.0]] * 2)
    x, y = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [4.0, 3.0]])
    # associations: 1, -.2, -1, .2
    values = [1.0, -0.2, -1.0, 0.2]
    d = (0.4 - -0.4) / float(torch.tensor(values, dtype=torch.float64).std())
    assert effect_size(x, y, a, b) == pytest.approx(d)
    # of six splits, those whose first pair adds up to .8 or more: (1, -.2) and (1, .2)
    assert permutation_p(x, y, a, b) == pytest.approx(2 / 6)
    assert effect_size(y, x, a, b) == pytest.approx(-d)


def test_random_permutations_agree_with_all_of_them_and_with_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, y, a, b = (torch.randn(5, 8) + shift for shift in (0.4, 0.0, 0.4, 0.0))
    exact = permutation_p(x, y, a, b)
    monkeypatch.setattr("steer.bias.metrics.association.EXACT", 10)
    drawn = permutation_p(x, y, a, b, permutations=4000, seed=1)
    assert drawn == pytest.approx(exact, abs=0.03) and drawn == permutation_p(x, y, a, b, permutations=4000, seed=1)
    with pytest.raises(NonFiniteError, match="no effect size"):
        effect_size(*(torch.ones(2, 3) for _ in range(4)))


def test_gender_polarity_counts_words() -> None:
    assert gender_polarity(["He saw her mother.", "his HIS", "sheets and shepherds", ""]) == [pytest.approx(-1 / 3), 1.0, 0.0, 0.0]


def test_professions_and_the_gender_of_the_likeliest_words() -> None:
    model = Bigram({("guard", "him"): 9.0, ("nurse", "her"): 9.0, ("nurse", "him"): 8.0, ("guard", "cat"): 9.0})
    table = told(model, "professions", [Word("guard", "p", "guard"), Word("nurse", "p", "nurse")], templates=STOPPED, top=2)
    row = table["all"]
    him, her = math.exp(model.logprob("nurse", "him")), math.exp(model.logprob("nurse", "her"))
    of_guard = math.exp(model.logprob("guard", "him"))
    assert row["M1"].value == pytest.approx((of_guard + him - her) / 2, abs=1e-6)
    assert row["M2"].value == pytest.approx((of_guard + him) / 2, abs=1e-6)
    assert (
        row["|shift|"].value == pytest.approx((9 + 1) / 2) and row["shift"].value == pytest.approx(4.0) and row["him likelier"].value == 50
    )


def test_nationalities_and_their_spread() -> None:
    model = Bigram({("old", "kind"): 30.0, ("young", "rude"): 30.0})
    words = [Word("old", "n", "old"), Word("young", "n", "young")]
    row = told(model, "nationalities", words, templates=["the {}"], top=1)["all"]
    assert row["M1"].value == pytest.approx(0.0) and row["spread"].value == pytest.approx(1.0) and row["kind"].value == 50
    assert row["M2"].value == pytest.approx(0.5)
    turned = told(
        model, "nationalities", words, templates=["the {}"], top=1, score=lambda texts: [1.0 if "rude" in t else -1.0 for t in texts]
    )
    assert turned["all"]["spread"].value == pytest.approx(1.0) and turned["all"]["M2"].value == pytest.approx(0.5)


def test_embeddings_are_those_of_the_site(tiny: Callable[[str], Any]) -> None:
    model, found = tiny("llama"), scorer(tiny("llama"))
    sets = (("the cat", "a dog sat"), ("the nurse", "he")), (("kind", "good"), ("rude", "bad"))
    test = AssociationTest("t", "t", *sets, ("x", "y", "a", "b"))
    table = told(model, "seat", [test], site="layers.1.output", token="last")
    with torch.no_grad():
        hidden = [
            torch.stack(
                [
                    model(torch.tensor([(found.start, *found.ids(text))]), output_hidden_states=True).hidden_states[2][0, -1]
                    for text in texts
                ]
            )
            for texts in (*sets[0], *sets[1])
        ]
    assert table["t"]["effect size"].value == pytest.approx(effect_size(*hidden), abs=1e-4)
    assert told(model, "seat", [test], site="layers.1.output")["t"]["effect size"].value != pytest.approx(effect_size(*hidden), abs=1e-3)
    with pytest.raises(ConfigError, match="cannot be measured with these options"):
        told(model, "seat", [test])


def test_generation_is_scored_by_a_function_and_leaves_the_random_state(tiny: Callable[[str], Any]) -> None:
    prompts = [
        Prompt(str(i), group, text) for i, (group, text) in enumerate([("a", "the nurse"), ("a", "he"), ("b", "the old man said the")])
    ]
    seen: list[str] = []

    def length(texts: list[str]) -> list[float]:
        seen.extend(texts)
        return [float(len(text.split())) for text in texts]

    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    table = told(tiny("llama"), "bold", prompts, score=length, max_new_tokens=4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert table["all"]["score"].n == 3 and set(row.group for row in table.rows) == {"all", "a", "b"}
    first = list(seen)
    told(tiny("llama"), "bold", prompts, score=length, max_new_tokens=4)
    assert seen[3:] == first, "the same seed gives the same texts"
    greedy = told(tiny("llama"), "bold", prompts[:1], score=length, max_new_tokens=2, do_sample=False)
    assert greedy["all"]["score"].value == len(seen[-1].split())
    with pytest.raises(ConfigError, match="gives no scores"):
        told(tiny("llama"), "bold", prompts, score=lambda texts: [1.0], max_new_tokens=1)
    with pytest.raises(ConfigError, match="cannot generate"):
        told(Bigram(), "bold", prompts)


@pytest.mark.parametrize("scope", ["all", "response"])
def test_an_attached_plan_is_measured_in_all_columns(scope: str, tiny: Callable[[str], Any]) -> None:
    """One that acts on the response too: a sentence is what the model says, whether it is scored whole or by its next word."""
    model = tiny("llama")
    pairs = BiasData("crows_pairs", (SentencePair("0", "race", "the white cat", "the black cat", "stereo"),), "by hand")
    options: dict[str, Any] = {"tokenizer": words_tokenizer(), "progress": False}

    def values() -> list[float]:
        factual = factual_gender(model, options["tokenizer"], **FACTS, progress=False)
        table = measure(model, pairs, factual=factual, **options)
        return [table["all"]["log-ratio"].value, table.factual.gap.value]

    without = values()
    added = steer.Add(torch.ones(model.config.hidden_size))
    with steer.Plan(steer.Intervention(added, "layers.1.output", scope=scope, strength=5.0)).attached(model):
        steered = values()
    assert all(abs(a - b) > 1e-4 for a, b in zip(without, steered, strict=True)) and values() == without


def test_answers_to_a_prompt_are_the_response(tiny: Callable[[str], Any]) -> None:
    model, prompts, answers = tiny("llama"), ["the old cat"], [[" sat", " ran green"]]
    plan = steer.Plan(steer.Intervention(steer.Add(torch.ones(model.config.hidden_size)), "layers.1.output", scope="response"))
    with plan.attached(model) as attachment:
        scorer(model).answers(prompts, answers)
        assert sum(attachment.fired().values()) == 3


def test_special_tokens_stand_in_front_of_prompts_and_not_behind() -> None:
    tokenizer = words_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    model = Bigram({("nurse", "her"): 2.0, ("</s>", "him"): 9.0})
    found = Scorer(model, tokenizer, progress=False)
    assert [WORDS[token] for token in found.prompts(["the nurse"])[0].ids] == ["<s>", "the", "nurse"]
    assert float(found.log_odds(["the nurse"], [(" him", " her")])[0]) == pytest.approx(-2.0)
    assert found.next_tokens(["the nurse"], 1).tokens == [[" her"]]


def test_every_table_has_the_factual_columns() -> None:
    table = told(Bigram(), "crows_pairs", [SentencePair("0", "race", "the white cat", "the black cat", "stereo")])
    assert table["all"]["factual gap"].value == pytest.approx(2.5) and table["all"]["factual accuracy"].value == 75
    head, row, *_ = table.cells()
    assert head[-2:] == ["factual gap, nat", "factual accuracy, %"] and row[-2].startswith("2.500") and row[-1].startswith("75.0")
    assert "75.0" in str(table) and "factual accuracy 75 %" in repr(table)
    content = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    assert content["factual"]["accuracy"]["value"] == 75 and content["rows"][0]["values"]["log-ratio"]["n"] == 1


def test_factual_gender_is_measured_where_it_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "steer.bias.measuring.factual_gender_of",
        lambda s: factual_gender(s.model, s.tokenizer, pairs=FACTS["pairs"], templates=STOPPED, progress=False),
    )
    pairs = BiasData("crows_pairs", (SentencePair("0", "race", "the white cat", "the black cat", "stereo"),), "by hand")
    assert measure(GENDERED, pairs, words_tokenizer(), progress=False).factual.accuracy.value == 75


def test_wrong_names_options_and_items_are_refused() -> None:
    pair = SentencePair("0", "race", "the white cat", "the black cat", "stereo")
    with pytest.raises(ConfigError, match="did you mean"):
        measure(Bigram(), "crowspairs", words_tokenizer())
    with pytest.raises(ConfigError, match="cannot be measured with these options"):
        told(Bigram(), "crows_pairs", [pair], scorin="sum")
    with pytest.raises(ConfigError, match="`scoring`"):
        told(Bigram(), "crows_pairs", [pair], scoring="product")
    with pytest.raises(ConfigError, match="StereoTriple"):
        told(Bigram(), "stereoset", [pair])
    with pytest.raises(ConfigError, match="wrong type"):
        measure(Bigram(), [pair], words_tokenizer())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no row"):
        told(Bigram(), "crows_pairs", [pair])["rase"]


def test_a_sample_is_repeatable_and_said() -> None:
    data = BiasData(
        "crows_pairs", tuple(SentencePair(str(i), "race", "the white cat", "the black cat", "stereo") for i in range(30)), "by hand"
    )
    assert [item.id for item in data.sample(4, 1)] == [item.id for item in data.sample(4, 1)] != [item.id for item in data.sample(4, 2)]
    assert "a sample of 4 of 30 items, seed 1" in data.sample(4, 1).notes and data.sample(30) is data
    with pytest.raises(ConfigError):
        data.sample(0)
    with pytest.raises(ConfigError, match="no such group"):
        data.only("gender")
