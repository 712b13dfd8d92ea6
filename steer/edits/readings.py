"""Reading a model for edit measures: all that they want of some records in as few passes as possible, each prompt once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from steer.edits.answer_scores import AnswerScorer
from steer.edits.measure import EditMeasure, Readings, Wanted
from steer.edits.record import FactRecord
from steer.model.generation import continuations
from steer.model.text_loss import text_losses
from steer.model.tokens import Row, plain

GREEDY = 20  # tokens of a greedy continuation
WRITTEN = 100  # tokens of a text that fluency looks at, prompt included, and of one that is read
LIKELIEST = 5  # tokens that each next one is drawn from


class EditReader:
    """Reads what measures want of a model as it is, and gives their numbers.

    Args:
        measures: see `measures_of`.
        chat: prompts are messages of a user, see `AnswerScorer`.
        max_tokens: padded tokens of a batch.
        seed: of texts that are written by chance.
        progress: a bar where the output is a terminal.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        measures: Sequence[EditMeasure],
        *,
        chat: bool = False,
        max_tokens: int = 1024,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.measures = tuple(measures)
        self.scorer = AnswerScorer(model, tokenizer, chat=chat, max_tokens=max_tokens, progress=progress)
        self.max_tokens = max_tokens
        self.seed = seed
        self.progress = progress

    def read(self, records: Sequence[FactRecord], *, what: str = "answers") -> Readings:
        """What the model says now. Raises NonFiniteError, TokenizerError; ConfigError for a model that cannot generate."""
        wanted = [measure.wanted(record) for record in records for measure in self.measures]
        return Readings(
            self.scorer.scores((question for each in wanted for question in each.answers), what=what),
            self._written(_each(wanted, "greedy"), do_sample=False),
            self._written(_each(wanted, "sampled"), do_sample=True),
            self._losses(_each(wanted, "read")),
        )

    def values(self, record: FactRecord, seen: Readings, before: Readings | None = None) -> dict[str, float]:
        """The numbers of a record by column, without those that there are none of."""
        return {name: value for measure in self.measures for name, value in measure.values(record, seen, before).items()}

    def _losses(self, texts: list[str]) -> dict[str, float]:
        rows = [Row(row.ids[:WRITTEN], row.prompt) for row in (plain(self.scorer.tokenizer, text) for text in texts)]
        if not rows:
            return {}
        found = text_losses(self.model, rows, max_tokens=self.max_tokens)
        return dict(zip(texts, (found.nats / found.tokens).tolist(), strict=True))

    def _written(self, prompts: list[str], *, do_sample: bool) -> dict[str, str]:
        """What the model writes behind each prompt: up to `WRITTEN` tokens in all by chance, `GREEDY` new ones otherwise."""
        if not prompts:
            return {}
        rows = [self.scorer.prompt_ids(prompt) for prompt in prompts]
        room = [max(WRITTEN - len(ids), 1) if do_sample else GREEDY for ids in rows]
        chance = {"do_sample": True, "top_k": LIKELIEST, "top_p": 1.0, "temperature": 1.0} if do_sample else {"do_sample": False}
        tokenizer = self.scorer.tokenizer
        padding = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
        written = continuations(
            self.model, rows, room, pad=padding, max_tokens=self.max_tokens, seed=self.seed, progress=self.progress, **chance
        )
        return {prompt: self._behind(ids, new) for prompt, ids, new in zip(prompts, rows, written, strict=True)}

    def _behind(self, prompt: tuple[int, ...], ids: Sequence[int]) -> str:
        """The text of tokens behind others: alone, some tokenizers give it without the blank before it."""
        tokenizer = self.scorer.tokenizer
        start = tokenizer.decode(prompt, skip_special_tokens=True)
        return str(tokenizer.decode((*prompt, *ids), skip_special_tokens=True)).removeprefix(start)


def _each(wanted: Iterable[Wanted], what: str) -> list[str]:
    """All texts of a kind, each once."""
    return list(dict.fromkeys(text for each in wanted for text in getattr(each, what)))
