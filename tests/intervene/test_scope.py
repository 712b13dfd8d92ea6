"""Scopes against the same sets written out token by token, with Python's own slices."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hand import attachment_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steer.errors import ConfigError, ContextError
from steer.intervene import Add, Intervention, Plan
from steer.intervene.attachment import Attachment
from steer.intervene.scope import KINDS, Scope
from steer.intervene.scope_mask import ScopeMask
from steer.model.context import CHAT_ROLES, ForwardContext, Mask
from steer.model.context_builder import build_context

# ---- the reference: what is known about a token, and what each part of a scope says about it


@dataclass
class Token:
    """`size` and `part_size` are None for a decoded token, whose distance from the end nobody knows."""

    index: int
    size: int | None
    part: str
    part_index: int
    part_size: int | None
    last: bool
    id: int
    turn: str
    real: bool = True


@dataclass
class Window:
    text: str
    entries: slice | list[int]

    def holds(self, index: int, size: int | None) -> bool:
        if isinstance(self.entries, slice):
            start, stop = self.entries.start, self.entries.stop
            if size is None:
                return (start or 0) >= 0 and (stop is None or stop >= 0) and index in range(start or 0, 10**6 if stop is None else stop)
            return index in range(size)[self.entries]
        return any(index == entry if entry >= 0 else size is not None and index - size == entry for entry in self.entries)


@dataclass
class Named:
    """One selector."""

    kind: str
    window: Window | None = None
    listed: tuple[Any, ...] = ()

    @property
    def text(self) -> str:
        inner = self.window.text if self.window else ",".join(map(str, self.listed))
        return f"{self.kind}[{inner}]" if inner else self.kind

    def wants(self, token: Token, generating: bool) -> bool:
        match self.kind:
            case "all":
                return True
            case "last":
                return token.last
            case "positions":
                return self.window.holds(token.index, token.size)
            case "tokens":
                return token.id in self.listed
            case "role":
                return token.turn in self.listed
        if self.kind == "generated" and not generating:
            return False
        within = token.part == ("prompt" if self.kind == "prompt" else "response")
        return within and (self.window is None or self.window.holds(token.part_index, token.part_size))


@dataclass
class Wanted:
    include: list[list[Named]]
    exclude: list[list[Named]]
    half_life: float | None = None

    @property
    def text(self) -> str:
        unions = [self.include, *([selector] for selector in self.exclude)]
        text = "!".join("|".join("&".join(selector.text for selector in part) for part in union) for union in unions)
        return text if self.half_life is None else f"{text}~{self.half_life}"

    def wants(self, token: Token, generating: bool) -> bool:
        def some(union: list[list[Named]]) -> bool:
            return any(all(selector.wants(token, generating) for selector in part) for part in union)

        return token.real and some(self.include) and not some(self.exclude)

    def fade(self, token: Token) -> float:
        return 1.0 if self.half_life is None or token.part == "prompt" else 0.5 ** (token.part_index / self.half_life)


def windows(least: int) -> st.SearchStrategy[Window]:
    ends = st.none() | st.integers(least, 6)
    pairs = st.tuples(ends, ends).filter(lambda ends: any(range(size)[slice(*ends)] for size in range(13)))  # others are refused
    slices = pairs.map(lambda ends: Window(":".join("" if end is None else str(end) for end in ends), slice(*ends)))
    lists = st.lists(st.integers(least, 6), min_size=1, max_size=3)
    return slices | lists.map(lambda entries: Window(",".join(map(str, entries)), entries))


def selectors(least: int = -5, last: bool = True, roles: bool = True) -> st.SearchStrategy[Named]:
    """least: 0 where a prompt comes in parts, so that its end is not known; decoded responses never have a known end."""
    words = st.sampled_from(["all", "prompt", "response", "generated"] + ["last"] * last).map(Named)
    windowed = st.builds(Named, st.sampled_from(["prompt", "positions"]), windows(least))
    decoded = st.builds(Named, st.sampled_from(["response", "generated"]), windows(0))
    ids = st.builds(Named, st.just("tokens"), st.none(), st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple))
    turns = st.builds(Named, st.just("role"), st.none(), st.lists(st.sampled_from(CHAT_ROLES), min_size=1, max_size=2).map(tuple))
    return st.one_of(words, windowed, decoded, ids, *[turns] * roles)


def scopes(selector: st.SearchStrategy[Named]) -> st.SearchStrategy[Wanted]:
    parts = st.lists(st.lists(selector, min_size=1, max_size=2), min_size=1, max_size=2)
    half_lives = st.none() | st.sampled_from([1.0, 2.5, 64.0])
    return st.builds(Wanted, parts, st.lists(st.lists(selector, min_size=1, max_size=2), max_size=2), half_lives)


# ---- batches


@dataclass
class Text:
    prompt: int
    response: int
    seed: int

    def tokens(self) -> list[Token]:
        """Tokens of the text as in training, where both ends are known."""
        size = self.prompt + self.response
        parts = [("prompt", i, self.prompt) for i in range(self.prompt)] + [("response", i, self.response) for i in range(self.response)]
        return [Token(i, size, *part, i == size - 1, self.id(i), self.turn(i)) for i, part in enumerate(parts)]

    def id(self, index: int) -> int:
        return (self.seed * 7 + index * 3) % 10

    def turn(self, index: int) -> str:
        return CHAT_ROLES[(self.seed + index // 2) % 4]


GAP = Token(0, None, "none", 0, None, False, 0, "system", real=False)
TEXTS = st.lists(st.builds(Text, st.integers(1, 4), st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=3)


class Tokens(ScopeMask):
    """Masks a scope's tokens; notes lengths when the pass opens, as an attachment does."""

    def __init__(self, text: str) -> None:
        super().__init__(Scope.parse(text))

    def mask(self, ctx: ForwardContext) -> Mask:
        self.note_lengths(ctx)
        return super().mask(ctx)


