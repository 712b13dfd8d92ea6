"""Capture: activations of many texts at any sites in one pass each, streamed into accumulators; nothing else is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.errors import ConfigError, ContrastError, NonFiniteError, SiteError, SteerError
from steer.model import hooks
from steer.model.accumulator import Accumulator, TextAccumulator, pool
from steer.model.anatomy import Anatomy, resolve
from steer.model.annotations import response_tokens
from steer.model.context import ForwardContext
from steer.model.devices import input_device
from steer.model.own_calls import needs_equal_lengths, texts_call
from steer.model.prefix import (
    PROVEN,
    CachedPrefix,
    SharedPrefixes,
    agree,
    empty_prefix,
    extended,
    is_sharded,
    may_nest,
    may_share,
    prefix_batch,
    share_prefixes,
    structure_of,
    trial_groups,
)
from steer.model.restoring import restoring
from steer.model.resume import StoppedPass
from steer.model.site import Site
from steer.model.span import span_of
from steer.model.tokens import Row, check_rows, collate
from steer.model.trial_pass import without_fast_path

log = logging.getLogger(__name__)

FULL = 512  # tokens that keep a processor busy: padding a batch beyond that costs more than a further pass


class _Reader:
    """What the hooks of a capture do in each pass.

    Attributes:
        weight: [batch, tokens of the span] of the running pass, None in passes that only fill a cache.
        unread: sites that the running pass has not reached.
        broken: by site, number of tokens with NaN or infinity in the running pass.
        reduced: what `TextAccumulator`s wait for.
    """

    def __init__(self, accumulators: dict[Site, Accumulator], stop: bool) -> None:
        self.accumulators = accumulators
        self.stop = stop
        self.weight: Tensor | None = None
        self.rows = torch.empty(0)
        self.shape = torch.Size()
        self.span = slice(0, 0)
        self.unread: set[Site] = set()
        self.broken: dict[Site, Tensor] = {}
        self.reduced: list[tuple[TextAccumulator, Tensor]] = []

    def start(self, weight: Tensor | None, rows: Tensor, device: torch.device) -> None:
        """A pass begins. weight: [batch, tokens] on the CPU. No accumulator has to look at tokens left and right of every span."""
        self.unread = set(self.accumulators)
        self.broken = {}
        self.reduced = []
        self.rows = rows
        self.weight = None
        if weight is not None:
            used = weight.any(0).nonzero()
            self.shape = weight.shape
            self.span = slice(int(used[0]), int(used[-1]) + 1)
            self.weight = weight[:, self.span].to(device)

    def hook(self, site: Site) -> Callable[[Tensor, ForwardContext], None]:
        """The function that reads a site."""

        def read(h: Tensor, ctx: ForwardContext) -> None:
            if self.weight is not None:
                self._read(site, h)
            self.unread.discard(site)
            if not self.unread and self.stop:
                raise StoppedPass

        return read

    def _read(self, site: Site, h: Tensor) -> None:
        assert self.weight is not None
        if h.shape[:-1] != self.shape:
            raise _shape_error(site, h, self.shape)
        h = h.detach()[:, self.span]
        weight = self.weight.to(h.device)
        # a sum is finite only where every term is, and takes no mask as large as the activation
        finite = torch.isfinite(h.sum(-1, dtype=torch.float32))  # [batch, tokens]
        self.broken[site] = ((weight > 0) & ~finite).sum()
        accumulator = self.accumulators[site]
        if isinstance(accumulator, TextAccumulator):
            self.reduced.append((accumulator, accumulator.reduce(h, weight).to("cpu", non_blocking=True)))
        else:
            accumulator.update(h, weight, self.rows)

    def finish(self) -> None:
        """The pass is over: waits for the device, once, and hands on what it gave. Raises NonFiniteError."""
        by_device: dict[torch.device, list[Site]] = {}
        for site, count in self.broken.items():
            by_device.setdefault(count.device, []).append(site)
        # reading the counts waits for the copies that were started before them
        counts = {site: n for sites in by_device.values() for site, n in _counts({site: self.broken[site] for site in sites})}
        for site in self.broken:  # in the order in which they ran
            if counts[site]:
                assert self.weight is not None
                raise _finite_error(site, counts[site], int(self.weight.sum()))
        for accumulator, values in self.reduced:
            accumulator.add(values, self.rows)
        self.reduced = []


def _counts(tensors: dict[Site, Tensor]) -> list[tuple[Site, int]]:
    """Numbers that lie on one device, read together."""
    return list(zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True))


def batches(rows: Sequence[Row], max_tokens: int, group: int = 1) -> Iterator[list[int]]:
    """Indices of texts of similar length, longest first, at most `max_tokens` padded tokens a batch; runs of `group` stay together.

    A batch of `FULL` tokens or more is also closed before a text that would be padded by a quarter of its length.
    """
    return batches_of([len(row.ids) for row in rows], max_tokens, group)


def batches_of(lengths: Sequence[int], max_tokens: int, group: int = 1) -> Iterator[list[int]]:
    """`batches` by the number of tokens of each text."""
    units = [range(start, start + group) for start in range(0, len(lengths), group)]
    longest = [max(lengths[i] for i in unit) for unit in units]
    batch: list[int] = []
    width = 0
    for unit in sorted(range(len(units)), key=lambda unit: -longest[unit]):
        width = width or longest[unit]
        tokens = len(batch) * width
        padded = tokens >= FULL and width > 1.25 * longest[unit]
        if batch and (padded or tokens + group * width > max_tokens):
            yield batch
            batch = []
            width = longest[unit]
        batch.extend(units[unit])
    if batch:
        yield batch


def check_vocabulary(anatomy: Anatomy | None, rows: Sequence[Row]) -> None:
    """Raises ConfigError for a token or a position that the model has no embedding of, which on a GPU would end the whole process."""
    limit = None if anatomy is None else _learned_positions(anatomy)
    if limit is not None and (longest := max((len(row.ids) for row in rows), default=0)) > limit:
        raise _too_long(longest, limit)
    size = getattr(anatomy.embedding, "num_embeddings", None) if anatomy is not None else None
    if size is not None and (largest := max((max(row.ids, default=0) for row in rows), default=0)) >= size:
        raise _vocabulary_error(size, largest)


def _learned_positions(anatomy: Anatomy) -> int | None:
    """How many positions a model has embeddings of; None where positions are not learned."""
    for name, module in anatomy.decoder.named_children():
        if isinstance(module, nn.Embedding) and module is not anatomy.embedding and ("position" in name or name == "wpe"):
            return module.num_embeddings - int(getattr(module, "offset", 0))
    return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and without packing texts; the mode of every module is restored on every exit path."""
    modes = [(module, module.training) for module in model.modules()]

    def as_before() -> None:
        for module, training in modes:
            module.training = training

    with restoring(as_before), torch.no_grad(), without_fast_path():
        if any(training for _, training in modes):
            model.eval()
        yield


