"""DictionaryModule: the training of any number of dictionaries under Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from steer.checks import of_type
from steer.errors import ConfigError, NonFiniteError
from steer.features.dictionary import Dictionary
from steer.features.training.activation_data import ActivationData, Calibration
from steer.features.training.dictionary_config import DictionaryConfig
from steer.features.training.finished import dictionary_of
from steer.features.training.held_out import HeldOutPass, Measured, Sums, figures
from steer.features.training.learner import Layer, Learner, Processes
from steer.features.training.optimisation import Optimisation
from steer.features.training.passes import Activations

FACTS = "dictionaries"  # of a checkpoint: what the run was made of


class DictionaryModule(pl.LightningModule):
    """Trains dictionaries on the activations of `ActivationData`, each as if it were alone.

    Nothing in a step is random: a run that goes on from a checkpoint ends with the same bits. Decoder rows have length 1, and the part of
    their gradient along them is taken off. Held-out text is measured whenever Lightning validates; `val/fvu` is the mean of all.

    Args:
        configs: one for each dictionary.
        calibration: of the activations.
        optimisation: steps and rates.
        log_every: steps between two log entries of the training batches.

    Raises:
        ConfigError: no dictionaries, two of one name, or a site that is not captured.

    Example:
        >>> from steer.features.training import ActivationData, DictionaryConfig, DictionaryModule, Optimisation, token_rows
        >>> tokens = token_rows(tokenizer, texts * 9, context=16)
        >>> data = ActivationData(model, tokens, ["layers.12.output"], batch=64, buffer=256, held_out=2)
        >>> config = DictionaryConfig(["layers.12.output"], width=64, k=4)
        >>> module = DictionaryModule([config], data.calibrate(tokens=256), Optimisation(steps=2, lr_warmup=1, sparsity_warmup=1))
        >>> pl.Trainer(max_steps=2).fit(module, data)
        >>> (dictionary,) = module.dictionaries()
    """

    def __init__(
        self, configs: Sequence[DictionaryConfig], calibration: Calibration, optimisation: Optimisation, *, log_every: int = 50
    ) -> None:
        super().__init__()
        of_type(configs, (list, tuple), "the dictionaries to train", "pass a list of DictionaryConfig")
        names = [config.name for config in configs]
        if not names or len(set(names)) < len(names):
            raise _unfit_names(names)
        self.optimisation, self.log_every = optimisation, log_every
        self.learners = nn.ModuleList(Learner(config, calibration, optimisation) for config in configs)
        self.figures: dict[str, dict[str, float]] = {}  # of the last validation, by dictionary
        self._sums: dict[str, Sums] = {}
        self._loaded_facts: dict[str, Any] | None = None

    # ---- training

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.optimisation.lr, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.optimisation.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: Activations, index: int) -> Tensor:
        """[] the loss, a sum over the dictionaries."""
        processes = self._processes()
        step = self.global_step
        losses = []
        for learner in self._learners():
            learner.start_step(step)
            loss, sums = learner(batch, step, processes)
            losses.append(loss)
            if step % self.log_every == 0:
                self._log_batch(learner, sums, processes)
        return torch.stack(losses).sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for layer in self._layers():
            layer.project_gradient()

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        for layer in self._layers():  # before the checkpoint of this step, which callbacks write ahead of on_train_batch_end
            layer.restore_norms()

    def _log_batch(self, learner: Learner, sums: Sums, processes: Processes) -> None:
        total = {name: processes.sum(tensor.detach().double()) for name, tensor in sums.items()}
        tokens = total["tokens"].clamp_min(1)
        variance = total["squares"] - total["sum"].square().sum() / tokens
        name = learner.config.name
        fvu = float(total["squared_error"] / variance.clamp_min(1e-12))
        if fvu != fvu:
            raise _diverged(str(name), self.global_step)
        density = learner.density()
        self.log_dict(
            {
                f"{name}/fvu": fvu,
                f"{name}/l0": float(total["on"] / tokens),
                f"{name}/dead": learner.dead_share(),
                f"{name}/density": float(density.median()),
            }
        )
        self.log("fvu", fvu, prog_bar=True, logger=False)

    def _processes(self) -> Processes:
        if self.trainer.world_size == 1:
            return Processes()
        reduce = self.trainer.strategy.reduce
        return Processes(
            self.trainer.world_size,
            sum=lambda tensor: _tensor(reduce(tensor.clone(), reduce_op="sum")),
            largest=lambda tensor: _tensor(reduce(tensor.clone(), reduce_op="max")),
            gathered=self._gathered,
        )

    def _gathered(self, tensor: Tensor) -> Tensor:
        """[n] of every process put together; shorter ones are filled up on the way."""
        sizes = _tensor(self.all_gather(torch.tensor(len(tensor), device=tensor.device))).flatten().tolist()
        filled = nn.functional.pad(tensor.detach(), (0, max(sizes) - len(tensor)))
        rows = _tensor(self.all_gather(filled)).view(len(sizes), -1)  # [processes, n]
        return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])

    # ---- validation

    def on_validation_epoch_start(self) -> None:
        self._sums = {}
        self._measured = {str(learner.config.name): _measured(learner) for learner in self._learners()}

    def validation_step(self, held_out: HeldOutPass, index: int) -> None:
        for name, sums in held_out.measure(self._measured).items():
            before = self._sums.get(name)
            self._sums[name] = sums if before is None else {key: before[key] + tensor for key, tensor in sums.items()}

    def on_validation_epoch_end(self) -> None:
        processes = self._processes()
        for learner in self._learners():
            name = str(learner.config.name)
            sums = {key: processes.sum(tensor.double().to(self.device)).cpu() for key, tensor in self._sums[name].items()}
            self.figures[name] = {**figures(sums), "dead": learner.dead_share()}
            self.log_dict({f"{name}/val_{key}": value for key, value in self.figures[name].items()})
        mean = sum(of_one["fvu"] for of_one in self.figures.values()) / len(self.figures)
        self.log("val/fvu", mean, prog_bar=True)

    # ---- the run

    def dictionaries(self) -> list[Dictionary]:
        """As they are now, in the order of their configurations."""
        return [dictionary_of(learner) for learner in self._learners()]

    def _learners(self) -> list[Learner]:
        return list(self.learners)  # type: ignore[arg-type]

    def _layers(self) -> list[Layer]:
        return [layer for learner in self._learners() for layer in learner.layers]  # type: ignore[misc]

    def facts(self) -> dict[str, Any]:
        """What the run is made of, which a checkpoint has to agree with."""
        data = getattr(self.trainer, "datamodule", None)
        of_data = data.described() if isinstance(data, ActivationData) else {}
        configs = {str(learner.config.name): learner.config.described() for learner in self._learners()}
        return {"optimisation": self.optimisation.described(), "data": of_data, **configs}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[FACTS] = self.facts()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._loaded_facts = checkpoint.get(FACTS)

    def on_train_start(self) -> None:
        facts, self._loaded_facts = self._loaded_facts, None
        if facts is not None and (changed := _differences(facts, self.facts())):
            raise _other_run(changed)


def _measured(learner: Learner) -> Measured:
    means = {site: learner.calibration.mean[site] for site in learner.writes}
    return Measured(dictionary_of(learner), means, learner.max_norm_written)


def _tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """{key: (before, now)}"""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found[f"{prefix}{key}"] = (old, new)
    return found


# ---- errors


def _unfit_names(names: Sequence[str | None]) -> ConfigError:
    remedy = "give those of the same sites and width a name=..."
    return ConfigError(
        "the dictionaries to train", expected="one or more, each with a name of its own", found=names or "none", remedy=remedy
    )


def _diverged(name: str, step: int) -> NonFiniteError:
    what = f"the training of '{name}' has come to numbers that are not finite"
    return NonFiniteError(what, expected="a finite error", found=f"NaN at step {step}", remedy="lower lr")


def _other_run(changed: dict[str, tuple[Any, Any]]) -> ConfigError:
    return ConfigError(
        "the checkpoint is of another training",
        expected="; ".join(f"{key}={old}" for key, (old, _) in list(changed.items())[:5]),
        found="; ".join(f"{key}={new}" for key, (_, new) in list(changed.items())[:5]),
        remedy="set these as they were, or begin anew in another folder",
    )
