"""What `Direction.suggested_strength` does to the model's own answers, beside the plain model: how many loop, and how far they move.

    python benchmarks/suggested_strength.py --pairs examples/pairs/*.jsonl --prompts prompts.txt

Every file has some twenty pairs of one concept, and every line of the prompts is a message that has nothing to do with them: the first
few are for the first concept, the next for the second. Answers are greedy. One loops when a quarter of its runs of four tokens stood in
it before; how far it moves is read from its text alone by the unsteered model, 0 as the negative answers of the pairs and 1 as the
positive ones do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import steer
from steer.experiment.calibrate import _loops, _Talk, candidate_sites
from steer.model.tokens import encode


def measure(
    model: Any, tokenizer: Any, pairs: Sequence[dict[str, str]], prompts: Sequence[str], layers: Sequence[int], max_new_tokens: int
) -> dict[str, Any]:
    """Loops of the plain answer to every prompt; by layer, loops and movement of the steered ones."""
    contrast = steer.ContrastSet.from_pairs(tokenizer, pairs)
    directions = steer.extract(model, contrast, candidate_sites(model), name="concept", progress=False)
    chosen = [directions[f"layers.{layer}.output"] for layer in layers]
    talk = _Talk(model, tokenizer, directions, contrast, "all", max_new_tokens)
    talk.prompts = [encode(tokenizer, prompt) for prompt in prompts]
    said, moved = talk.answers([(direction, direction.suggested_strength) for direction in chosen])
    steered = {
        str(direction.site): {
            "loops": [bool(_loops(row)) for row in rows],
            "moves": moves.tolist(),
            "answers": [tokenizer.decode(row.ids[row.prompt :]) for row in rows],
        }
        for direction, rows, moves in zip(chosen, said, moved, strict=True)
    }
    return {"plain": [bool(_loops(row)) for row in talk.plain], "steered": steered}


def line(name: str, results: Sequence[dict[str, Any]]) -> str:
    """Loops and movement of one concept, or of several together."""
    plain = [loops for result in results for loops in result["plain"]]
    cells = [cell for result in results for cell in result["steered"].values()]
    loops = torch.tensor([loops for cell in cells for loops in cell["loops"]])
    moves = torch.tensor([moves for cell in cells for moves in cell["moves"]])
    counted = torch.where(loops, 0.0, moves)  # a loop is no move
    return (
        f"{name:<14} loop: {sum(plain)} of {len(plain)} plain, {int(loops.sum())} of {len(loops)} steered; "
        f"steered ones move by {moves.mean():+.2f}, by {counted.mean():+.2f} where a loop is no move"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="the embedded model, a hub id or a folder (default: %(default)s)")
    parser.add_argument("--pairs", type=Path, nargs="+", required=True, help="files of lines with prompt, positive and negative")
    parser.add_argument("--prompts", type=Path, required=True, help="a message a line")
    parser.add_argument("--each", type=int, default=8, help="prompts for each concept (default: %(default)s)")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 20])
    parser.add_argument("--tokens", type=int, default=48, help="length of an answer (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="JSON file of everything that was measured")
    args = parser.parse_args()

    model, tokenizer = steer.load(args.model)
    prompts = args.prompts.read_text(encoding="utf-8").splitlines()
    results: dict[str, Any] = {}
    for i, file in enumerate(args.pairs):
        pairs = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
        asked = prompts[i * args.each : (i + 1) * args.each]
        results[file.stem] = measure(model, tokenizer, pairs, asked, args.layers, args.tokens)
        print(line(file.stem, [results[file.stem]]), flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(line("all", list(results.values())))


if __name__ == "__main__":
    main()
