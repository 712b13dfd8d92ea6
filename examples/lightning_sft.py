"""Fine-tune SmolLM2-135M under PyTorch Lightning with a plan active and its drift tracked. A minute or two on a CPU.

The checkpoint that is kept is the one with the least drift along the trait.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

import steer
from steer.callbacks import DriftCallback, SteeringCallback
from steer.experiment.data import DataSet
from steer.model.tokens import collate, encode, pad_id

SITE = "layers.22.output"  # the residual stream after block 22


class FineTune(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.model(**batch, use_cache=False).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="the embedded model, a hub id or a folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps, two micro-batches each (default: %(default)s)")
    parser.add_argument(
        "--strength", type=float, default=1.0, help="1 adds one gap between the classes, 0 does not steer (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/lightning_sft"), help="folder of checkpoints and records (default: %(default)s)"
    )
    parser.add_argument("--resume", type=Path, default=None, help="checkpoint to go on from; the records go on where it was saved")
    args = parser.parse_args()
    pl.seed_everything(0, verbose=False)

    model, tokenizer = steer.load(args.model)
    data = DataSet("tone")  # answers with and without an over-enthusiastic tone
    contrast = steer.ContrastSet.from_pairs(tokenizer, data.split("contrast")[:12])
    gushing = steer.extract(model, contrast, [SITE], name="gushing")

    plan = steer.Plan(steer.Intervention(steer.Add(gushing[SITE].vector), SITE, scope="response", strength=args.strength))
    probe = [encode(tokenizer, row["prompt"]) for row in data.split("probe")[:6]]
    tracker = steer.DriftTracker({"gushing": gushing}, probe=probe, store=args.out / "drift.sqlite")

    trainer = pl.Trainer(
        max_steps=args.steps,
        accumulate_grad_batches=2,
        accelerator="cpu",
        enable_model_summary=False,
        logger=pl.loggers.CSVLogger(args.out, name="log"),
        callbacks=[
            # full strength at first, none at the end; never in validation
            SteeringCallback(plan, schedule=steer.Linear(args.steps, start=1.0, end=0.0)),
            DriftCallback(tracker, every_n_steps=4),
            pl.callbacks.ModelCheckpoint(
                args.out, monitor=f"drift/gushing/{SITE}/effect_sd", mode="min", every_n_train_steps=4, save_last=True, filename="{step}"
            ),
        ],
    )
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    rows = [encode(tokenizer, row["prompt"], row["answer"]) for row in data.split("train")]
    batches = DataLoader(rows, batch_size=2, collate_fn=lambda chosen: collate(chosen, pad_id(tokenizer)))  # type: ignore[arg-type]
    trainer.fit(FineTune(adapted), batches, ckpt_path=args.resume)

    print("least drift:", trainer.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    for name, value in sorted(trainer.callback_metrics.items()):
        print(f"{name:60s} {float(value):+.3f}")


if __name__ == "__main__":
    main()
