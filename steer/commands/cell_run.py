"""One cell of an experiment: an arm trained with a seed, or with the weights of another, and measured."""

from __future__ import annotations

import copy
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from peft import LoraConfig, PeftModel, get_peft_model
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger
from safetensors import SafetensorError
from torch import nn

from steer.callbacks import DriftCallback, SteeringCallback
from steer.commands import cell_ranks
from steer.commands.experiment_config import BASE
from steer.commands.experiment_run import ExperimentRun
from steer.commands.info import versions
from steer.commands.trackers import log_result, tracker_of
from steer.entries import in_short
from steer.errors import DamagedFileError
from steer.experiment.arms import Arm
from steer.experiment.cells import Cell, CellFolder
from steer.experiment.outcome import measure_all, naming_arm
from steer.experiment.overhead import step_overhead
from steer.experiment.treatment import BAKED, NEVER, Treatment
from steer.files import contents
from steer.intervene import Plan
from steer.model.devices import input_device
from steer.model.precision import products_in
from steer.model.tokens import Row, collate

ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
STORE = "drift.sqlite"


def run_cell(run: ExperimentRun, cell: Cell, cells: CellFolder) -> dict[str, Any]:
    """Trains where the cell has weights of its own, from its last checkpoint if it was begun, and measures.

    Returns:
        scores by outcome and item, completions, and for a trained cell what its training was like; `timing` is all that differs between
        two runs of the same cell.
    """
    started = cells.begin(cell)
    clock = time.perf_counter()
    if cell.arm == BASE:
        result = _measure(run, run.model, None)
        return {
            **result,
            "direction": run.direction_quality(),
            "features": None if run.features is None else run.features.to_dict(),
            "circuits": None if run.circuits is None else run.circuits.to_dict(),
            "timing": {"started": started, "seconds": time.perf_counter() - clock},
            "versions": versions(),
        }
    arm = run.config.arm_of(cell)
    treatment = run.treatments[arm.name][cell.draw]
    treatment.save(cells.of(cell))
    logger = tracker_of(run.config.settings.get("tracker"), run.config.experiment.name, cell)
    training: dict[str, Any] | None = None
    cost: dict[str, Any] = {}
    if run.config.trains and cell.needs is None:
        training, cost = train_cell(run, cell, cells, logger)
    known = _measured_as_base(run, arm, cells)
    if known is not None:
        result = known
    else:
        with naming_arm(arm.name), as_measured(run, cell, cells) as (acting, system):
            result = _measure(run, acting, system)
    log_result(logger, result)
    # not before: a cell that is killed while it is measured need not be trained again
    shutil.rmtree(cells.of(cell) / _checkpoints_of(run), ignore_errors=True)
    timing = {"started": started, "seconds": time.perf_counter() - clock, **cost}
    return {**result, "size": treatment.size(run.bench), "training": training, "timing": timing, "versions": versions()}


def _measured_as_base(run: ExperimentRun, arm: Arm, cells: CellFolder) -> dict[str, Any] | None:
    """What was measured of the base, where the arm is nothing else: it acts at no time, and nothing is trained."""
    base = next(cell for cell in run.config.cells() if cell.arm == BASE)
    if run.config.trains or arm.when != NEVER or not cells.is_done(base):
        return None
    known = cells.result(base)
    return {"scores": known["scores"], "completions": known["completions"]}


def _measure(run: ExperimentRun, model: nn.Module, system: str | None) -> dict[str, Any]:
    model.eval()
    with products_in(run.config.precision, input_device(model)):
        scores = measure_all(run.config.outcomes, model, run.tokenizer, system=system)
        return {"scores": scores, "completions": run.completions(model, system)}


