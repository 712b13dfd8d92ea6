"""Proof by running: a model with edited weights must give what the plan gives, whatever the structure of its family.

In half precision rounding hides what an edit does wherever that is worth little more than a rounding step, and a mixture of experts rounds
to another expert. So the weight edits are tried in float32, against what the plan changes there; how far rounding then takes the weights
from the plan, as they are stored and run, is measured and reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steer.errors import AttachError, DeployError, SteerError
from steer.intervene.deploy.baked import Baked
from steer.intervene.deploy.constant import AT_RUN_TIME
from steer.intervene.deploy.weight_edit import WeightEdit
from steer.intervene.intervention import Intervention
from steer.intervene.plan import Plan
from steer.model.anatomy import Anatomy
from steer.model.capture import evaluating
from steer.model.restoring import restoring, restoring_all
from steer.model.watcher import watchers_of

# How far the final hidden states may be from those of the plan: a share of what the plan changes in them, and beside that what rounding
# makes of the states in the type that the edits are tried in. SmolLM2-135M with all 30 blocks edited has 2e-6 in float32, whatever the type
# of its weights; with one edit worth 0.01 of the states it has 5e-7. A block that scales what it adds is off by tenths of the change.
SHARE = 0.001
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
HALF = (torch.bfloat16, torch.float16)
ROWS = 2
TOKENS = 8


class Check:
    """What a plan does to a model, on random tokens, to compare with.

    Args:
        anatomy: of the model, to which nothing is attached.
        interventions: of a plan; its counts are left alone.
        fingerprint: of that plan.
        carrier: what they are to be put into, for the errors.

    Raises:
        AttachError: something is attached to the model.
        SiteError, WidthError, WrongModelError: the plan does not fit it.
    """

    def __init__(self, anatomy: Anatomy, interventions: list[Intervention], fingerprint: dict[str, Any] | None, carrier: str) -> None:
        if attached := [str(hook.point.site) for watcher in watchers_of(anatomy.model) for hook in watcher.site_hooks]:
            raise _something_attached(attached)
        self.anatomy = anatomy
        self.plan = Plan(interventions, fingerprint=fingerprint)
        self.carrier = carrier
        self.error_in_float32 = math.nan  # what `prove` found: relative difference of the final hidden states
        with self.plan.attached(anatomy.model):
            self.steered = self._final_states()
        self.steered_logits = self._logits(self.steered)

    def prove(self, weight_edits: list[WeightEdit]) -> None:
        """Tries weight edits in float32, on the model as it is without them.

        Raises:
            DeployError: they do not do what the plan does, or the model does not run in float32.
        """
        plain = self._final_states_in_float32()
        with self.plan.attached(self.anatomy.model):
            steered = self._final_states_in_float32()
        edited = self._final_states_in_float32(weight_edits)
        self.error_in_float32 = _relative(edited, steered)
        difference = (edited - steered).norm()
        effect = (steered - plain).norm()
        if not difference <= SHARE * effect + ROUNDING[steered.dtype] * steered.norm():  # not: a difference of NaN is refused
            raise _different_effect(self, float(difference / effect))

    def compare(self) -> float:
        """Runs the model as it is now, with the edits in its weights.

        Returns:
            The relative difference of the final hidden states, |difference| / |states| over all tokens, or that of the logits where it is
            larger.

        Raises:
            DeployError: they are not finite.
        """
        edited = self._final_states()
        difference = max(_relative(edited, self.steered), _relative(self._logits(edited), self.steered_logits))
        if not math.isfinite(difference):
            raise _overflow(self)
        return difference

    @torch.no_grad()
    def _logits(self, states: Tensor) -> Tensor:
        """[rows, tokens, vocabulary] of the head alone; the states themselves for a model without one."""
        head = self.anatomy.unembedding
        if head is None:
            return states
        with _exact_products(states.device.type), torch.compiler.set_stance("force_eager"):
            return head(states)

    def _final_states_in_float32(self, weight_edits: Sequence[WeightEdit] = ()) -> Tensor:
        try:
            with _in_float32(self.anatomy, weight_edits):
                states = self._final_states()
            if states.dtype in HALF:
                raise RuntimeError(f"hidden states of {states.dtype}")
            return states
        except RuntimeError as error:
            if isinstance(error, SteerError) or self.steered.dtype not in HALF:
                raise
            raise _no_float32(self.carrier, error) from error

    def _final_states(self) -> Tensor:
        """[rows, tokens, width] of the decoder on random tokens."""
        device = next(self.anatomy.decoder.parameters()).device
        ids = torch.randint(self.anatomy.config.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
        # compiled code would be traced again for every type, and once more for the hooks
        with evaluating(self.anatomy.model), _exact_products(device.type), torch.compiler.set_stance("force_eager"):
            output = self.anatomy.decoder(input_ids=ids.to(device), use_cache=False)
        return output[0]


def _relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())


@contextmanager
def _in_float32(anatomy: Anatomy, weight_edits: Sequence[WeightEdit]) -> Iterator[None]:
    """Half-precision weights are float32 while the part of the decoder that they belong to runs, and weight edits are in them.

    The parameters themselves are left alone: copies stand in their places, one block at a time.
    """
    blocks = set(anatomy.blocks)
    outside = [part for part in anatomy.decoder.children() if blocks.isdisjoint(part.modules())]
    with restoring_all() as restore:
        for part in (*anatomy.blocks, *outside):
            _widen_while_it_runs(part, weight_edits, restore)
        _avoid_half_precision_attention(anatomy, restore)
        yield


def _widen_while_it_runs(part: nn.Module, weight_edits: Sequence[WeightEdit], restore: ExitStack) -> None:
    """Hooks a part of the decoder, so that its parameters are float32 and edited from the start of its pass to the end."""
    restore_part = restore.enter_context(ExitStack())

    def before(part: nn.Module, args: Any) -> None:
        inside = set(part.modules())
        for module in inside:
            _replace_by_float32(module, restore_part)
        trial = Baked()
        restore_part.enter_context(restoring(trial.undo))
        for weight_edit in weight_edits:
            if weight_edit.module in inside:
                trial.apply(weight_edit)

    def after(part: nn.Module, args: Any, output: Any) -> None:
        restore_part.close()

    restore.callback(part.register_forward_pre_hook(before).remove)
    restore.callback(part.register_forward_hook(after, always_call=True).remove)


def _replace_by_float32(module: nn.Module, restore: ExitStack) -> None:
    """Puts float32 copies in the places of a module's own half-precision parameters and buffers."""
    kinds: list[tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = [(module._parameters, _frozen), (module._buffers, Tensor.float)]
    for tensors, widen in kinds:
        for name, tensor in tensors.items():
            if tensor is not None and tensor.dtype in HALF:
                restore.callback(tensors.__setitem__, name, tensor)
                tensors[name] = widen(tensor)


def _frozen(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().float(), requires_grad=False)


def _avoid_half_precision_attention(anatomy: Anatomy, restore: ExitStack) -> None:
    """Switches flash attention, which takes half precision only, to eager attention."""
    configs = {id(config): config for part in anatomy.decoder.modules() if (config := getattr(part, "config", None)) is not None}
    for config in configs.values():
        if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
            restore.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = "eager"


@contextmanager
def _exact_products(device: str) -> Iterator[None]:
    """Products in the type of their factors: no autocast, no TF32, whose rounding would be taken for a wrong weight edit."""
    with restoring_all() as restore, torch.autocast(device, enabled=False):
        try:
            precision = torch.get_float32_matmul_precision()
            if precision != "highest":
                restore.callback(torch.set_float32_matmul_precision, precision)
                torch.set_float32_matmul_precision("highest")
        except RuntimeError:  # set by the newer interface, beside which PyTorch refuses the older
            backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
            for backend in backends:
                restore.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = "ieee"
        yield


# ---- errors


def _something_attached(sites: list[str]) -> AttachError:
    return AttachError(
        "something is attached to this model",
        expected="a model without a plan or a monitor",
        found=", ".join(sites),
        remedy="detach it first: a plan that is attached and in the weights would act twice",
    )


def _different_effect(check: Check, share: float) -> DeployError:
    return DeployError(
        _does_otherwise(check),
        expected=f"final hidden states that are off by at most {SHARE:.1%} of what the plan changes in them",
        found=f"{share:.3g} of it: this family scales or gates what its embedding or its blocks add",
        remedy=AT_RUN_TIME,
    )


def _overflow(check: Check) -> DeployError:
    return DeployError(
        _does_otherwise(check),
        expected="finite hidden states",
        found=f"an overflow in {str(check.steered.dtype).removeprefix('torch.')}",
        remedy="choose a smaller strength, or a type of a wider range",
    )


def _does_otherwise(check: Check) -> str:
    return f"{check.carrier} does not do what the plan does in this {check.anatomy.kind}"


def _no_float32(carrier: str, error: RuntimeError) -> DeployError:
    return DeployError(
        f"{carrier} cannot be tried in float32, where rounding would not hide a wrong edit",
        expected="a model that runs in float32, and memory for one of its blocks in that type",
        found=str(error),
        remedy=f"load the model in float32 and change its type afterwards, or {AT_RUN_TIME}",
    )
