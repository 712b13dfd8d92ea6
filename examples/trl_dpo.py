"""DPO on SmolLM2-135M with TRL: the policy pass is steered, the reference pass is not, and the drift is measured.

The pairs prefer an over-enthusiastic tone. A minute or two on a CPU. Needs `pip install trl datasets`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

import steer
from steer.callbacks import HFDriftCallback, HFSteeringCallback
from steer.experiment.data import DataSet
from steer.model.tokens import encode

SITE = "layers.22.output"  # the residual stream after block 22


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="the embedded model, a hub id or a folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps (default: %(default)s)")
    parser.add_argument(
        "--strength", type=float, default=1.0, help="1 adds one gap between the classes, 0 does not steer (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("out/trl_dpo"), help="folder of checkpoints and records (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    args = parser.parse_args()

    model, tokenizer = steer.load(args.model)
    data = DataSet("tone")  # answers with and without an over-enthusiastic tone
    contrast = steer.ContrastSet.from_pairs(tokenizer, data.split("contrast")[:12])
    gushing = steer.extract(model, contrast, [SITE], name="gushing")

    plan = steer.Plan(steer.Intervention(steer.Add(gushing[SITE].vector), SITE, scope="response", strength=args.strength))
    probe = [encode(tokenizer, row["prompt"]) for row in data.split("probe")[:6]]
    tracker = steer.DriftTracker({"gushing": gushing}, probe=probe, store=args.out / "drift.sqlite")

    pairs = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["answer"]}],
            "rejected": [{"role": "assistant", "content": row["neutral"]}],
        }
        for row in data.split("train")
    ]
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=2,
            learning_rate=5e-4,
            logging_steps=1,
            save_steps=4,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    steering = HFSteeringCallback(plan).attach(trainer)
    HFDriftCallback(tracker, every_n_steps=2).attach(trainer)
    trainer.train(resume_from_checkpoint=args.resume)

    for entry in trainer.state.log_history:
        if (effect := entry.get(f"drift/gushing/{SITE}/effect_sd")) is not None:
            margin = entry["rewards/margins"]
            print(f"step {entry['step']:3d}  loss {entry['loss']:.3f}  reward margin {margin:+.3f}  drift {effect:+.2f} SD")
    print("steered tokens (policy pass only):", steering.attachment.fired())


if __name__ == "__main__":
    main()
