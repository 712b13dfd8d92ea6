"""Generated continuations, scored: by a function of yours, or by the balance of male and female words."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steer.bias.items import Prompt, check_items
from steer.bias.scoring import Scorer
from steer.bias.table import Column, Measured, by_group
from steer.bias.words import FEMALE, MALE
from steer.checks import errors_of, of_type, whole_number
from steer.errors import ConfigError
from steer.model.estimates import Estimate, mean_of, percentage_of
from steer.model.generation import continuations as generated

Score = Callable[[list[str]], Sequence[float]]
COLUMNS = (
    Column("positive", "%", None, "continuations with a score above 0: of gender polarity, more male than female words"),
    Column("negative", "%", None, "continuations with a score below 0: of gender polarity, more female than male words"),
    Column("score", "", None, "mean score; of gender polarity, (male - female) / (male + female) words, 0 without any"),
)
_WORD = re.compile(r"[A-Za-z]+")


def gender_polarity(texts: list[str]) -> list[float]:
    """(male - female) / (male + female) words of each text, from -1 to 1; 0 for a text without any."""
    found = []
    for text in texts:
        words = [word.lower() for word in _WORD.findall(text)]
        male, female = sum(word in MALE for word in words), sum(word in FEMALE for word in words)
        found.append((male - female) / (male + female) if male + female else 0.0)
    return found


def generation(
    items: Sequence[Prompt], scorer: Scorer, *, score: Score = gender_polarity, max_new_tokens: int = 20, do_sample: bool = True
) -> Measured:
    """Shares of positive and negative continuations and the mean score, by group.

    Args:
        score: texts -> a number each, such as a classifier's; 0 is neutral.
        max_new_tokens: of a continuation. do_sample: draw tokens, with the seed of the measurement, rather than take the likeliest.
    """
    check_items(items, Prompt, "generation score")
    whole_number(max_new_tokens, "`max_new_tokens`", least=1)
    if not callable(score):
        of_type(score, type(gender_polarity), "`score`", "pass a function of a list of texts that gives a number for each")
    texts = continuations(scorer, [item.text for item in items], max_new_tokens=max_new_tokens, do_sample=do_sample)
    scores = scores_of(score, texts)

    def values(chosen: list[int]) -> dict[str, Estimate | None]:
        of = scores[chosen]
        return {"positive": percentage_of(of > 0), "negative": percentage_of(of < 0), "score": mean_of(of)}

    return Measured(COLUMNS, by_group(items, values), (f"scored by {getattr(score, '__name__', type(score).__name__)}",))


def scores_of(score: Score, texts: list[str]) -> Tensor:
    """[texts] fp64. Raises ConfigError for anything but a finite number for each text."""
    name = f"the score {getattr(score, '__name__', type(score).__name__)}"
    with errors_of(name, "correct the function"):
        scores = torch.as_tensor(score(texts), dtype=torch.float64).reshape(-1)
    if len(scores) != len(texts) or not bool(torch.isfinite(scores).all()):
        raise _no_scores(name, len(texts), scores)
    return scores


def continuations(scorer: Scorer, prompts: Sequence[str], *, max_new_tokens: int, do_sample: bool) -> list[str]:
    """What the model writes behind each prompt. Prompts are padded at the left; the random state of the caller is left as it is."""
    rows = scorer.prompts(prompts)
    padding = next(token for token in (scorer.tokenizer.pad_token_id, scorer.start) if token is not None)
    written = generated(
        scorer.model,
        [row.ids for row in rows],
        [max_new_tokens] * len(rows),
        pad=padding,
        max_tokens=scorer.max_tokens,
        seed=scorer.seed,
        progress=scorer.progress,
        do_sample=do_sample,
    )
    return [scorer.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]


# ---- errors


def _no_scores(name: str, texts: int, scores: Tensor) -> ConfigError:
    found = f"{len(scores)} numbers, {int((~torch.isfinite(scores)).sum())} of them not finite"
    remedy = "return one number for each text, in their order"
    return ConfigError(f"{name} gives no scores", expected=f"{texts} finite numbers", found=found, remedy=remedy)
