"""Probe mode: the same prompts at every check, compared one by one with what they gave at the first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from steer.checks import of_type
from steer.drift.measurement import SiteMeasurement
from steer.drift.site_directions import SiteDirections
from steer.model.capture import capture, pool
from steer.model.devices import input_device
from steer.model.tokens import Row


class PooledStates:
    """Accumulator: the mean activation over each text's span.

    Attributes:
        values: [texts, width] fp32, on the CPU.
    """

    def __init__(self, texts: int, width: int) -> None:
        self.values = torch.full((texts, width), torch.nan)

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        """Takes a batch, h [batch, tokens, width]; rows [batch] says which texts these are."""
        self.values[rows] = pool(h, weight).cpu()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Passes within it leave the random state as it was, and compiled code alone."""
    device = input_device(model)
    # Uncompiled, because probe batches have shapes of their own, for which compiled training code would be compiled again.
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.compiler.set_stance("force_eager"):
        yield


class Probe:
    """Fixed prompts and their states at the first measurement.

    Args:
        prompts: tokenised, two or more.
        span: which tokens of a prompt are averaged, see `steer.model.span.span_of`.
        seed: of the sign flips.

    Attributes:
        baseline: states of the first measurement by site, [prompts, width] fp32 on the CPU; empty before.
    """

    def __init__(self, prompts: Sequence[Row], span: str | int, seed: int) -> None:
        for prompt in prompts:
            of_type(prompt, Row, "a probe prompt", "tokenise it: steer.model.tokens.encode(tokenizer, prompt)")
        self.prompts = list(prompts)
        self.span = span
        self.seed = seed
        self.baseline: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        floor = 2 / 2 ** len(self.prompts)
        least = f"p >= {floor:g}, " * (floor > 0.05)
        return f"Probe({len(self.prompts)} prompts, {least}span {self.span}, {'with' if self.baseline else 'without'} a baseline)"

    def measure(self, model: nn.Module, sites: Iterable[SiteDirections]) -> list[SiteMeasurement]:
        """Runs the prompts through the model as it is now; the first call is the baseline.

        Training mode and random state are left as they were. Raises NonFiniteError when the activations are not finite.
        """
        directions = {site.site: site for site in sites}
        pooled = {site: PooledStates(len(self.prompts), own.width) for site, own in directions.items()}
        with undisturbed(model):
            capture(model, self.prompts, dict(pooled), span=self.span)
        measurements = []
        for site, own in directions.items():
            states = pooled[site].values
            baseline = self.baseline.setdefault(str(site), states)
            measurements.append(SiteMeasurement.of_states(own, states, baseline, self.seed))
        return measurements

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the baseline, by site."""
        return {site: states.clone() for site, states in self.baseline.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over the baseline of a saved state."""
        self.baseline = {site: states.cpu().clone() for site, states in state.items()}
