"""A language model whose every log-probability is known by hand, its tokenizer, and files of bias data sets in the published forms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

WORDS = (
    '<pad> <s> </s> <unk> . , : " ? the The a he she him her his they nurse guard doctor cook patient someone person man woman father '
    "mother actor actress said thanked helped because was is are so did mistake and everyone scolded praised kind rude good bad black "
    "white cat dog sat ran green sun In this sentence refers to Context Question Answer Who old young people tired saw not known"
).split()


def words_tokenizer(padding_side: str = "right", start: str | None = "<s>") -> PreTrainedTokenizerFast:
    """One token for each word of `WORDS` and each punctuation mark; no token is added to a text."""
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token=start, eos_token=None, unk_token="<unk>", padding_side=padding_side
    )


class Bigram(nn.Module):
    """log p(next | text) depends on the last word alone: what is not in `likely` has logit 0.

    Args:
        likely: logit by (word, next word).
    """

    def __init__(self, likely: dict[tuple[str, str], float] | None = None) -> None:
        super().__init__()
        table = torch.zeros(len(WORDS), len(WORDS))
        for (word, following), logit in (likely or {}).items():
            table[WORDS.index(word), WORDS.index(following)] = logit
        self.table = nn.Embedding.from_pretrained(table)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.table(input_ids))

    def logprob(self, *words: str) -> float:
        """log p of each word behind the one before it, added up."""
        table = self.table.weight.double().log_softmax(-1)
        places = [WORDS.index(word) for word in words]
        return sum(float(table[a, b]) for a, b in zip(places, places[1:], strict=False))


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_crows(path: Path, rows: Sequence[tuple[str, str, str, str]]) -> Path:
    """(more, less, direction, kind)."""
    lines = [",sent_more,sent_less,stereo_antistereo,bias_type,annotations"]
    lines += [f'{number},{more},{less},{direction},{kind},"[[]]"' for number, (more, less, direction, kind) in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def stereoset_item(
    name: str, target: str, stereo: str, anti: str, unrelated: str, kind: str = "gender", votes: bool = True
) -> dict[str, Any]:
    """An item as dev.json has it, with five votes for each label."""
    sentences = []
    for label, text in (("anti-stereotype", anti), ("unrelated", unrelated), ("stereotype", stereo)):
        sentence: dict[str, Any] = {"sentence": text, "id": f"{name}-{label}", "gold_label": label}
        if votes:
            sentence["labels"] = [{"label": label, "human_id": str(i)} for i in range(4)] + [{"label": "related", "human_id": "4"}]
        sentences.append(sentence)
    return {"id": name, "target": target, "bias_type": kind, "context": "The BLANK", "sentences": sentences}


def write_stereoset(path: Path, items: Sequence[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"version": "1.0", "data": {"intersentence": [], "intrasentence": list(items)}}), encoding="utf-8")
    return path


def bbq_row(
    example: int, polarity: str, condition: str, label: int, *, groups: Sequence[str] = ("old", "nonOld", "unknown"), biased: str = "old"
) -> dict[str, Any]:
    """A question whose answers are `old`, `young` and `not known`."""
    return {
        "example_id": example,
        "question_index": "1",
        "question_polarity": polarity,
        "context_condition": condition,
        "category": "Age",
        "answer_info": {f"ans{i}": [group, group] for i, group in enumerate(groups)},
        "additional_metadata": {"stereotyped_groups": [biased]},
        "context": "the old saw the young .",
        "question": "Who was tired ?",
        "ans0": "old",
        "ans1": "young",
        "ans2": "not known",
        "label": label,
    }
