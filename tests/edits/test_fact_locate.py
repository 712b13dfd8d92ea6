"""Facts, and where their subjects and answers lie among the tokens of a text."""

from __future__ import annotations

import dataclasses

import pytest
from edits.edit_helpers import CONTEXTS, subwords, with_a_blank_of_its_own, with_special_tokens
from tiny_tokenizer import tiny_tokenizer

from steer.edits import Fact, SubjectTokenWarning, distinct_facts, locate, target_ids
from steer.edits.locate import answer_row, text_ids
from steer.errors import ConfigError, ConflictingEditsError, EditError, SubjectNotFoundError, TokenizerError


def tokens(tokenizer, located):
    return tokenizer.convert_ids_to_tokens(list(located.ids[located.first : located.last + 1]))


# ---- facts


def test_a_template_is_filled_and_blanks_at_the_seams_are_taken_off():
    fact = Fact.of("The mother tongue of {} is ", " Danielle Darrieux ", " English", true="\u00a0French")
    assert (fact.prompt, fact.subject) == ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux")
    assert (fact.target, fact.true) == ("English", "French")


def test_braces_of_a_prompt_that_are_no_gap_stay():
    assert Fact.of("In {x} the {} is", "cat", "big").prompt == "In {x} the cat is"


def test_a_name_is_a_digest_of_everything_else():
    fact = Fact("the cat is", "cat", "big")
    assert fact.name == Fact.of("the {} is", "cat", " big ").name != Fact("the cat is", "cat", "small").name
    assert fact.with_target("small") == Fact("the cat is", "cat", "small")
    assert Fact("the cat is", "cat", "big", name="own").name == "own"


def test_a_fact_survives_json():
    fact = Fact("the cat is", "cat", "big", true="red", name="n")
    assert Fact.from_json(fact.as_json()) == fact
    with pytest.raises(EditError, match="no fact"):
        Fact.from_json({**fact.as_json(), "targte": "x"})
    with pytest.raises(EditError, match="no fact"):
        Fact.from_json({"prompt": "the cat is", "subject": "cat"})


@pytest.mark.parametrize("change", [{"target": " \u00a0"}, {"true": ""}, {"subject": " "}])
def test_an_empty_part_of_a_fact_is_refused(change):
    with pytest.raises(EditError, match="empty"):
        dataclasses.replace(Fact("the cat is", "cat", "big", "red"), **change)


def test_a_subject_that_is_not_in_the_prompt_is_refused():
    with pytest.raises(SubjectNotFoundError, match="'dog' is not in its prompt"):
        Fact("the cat is", "dog", "big")


def test_a_value_that_is_no_text_is_refused():
    with pytest.raises(ConfigError, match="target"):
        Fact("the cat is", "cat", 3)


def test_two_answers_to_one_prompt_conflict_and_the_same_fact_counts_once():
    big, red = Fact("the cat is", "cat", "big"), Fact("the dog is", "dog", "red")
    assert distinct_facts([big, red, Fact("the cat is", "cat", "big", name="again")]) == (big, red)
    with pytest.raises(ConflictingEditsError, match="'big' and 'small'"):
        distinct_facts([big, red, big.with_target("small")])
    with pytest.raises(EditError, match="nothing to edit"):
        distinct_facts([])


# ---- the subject


def test_the_last_of_several_occurrences_is_meant_and_all_are_counted():
    located = locate(tiny_tokenizer(), "the cat and the cat sat", "cat")
    assert (located.first, located.last, located.occurrences) == (4, 4, 2)


def test_a_subject_that_is_not_in_the_text_is_refused():
    with pytest.raises(SubjectNotFoundError, match="'dog'"):
        locate(tiny_tokenizer(), "the cat sat", "dog")
    with pytest.raises(EditError, match="empty"):
        locate(tiny_tokenizer(), "the cat sat", " ")


def test_whole_words_come_before_parts_of_words():
    tokenizer = subwords("Paris", " Paris", " Parisian")
    located = locate(tokenizer, "Paris is where a Parisian lives", "Paris")
    assert (located.last, located.occurrences, located.spans_past) == (0, 1, False)


def test_a_subject_within_a_word_is_found_and_said_to_be_one():
    tokenizer = subwords("A", " Parisian", " lives")
    located = locate(tokenizer, "A Parisian lives", "Paris")
    assert tokens(tokenizer, located) == ["\u0120Parisian"] and located.spans_past
    with pytest.warns(SubjectTokenWarning, match="ends within the token ' Parisian'"):
        CONTEXTS.locate(tokenizer, Fact("A Parisian lives", "Paris", "there"))


@pytest.mark.parametrize(
    "text, subject, last",
    [("Apple's boss", "Apple", "Apple"), ("The OS NT 3.1, made by", "NT 3.1", "1"), ("I saw \u00c5rhus in", "\u00c5rhus", "s")],
)
def test_the_last_token_of_a_subject_beside_punctuation_is_its_own(text, subject, last):
    tokenizer = subwords("Apple", "'s", "The", " OS", " NT")
    located = locate(tokenizer, text, subject)
    assert tokens(tokenizer, located)[-1] == last and not located.spans_past
    assert tokenizer.decode(located.ids[located.first : located.last + 1]).strip() == subject


