"""Mask learning: which components, and how much of each, an ablation has to take to change one thing and keep others."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from steer.checks import finite_number, number_within, of_type, one_of, whole_number
from steer.circuits.ablation import Ablation
from steer.circuits.circuit import Circuit
from steer.circuits.gates import KINDS, NEURON, CandidateGates
from steer.circuits.operators.gate_components import FORMS, LINEAR
from steer.circuits.terms import Term
from steer.circuits.text_overlap import window_hashes
from steer.errors import ConfigError
from steer.model.anatomy import Anatomy
from steer.model.devices import check_weights_are_there, input_device
from steer.model.precision import BF16, FLOAT32, products_in, settled_precision
from steer.model.restoring import restoring, restoring_all
from steer.model.tokens import rows_hash

if TYPE_CHECKING:
    from steer.circuits.mask_training import MaskTraining

SPARSITY = dict.fromkeys(KINDS, 0.01) | {NEURON: 0.0005}


@torch.inference_mode(False)  # of the caller, in which nothing has a gradient
def learn_circuit(
    model: nn.Module,
    terms: Sequence[Term],
    candidates: Circuit,
    *,
    ablation: Ablation | None = None,
    gates: str = LINEAR,
    start: float = 0.1,
    steps: int = 60,
    lr: float = 0.06,
    sparsity: float | Mapping[str, float] | None = None,
    least: float = 0.02,
    seed: int = 0,
    precision: str = FLOAT32,
    progress: bool = True,
) -> Circuit:
    """Learns how much of each candidate to ablate, by gradient descent on gates (subnetwork probing); the model itself is not changed.

    A step draws prompts of every term, runs them in one pass for each range of lengths with the candidates ablated by their amounts, and
    follows the gradient of the weighted sum. Blocks below the lowest candidate need no gradient. Draws and noise follow from the seed.

    Args:
        terms: what the ablation shall change (`Shift`) and keep (`KeepKL`, `KeepTarget`); or `Faithful`, what the circuit alone shall do.
        candidates: the components that may be in it, e.g. `scores.top_nodes(40)` or `Circuit.of_nodes`; their amounts do not matter.
        ablation: towards what; that of the candidates for None.
        gates: `linear`, amounts that are learned themselves; `sigmoid`; or `hard_concrete`, see `GateComponents`.
        start: amount of every candidate at first; 0 for linear gates alone.
        lr: of Adam, for gates; it falls over the last two fifths of the steps.
        sparsity: weight of each amount in the loss, or of the probability that it is not 0 for hard-concrete gates. One for all, or by
            `input`, `head`, `mlp`, `neuron`; .01, and .0005 of neurons, for None.
        least: smaller amounts are left out of the circuit.
        precision: of the passes: `32-true`; `bf16-mixed`, with products in bfloat16, twice as fast where a processor has them; or `auto`,
            that which is faster here. Gates stay float32.
        progress: a bar on a terminal.

    Returns:
        The circuit with amounts from `least` to 1 and the ablation; `facts` say how it was learned, with the terms' losses at the start and
        the end. It may be empty.

    Raises:
        ConfigError: no terms, no candidates, an ablation that is none or goes to another prompt, another precision. WrongModelError:
            candidates of another model. NonFiniteError: a loss that is not finite. DeployError: offloaded weights.

    Example:
        >>> terms = [Shift(model, ["The nurse said that"], ["The person said that"], target), KeepKL(rows)]
        >>> circuit = learn_circuit(model, terms, scores.top_nodes(10), ablation=mean_ablation(model, texts), steps=2)
    """
    from steer.circuits.mask_training import MaskData, MaskTraining, TermPasses  # Lightning takes seconds to import

    penalties = _checked(terms, candidates, gates, start, steps, lr, sparsity, least)
    anatomy = candidates.check_model(model)
    check_weights_are_there(model, "mask learning")
    precision = settled_precision(precision, next(model.parameters()).dtype, input_device(model))
    ablation = candidates.ablation if ablation is None else ablation
    if ablation is None:
        raise _no_ablation()
    chosen = CandidateGates(anatomy, candidates, ablation, form=gates, start=start)
    passes = TermPasses(model, anatomy, terms)
    data = MaskData.drawn(terms, steps, seed)
    with (
        _frozen(model),
        _cast_once(model, anatomy, precision),
        _quiet(),
        tqdm(total=steps, desc="mask learning", unit="step", disable=None if progress else True) as bar,
    ):
        with products_in(precision, input_device(model)):
            data.look(passes)

        def after_step(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            bar.update()

        training = MaskTraining(passes, chosen, data, sparsity=penalties, lr=lr, after_step=after_step)
        with restoring(lambda: training.switch(None)):
            _fit(training, steps, seed, precision, input_device(model))
    circuit = chosen.circuit(least)
    circuit.facts.update(
        method="learned gates",
        model=anatomy.fingerprint(),
        candidates={"nodes": len(candidates.node_names), "neurons": candidates.n_neurons},
        settings={
            **{"gates": gates, "start": start, "steps": steps, "lr": lr, "sparsity": penalties, "least": least, "seed": seed},
            "precision": precision,
        },
        texts=_texts(terms, candidates),
        terms=_summary(terms, training.history),
        sign="amounts are what is ablated" if not any(term.alone for term in terms) else "amounts are what stays",
    )
    return circuit


def _fit(training: MaskTraining, steps: int, seed: int, precision: str, device: torch.device) -> None:
    import pytorch_lightning as pl

    on_cpu = device.type == "cpu"
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=1,
        accelerator="cpu" if on_cpu else "gpu" if device.type == "cuda" else device.type,
        devices=1 if on_cpu else [device.index or 0],
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            trainer.fit(training)
        except SystemExit as ended:  # so Lightning ends after Ctrl-C, and it goes on ignoring the key
            if isinstance(ended.__context__, KeyboardInterrupt):
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt from None
            raise


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradient of a parameter of the model is computed; which were trained before is put back."""
    with restoring_all() as restore:
        for parameter in model.parameters():
            if parameter.requires_grad:
                restore.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        yield


