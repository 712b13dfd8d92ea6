"""MetricCrossing: a metric of a trainer that is above or below a value, which something waits for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steer.checks import finite_number, of_type
from steer.errors import ConfigError


@dataclass(frozen=True)
class MetricCrossing:
    """A metric that is above or below a value; it counts the first time that it is logged so, also when it was so from the beginning.

    Attributes:
        metric: as the trainer logs it, e.g. `val_loss`, or `eval_loss` of a Hugging Face Trainer.
        above, below: exactly one of them.

    Raises:
        ConfigError: neither or both of them, or no finite number.

    Example:
        >>> MetricCrossing("val_loss", below=2.0)
    """

    metric: str
    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        of_type(self.metric, str, "the metric of a crossing", "pass its name, e.g. 'val_loss'")
        given = [value for value in (self.above, self.below) if value is not None]
        if len(given) != 1:
            raise _no_crossing(self)
        finite_number(given[0], f"the value of '{self.metric}'")

    def is_in(self, metrics: Mapping[str, Any]) -> bool:
        """The metric is there and beyond the value."""
        if self.metric not in metrics:
            return False
        value = float(metrics[self.metric])
        return value > self.above if self.above is not None else value < (self.below or 0.0)


# ---- errors


def _no_crossing(crossing: MetricCrossing) -> ConfigError:
    return ConfigError(
        f"what '{crossing.metric}' is waited for is unclear",
        expected="above=... or below=...",
        found=f"above={crossing.above}, below={crossing.below}",
        remedy="pass one of them",
    )