def agrees(wanted: Wanted, rows: list[list[Token]], ctx: ForwardContext, generating: bool) -> None:
    scope = Tokens(wanted.text)
    mask, fade = scope.mask(ctx), scope.fade(ctx)
    mask = torch.full((ctx.batch, ctx.tokens), mask) if isinstance(mask, bool) else mask
    assert mask.tolist() == [[wanted.wants(token, generating) for token in row] for row in rows], wanted.text
    if wanted.half_life is None:
        assert fade is None
        return
    expected = torch.tensor([[wanted.fade(token) for token in row] for row in rows])
    real = torch.tensor([[token.real for token in row] for row in rows])
    assert fade.shape == real.shape and torch.allclose(fade[real], expected[real])


def columns(rows: list[list[Token]], value) -> Tensor:
    return torch.tensor([[value(token) for token in row] for row in rows])


def turns_of(rows: list[list[Token]]) -> Tensor:
    return columns(rows, lambda token: CHAT_ROLES.index(token.turn))


@given(TEXTS, scopes(selectors() | st.builds(Named, st.just("response"), windows(-5))), st.sampled_from(["left", "right"]), st.booleans())
def test_training_batches(texts, wanted, side, with_positions):
    width = max(text.prompt + text.response for text in texts)
    rows = []
    for text in texts:
        gap = [GAP] * (width - text.prompt - text.response)
        rows.append(gap + text.tokens() if side == "left" else text.tokens() + gap)
    inputs = {"input_ids": columns(rows, lambda token: token.id), "attention_mask": columns(rows, lambda token: int(token.real))}
    if with_positions:
        inputs["position_ids"] = columns(rows, lambda token: token.index)
    response = columns(rows, lambda token: token.part == "response")
    agrees(wanted, rows, build_context(inputs, response, turns=turns_of(rows)), False)
    inputs["labels"] = torch.where(response, 5, -100)
    agrees(wanted, rows, build_context(inputs, None, turns=turns_of(rows)), False)


