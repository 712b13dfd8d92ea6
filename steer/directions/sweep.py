"""Sweep: the same texts under many settings of a plan, as row slots of one batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.checks import of_type
from steer.directions.contrast import ContrastSet
from steer.directions.direction import Direction
from steer.directions.passes import Passes, ReadPrefixes, SlottedPlan, Wanted, may_split, reads_logits
from steer.errors import ConfigError, ContrastError, NonFiniteError
from steer.intervene import Intervention, Plan
from steer.intervene.operators.add import Add
from steer.intervene.scope import Scope
from steer.model.anatomy import Anatomy, resolve
from steer.model.capture import batches_of, check_vocabulary, evaluating
from steer.model.likelihood import target_logprobs
from steer.model.prefix import PROVEN, SharedPrefixes, agree, may_nest, may_share, share_prefixes, structure_of, trial_groups
from steer.model.site import Site
from steer.model.tokens import Row

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Predictions:
    """Next-token predictions of one batch under one plan, n of them.

    Attributes:
        plan: number of the plan.
        texts: [n] index of the text that each belongs to.
        targets: [n] the token that follows in the text, -1 after its last.
        logits: [slots, n, vocabulary].
    """

    plan: int
    texts: Tensor
    targets: Tensor
    logits: Tensor


Reader = Callable[[Predictions], None]


def sweep(
    model: nn.Module,
    plan: Plan,
    rows: Sequence[Row],
    slots: int,
    read: Reader,
    *,
    predict: str = "response",
    group: int = 1,
    max_tokens: int = 2048,
    progress: str | None = None,
) -> None:
    """Runs every text with every row slot of a plan, see `sweep_plans`. Each of its interventions has `slots` row slots, or one."""
    sweep_plans(model, [SlottedPlan(plan, slots)], rows, read, predict=predict, group=group, max_tokens=max_tokens, progress=progress)


def sweep_plans(
    model: nn.Module,
    plans: Sequence[SlottedPlan],
    rows: Sequence[Row],
    read: Reader,
    *,
    predict: str = "response",
    group: int = 1,
    max_tokens: int = 2048,
    progress: str | None = None,
) -> None:
    """Runs every text once with every row slot of every plan. Plans that are attached stay in force.

    What is the same in several slots or texts runs once (see `steer.directions.passes`). It is tried on a few texts: where the results are
    not the same, and where another plan or somebody's hook is on the model, every text runs whole in every slot.

    Args:
        plans: not attached.
        rows: the texts.
        read: called with the predictions of each batch under each plan.
        predict: every token of the `response`, or what follows the `last` token of each text.
        group: runs of this many consecutive texts may share a prefix (2 for pairs), beside the one that all texts may share.
        max_tokens: padded tokens per batch, all slots together.
        progress: label of the progress bar, None for none.

    Raises:
        NonFiniteError: the edited model gives NaN or infinity. ConfigError: tokens outside the vocabulary.
    """
    anatomy = resolve(model, [])[0]
    check_vocabulary(anatomy, rows)
    slots = {number: torch.arange(entry.slots) for number, entry in enumerate(plans)}
    with (
        evaluating(model),
        torch.compiler.set_stance("force_eager"),  # a shape of its own for nearly every batch
        tqdm(total=len(rows), desc=progress, disable=True if progress is None else None, leave=False) as bar,
    ):
        run = _cheapest(model, anatomy, plans, rows, predict, group)
        for chosen in batches_of(run.lengths, max_tokens):
            for predictions in run.predictions(chosen, slots):
                _check_finite(predictions.logits)
                read(predictions)
            bar.update(len(chosen))


class _Sweep:
    """One way of running all texts under all plans.

    Args:
        share: what is the same in several slots or texts runs once.
        gather: the unembedding gets no tokens but those whose prediction is read.

    Attributes:
        shared: the prefixes that run once, None for none.
        rest: the texts without them.
        lengths: cost of each text, in padded tokens of all slots.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy | None,
        plans: Sequence[SlottedPlan],
        rows: Sequence[Row],
        predict: str,
        group: int,
        *,
        share: bool,
        gather: bool,
    ) -> None:
        self.passes = Passes(model, anatomy, plans, share=share, gather=gather)
        self.predict = predict
        self.shared: SharedPrefixes | None = None
        if share and anatomy is not None and all(may_split(entry.plan) for entry in plans):
            limits = [len(row.ids) - 1 if predict == "last" else row.prompt - 1 for row in rows]
            limits = [min(limit, row.prompt) for limit, row in zip(limits, rows, strict=True)]  # the response stays in one piece
            self.shared = share_prefixes(rows, limits, group, nest=may_nest(anatomy))
        self.rest = list(rows) if self.shared is None else self.shared.rest
        # what several plans have in common is kept while they run, so that a batch is not for the largest of them alone
        slots = max(*(entry.slots for entry in plans), min(len(plans), 4))
        self.lengths = [slots * len(row.ids) for row in self.rest]
        if self.shared is not None:
            own = [len(self.shared.prefixes[i]) // group for i in self.shared.of]
            self.lengths = [length + extra for length, extra in zip(self.lengths, own, strict=True)]

    @property
    def way(self) -> Hashable:
        """What it shares, and of what: one that has been tried need not be tried again."""
        passes = self.passes
        assert passes.anatomy is not None
        prefixes = None if self.shared is None else (bool(self.shared.common), self.shared.nested, passes.steers_prefix)
        return "sweep", any(passes.depths), prefixes, passes.head is not None, structure_of(passes.anatomy)

    @cached_property
    def common(self) -> ReadPrefixes:
        """What all texts begin with, read once for all batches."""
        assert self.shared is not None
        nothing = self.passes.no_prefixes()
        return self.passes.read_prefixes(nothing, torch.zeros(1, dtype=torch.long), [self.shared.common]) if self.shared.common else nothing

    def predictions(self, chosen: Sequence[int], slots: Mapping[int, Tensor]) -> Iterator[Predictions]:
        """Runs the chosen texts with these row slots, by number of the plan."""
        rows = [self.rest[i] for i in chosen]
        wanted = Wanted.of(rows, self.predict)
        texts = torch.tensor(chosen)[wanted.place]
        prefixes, of = self._prefixes(chosen)
        for plan, logits in self.passes.logits(rows, wanted, prefixes, of, slots):
            yield Predictions(plan, texts, wanted.targets, logits)

    def _prefixes(self, chosen: Sequence[int]) -> tuple[ReadPrefixes | None, Tensor]:
        """The prefixes of the chosen texts, and which of them each has."""
        if self.shared is None:
            return None, torch.zeros(len(chosen), dtype=torch.long)
        if not self.shared.nested:
            return self.common, torch.zeros(len(chosen), dtype=torch.long)
        used = sorted({self.shared.of[i] for i in chosen})
        prefixes = [self.shared.prefixes[i] for i in used]
        read = self.passes.read_prefixes(self.common, torch.zeros(len(used), dtype=torch.long), prefixes)
        return read, torch.tensor([used.index(self.shared.of[i]) for i in chosen])


def _cheapest(
    model: nn.Module, anatomy: Anatomy | None, plans: Sequence[SlottedPlan], rows: Sequence[Row], predict: str, group: int
) -> _Sweep:
    """The way that shares what it can, if on a few texts it gives what whole passes give; else whole passes."""
    whole_passes = _Sweep(model, anatomy, plans, rows, predict, group, share=False, gather=False)
    if anatomy is None or anatomy.unembedding is None:
        return whole_passes
    head = anatomy.unembedding
    gather = not (head._forward_hooks or head._forward_pre_hooks) and not any(reads_logits(anatomy, entry.plan) for entry in plans)
    sharing = _Sweep(model, anatomy, plans, rows, predict, group, share=may_share(model), gather=gather)
    way = sharing.way
    proven = PROVEN.setdefault(model, set())
    if way in proven:
        return sharing
    chosen = [number * group for number in trial_groups(rows, sharing.shared, group)]
    # of each kind one, and those that have least in common
    slots = {number: torch.tensor(sorted({0, plans[number].slots - 1})) for number in sorted({0, len(plans) - 1})}
    expected = [predictions.logits for predictions in whole_passes.predictions(chosen, slots)]
    try:
        reached = [predictions.logits for predictions in sharing.predictions(chosen, slots)]
    except Exception as error:  # a model may refuse a cache, or a pass that begins in its middle, in any way
        log.info("texts run whole, since sharing their passes failed: %s: %s", type(error).__name__, error)
        return whole_passes
    if all(agree(plain, shared) for plain, shared in zip(expected, reached, strict=True)):
        proven.add(way)
        return sharing
    log.info("texts run whole, since sharing their passes changes the results of this model")
    return whole_passes


def _check_finite(logits: Tensor) -> None:
    """Raises NonFiniteError. A sum is finite only where every term is, and takes no mask as large as the logits."""
    if not bool(torch.isfinite(logits.sum(-1, dtype=torch.float32)).all()):
        raise _logits_error(logits)


def sweep_plan(site: Site, vectors: Tensor, scope: str) -> Plan:
    """A plan that adds a vector of its own to each row slot. Raises ConfigError, see `check_scope`.

    Args:
        vectors: [slots, width]; a zero leaves its rows as they are.
    """
    check_scope(scope)
    return Plan(Intervention(Add(vectors), site, scope=scope))


def check_scope(scope: str) -> None:
    """Raises ConfigError for a scope with decoded tokens, of which there are none where whole texts are read: it would measure nothing, or
    another edit than generation sees."""
    if any(selector.kind == "generated" for selector in Scope.parse(scope).selectors):
        raise _scope_error(scope)


def pair_gaps(
    model: nn.Module, direction: Direction, contrast: ContrastSet, vectors: Tensor, progress: str | None = None, *, scope: str = "response"
) -> Tensor:
    """How much likelier the positive answer of each pair is than the negative one, with each vector added at the direction's site.

    Args:
        vectors: [slots, width], the direction at several strengths, or others to compare it with.

    Returns:
        [slots, pairs] fp64, difference of the mean log-probabilities per response token, in nat.

    Raises:
        ContrastError: no pairs, or texts that the direction was made from.
    """
    check_pairs(contrast, "the dose is judged by which answer of a pair is likelier")
    direction.check_unseen((*contrast.positive, *contrast.negative), "these pairs")
    rows, sides = contrast.rows()
    sums = torch.zeros(len(vectors), len(rows), dtype=torch.float64)

    def read(predictions: Predictions) -> None:
        for slot, logits in enumerate(predictions.logits):
            scores = target_logprobs(logits, predictions.targets)
            sums[slot].index_add_(0, predictions.texts, scores.double().cpu())

    sweep(model, sweep_plan(direction.site, vectors, scope), rows, len(vectors), read, group=2, progress=progress)
    scores = sums / torch.tensor([row.response for row in rows])  # [slots, texts]
    side = torch.tensor(sides)
    return scores[:, side] - scores[:, ~side]


def check_pairs(contrast: ContrastSet, what: str) -> None:
    """Raises ContrastError when the texts are not pairs of answers."""
    of_type(contrast, ContrastSet, "the contrast set", "make it with ContrastSet.from_pairs(tokenizer, pairs)")
    if not contrast.paired or any(row.response == 0 for row in (*contrast.positive, *contrast.negative)):
        raise _pairs_error(what, contrast)


def _scope_error(scope: str) -> ConfigError:
    return ConfigError(
        f"scope '{scope}' means decoded tokens, and nothing is decoded here: whole texts are read",
        expected="a scope of the tokens of a text",
        found=str(scope),
        remedy="use 'response', which means the answer here and the decoded tokens in generation",
    )


def _pairs_error(what: str, contrast: ContrastSet) -> ContrastError:
    return ContrastError(
        what,
        expected="pairs of answers, as ContrastSet.from_pairs makes them",
        found="texts without answers" if contrast.paired else "two sets of unrelated texts",
        remedy="give pairs with the keys prompt, positive and negative",
    )


def _logits_error(logits: Tensor) -> NonFiniteError:
    return NonFiniteError(
        "the edited model's logits are not finite",
        expected="finite numbers at every strength",
        found=f"{int((~torch.isfinite(logits)).sum())} of {logits.numel()} are NaN or infinite",
        remedy="lower the strengths, or run the model in float32",
    )
