"""What the process of a library hands back: activations, features and reconstructions in float64, by dictionary."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WIDTH, FEATURES, TOKENS = 16, 96, 64


class Answers:
    """Collects the answers of one library."""

    def __init__(self, folder: Path, package: str) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.content: dict[str, Any] = {"version": version(package), "dictionaries": {}}

    def activations(self, *sites: int) -> torch.Tensor:
        """[tokens, *sites, width]"""
        return torch.randn(TOKENS, *sites, WIDTH, dtype=torch.float64) * 2 + 0.5

    def add(self, name: str, place: str, h: torch.Tensor, f: torch.Tensor, out: torch.Tensor, **arguments: Any) -> None:
        tensors = {"h": h, "f": f, "out": out}
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, self.folder / f"{name}.answer")
        self.content["dictionaries"][name] = {"place": place, "arguments": arguments}
        (self.folder / "answers.json").write_text(json.dumps(self.content))


def randomised(module: torch.nn.Module) -> None:
    """Random weights, biases and thresholds; the constructors leave many of them 0."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_()
            if "threshold" in name:
                parameter.abs_()
            elif name.endswith("r_mag"):
                parameter.mul_(0.3)