@given(TEXTS, scopes(selectors() | st.builds(Named, st.just("response"), windows(-5))))
def test_packed_rows(texts, wanted):
    row = [token for text in texts for token in text.tokens()]
    inputs = {"input_ids": columns([row], lambda token: token.id), "position_ids": columns([row], lambda token: token.index)}
    inputs["labels"] = columns([row], lambda token: 5 if token.part == "response" else -100)
    agrees(wanted, [row], build_context(inputs, None, turns=turns_of([row])), False)


class Cache:
    """Cache of a settable length; a static one counts in a tensor once it holds something."""

    def __init__(self, static: bool) -> None:
        self.length, self.static = 0, static

    def get_seq_length(self):
        return torch.tensor(self.length) if self.static and self.length else self.length


class Generation:
    """The passes of one generation: prompts, whole or in parts, then one token a step.

    Args:
        side: of the padding; a row that is padded on the right goes on behind its gap, as in a loop of one's own.
    """

    def __init__(self, texts: list[Text], side: str, static: bool, beams: int = 1) -> None:
        self.texts, self.beams, self.cache = texts, beams, Cache(static)
        width = max(text.prompt for text in texts)
        self.rows = []
        for text in texts:
            gap = [GAP] * (width - text.prompt)
            prompt = [
                Token(i, text.prompt, "prompt", i, text.prompt, i == text.prompt - 1, text.id(i), text.turn(i)) for i in range(text.prompt)
            ]
            self.rows.append(gap + prompt if side == "left" else prompt + gap)

    def decode(self) -> None:
        """Appends a token to every row."""
        width = max(text.prompt for text in self.texts)
        for text, row in zip(self.texts, self.rows, strict=True):
            new = len(row) - width
            row.append(Token(text.prompt + new, None, "response", new, None, True, text.id(text.prompt + new), "assistant"))

    def context(self, tokens: int) -> tuple[ForwardContext, list[list[Token]]]:
        """Sends the next `tokens` columns through the model."""
        start, stop = self.cache.length, self.cache.length + tokens
        rows = [row[start:stop] for row in self.rows]
        many = [row[start:stop] for row in self.rows for _ in range(self.beams)]
        inputs = {"input_ids": columns(many, lambda token: token.id), "past_key_values": self.cache, "use_cache": True}
        mask = columns([row[:stop] for row in self.rows for _ in range(self.beams)], lambda token: int(token.real))
        if not bool(mask.all()):
            inputs["attention_mask"] = mask
        ctx = build_context(inputs, None, turns=turns_of(rows))
        self.cache.length = stop
        return ctx, many


@given(TEXTS, scopes(selectors()), st.sampled_from(["left", "right"]), st.booleans(), st.integers(0, 3), st.integers(1, 2))
def test_generation(texts, wanted, side, static, steps, beams):
    generation = Generation(texts, side, static, beams)
    ctx, rows = generation.context(len(generation.rows[0]))
    agrees(wanted, rows, ctx, True)
    for _ in range(steps):
        generation.decode()
        ctx, rows = generation.context(1)
        agrees(wanted, rows, ctx, True)