@contextmanager
def _cast_once(model: nn.Module, anatomy: Anatomy, precision: str) -> Iterator[None]:
    """Weights of linear maps in bfloat16 for `bf16-mixed`; without gradients autocast would cast them anew in every pass."""
    with restoring_all() as restore:
        for module in model.modules() if precision == BF16 else ():
            weight = module.weight if type(module) is nn.Linear and module is not anatomy.unembedding else None
            if weight is not None and weight.dtype == torch.float32:
                restore.callback(setattr, weight, "data", weight.data)
                weight.data = weight.data.bfloat16()
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning says nothing of devices, loaders and steps, which are no business of who learns a mask."""
    # some versions of pytorch_lightning log under the name of their other package
    names = [f"{package}{module}" for package in ("pytorch_lightning", "lightning.pytorch") for module in ("", ".utilities.rank_zero")]
    loggers = [logging.getLogger(name) for name in names]
    with restoring_all() as restore, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"pytorch_lightning.*")
        for logger in loggers:
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


def _summary(terms: Sequence[Term], history: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Of each term its weight, and its loss over the first and the last tenth of the steps, at least 3 of them."""
    n = max(3, len(history) // 10)
    names = [name for name in history[0] if name != "size"]
    ordered = sorted(terms, key=lambda term: term.alone)  # the order in which a step looks at them

    def mean(name: str, part: Sequence[Mapping[str, float]]) -> float:
        return sum(losses[name] for losses in part) / len(part)

    return [
        {"name": name, "weight": term.weight, "items": len(term.items), "first": mean(name, history[:n]), "last": mean(name, history[-n:])}
        for name, term in zip(names, ordered, strict=True)
    ]


def _texts(terms: Sequence[Term], candidates: Circuit) -> dict[str, Any]:
    """Number, hash and windows of the texts of the terms, with the windows of what chose the candidates."""
    rows = list(dict.fromkeys(row for term in terms for item in term.items for row in item))
    windows = set(window_hashes(rows)).union(*(candidates.facts.get(name, {}).get("windows", ()) for name in ("pairs", "texts")))
    return {"count": len(rows), "hash": rows_hash(rows), "windows": sorted(windows)}


def _checked(terms: Any, candidates: Any, gates: str, start: float, steps: int, lr: float, sparsity: Any, least: float) -> dict[str, float]:
    """Penalties by kind."""
    of_type(terms, (list, tuple), "the terms of mask learning", "pass a list such as [Shift(...), KeepKL(rows)]")
    for term in terms:
        of_type(term, Term, "a term of mask learning", "pass Shift, KeepKL, KeepTarget or Faithful")
    if not terms:
        raise _no_terms()
    of_type(candidates, Circuit, "the candidates of mask learning", "pass a Circuit, e.g. scores.top_nodes(40)")
    one_of(gates, FORMS, "the form of gates")
    whole_number(steps, "the steps of mask learning", least=1)
    finite_number(lr, "the learning rate of mask learning", above=0)
    edge = 0 if gates == LINEAR else 1e-6  # a sigmoid comes to 0 and 1 nowhere
    number_within(start, "the first amount of each candidate", edge, 1 - edge)
    number_within(least, "the least amount of a component", 0, 1)
    by_kind = dict(sparsity) if isinstance(sparsity, Mapping) else {} if sparsity is None else dict.fromkeys(KINDS, sparsity)
    for kind, weight in by_kind.items():
        one_of(kind, KINDS, "a kind of component")
        number_within(weight, f"the sparsity of '{kind}'", 0)
    return SPARSITY | by_kind


# ---- errors


def _no_terms() -> ConfigError:
    return ConfigError("mask learning has no terms", expected="at least one", found="none", remedy="e.g. [Shift(...), KeepKL(rows)]")


def _no_ablation() -> ConfigError:
    return ConfigError("mask learning does not know what takes the place of components", expected="an ablation", found="none",
                       remedy="pass ablation=mean_ablation(model, texts)")  # fmt: skip