def capture(
    model: nn.Module,
    rows: Sequence[Row],
    accumulators: dict[Site, Accumulator],
    *,
    span: str | int = "response",
    pad: int = 0,
    max_tokens: int = 4096,
    group: int = 1,
    share: bool = True,
    progress: str | None = None,
) -> None:
    """Streams the activations of texts into one accumulator per site and stops each forward pass after the last site asked for.

    Under FSDP2 passes run to their end, because it keeps state from the start of a forward to its end.

    Args:
        model: anything `Plan.attach` takes. Its training mode, hooks and gradients are left as they were. Plans that are attached stay in
            force and are told which tokens are the response.
        rows: the texts; order is kept through the indices that accumulators get.
        accumulators: one per site.
        span: see `steer.model.span.span_of`.
        pad: any token id; padding is masked.
        max_tokens: padded tokens per batch.
        group: runs of this many consecutive texts share a batch (2 for pairs).
        share: what texts begin with in common is read once. Without, the numbers of a text depend on its own batch alone.
        progress: label of the progress bar, None for none.

    Raises:
        SiteError, ContrastError (no texts, empty span), NonFiniteError. ConfigError: no rows, or tokens outside the vocabulary.

    Example:
        >>> from steer.directions.moments import ContrastMoments
        >>> site = steer.Site.parse("layers.12.output")
        >>> moments = ContrastMoments(torch.tensor([True] * 4 + [False] * 4), paired=False)
        >>> steer.capture(model, rows, {site: moments}, span="all")
        >>> moments.positive.mean.shape  # [width]
    """
    check_rows(rows, "the texts")
    if not rows:
        raise _empty_error()
    sites = list(accumulators)
    anatomy, points = resolve(model, sites)
    if len(stacks := {point.anatomy for point in points if point.anatomy is not None}) == 1:
        (anatomy,) = stacks
    check_vocabulary(anatomy, rows)
    spans = [span_of(row, span) for row in rows]
    shared = None
    if share and anatomy is not None and anatomy.main is anatomy and anatomy.stack.own_call is None and may_share(model):
        shared = share_prefixes(
            rows, [min(start, len(row.ids) - 1) for row, (start, _) in zip(rows, spans, strict=True)], group, nest=may_nest(anatomy)
        )
    reader = _Reader(accumulators, stop=not is_sharded(model))
    installation = hooks.Installation(model, anatomy, [(point, reader.hook(site)) for point, site in zip(points, sites, strict=True)])
    with restoring(installation.remove):
        installation.install()
        # compiled code would be traced again for the readers, and is of no use to a pass that is cut short
        with (
            evaluating(model),
            torch.compiler.set_stance("force_eager"),
            tqdm(total=len(rows), desc=progress, disable=True if progress is None else None, leave=False) as bar,
        ):
            run = _Capture(model, anatomy, reader, rows, spans, pad, None)
            if shared is not None:
                run = _checked(run, _Capture(model, anatomy, reader, rows, spans, pad, shared), group)
            for chosen in batches_of(run.lengths, max_tokens, group):
                for of_length in _by_length(chosen, run.lengths) if needs_equal_lengths(anatomy) else (chosen,):
                    run.read(of_length)
                bar.update(len(chosen))


