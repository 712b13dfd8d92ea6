"""Trained directions: a vector that is learned through the frozen model, so that adding it makes the positive answers likelier.

One trainer for all of them; an objective is one file with one registered loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.checks import errors_of, finite_number, of_type, whole_number
from steer.directions.contrast import ContrastSet
from steer.directions.direction import Direction, Directions
from steer.directions.extract import provenance_of, read_moments
from steer.directions.heldout import heldout_metrics
from steer.directions.sweep import check_pairs, check_scope
from steer.errors import ConfigError, NonFiniteError
from steer.intervene import Intervention, Plan
from steer.intervene.operator import Operator
from steer.intervene.operators.add import Add
from steer.model.accumulator import TextAccumulator
from steer.model.anatomy import Anatomy
from steer.model.annotations import response_tokens
from steer.model.capture import capture
from steer.model.devices import input_device
from steer.model.likelihood import response_logprobs, response_sums
from steer.model.restoring import restoring
from steer.model.site import Site
from steer.model.tokens import Row, collate
from steer.registry import Registry

SIDES = ("positive", "negative")
Run = tuple[str, int]  # side of the pairs, and sign of the strength that they are run with


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the answers of a batch of pairs, in nat.

    Attributes:
        steered: [pairs] summed over the answer's tokens, for every run of the objective; carries the gradient.
        base: [pairs] the same without the vector, by side.
        tokens: [pairs] number of answer tokens, by side.
    """

    steered: dict[Run, Tensor]
    base: dict[str, Tensor]
    tokens: dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """What a vector is trained for.

    Attributes:
        loss: gives one number.
        runs: the (side, sign) that it looks at; -1 stands for steering the other way.
        operator: made of the [width] vector that it starts with; it has a learnable tensor `vector`.
        detects: the vector has length 1 and acts by what it detects, so its largest detection becomes the length of the direction.
    """

    loss: Callable[[Scores], Tensor]
    runs: tuple[Run, ...]
    operator: Callable[[Tensor], Operator]
    detects: bool = False

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.loss.__doc__

    def value(self, name: str, scores: Scores) -> Tensor:
        """[] what `loss` gives.

        Args:
            name: what the error calls the objective.

        Raises:
            ConfigError: it fails, or gives something else than one real number with a gradient.
        """
        with errors_of(f"the objective '{name}'", "let its loss read `scores.steered` by its own `runs`, such as ('positive', 1)"):
            loss = self.loss(scores)
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad or loss.is_complex():
            raise _loss_error(name, loss)
        return loss

    def learnable(self, name: str, vector: Tensor) -> Operator:
        """The operator that is trained. Raises ConfigError when there is none, or it has no vector to learn. vector: [width]."""
        with errors_of(f"the operator of the objective '{name}'", "give one that is made of a [width] vector, such as operator=Add"):
            operator = self.operator(vector)
        of_type(operator, Operator, f"the operator of the objective '{name}'", "give one that is made of a [width] vector: operator=Add")
        if "vector" not in operator.train().parameters:
            raise _nothing_learned(name, operator)
        return operator


OBJECTIVES: Registry[Objective] = Registry("objective", "steer.directions.objectives", "steer.objectives", instance_of=Objective)


def objective(
    name: str, *, runs: tuple[Run, ...], operator: Callable[[Tensor], Operator] = Add, detects: bool = False
) -> Callable[[Callable[[Scores], Tensor]], Objective]:
    """Registers a loss as the objective of that name; options as in `Objective`.

    Raises:
        ConfigError: runs that there are not, or as `Registry.register`.
    """
    register = OBJECTIVES.register(name)
    check_runs(name, runs)

    def add(loss: Callable[[Scores], Tensor]) -> Objective:
        return register(Objective(loss, runs, operator, detects))

    return add


def check_runs(name: str, runs: Any) -> None:
    """Raises ConfigError unless these are pairs of a side and a sign, at least one."""
    known = {(side, sign) for side in SIDES for sign in (1, -1)}
    is_listed = isinstance(runs, tuple | list) and len(runs) > 0
    if not is_listed or not all(isinstance(run, tuple) and run in known for run in runs) or len(set(runs)) < len(runs):
        raise _runs_error(name, runs)


