"""Readout: a model's own way from the residual stream after its last block to logits, proven on the model at hand.

A final norm and an unembedding are not all that lies there in every family: logits may be scaled or capped. What turns the stream into
logits is therefore tried in a pass over a few random tokens, and a model in which something else lies between is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from steer.errors import AnatomyError, SiteError
from steer.model import hooks
from steer.model.anatomy import Anatomy
from steer.model.capture import check_vocabulary, evaluating
from steer.model.context import ForwardContext
from steer.model.devices import input_device
from steer.model.own_calls import texts_call
from steer.model.restoring import restoring
from steer.model.resume import StoppedPass
from steer.model.site import Site
from steer.model.tokens import Row, collate

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}  # of the largest logit, by dtype of the model
COARSE = 0.02  # for halves, whose norms round


class Readout:
    """Final norm, unembedding and what comes after it.

    Attributes:
        anatomy: of the model. width, n_layers: of its residual stream.
        scale, cap: what the model multiplies its logits by, and what bounds them (`cap * tanh(logits / cap)`); 1 and None for nothing.
        head: the unembedding.

    Example:
        >>> readout = steer.lens.Readout.of(model)
        >>> readout.logits(torch.randn(3, readout.width)).shape  # [..., vocabulary]
    """

    def __init__(self, anatomy: Anatomy, head: nn.Module, scale: float, cap: float | None) -> None:
        self.anatomy = anatomy
        self.head = head
        self.scale = scale
        self.cap = cap
        self.width = anatomy.width
        self.n_layers = anatomy.n_layers

    def __repr__(self) -> str:
        after = (f", times {self.scale:.4g}" if self.scale != 1 else "") + (f", capped at {self.cap:.4g}" if self.cap is not None else "")
        norm = type(self.anatomy.final_norm).__name__ if self.anatomy.final_norm is not None else "no norm"
        return f"Readout({norm}, {type(self.head).__name__}{after})"

    @classmethod
    def of(cls, model: nn.Module) -> Readout:
        """Proves the readout of a model. Raises AnatomyError: no unembedding, or logits that are not made from the stream in this way."""
        anatomy = Anatomy.find(model)
        head = anatomy.unembedding
        if head is None:
            raise _no_unembedding(anatomy)
        readout = cls(anatomy, head, 1.0, None)
        with evaluating(model):
            stream, logits = readout.run([_trial_row(anatomy, seed) for seed in (0, 1)], [readout.n_layers])
            logits = logits.float()
            try:
                own = readout.logits(stream[readout.n_layers]).float()
            except Exception as error:  # what lies between may have any shape
                raise _other_readout(anatomy, f"{type(error).__name__}: {error}") from error
        if own.shape != logits.shape:
            raise _other_readout(anatomy, f"logits of the shape {list(logits.shape)}, where norm and unembedding give {list(own.shape)}")
        readout.scale, readout.cap = _after_head(anatomy, own, logits, next(model.parameters()).dtype)
        return readout

    @property
    def unembedding(self) -> Tensor:
        """[vocabulary, width], the rows that stand for tokens. Raises AnatomyError where the head has no such matrix."""
        weight = getattr(self.head, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != self.width:
            raise _no_matrix(self.anatomy, weight)
        return weight.detach()

    def logits(self, h: Tensor) -> Tensor:
        """[..., vocabulary] of a stream h [..., width]; differentiable."""
        norm = self.anatomy.final_norm
        shape = h.shape
        logits = self.head(h if norm is None else norm(h))
        assert logits.shape[:-1] == shape[:-1]
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def depth_of(self, site: str | Site) -> int:
        """How many blocks a site of the residual stream has behind it. Raises SiteError for other sites."""
        site = self.anatomy.point(site).site
        if site.stack is None and site.module is None:
            if site.part == "embed":
                return 0
            if site.layer is not None and site.part in ("input", "output"):
                return site.layer + (site.part == "output")
        raise _not_in_stream(site)

    def site_of(self, depth: int) -> Site:
        """The site of the residual stream behind so many blocks."""
        return Site("embed") if depth == 0 else Site("output", depth - 1)

    def run(self, rows: Sequence[Row], depths: Collection[int]) -> tuple[dict[int, Tensor], Tensor]:
        """Runs texts once: the residual stream [batch, tokens, width] by depth, and the model's logits [batch, tokens, vocabulary]. Texts
        are padded at the right. Raises AnatomyError for a model that gives no logits."""
        read: dict[int, Tensor] = {}
        output = self._pass(rows, {depth: _keeper(read, depth) for depth in depths})
        return read, _logits_of(self.anatomy, output)

    def differentiable(self, rows: Sequence[Row], depths: Collection[int]) -> dict[int, Tensor]:
        """[batch, tokens, width] by depth, as functions of the stream at the first of these depths; the pass ends behind the last."""
        read: dict[int, Tensor] = {}
        keepers = {depth: _keeper(read, depth, is_leaf=depth == min(depths), is_last=depth == max(depths)) for depth in depths}
        with suppress(StoppedPass):
            self._pass(rows, keepers)
        return read

    def _pass(self, rows: Sequence[Row], keepers: Mapping[int, hooks.HookFunction]) -> Any:
        anatomy, model = self.anatomy, self.anatomy.model
        check_vocabulary(anatomy, rows)
        points = [(anatomy.point(self.site_of(depth)), keepers[depth]) for depth in sorted(keepers)]
        batch = collate(rows, pad=0)
        inputs = {name: batch[name].to(input_device(model)) for name in ("input_ids", "attention_mask")}
        with _installed(hooks.Installation(model, anatomy, points)), torch.compiler.set_stance("force_eager"):
            return texts_call(model, anatomy)(**inputs, use_cache=False)


def _keeper(read: dict[int, Tensor], depth: int, *, is_leaf: bool = False, is_last: bool = False) -> hooks.HookFunction:
    """A hook that puts the stream into `read`. is_leaf: gradients start from it. is_last: the pass ends there."""

    def keep(h: Tensor, ctx: ForwardContext) -> Tensor | None:
        read[depth] = h.detach().requires_grad_() if is_leaf else h
        if is_last:
            raise StoppedPass
        return read[depth] if is_leaf else None

    return keep


@contextmanager
def _installed(installation: hooks.Installation) -> Iterator[None]:
    with restoring(installation.remove):
        installation.install()
        yield


def _trial_row(anatomy: Anatomy, seed: int) -> Row:
    size = getattr(anatomy.embedding, "num_embeddings", None) or anatomy.config.vocab_size
    ids = torch.randint(min(3, size - 1), size, (8,), generator=torch.Generator().manual_seed(seed))
    return Row(tuple(ids.tolist()), 1)


def _logits_of(anatomy: Anatomy, output: Any) -> Tensor:
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple | list) else output)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise _other_readout(anatomy, f"a {type(output).__name__} without logits [batch, tokens, vocabulary]")
    return logits


def _after_head(anatomy: Anatomy, own: Tensor, logits: Tensor, dtype: torch.dtype) -> tuple[float, float | None]:
    """Scale and cap between the unembedding's output and the model's logits. Raises AnatomyError when it is neither."""
    finite = torch.isfinite(logits)  # tokens that a model never says may have minus infinity
    own, logits = own[finite].double(), logits[finite].double()
    limit = TOLERANCE.get(dtype, COARSE) * max(float(logits.abs().max()), 1.0)
    scale = float(own @ logits / (own @ own).clamp_min(1e-30))
    config = next((module.config for module in reversed(anatomy.chain) if getattr(module, "config", None) is not None), None)
    cap = getattr(config, "final_logit_softcapping", None)
    tried: list[tuple[float, float | None]] = [(1.0, None), (scale, None)]
    if isinstance(cap, int | float) and cap > 0:
        tried.insert(0, (1.0, float(cap)))  # small logits hardly show a cap, which larger ones would
    errors = []
    for factor, bound in tried:
        made = own * factor if bound is None else bound * torch.tanh(own / bound)
        errors.append(float((made - logits).abs().max()))
        if errors[-1] <= limit:
            return factor, bound
    raise _other_readout(anatomy, f"logits that differ from it by {min(errors):.3g}, at {float(logits.abs().max()):.3g} the largest")


# ---- errors


def _no_unembedding(anatomy: Anatomy) -> AnatomyError:
    return AnatomyError(
        f"this {anatomy.kind} has no unembedding, which a lens reads with",
        expected="a model with its language-model head",
        found=f"a bare {type(anatomy.model).__name__}",
        remedy="load the model with its head, e.g. AutoModelForCausalLM",
    )


def _other_readout(anatomy: Anatomy, found: str) -> AnatomyError:
    return AnatomyError(
        f"the logits of this {anatomy.kind} are not its unembedding of its normed residual stream",
        expected="logits = unembedding(final norm(output of the last block)), scaled or capped",
        found=found,
        remedy="a lens would read something else than the model says; use a probe, or the sites of this model, instead",
    )


def _no_matrix(anatomy: Anatomy, weight: Any) -> AnatomyError:
    return AnatomyError(
        f"the unembedding of this {anatomy.kind} has no row for each token",
        expected=f"a weight [vocabulary, {anatomy.width}]",
        found=list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__,
        remedy="load the model without quantisation, in float32 or bfloat16",
    )


def _not_in_stream(site: Site) -> SiteError:
    return SiteError(
        f"a lens cannot read '{site}'",
        expected="the residual stream: embed, layers.<n>.input or layers.<n>.output",
        found=str(site),
        remedy=f"read 'layers.{site.layer}.output' instead" if site.layer is not None else "read 'layers.*.output' instead",
    )
