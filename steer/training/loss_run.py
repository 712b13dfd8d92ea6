"""LossRun: losses of activations that are added to the loss of a training run, at each of its events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import of_type
from steer.drift.metric_names import check_metric_names, metric_name
from steer.errors import ConfigError, ContextError, HookDidNotRunError
from steer.features.token_loss import TokenLoss
from steer.intervene.low_rank import widened, without_autocast
from steer.intervene.scope_mask import ScopeMask
from steer.model import hooks
from steer.model.anatomy import resolve
from steer.model.context import ForwardContext, in_backward
from steer.training.batches import BatchResponseMask
from steer.training.interval import Interval
from steer.training.ranks import Ranks


class LossRun:
    """Losses in a training run: read in the policy's training passes, added where the trainer starts its backward pass, logged.

        run = LossRun([loss], every_n_steps=1)
        run.attach(model, Ranks())
        run.start(0)
        for step, batch in enumerate(batches, 1):
            run.batch_start(batch)
            run.added(model(**batch).loss).backward()
            optimizer.step()
            run.batch_end()
            metrics = run.advance(step)
        run.detach()

    The loss of a step is the mean over the scoped tokens of all passes since the last backward pass. Validation, generation and the
    reference pass are left alone, and what gradient checkpointing computes a second time is not counted again.

    Args:
        losses: what is added.
        every_n_steps: optimiser steps between two log entries.

    Raises:
        ConfigError: no losses, or two of one name.
    """

    def __init__(self, losses: Sequence[TokenLoss], *, every_n_steps: int = 1) -> None:
        of_type(losses, (list, tuple), "the losses of a callback", "pass a list, [FeatureLoss(...)]")
        for loss in losses:
            of_type(loss, TokenLoss, "a loss of a callback", "pass a steer.FeatureLoss, or a GainPenalty")
        names = [loss.name for loss in losses]
        if not names or len(set(names)) < len(names):
            raise _unclear_losses(names)
        check_metric_names(names, "losses")
        self.losses = list(losses)
        self.interval = Interval(every_n_steps)
        self.response_mask = BatchResponseMask()
        self.ranks = Ranks()
        self._readers: list[LossReader] = []
        self._installation: hooks.Installation | None = None
        self._last_step = 0
        self._first_batch_ran = False

    @property
    def name(self) -> str:
        """What tells these losses from others in the same run."""
        return ",".join(loss.name for loss in self.losses)

    def __repr__(self) -> str:
        return f"LossRun({', '.join(map(repr, self.losses))})"

    @property
    def is_attached(self) -> bool:
        """The hooks are on the model."""
        return self._installation is not None

    def attach(self, model: nn.Module, ranks: Ranks) -> None:
        """Puts hooks at the sites; anew when they are on already. Raises SiteError, AnatomyError, WidthError, ConfigError."""
        self.detach()
        for loss in self.losses:
            loss.check_model(model)
        anatomy, points = resolve(model, [loss.site for loss in self.losses])
        self._readers = [LossReader(loss) for loss in self.losses]
        functions = list(zip(points, self._readers, strict=True))
        self._installation = hooks.Installation(model, anatomy, functions)
        try:
            self._installation.install()
            self.response_mask.install(model)
        except BaseException:
            self.detach()
            raise
        self.ranks = ranks
        self._first_batch_ran = False

    def detach(self) -> None:
        """Takes the hooks off; may be called at any time."""
        self.response_mask.remove()
        if self._installation is not None:
            self._installation.remove()
            self._installation = None
        for reader in self._readers:
            reader.forget()

    def renew(self) -> None:
        """Begins another training run of this object."""
        self.detach()
        self._last_step = 0

    def start(self, step: int) -> None:
        """Starts training, or goes on, after `step` optimiser steps."""
        self._last_step = step

    def batch_start(self, batch: Any) -> None:
        """Takes the response mask and the rows that count from the training batch; None when there is no batch to read them from."""
        self.response_mask.read(batch)
        for reader in self._readers:
            reader.rows = batch.get(reader.loss.rows) if reader.loss.rows is not None and isinstance(batch, Mapping) else None

    def added(self, loss: Tensor, share: float = 1.0) -> Tensor:
        """The loss of the trainer with these losses added, where its backward pass begins.

        Args:
            loss: a scalar, before any factor against underflow (`GradScaler`).
            share: of this micro-batch in the optimiser step, 1 / their number.
        """
        for reader in self._readers:
            part = reader.take()
            if part is not None:
                loss = loss + (share * reader.loss.weight * part).to(loss.device)
        return loss

    def batch_end(self) -> None:
        """Forgets the training batch.

        Raises:
            HookDidNotRunError: no training pass of the first batch came to a site.
            ConfigError: the loss of the trainer was differentiated without these losses.
        """
        self.response_mask.clear()
        lost = [reader.loss.name for reader in self._readers if reader.was_differentiated]
        for reader in self._readers:
            reader.drop()
        if lost:
            raise _not_added(lost)
        if not self._first_batch_ran and (idle := [reader.loss for reader in self._readers if not reader.passes]):
            raise _did_not_run(idle)
        self._first_batch_ran = True

    def advance(self, step: int) -> dict[str, float] | None:
        """Goes to the next step, after `step` optimiser steps. All ranks call it together.

        Returns:
            Metrics when a log entry is due, otherwise None: each loss without its weight, over all tokens since the last entry and all
            ranks; without those that had no token.
        """
        last_step, self._last_step = self._last_step, step
        if step == last_step or not self.interval.is_due(step, last_step):  # gradients are being accumulated
            return None
        sums = self.ranks.sum(torch.stack([reader.sums for reader in self._readers])).tolist()  # [losses, 2]
        for reader in self._readers:
            reader.sums = torch.zeros(2, dtype=torch.float64)
        return {metric_name("steer", loss.name, "loss"): total / n for loss, (total, n) in zip(self.losses, sums, strict=True) if n}

    def state_dict(self) -> dict[str, Tensor]:
        """Flat CPU tensors: the last step."""
        return {"step": torch.tensor(self._last_step)}

    def load_state_dict(self, state: Mapping[str, Tensor], *, is_first_rank: bool) -> None:
        """Goes on from a saved state."""
        self._last_step = int(state["step"])


class LossReader:
    """Hook function: sums one loss over the tokens of training passes.

    Attributes:
        order: among the edits at the site.
        rows: the entry of the batch that says in which rows the loss counts; None between batches, and for batches without it.
        passes: training passes that were read.
        sums: [loss, tokens] since the last log entry, fp64 on the CPU or the device of the model.
        was_differentiated: a backward pass went through a pass whose loss had not been taken.
    """

    def __init__(self, loss: TokenLoss) -> None:
        self.loss = loss
        self.order = loss.order
        self.rows: Any = None
        self.passes = 0
        self.sums = torch.zeros(2, dtype=torch.float64)
        self.was_differentiated = False
        self._scope_mask = ScopeMask(loss.scope)
        self._waiting: list[tuple[Tensor, Tensor]] = []  # loss and tokens of each pass since the last backward pass

    def __call__(self, h: Tensor, ctx: ForwardContext) -> None:
        """Adds the scoped tokens of h [batch, tokens, width]."""
        if ctx.phase != "train" or ctx.role != "policy":
            return
        if not torch.is_grad_enabled():
            raise _reentrant_checkpointing(self.loss)
        with without_autocast(h):
            wide = widened(h)
            values = self.loss.of_pass(wide, ctx)  # [batch, tokens]
            weight = self._weight(wide, ctx)
            total = torch.where(weight > 0, values * weight, 0.0).sum()
        if in_backward():  # the same operations as before, whose results a checkpoint looks for
            return
        if not total.requires_grad:
            raise _nothing_to_train(self.loss)
        self.passes += 1
        self._waiting.append((total, weight.sum()))
        if h.requires_grad and not torch.compiler.is_compiling():
            h.register_hook(self._see_backward)

    def _weight(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        """[batch, tokens] of the scope, its decay included; a checkpoint that computes again may do so when the batch is over."""
        key = f"loss {self.loss.name}"
        if key in ctx.scratch.weights:
            return ctx.scratch.weights[key]
        mask, fade, counts = self._scope_mask.mask(ctx), self._scope_mask.fade(ctx), self.loss.counts(h)
        weight = torch.ones(h.shape[:2], dtype=h.dtype, device=h.device)
        for factor in (mask, fade, counts, self._rows_that_count(ctx)):
            if isinstance(factor, Tensor):
                weight = weight * factor.to(h.device)
            elif factor is False:
                weight = weight * 0
        ctx.scratch.weights[key] = weight
        return weight

    def _rows_that_count(self, ctx: ForwardContext) -> Tensor | None:
        """[batch, 1] bool."""
        if self.loss.rows is None:
            return None
        rows = self.rows if isinstance(self.rows, Tensor | None) else torch.as_tensor(self.rows)
        if rows is None or rows.shape not in ((ctx.batch,), (ctx.batch, 1)):
            raise _unknown_rows(self.loss, ctx, rows)
        return rows.reshape(-1, 1) != 0

    def _see_backward(self, gradient: Tensor) -> None:
        self.was_differentiated |= bool(self._waiting)

    def take(self) -> Tensor | None:
        """The mean over the tokens of the passes that wait, 0 when no token was meant; None when no pass waits."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return None
        total, tokens = (torch.stack(list(column)).sum() for column in zip(*waiting, strict=True))
        self.sums = self.sums.to(total.device) + torch.stack([total.detach(), tokens]).double()
        return total / tokens.clamp_min(torch.finfo(tokens.dtype).tiny)

    def drop(self) -> None:
        """Lets go of passes that no backward pass followed."""
        self._waiting, self.was_differentiated, self.rows = [], False, None

    def forget(self) -> None:
        """Keeps nothing of the model."""
        self.drop()
        self.sums = self.sums.cpu()


