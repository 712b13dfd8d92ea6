"""The rows of docs/results/editing.md: edits of CounterFact facts that the embedded model knows, by every editor and baseline.

    python benchmarks/edit_results.py single      --data FILE ... --text FILE --count 200 --editors memit rome [--layers 4 5 6 7 8]
    python benchmarks/edit_results.py batch       --data FILE ... --text FILE --count 100 --editors memit emmet alphaedit
    python benchmarks/edit_results.py sequence    --data FILE ... --text FILE --count 100 --editors memit alphaedit
    python benchmarks/edit_results.py first_token --data FILE ... --text FILE --editors rome r_rome memit
    python benchmarks/edit_results.py sweep       --data FILE ... --text FILE --count 16 --editors memit --depths 2 4 6 8 10 12

FILE of --data are records that `steer.edits.load_records` reads; --text is running text for the covariance, which ships with the library
where none is named. Facts are known when the first token of their true object, which is one token, is the likeliest with p >= 0.1; those
whose subject is the first token of the prompt are left to `first_token`. Editors of one layer take the last of --layers.

Everything is kept in --work while it runs: known facts, contexts, values (computed once for all editors with the same settings), the row
of each fact. A run that was stopped goes on there. Times are CPU seconds of this process on --threads threads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import steer
from steer.commands.edit_inputs import NEUTRAL, SHIPPED, some_texts
from steer.edits import (
    Contexts,
    Covariance,
    EditEvaluation,
    FactRecord,
    ValueStore,
    evaluate_edits,
    known_facts,
    load_records,
    locate,
    sample_contexts,
    solve_values,
)
from steer.edits.editor import EDITORS, Editor, ValueEditor
from steer.edits.evaluate import readings_before
from steer.edits.evaluation import shared_table
from steer.edits.measure import Readings
from steer.edits.running_text import shipped_texts
from steer.experiment.data import DataSet
from steer.features.training import read_texts
from steer.features.training.texts import documents
from steer.files import atomic_write

MODES = {"single": "single", "batch": "batch", "sequence": "sequence", "first_token": "single", "sweep": "single"}
CHUNK = 8  # facts whose values are optimised together


class Bench:
    """The model, and what all editors share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work
        torch.set_num_threads(options.threads)
        model, self.tokenizer = steer.load("smollm2-135m")
        self.model = model.float().eval()
        self.records = self._records()
        self.editors = {name: self._editor(name) for name in options.editors}
        self.contexts = self._contexts()
        self.texts = [piece for text in read_texts(options.text) for piece in documents(text)] if options.text else shipped_texts()
        layers = sorted({layer for span in spans_of(options) for layer in span})
        needed = any(editor.needs_covariance for editor in self.editors.values())
        self.covariance = (
            Covariance.fit(self.model, self.tokenizer, self.texts, layers, max_tokens=options.tokens, folder=self.work / "covariance")
            if needed else None
        )  # fmt: skip
        neutral = [row["text"] for row in DataSet(SHIPPED).split(NEUTRAL, ("text",))]
        self.neutral = some_texts(self.tokenizer, neutral, 1000 if MODES[options.what] == "single" else 4000)

    def _editor(self, name: str) -> Editor:
        """With its own settings, but for --stop-at-argmax."""
        editor, count = EDITORS.get(name)(), self.options.stop_at_argmax
        if count is None or not isinstance(editor, ValueEditor):
            return editor
        return replace(editor, value_settings=replace(editor.value_settings, stop_at_argmax=count))

    @cached_property
    def before(self) -> Readings:
        """What the model says before any edit."""
        return readings_before(self.model, self.tokenizer, self.records)

    def _records(self) -> list[FactRecord]:
        """Known facts, each prompt once; kept in the working folder."""
        options = self.options
        is_first = options.what == "first_token"
        sources = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in options.data]
        wanted = {"sources": sources, "known": options.known, "first_token": is_first}
        file = self.work / f"records-{hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:12]}.json"
        if file.exists():
            kept = json.loads(file.read_text())
            if kept["whole"] or len(kept["records"]) >= options.count:
                return [FactRecord.from_json(record) for record in kept["records"][: options.count]]
        read = [record for each in options.data for record in load_records(each)]
        records = list({record.fact.prompt: record for record in read}.values())
        starts = [locate(self.tokenizer, record.fact.prompt, record.fact.subject).at_start for record in records]
        records = [record for record, at_start in zip(records, starts, strict=True) if at_start == is_first]
        if not is_first:
            records = known_facts(self.model, self.tokenizer, records, options.known, count=options.count, one_token=True)
        whole = is_first or len(records) < options.count
        atomic_write(file, json.dumps({"whole": whole, "records": [record.as_json() for record in records]}))
        return records[: options.count]

    def _contexts(self) -> Contexts:
        """Drawn once for the facts; kept in the working folder."""
        targets = sorted({record.fact.target for record in self.records})
        told = json.dumps([self.options.contexts, targets])
        file = self.work / f"contexts-{hashlib.sha256(told.encode()).hexdigest()[:12]}.json"
        if not file.exists():
            found = sample_contexts(self.model, self.tokenizer, count=self.options.contexts, seed=0, avoid=targets)
            atomic_write(file, json.dumps(found.to_json()))
        return Contexts.from_json(json.loads(file.read_text()))

    def layers_of(self, name: str, layers: Sequence[int]) -> list[int]:
        return list(layers) if self.editors[name].several_layers else [layers[-1]]

    def evaluated(self, name: str, layers: Sequence[int]) -> tuple[EditEvaluation, dict[str, Any]]:
        """What an editor did, and its numbers for the file of results."""
        editor, mode = self.editors[name], MODES[self.options.what]
        values = ValueStore(self.work / "values")
        facts = [record.fact for record in self.records]
        seconds: list[float] = []
        if isinstance(editor, ValueEditor) and mode != "sequence":  # in a sequence each fact has its value on the weights before it
            for start in range(0, len(facts), CHUNK):
                chunk, settings = facts[start : start + CHUNK], editor.value_settings
                found = solve_values(self.model, self.tokenizer, chunk, self.contexts, layers[-1], settings, cache=values)
                seconds += [value.seconds for value in found]
                print(f"{name}: {len(seconds)} values", flush=True)
        value_seconds = sum(seconds) / len(seconds) if seconds else None
        stop = "" if self.options.stop_at_argmax is None else f"-argmax{self.options.stop_at_argmax}"
        drawn = f"{len(self.contexts.prefixes)}c-{self.options.tokens}t"
        told = f"{self.options.what}-{name}-{'_'.join(map(str, layers))}-{len(self.records)}-{drawn}{stop}"
        rows = self.work / told / "rows.jsonl"
        done = rows.read_text().count("\n") - 1 if rows.exists() else 0
        evaluation = evaluate_edits(
            self.model,
            self.tokenizer,
            self.records,
            editor,
            mode=mode,
            neutral=self.neutral,
            before=None if done >= len(self.records) and mode == "single" else self.before,
            folder=self.work / told,
            layers=list(layers),
            covariance=self.covariance,
            contexts=self.contexts,
            values=values,
        )
        evaluation.save(self.work / f"{told}.json")
        result = {key: value for key, value in evaluation.as_json().items() if key not in ("rows", "kind", "schema", "measures", "facts")}
        return evaluation, {
            **result,
            "seconds_per_edit": evaluation.seconds_per_edit() - (value_seconds or 0.0),  # with values in a sequence
            "layers": list(layers),
            "settings": editor.settings(),
            "records": len(self.records),
            "value_seconds_per_edit": value_seconds,
            "largest_change": max(row.change for row in evaluation.rows),
            "problems": evaluation.problems(),
        }


