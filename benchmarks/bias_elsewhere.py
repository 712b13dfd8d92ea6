"""A circuit of `steer bias` on data that did not come with it: other professions, and the sentences of Winogender.

    python benchmarks/bias_elsewhere.py CIRCUIT --professions CSV --winogender PATH [--strength 1]

CIRCUIT is a folder in outputs/bias/gender_pronoun/circuits. CSV has a column `profession` (2506.05166); those on which circuits were found
and those that state a gender are left out. PATH is what `steer.bias.load("winogender", path=...)` reads. Prints the shift before and
after, with 95 % intervals over professions, and factual gender on `steer.bias.words.TEST` without the words of the experiment.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import steer
import steer.bias
from steer.bias import words
from steer.circuits import Circuit
from steer.experiment.data import DataSet

STATES_GENDER = re.compile(r"(man|men|woman|boy|girl|lady|ess|housewife|nun|monk|king|queen|mother|father|maid|maiden|butler|priest)$")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("circuit", type=Path)
    parser.add_argument("--professions", type=Path, required=True)
    parser.add_argument("--winogender", type=Path, required=True)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, tokenizer = steer.load("smollm2-135m")
    model = model.float().eval()
    data = DataSet("gender_pronoun")
    found_on = {row["text"] for row in data.split("occupations_find")}
    known = {word for pair in data.split("gender_words_find") for word in (pair["male"], pair["female"])}
    with options.professions.open(encoding="utf-8") as file:
        named = [row["profession"].replace("_", " ") for row in csv.DictReader(file)]
    professions = [word for word in named if word not in found_on and not STATES_GENDER.search(word)]
    sentences = steer.bias.load("winogender", path=options.winogender)
    pairs = [pair for pair in words.TEST if not set(pair) & known]
    circuit = Circuit.load(options.circuit)
    result: dict[str, Any] = {"circuit": repr(circuit), "strength": options.strength, "professions": len(professions), "pairs": len(pairs)}
    for name, context in (("plain", nullcontext()), ("ablated", circuit.ablation_plan(model, options.strength).attached(model))):
        with context:
            result[name] = {
                "professions": _said(steer.bias.pronoun_shift(model, professions, tokenizer, progress=False).size),
                "winogender": _said(steer.bias.sentence_shift(model, sentences, tokenizer, progress=False).size),
                **{key: _said(value) for key, value in steer.bias.factual_gender(model, tokenizer, pairs=pairs).values().items()},
            }
    for key in ("professions", "winogender", "factual gap"):
        result[f"change of {key}"] = result["ablated"][key][0] / result["plain"][key][0] - 1
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def _said(estimate: Any) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


if __name__ == "__main__":
    main()
