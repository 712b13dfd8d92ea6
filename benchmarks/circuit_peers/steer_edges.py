"""Edge scores of steer, told what to do as `eap_ig.py` is: `python steer_edges.py FOLDER`."""

import json
import sys
import time
from pathlib import Path

import torch
from memory import peak_bytes, reset_peak
from transformers import AutoModelForCausalLM, AutoTokenizer

from steer.circuits import LogitDifference, Pairs, attribute
from steer.circuits.attribution_methods.eap_ig import EAPIG
from steer.model.tokens import Row, collate

FOLDER = Path(sys.argv[1])
torch.set_num_threads(1)
told = json.loads((FOLDER / "pairs.json").read_text())
model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(FOLDER)


def rows(texts: list[str]) -> list[Row]:
    return [Row((tokenizer.bos_token_id, *tokenizer(text).input_ids), 0) for text in texts]


clean, corrupted = rows(told["clean"]), rows(told["corrupted"])
pairs, target = Pairs.of(model, clean, corrupted), LogitDifference(told["right"], told["wrong"])
batches = [collate(clean[start : start + told["batch"]], 0) for start in range(0, len(clean), told["batch"])]
tokens = max(batch["input_ids"].numel() for batch in batches)


def forward() -> float:
    began = time.process_time()
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return time.process_time() - began


def run(method: str) -> dict[str, float]:
    before = reset_peak()
    began = time.process_time()
    scores = attribute(
        model, pairs, target, method="eap" if method == "eap" else EAPIG(told["steps"]), max_tokens=tokens, progress=False
    )  # fmt: skip
    seconds = time.process_time() - began
    used = peak_bytes() - before
    scores.save(FOLDER / f"steer_{method}")
    return {"seconds": seconds, "bytes": used, "forward_seconds": forward()}


forward()
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    print(json.dumps(run(line.strip())), flush=True)
