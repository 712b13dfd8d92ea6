"""What choosing a direction costs on a real model (select, calibrate, extract), beside plain passes over the same texts.

The texts are those of the shipped tone data, of this checkout for every worker. Vectors are random, since what they do costs the same.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import steer
from steer.model.capture import batches
from steer.model.load import load
from steer.model.site import Site
from steer.model.tokens import Row, collate, encode, plain

DATA = Path(__file__).resolve().parents[2] / "steer" / "experiment" / "data" / "tone"
FIRST_LAYER = 4  # of the candidates' sites
SHORT = 12  # tokens of a short answer


class Workload:
    """Cases by name, each a work and the texts that it is about.

    Args:
        arguments: model, candidates, prompts (showing and lacking together), judged (pairs that a dose is judged by), neutral (texts),
            pairs (to extract from).
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.notes: list[str] = []
        self.model, tokenizer = load(arguments["model"])
        config = self.model.config
        self.width, middle = config.hidden_size, f"layers.{config.num_hidden_layers // 2}.output"
        self.generator = torch.Generator().manual_seed(0)
        heldout = [{"prompt": pair["prompt"], "positive": pair["trait"], "negative": pair["neutral"]} for pair in records("heldout")]
        pairs = [*records("contrast"), *heldout]
        contrast = steer.ContrastSet.from_pairs(tokenizer, pairs[: arguments["pairs"]])
        judged = steer.ContrastSet.from_pairs(tokenizer, pairs[-arguments["judged"] :])
        short = shortened(judged)
        neutral = [plain(tokenizer, record["text"]) for record in records("neutral_text")[: arguments["neutral"]]]
        prompts = [encode(tokenizer, record["prompt"]) for record in records("probe")[: arguments["prompts"]]]
        sites = [f"layers.{layer}.output" for layer in range(FIRST_LAYER, FIRST_LAYER + arguments["candidates"])]
        self.candidates = [self._direction(site) for site in sites]
        self.middle = self._direction(middle)
        self.cases: dict[str, tuple[Callable[[], list[float]], Sequence[Row]]] = {
            "select": (lambda: self._select(prompts), prompts),
            "calibrate": (lambda: self._calibrate(judged, neutral), [*judged.positive, *judged.negative, *neutral]),
            "calibrate, short answers": (lambda: self._calibrate(short, neutral), [*short.positive, *short.negative, *neutral]),
            "extract, all layers": (lambda: self._extract(contrast, "layers.*.output"), [*contrast.positive, *contrast.negative]),
            "extract, one layer": (lambda: self._extract(contrast, middle), [*contrast.positive, *contrast.negative]),
        }
        self._forward(prompts)  # brings the weights into memory

    def measure(self, case: str) -> dict[str, Any]:
        """CPU seconds of the work and their ratio to a plain pass over its texts, the most memory held meanwhile in MiB, what came out."""
        work, texts = self.cases[case]
        started = time.process_time()
        self._forward(texts)
        forward = time.process_time() - started
        before = held(reset=True)
        started = time.process_time()
        numbers = work()
        seconds = time.process_time() - started
        peak = held()
        return {"seconds": seconds, "passes": seconds / forward, "peak": peak, "added": peak - before, "numbers": numbers}

    def _direction(self, site: str) -> Any:
        vector = torch.randn(self.width, generator=self.generator)
        return steer.Direction(Site.parse(site), vector, "random", "response", {"activation_norm": 30.0})

    def _select(self, prompts: list[Row]) -> list[float]:
        half = len(prompts) // 2
        selection = steer.select(self.model, self.candidates, showing=prompts[:half], lacking=prompts[half:], tokens=[57], progress=False)
        return [number for candidate in selection.candidates for number in (candidate.bypass, candidate.induce, candidate.kl)]

    def _calibrate(self, judged: Any, neutral: list[Row]) -> list[float]:
        dose_curve = steer.dose_curve if hasattr(steer, "dose_curve") else steer.calibrate  # its name in older checkouts
        curve = dose_curve(self.model, self.middle, judged, neutral, progress=False)
        return [number for point in curve.points for number in (point.effect, point.kl, point.perplexity_ratio)]

    def _extract(self, contrast: Any, site: str) -> list[float]:
        directions = steer.extract(self.model, contrast, [site], name="tone", progress=False)
        return [number for entry in directions.values() for number in (entry.metrics["auc"], entry.metrics["gap"])]

    @torch.no_grad()
    def _forward(self, texts: Sequence[Row]) -> None:
        """One plain pass over each text."""
        for chosen in batches(texts, 2048):
            batch = collate([texts[i] for i in chosen], pad=0)
            self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def records(name: str) -> list[dict[str, str]]:
    """Lines of a file of the tone data."""
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() if line.strip()]


def shortened(contrast: Any) -> Any:
    """The pairs with the first tokens of their answers, as far as these differ."""
    sides = [[Row(row.ids[: row.prompt + SHORT], row.prompt) for row in side] for side in (contrast.positive, contrast.negative)]
    positive, negative = zip(*(pair for pair in zip(*sides, strict=True) if pair[0] != pair[1]), strict=True)
    return steer.ContrastSet(positive, negative, paired=True)


def held(*, reset: bool = False) -> float:
    """The most memory that this process has held, in MiB; since the last reset, where the system has one (Linux)."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
