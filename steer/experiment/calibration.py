"""What a calibration found: the plan to steer with, what was tried, and what it does on pairs kept for the test."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from steer.directions.direction import Direction, Directions
from steer.intervene import Intervention, Plan
from steer.intervene.operators.add import Add
from steer.model.estimates import Estimate
from steer.model.site import Site
from steer.report.calibration_plot import calibration_figure


@dataclass(frozen=True)
class TriedDose:
    """One layer at one dose.

    Attributes:
        dose, strength: |strength x v| / mean |h|, and the strength that gives it.
        perplexity_ratio: perplexity of neutral text over that of the unsteered model.
        reading: how far the model's own answers move, on a scale on which negative answers read 0 and positive ones 1.
        loops, plain_loops, answers: how many answers repeat themselves, how many of the unsteered model do, of how many.
    """

    site: Site
    dose: float
    strength: float
    perplexity_ratio: float
    reading: Estimate
    loops: int
    plain_loops: int
    answers: int

    @property
    def rejected(self) -> str:
        """Why it may not be chosen; empty when it may."""
        if self.loops > self.plain_loops:
            return f"loops, unsteered {self.plain_loops}/{self.answers}"
        return "" if self.reading.value > 0 else "answers do not move"

    def __str__(self) -> str:
        return f"{self.site} at dose {self.dose:g}: " + (self.rejected or f"moves answers by {self.reading.written(2)}")


@dataclass(frozen=True)
class Answer:
    """One prompt of the test, what the plain and the steered model said, and whether these answers loop."""

    prompt: str
    plain: str
    steered: str
    plain_loops: bool
    steered_loops: bool


class CalibrationWarning(UserWarning):
    """The layer and the dose that were chosen do worse on the pairs kept for the test; see `Calibration.doubts`."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """A direction with the layer and the dose to steer at, see `steer.calibrate`.

        print(calibration)            # a table
        calibration.plan              # ready to attach
        calibration.answers           # plain and steered answers to the prompts of the test
        calibration.plot()            # a matplotlib figure

    Attributes:
        direction: the chosen one; directions: those of all candidate sites.
        dose: |strength x v| / mean |h|.
        tried: every layer and dose whose answers were read, with 95 % intervals over the prompts of the choice.
        effect: on the test, how much the log-probability of the positive answers gains on that of the negative ones, nat per token.
        over_random: the same beyond the mean of random directions as long, at the same site.
        reading: on the test, how far the model's own answers move from how the negative answers read (0) to how the positive ones do (1).
        perplexity_ratios: of the neutral text, at the chosen site, by dose; max_perplexity_ratio: the limit.
        n_pairs: how many made the directions, chose, and tested.
    """

    name: str
    direction: Direction
    directions: Directions
    dose: float
    scope: str
    tried: tuple[TriedDose, ...]
    effect: Estimate
    over_random: Estimate
    reading: Estimate
    answers: tuple[Answer, ...]
    perplexity_ratios: Mapping[float, float]
    max_perplexity_ratio: float
    n_pairs: tuple[int, int, int]

    @property
    def site(self) -> Site:
        """Where the direction is added."""
        return self.direction.site

    @property
    def strength(self) -> float:
        """The strength that gives the dose."""
        return self.direction.strength_of(self.dose)

    @property
    def perplexity_ratio(self) -> float:
        """Of the neutral text, at the chosen dose."""
        return self.perplexity_ratios[self.dose]

    @property
    def why_no_more(self) -> str:
        """Why no dose above the chosen one was taken, in words."""
        above = {dose: ratio for dose, ratio in self.perplexity_ratios.items() if dose > self.dose}
        if not above:
            return f"{self.dose:g} is the largest dose that was given: larger ones were not looked at"
        limit = f"the limit of x{self.max_perplexity_ratio:g} on the perplexity of neutral text"
        said = [f"{dose:g} passes {limit} (x{ratio:.2f})" for dose, ratio in above.items() if ratio > self.max_perplexity_ratio][:1]
        rejected = {point.dose: point.rejected for point in self.tried if point.site == self.site and point.dose in above}
        return "; ".join([*(f"{dose:g}: {why}" for dose, why in rejected.items()), *said])

    @property
    def plan(self) -> Plan:
        """Adds the direction at the chosen strength; a negative strength steers the other way."""
        return Plan(Intervention(Add(self.direction.vector), self.site, scope=self.scope, strength=self.strength))

    @property
    def doubts(self) -> tuple[str, ...]:
        """What the test says against the choice: more loops than without steering, own answers that may not have moved. Else empty."""
        loops, plain = self._test_loops()
        found = []
        if loops > plain:
            found.append(f"{loops} of {len(self.answers)} answers loop, {plain} without steering")
        if self.reading.low is None or self.reading.low <= 0:
            found.append(f"own answers move by {self.reading.written(2)}, which may be nothing")
        return tuple(found)

    def _test_loops(self) -> tuple[int, int]:
        """Answers of the test that loop with steering, and without."""
        return sum(answer.steered_loops for answer in self.answers), sum(answer.plain_loops for answer in self.answers)

    def __repr__(self) -> str:
        return f"Calibration('{self.name}' at {self.site}, dose {self.dose:g}, strength {self.strength:.3g})"

    def __rich__(self) -> Table:
        table = Table(title=f"{self!r}", title_justify="left", caption=self._test(), caption_justify="left")
        for column in ("site", "dose", "strength", "answers move by", "loops", "perplexity", ""):
            table.add_column(column, justify="left" if column in ("site", "") else "right")
        order = list(self.directions)
        for point in sorted(self.tried, key=lambda point: (order.index(point.site), point.dose)):
            chosen = (point.site, point.dose) == (self.site, self.dose)
            numbers = (f"{point.dose:g}", f"{point.strength:.2f}", point.reading.written(2), f"{point.loops}/{point.answers}")
            table.add_row(str(point.site), *numbers, f"x{point.perplexity_ratio:.2f}", "chosen" if chosen else point.rejected)
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=110, force_jupyter=False, force_terminal=False).print(self)
        return text.getvalue()

    def _test(self) -> str:
        loops, plain = self._test_loops()
        return (
            f"on {self.n_pairs[2]} pairs kept for the test: positive answers gain {self.effect.written(2)} nat per token "
            f"({self.over_random.written(2)} over random directions), own answers move by {self.reading.written(2)}, "
            f"{loops} of {len(self.answers)} loop (unsteered {plain}). No larger dose here, since {self.why_no_more}"
        )

    def plot(self) -> Any:
        """A matplotlib figure of what was tried, with intervals; hollow points were rejected. Raises ConfigError without matplotlib."""
        return calibration_figure(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "name": self.name,
            "site": str(self.site),
            "dose": self.dose,
            "strength": self.strength,
            "scope": self.scope,
            "tried": [{**asdict(point), "site": str(point.site), "rejected": point.rejected} for point in self.tried],
            **{key: asdict(getattr(self, key)) for key in ("effect", "over_random", "reading")},
            "answers": [asdict(answer) for answer in self.answers],
            "perplexity_ratio": self.perplexity_ratio,
            "perplexity_ratios": {f"{dose:g}": ratio for dose, ratio in self.perplexity_ratios.items()},
            "why_no_more": self.why_no_more,
            "max_perplexity_ratio": self.max_perplexity_ratio,
            "n_pairs": list(self.n_pairs),
        }
