"""Other weights as a treatment: the change that an adapter makes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn

from steer.checks import of_type
from steer.errors import ConfigError
from steer.experiment.matched import generator_of, random_factors
from steer.experiment.treatment import BAKED, BOTH, INFERENCE, TRAIN, TREATMENTS, Bench, Treatment
from steer.intervene.deploy.adapter_files import CONFIG, WEIGHTS, check_adds_only, check_is_adapter
from steer.model.devices import check_weights_are_there
from steer.reading import read_json


@TREATMENTS.register("weights")
class Weights(Treatment):
    """Adds the weight changes of a LoRA adapter: under the training and not afterwards (`train`), where the model is used (`inference`), in
    both, or baked.

    Controls: random matrices of the same rank and Frobenius norm in the same modules.

    Args:
        adapter: folder of a LoRA adapter of PEFT for the base model.

    Example:
        >>> steer.edits.to_adapter(edit, model, "edited")
        PosixPath('edited')
        >>> steer.compare(model, {"plain": None, "adapter": steer.Weights("edited")}, "logprob_gap", items, better="higher").verdict
    """

    when = (TRAIN, INFERENCE, BOTH, BAKED)
    unit = "Frobenius norm of the change"

    def __init__(self, adapter: str | Path) -> None:
        of_type(adapter, (str, Path), "the adapter of a treatment", "pass the folder that save_pretrained wrote")
        check_is_adapter(adapter)
        self.adapter = str(adapter)
        self.changes: dict[str, Tensor] = {}  # by module, [out, in] fp32
        self.drawn: int | None = None  # seed of a control

    def describe(self) -> str:
        return (
            f"the weights of {Path(self.adapter).name}" if self.drawn is None else f"random weights as large as {Path(self.adapter).name}"
        )

    def spec(self) -> dict[str, Any]:
        file = Path(self.adapter) / WEIGHTS
        config = read_json(file.with_name(CONFIG))
        scaling = {key: config.get(key) for key in ("r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern")}
        return {"adapter": hashlib.sha256(file.read_bytes()).hexdigest(), **scaling, "random": self.drawn}

    def prepare(self, bench: Bench) -> Self:
        check_weights_are_there(bench.model, "a treatment of weights")
        self.changes = self.changes or _changes(bench.model, self.adapter)
        return self

    @contextmanager
    def acting(self, model: nn.Module) -> Iterator[nn.Module]:
        modules = dict(model.named_modules())
        weights: list[tuple[nn.Parameter, Tensor]] = []
        try:
            with torch.no_grad():
                for path, change in self.changes.items():
                    weight = _weight(modules, path)
                    weights.append((weight, weight.detach().clone()))
                    weight.add_(change.to(weight))
            yield model
        finally:
            with torch.no_grad():
                for weight, before in reversed(weights):
                    weight.copy_(before)

    baked = acting
    trained_from = acting

    def size(self, bench: Bench) -> dict[str, float]:
        return {path: float(change.norm()) for path, change in self.changes.items()}

    def control(self, bench: Bench, seed: int) -> Treatment:
        generator = generator_of("weights", seed)
        partner = Weights(self.adapter)
        partner.drawn = seed
        partner.changes = {path: _random_like(change, generator) for path, change in self.changes.items()}
        return partner


def _changes(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """What an adapter adds to each weight. Raises ConfigError for one that changes a model in other ways, too."""
    with safe_open(Path(adapter) / WEIGHTS, "pt") as file:
        check_adds_only(adapter, read_json(Path(adapter) / CONFIG), list(file.keys()))
    weights = {path: module.weight for path, module in model.named_modules() if isinstance(getattr(module, "weight", None), nn.Parameter)}
    adapted = PeftModel.from_pretrained(model, adapter)
    try:
        layers = {path: module for path, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer)}
        for path in layers:
            if shared := [other for other, weight in weights.items() if other != path and weight is weights[path]]:
                raise _shared(path, shared[0])
        return {path: module.get_delta_weight("default").detach().float().cpu() for path, module in layers.items()}
    finally:
        adapted.unload()


def _weight(modules: dict[str, nn.Module], path: str) -> nn.Parameter:
    """The weight of a module of the base, also inside a PEFT model."""
    for name in (path, f"base_model.model.{path}"):
        if (module := modules.get(name)) is not None:
            weight = getattr(module, "base_layer", module).weight
            assert isinstance(weight, nn.Parameter)
            return weight
    raise _no_module(path)


def _random_like(change: Tensor, generator: torch.Generator) -> Tensor:
    """A random matrix of the same shape, rank and norm."""
    matrix = change.flatten(1)  # [out, in] also of a convolution
    rank = int(torch.linalg.matrix_rank(matrix))
    left, right = random_factors(matrix.shape[0], matrix.shape[1], rank, float(change.norm()), generator)
    return (left @ right.mT).reshape(change.shape)


# ---- errors


def _shared(path: str, other: str) -> ConfigError:
    return ConfigError(
        f"'{path}' shares its weight with '{other}'",
        expected="adapters of weights that one module has",
        found=f"an adapter of '{path}', which would change both",
        remedy="leave that module out of the adapter",
    )


def _no_module(path: str) -> ConfigError:
    return ConfigError(
        "the weights of a treatment do not fit this model",
        expected=f"a module '{path}'",
        found="none",
        remedy="use the adapter with the base that it was made for",
    )
