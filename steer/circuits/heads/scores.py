"""Head scores: induction, previous-token and duplicate-token scores of all heads from their attention patterns, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import one_of, whole_number
from steer.circuits.heads.names import Head
from steer.circuits.heads.patterns import PatternReader
from steer.circuits.heads.runs import texts_of
from steer.circuits.texts import Batch, Prompts
from steer.errors import ConfigError
from steer.model.anatomy import Anatomy
from steer.model.tokens import Row


def _same(batch: Batch) -> Tensor:
    """[rows, tokens, tokens] bool: an earlier token (column) that is the same as this one (row). Padding is like nothing."""
    real = batch.mask.bool()
    same = (batch.ids[:, :, None] == batch.ids[:, None, :]) & real[:, :, None] & real[:, None, :]
    return same.tril(-1)


def _previous(batch: Batch) -> Tensor:
    tokens = batch.ids.shape[1]
    real = batch.mask.bool()
    return torch.eye(tokens, dtype=torch.bool, device=real.device).roll(-1, 1).tril(-1) & real[:, :, None] & real[:, None, :]


def _after_same(batch: Batch) -> Tensor:
    """The token behind an earlier occurrence of this one."""
    return torch.nn.functional.pad(_same(batch), (1, -1))


# kind -> [rows, tokens, tokens] bool: the tokens (columns) that a head of that kind looks at from each token (rows)
_LOOKS_AT: dict[str, Callable[[Batch], Tensor]] = {
    "induction": _after_same,
    "previous_token": _previous,
    "duplicate_token": _same,
}
PATTERN_KINDS = tuple(_LOOKS_AT)


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Scores of all heads of a model.

    Attributes:
        scores: by kind, [layers, heads] fp64; NaN in layers without attention, and where a layer has fewer heads than another.
        errors: standard errors of these over texts, likewise, where there are several.
        facts: what they were measured on.

    Example:
        >>> scores = steer.head_scores(model, "previous_token")
        >>> scores.scores["previous_token"].shape  # [layers, heads]
    """

    scores: Mapping[str, Tensor]
    errors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, kind: str) -> Tensor:
        """[layers, heads]. Raises ConfigError for a kind that was not measured."""
        return self.scores[one_of(kind, tuple(self.scores), "the kind of a head score")]

    def top(self, kind: str, n: int = 10) -> list[tuple[Head, float]]:
        """The heads with the highest scores, highest first."""
        whole_number(n, "the number of heads", least=1)
        scores = self[kind]
        order = scores.nan_to_num(-float("inf")).flatten().argsort(descending=True)[: min(n, int((~scores.isnan()).sum()))]
        heads = [Head(*divmod(place, scores.shape[1])) for place in order.tolist()]
        return [(head, float(scores[head])) for head in heads]

    def __str__(self) -> str:
        lines = []
        for kind in self.scores:
            best = ", ".join(f"{head} {score:.2f}" for head, score in self.top(kind, 5))
            lines.append(f"{kind.replace('_', ' ')}: {best}")
        return "\n".join(lines)


