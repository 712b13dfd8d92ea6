"""Calibration from pairs alone: at which layer and how strongly to steer, chosen by what the model then says.

Steering the layer where a concept is read best, with the largest effect on given answers, often gives a model that loops or says nothing
new (Tan et al. 2024, arXiv 2407.12404; Turner et al. 2023, arXiv 2308.10248). Here a layer and a dose are chosen by the answers that the
steered model gives itself: they have to read like the positive answers, must not loop, and neutral text has to stay about as likely.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.checks import finite_number, number_within, of_type, whole_number
from steer.directions.contrast import ContrastSet
from steer.directions.direction import Direction, Directions
from steer.directions.dose import side_effects
from steer.directions.extract import extract
from steer.directions.heldout import Projections
from steer.directions.sweep import pair_gaps
from steer.errors import ConfigError, ContrastError
from steer.experiment.calibration import Answer, Calibration, CalibrationWarning, TriedDose
from steer.experiment.complete import greedy_tokens
from steer.experiment.data import DataSet
from steer.experiment.metrics.repetition import repeated
from steer.intervene import Intervention, Plan
from steer.intervene.operators.add import Add
from steer.model.anatomy import Anatomy
from steer.model.capture import capture
from steer.model.estimates import Estimate, mean_of
from steer.model.site import Site
from steer.model.tokens import Row, plain

DOSES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
LEAST_PAIRS = 12
TEST, CHOOSE = 0.25, 1 / 3  # shares of the pairs that test, and of the others that choose
LAYERS, FIRST, LAST = 5, 0.3, 0.8  # candidates, and the part of the depth that they are spread over
NEUTRAL = 4  # texts of the shipped neutral text
CONTROLS = 4  # random directions that the effect is compared with
LOOP, LOOP_TOKENS = 0.25, 4  # an answer loops when this share of its n-grams of so many tokens stood before
BATCH = 32  # answers decoded at once


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Mapping[str, str]],
    *,
    name: str = "concept",
    sites: Sequence[str | Site] | None = None,
    method: str = "mean_difference",
    doses: Sequence[float] = DOSES,
    scope: str = "all",
    neutral: Sequence[str] | None = None,
    max_perplexity_ratio: float = 1.5,
    max_new_tokens: int = 40,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Finds direction, layer and dose for a concept from about twenty pairs of answers, and measures what they do on pairs kept for that.

    Half of the pairs make a direction at every candidate layer. A quarter chooses: of the layers, each at the largest dose that leaves
    neutral text likely enough, the one at which the model's own answers move most towards the positive ones; of the doses there, the
    largest with which no more answers loop than without. The last quarter tests that choice once.

    Args:
        model: a causal language model, raw or wrapped.
        pairs: mappings with `prompt`, `positive` and `negative`, twelve or more; with `group`, whole groups are held out.
        name: what the direction stands for.
        sites: candidates; by default five residual streams from 30 % to 80 % of the depth.
        method: a key of `EXTRACTORS`.
        doses: relative doses |strength x v| / mean |h|; 0.05, 0.1, 0.15, 0.2, 0.3 and 0.4 by default. Not all are tried at every layer, see
            above; with what the largest ones would do to neutral text the result says why none above the chosen one was.
        scope: on which tokens the direction is added; of the answers alone, `response`, it does less at the same cost.
        neutral: texts that have nothing to do with the concept, in English and of everyday things by default.
        max_perplexity_ratio: how much less likely the steered model may find them: 1.5 is 0.4 nat per token.
        max_new_tokens: length of an answer; short ones do not show loops.
        seed: of the split of the pairs, and of the random directions.

    Returns:
        What was chosen, with its plan, and everything that was measured. A `CalibrationWarning` says what the test speaks against it:
        more loops than without steering, or own answers that may not have moved.

    Raises:
        ContrastError: too few pairs, or such as `extract` refuses. ConfigError: nothing moves the answers within the limits, or what was
            chosen does not move the pairs kept for the test; an argument that cannot be. SiteError, NonFiniteError, TokenizerError.

    Example:
        >>> pairs = [{"prompt": "How was the day?", "positive": "I loved it!", "negative": "I hated it."}, ...]  # twenty of them
        >>> calibration = steer.calibrate(model, tokenizer, pairs, name="cheerful")
        >>> print(calibration)
        >>> with calibration.plan.attached(model):
        ...     model.generate(**prompt)
    """
    doses = _checked_doses(doses)
    number_within(max_perplexity_ratio, "max_perplexity_ratio", 1)
    whole_number(max_new_tokens, "max_new_tokens", least=LOOP_TOKENS)
    contrast = ContrastSet.from_pairs(tokenizer, pairs)
    if len(pairs) < LEAST_PAIRS:
        raise _too_few_pairs(len(pairs))
    prompt_of = {row: pair["prompt"] for row, pair in zip(contrast.positive, pairs, strict=True)}
    fitting, testing = contrast.split(TEST, seed)
    choosing = fitting.split(CHOOSE, seed)[1]  # the pairs that `extract` holds out too
    chosen_sites = list(candidate_sites(model) if sites is None else sites)
    texts = [plain(tokenizer, text) for text in (_neutral_texts() if neutral is None else neutral)]
    with tqdm(total=len(chosen_sites) + 5, desc="calibrating: directions", disable=None if progress else True, leave=False) as bar:
        directions = extract(model, fitting, chosen_sites, name=name, method=method, holdout=CHOOSE, seed=seed, progress=False)
        bar.update()
        affordable = {}
        for site, direction in directions.items():
            bar.set_description(f"calibrating: neutral text, {site}")
            affordable[site] = _perplexity_ratios(model, direction, texts, doses, scope)
            bar.update()
        talk = _Talk(model, tokenizer, directions, choosing, scope, max_new_tokens)
        bar.set_description("calibrating: layers")
        tried = _try_layers(talk, affordable, max_perplexity_ratio)
        bar.update()
        bar.set_description("calibrating: doses")
        tried, chosen = _try_doses(talk, affordable, max_perplexity_ratio, tried)
        bar.update()
        if chosen is None:
            raise _nothing_moves(name, tried)
        bar.set_description("calibrating: test")
        direction = directions[chosen.site]
        measured = _tested(model, direction, testing, chosen.strength, scope, seed)
        bar.update()
        judged = _Talk(model, tokenizer, directions, testing, scope, max_new_tokens)
        answers, reading = _answers_of(judged, direction, chosen.strength, tokenizer, [prompt_of[row] for row in testing.positive])
        bar.update()
    calibration = Calibration(
        name=name,
        direction=direction,
        directions=directions,
        dose=chosen.dose,
        scope=scope,
        tried=tuple(tried),
        effect=measured[0],
        over_random=measured[1],
        reading=reading,
        answers=tuple(answers),
        perplexity_ratios=affordable[chosen.site],
        max_perplexity_ratio=max_perplexity_ratio,
        n_pairs=(len(fitting.positive) - len(choosing.positive), len(choosing.positive), len(testing.positive)),
    )
    if measured[0].low is None or measured[0].low <= 0:
        raise _not_confirmed(calibration)
    if calibration.doubts:  # the choice stays: one that is made again on the test would have no test
        warnings.warn(
            f"on {calibration.n_pairs[2]} pairs kept for the test, {calibration!r}: {'; '.join(calibration.doubts)}; "
            "give more pairs, or leave the largest of doses=... out",
            CalibrationWarning,
            stacklevel=2,
        )
    return calibration


