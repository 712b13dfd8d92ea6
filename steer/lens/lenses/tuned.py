"""Tuned lens (Belrose et al. 2023, arXiv 2303.08112): an affine map a depth, learned so that the readout says what the model says.

    translated = h + A h + b, minimising KL(model || readout(translated)) on running text

Files of the package tuned-lens number a translator by what goes into a block: number i reads `layers.i.input`, and number 0 `embed`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.checks import finite_number, of_type, whole_number
from steer.errors import DamagedFileError, NonFiniteError
from steer.files import atomic_write
from steer.lens.fitting import divergence, drawn_tokens, fitted_depths, halves
from steer.lens.lens import LENSES, Lens, check_model_of, torch_bytes
from steer.lens.readout import Readout
from steer.model.capture import evaluating
from steer.model.site import Site
from steer.model.tokens import Row
from steer.reading import damage_of, damaged, read_json
from steer.tensor_files import read_torch

CONFIG, PARAMETERS = "config.json", "params.pt"
KIND = "linear_tuned_lens"


@LENSES.register("tuned")
class TunedLens(Lens):
    """Tuned lens: an affine map a depth, fitted by KL to the model's own prediction; files of the package tuned-lens.

    Example:
        >>> lens = steer.TunedLens.fit(model, harmless, sites=["layers.12.output"], steps=2, held_out=2)
        >>> lens.metrics, lens.save("lens")
    """

    parts = ("weight", "bias")

    def matrix(self, depth: int) -> Tensor | None:
        weight = self.tensors.get(f"{depth}.weight")
        return None if weight is None else weight + torch.eye(len(weight), device=weight.device)

    def bias(self, depth: int) -> Tensor | None:
        return self.tensors.get(f"{depth}.bias")

    def translated(self, h: Tensor, site: str | Site) -> Tensor:
        """[..., width], h + A h + b. The identity is kept apart, so that a map of zeros changes no bit."""
        depth = self._fitted_depth(site)
        weight = self.tensors.get(f"{depth}.weight")
        if weight is None:
            return h
        change = nn.functional.linear(h.float(), weight.to(h.device), None if (b := self.bias(depth)) is None else b.to(h.device))
        return (h.float() + change).to(h.dtype)

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        rows: Sequence[Row],
        *,
        sites: Sequence[str | Site] = ("embed", "layers.*.output"),
        steps: int = 250,
        batch_size: int = 4,
        tokens: int = 256,
        learning_rate: float = 1e-3,
        held_out: int = 4,
        seed: int = 0,
        progress: bool = True,
    ) -> TunedLens:
        """Fits a lens on running text; nothing of the model changes.

        Args:
            model: a causal language model, raw or wrapped.
            rows: texts, see `steer.model.tokens.plain`; the last `held_out` of them judge the lens.
            steps, batch_size: optimiser steps, and texts in each.
            tokens: the most tokens of a step whose predictions are compared; a step costs as many unembeddings, and as many again, a site.
            learning_rate: of Adam, falling linearly to 0.

        Returns:
            A lens whose metrics hold, by site, `kl_logit` and `kl` on the held-out texts: of the logit lens and its own, in nat.

        Raises:
            ContrastError: too few texts. ConfigError, SiteError, AnatomyError. NonFiniteError: the fit diverged.
        """
        for what, value in (("training steps", steps), ("texts in a step", batch_size), ("tokens in a step", tokens)):
            whole_number(value, f"the number of {what}", least=1)
        finite_number(learning_rate, "the learning rate of a lens", above=0)
        readout = Readout.of(model)
        depths = fitted_depths(readout, sites)
        fitted, judged = halves(rows, held_out)
        device = readout.unembedding.device
        generator = torch.Generator().manual_seed(seed)
        width = readout.width
        learned = {
            name: torch.zeros(shape, device=device, requires_grad=True)
            for depth in depths
            for name, shape in ((f"{depth}.weight", (width, width)), (f"{depth}.bias", (width,)))
        }
        optimizer = torch.optim.Adam(list(learned.values()), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in tqdm(range(steps), desc="fitting the lens", disable=not progress, leave=False):
            chosen = [fitted[i] for i in torch.randint(len(fitted), (min(batch_size, len(fitted)),), generator=generator).tolist()]
            places = drawn_tokens(chosen, tokens, generator)
            optimizer.zero_grad()
            _backward(readout, chosen, places, learned, depths)
            optimizer.step()
            schedule.step()
        lens = cls(readout, learned, settings={"steps": steps, "batch_size": batch_size, "tokens": tokens, "learning_rate": learning_rate})
        lens.metrics = _heldout(lens, judged, depths)
        return lens

    # ---- files of the package tuned-lens

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return (path / CONFIG).is_file() and (path / PARAMETERS).is_file()

    @classmethod
    def published(cls, names: Sequence[str]) -> list[str]:
        return [CONFIG, PARAMETERS] if {CONFIG, PARAMETERS} <= set(names) else []

    @classmethod
    def read(cls, path: Path, readout: Readout) -> Self:
        """Reads a folder with `config.json` and `params.pt`. Raises DamagedFileError, WrongModelError, WidthError, NonFiniteError."""
        config = read_json(path / CONFIG)
        with damage_of(path / CONFIG, "the config of a tuned lens: d_model, num_hidden_layers"):
            of_type(config, dict, "the config of a tuned lens", "restore the file")
            width, layers = config["d_model"], config["num_hidden_layers"]
            if (kind := config.get("lens_type", KIND)) != KIND:
                raise ValueError(f"a lens of the type {kind}")
        check_model_of(readout, {"width": width, "n_layers": layers}, path)
        state = read_torch(path / PARAMETERS)
        parts = ("weight", "bias") if config.get("bias", True) else ("weight",)
        expected = {f"{depth}.{part}" for depth in range(layers) for part in parts}
        if not isinstance(state, dict) or state.keys() != expected:
            raise _wrong_keys(path / PARAMETERS, state, layers, parts)
        with damage_of(path / PARAMETERS, f"a weight of {[width, width]} a block"):
            lens = cls(readout, state, settings={"config": config})
        recorded = config.get("unembed_hash")
        if recorded and recorded != _unembedding_hash(readout):
            warnings.warn(f"the tuned lens in '{path}' was fitted with another unembedding than that of this model", stacklevel=3)
        return lens

    def export(self, path: str | Path, base_model: str = "") -> Path:
        """Writes the two files that the package tuned-lens loads; blocks that were not fitted get zeros, which is the logit lens."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        width, layers = self.readout.width, self.readout.n_layers
        empty = {"weight": torch.zeros(width, width), "bias": torch.zeros(width)}
        state = {
            f"{depth}.{part}": self.tensors.get(f"{depth}.{part}", zeros).cpu().clone()
            for depth in range(layers)
            for part, zeros in empty.items()
        }
        config: dict[str, Any] = {
            "base_model_name_or_path": base_model,
            "d_model": width,
            "num_hidden_layers": layers,
            "bias": True,
            "base_model_revision": None,
            "unembed_hash": _unembedding_hash(self.readout),
            "lens_type": KIND,
        }
        atomic_write(folder / PARAMETERS, torch_bytes(state))
        atomic_write(folder / CONFIG, json.dumps(config))
        return folder


