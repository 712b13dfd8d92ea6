"""What of an edit is left after a fine-tune that is hot enough to wash an unprotected one out, by each protection of `EditCallback`.

    python benchmarks/edit_fine_tune.py --data FILE ... --text FILE [--editor memit] [--count 16] [--steps 30] [--lr 3e-4] [--seed 1]

Known facts (as in edit_results.py) are edited in one batch. Then all weights are trained by AdamW on other text: running text, or true
statements of other records (`--tune statements`), the same steps in the same order in every arm. `unedited` is the fine-tune of the plain
model, against which neighbours are to be read; `alarm` is the unprotected edit, from which the others differ by what stands in
`against_alarm`, paired over facts. --seed chooses the text and its order. An arm that is done is kept in --work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch
from edit_results import Bench, parser_of
from rich.console import Console

import steer
from steer.edits import EditedWeights, EditEvaluation, FactRecord, ValueStore, edit_facts, load_records
from steer.edits.evaluation import EditRow
from steer.edits.measure import measures_of
from steer.edits.readings import EditReader
from steer.edits.record import without_edited_subjects
from steer.features.training import token_rows
from steer.files import atomic_write
from steer.model.estimates import Bootstrap
from steer.model.text_loss import loss_change, text_losses
from steer.model.tokens import Row, collate, plain, rows_hash
from steer.training.edit_run import EditRun
from steer.training.ranks import Ranks

ARMS = ("unedited", "alarm", "project", "freeze", "damp", "resolve")


def training_rows(bench: Bench, options: argparse.Namespace) -> list[Row]:
    """As many rows as all steps take."""
    wanted = options.steps * options.batch
    if options.tune == "text":
        tokens = wanted * options.length + 2000
        ids = token_rows(bench.tokenizer, bench.texts, context=options.length, seed=options.seed, max_tokens=tokens).ids
        return [Row(tuple(row), 1) for row in ids[:wanted].tolist()]
    edited = {record.fact.subject for record in bench.records}
    facts = [record.fact for each in options.data for record in load_records(each)]
    others = [fact for fact in facts if fact.subject not in edited and fact.true]
    chosen = torch.randperm(len(others), generator=torch.Generator().manual_seed(options.seed))[:wanted].tolist()
    return [plain(bench.tokenizer, f"{others[i].prompt} {others[i].true}.") for i in chosen]


def tuned(bench: Bench, rows: list[Row], options: argparse.Namespace, run: EditRun | None) -> Iterator[dict[str, float]]:
    """Trains in place; yields the loss and the readings of every step."""
    model: Any = bench.model.train()
    if run is not None:
        run.attach(model, Ranks())
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.decay)
    readings = run.start(0, [optimizer]) if run is not None else {}
    for step in range(1, options.steps + 1):
        batch = collate(rows[(step - 1) * options.batch : step * options.batch], 0)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if run is not None:
            run.before_step()
        optimizer.step()
        optimizer.zero_grad()
        readings = run.advance(step) if run is not None else {}
        yield {"step": step, "loss": float(loss.detach()), **(readings or {})}
    model.eval()
    if run is not None:
        run.detach()


def main() -> None:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--editor", default="memit")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--decay", type=float, default=0.01)
    parser.add_argument("--tune", choices=["text", "statements"], default="text")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.set_defaults(count=16, what="batch")
    options = parser.parse_args()
    options.editors = [options.editor]
    bench = Bench(options)
    model, tokenizer = bench.model, bench.tokenizer
    records, _ = without_edited_subjects(bench.records)
    layers = bench.layers_of(options.editor, options.layers)
    edit = edit_facts(
        model, tokenizer, [record.fact for record in records], editor=bench.editors[options.editor], layers=layers,
        covariance=bench.covariance, contexts=bench.contexts, values=ValueStore(bench.work / "values"),
    )  # fmt: skip
    reader = EditReader(model, tokenizer, measures_of(None), progress=False)
    neutral = [plain(tokenizer, text) for text in bench.neutral]
    before, losses = reader.read(records), text_losses(model, neutral)
    with edit.applied(model):
        after = reader.read(records)
    rows = training_rows(bench, options)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    named = ("editor", "count", "steps", "batch", "length", "lr", "decay", "tune", "seed", "layers")
    settings = {name: getattr(options, name) for name in named}
    told = [settings, bench.editors[options.editor].settings(), bench.contexts.to_json(), rows_hash(rows), options.tokens]
    told += [record.as_json() for record in records]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
    results: dict[str, Any] = {}
    for arm in options.arms:
        file = options.work / "fine_tune" / f"{arm}-{options.tune}-{digest}.json"
        if not file.exists():
            began, steps = time.process_time(), []
            run = None if arm == "unedited" else EditRun([edit], tokenizer, every_n_steps=5, protect=arm)
            for told in tuned(bench, rows, options, run):
                steps.append(told)
                print(arm, json.dumps(told), flush=True)
            final = reader.read(records)
            found = evaluation(arm, records, reader, before, after if run is not None else before, final)
            change = loss_change(losses, text_losses(model, neutral)).as_facts()
            EditedWeights.of(model).forget()
            model.load_state_dict(weights)
            numbers = {key: value for key, value in found.as_json().items() if key in ("summary", "made_of_several")}
            by_fact = {name: [(row.final or {})[name] for row in found.rows] for name in ("efficacy", "efficacy_probability")}
            content = {"steps": steps, "neutral": change, "seconds": time.process_time() - began, **numbers, "by_fact": by_fact}
            atomic_write(file, json.dumps(content, allow_nan=False) + "\n")
            Console().print(found)
        results[arm] = json.loads(file.read_text())
    against_alarm(results)
    versions = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "version": steer.__version__, "torch": torch.__version__}
    result = {**versions, **settings, "facts": len(records), "arms": results}
    for arm, each in results.items():
        print(f"{arm:<12}", {name: round((each["summary"][name]["final"] or {}).get("value", 0), 3)
                             for name in ("efficacy", "efficacy_probability", "paraphrase", "neighbourhood")},
              f"last loss {each['steps'][-1]['loss']:.3f}, neutral {each['neutral']['value']:+.3f}")  # fmt: skip
    if options.out:
        atomic_write(options.out, json.dumps(result, indent=1, allow_nan=False) + "\n")


def against_alarm(results: dict[str, dict[str, Any]]) -> None:
    """Adds to each protected arm how its final numbers differ from those of the unprotected one, fact by fact."""
    if "alarm" not in results:
        return
    bare = results["alarm"]["by_fact"]
    for arm, found in results.items():
        if arm in ("unedited", "alarm"):
            continue
        pairs = {name: [a - b for a, b in zip(values, bare[name], strict=True)] for name, values in found["by_fact"].items()}
        estimates = {name: Bootstrap(len(values)).mean(values) for name, values in pairs.items()}
        found["against_alarm"] = {name: asdict(estimate) for name, estimate in estimates.items() if estimate is not None}


def evaluation(arm: str, records: list[FactRecord], reader: EditReader, before: Any, after: Any, final: Any) -> EditEvaluation:
    """Before the edit, right after it, and after the fine-tune."""
    rows = [
        EditRow(record.name, record.fact.prompt, record.fact.subject, record.fact.target, record.fact.true,
                *(reader.values(record, seen, before) for seen in (before, after, final)))
        for record in records
    ]  # fmt: skip
    return EditEvaluation("sequence", arm, tuple(measure.name for measure in reader.measures), tuple(rows))


if __name__ == "__main__":
    main()