@contextmanager
def as_measured(run: ExperimentRun, cell: Cell, cells: CellFolder) -> Iterator[tuple[nn.Module, str | None]]:
    """The model of a trained cell with what acts in it, as it is measured, and the system message that it is asked behind."""
    arm = run.config.arm_of(cell)
    treatment = run.treatments[arm.name][cell.draw]
    model = run.model
    if run.config.trains:
        model = _with_adapter(run.model, cell.needs or cell, cells)
    try:
        with _acting(arm, treatment, model) as acting:
            yield acting, treatment.system if arm.acts_at_inference else None
    finally:
        if run.config.trains:
            model.unload()  # type: ignore[operator]


def _with_adapter(model: nn.Module, cell: Cell, cells: CellFolder) -> PeftModel:
    """Raises DamagedFileError when the adapter is not whole."""
    folder = adapter_of(cell, cells)
    try:
        return PeftModel.from_pretrained(model, folder)
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:  # whichever PEFT stumbles over
        raise _damaged_adapter(cell, folder, error) from error


def adapter_of(cell: Cell, cells: CellFolder) -> Path:
    """The adapter of a trained cell. Raises DamagedFileError when it is not whole; PEFT would ask the hub for one that is missing."""
    folder = cells.of(cell) / ADAPTER
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise _missing_adapter(cell, folder / name)
    return folder


@contextmanager
def _acting(arm: Arm, treatment: Treatment, model: nn.Module) -> Iterator[nn.Module]:
    if arm.when == BAKED:
        merged = copy.deepcopy(model).merge_and_unload() if isinstance(model, PeftModel) else model
        with treatment.baked(merged) as acting:
            yield acting
    elif arm.acts_at_inference:
        with treatment.acting(model) as acting:
            yield acting
    else:
        yield model


# ---- training


