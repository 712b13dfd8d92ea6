"""In-context learning over a small training run: do induction heads and the in-context-learning score come at once, as a phase change?

    python benchmarks/in_context_phases.py [--steps 700] [--every 25] [--seed 0] [--out FILE] [--figure FILE]

Attention-only models of one and two layers learn sequences in which a random segment, of another length in every sequence, is said again
and again; a table of likely pairs of tokens can be learned beside it. Every few steps: the in-context-learning score (mean loss of the late
tokens less that of the early ones; negative is better), and the highest induction and previous-token scores of all heads on random
tokens said twice. A model of one layer cannot make an induction head of two, and is the control. At the end heads are ablated by their
means.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import steer
from steer.circuits import Head, head_effects, head_scores, repeated_tokens
from steer.files import atomic_write
from steer.model.tokens import Row

VOCAB, TOKENS, WIDTH, HEADS = 64, 64, 64, 4
SHORTEST, LONGEST = 8, 24  # tokens of a segment
EARLY, LATE = slice(1, 8), slice(48, TOKENS)
BATCH, RATE = 32, 3e-3
PHASE = 0.6  # share of all the change of the score that one fifth of the steps must hold to be called a phase change


class NoMLP(nn.Module):
    """Takes the place of an MLP in an attention-only model."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def model_of(layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4, "num_hidden_layers": layers, "num_attention_heads": HEADS}
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=TOKENS, bos_token_id=None, eos_token_id=None, **sizes)
    model = LlamaForCausalLM(config)
    for block in model.model.layers:
        block.mlp = NoMLP()
    return model


def sequences(n: int, likely: Tensor, generator: torch.Generator) -> Tensor:
    """[n, TOKENS]: segments drawn from a table of likely pairs [VOCAB, VOCAB], each said again until the sequence is full."""
    segment = torch.zeros(n, LONGEST, dtype=torch.long)
    segment[:, 0] = torch.randint(VOCAB, (n,), generator=generator)
    for place in range(1, LONGEST):
        segment[:, place] = torch.multinomial(likely[segment[:, place - 1]], 1, generator=generator)[:, 0]
    lengths = torch.randint(SHORTEST, LONGEST + 1, (n, 1), generator=generator)
    return segment.gather(1, torch.arange(TOKENS) % lengths)


