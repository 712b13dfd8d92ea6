"""From twenty pairs of answers to a plan: the direction, the layer and the dose of a mood, chosen by what the model then says.

About a minute on a CPU. The pairs are lines of a file; name your own with --pairs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import steer

PAIRS = Path(__file__).parent / "pairs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="the embedded model, a hub id or a folder (default: %(default)s)")
    parser.add_argument(
        "--pairs", type=Path, default=PAIRS / "mood.jsonl", help="lines with prompt, positive and negative (default: cheerful or sad)"
    )
    parser.add_argument("--sites", nargs="+", default=None, help="candidates (default: five layers of the middle)")
    parser.add_argument("--tokens", type=int, default=40, help="length of an answer (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("plan"), help="where the plan is saved (default: %(default)s)")
    args = parser.parse_args()

    model, tokenizer = steer.load(args.model)
    pairs = [json.loads(line) for line in args.pairs.read_text(encoding="utf-8").splitlines()]
    calibration = steer.calibrate(model, tokenizer, pairs, name=args.pairs.stem, sites=args.sites, max_new_tokens=args.tokens)
    print(calibration)
    for answer in calibration.answers[:2]:
        print(f"> {answer.prompt}\n  plain:   {answer.plain}\n  steered: {answer.steered}")
    print("saved:", calibration.plan.save(args.out))


if __name__ == "__main__":
    main()