# ---- errors


def _unclear_losses(names: list[str]) -> ConfigError:
    return ConfigError(
        "the losses of a callback cannot be told apart" if names else "there are no losses to add",
        expected="at least one loss, each with a name of its own",
        found=", ".join(names) or "none",
        remedy="pass name=... to those that have the same",
    )


def _not_added(names: list[str]) -> ConfigError:
    return ConfigError(
        f"the loss was differentiated without {', '.join(names)}",
        expected="a backward pass that the trainer starts: manual_backward(loss) in Lightning, accelerator.backward(loss) in transformers",
        found="another one, e.g. loss.backward()",
        remedy="let the trainer start it, or add the losses yourself: steer.training.loss_run.LossRun.added(loss)",
    )


def _unknown_rows(loss: TokenLoss, ctx: ForwardContext, found: Tensor | None) -> ContextError:
    return ContextError(
        f"'{loss.name}' does not know the rows in which it counts",
        expected=f"'{loss.rows}' in the batch, one number for each of {ctx.batch} rows",
        found="none" if found is None else list(found.shape),
        remedy="let the collator add it (remove_unused_columns=False in transformers), or leave rows= out",
    )


def _did_not_run(losses: list[TokenLoss]) -> HookDidNotRunError:
    return HookDidNotRunError(
        "the first training batch did not come to the site of a loss",
        expected=f"a forward pass with gradients at {', '.join(sorted({str(loss.site) for loss in losses}))}",
        found="none",
        remedy="train the model that the callback was given, not a copy, and do not bypass its __call__",
    )


def _reentrant_checkpointing(loss: TokenLoss) -> ConfigError:
    return ConfigError(
        f"'{loss.name}' has no gradient where gradients are checkpointed by re-entrance",
        expected="a training pass that records gradients",
        found="one that records none and will be computed again",
        remedy="pass use_reentrant=False: gradient_checkpointing_kwargs={'use_reentrant': False}",
    )


def _nothing_to_train(loss: TokenLoss) -> ConfigError:
    return ConfigError(
        f"nothing that is trained has an influence on '{loss.name}'",
        expected=f"parameters with requires_grad before {loss.site}",
        found="an activation without a gradient",
        remedy="train layers at or before this site, or use a dictionary of a later one",
    )
