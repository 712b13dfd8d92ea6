"""Capture: activations of many texts at any sites in one pass each, streamed into accumulators; nothing else is kept."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.errors import ConfigError, ContrastError, NonFiniteError, SiteError, did_you_mean
from steer.model import hooks
from steer.model.anatomy import Anatomy, resolve
from steer.model.context import ForwardContext
from steer.model.site import Site
from steer.model.tokens import Row, check_rows, collate
from steer.model.watcher import response_tokens


class Accumulator(Protocol):
    """Takes the activations of one site, batch by batch. A statistic is one class with this method."""

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        """Takes one batch. Tensors may be reused by the model afterwards: what is kept must be copied.

        Args:
            h: [batch, tokens, width] in the model's dtype, from the first to the last token at which any text of the batch has its span.
            weight: [batch, tokens], 1 on the span's tokens.
            rows: [batch] indices of the texts.
        """


def pool(h: Tensor, weight: Tensor) -> Tensor:
    """Mean over the span of each text: [batch, tokens, width], [batch, tokens] -> [batch, width] in fp32."""
    weight = weight.to(torch.float32)
    return torch.einsum("btd,bt->bd", h.to(torch.float32), weight / weight.sum(1, keepdim=True).clamp_min(1))


class _Reached(Exception):
    """All sites have been read; the rest of the forward pass is not needed."""


class _Reader:
    def __init__(self, accumulators: dict[Site, Accumulator], stop: bool) -> None:
        self.accumulators, self.stop = accumulators, stop
        self.weight = self.rows = torch.empty(0)
        self.shape, self.span = torch.Size(), slice(0, 0)
        self.left: set[Site] = set()

    def start(self, weight: Tensor, rows: Tensor, device: torch.device) -> None:
        """A pass begins. weight: [batch, tokens] on the CPU. No accumulator has to look at tokens left and right of every span."""
        used = weight.any(0).nonzero()
        self.shape, self.span = weight.shape, slice(int(used[0]), int(used[-1]) + 1)
        self.weight, self.rows, self.left = weight[:, self.span].to(device), rows, set(self.accumulators)

    def act(self, site: Site) -> Callable[[Tensor, ForwardContext], None]:
        def read(h: Tensor, ctx: ForwardContext) -> None:
            if h.shape[:-1] != self.shape:
                raise SiteError(
                    f"'{site}' does not hold one activation per token",
                    expected=f"{list(self.shape)} tokens, as in the forward pass",
                    found=list(h.shape[:-1]),
                    remedy="choose a site of the residual stream, attention or MLP",
                )
            h, weight = h.detach()[:, self.span], self.weight.to(h.device)
            finite = torch.isfinite(h[weight > 0])
            if not bool(finite.all()):
                raise NonFiniteError(
                    f"activations at '{site}' are not finite",
                    expected="finite numbers",
                    found=f"{int((~finite).sum())} of {finite.numel()} are NaN or infinite",
                    remedy="run the model in float32 or bfloat16; if it is, look at its weights and at the strength of its plan",
                )
            self.accumulators[site].update(h, weight, self.rows)
            self.left.discard(site)
            if not self.left and self.stop:
                raise _Reached

        return read


def batches(rows: Sequence[Row], max_tokens: int, group: int = 1) -> Iterator[list[int]]:
    """Indices of texts of similar length, longest first, at most `max_tokens` padded tokens a batch; runs of `group` stay together."""
    return batches_of([len(row.ids) for row in rows], max_tokens, group)


def batches_of(lengths: Sequence[int], max_tokens: int, group: int = 1) -> Iterator[list[int]]:
    """`batches` by the number of tokens of each text."""
    units = [range(start, start + group) for start in range(0, len(lengths), group)]
    longest = [max(lengths[i] for i in unit) for unit in units]
    batch: list[int] = []
    width = 0
    for unit in sorted(range(len(units)), key=lambda unit: -longest[unit]):
        width = width or longest[unit]
        if batch and (len(batch) + group) * width > max_tokens:
            yield batch
            batch = []
            width = longest[unit]
        batch.extend(units[unit])
    if batch:
        yield batch


def check_vocabulary(anatomy: Anatomy | None, rows: Sequence[Row]) -> None:
    """Raises ConfigError for a token that the model has no embedding of, which on a GPU would end the whole process."""
    size = getattr(anatomy.embedding, "num_embeddings", None) if anatomy is not None else None
    if size is not None and (largest := max((max(row.ids, default=0) for row in rows), default=0)) >= size:
        raise ConfigError(
            "a text has tokens that the model does not know",
            expected=f"token ids from 0 to {size - 1}",
            found=largest,
            remedy="tokenise with the tokenizer of this model; after adding tokens to it, model.resize_token_embeddings(len(tokenizer))",
        )


def span_weight(rows: Sequence[Row], span: str | int, length: int) -> Tensor:
    """[batch, length] fp32, 1 on the tokens of a span.

    Args:
        span: `response`, `prompt`, `all`, `last` (last token), `prompt_last` (last token of the prompt), or a token index (negative
            from the end).

    Raises:
        ContrastError: a text without any token in the span.
    """
    weight = torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        size = len(row.ids)
        named = {"response": (row.prompt, size), "prompt": (0, row.prompt), "all": (0, size), "last": (size - 1, size)}
        named["prompt_last"] = (row.prompt - 1, row.prompt)
        if isinstance(span, int):
            index = span if span >= 0 else size + span
            start, stop = index, index + 1
        elif span in named:
            start, stop = named[span]
        else:
            expected = f"one of {', '.join(named)}, or a token index"
            remedy = did_you_mean(str(span), named) or "choose one of these, e.g. 'response'"
            raise ConfigError(f"unknown span '{span}'", expected=expected, found=repr(span), remedy=remedy)
        if not 0 <= start < stop <= size:
            raise ContrastError(
                f"a text of {size} tokens ({row.response} of them response) has no token in the span '{span}'",
                expected="at least one token of every text",
                found=f"tokens {start}:{stop} of {size}",
                remedy="choose another span, or give the text an answer",
            )
        weight[i, start:stop] = 1
    return weight


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode of every module is restored on every exit path."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _is_sharded(model: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing is sharded
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def capture(
    model: nn.Module,
    rows: Sequence[Row],
    accumulators: dict[Site, Accumulator],
    *,
    span: str | int = "response",
    pad: int = 0,
    max_tokens: int = 4096,
    group: int = 1,
    progress: str | None = None,
) -> None:
    """Streams the activations of texts into one accumulator per site and stops each forward pass after the last site asked for.

    Under FSDP2 passes run to their end, because it keeps state from the start of a forward to its end.

    Args:
        model: anything `Plan.attach` takes. Its training mode, hooks and gradients are left as they were. Plans that are attached stay in
            force and are told which tokens are the response.
        rows: the texts; order is kept through the indices that accumulators get.
        accumulators: one per site.
        span: see `span_weight`.
        pad: any token id; padding is masked.
        max_tokens: padded tokens per batch.
        group: runs of this many consecutive texts share a batch (2 for pairs).
        progress: label of the progress bar, None for none.

    Raises:
        SiteError, ContrastError (no texts, empty span), NonFiniteError. ConfigError: no rows, or tokens outside the vocabulary.
    """
    check_rows(rows, "the texts")
    if not rows:
        remedy = "give rows made with steer.model.tokens.encode"
        raise ContrastError("no texts to read activations from", expected="at least one", found="none", remedy=remedy)
    sites = list(accumulators)
    anatomy, points = resolve(model, sites)
    check_vocabulary(anatomy, rows)
    reader = _Reader(accumulators, stop=not _is_sharded(model))
    device = next(model.parameters()).device
    _, remove = hooks.install(model, anatomy, [(point, reader.act(site)) for point, site in zip(points, sites, strict=True)])
    try:
        # compiled code would be traced again for the readers, and is of no use to a pass that is cut short
        with (
            evaluating(model),
            torch.compiler.set_stance("force_eager"),
            tqdm(total=len(rows), desc=progress, disable=progress is None, leave=False) as bar,
        ):
            for batch in batches(rows, max_tokens, group):
                chosen = [rows[i] for i in batch]
                inputs = {name: tensor.to(device) for name, tensor in collate(chosen, pad).items()}
                labels = inputs.pop("labels")
                reader.start(span_weight(chosen, span, labels.shape[1]), torch.tensor(batch), device)
                with suppress(_Reached), response_tokens(model, labels):  # a plan that is attached stays in force
                    model(**inputs, use_cache=False)
                bar.update(len(batch))
    finally:
        remove()
