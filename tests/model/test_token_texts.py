"""Tokens of an answer make up its text, whatever the tokenizer does with spaces and with characters of several bytes."""

from __future__ import annotations

from tiny_tokenizer import tiny_tokenizer

from steer.model.token_texts import token_texts


def test_words_of_tokens_keep_their_spaces() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("the cat is good", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[1:2]) == "cat", "alone, a token loses its space"
    assert token_texts(tokenizer, ids) == ["the", " cat", " is", " good"]


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def test_a_character_of_several_tokens_belongs_to_the_last_of_them() -> None:
    assert token_texts(Bytes(), list("aé!".encode())) == ["a", "", "é", "!"]