def pair_table(seed: int) -> Tensor:
    """[VOCAB, VOCAB] probabilities of the next token: some pairs are likely, most tokens may follow any."""
    return (1.5 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """[tokens - 1] in nats, mean over sequences."""
    logits = model(ids).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(0)


def late_log_probability(rows: list[Row]) -> Any:
    """Target: mean log-probability of the late tokens."""

    def target(logits: Tensor, prompt: int) -> Tensor:
        ids = torch.tensor(rows[prompt].ids)
        return logits[:-1].log_softmax(-1).gather(-1, ids[1:, None])[LATE.start - 1 :].mean()

    return target


def trained(layers: int, steps: int, every: int, seed: int) -> tuple[LlamaForCausalLM, list[dict[str, float]], Tensor]:
    """The model, what was measured every few steps, and the table of pairs."""
    model, likely = model_of(layers, seed), pair_table(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    held_out = sequences(256, likely, torch.Generator().manual_seed(seed + 2))
    probe = repeated_tokens(model, n=8, length=24, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    measured = []
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            with torch.no_grad():
                losses = token_losses(model.eval(), held_out)
            scores = head_scores(model, ("induction", "previous_token"), probe)
            early, late = float(losses[EARLY.start - 1 : EARLY.stop - 1].mean()), float(losses[LATE.start - 1 : LATE.stop - 1].mean())
            measured.append({"step": step, "loss": float(losses.mean()), "early": early, "late": late, "in_context": late - early}
                            | {kind: scores.top(kind, 1)[0][1] for kind in scores.scores})  # fmt: skip
        if step < steps:
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1, (step + 1) / 50)
            loss = token_losses(model.train(), sequences(BATCH, likely, generator)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), measured, likely


def phase(measured: list[dict[str, float]], name: str) -> dict[str, Any]:
    """The fifth of the steps in which a number changes most, and how much of all its change that is."""
    values, steps = [entry[name] for entry in measured], [entry["step"] for entry in measured]
    width = max(1, round((len(values) - 1) / 5))
    spread = max(values) - min(values)
    start = max(range(len(values) - width), key=lambda i: abs(values[i + width] - values[i]))
    share = abs(values[start + width] - values[start]) / spread if spread else 0.0
    return {"from_step": steps[start], "to_step": steps[start + width], "share_of_change": share, "is_phase_change": share >= PHASE}


def at_the_end(model: LlamaForCausalLM, likely: Tensor, seed: int) -> dict[str, Any]:
    """Change of the log-probability of late tokens when the best head of each kind is ablated by its mean, beside all other heads."""
    scores = head_scores(model, ("induction", "previous_token"), repeated_tokens(model, n=8, length=24, seed=seed + 5))
    rows = [Row(tuple(row), 0) for row in sequences(64, likely, torch.Generator().manual_seed(seed + 3)).tolist()]
    means = [Row(tuple(row), 0) for row in sequences(64, likely, torch.Generator().manual_seed(seed + 4)).tolist()]
    heads = [Head(layer, head) for layer in range(model.config.num_hidden_layers) for head in range(HEADS)]
    effects = head_effects(model, heads, rows, late_log_probability(rows), ablations=["mean"], means_from=means)
    changes = {str(head): change for head, change in zip(heads, effects.mean("mean").tolist(), strict=True)}
    best = {kind: str(scores.top(kind, 1)[0][0]) for kind in scores.scores}
    others = [change for head, change in changes.items() if head not in best.values()]
    return {
        "top": {kind: {"head": head, "score": scores.top(kind, 1)[0][1], "change": changes[head]} for kind, head in best.items()},
        "other_heads_mean_change": sum(others) / len(others),
        "changes": changes,
        "clean_late_log_probability": float(effects.clean.mean()),
    }


def draw(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), layout="constrained")
    rows = figure.subplots(2, len(results), squeeze=False, sharey="row", sharex=True)
    for column, (layers, result) in enumerate(results.items()):
        steps = [entry["step"] for entry in result["measured"]]
        for ax, names in zip(rows[:, column], (("early", "late", "in_context"), ("induction", "previous_token")), strict=True):
            for name in names:
                ax.plot(steps, [entry[name] for entry in result["measured"]], label=name.replace("_", " "))
            ax.legend(frameon=False)
        rows[0, column].set_title(f"{layers} layer{'s' * (int(layers) > 1)}", loc="left")
        rows[1, column].set_xlabel("step")
    rows[0, 0].set_ylabel("loss, nats")
    rows[1, 0].set_ylabel("highest head score")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    table = Table("layers", "in-context score", "steps", "share", "induction", "steps", "previous token", "ablated", "others", "CPU s")
    for layers in (1, 2):
        start = time.process_time()
        model, measured, likely = trained(layers, given.steps, given.every, given.seed)
        end = at_the_end(model, likely, given.seed)
        phases = {name: phase(measured, name) for name in ("in_context", "induction", "previous_token")}
        seconds = time.process_time() - start
        results[str(layers)] = {"measured": measured, "phases": phases, "ablation": end, "cpu_seconds": round(seconds, 1)}
        last, found = measured[-1], phases["in_context"]
        table.add_row(
            str(layers), f"{last['in_context']:+.2f}", f"{found['from_step']}-{found['to_step']}", f"{found['share_of_change']:.2f}",
            f"{last['induction']:.2f}", f"{phases['induction']['from_step']}-{phases['induction']['to_step']}",
            f"{last['previous_token']:.2f}",
            f"{end['top']['induction']['change']:+.2f}", f"{end['other_heads_mean_change']:+.2f}", f"{seconds:.0f}",
        )  # fmt: skip
    Console().print(table)
    settings = {"steps": given.steps, "every": given.every, "seed": given.seed, "batch": BATCH, "rate": RATE, "phase_share": PHASE}
    if given.out is not None:
        atomic_write(given.out, json.dumps({"settings": settings, "version": steer.__version__, "layers": results}, indent=1).encode())
    if given.figure is not None:
        draw(results, given.figure)


if __name__ == "__main__":
    main()
