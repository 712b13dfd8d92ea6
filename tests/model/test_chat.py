"""Chat templates of the kinds in use, on a tokenizer of characters and marks: turns end as templates end them, each token has a role."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steer.errors import ConfigError, SteerError, TokenizerError
from steer.model.chat import PROBE
from steer.model.context import CHAT_ROLES
from steer.model.load import load
from steer.model.tokens import encode, encode_chat

MARKS = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<turn>", "</turn>", "[INST]", "[/INST]"]
OPENING = "{% if add_generation_prompt %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    f"{OPENING}<|im_start|>assistant\n{{% endif %}}"
)
HEADERS = (  # Llama 3: marks around the role, content trimmed, calls instead of content, results from "ipython"
    "<bos>{% for m in messages %}<|head|>{{ 'ipython' if m.role == 'tool' else m.role }}<|/head|>\n\n"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
    "{% elif m.content is mapping %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}<|eot|>{% endfor %}"
    f"{OPENING}<|head|>assistant<|/head|>\n\n{{% endif %}}"
)
GEMMA = (  # no system, strict order, another name for the assistant
    "<bos>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant take turns') }}{% endif %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}</turn>\n{% endfor %}"
    f"{OPENING}<turn>model\n{{% endif %}}"
)
THINKING = (  # Qwen 3: thoughts before the last question are dropped, the last answer has one, empty or not, results are a user's
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set said = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% for c in m.tool_calls or [] %}\n<call>{{ c.function.name }}</call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}\n<result>"
    "{{ m.content }}</result>{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    f"{OPENING}<|im_start|>assistant\n{{% endif %}}"
)
FIRST_INST = (  # Llama 2 and the first Mistral: the system speaks within the first user's turn, and the answer ends the text
    "{% set sys = messages[0].content if messages[0].role == 'system' else '' %}{% set rest = messages[1:] if sys else messages %}<bos>"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] {{ sys + '\n\n' if sys and loop.first else '' }}{{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }}<eos>{% endif %}{% endfor %}"
)
LAST_INST = (  # the later Mistral: the system speaks within the last user's turn
    "{% set sys = messages[0].content if messages[0].role == 'system' else '' %}{% set rest = messages[1:] if sys else messages %}<bos>"
    "{% set asked = rest | selectattr('role', 'equalto', 'user') | list %}{% for m in rest %}{% if m.role == 'user' %}[INST]"
    "{{ sys + '\n\n' if sys and m == asked[-1] else '' }}{{ m.content }}[/INST]{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}"
)
PARTS = (  # vision-language models: content is a list of parts
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}<image>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    + f"{OPENING}<|im_start|>assistant\n{{% endif %}}"
)
OTHER_END = (  # gpt-oss: a system message of its own, and the last answer of all ends otherwise than those before it
    "<|start|>system<|message|>You are a machine.<|end|>{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' and not add_generation_prompt else '<|end|>' }}{% endfor %}"
    f"{OPENING}<|start|>assistant<|message|>{{% endif %}}"
)
END_OF_TEXT = (  # Phi 3: the end of text follows the last turn, whoever speaks in it
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<eos>{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "gemma": GEMMA,
    "thinking": THINKING,
    "first_inst": FIRST_INST,
    "last_inst": LAST_INST,
    "parts": PARTS,
}
ENDS = {
    "chatml": "<|im_end|>",
    "headers": "<|eot|>",
    "gemma": "</turn>",
    "thinking": "<|im_end|>",
    "first_inst": "<eos>",
    "last_inst": "<eos>",
    "parts": "<|im_end|>",
}


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    """One token for each mark and each character."""
    characters = [chr(code) for code in (10, *range(32, 127))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *MARKS, *characters])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", additional_special_tokens=MARKS[2:])
    tokenizer.chat_template = template
    return tokenizer


def stretches(template: str, messages: list[dict[str, Any]], **options: Any) -> list[tuple[str, str]]:
    """Role and text of each run of tokens with one role."""
    tokenizer = tokenizer_with(template)
    runs: list[tuple[str, str]] = []
    ids, roles = encode_chat(tokenizer, messages, **options)
    for token, role in zip(ids, roles, strict=True):
        text = tokenizer.convert_ids_to_tokens(token)
        if runs and runs[-1][0] == CHAT_ROLES[role]:
            runs[-1] = (CHAT_ROLES[role], runs[-1][1] + text)
        else:
            runs.append((CHAT_ROLES[role], text))
    return runs


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


SYSTEM, ASKED, ANSWERED, AGAIN = said("system", "be kind"), said("user", "hi"), said("assistant", "hello"), said("user", "why")
CALL = said("assistant", None, tool_calls=[{"type": "function", "function": {"name": "lookup", "arguments": {"x": 1}}}])


# ---- one turn


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_ends_as_the_template_ends_it(name):
    tokenizer = tokenizer_with(TEMPLATES[name])
    row = encode(tokenizer, "hi", "hello")
    response = "".join(tokenizer.convert_ids_to_tokens(row.ids[row.prompt :]))
    space = " " if name == "first_inst" else ""  # which the template puts after a turn that it opened without it
    assert response == f"{space}hello{ENDS[name]}"
    whole = tokenizer.apply_chat_template([ASKED, ANSWERED] if name != "parts" else _as_parts([ASKED, ANSWERED]), tokenize=False)
    assert whole.startswith("".join(tokenizer.convert_ids_to_tokens(row.ids)))


def test_thoughts_in_an_answer_are_set_as_the_template_sets_them():
    tokenizer = tokenizer_with(THINKING)
    row = encode(tokenizer, "hi", "<think>well</think>hello")
    assert "".join(tokenizer.convert_ids_to_tokens(row.ids[row.prompt :])) == "<think>\nwell\n</think>\n\nhello<|im_end|>"


def test_a_template_without_marks_ends_with_the_end_of_text():
    tokenizer = tokenizer_with("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert encode(tokenizer, "hi", "hello").ids[-1] == tokenizer.eos_token_id
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}###{% endfor %}"
    assert "".join(tokenizer.convert_ids_to_tokens(encode(tokenizer, "hi", "hello").ids[-8:])) == "hello###"


def test_a_template_that_does_not_say_the_answer_is_refused():
    with pytest.raises(TokenizerError, match="rewrites"):
        encode(tokenizer_with("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"), "hi", "hello")


# ---- conversations


def test_marks_around_every_turn():
    assert stretches(CHATML, [SYSTEM, ASKED, ANSWERED, AGAIN], add_generation_prompt=True) == [
        ("system", "<|im_start|>system\nbe kind<|im_end|>\n"),
        ("user", "<|im_start|>user\nhi<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\nhello<|im_end|>\n"),
        ("user", "<|im_start|>user\nwhy<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\n"),
    ]


def test_a_template_without_a_system_says_so_before_anything_else():
    with pytest.raises(TokenizerError, match=r"(?s)refuses.*no system.*first user's turn"):
        stretches(GEMMA, [SYSTEM, ASKED])
    with pytest.raises(TokenizerError, match=r"(?s)refuses.*take turns.*order"):
        stretches(GEMMA, [ASKED, AGAIN])
    runs = stretches(GEMMA, [ASKED, ANSWERED, AGAIN], add_generation_prompt=True)
    assert runs[0] == ("system", "<bos>")
    assert runs[1:3] == [("user", "<turn>user\nhi</turn>\n"), ("assistant", "<turn>model\nhello</turn>\n")]
    assert runs[-1] == ("assistant", "<turn>model\n")


@pytest.mark.parametrize("thought", [{"reasoning_content": "hm"}, {}])
def test_thoughts_that_are_dropped_from_earlier_turns(thought):
    answer = said("assistant", "hello" if thought else "<think>\nhm\n</think>\n\nhello", **thought)
    assert stretches(THINKING, [ASKED, answer, AGAIN, answer]) == [
        ("user", "<|im_start|>user\nhi<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\nhello<|im_end|>\n"),
        ("user", "<|im_start|>user\nwhy<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\n<think>\nhm\n</think>\n\nhello<|im_end|>\n"),
    ]


def test_tools_and_their_results_in_a_thinking_conversation():
    results = [said("tool", "one"), said("tool", "two")]
    runs = stretches(THINKING, [ASKED, CALL | {"reasoning_content": "look"}, *results, ANSWERED, AGAIN], add_generation_prompt=True)
    assert runs == [
        ("user", "<|im_start|>user\nhi<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\n<call>lookup</call><|im_end|>\n"),
        ("tool", "<|im_start|>user<result>one</result><result>two</result><|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\nhello<|im_end|>\n"),
        ("user", "<|im_start|>user\nwhy<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\n"),
    ]


@pytest.mark.parametrize("template", [OTHER_END, END_OF_TEXT])
@pytest.mark.parametrize("opened", [False, True])
def test_a_template_that_ends_the_last_turn_otherwise(template, opened):
    turns = stretches(template, [ASKED, ANSWERED, AGAIN, ANSWERED], add_generation_prompt=opened)
    if template == OTHER_END:
        assert turns.pop(0) == ("system", "<|start|>system<|message|>You are a machine.<|end|>")
    assert [role for role, _ in turns] == ["user", "assistant", "user", "assistant"]
    start, end = ("<|start|>", "<|end|>") if template == OTHER_END else ("<|im_start|>", "<|im_end|>")
    for (_, text), content in zip(turns, ("hi", "hello", "why", "hello"), strict=True):
        assert text.startswith(start) and content in text and text.count(start) <= 1 + opened
    assert all(end in text for _, text in turns[:3])


def test_a_space_before_a_word_does_not_move_its_token():
    """In a tokenizer of bytes the space is part of the token; here it is the last mark of the user's turn."""
    _, tokenizer = load("smollm2-135m")
    tokenizer.chat_template = (
        "{% for m in messages[1:] %}[INST] {% if loop.first %}{{ messages[0].content }}. {% endif %}{{ m.content }}{% endfor %}"
    )
    tokens, roles = encode_chat(tokenizer, [SYSTEM, ASKED])
    system = [token for token, role in zip(tokens, roles, strict=True) if CHAT_ROLES[role] == "system"]
    assert tokenizer.decode(system).strip() == "be kind"