def parser_of(text: str) -> argparse.ArgumentParser:
    """Arguments that all benchmarks of edits take."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--text")
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 5, 6, 7, 8])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--known", type=float, default=0.1)
    parser.add_argument("--contexts", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("outputs/edit_results"))
    parser.add_argument("--out", type=Path)
    parser.set_defaults(depths=[], stop_at_argmax=None)
    return parser


def spans_of(options: argparse.Namespace) -> list[list[int]]:
    """Layers of each run: those that are named, or as many that end at each depth of a sweep."""
    return [list(range(max(0, depth + 1 - len(options.layers)), depth + 1)) for depth in options.depths] or [options.layers]


def main() -> None:
    parser = parser_of(__doc__ or "")
    parser.add_argument("what", choices=[*MODES])
    parser.add_argument("--editors", nargs="+", default=["memit"])
    parser.add_argument("--depths", nargs="*", type=int, default=[], help="of a sweep: each the last of as many layers as --layers")
    parser.add_argument("--stop-at-argmax", type=int, help="evaluations at which a target was the likeliest, that end its optimisation")
    options = parser.parse_args()
    bench = Bench(options)
    results, evaluations = [], []
    for name in options.editors:
        for span in spans_of(options):
            found, numbers = bench.evaluated(name, bench.layers_of(name, span))
            evaluations.append(found)
            results.append(numbers)
            Console().print(found)
            if options.out:
                write(options, bench, results)
    Console(width=200).print(shared_table(evaluations))


def write(options: argparse.Namespace, bench: Bench, results: list[dict[str, Any]]) -> None:
    """The results so far."""
    content = {
        "what": options.what,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "version": steer.__version__,
        "torch": torch.__version__,
        "threads": options.threads,
        "facts": len(bench.records),
        "contexts": 1 + len(bench.contexts.prefixes),
        "covariance_tokens": options.tokens,
        "neutral_texts": len(bench.neutral),
        "editors": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(options.out, json.dumps(content, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