@given(TEXTS, scopes(selectors(0, last=False, roles=False)), st.booleans(), st.integers(2, 3))
def test_a_prompt_in_copied_parts(texts, wanted, static, chunk):
    """Only selectors that count from an end differ from one pass over the prompt, as long as no part is a single token."""
    generation = Generation(texts, "left", static)
    width = len(generation.rows[0])
    sizes = [chunk] * (width // chunk) + [width % chunk] * (width % chunk > 0)
    if len(sizes) > 1 and sizes[-1] == 1:
        sizes[-2:] = [chunk + 1]
    for size in sizes:
        generation.cache = copy.deepcopy(generation.cache)
        ctx, rows = generation.context(size)
        agrees(wanted, rows, ctx, True)
    for _ in range(2):
        generation.decode()
        ctx, rows = generation.context(1)
        agrees(wanted, rows, ctx, True)


def test_a_second_turn_on_the_same_cache_begins_a_new_response():
    generation = Generation([Text(4, 0, 1), Text(3, 0, 2)], "left", False)
    scope = Tokens("generated[:1]|prompt[5:]")
    scope.mask(generation.context(4)[0])
    for _ in range(2):
        generation.decode()
        scope.mask(generation.context(1)[0])
    for row in generation.rows:
        row += [Token(0, None, "prompt", 0, None, False, 1, "user")] * 2
    assert scope.mask(generation.context(2)[0]).tolist() == [[True, True], [True, True]]
    for expected in (True, False):
        generation.decode()
        mask = scope.mask(generation.context(1)[0])
        assert mask.tolist() == [[expected], [expected]]


def test_the_first_token_of_a_prompt_of_one_on_a_static_cache_is_no_decoded_one():
    """A reset cache counts in a tensor from the start, and holds what the generation before it left."""
    for name, first, second in (("generated[:1]", False, True), ("prompt", True, False), ("positions[-1]", True, False)):
        generation = Generation([Text(1, 0, 1), Text(1, 0, 2)], "left", True)
        generation.cache.get_seq_length = lambda generation=generation: torch.tensor(generation.cache.length)
        scope = Tokens(name)
        for _ in range(2):  # reused for a second generation
            generation.cache.length, generation.rows = 0, [row[:1] for row in generation.rows]
            assert scope.mask(generation.context(1)[0]).tolist() == [[first], [first]]
            generation.decode()
            assert scope.mask(generation.context(1)[0]).tolist() == [[second], [second]]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["generated[:2]", "response~4"])
def test_a_cache_that_was_filled_before_says_so(name, static):
    generation = Generation([Text(3, 0, 1)], "left", static)
    generation.context(3)
    generation.decode()
    ctx, _ = generation.context(1)
    with pytest.raises(ContextError, match=r"prompt of this generation was not seen[\s\S]*cache from before the attach"):
        Tokens(name).mask(ctx)


def test_a_cache_keeps_its_prompt_through_a_copy_and_apart_from_others():
    long, short = Generation([Text(5, 0, 1)], "left", False), Generation([Text(2, 0, 1)], "left", False)
    scope = Tokens("generated[:2]")
    for generation in (long, short):
        scope.mask(generation.context(len(generation.rows[0]))[0])
    twin = copy.deepcopy(long)
    for generation in (long, short, twin):
        hits = []
        for _ in range(3):
            generation.decode()
            hits.append(scope.mask(generation.context(1)[0]).item())
        assert hits == [True, True, False]


def test_a_cache_of_other_rows_is_refused():
    generation = Generation([Text(3, 0, 1), Text(2, 0, 2)], "left", False)
    scope = Tokens("generated[:2]")
    scope.mask(generation.context(3)[0])
    generation.rows = generation.rows[:1] * 3
    generation.texts = generation.texts[:1] * 3
    generation.decode()
    with pytest.raises(ContextError, match=r"a cache of 3 rows[\s\S]*one of 2 rows"):
        scope.mask(generation.context(1)[0])


# ---- the text form


@given(scopes(selectors() | st.builds(Named, st.just("response"), windows(-5))), st.sampled_from(["", " "]))
def test_what_is_printed_is_read_back(wanted, space):
    text = wanted.text
    for mark in "|&!~,:":
        text = text.replace(mark, f"{space}{mark}{space}")
    scope = Scope.parse(text)
    assert Scope.parse(str(scope)) == scope == Scope.parse(wanted.text) and hash(scope) == hash(Scope.parse(str(scope)))
    assert Scope.parse(scope) is scope and "." not in str(scope) or wanted.half_life == 2.5


