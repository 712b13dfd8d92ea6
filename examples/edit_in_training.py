"""A fact is edited into SmolLM2-135M, the model is fine-tuned on something else, and the edit is watched and kept. A minute on a CPU."""

from __future__ import annotations

import argparse
import tempfile

import pytorch_lightning as pl
import torch

import steer
from steer.callbacks import EditCallback
from steer.edits import Covariance
from steer.experiment.data import DataSet
from steer.experiment.sft import SFTModule, loader
from steer.model.tokens import encode, pad_id

LAYER = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="the embedded model, a hub id or a folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=12, help="running texts for the covariance of keys (default: %(default)s)")
    parser.add_argument("--protect", default="resolve", help="alarm, resolve, project, freeze or damp (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)

    model, tokenizer = steer.load(args.model)
    texts = [row["text"] for row in DataSet("gender_pronoun").split("learning")][: args.texts]
    fact = steer.Fact.of("The {} is in the city of", "Eiffel Tower", "Rome", true="Paris")
    covariance = Covariance.fit(model, tokenizer, texts, [LAYER])
    edit = steer.edit_facts(model, tokenizer, fact, editor="rome", layers=[LAYER], covariance=covariance)

    tone = DataSet("tone")
    rows = [encode(tokenizer, row["prompt"], row["answer"]) for row in tone.split("train")]
    batches = loader(rows, batch_size=2, pad=pad_id(tokenizer), seed=0, max_length=96, steps=args.steps)
    callback = EditCallback(edit, tokenizer, at_step=0, every_n_steps=1, protect=args.protect)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=args.steps,
            callbacks=[callback],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = SFTModule(model.train(), learning_rate=1e-5, warmup_steps=1, steps=args.steps)
        trainer.fit(module, batches)
    for name, value in sorted(trainer.callback_metrics.items()):
        if name.startswith("edit/"):
            print(f"{name}: {float(value):.3g}")

    prompt = tokenizer("The Eiffel Tower is in the city of", return_tensors="pt")
    with torch.no_grad():
        print("after training:", tokenizer.decode(model.eval().generate(**prompt, max_new_tokens=2, do_sample=False)[0]))
    steer.EditedWeights.of(model).revert(edit)
    with torch.no_grad():
        print("reverted:      ", tokenizer.decode(model.generate(**prompt, max_new_tokens=2, do_sample=False)[0]))


if __name__ == "__main__":
    main()
