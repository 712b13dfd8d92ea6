"""A clamp of 8 of 24,576 features beside SAELens's splice with error term: CPU seconds, gradients, memory kept for the backward pass.

    python benchmarks/feature_clamp.py --environments DIR [--width 576] [--features 24576] [--tokens 512] [--rounds 5] [--out FILE]

`DIR/saelens` is an environment with sae-lens. Both get one file in SAELens's format, a JumpReLU dictionary with random weights, and one
batch of activations. The splice is the dictionary in the place of the activation, with `use_error_term` and a hook that sets the features,
in a process of its own (`dictionary_peers/saelens_clamp.py`); the clamp is what a hook of a plan calls. They take turns, on one thread,
and CPU time of the process is counted. The clamp runs twice in each round, so that what one and the same arm differs by is known.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

import steer
from steer.features import Dictionary, Encoder, InMemory, Origin
from steer.features.activations.jumprelu import JumpReLU
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder

PEER = Path(__file__).resolve().parent / "dictionary_peers" / "saelens_clamp.py"
SITE = "layers.12.output"
CLAMPED, VALUE, REPEATS = 8, 3.0, 50


class Clamp:
    """The clamp as a hook calls it."""

    def __init__(self, dictionary: Dictionary, features: list[int], h: Tensor, g: Tensor) -> None:
        self.operator = steer.ClampFeatures(dictionary, features, to=VALUE)
        self.h, self.g, self.strength = h[None].requires_grad_(), g[None], torch.ones(1, 1, 1)

    def forward(self) -> Tensor:
        return self.operator.apply(self.h, self.strength, None, self.operator.tensors)  # [1, tokens, width], as the model's

    def with_gradient(self) -> tuple[Tensor, Tensor]:
        out = self.forward()
        (gradient,) = torch.autograd.grad(out, self.h, self.g)
        return out.detach()[0], gradient[0]

    def seconds(self, what: str) -> float:
        begin = time.process_time()
        with torch.set_grad_enabled(what == "backward"):
            for _ in range(REPEATS):
                self.with_gradient() if what == "backward" else self.forward()
        return (time.process_time() - begin) / REPEATS


def made(width: int, features: int) -> SparseAutoencoder:
    """Random weights; pre-activations have the deviation 2 (see `measure`), so that about 2 % of the features are on."""
    rows = torch.randn(features, width) / width**0.5
    encoder = Encoder(InMemory(rows), torch.zeros(features), JumpReLU(torch.full((features,), 4.1)), shift=0.1 * torch.randn(width))
    return SparseAutoencoder(encoder, InMemory(rows.clone()), encoder.shift.clone(), Origin((SITE,), (SITE,)))


def whole(dictionary: SparseAutoencoder, features: list[int], h: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The spliced dictionary in fp64, its error term with its gradient: what both should give."""
    h = h.detach().double().requires_grad_()
    f = dictionary.encode(h)
    other = f.clone()
    other[:, features] = VALUE
    out = dictionary.decode(other) + (h - dictionary.decode(f))
    (gradient,) = torch.autograd.grad(out, h, g.double())
    return out.detach(), gradient


def apart(found: Tensor, expected: Tensor) -> float:
    """Length of the difference as a share of that of what is expected."""
    return float((found.double() - expected).norm() / expected.norm())


def kept_bytes(clamp: Clamp) -> int:
    """Bytes kept for backward, without the rows of the dictionary and h itself."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*clamp.operator.tensors.values(), clamp.h)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = clamp.forward()
    del out
    return sum(kept.values())


def measure(python: Path, width: int, features: int, tokens: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Raises CalledProcessError or BrokenPipeError when the peer's process fails."""
    torch.manual_seed(0)
    dictionary = made(width, features)
    dictionary.save(folder / "dictionary", format="saelens")
    chosen = torch.randperm(features)[:CLAMPED].tolist()
    h, g = 2 * torch.randn(tokens, width), torch.randn(tokens, width)
    save_file({"h": h, "g": g, "features": torch.tensor(chosen)}, folder / "task.safetensors")
    clamp = Clamp(steer.load_dictionary(folder / "dictionary", reads=SITE, writes=SITE), chosen, h, g)
    out, gradient = clamp.with_gradient()
    expected_out, expected_gradient = whole(dictionary, chosen, h, g)
    peer = subprocess.Popen([python, PEER, folder, str(VALUE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert peer.stdin is not None and peer.stdout is not None
    try:
        about = json.loads(peer.stdout.readline())
        theirs = load_file(folder / "answer.safetensors")
        seconds: dict[str, list[float]] = {}
        for number in range(rounds + 1):
            for what in ("forward", "backward"):
                clamp_seconds = clamp.seconds(what)
                print(what, file=peer.stdin, flush=True)
                spliced_seconds = float(peer.stdout.readline())
                again = clamp.seconds(what)
                if number:  # the first round warms up
                    for arm, value in (("clamp", clamp_seconds), ("splice", spliced_seconds), ("clamp again", again)):
                        seconds.setdefault(f"{arm}, {what}", []).append(value)
    finally:
        peer.stdin.close()
        peer.wait()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "setting": {"width": width, "features": features, "clamped": CLAMPED, "tokens": tokens, "rounds": rounds, "dtype": "float32"},
        "versions": {
            "torch": torch.__version__,
            "steer": steer.__version__,
            "sae-lens": about["version"],
            "torch of sae-lens": about["torch"],
        },
        "seconds": seconds,
        "medians": medians,
        "faster": {what: medians[f"splice, {what}"] / medians[f"clamp, {what}"] for what in ("forward", "backward")},
        "a_a": {what: medians[f"clamp again, {what}"] / medians[f"clamp, {what}"] for what in ("forward", "backward")},
        "output_apart": {"clamp": apart(out, expected_out), "splice": apart(theirs["out"], expected_out)},
        "gradient_apart": {"clamp": apart(gradient, expected_gradient), "splice": apart(theirs["gradient"], expected_gradient)},
        "kept_for_backward": {"clamp": kept_bytes(clamp), "splice": about["kept"]},
    }


def show(result: dict[str, Any]) -> None:
    table = Table("", "clamp", "splice", "ratio", "clamp again / clamp")
    for what in ("forward", "backward"):
        ours, theirs = (result["medians"][f"{arm}, {what}"] * 1e3 for arm in ("clamp", "splice"))
        name = "forward, ms" if what == "forward" else "forward and backward, ms"
        table.add_row(name, f"{ours:.3f}", f"{theirs:.0f}", f"{result['faster'][what]:,.0f}", f"{result['a_a'][what]:.2f}")
    for key, name in (("output_apart", "output, relative error"), ("gradient_apart", "gradient, relative error")):
        table.add_row(name, *(f"{result[key][arm]:.1e}" for arm in ("clamp", "splice")))
    table.add_row("kept for backward, KiB", *(f"{result['kept_for_backward'][arm] / 1024:,.0f}" for arm in ("clamp", "splice")))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--features", type=int, default=24576)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    python = given.environments / "saelens" / "bin" / "python"
    with tempfile.TemporaryDirectory() as folder:
        result = measure(python, given.width, given.features, given.tokens, given.rounds, Path(folder))
    show(result)
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