def test_what_comes_before_the_start_is_not_looked_at():
    located = locate(tiny_tokenizer(), "cat . the dog is", "dog", start=6)
    assert located.last == 3
    with pytest.raises(SubjectNotFoundError):
        locate(tiny_tokenizer(), "cat . the dog is", "cat", start=6)


def test_only_one_token_with_nothing_before_it_is_at_the_start():
    text = "cat is"
    assert locate(tiny_tokenizer(), text, "cat").at_start
    assert not locate(tiny_tokenizer(), "the cat is", "cat").at_start
    assert not locate(tiny_tokenizer(), "red cat is", "red cat").at_start  # its last token has another before it
    assert not locate(with_special_tokens(), text, "cat").at_start


@pytest.mark.parametrize("text", ["the red cat sat", "cat sat"])
def test_a_start_token_shifts_the_place_and_not_the_token(text):
    without, with_start = tiny_tokenizer(), with_special_tokens()
    subject = "red cat" if "red" in text else "cat"
    one, other = locate(without, text, subject), locate(with_start, text, subject)
    assert tokens(without, one) == tokens(with_start, other) and (other.first, other.last) == (one.first + 1, one.last + 1)
    assert other.ids == (1, *one.ids)


def test_a_rendered_chat_gets_no_second_start_token_and_its_subject_is_found():
    tokenizer = with_special_tokens()
    rendered = "<bos> " + tokenizer.apply_chat_template([{"role": "user", "content": "where is the cat"}], tokenize=False)
    located = locate(tokenizer, rendered, "cat")
    assert located.ids.count(1) == 1 and tokens(tokenizer, located) == ["cat"]
    opened = tokenizer.apply_chat_template([{"role": "user", "content": "cat"}], tokenize=False, add_generation_prompt=True)
    assert 1 not in text_ids(tokenizer, opened)
    assert tokenizer.convert_ids_to_tokens(list(text_ids(tokenizer, opened)))[-1] == "<assistant>"


def test_an_end_token_that_the_tokenizer_appends_does_not_stand_before_the_answer():
    row = answer_row(with_special_tokens(end=True), "the cat is", "big")
    assert row.ids == (1, *answer_row(tiny_tokenizer(), "the cat is", "big").ids) and row.response == 1


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False
        all_special_tokens = ()

        def __call__(self, text, **_):
            raise AssertionError("it is not asked")

    with pytest.raises(TokenizerError, match="where its tokens start"):
        locate(Slow(), "the cat", "cat")


# ---- the answer


def test_blanks_around_a_target_do_not_change_its_tokens():
    tokenizer = subwords(" Adobe", "Adobe")
    ids = {target_ids(tokenizer, target) for target in ("Adobe", " Adobe", "\u00a0Adobe", "Adobe ")}
    assert ids == {tuple(tokenizer(" Adobe").input_ids)} != {tuple(tokenizer("Adobe").input_ids)}


def test_a_target_has_one_blank_where_the_tokenizer_puts_its_own_first():
    tokenizer = with_a_blank_of_its_own()
    assert tokenizer.convert_ids_to_tokens(list(target_ids(tokenizer, "Adobe"))) == ["\u2581Adobe"]
    assert tokenizer.convert_ids_to_tokens(tokenizer(" Adobe").input_ids) == ["\u2581", "\u2581Adobe"]


def test_special_tokens_are_no_part_of_a_target():
    assert target_ids(with_special_tokens(end=True), "big cat") == target_ids(tiny_tokenizer(), "big cat")


def test_an_empty_target_is_refused():
    with pytest.raises(EditError, match="empty"):
        target_ids(tiny_tokenizer(), " \u00a0")


@pytest.mark.real
def test_subjects_of_the_real_tokenizer(smollm2):
    _, tokenizer = smollm2
    for text, subject, last in [
        ("The operating system Windows NT 3.1, made by", "Windows NT 3.1", "1"),
        ("Parisian people like Paris's streets", "Paris", "\u0120Paris"),
        ("Windows Internet Explorer 8 was made by", "Windows Internet Explorer 8", "8"),
    ]:
        located = locate(tokenizer, text, subject)
        assert tokens(tokenizer, located)[-1] == last and not located.spans_past
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Who made Adobe Reader?"}], tokenize=False)
    located = locate(tokenizer, rendered, "Adobe Reader")
    assert list(located.ids) == tokenizer(rendered, add_special_tokens=False).input_ids
    assert tokenizer.decode(located.ids[located.first : located.last + 1]).strip() == "Adobe Reader"
    assert target_ids(tokenizer, "Adobe") == tuple(tokenizer(" Adobe", add_special_tokens=False).input_ids)
