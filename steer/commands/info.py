"""`steer info`: versions, devices, kernels and the registry of methods."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

import steer.bias
import steer.circuits
import steer.directions
import steer.drift
import steer.edits
import steer.experiment.metric
import steer.experiment.treatment
import steer.features
import steer.features.reading
import steer.features.search
import steer.features.training.sparsifier
import steer.intervene
import steer.lens  # noqa: F401  (fills the registries)
from steer import kernels
from steer.intervene.scope import KINDS
from steer.registry import REGISTRIES

PACKAGES = ("torchsteer", "torch", "pytorch-lightning", "transformers", "peft", "hydra-core", "triton", "safetensors", "trl")


def versions() -> dict[str, str]:
    """Installed version of every package that matters to a result."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def methods() -> dict[str, list[tuple[str, str]]]:
    """Every registered method by kind, with its one-line description."""
    return {**{kind: registry.table() for kind, registry in REGISTRIES.items()}, "scope": list(KINDS.items())}


def environment() -> dict[str, str]:
    """Versions, and what computations run on."""
    kernel = kernels.status()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    reason = kernel["reason"] or ("no GPU" if kernel["device"] is None else None)
    chosen_by_device = "Triton" if reason is None else f"PyTorch only, {reason}"
    path = chosen_by_device if kernel["path"] == "auto" else f"{kernel['path']} forced"
    return {
        **versions(),
        "devices": ", ".join([f"cpu ({torch.get_num_threads()} threads)", *gpus]),
        "kernels": f"{', '.join(kernel['kernels'])} ({path})",
    }


def run(config: DictConfig) -> None:
    """Prints the environment and a table of methods for each kind."""
    console = Console()
    table = Table("what", "value", title="environment")
    for name, value in environment().items():
        table.add_row(name, value)
    console.print(table)
    for kind, entries in methods().items():
        if not entries:
            continue
        listing = Table("name", "what it does", title=kind)
        for row in entries:
            listing.add_row(*map(Text, row))  # square brackets are no markup here
        console.print(listing)
