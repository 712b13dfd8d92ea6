"""A whitespace tokenizer for the tiny models: 96 words, padding, end of sequence and a chat template, made in memory."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>"]
WORDS = (
    "the a cat dog sat ran on in under mat house tree and or not is was be to of good bad nice rude warm cold big small red blue "
    "green one two three four five six seven eight nine ten yes no please thanks hello goodbye what where when who why how you i we they "
    "he she it this that my your our food water fire earth sun moon star day night "
    "love hate like want need can will may say tell ask song game . ?"
).split()

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }} <eos>{% endgeneration %} "
    "{% else %}{{ message['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tiny_tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """Words of `WORDS` by whitespace; anything else is <unk>. Ids 0, 1 and 2 are padding, start and end, as in `families`."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
        padding_side=padding_side,
        model_max_length=128,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
