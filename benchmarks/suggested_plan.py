"""What `Direction.suggested_plan` does to the model's own answers, beside the plain model and the same direction added to every token.

    python benchmarks/suggested_plan.py --pairs examples/pairs/*.jsonl --prompts prompts.txt

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
from steer.directions import Direction
from steer.experiment.calibrate import _loops, _Talk, candidate_sites
from steer.model.tokens import encode

EVERYWHERE = 0.2  # the relative dose of the direction on every token


def measure(
    model: Any, tokenizer: Any, pairs: Sequence[dict[str, str]], prompts: Sequence[str], layers: Sequence[int], max_new_tokens: int
) -> dict[str, Any]:
    """Per way of steering and layer, loops and movement of the answer to every prompt."""
    contrast = steer.ContrastSet.from_pairs(tokenizer, pairs)
    directions = steer.extract(model, contrast, candidate_sites(model), name="concept", progress=False)
    chosen = [directions[f"layers.{layer}.output"] for layer in layers]
    everywhere = _Talk(model, tokenizer, directions, contrast, "all", max_new_tokens)
    suggested = _Talk(model, tokenizer, directions, contrast, str(chosen[0].suggested_plan.interventions[0].scope), max_new_tokens)
    everywhere.prompts = suggested.prompts = [encode(tokenizer, prompt) for prompt in prompts]
    measured = {"everywhere": _answers(everywhere, tokenizer, [(at, at.strength_of(EVERYWHERE)) for at in chosen])}
    suggested.plain, suggested._plain_readings = everywhere.plain, everywhere._plain_readings  # decoded once
    measured["suggested"] = _answers(suggested, tokenizer, [(at, at.suggested_plan.interventions[0].strength[0]) for at in chosen])
    return {"plain": [bool(_loops(row)) for row in everywhere.plain], **measured}


def _answers(talk: _Talk, tokenizer: Any, steps: Sequence[tuple[Direction, float]]) -> dict[str, Any]:
    said, moved = talk.answers(steps)
    return {
        str(direction.site): {
            "strength": strength,
            "loops": [bool(_loops(row)) for row in rows],
            "moves": moves.tolist(),
            "answers": [tokenizer.decode(row.ids[row.prompt :]) for row in rows],
        }
        for (direction, strength), rows, moves in zip(steps, said, moved, strict=True)
    }


def line(name: str, results: Sequence[dict[str, Any]]) -> str:
    """Loops and movement of one concept, or of several together."""
    plain = [loops for result in results for loops in result["plain"]]
    text = f"{name:<14} plain: {sum(plain)} of {len(plain)} loop"
    for way in ("everywhere", "suggested"):
        cells = [cell for result in results for cell in result[way].values()]
        loops = torch.tensor([loops for cell in cells for loops in cell["loops"]])
        moves = torch.tensor([moves for cell in cells for moves in cell["moves"]])
        counted = torch.where(loops, 0.0, moves)  # a loop is no move
        text += f" | {way}: {int(loops.sum())} of {len(loops)} loop, move by {moves.mean():+.2f}, loops as 0 {counted.mean():+.2f}"
    return text


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