def head_scores(
    model: nn.Module,
    kinds: str | Sequence[str] = PATTERN_KINDS,
    texts: Prompts | None = None,
    *,
    tokenizer: Any = None,
    seed: int = 0,
) -> HeadScores:
    """Scores all heads of all layers by where they look, in one pass over the texts.

    A score is the share of its attention that a head gives to the tokens of a kind, as a mean over the tokens that have any, then over
    texts: `previous_token`, the token before; `duplicate_token`, earlier tokens that are the same; `induction`, the tokens behind those.
    On T random tokens said twice, the default, this is the attention from i to i - 1, to i - T and to i - T + 1.

    Args:
        model: a model of any attention implementation, which is eager only while patterns are read.
        kinds: one or more.
        texts: texts, rows, or a padded batch; `repeated_tokens(model, seed=seed)` by default.

    Raises:
        ConfigError: an unknown kind, or texts that have no token of it.
        AnatomyError: a model without attention, or patterns that cannot be proven. SiteError: heads or values that are not known.

    Example:
        >>> scores = steer.head_scores(model, "induction")
        >>> strongest = scores.top("induction", 3)
    """
    names = [kinds] if isinstance(kinds, str) else list(kinds)
    for name in names:
        one_of(name, PATTERN_KINDS, "the kind of a head score")
    if not names:
        raise _no_kind()
    chosen = texts_of(model, repeated_tokens(model, seed=seed) if texts is None else texts, tokenizer)
    rows, reader = chosen.rows, PatternReader(model, chosen)
    most = max(heads.n_heads for heads in reader.heads.values())
    by_text = {name: torch.full((len(rows), reader.anatomy.n_layers, most), float("nan"), dtype=torch.float64) for name in names}

    def read(layer: int, pattern: Tensor, batch: Batch) -> None:
        for name in names:
            looks_at = _LOOKS_AT[name](batch).to(pattern.device)
            mass = torch.einsum("bhqk,bqk->bh", pattern, looks_at.to(pattern.dtype))
            tokens = looks_at.any(-1).sum(-1, keepdim=True)  # [rows, 1] tokens that have one to look at; 0 / 0 is NaN
            by_text[name][batch.prompts, layer, : pattern.shape[1]] = (mass / tokens).double().cpu()

    reader.run(read)
    scores, errors = {}, {}
    for name, of_texts in by_text.items():
        of_texts = of_texts[~of_texts.isnan().all(-1).all(-1)]  # a text may have no token of this kind
        if not len(of_texts):
            raise _no_token_of_kind(name, rows)
        scores[name] = of_texts.mean(0)
        if len(of_texts) > 1:
            errors[name] = of_texts.std(0) / len(of_texts) ** 0.5
    facts = {
        "texts": len(rows),
        "tokens": sum(len(row.ids) for row in rows),
        "random": texts is None,
        "seed": seed if texts is None else None,
    }
    return HeadScores(scores, errors, facts)


def repeated_tokens(model: nn.Module, n: int = 8, length: int = 32, *, seed: int = 0) -> list[Row]:
    """Texts of random tokens said twice, on which induction, previous-token and duplicate-token heads show.

    The token that starts texts is put first where the model's config names one, since many heads rest on it. No token occurs twice in
    a half.

    Args:
        n: texts. length: tokens of one half.

    Raises:
        ConfigError: a vocabulary that is smaller than one half.

    Example:
        >>> repeated = repeated_tokens(model, n=4, length=16)
        >>> scores = steer.head_scores(model, "induction", repeated)
    """
    whole_number(n, "the number of texts", least=1)
    whole_number(length, "the tokens of one half", least=2)
    anatomy = Anatomy.find(model)
    size = getattr(anatomy.embedding, "num_embeddings", None) or anatomy.config.vocab_size
    config = next((module.config for module in reversed(anatomy.chain) if getattr(module, "config", None) is not None), None)
    special = {token for name in ("bos", "eos", "pad") if isinstance(token := getattr(config, f"{name}_token_id", None), int)}
    words = torch.tensor([token for token in range(size) if token not in special])
    if len(words) < length:
        raise _vocabulary_too_small(len(words), length)
    bos = getattr(config, "bos_token_id", None)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        half = words[torch.randperm(len(words), generator=generator)[:length]].tolist()
        rows.append(Row((*([bos] if isinstance(bos, int) and bos < size else []), *half, *half), 0))
    return rows


# ---- errors


def _no_kind() -> ConfigError:
    return ConfigError("no kind of head score is asked for", expected=f"some of {', '.join(PATTERN_KINDS)}", found="none",
                       remedy="name one, or leave `kinds` out for all")  # fmt: skip


def _no_token_of_kind(kind: str, rows: Sequence[Row]) -> ConfigError:
    return ConfigError(
        f"no {kind.replace('_', '-')} score can be measured on these texts",
        expected=f"texts with {'two tokens' if kind == 'previous_token' else 'a token that occurred before'}",
        found=f"{len(rows)} texts of at most {max(len(row.ids) for row in rows)} tokens without any",
        remedy="leave `texts` out, for random tokens said twice",
    )


def _vocabulary_too_small(size: int, length: int) -> ConfigError:
    return ConfigError("the vocabulary is too small for random tokens without repetition", expected=f"at least {length} tokens", found=size,
                       remedy="make `length` smaller")  # fmt: skip