@pytest.mark.parametrize("half_life", ["0.1", "123456.75", "1234567", "33554432", "0.001"])
def test_half_lives_are_read_back_exactly(half_life):
    scope = Scope.parse(f"generated~{half_life}")
    assert str(scope) == f"generated~{half_life}" and float(scope.half_life) == torch.tensor(float(half_life)).item()


def test_every_kind_is_in_the_table_and_in_the_tests():
    kinds = {"all", "prompt", "response", "generated", "last", "positions", "tokens", "image", "role"}
    assert {name.split("[")[0] for name in KINDS} == kinds


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("respons", r"unknown scope 'respons'[\s\S]*expected: all, prompt, [\s\S]*did you mean 'response'"),
        ("prompt|genrated[:3]", r"unknown scope 'genrated\[:3\]'"),
        ("5", "unknown scope '5'"),
        ("all[3]", r"unknown scope 'all\[3\]'[\s\S]*expected: all"),
        ("last[0]", "expected: last"),
        ("positions", r"expected: positions\[...\]"),
        ("tokens", r"expected: tokens\[...\]"),
        ("prompt [3:]", "unknown scope"),
        ("positions[...]", r"'positions\[...\]' has no window[\s\S]*expected: a slice such as \[:32\][\s\S]*positions\[0:8\]"),
        ("prompt[]", "has no window"),
        ("generated[5:2]", r"a window is empty[\s\S]*found: \[5:2\]"),
        ("positions[0:0]", "a window is empty"),
        ("prompt[:0]", "a window is empty"),
        ("prompt[-2:-4]", "a window is empty"),
        ("prompt[a]", "has no window"),
        ("prompt[1.5]", "has no window"),
        ("prompt[1 2]", "has no window"),
        ("prompt[-:]", "has no window"),
        ("prompt[0:8:2]", "has no window"),
        ("prompt[,]", "has no window"),
        ("prompt[1:2,3]", "has no window"),
        ("positions[:99999999999999999999]", "has no window"),
        ("generated[-4:]", r"counts from an end that is not known while decoding[\s\S]*found: -4:"),
        ("generated[3,-1]", "counts from an end"),
        ("tokens[]", "names no tokens"),
        ("tokens[-1]", r"names no tokens[\s\S]*convert_tokens_to_ids"),
        ("tokens[the]", "names no tokens"),
        ("tokens[1 2]", "names no tokens"),
        ("tokens[99999999999999999999]", "names no tokens"),
        ("role[usr]", r"unknown chat role in 'role\[usr\]'[\s\S]*did you mean 'user'"),
        ("role[]", "expected: system, user, assistant, tool"),
        ("", "a part of the scope is empty"),
        ("prompt|", "a part of the scope is empty"),
        ("prompt&&last", "a part of the scope is empty"),
        ("!prompt", r"a part of the scope is empty[\s\S]*'all!prompt'"),
        ("generated~", "has no half-life"),
        ("generated~0", "has no half-life"),
        ("generated~-3", "has no half-life"),
        ("generated~1e3", "has no half-life"),
        ("generated~inf", "has no half-life"),
        ("generated~8~8", "has no half-life"),
        ("generated~32!tokens[4]", r"at the very end[\s\S]*found: 32!tokens\[4\]"),
        (f"generated~{'9' * 60}", "has no half-life"),
        (f"generated~0.{'0' * 60}1", "has no half-life"),
    ],
)
def test_mistakes_are_named(text, says):
    with pytest.raises(ConfigError, match=says):
        Scope.parse(text)


# ---- passes that do not say


def context_of(**extra) -> ForwardContext:
    return build_context({"input_ids": torch.ones(1, 3, dtype=torch.long), **extra}, None)


@pytest.mark.parametrize("name", ["prompt", "response", "generated", "prompt[:2]", "response&last", "all!generated"])
def test_a_pass_that_does_not_tell_prompt_from_response(name):
    with pytest.raises(ContextError, match=rf"scope '{name.translate({91: chr(92) + '[', 93: chr(92) + ']'})}' cannot tell prompt"):
        Tokens(name).mask(context_of())