def _backward(readout: Readout, rows: Sequence[Row], places: tuple[Tensor, Tensor], learned: dict[str, Tensor], depths: list[int]) -> None:
    """Adds up the gradients of one step, a depth at a time: logits of all depths at once would not fit."""
    with evaluating(readout.anatomy.model):
        streams, logits = readout.run(rows, depths)
        target = logits[places]  # [n, vocabulary]
        chosen = {depth: streams[depth][places].float() for depth in depths}  # [n, width] each
        for depth in depths:
            with torch.enable_grad():
                h = chosen[depth]
                moved = h + nn.functional.linear(h, learned[f"{depth}.weight"], learned[f"{depth}.bias"])
                divergence(target, readout.logits(moved.to(logits.dtype))).mean().backward(
                    inputs=[learned[f"{depth}.weight"], learned[f"{depth}.bias"]]
                )
    if not all(bool(torch.isfinite(tensor.grad).all()) for tensor in learned.values() if tensor.grad is not None):
        raise _diverged()


def _heldout(lens: TunedLens, rows: Sequence[Row], depths: list[int]) -> dict[str, float]:
    """`kl_logit` and `kl` by site, means over the tokens of the responses."""
    readout = lens.readout
    sums = {f"{name}/{readout.site_of(depth)}": 0.0 for depth in depths for name in ("kl_logit", "kl")}
    count = 0
    with evaluating(readout.anatomy.model):
        for row in rows:
            streams, logits = readout.run([row], depths)
            used = slice(max(row.prompt - 1, 0), None)
            count += logits[0, used].shape[0]
            for depth in depths:
                site, h = readout.site_of(depth), streams[depth][0, used]
                sums[f"kl_logit/{site}"] += float(divergence(logits[0, used], readout.logits(h)).sum())
                sums[f"kl/{site}"] += float(divergence(logits[0, used], lens.logits(h, site)).sum())
    return {name: total / count for name, total in sums.items()}


def _unembedding_hash(readout: Readout) -> str:
    """What the package tuned-lens records of an unembedding: a digest of the corners of the matrix, to one digit."""
    return hashlib.sha256(np.array_str(readout.unembedding.cpu().float().numpy(), precision=1).encode()).hexdigest()


# ---- errors


def _wrong_keys(path: Path, state: Any, layers: int, parts: Sequence[str]) -> DamagedFileError:
    found = ", ".join(map(str, list(state)[:6])) if isinstance(state, dict) else type(state).__name__
    return damaged(path, f"the tensors <0 to {layers - 1}>.<{' and '.join(parts)}>", found or "none")


def _diverged() -> NonFiniteError:
    return NonFiniteError(
        "the fit of a tuned lens diverged",
        expected="finite gradients",
        found="NaN or infinity",
        remedy="lower the learning rate, or run the model in float32 or bfloat16",
    )
