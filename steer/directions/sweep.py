"""Sweep: the same texts under many settings of a plan, as row slots of one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.checks import of_type
from steer.directions.contrast import ContrastSet
from steer.directions.direction import Direction
from steer.errors import ConfigError, ContrastError, NonFiniteError
from steer.intervene import Intervention, Plan
from steer.intervene.operators.add import Add
from steer.intervene.scope import Scope
from steer.model.anatomy import resolve
from steer.model.annotations import response_tokens
from steer.model.capture import batches, check_vocabulary, evaluating
from steer.model.likelihood import response_sums
from steer.model.site import Site
from steer.model.tokens import Row, collate

Read = Callable[[list[int], Tensor, Tensor], None]


def sweep(
    model: nn.Module, plan: Plan, rows: Sequence[Row], slots: int, read: Read, *, max_tokens: int = 2048, progress: str | None = None
) -> None:
    """Runs every text once with every row slot of a plan. Plans that are attached stay in force.

    Args:
        plan: not attached; each of its interventions has `slots` row slots, or one.
        rows: the texts.
        read: called once a batch with the indices of its texts, logits [slots, batch, tokens, vocabulary] and labels [batch, tokens].
        max_tokens: padded tokens per batch, all slots together.
        progress: label of the progress bar, None for none.

    Raises:
        NonFiniteError: the edited model gives NaN or infinity. ConfigError: tokens outside the vocabulary.
    """
    check_vocabulary(resolve(model, [])[0], rows)
    device = next(model.parameters()).device
    with (
        evaluating(model),
        torch.compiler.set_stance("force_eager"),  # a shape of its own for nearly every batch
        plan.attached(model, stack=True),
        tqdm(total=len(rows), desc=progress, disable=progress is None, leave=False) as bar,
    ):
        for chosen in batches(rows, max(max_tokens // slots, 1)):
            batch = {name: tensor.to(device) for name, tensor in collate([rows[i] for i in chosen], pad=0).items()}
            labels = batch.pop("labels")
            if slots > 1:
                plan.set_rows(torch.arange(slots).repeat_interleave(len(chosen)))
            with response_tokens(model, labels.repeat(slots, 1) != -100):
                logits = model(**{name: tensor.repeat(slots, 1) for name, tensor in batch.items()}, use_cache=False).logits
            if not bool(torch.isfinite(logits).all()):
                raise NonFiniteError(
                    "the edited model's logits are not finite",
                    expected="finite numbers at every strength",
                    found=f"{int((~torch.isfinite(logits)).sum())} of {logits.numel()} are NaN or infinite",
                    remedy="lower the strengths, or run the model in float32",
                )
            read(chosen, logits.unflatten(0, (slots, -1)), labels)
            bar.update(len(chosen))


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
    if any(one.kind == "generated" for one in Scope.parse(scope).selectors):
        raise ConfigError(
            f"scope '{scope}' means decoded tokens, and nothing is decoded here: whole texts are read",
            expected="a scope of the tokens of a text",
            found=str(scope),
            remedy="use 'response', which means the answer here and the decoded tokens in generation",
        )


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
    scores = torch.zeros(len(vectors), len(rows), dtype=torch.float64)

    def read(chosen: list[int], logits: Tensor, labels: Tensor) -> None:
        for slot, one in enumerate(logits):
            total, count = response_sums(one, labels)
            scores[slot, chosen] = (total / count).double().cpu()

    sweep(model, sweep_plan(direction.site, vectors, scope), rows, len(vectors), read, progress=progress)
    side = torch.tensor(sides)
    return scores[:, side] - scores[:, ~side]


def check_pairs(contrast: ContrastSet, what: str) -> None:
    """Raises ContrastError when the texts are not pairs of answers."""
    of_type(contrast, ContrastSet, "the contrast set", "make it with ContrastSet.from_pairs(tokenizer, pairs)")
    if not contrast.paired or any(row.response == 0 for row in (*contrast.positive, *contrast.negative)):
        raise ContrastError(
            what,
            expected="pairs of answers, as ContrastSet.from_pairs makes them",
            found="texts without answers" if contrast.paired else "two sets of unrelated texts",
            remedy="give pairs with the keys prompt, positive and negative",
        )
