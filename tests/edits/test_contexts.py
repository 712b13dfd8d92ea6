"""Contexts: texts before a prompt, drawn from the model, and their weights in a key."""

from __future__ import annotations

import pytest
import torch
from edits.edit_helpers import CONTEXTS, FACTS, model_of
from tiny_tokenizer import tiny_tokenizer

from steer.edits import WEIGHTINGS, Contexts, Fact, FirstTokenSubjectWarning, contexts, sample_contexts
from steer.errors import ConfigError, EditError, NonFiniteError
from steer.model.words import holds


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


def test_contexts_follow_from_their_seed_alone(model):
    drawn = sample_contexts(model, tiny_tokenizer(), seed=3)
    torch.rand(1)
    assert sample_contexts(model, tiny_tokenizer(), seed=3) == drawn
    assert sample_contexts(model, tiny_tokenizer(), seed=4).prefixes != drawn.prefixes
    assert len(drawn.prefixes) == 5 and drawn.seed == 3


def test_drawing_leaves_the_model_and_the_random_state_alone():
    model = model_of("llama").train()
    before = torch.get_rng_state()
    sample_contexts(model, tiny_tokenizer(), count=2, tokens=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_contexts_say_no_special_tokens_and_have_the_length_asked_for(model):
    drawn = sample_contexts(model, tiny_tokenizer(), count=7, tokens=4)
    assert [len(prefix.split()) for prefix in drawn.prefixes] == [4] * 7  # the starts are unknown to this tokenizer
    assert not any("<" in prefix for prefix in drawn.prefixes)


def test_a_context_with_a_word_to_avoid_is_drawn_again(model):
    drawn = sample_contexts(model, tiny_tokenizer(), seed=0)
    word = drawn.prefixes[0].split()[3]
    again = sample_contexts(model, tiny_tokenizer(), seed=0, avoid=[word.upper()])
    assert len(again.prefixes) == 5 and not any(holds(prefix, word) for prefix in again.prefixes)
    clean = [place for place, prefix in enumerate(drawn.prefixes) if not holds(prefix, word)]
    assert [again.prefixes[place] for place in clean] == [drawn.prefixes[place] for place in clean]
    with pytest.raises(EditError, match="no context"):
        sample_contexts(model, tiny_tokenizer(), count=1, tokens=2, avoid=list(tiny_tokenizer().get_vocab()))


def test_only_whole_words_are_avoided(model, monkeypatch):
    monkeypatch.setattr(contexts, "_continuations", lambda model, tokenizer, starts, *_: ["the category of New York."] * len(starts))
    assert len(sample_contexts(model, tiny_tokenizer(), count=1, avoid=["cat", " "])) == 2
    for word in ("Category", " new york "):
        with pytest.raises(EditError, match="no context"):
            sample_contexts(model, tiny_tokenizer(), count=1, avoid=[word])


def test_braces_and_line_breaks_are_taken_out(model, monkeypatch):
    monkeypatch.setattr(contexts, "_continuations", lambda model, tokenizer, starts, *_: [" the {} {x}\n\nday" for _ in starts])
    assert sample_contexts(model, tiny_tokenizer(), count=2).prefixes == ("the x day",) * 2


def test_the_texts_of_a_prompt_are_the_prompt_alone_and_behind_each_context():
    assert Contexts(("you and i", "hello")).texts("the cat is") == ("the cat is", "you and i. the cat is", "hello. the cat is")
    assert len(Contexts(())) == 1


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("plain", [True, False])
def test_the_weights_of_every_key_sum_to_one(weighting, plain):
    weights = CONTEXTS.weights(weighting, plain=plain)
    assert weights.shape == (2 if weighting == "both" and plain else 1, 4)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    assert plain or not weights[:, 0].any()


def test_the_plain_prompt_has_half_of_the_weight_or_a_share_of_it():
    assert CONTEXTS.weights("plain_half")[0, 0] == 0.5 and CONTEXTS.weights("mean")[0, 0] == 0.25
    assert CONTEXTS.weights("plain").tolist() == [[1, 0, 0, 0]]
    assert Contexts(()).weights("plain_half", plain=False).tolist() == [[1]] == Contexts(()).weights("both").tolist()
    with pytest.raises(ConfigError, match="plain_half"):
        CONTEXTS.weights("plainhalf")


def test_the_subject_is_that_of_the_prompt_even_where_a_context_says_it_too():
    said = Contexts(("my cat is red",))
    for fact in (Fact.of("the {} is", "cat", "big"), FACTS[0]):
        for text, located in zip(said.texts(fact.prompt), said.locate(tiny_tokenizer(), fact), strict=True):
            n_before = len(tiny_tokenizer()(text).input_ids) - len(tiny_tokenizer()(fact.prompt).input_ids)
            plain = said.locate(tiny_tokenizer(), fact)[0]
            assert (located.first, located.last) == (n_before + plain.first, n_before + plain.last)


def test_a_subject_at_the_very_start_is_warned_of():
    with pytest.warns(FirstTokenSubjectWarning, match="'cat' is the first token of 'cat is'"):
        CONTEXTS.locate(tiny_tokenizer(), Fact("cat is", "cat", "big"))
    with pytest.warns(FirstTokenSubjectWarning, match="nearly that of any other"):
        Contexts(()).locate(tiny_tokenizer(), Fact("cat is", "cat", "big"))


def test_contexts_survive_json():
    assert Contexts.from_json(CONTEXTS.to_json()) == CONTEXTS and Contexts.from_json({"prefixes": [], "seed": 2}) == Contexts((), 2)
    with pytest.raises(EditError, match="no contexts"):
        Contexts.from_json({"prefixes": "the"})


def test_wrong_numbers_and_a_broken_model_are_refused():
    with pytest.raises(ConfigError, match="tokens"):
        sample_contexts(model_of("llama"), tiny_tokenizer(), tokens=0)
    broken = model_of("llama")
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    with pytest.raises(NonFiniteError, match="logits"):
        sample_contexts(broken, tiny_tokenizer())
