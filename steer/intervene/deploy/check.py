"""Proof by running: a model with folded edits must give what the plan gives, whatever the structure of its family.

In half precision rounding hides what an edit does wherever that is worth little more than a rounding step, and a mixture of experts rounds
to another expert. So the fold is tried in float32, against what the plan changes there; how far rounding then takes the weights from the
plan, as they are stored and run, is measured and reported.
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
from steer.intervene.deploy.fold import Fold
from steer.intervene.intervention import Intervention
from steer.intervene.plan import Plan
from steer.model.anatomy import Anatomy
from steer.model.watcher import watcher_of

# How far the final hidden states may be from those of the plan: a share of what the plan changes in them, and beside that what rounding
# makes of the states in the type that the fold is tried in. SmolLM2-135M with all 30 blocks edited has 2e-6 in float32, whatever the type
# of its weights; with one edit worth 0.01 of the states it has 5e-7. A block that scales what it adds is off by tenths of the change.
SHARE, ROUNDING = 0.001, {torch.float64: 1e-9, torch.float32: 1e-5}
HALF = (torch.bfloat16, torch.float16)
ROWS, TOKENS = 2, 8


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
        watcher = watcher_of(anatomy.model)
        if watcher is not None:
            raise AttachError(
                "something is attached to this model",
                expected="a model without a plan or a monitor",
                found=", ".join(str(hook.point.site) for hook in watcher.site_hooks),
                remedy="detach it first: a plan that is attached and folded would act twice",
            )
        self.anatomy, self.plan, self.carrier = anatomy, Plan(interventions, fingerprint=fingerprint), carrier
        with self.plan.attached(anatomy.model):
            self.wanted = self._run()

    def prove(self, folds: list[Fold]) -> None:
        """Tries folds in float32, on the model as it is without them.

        Raises:
            DeployError: they do not do what the plan does, or the model does not run in float32.
        """
        plain = self._run_wide()
        with self.plan.attached(self.anatomy.model):
            wanted = self._run_wide()
        found = self._run_wide(folds)
        error, effect = (found - wanted).norm(), (wanted - plain).norm()
        if not error <= SHARE * effect + ROUNDING[wanted.dtype] * wanted.norm():
            raise self._refuse(
                f"final hidden states that are off by at most {SHARE:.1%} of what the plan changes in them",
                f"{float(error / effect):.3g} of it: this family scales or gates what its embedding or its blocks add",
                AT_RUN_TIME,
            )

    def compare(self) -> float:
        """Runs the model as it is now, with the edits in its weights.

        Returns:
            The relative difference of the final hidden states, |difference| / |states| over all tokens.

        Raises:
            DeployError: they are not finite.
        """
        found, wanted = self._run().double(), self.wanted.double()
        error = float((found - wanted).norm() / wanted.norm())
        if not math.isfinite(error):
            dtype = str(self.wanted.dtype).removeprefix("torch.")
            raise self._refuse("finite hidden states", f"an overflow in {dtype}", "choose a smaller strength, or a type of a wider range")
        return error

    def _refuse(self, expected: str, found: str, remedy: str) -> DeployError:
        what = f"{self.carrier} does not do what the plan does in this {self.anatomy.config.model_type}"
        return DeployError(what, expected=expected, found=found, remedy=remedy)

    def _run_wide(self, folds: Sequence[Fold] = ()) -> Tensor:
        try:
            with _wide(self.anatomy, folds):
                states = self._run()
            if states.dtype in HALF:
                raise RuntimeError(f"hidden states of {states.dtype}")
            return states
        except RuntimeError as error:
            if isinstance(error, SteerError) or self.wanted.dtype not in HALF:
                raise
            raise DeployError(
                f"{self.carrier} cannot be tried in float32, where rounding would not hide a wrong fold",
                expected="a model that runs in float32, and memory for one of its blocks in that type",
                found=str(error),
                remedy=f"load the model in float32 and change its type afterwards, or {AT_RUN_TIME}",
            ) from error

    @torch.no_grad()
    def _run(self) -> Tensor:
        device = next(self.anatomy.embedding.parameters()).device
        ids = torch.randint(self.anatomy.config.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
        # compiled code would be traced again for every type, and once more for the hooks
        with evaluating(self.anatomy.model), _exact_products(device.type), torch.compiler.set_stance("force_eager"):
            given = self.anatomy.decoder(input_ids=ids.to(device), use_cache=False)
        return given[0]


@contextmanager
def _wide(anatomy: Anatomy, folds: Sequence[Fold]) -> Iterator[None]:
    """Half-precision weights are float32 while the part of the decoder that they belong to runs, and folds are in them.

    The parameters themselves are left alone: copies stand in their places, one block at a time.
    """
    blocks = set(anatomy.blocks)
    others = [part for part in anatomy.decoder.children() if blocks.isdisjoint(part.modules())]
    configs = {id(one): one for part in anatomy.decoder.modules() if (one := getattr(part, "config", None)) is not None}
    with ExitStack() as whole:
        for part in (*anatomy.blocks, *others):
            opened = whole.enter_context(ExitStack())

            def before(part: nn.Module, args: Any, opened: ExitStack = opened) -> None:
                inside = set(part.modules())
                for module in inside:
                    _widen(module, opened)
                trial = opened.enter_context(Baked())
                for made in folds:
                    if made.module in inside:
                        trial.apply(made)

            def after(part: nn.Module, args: Any, output: Any, opened: ExitStack = opened) -> None:
                opened.close()

            whole.callback(part.register_forward_pre_hook(before).remove)
            whole.callback(part.register_forward_hook(after, always_call=True).remove)
        for config in configs.values():
            if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):  # flash attention has half precision only
                whole.callback(setattr, config, "_attn_implementation", config._attn_implementation)
                config._attn_implementation = "eager"
        yield


def _widen(module: nn.Module, opened: ExitStack) -> None:
    kinds: list[tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = [(module._parameters, _frozen), (module._buffers, Tensor.float)]
    for held, make in kinds:
        for name, tensor in held.items():
            if tensor is not None and tensor.dtype in HALF:
                opened.callback(held.__setitem__, name, tensor)
                held[name] = make(tensor)


def _frozen(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().float(), requires_grad=False)


@contextmanager
def _exact_products(device: str) -> Iterator[None]:
    """Products in the type of their factors: no autocast, no TF32, whose rounding would be taken for a wrong fold."""
    with ExitStack() as kept, torch.autocast(device, enabled=False):
        try:
            precision = torch.get_float32_matmul_precision()
            if precision != "highest":
                kept.callback(torch.set_float32_matmul_precision, precision)
                torch.set_float32_matmul_precision("highest")
        except RuntimeError:  # set by the newer interface, beside which PyTorch refuses the older one
            backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
            for backend in backends:
                kept.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = "ieee"
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout off for a block, and every module back to the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