def test_a_decay_needs_to_know_where_the_response_begins():
    with pytest.raises(ContextError, match=r"scope 'all~8' cannot tell where the response begins"):
        Tokens("all~8").fade(context_of())


@pytest.mark.parametrize("tokens", [3, 1])
def test_negative_windows_of_a_response_are_refused_in_generation(tokens):
    scope = Tokens("response[-2:]")
    generation = Generation([Text(3, 0, 1)], "left", False)
    ctx, _ = generation.context(3)
    if tokens == 1:
        ctx.prompt_length  # noqa: B018
        generation.decode()
        ctx, _ = generation.context(1)
    with pytest.raises(ContextError, match=r"'response\[-2:\]' counts from an end[\s\S]*phases=\('train', 'validate'\)"):
        scope.mask(ctx)


def test_token_ids_need_ids():
    ctx = build_context({"inputs_embeds": torch.ones(1, 3, 8)}, None)
    with pytest.raises(ContextError, match=r"'tokens\[5\]' needs token ids[\s\S]*inputs_embeds"):
        Tokens("tokens[5]").mask(ctx)


@pytest.mark.parametrize("turns", [None, torch.zeros(1, 2, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long), torch.zeros(3)])
@pytest.mark.parametrize("generating", [False, True])
def test_roles_need_an_announcement_that_fits(turns, generating):
    ctx = build_context({"input_ids": torch.ones(1, 3, dtype=torch.long), "use_cache": generating}, None, turns=turns)
    with pytest.raises(ContextError, match=rf"cannot tell whose turn[\s\S]*found: {'none' if turns is None else ''}[\s\S]*chat_roles"):
        Tokens("role[user]").mask(ctx)


def test_roles_may_include_those_of_the_cache():
    generation = Generation([Text(3, 0, 1)], "left", False)
    generation.context(3)
    inputs = {"input_ids": torch.ones(1, 2, dtype=torch.long), "past_key_values": generation.cache}
    turns = torch.tensor([[0, 1, 1, 2, 1]])
    assert Tokens("role[user]").mask(build_context(inputs, None, turns=turns)).tolist() == [[False, True]]


def test_a_module_beside_a_decoder_has_no_tokens():
    ctx = ForwardContext(0, 0, "train")
    assert Tokens("all").mask(ctx) is True
    for name in ("prompt", "all!last", "all~3"):
        with pytest.raises(ContextError, match=r"needs tokens[\s\S]*scope='all'"):
            Tokens(name).mask(ctx)


# ---- windows that move


def attached_to(*names: str) -> Attachment:
    interventions = [Intervention(Add(torch.ones(32)), f"layers.{i}.output", name, name="abc"[i]) for i, name in enumerate(names)]
    return attachment_of(Plan(interventions))


def windows_of(attachment: Attachment) -> list[str]:
    windows = [str(intervention.scope_mask.scope) for intervention in attachment.interventions]
    assert [str(intervention.scope) for intervention in attachment.as_plan().interventions] == windows
    return windows


def test_windows_move_together_or_one_by_one():
    attachment = attached_to("generated[:8]", "generated[:8]", "generated[:8]")
    assert len({id(intervention.scope_mask) for intervention in attachment.interventions}) == 1  # their tokens are worked out once
    attachment.set_window(2, None)
    assert (
        windows_of(attachment) == ["generated[2:]"] * 3
        and len({id(intervention.scope_mask) for intervention in attachment.interventions}) == 1
    )
    attachment.set_window(None, 4, "b")
    assert windows_of(attachment) == ["generated[2:]", "generated[:4]", "generated[2:]"]
    attachment.set_window(1, 2)
    assert windows_of(attachment) == ["generated[1:2]"] * 3