def train_direction(
    model: nn.Module,
    contrast: ContrastSet,
    site: str | Site,
    *,
    name: str,
    method: str,
    span: str | int = "response",
    scope: str = "response",
    steps: int = 100,
    batch_size: int = 4,
    learning_rate: float = 0.02,
    holdout: float = 0.25,
    seed: int = 0,
    progress: bool = True,
) -> Directions:
    """Learns a direction at one site; nothing of the model changes.

    Args:
        model: a causal language model, raw or wrapped.
        contrast: pairs of answers; a share `holdout` of them is kept out of the training and used for the metrics.
        site: where the vector is added.
        name: what the direction stands for.
        method: a key of `OBJECTIVES`.
        span: which tokens are averaged for the metrics, see `extract`.
        scope: on which tokens the vector is added in training; use the same when steering with it.
        steps, batch_size: optimiser steps, and pairs in each.
        learning_rate: of AdamW, falling linearly to 0, in units of the root mean square of the activation (of the vector, where that has
            length 1), so that it means the same at every site.

    Returns:
        One direction, which at strength 1 is the vector as it was trained. `loss_first` and `loss_last` in its metrics are means over
        the first and the last tenth of the steps.

    Raises:
        ContrastError: no pairs, or too few. ConfigError, SiteError. NonFiniteError: the training diverged.

    Example:
        >>> directions = steer.train_direction(model, contrast, "layers.12.output", name="kind", method="bipo", steps=2)
        >>> directions.best().metrics["loss_last"]
    """
    objective: Objective = OBJECTIVES.get(method)
    of_type(objective, Objective, f"objective '{method}'", f"register its loss with @objective('{method}', runs=...)")
    check_runs(method, objective.runs)
    check_pairs(contrast, f"'{method}' compares the two answers of a pair")
    check_scope(scope)
    whole_number(steps, "the number of training steps", least=1)
    whole_number(batch_size, "the number of pairs in a step", least=1)
    finite_number(learning_rate, "the learning rate", above=0)
    anatomy = Anatomy.find(model)
    site = Site.parse(site)
    train, held_out = contrast.split(holdout, seed)
    moments = read_moments(model, train, [site], span, set(), progress)[site]
    width = len(moments.gap)
    size = moments.activation_norm / width**0.5  # root mean square of the activation
    generator = torch.Generator().manual_seed(seed)
    operator = objective.learnable(method, 0.01 * size * torch.randn(width, generator=generator))
    signs = sorted({sign for _, sign in objective.runs}, reverse=True)
    training = _Training(
        model=model,
        method=method,
        objective=objective,
        signs=signs,
        plan=Plan(Intervention(operator, site, scope=scope, strength=signs)),
        pairs=train,
        batch_size=batch_size,
        generator=generator,
    )
    losses = training.run(steps, learning_rate * (width**-0.5 if objective.detects else size), progress)
    vector = operator.parameters["vector"].detach()[0].float().cpu()
    if objective.detects:
        vector = _with_largest_detection(model, vector, train, site, span, method, progress)
    tenth = max(steps // 10, 1)
    metrics = {
        **heldout_metrics(model, held_out, {site: vector[None]}, span, progress)[site][0],
        **moments.along(vector),
        "n_train": float(len(train)),
        "loss_first": sum(losses[:tenth]) / tenth,
        "loss_last": sum(losses[-tenth:]) / tenth,
    }
    direction = Direction(site, vector, method, span, metrics, train.digests())
    settings = {"scope": scope, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    provenance = provenance_of(anatomy, contrast, train, holdout, seed)
    return Directions([direction], name, {**provenance, "method": method, **settings})


def _with_largest_detection(
    model: nn.Module, vector: Tensor, train: ContrastSet, site: Site, span: str | int, method: str, progress: bool
) -> Tensor:
    """[width], the vector at the length of its largest detection on the training texts. Raises ConfigError when it detects nothing."""
    unit = vector / vector.norm()
    largest = _Largest(unit)
    capture(model, train.rows()[0], {site: largest}, span=span, progress="largest detection" if progress else None)
    if largest.value == 0:
        raise _detection_error(method, site, span, len(train))
    return unit * largest.value


class _Largest(TextAccumulator):
    """Accumulator: the largest projection of any token on a vector of length 1, and 0 where none is positive."""

    def __init__(self, unit: Tensor) -> None:
        self.unit = unit
        self.value = 0.0

    def reduce(self, h: Tensor, weight: Tensor) -> Tensor:
        """[batch, 1], the largest of each text."""
        along = h.float() @ self.unit.to(h.device)  # [batch, tokens]
        return along.masked_fill(weight == 0, -torch.inf).amax(1, keepdim=True)

    def add(self, values: Tensor, rows: Tensor) -> None:
        self.value = max(self.value, float(values.max()))


@dataclass(frozen=True, eq=False)
class _Training:
    """The training of one vector.

    Attributes:
        signs: strength of each row slot of the plan.
        generator: draws the order of the pairs.
    """

    model: nn.Module
    method: str
    objective: Objective
    signs: list[int]
    plan: Plan
    pairs: ContrastSet
    batch_size: int
    generator: torch.Generator

    def run(self, steps: int, learning_rate: float, progress: bool) -> list[float]:
        """Loss of every step."""
        with torch.compiler.set_stance("force_eager"):  # a shape of its own for nearly every batch, here and below
            base = {side: response_logprobs(self.model, self.rows[side], pad=0) * self.tokens[side] for side in SIDES}
        optimizer = torch.optim.AdamW(self.plan.parameters(), lr=learning_rate, weight_decay=0.0)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        losses: list[float] = []
        with (
            frozen(self.model),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            self.plan.attached(self.model, stack=True) as attachment,
            tqdm(total=steps, desc=f"training {self.method}", disable=None if progress else True, leave=False) as bar,
        ):
            for step, chosen in zip(range(steps), self.batches(), strict=False):
                if len(self.signs) > 1:
                    attachment.set_rows([self.signs.index(sign) for _, sign in self.objective.runs for _ in chosen])
                loss = self.objective.value(self.method, self.scores(chosen, base))
                if not bool(torch.isfinite(loss)):
                    raise _divergence_error(loss, step)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                decay.step()
                losses.append(float(loss.detach()))
                bar.update()
        return losses

    @property
    def rows(self) -> dict[str, tuple[Row, ...]]:
        """The texts, by side."""
        return {"positive": self.pairs.positive, "negative": self.pairs.negative}

    @cached_property
    def tokens(self) -> dict[str, Tensor]:
        """[pairs] number of answer tokens, by side."""
        return {side: torch.tensor([row.response for row in self.rows[side]]) for side in SIDES}

    def batches(self) -> Iterator[list[int]]:
        """Indices of the pairs of each step, without an end; every pair once before any comes again."""
        order: list[int] = []
        while True:
            if len(order) < self.batch_size:
                order += torch.randperm(len(self.pairs.positive), generator=self.generator).tolist()
            yield order[: self.batch_size]
            order = order[self.batch_size :]

    def scores(self, chosen: list[int], base: dict[str, Tensor]) -> Scores:
        """Runs the chosen pairs as the objective asks for. base: [pairs] log-probabilities without the vector, by side."""
        runs = self.objective.runs
        sums = _answer_sums(self.model, [self.rows[side][i] for side, _ in runs for i in chosen])
        return Scores(
            steered=dict(zip(runs, sums.unflatten(0, (len(runs), -1)), strict=True)),
            base={side: base[side][chosen].to(sums) for side in SIDES},
            tokens={side: self.tokens[side][chosen].to(sums) for side in SIDES},
        )


def _answer_sums(model: nn.Module, rows: list[Row]) -> Tensor:
    device = input_device(model)
    batch = {name: tensor.to(device) for name, tensor in collate(rows, pad=0).items()}
    labels = batch.pop("labels")
    with response_tokens(model, labels != -100):
        return response_sums(model(**batch, use_cache=False).logits, labels)[0]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for the model's own parameters, both restored on every exit path."""
    modes = {module: module.training for module in model.modules()}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def put_back() -> None:
        for parameter in learning:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training

    with restoring(put_back):
        model.eval()
        for parameter in learning:
            parameter.requires_grad_(False)
        yield


def _loss_error(name: str, loss: object) -> ConfigError:
    found = f"{type(loss).__name__} {str(loss)[:60]!r}"
    if isinstance(loss, Tensor):
        kind = f" and {loss.dtype}" if loss.is_complex() else ""
        found = f"a tensor of the shape {list(loss.shape)}{kind}{'' if loss.requires_grad else ', without a gradient'}"
    return ConfigError(
        f"the objective '{name}' gives no loss to train with",
        expected="one number, a tensor of the shape [] that depends on `scores.steered`",
        found=found,
        remedy="take the mean over the pairs, and detach nothing of `scores.steered`",
    )


def _runs_error(name: str, runs: Any) -> ConfigError:
    return ConfigError(
        f"the objective '{name}' asks for runs that there are not",
        expected="a tuple of different (side, sign), side 'positive' or 'negative' and sign 1 or -1",
        found=repr(runs),
        remedy="e.g. runs=(('positive', 1), ('negative', -1))",
    )


def _nothing_learned(name: str, operator: Operator) -> ConfigError:
    return ConfigError(
        f"the operator of the objective '{name}' has no vector to learn",
        expected="a learnable tensor `vector`",
        found=f"'{operator.name}', which learns {', '.join(operator.parameters)}",
        remedy="use one such as Add",
    )


def _detection_error(method: str, site: Site, span: str | int, texts: int) -> ConfigError:
    return ConfigError(
        f"'{method}' learned a vector at '{site}' that detects nothing",
        expected=f"a token of the {texts} training texts, in the span '{span}', that it finds the concept in",
        found="no positive projection on the vector",
        remedy="train for more steps or at a higher learning rate, or use another seed or span",
    )


def _divergence_error(loss: Tensor, step: int) -> NonFiniteError:
    return NonFiniteError(
        "the training of the vector diverged",
        expected="a finite loss",
        found=f"{float(loss.detach())} at step {step}",
        remedy="lower the learning rate, or run the model in float32",
    )