def train_cell(run: ExperimentRun, cell: Cell, cells: CellFolder, logger: Logger | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains the adapters of the arm and saves them. What that was like, and what it cost; the model is as it was afterwards."""
    arm = run.config.arm_of(cell)
    treatment = run.treatments[arm.name][cell.draw]
    folder = cells.of(cell)
    pl.seed_everything(cell.seed, verbose=False)
    plan = treatment.training_plan() if arm.acts_in_training else None
    rows = run.training_rows(treatment if arm.acts_in_training else None)
    checkpoints = folder / _checkpoints_of(run)
    checkpoint = _last_checkpoint(checkpoints)
    if cell_ranks.is_first():
        if checkpoint is None:
            for begun in (folder / "logs", *folder.glob(f"{CHECKPOINTS}*")):
                shutil.rmtree(begun, ignore_errors=True)
            for file in folder.glob(f"{STORE}*"):
                file.unlink()
        cell_ranks.announce(cell)
    clock = time.perf_counter()
    started_from = treatment.trained_from(run.model) if arm.acts_in_training else nullcontext(run.model)
    with started_from as base, _adapted(base, run.lora) as adapted:
        adapted.train()  # models are loaded in evaluation mode
        module = run.config.module(adapted, cell.seed)
        tracker = run.tracker(folder / STORE, cell.seed)
        callbacks: list[pl.Callback] = [] if plan is None else [SteeringCallback(plan, phases=("train",))]
        if tracker is not None:
            callbacks.append(DriftCallback(tracker, every_n_steps=run.config.experiment.drift.every_n_steps))
        trainer = _trainer(run, folder, checkpoints, callbacks, logger)
        first = 0 if checkpoint is None else int(checkpoint.stem.removeprefix("step="))
        fit(trainer, module, run.batches(rows, cell.seed, first), checkpoint)
        module.collect()
        if cell_ranks.is_first():
            adapted.save_pretrained(folder / ADAPTER, save_embedding_layers=False)  # or PEFT asks the hub about the base
        training = {"steps": trainer.global_step, "loss": [float(loss) for loss in module.losses], "store": STORE if tracker else None}
        cost = {
            "training_seconds": time.perf_counter() - clock,
            **_callback_overhead(run, cell, adapted, None if arm.control_of else plan, rows),
        }
    return training, cost


@contextmanager
def _adapted(model: nn.Module, config: LoraConfig) -> Iterator[Any]:
    """The model with new adapters; without them afterwards, and in evaluation mode, as models are loaded."""
    adapted = get_peft_model(model, copy.deepcopy(config))  # PEFT writes into the configuration
    try:
        yield adapted
    finally:
        adapted.unload()
        model.eval()


def _checkpoints_of(run: ExperimentRun) -> str:
    """Name of the folder of checkpoints. Those of a sharded model number the state of its optimiser in another way."""
    return f"{CHECKPOINTS}.{cell_ranks.FSDP2}" if cell_ranks.is_sharded(run.config.values.trainer) else CHECKPOINTS


def _last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a killed run of this cell wrote last, whole: Lightning writes them under another name first."""
    written = sorted(folder.glob("step=*.ckpt"), key=lambda file: int(file.stem.removeprefix("step=")))
    return written[-1] if written else None


def _trainer(run: ExperimentRun, folder: Path, checkpoints_in: Path, callbacks: list[pl.Callback], logger: Logger | None) -> pl.Trainer:
    # Lightning's own choice would be another kind of bar than that of all else here, and would print into a pipe
    shows_progress = run.config.values.trainer.progress and sys.stdout.isatty()
    checkpoints = ModelCheckpoint(
        checkpoints_in,
        filename="step={step}",
        auto_insert_metric_name=False,
        every_n_train_steps=run.config.experiment.train.checkpoint_every,
        save_top_k=-1,
        save_on_train_epoch_end=False,
    )
    return pl.Trainer(
        max_steps=run.config.experiment.train.steps,
        max_epochs=-1,
        **cell_ranks.trainer_options(run.config.values.trainer),
        enable_progress_bar=shows_progress,
        enable_model_summary=False,
        gradient_clip_val=run.config.experiment.train.gradient_clip,
        logger=[CSVLogger(folder / "logs", name="", version=""), *([] if logger is None else [logger])],
        log_every_n_steps=1,
        callbacks=[*callbacks, checkpoints, *([TQDMProgressBar(leave=False)] if shows_progress else [])],
    )


def fit(trainer: pl.Trainer, module: pl.LightningModule, batches: Any, checkpoint: Path | None) -> None:
    """`trainer.fit`, from a checkpoint if there is one; Ctrl-C is raised again."""
    try:
        trainer.fit(module, batches, ckpt_path=checkpoint)
    except SystemExit as ended:  # so Lightning ends after Ctrl-C, and it goes on ignoring the key; submitit ends a job like this, too
        if isinstance(ended.__context__, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from None
        raise


def _callback_overhead(run: ExperimentRun, cell: Cell, adapted: nn.Module, plan: Plan | None, rows: list[Row]) -> dict[str, Any]:
    """What the hooks of the plan and of the tracker add to one training step, as a fraction of the bare step; in one seed."""
    if plan is None or cell_ranks.world_size() > 1 or cell.seed != run.config.seeds[0]:
        return {}
    spec = run.config.experiment.train
    batch = collate(rows[: spec.batch_size], run.pad, max_length=spec.max_length)

    @contextmanager
    def attached() -> Iterator[None]:
        tracker = run.tracker(None, cell.seed)
        with plan.attached(adapted), tracker.attached(adapted) if tracker is not None else nullcontext(adapted):
            yield

    cost = step_overhead(adapted, batch, attached)
    return {"callback_overhead": cost.median, "callback_overhead_range": [cost.low, cost.high]}


# ---- errors


def _damaged_adapter(cell: Cell, folder: Path, error: Exception) -> DamagedFileError:
    return DamagedFileError(
        f"the adapter of cell '{cell.name}' cannot be read",
        expected=f"what PEFT saved in {folder}",
        found=in_short(error),
        remedy=f"remove '{folder.parent}', and run the experiment again",
    )


def _missing_adapter(cell: Cell, file: Path) -> DamagedFileError:
    return DamagedFileError(
        f"cell '{cell.name}' lacks its adapter",
        expected=str(file),
        found=contents(file.parent),
        remedy=f"remove '{file.parents[1]}', and run the experiment again",
    )