def _by_length(chosen: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """A batch, split into texts of one length each."""
    return [[i for i in chosen if lengths[i] == length] for length in sorted({lengths[i] for i in chosen})]


class _Capture:
    """Runs texts past a reader: whole, or without the prefixes that they share, which are read once.

    Attributes:
        lengths: cost of each text, in tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy | None,
        reader: _Reader,
        rows: Sequence[Row],
        spans: Sequence[tuple[int, int]],
        pad: int,
        shared: SharedPrefixes | None,
    ) -> None:
        self.model = model
        self.anatomy = anatomy
        self.reader = reader
        self.rows = rows
        self.spans = spans
        self.pad = pad
        self.shared = shared
        self.call = texts_call(model, anatomy)
        self.device = input_device(model)
        self.rest = list(rows) if shared is None else shared.rest
        self.lengths = [len(row.ids) for row in self.rest]
        if shared is not None:
            sizes = torch.tensor(shared.of).bincount().tolist()
            self.lengths = [len(row.ids) + len(shared.prefixes[i]) // sizes[i] for row, i in zip(self.rest, shared.of, strict=True)]

    def read(self, chosen: Sequence[int]) -> None:
        """One batch, from its tokens to the accumulators."""
        rows = [self.rest[i] for i in chosen]
        batch = collate(rows, self.pad)
        response = batch.pop("labels")  # of the texts without their prefixes
        weight = torch.zeros(batch["input_ids"].shape)
        for place, (i, row) in enumerate(zip(chosen, rows, strict=True)):
            cut = len(self.rows[i].ids) - len(row.ids)
            start, stop = self.spans[i]
            weight[place, start - cut : stop - cut] = 1
        prefix = self._prefix(chosen)
        self.reader.start(weight, torch.tensor(chosen), self.device)
        self._run({**batch, "use_cache": False} if prefix is None else prefix.continued(batch), response)
        self.reader.finish()

    def _prefix(self, chosen: Sequence[int]) -> CachedPrefix | None:
        """What comes before the rest of each chosen text."""
        if self.shared is None:
            return None
        start = torch.zeros(len(chosen), dtype=torch.long)
        if not self.shared.nested:
            return self.common.lend(start)
        used = sorted({self.shared.of[i] for i in chosen})
        prefix = self._continued(self.common.select(start[: len(used)]), [self.shared.prefixes[i] for i in used])
        return prefix.lend(torch.tensor([used.index(self.shared.of[i]) for i in chosen]))

    @cached_property
    def common(self) -> CachedPrefix:
        """What all texts begin with, read once for all batches."""
        assert self.anatomy is not None and self.shared is not None
        nothing = empty_prefix(self.anatomy, 1)
        return self._continued(nothing, [self.shared.common]) if self.shared.common else nothing

    def _continued(self, prefix: CachedPrefix, ids: Sequence[tuple[int, ...]]) -> CachedPrefix:
        """Lets a pass extend a prefix, as far up the model as the sites are."""
        batch = prefix_batch(ids)
        self.reader.start(None, torch.empty(0), self.device)
        self._run(prefix.continued(batch), torch.full_like(batch["input_ids"], -100))
        return extended(prefix, batch)

    def _run(self, inputs: dict[str, Any], labels: Tensor) -> None:
        placed = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        with suppress(StoppedPass), response_tokens(self.model, labels != -100):  # a plan that is attached stays in force
            self.call(**placed)


def _checked(plain: _Capture, sharing: _Capture, group: int) -> _Capture:
    """The capture that shares prefixes, if on a few texts it reads what whole passes do; else the plain one."""
    shared, anatomy = sharing.shared, sharing.anatomy
    assert shared is not None and anatomy is not None
    way = ("capture", bool(shared.common), shared.nested, structure_of(anatomy))
    proven = PROVEN.setdefault(plain.model, set())
    if way in proven:
        return sharing
    chosen = [number * group + i for number in trial_groups(plain.rows, shared, group) for i in range(group)]
    if shared.saved < 1.5 * sum(len(plain.rows[i].ids) for i in chosen):
        return plain  # both ways of reading these texts cost more than would be saved
    reader = plain.reader
    accumulators = reader.accumulators
    read: list[dict[Site, _Means]] = []
    try:
        for capture in (plain, sharing):
            read.append({site: _Means() for site in accumulators})
            reader.accumulators = dict(read[-1])
            capture.read(chosen)
    except SteerError:
        raise
    except Exception as error:  # a model may refuse a cache in any way
        log.info("texts run whole, since sharing their prefixes failed: %s: %s", type(error).__name__, error)
        return plain
    finally:
        reader.accumulators = accumulators
    if all(agree(read[0][site].values, read[1][site].values) for site in accumulators):
        proven.add(way)
        return sharing
    log.info("texts run whole, since sharing their prefixes changes the activations of this model")
    return plain


class _Means(TextAccumulator):
    """Mean activation of each text of one batch. values: [batch, width]."""

    def reduce(self, h: Tensor, weight: Tensor) -> Tensor:
        return pool(h, weight)

    def add(self, values: Tensor, rows: Tensor) -> None:
        self.values = values


def _empty_error() -> ContrastError:
    return ContrastError(
        "no texts to read activations from",
        expected="at least one",
        found="none",
        remedy="give rows made with steer.model.tokens.encode",
    )


def _shape_error(site: Site, h: Tensor, shape: torch.Size) -> SiteError:
    return SiteError(
        f"'{site}' does not hold one activation per token",
        expected=f"{list(shape)} tokens, as in the forward pass",
        found=list(h.shape[:-1]),
        remedy="choose a site of the residual stream, attention or MLP",
    )


def _finite_error(site: Site, count: int, tokens: int) -> NonFiniteError:
    return NonFiniteError(
        f"activations at '{site}' are not finite",
        expected="finite numbers",
        found=f"NaN or infinite ones in {count} of {tokens} tokens",
        remedy="run the model in float32 or bfloat16; if it is, look at its weights and at the strength of its plan",
    )


def _too_long(longest: int, limit: int) -> ConfigError:
    return ConfigError(
        "a text is longer than the model can read",
        expected=f"at most {limit} tokens, for which it has positions",
        found=f"{longest} tokens",
        remedy="shorten the text; a prompt that is edited is read behind contexts, too",
    )


def _vocabulary_error(size: int, largest: int) -> ConfigError:
    return ConfigError(
        "a text has tokens that the model does not know",
        expected=f"token ids from 0 to {size - 1}",
        found=largest,
        remedy="tokenise with the tokenizer of this model; after adding tokens to it, model.resize_token_embeddings(len(tokenizer))",
    )
