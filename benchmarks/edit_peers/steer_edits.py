"""ROME of steer, told what to do as `easyedit.py` is: `python steer_edits.py FOLDER BATCHED`.

BATCHED is 1 where the values of all facts are optimised together before an edit is made of each, 0 where each fact is a call of its own.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steer.edits import Contexts, Covariance, Fact, ValueStore, edit_facts, solve_values
from steer.edits.answer_scores import AnswerScorer
from steer.edits.editors.rome import ROME
from steer.edits.value_settings import ValueSettings

FOLDER, BATCHED = Path(sys.argv[1]), sys.argv[2] == "1"
torch.set_num_threads(1)
task = json.loads((FOLDER / "task.json").read_text())
model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
covariance = Covariance.load(FOLDER / "covariance")
facts = [Fact.of(**fact) for fact in task["facts"]]
settings = ValueSettings(lr=0.5, steps=task["steps"], clamp=4.0, clamp_of="mlp_output", kl=0.0625, weight_decay=0.5, stop_loss=0.05)
editor, layer = ROME(value_settings=settings), task["layer"]
scorer = AnswerScorer(model, tokenizer, progress=False)


class Steps(ValueStore):
    """Counts steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def put(self, values) -> None:  # noqa: ANN001
        super().put(values)
        self.steps += [value.steps for value in values.values()]


def run(number: str) -> dict[str, object]:
    contexts, values = Contexts(tuple(task["contexts"][number])), Steps()
    began = time.process_time()
    if BATCHED:
        solve_values(model, tokenizer, facts, contexts, layer, settings, cache=values)
    edits = [
        edit_facts(model, tokenizer, fact, editor=editor, layers=[layer], covariance=covariance, contexts=contexts, values=values)
        for fact in facts
    ]
    seconds = time.process_time() - began
    probabilities = []
    for fact, edit in zip(facts, edits, strict=True):
        with edit.applied(model):
            probabilities.append(scorer.scores([(fact.prompt, fact.target)])[fact.prompt, fact.target].probability)
    return {"seconds": seconds, "edits": len(facts), "steps": values.steps, "probabilities": probabilities}


print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    print(json.dumps(run(line.strip())), flush=True)