def test_words_that_turns_are_found_by_may_be_said():
    turns = stretches(CHATML, [said("user", f"what is a {PROBE}"), said("assistant", f"{PROBE} is a word")])
    assert [role for role, _ in turns][-2:] == ["user", "assistant"]
    assert PROBE in turns[-2][1] and PROBE in turns[-1][1]
    assert encode(tokenizer_with(CHATML), "say it", PROBE).response == len(PROBE) + 1


def test_a_system_that_speaks_within_a_users_turn():
    assert stretches(FIRST_INST, [SYSTEM, ASKED, ANSWERED, AGAIN]) == [
        ("user", "<bos>[INST] "),
        ("system", "be kind"),
        ("user", "\n\nhi [/INST]"),
        ("assistant", " hello<eos>"),
        ("user", "[INST] why [/INST]"),
    ]
    runs = stretches(LAST_INST, [SYSTEM, ASKED, ANSWERED, AGAIN])
    assert ("system", "be kind") in runs and ("assistant", "hello<eos>") in runs and ("user", "\n\nwhy[/INST]") in runs


def test_calls_and_results():
    runs = stretches(HEADERS, [ASKED, CALL, said("tool", {"y": 2}), ANSWERED])
    assert [role for role, _ in runs] == ["system", "user", "assistant", "tool", "assistant"]
    assert '"lookup"' in runs[2][1] and '{"y": 2}' in runs[3][1]


