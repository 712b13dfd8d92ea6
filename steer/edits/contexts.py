"""Contexts: texts put before the prompt of a fact, so that what is read and optimised there does not belong to one position alone.

As in MEMIT (Meng et al. 2022, arXiv 2210.07229, section 4): the plain prompt, and the prompt behind continuations that the model itself
writes of The, Therefore, Because, I and You.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import of_type, one_of, whole_number
from steer.edits.fact import Fact
from steer.edits.locate import Located, locate, text_ids
from steer.errors import EditError, NonFiniteError
from steer.model.capture import evaluating
from steer.model.devices import input_device
from steer.model.memory import in_halves
from steer.model.tokens import Row, collate
from steer.model.words import holds

STARTS = ("The", "Therefore", "Because", "I", "You")
BETWEEN = ". "
LIKELIEST = 5  # tokens of which each next one is drawn
WEIGHTINGS = {
    "plain_half": "the plain prompt has half of the weight, the contexts share the other half (MEMIT)",
    "mean": "every text has the same weight (ROME)",
    "plain": "the plain prompt alone",
    "both": "two keys of a fact: the plain prompt, and the mean over the contexts",
}
_DRAWS = 20  # of one context before it is given up


class FirstTokenSubjectWarning(UserWarning):
    """A subject that is the first token of its prompt: the key there hardly depends on the subject."""


class SubjectTokenWarning(UserWarning):
    """A subject whose last token reaches over its end: the key there belongs to a longer word."""


@dataclass(frozen=True)
class Contexts:
    """Texts that come before a prompt. An edit keeps them, since its keys and values depend on them.

    Attributes:
        prefixes: without the blank and full stop between them and the prompt; `Contexts(())` is the plain prompt alone.
        seed: that they were drawn with; None for texts of your own.

    Example:
        >>> contexts = sample_contexts(model, tokenizer, seed=0)
        >>> prompts = contexts.texts("The mother tongue of Danielle Darrieux is")
    """

    prefixes: tuple[str, ...]
    seed: int | None = None

    def __post_init__(self) -> None:
        of_type(self.prefixes, tuple, "the prefixes of contexts", "pass a tuple of texts")
        for prefix in self.prefixes:
            of_type(prefix, str, "a context", "pass text")

    def __len__(self) -> int:
        """Number of texts of one prompt, the plain one included."""
        return 1 + len(self.prefixes)

    def texts(self, prompt: str) -> tuple[str, ...]:
        """The prompt alone, then behind each prefix."""
        return (prompt, *(f"{prefix}{BETWEEN}{prompt}" for prefix in self.prefixes))

    def weights(self, weighting: str, *, plain: bool = True) -> Tensor:
        """[keys, texts] weights of the texts in each key of a fact; one key, two for `both`. Every row sums to 1.

        Args:
            weighting: one of `WEIGHTINGS`.
            plain: False leaves the plain prompt out where there are prefixes.

        Raises:
            ConfigError: an unknown weighting.
        """
        one_of(weighting, tuple(WEIGHTINGS), "the weighting of contexts")
        n = len(self.prefixes)
        alone = torch.tensor([[1.0] + [0.0] * n])
        prefixed = torch.tensor([[0.0] + [1 / n] * n]) if n else alone
        if not plain or n == 0:
            return prefixed
        return {
            "plain_half": (alone + prefixed) / 2,
            "mean": torch.full((1, 1 + n), 1 / (1 + n)),
            "plain": alone,
            "both": torch.cat([alone, prefixed]),
        }[weighting]

    def locate(self, tokenizer: Any, fact: Fact) -> tuple[Located, ...]:
        """The subject of a fact in each of its texts, in the order of `texts`.

        Warns of a subject that is the first token of its text (FirstTokenSubjectWarning), and of one that ends within a token
        (SubjectTokenWarning). Raises as `steer.edits.locate.locate`.
        """
        texts = self.texts(fact.prompt)
        located = tuple(locate(tokenizer, text, fact.subject, start=len(text) - len(fact.prompt)) for text in texts)
        if located[0].at_start:
            instead = "keys are read behind the contexts only" if self.prefixes else "its key is nearly that of any other first token"
            warnings.warn(f"'{fact.subject}' is the first token of '{fact.prompt}': {instead}", FirstTokenSubjectWarning, stacklevel=3)
        if located[0].spans_past:
            token = tokenizer.decode(located[0].ids[located[0].last])
            warnings.warn(f"'{fact.subject}' ends within the token '{token}' of '{fact.prompt}'", SubjectTokenWarning, stacklevel=3)
        return located

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"prefixes": list(self.prefixes), "seed": self.seed}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Contexts:
        """Raises EditError for anything else than `to_json` gives."""
        if not isinstance(content, Mapping) or set(content) != {"prefixes", "seed"} or not isinstance(content["prefixes"], list | tuple):
            raise _no_contexts(content)
        return cls(tuple(content["prefixes"]), content["seed"])


def sample_contexts(
    model: nn.Module, tokenizer: Any, *, count: int = 5, tokens: int = 10, seed: int = 0, avoid: Sequence[str] = ()
) -> Contexts:
    """Draws contexts from a model: continuations of The, Therefore, Because, I and You, each token one of the likeliest five.

    Nothing of the model or of the caller's random state changes, and the same seed gives the same texts on every device, as far as the
    logits agree.

    Args:
        model: a causal language model.
        count: contexts; those beyond five begin like the first ones again. 0 for none.
        tokens: that are drawn for each.
        seed: of the draws.
        avoid: words that no context may say, such as the targets of the facts; one that does is drawn again.

    Raises:
        EditError: no context without these words was found. NonFiniteError: the logits. ConfigError: numbers out of range.

    Example:
        >>> contexts = sample_contexts(model, tokenizer, avoid=[fact.target for fact in facts])
    """
    whole_number(count, "`count`, the number of contexts")
    whole_number(tokens, "`tokens`, the length of a context", least=1)
    whole_number(seed, "`seed`")
    of_type(avoid, (list, tuple), "`avoid`, the words that contexts may not say", "pass a list of texts")
    avoided = [word.strip() for word in avoid if word.strip()]
    generator = torch.Generator().manual_seed(seed)
    drawn: list[str | None] = [None] * count
    starts = list(islice(cycle(STARTS), count))
    for _ in range(_DRAWS):
        missing = [place for place, prefix in enumerate(drawn) if prefix is None]
        if not missing:
            break
        for place, text in zip(missing, _continuations(model, tokenizer, [starts[i] for i in missing], tokens, generator), strict=True):
            prefix = _cleaned(text)
            drawn[place] = prefix if prefix and not any(holds(prefix, word) for word in avoided) else None
    prefixes = tuple(prefix for prefix in drawn if prefix is not None)
    if len(prefixes) < count:
        raise _none_without(avoid, starts[drawn.index(None)])
    return Contexts(prefixes, seed)


def _cleaned(text: str) -> str:
    """On one line, and without braces, which would be taken for the gap of a template."""
    return " ".join(re.sub(r"[{}]", " ", text).split())


def _continuations(model: nn.Module, tokenizer: Any, starts: Sequence[str], tokens: int, generator: torch.Generator) -> Iterator[str]:
    """Texts, all drawn token by token in one batch. Special tokens are never drawn."""
    ids = [text_ids(tokenizer, start) for start in starts]
    never = sorted(set(tokenizer.all_special_ids))
    with evaluating(model), torch.compiler.set_stance("force_eager"):  # compiled code would be traced for every length
        for _ in range(tokens):
            rows = [Row(row, len(row)) for row in ids]
            logits = torch.cat([part for _, part in in_halves(rows, lambda chosen: _next_logits(model, chosen))])
            logits[:, len(tokenizer) :] = -torch.inf  # rows of the embedding beyond the vocabulary
            logits[:, never] = -torch.inf
            values, candidates = logits.topk(min(LIKELIEST, logits.shape[1]))
            drawn = torch.multinomial(values.softmax(-1), 1, generator=generator)  # [texts, 1]
            ids = [(*row, token) for row, token in zip(ids, candidates.gather(1, drawn)[:, 0].tolist(), strict=True)]
    return (tokenizer.decode(row, skip_special_tokens=True) for row in ids)


def _next_logits(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """[texts, vocabulary] fp32 on the CPU, of the token behind each text."""
    device = input_device(model)
    batch = {name: tensor.to(device) for name, tensor in collate(rows, 0).items() if name != "labels"}
    logits = model(**batch, use_cache=False).logits
    ends = torch.tensor([len(row.ids) - 1 for row in rows], device=logits.device)
    last = logits[torch.arange(len(rows), device=logits.device), ends].float().cpu()
    if not bool(torch.isfinite(last).all()):
        raise _not_finite()
    return last


# ---- errors


def _none_without(avoid: Sequence[str], start: str) -> EditError:
    return EditError(
        "no context could be drawn that leaves out the words to be avoided",
        expected=f"a continuation of '{start}' without any of {len(avoid)} words",
        found=f"none in {_DRAWS} draws",
        remedy="pass contexts of your own: Contexts(('In the evening we sat outside', ...))",
    )


def _no_contexts(content: Any) -> EditError:
    return EditError(
        "these are no contexts", expected="an object with prefixes and seed", found=repr(content)[:80], remedy="write them with to_json()"
    )


def _not_finite() -> NonFiniteError:
    return NonFiniteError(
        "the logits of the model are not finite",
        expected="finite numbers",
        found="NaN or infinity while contexts were drawn",
        remedy="run the model in float32 or bfloat16",
    )