def candidate_sites(model: nn.Module) -> list[str]:
    """Residual streams after a few blocks, evenly over the part of the depth where concepts are steered as a rule."""
    depth = Anatomy.find(model).n_layers
    share = [FIRST + (LAST - FIRST) * i / (LAYERS - 1) for i in range(LAYERS)]
    return [f"layers.{layer}.output" for layer in dict.fromkeys(min(int(depth * part), depth - 1) for part in share)]


class _Talk:
    """The model's own answers to the prompts of some pairs, and how they read: 0 as the negative answers do, 1 as the positive ones.

    What is read is the text alone: it goes through the model without the plan, and its mean activation is projected on the direction of
    every candidate site. The reading is the mean over these sites, so that no layer is favoured by the place where it is read.

    Attributes:
        plain: the answers of the unsteered model, decoded beside the first steered ones.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, directions: Directions, pairs: ContrastSet, scope: str, max_new_tokens: int
    ) -> None:
        self.model, self.tokenizer, self.directions = model, tokenizer, directions
        self.scope, self.max_new_tokens = scope, max_new_tokens
        self.prompts = [Row(row.ids[: row.prompt], row.prompt) for row in pairs.positive]
        self.plain: list[Row] = []
        self._plain_readings = torch.zeros(0)

    @property
    def plain_loops(self) -> int:
        return sum(map(_loops, self.plain))

    def answers(self, steps: Sequence[tuple[Direction, float]]) -> tuple[list[list[Row]], Tensor]:
        """Answers to all prompts for each direction at its strength, and [steps, prompts] how far their reading moves."""
        unsteered = [] if self.plain else [(steps[0][0], 0.0)]
        said = self._decoded([*unsteered, *steps])
        readings = self._readings(said)
        if unsteered:
            self.plain, self._plain_readings = said.pop(0), readings[0]
        return said, readings[len(unsteered) :] - self._plain_readings

    def _decoded(self, steps: Sequence[tuple[Direction, float]]) -> list[list[Row]]:
        """For each step the prompts with their answers; all steps of a prompt are rows of one batch, each with a row slot of its own."""
        slots, ends = len(steps), _end_tokens(self.model)
        said: list[list[Row]] = [[] for _ in steps]
        at_once = max(BATCH // slots, 1)
        for start in range(0, len(self.prompts), at_once):
            prompts = self.prompts[start : start + at_once]
            with self._plan(steps).attached(self.model) as attachment:
                if slots > 1:
                    attachment.set_rows(list(range(slots)) * len(prompts))
                asked = [prompt for prompt in prompts for _ in range(slots)]
                tokens = greedy_tokens(self.model, self.tokenizer, asked, self.max_new_tokens)
            for i, (row, answer) in enumerate(zip(asked, tokens.tolist(), strict=True)):
                said[i % slots].append(Row((*row.ids, *_until_end(answer, ends)), row.prompt))
        return said

    def _plan(self, steps: Sequence[tuple[Direction, float]]) -> Plan:
        """Each step in a row slot of its own."""
        vectors: dict[Site, Tensor] = {}
        for slot, (direction, strength) in enumerate(steps):
            vectors.setdefault(direction.site, torch.zeros(len(steps), len(direction.vector)))[slot] = strength * direction.vector
        return Plan([Intervention(Add(vector), site, scope=self.scope) for site, vector in vectors.items()])

    def _readings(self, said: Sequence[Sequence[Row]]) -> Tensor:
        """[steps, prompts]"""
        rows = [row for of_prompt in zip(*said, strict=True) for row in of_prompt]  # those of a prompt side by side: they share it
        readers = {site: Projections(direction.unit[None], len(rows)) for site, direction in self.directions.items()}
        capture(self.model, rows, dict(readers), group=len(said))
        scaled = [
            (reader.values[:, 0] - self.directions[site].metric("mean")) / self.directions[site].metric("gap") + 0.5
            for site, reader in readers.items()
        ]
        return torch.stack(scaled).mean(0).unflatten(0, (-1, len(said))).T


def _perplexity_ratios(
    model: nn.Module, direction: Direction, neutral: Sequence[Row], doses: Sequence[float], scope: str
) -> dict[float, float]:
    """By dose, the perplexity of neutral text over that of the unsteered model."""
    strengths = torch.tensor([direction.strength_of(dose) for dose in (0.0, *doses)])
    _, loss = side_effects(model, direction, neutral, strengths[:, None] * direction.vector, scope=scope)
    return dict(zip(doses, (loss[1:] - loss[0]).exp().tolist(), strict=True))


def _try_layers(talk: _Talk, ratios: Mapping[Site, Mapping[float, float]], most: float) -> list[TriedDose]:
    """Every layer at the largest dose that neutral text allows; those that allow none are left out."""
    allowed = {site: [dose for dose, ratio in of_dose.items() if ratio <= most] for site, of_dose in ratios.items()}
    return _try(talk, ratios, [(site, max(doses)) for site, doses in allowed.items() if doses])


def _try_doses(
    talk: _Talk, ratios: Mapping[Site, Mapping[float, float]], most: float, tried: list[TriedDose]
) -> tuple[list[TriedDose], TriedDose | None]:
    """All allowed doses at the best layer; at the next best, where none of them passes. Returns what was tried, and what passes."""
    for best in sorted(tried, key=lambda point: -point.reading.value):
        rest = [(best.site, dose) for dose, ratio in ratios[best.site].items() if ratio <= most and dose != best.dose]
        tried = tried + _try(talk, ratios, rest)
        passing = [point for point in tried if point.site == best.site and not point.rejected]
        if passing:
            return tried, max(passing, key=lambda point: point.dose)
    return tried, None


def _try(talk: _Talk, ratios: Mapping[Site, Mapping[float, float]], where: Sequence[tuple[Site, float]]) -> list[TriedDose]:
    if not where:
        return []
    strengths = [talk.directions[site].strength_of(dose) for site, dose in where]
    said, moved = talk.answers([(talk.directions[site], strength) for (site, _), strength in zip(where, strengths, strict=True)])
    tried = []
    for (site, dose), strength, answers, moves in zip(where, strengths, said, moved, strict=True):
        looping = torch.tensor([_loops(answer) for answer in answers])
        tried.append(
            TriedDose(
                site=site,
                dose=dose,
                strength=strength,
                perplexity_ratio=ratios[site][dose],
                reading=_mean(torch.where(looping, 0.0, moves)),  # a loop is no move
                loops=int(looping.sum()),
                plain_loops=talk.plain_loops,
                answers=len(answers),
            )
        )
    return tried


def _tested(
    model: nn.Module, direction: Direction, testing: ContrastSet, strength: float, scope: str, seed: int
) -> tuple[Estimate, Estimate]:
    """Gain of the positive answers over the negative ones, nat per token, and by how much it exceeds that of random directions."""
    random = torch.randn(CONTROLS, len(direction.vector), generator=torch.Generator().manual_seed(seed))
    random *= direction.vector.norm() / random.norm(dim=-1, keepdim=True)
    vectors = strength * torch.cat([torch.zeros_like(direction.vector)[None], direction.vector[None], random])
    gaps = pair_gaps(model, direction, testing, vectors, scope=scope)  # [slots, pairs]
    return _mean(gaps[1] - gaps[0]), _mean(gaps[1] - gaps[2:].mean(0))


def _answers_of(
    talk: _Talk, direction: Direction, strength: float, tokenizer: Any, prompts: Sequence[str]
) -> tuple[list[Answer], Estimate]:
    """Every prompt with the plain and the steered answer, and how far the reading moves."""
    (steered,), moved = talk.answers([(direction, strength)])

    def text(row: Row) -> str:
        return tokenizer.decode(row.ids[row.prompt :], skip_special_tokens=True).strip()

    answers = zip(prompts, talk.plain, steered, strict=True)
    return [Answer(prompt, text(plain), text(row), _loops(plain), _loops(row)) for prompt, plain, row in answers], _mean(moved[0])


def _mean(values: Tensor) -> Estimate:
    estimate = mean_of(values)
    assert estimate is not None, "a calibration has prompts and pairs"
    return estimate


def _loops(row: Row) -> bool:
    return repeated(row.ids[row.prompt :], LOOP_TOKENS) >= LOOP


def _end_tokens(model: nn.Module) -> set[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """An answer with the token that ends it, without the padding behind it."""
    end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]


def _neutral_texts() -> list[str]:
    return [row["text"] for row in DataSet("tone").split("neutral_text")[:NEUTRAL]]


def _checked_doses(doses: Any) -> list[float]:
    of_type(doses, (list, tuple), "the doses", "pass a list such as [0.1, 0.2]")
    for dose in doses:
        finite_number(dose, "a dose", above=0)
    if not doses:
        raise _no_doses()
    return sorted(set(doses))


# ---- errors


def _no_doses() -> ConfigError:
    return ConfigError("no doses to try", expected="relative doses such as 0.1", found="none", remedy="leave `doses` out, or name some")


def _too_few_pairs(found: int) -> ContrastError:
    return ContrastError(
        "too few pairs to make, choose and test a direction",
        expected=f"at least {LEAST_PAIRS} pairs, better 20",
        found=found,
        remedy="add pairs; with fewer, extract a direction and choose site and strength yourself",
    )


def _nothing_moves(name: str, tried: Sequence[TriedDose]) -> ConfigError:
    return ConfigError(
        f"nothing that was tried moves the model's answers towards '{name}' within the limits",
        expected="answers that read more like the positive ones, no more loops than without, and neutral text that stays likely",
        found="; ".join(map(str, tried)) or "no dose that leaves neutral text likely enough",
        remedy="give clearer or more pairs, other sites or smaller doses, or raise max_perplexity_ratio",
    )


def _not_confirmed(calibration: Calibration) -> ConfigError:
    return ConfigError(
        f"'{calibration.name}' at {calibration.direction.site}, dose {calibration.dose:g}, does not move the pairs kept for the test",
        expected="an effect whose 95 % interval lies above 0",
        found=f"{calibration.effect.written(3)} nat per token over {calibration.effect.n} pairs",
        remedy="give more pairs, or such as differ in one thing only; check that positive and negative are not mixed up",
    )
