"""Passes over the prompts of a circuit in padded batches, with functions at sites."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import whole_number
from steer.circuits.targets import Target, check_target, checked_value
from steer.circuits.texts import Batch, Texts
from steer.errors import AnatomyError
from steer.intervene.attaching import attached_edits
from steer.model import hooks
from steer.model.anatomy import Anatomy
from steer.model.capture import batches_of, check_vocabulary, evaluating
from steer.model.devices import input_device
from steer.model.own_calls import needs_equal_lengths, texts_call
from steer.model.restoring import restoring
from steer.model.resume import StoppedPass
from steer.model.site import Site


def warn_of_plan(model: nn.Module, what: str) -> None:
    """Warns where a plan acts on a model that is looked at: what is found is found in the model that it steers."""
    names = [each.name for edits in attached_edits(model) for each in edits.interventions if each.enabled]
    if names:
        some = ", ".join(f"'{name}'" for name in names[:3]) + (", ..." if len(names) > 3 else "")
        warnings.warn(f"a plan is attached to this model ({some}): {what} the model as it is steered", stacklevel=4)


class TextPasses:
    """Runs prompts in batches, in eval mode.

    Args:
        max_tokens: padded tokens of a batch.

    Raises:
        ConfigError: token ids beyond the vocabulary, or `max_tokens` that is no number.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, texts: Texts, *, max_tokens: int) -> None:
        whole_number(max_tokens, "`max_tokens`", least=1)
        check_vocabulary(anatomy, texts.rows)
        self.model, self.anatomy, self.texts, self.max_tokens = model, anatomy, texts, max_tokens

    def batches(self, prompts: Sequence[int]) -> Iterator[list[int]]:
        """Splits prompts, which may be named more than once. Yields places in that list."""
        lengths = [self.texts.lengths[i] for i in prompts]
        for chosen in batches_of(lengths, self.max_tokens):
            if needs_equal_lengths(self.anatomy):
                yield from ([i for i in chosen if lengths[i] == length] for length in sorted({lengths[i] for i in chosen}))
            else:
                yield chosen

    def batch(self, prompts: Sequence[int]) -> Batch:
        """Some prompts, padded, where the model takes them."""
        return self.texts.batch(prompts, input_device(self.model))

    def run_batch(
        self,
        batch: Batch,
        functions: Mapping[Site, hooks.HookFunction],
        *,
        gradients: bool,
        inside: AbstractContextManager[Any] | None = None,
        last_token: bool = False,
        places: Tensor | None = None,
        then: Callable[[Tensor], None] | None = None,
    ) -> Tensor | None:
        """[rows, tokens, vocabulary] logits, or [rows, 1, vocabulary]; None where a function raised StoppedPass.

        Args:
            functions: by site, called with the activation [rows, tokens, width] and the context of the pass.
            gradients: the pass is recorded by autograd.
            inside: entered around the pass, e.g. a backward rule.
            last_token: logits of the last token of each row alone, and no others computed where the model can leave them out.
            places: [places] of a padded row, in order, at which logits are wanted: [rows, places, vocabulary].
            then: called with the logits while the functions are still on the model, e.g. for the backward pass, in which checkpointed
                blocks run once more.
        """
        ends = batch.mask.shape[1] - 1 - batch.mask.flip(1).argmax(1)  # [rows] place of the last token
        kept, which = torch.unique(ends, return_inverse=True)
        kept = kept if places is None else places.to(kept.device)
        keep = {"logits_to_keep": kept} if (last_token or places is not None) and self._may_keep else {}
        points = [(self.anatomy.point(site), function) for site, function in functions.items()]
        installation = hooks.Installation(self.model, self.anatomy, points)
        output = None
        with restoring(installation.remove), evaluating(self.model), torch.set_grad_enabled(gradients):
            installation.install()
            with torch.compiler.set_stance("force_eager"), inside or nullcontext():
                with suppress(StoppedPass):
                    output = texts_call(self.model, self.anatomy)(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, **keep)
                if output is None:
                    return None
                logits = self._logits(output)
                if places is not None:
                    logits = logits if logits.shape[1] == len(kept) else logits[:, kept]
                elif last_token:
                    rows = torch.arange(len(logits), device=logits.device)
                    logits = logits[rows, (which if keep else ends).to(logits.device)].unsqueeze(1)
                if then is not None:
                    then(logits)
        return logits

    @cached_property
    def _may_keep(self) -> bool:
        call = texts_call(self.model, self.anatomy)
        return call is self.model and any("logits_to_keep" in inspect.signature(module.forward).parameters for module in self.anatomy.chain)

    def values(self, target: Target, batch: Batch, logits: Tensor) -> Tensor:
        """[rows] of the target. Raises ConfigError for a target of other prompts or no number, NonFiniteError for NaN or infinity."""
        check_target(target, len(self.texts))
        is_last = logits.shape[1] < batch.ids.shape[1]
        values = []
        # rows are taken apart at once: each taken alone would have a gradient as large as all of them
        for of_row, mask, prompt in zip(logits.unbind(0), batch.mask, batch.prompts.tolist(), strict=True):
            chosen = of_row if is_last else of_row[mask.bool().to(of_row.device)]  # [tokens, vocabulary]
            values.append(checked_value(target(chosen.float(), prompt), prompt))
        return torch.stack(values)

    def _logits(self, output: Any) -> Tensor:
        logits = getattr(output, "logits", output[0] if isinstance(output, tuple | list) else output)
        if not isinstance(logits, Tensor) or logits.dim() != 3:
            raise _no_logits(self.anatomy, output)
        return logits


# ---- errors


def _no_logits(anatomy: Anatomy, output: object) -> AnatomyError:
    return AnatomyError(
        f"this {anatomy.kind} gives no logits, of which a target is a function",
        expected="[batch, tokens, vocabulary]",
        found=type(output).__name__,
        remedy="load the model with its language-model head, e.g. AutoModelForCausalLM",
    )
