"""How strong a circuit is while a model is trained: directions for a drift tracker, and the effect of the circuit on a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from steer.circuits.circuit import Circuit
from steer.circuits.component_pass import record
from steer.circuits.targets import Target, target_words
from steer.circuits.text_passes import TextPasses
from steer.circuits.texts import Batch, Prompts, Texts, rows_of
from steer.directions import Direction, Directions
from steer.errors import ConfigError
from steer.model.anatomy import Anatomy
from steer.model.fingerprint import DIGEST, differing
from steer.model.site import Site


@torch.inference_mode(False)  # of the caller, in which nothing has a gradient
def circuit_directions(
    model: nn.Module,
    circuit: Circuit,
    prompts: Prompts,
    target: Target,
    *,
    tokenizer: Any = None,
    name: str = "circuit",
    max_tokens: int = 512,
) -> Directions:
    """Directions along which the activations of a circuit raise a target, one for each of its sites, for a `DriftTracker`.

    A direction is the gradient of the target by the activation at the last token, its mean over the prompts, on the circuit's channels. The
    projection on it says to first order what the circuit adds to the target: when it falls in training the circuit gets weaker, when it
    rises again the circuit comes back. Gradients stay those of the model that is given here.

    Args:
        prompts: of one sign of the target, or projections cancel in the mean.
        target: as of `attribute`.

    Raises:
        ConfigError: an empty circuit, or a target that does not depend on it. WrongModelError.

    Example:
        >>> directions = circuit_directions(model, circuit, texts, target, tokenizer=tokenizer)
        >>> tracker = steer.DriftTracker({"gender circuit": directions}, probe=rows, span="last", store="drift.sqlite")
        >>> trainer = pl.Trainer(callbacks=[DriftCallback(tracker)])  # monitor="drift/gender circuit/<site>/effect_sd"
    """
    anatomy = circuit.check_model(model)
    amounts = circuit.amounts(anatomy)
    if not amounts:
        raise _empty()
    passes = TextPasses(model, anatomy, Texts(rows_of(model, prompts, tokenizer)), max_tokens=max_tokens)
    sums = {site: torch.zeros(len(amount), dtype=torch.float64) for site, amount in amounts.items()}
    for chosen in passes.batches(range(len(passes.texts))):
        batch = passes.batch(chosen)
        found = record(passes, batch, target, values=[], gradients=list(amounts))
        last = batch.mask.shape[1] - 1 - batch.mask.flip(1).argmax(1)  # [rows]
        for site, gradient in found.gradients.items():
            sums[site] += gradient[torch.arange(len(last)), last].double().sum(0).cpu()
    entries = []
    for site, amount in amounts.items():
        vector = (sums[site] * amount / len(passes.texts)).float()
        if bool(vector.any()):
            entries.append(Direction(site, vector, "circuit gradient", "last"))
    if not entries:
        raise _no_influence(target)
    return Directions(entries, name, {"model": anatomy.fingerprint(), "target": target_words(target), "nodes": circuit.node_names})


def circuit_effect(
    model: nn.Module,
    circuit: Circuit,
    prompts: Prompts,
    target: Target,
    *,
    strength: float = 1.0,
    tokenizer: Any = None,
    max_tokens: int = 512,
) -> Tensor:
    """[prompts] fp64 target of the model as it is, less that with the circuit ablated: what the circuit does for it now, exactly.

    Call it before and in the course of a training, which may have changed any weight; plans that are attached take part in both.

    Args:
        strength: of the ablation, 1 for all of it.

    Raises:
        ConfigError: as `Circuit.ablation_plan`. WrongModelError: a circuit of a model of other sizes. NonFiniteError: a target that is not
            finite.

    Example:
        >>> before = circuit_effect(model, circuit, texts, target)  # [prompts]
        >>> train(model, optimizer)
        >>> circuit_effect(model, circuit, texts, target) - before
    """
    circuit = _of_trained(circuit, model)
    anatomy = circuit.check_model(model)
    plan = circuit.ablation_plan(model, strength)
    passes = TextPasses(model, anatomy, Texts(rows_of(model, prompts, tokenizer)), max_tokens=max_tokens)

    def values() -> Tensor:
        found = torch.zeros(len(passes.texts), dtype=torch.float64)
        for chosen in passes.batches(range(len(passes.texts))):
            batch = passes.batch(chosen)
            found[chosen] = _values(passes, batch, target)
        return found

    unedited = values()
    with plan.attached(model, stack=True):
        return unedited - values()


def _of_trained(circuit: Circuit, model: nn.Module) -> Circuit:
    """The circuit for a model that is its own by all but the values of its embedding, which training changes."""
    known, now = circuit.facts.get("model"), Anatomy.find(model).fingerprint()
    if isinstance(known, dict) and differing(known, now).keys() <= {DIGEST}:
        ablation = circuit.ablation
        if ablation is not None and ablation.facts.get("model") == known:
            ablation = replace(ablation, facts={**ablation.facts, "model": now})
        return replace(circuit, ablation=ablation, facts={**circuit.facts, "model": now})
    return circuit


@torch.no_grad()
def _values(passes: TextPasses, batch: Batch, target: Target) -> Tensor:
    functions: dict[Site, Callable[..., Any]] = {}
    logits = passes.run_batch(batch, functions, gradients=False, last_token=bool(getattr(target, "at_last_token", False)))
    assert logits is not None
    return passes.values(target, batch, logits).double().cpu()


# ---- errors


def _empty() -> ConfigError:
    return ConfigError("an empty circuit has no directions", expected="at least one node or neuron", found="none",
                       remedy="choose more components, or a lower threshold")  # fmt: skip


def _no_influence(target: Target) -> ConfigError:
    return ConfigError(
        "the target does not depend on this circuit at the last token",
        expected="a gradient that is not 0",
        found=target_words(target),
        remedy="look at prompts that end where the circuit acts",
    )
