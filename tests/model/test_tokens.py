"""Rows know their response; batches pad either side."""

import pytest
import torch
from tiny_tokenizer import tiny_tokenizer

from steer.errors import TokenizerError
from steer.model.tokens import Row, collate, encode, pad_id, plain


def test_a_chat_turn_is_the_template_and_the_answer_with_its_end():
    tokenizer = tiny_tokenizer()
    row = encode(tokenizer, "hello dog", "the cat ran")
    assert tokenizer.decode(row.ids[: row.prompt]).split() == ["<user>", "hello", "dog", "<assistant>"]
    assert tokenizer.decode(row.ids[row.prompt :]).split() == ["the", "cat", "ran", "<eos>"]
    assert row.response == 4 and encode(tokenizer, "hello dog").response == 0
    tokenizer.chat_template = None
    assert tokenizer.decode(encode(tokenizer, "hello dog", "yes").ids).split() == ["hello", "dog", "yes", "<eos>"]


def test_running_text_counts_from_its_second_token():
    row = plain(tiny_tokenizer(), "the cat ran")
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
    tokenizer = tiny_tokenizer()
    assert pad_id(tokenizer) == 0
    tokenizer.pad_token = None
    with pytest.raises(TokenizerError, match=r"no pad token[\s\S]*tokenizer.pad_token = tokenizer.eos_token"):
        pad_id(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match="gives no tokens"):
        encode(tokenizer, "")
    with pytest.raises(TokenizerError, match="fewer than two"):
        plain(tokenizer, "cat")
