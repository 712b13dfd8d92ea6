"""What a model says next when a feature is added to it: shared by the searches that steer."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from steer.checks import finite_number, whole_number
from steer.errors import ConfigError
from steer.features.encoding import encode_texts
from steer.features.operators.add_decoder import AddDecoder
from steer.features.search.method import FeatureSearch, Scores, SearchTask
from steer.features.search.methods.activation import Activation
from steer.features.search.methods.logit_weights import LogitWeights
from steer.intervene.intervention import Intervention
from steer.intervene.plan import Plan
from steer.model.anatomy import resolve
from steer.model.annotations import response_tokens
from steer.model.capture import evaluating
from steer.model.devices import input_device
from steer.model.own_calls import texts_call
from steer.model.tokens import Row

TOKENS = 2048  # of a pass


class Steered(FeatureSearch):
    """Base of the searches that add a feature's decoder row to the stream of short prompts and look at the next token.

    Steering costs a few passes for each feature. So features are scored that one of the cheap searches puts first: half by activation, half
    by logit weights where the concept has words.

    Args:
        candidates: features of each concept that are tried.
        strength: of the addition, in multiples of the feature's largest value.
        prompts: number of prompts, beginnings of texts all over the text.
        length: tokens of a prompt.
    """

    needs = ("texts",)
    own: ClassVar[tuple[str, ...]]

    def __init__(self, candidates: int = 40, strength: float = 1.0, prompts: int = 8, length: int = 16) -> None:
        for name, value in (("candidates", candidates), ("prompts", prompts), ("length", length)):
            whole_number(value, f"`{name}` of the search", least=1)
        finite_number(strength, "`strength` of the search", above=0)
        self.candidates, self.strength, self.prompts, self.length = candidates, strength, prompts, length

    def score_next(self, task: SearchTask, plain: Tensor, steered: Tensor, features: Tensor) -> Scores:
        """[n] by column of `own`, from log-probabilities of the next token: [prompts, vocabulary] and [n, prompts, vocabulary]."""
        raise NotImplementedError

    def scores(self, task: SearchTask) -> dict[str, Scores]:
        if len(task.dictionary.writes) != 1:
            raise _several_sites(task)
        chosen = dict(task.features) if task.features is not None else self._candidates(task)
        features = torch.cat([*chosen.values()]).unique()
        maxima = self._maxima(task, features)
        scored = self._steer(task, features[maxima > 0], maxima[maxima > 0])
        scored["maximum"] = maxima.double()[maxima > 0]
        wide = {name: torch.full((task.dictionary.width,), torch.nan, dtype=torch.float64) for name in scored}
        for name, values in scored.items():
            wide[name][features[maxima > 0]] = values
        return {concept: _scores_of(wide, own, whole=task.features is None) for concept, own in chosen.items()}

    def _candidates(self, task: SearchTask) -> dict[str, Tensor]:
        """Features of each concept that are worth a pass."""
        by_activation = Activation().scores(task)
        first = {concept: _top(scores["average_precision"], self.candidates) for concept, scores in by_activation.items()}
        if task.words:
            words = LogitWeights().scores(task.of_words())
            for concept, scores in words.items():
                both = zip(_top(scores["z"], self.candidates).tolist(), first[concept].tolist(), strict=False)
                first[concept] = torch.tensor(list(dict.fromkeys(feature for pair in both for feature in pair))[: self.candidates])
        return first

    def _maxima(self, task: SearchTask, features: Tensor) -> Tensor:
        """[n] the largest value of each feature: as recorded, or on the text."""
        if task.maxima is not None:
            return task.maxima[features]
        largest = torch.zeros(len(features))

        def take(f: Tensor, text: Tensor, position: Tensor) -> None:
            largest.copy_(torch.maximum(largest, f.amax(0)) if len(f) else largest)

        encode_texts(task.model, task.dictionary, task.rows, take, features=features)
        return largest

    def _steer(self, task: SearchTask, features: Tensor, maxima: Tensor) -> Scores:
        ids = self._prompts(task)
        plain = _next(task, ids)  # [prompts, vocabulary]
        parts: list[Scores] = []
        per_pass = max(2, TOKENS // ids.numel())
        for start in range(0, len(features), per_pass):
            part = slice(start, start + per_pass)
            amounts = torch.diag(self.strength * maxima[part])  # a row slot for each feature
            operator = AddDecoder(task.dictionary, features[part].tolist(), amounts)
            plan = Plan(Intervention(operator, task.dictionary.writes[0], scope="all"))
            with plan.attached(task.model) as attachment:
                count = len(features[part])
                if count > 1:
                    attachment.set_rows(torch.arange(count).repeat_interleave(len(ids)))
                steered = _next(task, ids.repeat(count, 1)).unflatten(0, (count, len(ids)))
            parts.append(self.score_next(task, plain, steered, features[part]))
        return {name: torch.cat([part[name] for part in parts]) if parts else torch.empty(0, dtype=torch.float64) for name in self.own}

    def _prompts(self, task: SearchTask) -> Tensor:
        """[prompts, length] beginnings of texts, evenly over the text."""
        long = [row for row in task.rows if len(row.ids) >= self.length]
        if not long:
            raise _no_prompts(self.length, task.rows)
        step = max(1, len(long) // self.prompts)
        return torch.tensor([row.ids[: self.length] for row in long[::step][: self.prompts]])


def _scores_of(wide: Scores, features: Tensor, *, whole: bool) -> Scores:
    """[chosen] scores of a concept's features; [width] with NaN for the others when `whole`."""
    if not whole:
        return {name: values[features] for name, values in wide.items()}
    others = torch.ones(len(next(iter(wide.values()))), dtype=torch.bool)
    others[features] = False
    return {name: values.masked_fill(others, torch.nan) for name, values in wide.items()}


def _next(task: SearchTask, ids: Tensor) -> Tensor:
    """[rows, vocabulary] log-probabilities of the token that follows, fp32 on the CPU."""
    anatomy, _ = resolve(task.model, [])
    ids = ids.to(input_device(task.model))
    with evaluating(task.model), response_tokens(task.model, torch.ones_like(ids, dtype=torch.bool)):
        output = texts_call(task.model, anatomy)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    logits: Tensor = getattr(output, "logits", output)
    return logits[:, -1].float().log_softmax(-1).cpu()


def _top(values: Tensor, count: int) -> Tensor:
    return values.nan_to_num(nan=-torch.inf).topk(min(count, len(values))).indices


# ---- errors


def _several_sites(task: SearchTask) -> ConfigError:
    return ConfigError(
        "a search that steers adds a feature at one site",
        expected="a dictionary that writes one site",
        found=f"{len(task.dictionary.writes)} sites",
        remedy="search by='activation' or by='logit_weights'",
    )


def _no_prompts(length: int, rows: tuple[Row, ...]) -> ConfigError:
    longest = max(len(row.ids) for row in rows)
    return ConfigError("no text is as long as a prompt", expected=f"{length} tokens", found=f"{longest} at most", remedy="lower length")
