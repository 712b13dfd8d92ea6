"""`steer features train`: dictionaries of a model's activations, trained on text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from rich.console import Console
from rich.table import Table

from steer.checks import whole_number
from steer.commands import cell_ranks
from steer.commands.ab import quieten_libraries
from steer.commands.cell_run import fit
from steer.commands.config import dtype_named, listed
from steer.errors import ConfigError
from steer.features.formats.own import check_dtype
from steer.features.training import ActivationData, DictionaryConfig, DictionaryModule, Optimisation, read_texts, token_rows
from steer.features.training.finished import METRICS, defined, save
from steer.features.training.learner import Learner
from steer.features.training.stopping import CheckpointBehindMeasurement, Patience
from steer.files import atomic_write
from steer.model.load import load

TOGETHER = ("crosscoder", "cross_layer_transcoder")  # architectures that read all sites together
CHECKPOINTS = "checkpoints"
SHOWN = ("fvu", "l0", "ce_added", "ce_recovered", "dead")


def run(config: DictConfig) -> None:
    """Trains, and prints what came of it."""
    quieten_libraries()
    cell_ranks.check_trainer(config.trainer)
    with cell_ranks.process_group(config.trainer.accelerator):
        train(config)


def train(config: DictConfig) -> dict[str, dict[str, float]]:
    """Trains the dictionaries of a configuration and writes their folders. Returns the figures on held-out text by name."""
    configs = dictionary_configs(config)
    whole_number(config.tokens, "`tokens`", least=1)
    whole_number(config.batch, "`batch`", least=1)
    whole_number(config.checkpoint_every, "`checkpoint_every`", least=1)
    whole_number(config.evaluate_every, "`evaluate_every`", least=1)
    check_dtype(config.save_dtype)  # not when everything is trained
    folder, console = Path(config.folder), Console()
    text = config.text
    model, tokenizer = load(config.model.name, dtype=dtype_named(config.model.dtype))
    texts = read_texts(str(config.data), split=text.split, field=text.field, subset=text.subset)
    rows = token_rows(tokenizer, texts, context=config.context, seed=config.seed, max_tokens=2 * config.tokens)
    sites = list(dict.fromkeys(site for one in configs for site in one.sites))
    data = ActivationData(
        model, rows, sites, batch=config.batch, buffer=config.buffer, first=config.first, outlier=config.outlier,
        held_out=config.held_out, dtype=config.cache_dtype, cache=config.cache, seed=config.seed,
    )  # fmt: skip
    steps = max(1, config.tokens // config.batch)
    names = ("lr", "lr_warmup", "sparsity_warmup", "aux", "dead_after", "seed")
    optimisation = Optimisation(steps, **{name: config[name] for name in names})
    if cell_ranks.is_first():
        console.print(f"{len(rows) * rows.context:,} tokens of text, {steps} steps, {len(configs)} dictionaries at {len(sites)} sites")
    module = DictionaryModule(configs, data.calibrate(), optimisation)
    trainer = _trainer(config, folder, steps)
    fit(trainer, module, data, _last_checkpoint(folder / CHECKPOINTS))
    trainer.validate(module, data, verbose=False)
    if cell_ranks.is_first():
        told = {**optimisation.described(), **data.described(), "data": str(config.data), "steps_done": trainer.global_step}
        for learner in cast(list[Learner], list(module.learners)):
            name = str(learner.config.name)
            save(learner, folder / name, module.figures[name], model=config.model.name, training=told, dtype=config.save_dtype)
        atomic_write(folder / METRICS, json.dumps({name: defined(of_one) for name, of_one in module.figures.items()}, indent=2) + "\n")
        console.print(_table(module.figures))
        console.print(f"dictionaries in {folder}", soft_wrap=True)
    return module.figures


def dictionary_configs(config: DictConfig) -> list[DictionaryConfig]:
    """One for each site and width; of an architecture that reads several sites, for each width. Raises ConfigError."""
    reads, writes = listed(config.sites) or [], listed(config.writes)
    if writes is not None and len(writes) != len(reads):
        raise _unpaired(reads, writes)
    if config.dictionary.architecture == "transcoder" and writes is None:
        raise _unpaired(reads, [])
    together = config.dictionary.architecture in TOGETHER
    groups = [(reads, writes)] if together else [([site], None if writes is None else [writes[i]]) for i, site in enumerate(reads)]
    configs = [_dictionary_config(config, width, *group) for group in groups for width in config.width]
    if not configs:
        raise _nothing_to_train()
    return configs


def _dictionary_config(config: DictConfig, width: Any, reads: list[str], writes: list[str] | None) -> DictionaryConfig:
    wanted = config.dictionary
    whole_number(width, "an entry of `width`", least=1)
    prefixes = sorted({max(1, round(share * width)) for share in wanted.prefixes or ()})
    settings: Any = OmegaConf.to_container(wanted.settings, resolve=True)
    return DictionaryConfig(reads, writes, width, config.k, wanted.architecture, wanted.sparsifier, settings, prefixes, wanted.skip)


def what_is_left(out: Path) -> str:
    """What an interrupted run leaves in its folder, in a line."""
    kept = "a checkpoint" if _last_checkpoint(out / CHECKPOINTS) else "no checkpoint so far"
    return f"interrupted: '{out}' keeps {kept}; the same command goes on from there"


def _trainer(config: DictConfig, folder: Path, steps: int) -> pl.Trainer:
    shows_progress = config.trainer.progress and sys.stdout.isatty()
    callbacks: list[pl.Callback] = [
        CheckpointBehindMeasurement(folder / CHECKPOINTS, every=config.checkpoint_every, measured_every=config.evaluate_every)
    ]
    if config.patience is not None:
        whole_number(config.patience, "`patience`", least=1)
        callbacks.append(Patience(config.patience))
    return pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        **cell_ranks.trainer_options(config.trainer),
        val_check_interval=config.evaluate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_progress_bar=shows_progress,
        enable_model_summary=False,
        logger=CSVLogger(folder / "logs", name="", version=""),
        log_every_n_steps=1,
        callbacks=[*callbacks, *([TQDMProgressBar(leave=False)] if shows_progress else [])],
    )


def _last_checkpoint(folder: Path) -> Path | None:
    written = sorted(folder.glob("step=*.ckpt"), key=lambda file: int(file.stem.removeprefix("step=").partition("-")[0]))
    return written[-1] if written else None


def _table(figures: dict[str, dict[str, float]]) -> Table:
    table = Table("dictionary", *SHOWN)
    for name, of_one in figures.items():
        table.add_row(name, *(f"{of_one[key]:.4g}" for key in SHOWN))
    return table


# ---- errors


def _unpaired(reads: list[str], writes: list[str]) -> ConfigError:
    remedy = "e.g. 'sites=[layers.12.mlp.input]' 'writes=[layers.12.mlp.output]'"
    return ConfigError("sites and writes do not pair up", expected=f"writes with {len(reads)} sites", found=writes or "none", remedy=remedy)


def _nothing_to_train() -> ConfigError:
    return ConfigError(
        "'steer features train' has nothing to train", expected="sites and width", found="none", remedy="e.g. 'width=[4096]'"
    )
