"""Rows know their response; batches pad either side."""

import warnings

import pytest
import torch
from edits.edit_helpers import subwords
from tiny_tokenizer import tiny_tokenizer as make

from steer.errors import TokenizerError
from steer.model.context import CHAT_ROLES
from steer.model.tokens import JoinedTextWarning, Row, collate, encode, encode_chat, pad_id, plain


def test_a_chat_turn_is_the_template_and_the_answer_with_its_end():
    tokenizer = make()
    row = encode(tokenizer, "hello dog", "the cat ran")
    assert tokenizer.decode(row.ids[: row.prompt]).split() == ["<user>", "hello", "dog", "<assistant>"]
    assert tokenizer.decode(row.ids[row.prompt :]).split() == ["the", "cat", "ran", "<eos>"]
    assert row.response == 4 and encode(tokenizer, "hello dog").response == 0
    tokenizer.chat_template = None
    assert tokenizer.decode(encode(tokenizer, "hello dog", "yes").ids).split() == ["hello", "dog", "yes", "<eos>"]


def test_prompt_and_answer_side_by_side_are_warned_about():
    """Without a template texts are joined as they are; words of a whitespace tokenizer are apart anyway."""
    tokenizer = subwords(" yes")
    with pytest.warns(JoinedTextWarning, match="nothing stands between"):
        encode(tokenizer, "is it?", "yes")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompt, answer in (("is it?", " yes"), ("is it?\n", "yes"), ("is it?", "\nyes"), ("is it?", None)):
            encode(tokenizer, prompt, answer)
        words = make()
        words.chat_template = None
        encode(words, "hello dog", "yes")


def test_running_text_counts_from_its_second_token():
    row = plain(make(), "the cat ran")
    assert (row.prompt, row.response) == (1, 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    batch = collate([Row((5, 6, 7), 1), Row((8, 9), 2)], pad=0, side=side)
    if side == "right":
        assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]] and batch["labels"].tolist() == [[-100, 6, 7], [-100] * 3]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    else:
        assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 8, 9]] and batch["labels"].tolist() == [[-100, 6, 7], [-100] * 3]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]


def test_long_rows_are_cut():
    batch = collate([Row((5, 6, 7, 8), 2), Row((9, 9, 9), 3)], pad=0, max_length=2)
    assert batch["input_ids"].tolist() == [[5, 6], [9, 9]] and torch.all(batch["labels"] == -100)


def test_tokenizers_that_cannot_serve_are_named():
    tokenizer = make()
    assert pad_id(tokenizer) == 0
    tokenizer.pad_token = None
    with pytest.raises(TokenizerError, match=r"no pad token[\s\S]*tokenizer.pad_token = tokenizer.eos_token"):
        pad_id(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match="gives no tokens"):
        encode(tokenizer, "")
    with pytest.raises(TokenizerError, match="fewer than two"):
        plain(tokenizer, "cat")


# ---- conversations


def roles_of(tokenizer, messages, **options) -> list[tuple[str, str]]:
    tokens, roles = encode_chat(tokenizer, messages, **options)
    return [(tokenizer.decode([token]), CHAT_ROLES[role]) for token, role in zip(tokens, roles, strict=True)]


TURNS = [{"role": "user", "content": "who the dog"}, {"role": "assistant", "content": "a dog"}, {"role": "user", "content": "no"}]


def test_every_token_of_a_conversation_belongs_to_a_turn(tiny_tokenizer):
    tokens_and_roles = roles_of(tiny_tokenizer, TURNS)
    assert [role for _, role in tokens_and_roles] == ["user"] * 4 + ["assistant"] * 4 + ["user"] * 2
    assert tokens_and_roles[:5] == [("<user>", "user"), ("who", "user"), ("the", "user"), ("dog", "user"), ("<assistant>", "assistant")]
    assert roles_of(tiny_tokenizer, TURNS, add_generation_prompt=True) == [*tokens_and_roles, ("<assistant>", "assistant")]
    assert encode_chat(tiny_tokenizer, []) == ((), ())


def test_what_a_template_says_by_itself_is_the_systems(tiny_tokenizer):
    tiny_tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<bos> <system> be good {% endif %}" + tiny_tokenizer.chat_template
    )
    tokens_and_roles = roles_of(tiny_tokenizer, TURNS)
    assert [role for _, role in tokens_and_roles] == ["system"] * 4 + ["user"] * 4 + ["assistant"] * 4 + ["user"] * 2
    own = [{"role": "system", "content": "be bad"}, *TURNS]
    assert [role for _, role in roles_of(tiny_tokenizer, own)] == ["system"] * 3 + ["user"] * 4 + ["assistant"] * 4 + ["user"] * 2


def test_conversations_that_cannot_be_told_apart_are_named(tiny_tokenizer):
    with pytest.raises(TokenizerError, match=r"unknown chat role[\s\S]*found: dog"):
        encode_chat(tiny_tokenizer, [{"role": "dog", "content": "no"}])
    tiny_tokenizer.chat_template = "{% for message in messages[-2:] %}<{{ message['role'] }}> {{ message['content'] }} {% endfor %}"
    with pytest.raises(TokenizerError, match=r"rewrites earlier turns[\s\S]*no place that is turn 1"):
        encode_chat(tiny_tokenizer, TURNS)
    tiny_tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match="no chat template"):
        encode_chat(tiny_tokenizer, TURNS)