def test_another_plan_is_left_alone():
    scope = Scope.parse("generated[:8]")
    plan = Plan(Intervention(Add(torch.ones(32)), "layers.0.output", scope))
    first, second = attachment_of(plan), attachment_of(Plan(plan.interventions))
    first.set_window(0, 2)
    assert (windows_of(first), windows_of(second), str(scope)) == (["generated[0:2]"], ["generated[:8]"], "generated[:8]")
    assert windows_of(attachment_of(plan)) == ["generated[:8]"] and str(plan.interventions[0].scope) == "generated[:8]"
    # an intervention whose window was moved does not lend it to one that has the old one
    both = Plan([*first.as_plan().interventions, Intervention(Add(torch.ones(32)), "layers.1.output", "generated[:8]")])
    assert windows_of(attachment_of(both)) == ["generated[0:2]", "generated[:8]"]


def test_windows_made_in_inference_mode_can_be_moved_in_training():
    with torch.inference_mode():
        attachment = attached_to("prompt[:8]~3")
    [part] = attachment.interventions[0].scope_mask._parts
    bounds = part.window.bounds
    attachment.set_window(1, 2)
    assert bounds.tolist() == [1, 2] and part.window.bounds is bounds and not bounds.is_inference()


def test_a_window_is_not_moved_to_where_it_holds_nothing():
    attachment = attached_to("generated[:8]", "prompt[2:4]")
    with pytest.raises(ConfigError, match="a window is empty"):
        attachment.set_window(4, 4)
    assert windows_of(attachment) == ["generated[:8]", "prompt[2:4]"]


def test_windows_are_kept():
    attachment = attached_to("generated[:8]", "generated[:8]", "prompt[0,1]")
    attachment.set_window(3, None, "b")
    state = attachment.state_dict()
    fresh = attached_to("generated[:8]", "generated[:8]", "prompt[0,1]")
    fresh.load_state_dict(state)
    assert windows_of(fresh) == windows_of(attachment) == ["generated[:8]", "generated[3:]", "prompt[0,1]"]
    attachment.set_window(5, 6, "a")
    attachment.set_window(5, 6, "b")
    fresh.load_state_dict(attachment.state_dict())
    assert windows_of(fresh) == ["generated[5:6]", "generated[5:6]", "prompt[0,1]"]


def test_windows_survive_a_file(tmp_path):
    attachment = attached_to("generated[:8]!tokens[5]~3", "role[user]|prompt[-4:]&tokens[7]")
    attachment.set_window(3, 9, "a")
    loaded = attachment_of(Plan.load(attachment.as_plan().save(tmp_path / "plan")))
    assert windows_of(loaded) == ["generated[3:9]!tokens[5]~3", "role[user]|prompt[-4:]&tokens[7]"]


@pytest.mark.parametrize(
    ("scope", "window", "says"),
    [
        ("all", (0, 3), r"'a' has no window to move[\s\S]*found: all"),
        ("positions[0,1]", (0, 3), "has no window to move"),
        ("prompt[:2]|generated[:2]", (0, 3), "has no window to move"),
        ("generated[:2]", (-3, None), r"counts from an end[\s\S]*found: -3:None"),
        ("all!generated[:2]", (0, -1), "counts from an end"),
        ("prompt[:2]", (1.5, None), r"has no such bound[\s\S]*found: 1.5"),
        ("prompt[:2]", ("1", None), "has no such bound"),
        ("prompt[:2]", (0, 2**70), "has no such bound"),
        ("prompt[:2]", (True, None), "has no such bound"),
    ],
)
def test_windows_that_cannot_move(scope, window, says):
    attachment = attached_to(scope)
    with pytest.raises(ConfigError, match=says):
        attachment.set_window(*window)
    assert windows_of(attachment) == [scope]
    with pytest.raises(ConfigError, match="no intervention is called 'x'"):
        attachment.set_window(0, 1, "x")