@pytest.mark.parametrize(
    ("message", "role"),
    [
        (said("developer", "x"), "system"),
        (said("function", "x"), "tool"),
        (said("ipython", "x"), "tool"),
        (said("user", [{"type": "text", "text": "x"}]), "user"),
        (said("user", ["x"]), "user"),
        (said("assistant", ""), "assistant"),
        (CALL, "assistant"),
        ({"role": "assistant", "tool_calls": CALL["tool_calls"]}, "assistant"),
        ({"role": "assistant", "reasoning_content": "hm"}, "assistant"),
    ],
)
def test_every_form_of_a_message(message, role):
    runs = stretches(CHATML, [ASKED, message])
    assert runs[0][0] == "user" and runs[0][1].startswith("<|im_start|>user\nhi<|im_end|>\n") and len(runs) == (1 if role == "user" else 2)
    assert runs[-1][0] == role and runs[-1][1].endswith("<|im_end|>\n")
    assert not message.get("content") or "\nx<|im_end|>\n" in runs[-1][1]


def _as_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [said(message["role"], [{"type": "text", "text": message["content"]}]) for message in messages]


def test_text_and_parts_are_read_alike_by_a_template_that_reads_one_of_them():
    turns = [SYSTEM, ASKED, ANSWERED]
    for template in (CHATML, PARTS):
        assert stretches(template, turns) == stretches(template, _as_parts(turns)) == stretches(CHATML, turns)
    with_image = said("user", [{"type": "image"}, {"type": "text", "text": "hi"}])
    assert stretches(PARTS, [with_image, ANSWERED])[0] == ("user", "<|im_start|>user\n<image>hi<|im_end|>\n")
    with pytest.raises(TokenizerError, match=r"(?s)text only.*image"):
        stretches(CHATML, [with_image])


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([said("dog", "x")], TokenizerError),
        ([{"content": "x"}], ConfigError),
        ([said("user", None)], ConfigError),
        ([{"role": "assistant"}], ConfigError),
        ([said("user", 3)], ConfigError),
        ([said("user", [3])], ConfigError),
        (["hi"], ConfigError),
        ("hi", ConfigError),
        ([said(["user"], "x")], SteerError),
    ],
)
def test_what_is_no_message_is_a_typed_error(messages, error):
    with pytest.raises(error):
        encode_chat(tokenizer_with(CHATML), messages)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m.role != 'tool' %}<turn>{{ m.content or '' }}</turn>{% endfor %}",  # leaves the result out
        "{% for m in messages %}<turn>{{ m.content if m.role != 'tool' else '' }}</turn>{% endfor %}",  # and what it says
        "{% for m in messages %}{{ m.content.nothing.here }}{% endfor %}",
        "{% for m in messages %}{{ m.content + 3 }}{% endfor %}",
        "{% for m in messages %}",
    ],
)
def test_a_template_that_leaves_a_message_out_or_fails_is_a_typed_error(template):
    with pytest.raises(TokenizerError):
        encode_chat(tokenizer_with(template), [ASKED, said("tool", "one"), ANSWERED])


def test_calls_that_a_template_leaves_out_are_refused():
    with pytest.raises(TokenizerError, match="turn 2"):
        encode_chat(tokenizer_with("{% for m in messages %}<turn>{{ m.content or '' }}</turn>{% endfor %}"), [ASKED, CALL, ANSWERED])
