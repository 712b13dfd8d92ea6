"""Attention patterns of chosen heads, and beside each what changes without it: attention is not explanation."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from steer.checks import whole_number
from steer.circuits.heads.drawing import draw_patterns, pattern_table
from steer.circuits.heads.effects import ABLATIONS, HeadEffects, head_effects
from steer.circuits.heads.names import Head, HeadName, head_named, heads_named
from steer.circuits.heads.patterns import PatternReader
from steer.circuits.heads.runs import texts_of
from steer.circuits.targets import Target
from steer.circuits.texts import Batch, Prompts, Texts
from steer.errors import ConfigError
from steer.model.anatomy import Anatomy
from steer.model.load import tokenizer_of

MOST_BYTES = 2**28


class AttentionPatterns:
    """Patterns of some heads on some texts, each with the change of a target when the head is ablated or looks elsewhere.

    Attributes:
        heads: in the order in which they were named.
        texts: the rows of tokens.
        tokens: by text, its tokens as words.
        patterns: [tokens, tokens] fp32 of each head and text; `patterns["18.6"]` is that of the first text.
        effects: of the heads, each ablated alone.
        bytes: that the patterns take.

    Example:
        >>> patterns = attention_patterns(model, ["The cat sat. The cat"], ["18.6"])
        >>> patterns["18.6"][-1]  # [tokens] weights from the last token of the first text
        >>> effects = patterns.effects.of("18.6")
    """

    def __init__(
        self, heads: Sequence[Head], texts: Texts, tokens: list[list[str]], patterns: dict[tuple[Head, int], Tensor], effects: HeadEffects
    ) -> None:
        self.heads, self.texts, self.tokens, self.effects = tuple(heads), texts.rows, tokens, effects
        self._patterns = patterns
        self.bytes = sum(pattern.numel() * pattern.element_size() for pattern in patterns.values())

    def __repr__(self) -> str:
        return f"AttentionPatterns({len(self.heads)} heads, {len(self.texts)} texts, {self.bytes / 2**20:.1f} MiB)"

    def __getitem__(self, name: HeadName | tuple[HeadName, int]) -> Tensor:
        """[tokens, tokens] fp32, from the token of the row to that of the column: `patterns["18.6"]`, `patterns["18.6", text]`."""
        head, text = name if isinstance(name, tuple) and len(name) == 2 and not isinstance(name[0], int) else (name, 0)
        return self.of(head, text)

    def of(self, name: HeadName, text: int = 0) -> Tensor:
        """[tokens, tokens] fp32 of one head and text. Raises ConfigError for one that was not read."""
        (head,) = _read(self.heads, [name])
        self._check_text(text)
        return self._patterns[head, text]

    def plot(self, path: str | Path | None = None, *, text: int = 0, heads: Sequence[HeadName] | None = None) -> Any:
        """A figure of the patterns of a text, one panel a head with its effects above. Written where there is a path.

        Raises:
            ConfigError: matplotlib is missing, or heads or a text that were not read.
        """
        self._check_text(text)
        chosen = self.heads if heads is None else _read(self.heads, heads)
        panels = [(self._title(head), self._patterns[head, text]) for head in chosen]
        return draw_patterns(panels, self.tokens[text], self._caption(), path)

    def html(self, *, text: int = 0, heads: Sequence[HeadName] | None = None) -> str:
        """The same as HTML without scripts, to stand in a page or a notebook. Raises ConfigError for a text or head that was not read."""
        self._check_text(text)
        chosen = self.heads if heads is None else _read(self.heads, heads)
        tables = [pattern_table(self._title(head), self._patterns[head, text], self.tokens[text]) for head in chosen]
        return f"<figure><figcaption>{html.escape(self._caption())}</figcaption>{''.join(tables)}</figure>"

    def _repr_html_(self) -> str:
        return self.html()

    def _title(self, head: Head) -> str:
        changes = ", ".join(f"{name.replace('_', ' ')} {change:+.3f}" for name, change in self.effects.of(head).items())
        return f"{head}: {changes}"

    def _caption(self) -> str:
        clean = float(self.effects.clean.mean())
        return f"Change of the {self.effects.facts['target']} ({clean:.3f}) when a head or its pattern is replaced"

    def _check_text(self, text: int) -> None:
        whole_number(text, "the number of a text")
        if text >= len(self.texts):
            raise _no_such_text(text, len(self.texts))


def attention_patterns(
    model: nn.Module,
    texts: Prompts,
    heads: Sequence[HeadName],
    target: Target | None = None,
    *,
    ablations: Sequence[str] | None = None,
    means_from: Prompts | None = None,
    tokenizer: Any = None,
    max_bytes: int = MOST_BYTES,
) -> AttentionPatterns:
    """Reads the patterns of some heads, proven on these texts, and what changes in a target without each head and without its pattern.

    Only the patterns of the heads named are kept, heads * tokens^2 * 4 bytes a text; those of other heads of their layers live for the
    moment of a batch. The check takes one pass over the texts for each head and ablation.

    Args:
        heads: names such as `18.6`.
        target: see `head_effects`; the mean log-probability of the texts themselves by default.
        ablations: those of `head_effects`; all by default, without `mean_pattern` where there is one text to take it from.
        means_from: see `head_effects`.
        max_bytes: that the patterns may take.

    Raises:
        ConfigError: an unknown head, no texts, or patterns that are larger than `max_bytes`. AnatomyError: patterns that cannot be proven.

    Example:
        >>> patterns = steer.attention_patterns(model, texts, ["18.6"])
        >>> patterns["18.6"].shape, patterns.effects.of("18.6")  # [tokens, tokens] of the first text; what ablating the head changes
    """
    chosen = heads_named(Anatomy.find(model), heads)
    judged = texts_of(model, texts, tokenizer)
    needed = 4 * len(chosen) * sum(length**2 for length in judged.lengths)
    if needed > max_bytes:
        raise _too_large(needed, max_bytes, len(chosen), max(judged.lengths))
    if ablations is None:
        several = len(judged) if means_from is None else 2
        ablations = [name for name in ABLATIONS if name != "mean_pattern" or several > 1]
    patterns: dict[tuple[Head, int], Tensor] = {}

    def read(layer: int, pattern: Tensor, batch: Batch) -> None:
        for head in chosen:
            if head.layer == layer:
                for row, text in enumerate(batch.prompts.tolist()):
                    length = judged.lengths[text]
                    patterns[head, text] = pattern[row, head.head, :length, :length].to("cpu", copy=True)

    PatternReader(model, judged, [head.layer for head in chosen]).run(read)
    effects = head_effects(model, chosen, judged.rows, target, ablations=ablations, means_from=means_from, tokenizer=tokenizer)
    return AttentionPatterns(chosen, judged, _words(model, judged, tokenizer), patterns, effects)


def _words(model: nn.Module, texts: Texts, tokenizer: Any) -> list[list[str]]:
    """Tokens as words; as numbers where there is no tokenizer."""
    try:
        tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
    except ConfigError:
        return [[str(token) for token in row.ids] for row in texts.rows]
    return [[tokenizer.decode([token]) for token in row.ids] for row in texts.rows]


def _read(known: Sequence[Head], names: Sequence[HeadName]) -> list[Head]:
    heads = [head_named(name) for name in names]
    for head in heads:
        if head not in known:
            raise _not_read(head, known)
    return heads


# ---- errors


def _not_read(head: Head, known: Sequence[Head]) -> ConfigError:
    return ConfigError(f"the pattern of head {head} was not read", expected=f"one of {', '.join(map(str, known))}", found=str(head),
                       remedy="name it among the `heads` of attention_patterns")  # fmt: skip


def _no_such_text(text: int, n_texts: int) -> ConfigError:
    return ConfigError(f"there is no text {text}", expected=f"0 to {n_texts - 1}", found=text, remedy="texts count from 0")


def _too_large(needed: int, most: int, n_heads: int, longest: int) -> ConfigError:
    return ConfigError(
        "the patterns take more memory than they may",
        expected=f"at most {most / 2**20:.0f} MiB",
        found=f"{needed / 2**20:.0f} MiB for {n_heads} heads on texts of up to {longest} tokens",
        remedy="name fewer heads, shorten the texts, or raise `max_bytes`; head_scores keeps no patterns",
    )
