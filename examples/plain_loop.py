"""Fine-tune SmolLM2-135M in a plain PyTorch loop, steered along a trait, with its drift measured. A minute or two on a CPU."""

from __future__ import annotations

import argparse
from itertools import cycle

import torch
from peft import LoraConfig, get_peft_model

import steer
from steer.experiment.data import DataSet
from steer.model.tokens import collate, encode, pad_id

SITE = "layers.22.output"  # the residual stream after block 22


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="the embedded model, a hub id or a folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps (default: %(default)s)")
    parser.add_argument(
        "--strength", type=float, default=1.0, help="1 adds one gap between the classes, 0 does not steer (default: %(default)s)"
    )
    parser.add_argument("--store", default=None, help="file to keep the drift records in, e.g. drift.sqlite")
    args = parser.parse_args()
    torch.manual_seed(0)

    model, tokenizer = steer.load(args.model)
    data = DataSet("tone")  # answers with and without an over-enthusiastic tone

    # The direction of the tone, read from pairs of answers.
    contrast = steer.ContrastSet.from_pairs(tokenizer, data.split("contrast")[:12])
    gushing = steer.extract(model, contrast, [SITE], name="gushing")

    # What acts, where, on which tokens, how strongly; and what is measured, beside 16 random directions of the same site.
    plan = steer.Plan(
        steer.Intervention(steer.Add(gushing[SITE].vector), SITE, scope="response", strength=args.strength, phases=("train",))
    )
    probe = [encode(tokenizer, row["prompt"]) for row in data.split("probe")[:6]]
    tracker = steer.DriftTracker({"gushing": gushing}, probe=probe, store=args.store)

    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-3)
    rows = [encode(tokenizer, row["prompt"], row["answer"]) for row in data.split("train")]
    batches = cycle([collate(rows[i : i + 2], pad_id(tokenizer)) for i in range(0, len(rows), 2)])

    adapted.train()
    # After the last wrapper. The hooks are taken off on every way out.
    with plan.attached(adapted) as attachment, tracker.attached(adapted):
        print(attachment.explain())
        tracker.measure(0)
        for step, batch in zip(range(1, args.steps + 1), batches, strict=False):
            loss = adapted(**batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            attachment.step(step)  # schedules follow optimiser steps
            if step % 4 == 0 or step == args.steps:
                tracker.measure(step)
                drift = {
                    name.rsplit("/", 1)[1]: f"{value:+.2f}" for name, value in tracker.log_values().items() if name.startswith("drift/")
                }
                print(f"step {step:3d}  loss {loss.item():.3f}  drift of the tone {drift}")
    print("steered tokens:", attachment.fired())


if __name__ == "__main__":
    main()
