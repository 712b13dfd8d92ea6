"""The heads behind the pronoun of a profession: found by attribution, ablated, and measured on other professions. Half a minute on a CPU.

`steer bias experiment=gender_pronoun` does it with learned gates, controls, baselines and what it costs, on one page.
"""

from __future__ import annotations

import argparse

import torch

import steer
import steer.bias
from steer.circuits import Circuit, LogitDifference, Pairs, attribute, mean_ablation
from steer.experiment.data import DataSet

FIND = ["nurse", "secretary", "housekeeper", "receptionist"]
TEST = ["librarian", "teacher", "carpenter", "engineer", "plumber", "soldier"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="the embedded model, a hub id or a folder (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="heads to ablate (default: %(default)s)")
    parser.add_argument("--words", nargs="+", default=TEST, help="professions to measure on (default: %(default)s)")
    args = parser.parse_args()

    model, tokenizer = steer.load(args.model)
    she, he = (tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in ("she", "he"))
    text = "The {} was late because"

    # What makes 'she' likelier after a profession than after 'person'? The counterfactual has as many tokens.
    clean = [text.format(word) for word in FIND]
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in clean]
    fillers = [text.format("person" + " there" * more) for more in range(4)]
    by_length = {len(tokenizer(prompt)["input_ids"]): prompt for prompt in fillers}
    pairs = Pairs.of(model, clean, [by_length[length] for length in lengths], tokenizer=tokenizer)
    scores = attribute(model, pairs, LogitDifference(she, he), method="eap", progress=False)
    anatomy = steer.Anatomy.find(model)
    names = [f"a{layer}.h{head}" for layer in range(anatomy.n_layers) for head in range(model.config.num_attention_heads)]
    strongest = sorted(names, key=lambda name: -scores[name])[: args.heads]
    print("heads:", ", ".join(strongest))

    # Their means over ordinary text take their place.
    texts = [row["text"] for row in DataSet("gender_pronoun").split("learning")[:8]]
    circuit = Circuit.of_nodes(model, strongest).with_ablation(mean_ablation(model, texts, tokenizer=tokenizer))
    jobs = steer.bias.load("professions", words=args.words)
    with torch.no_grad():
        before = steer.bias.measure(model, jobs, tokenizer)["all"]
        with circuit.ablation_plan(model).attached(model):
            after = steer.bias.measure(model, jobs, tokenizer)["all"]
    for name in ("|shift|", "factual gap"):  # what a job does to he or she; what the model knows of father and mother
        print(f"{name}: {before[name].value:.2f} nat before, {after[name].value:.2f} after")


if __name__ == "__main__":
    main()
