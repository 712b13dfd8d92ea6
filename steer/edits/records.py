"""Records of edits from files and from the hub, and those among them that a model knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from steer.checks import number_within, of_type, whole_number
from steer.data_files import empty_file, from_hub, json_content, json_lines, no_such_form
from steer.edits.answer_scores import AnswerScorer
from steer.edits.record import FactRecord, record_of
from steer.edits.record_format import RECORD_FORMATS, format_of
from steer.errors import ConfigError, DamagedFileError, FileError
from steer.reading import damage_of, damaged, place_of, read_bytes

CHUNK = 64  # records that are read together where as many as are wanted may be found early


def load_records(source: str | Path, *, split: str | None = None, snippets: str | Path | None = None) -> list[FactRecord]:
    """Loads facts to edit, with the prompts that an edit is measured on.

    Args:
        source: a file of JSON or JSON lines whose records have one of the forms of `RECORD_FORMATS`, told by their keys; or a data set of
            the hub with such rows, by its name there; or the name of a form that is on the hub, such as `counterfact`.
        split: of a data set of the hub.
        snippets: the file `attribute_snippets.json` that CounterFact has beside it: texts about objects and subjects, without which
            consistency and essence drift are not available.

    Raises:
        FileError: nothing at the path, or the hub does not give the data set. ConfigError: the package `datasets` is missing.
        DamagedFileError: rows of no known form, values that are missing, or no rows.

    Example:
        >>> records = steer.edits.load_records("counterfact.json")
        >>> fact = records[0].fact
    """
    of_type(source, (str, Path), "the source of records", "pass a path, or the name of a data set of the hub")
    rows = _rows(source, split)
    if not rows:
        raise empty_file(source)
    if not all(isinstance(row, dict) for row in rows) or (form := format_of(rows)) is None:
        raise _no_known_form(source, rows[0])
    records = list(dict.fromkeys(form().read(rows, str(source))))  # some data sets have a record twice
    if not records:
        raise _no_facts(source, len(rows))
    _check_names(records, source)
    return records if snippets is None else with_snippets(records, snippets)


def _rows(source: str | Path, split: str | None) -> list[Any]:
    name = str(source)
    if name in RECORD_FORMATS and (hub := RECORD_FORMATS.get(name).hub) is not None and not Path(name).exists():
        return from_hub(hub[0], hub[1], split or hub[2], "records of edits", "edits")
    path = place_of(source)
    if path.suffix.lower() in (".csv", ".tsv"):
        raise _no_tables(path)
    if path.is_file():
        return list(json_content(path)) if read_bytes(path, 64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") else json_lines(path)
    if path.exists() or name.startswith((".", "/", "~")) or path.suffix in (".json", ".jsonl") or "/" not in name:
        raise _no_file(path)
    return from_hub(name, None, split or "train", "records of edits", "edits")


def with_snippets(records: Sequence[FactRecord], snippets: str | Path) -> list[FactRecord]:
    """Records with texts about their targets, and about their subjects where they are told as having the true object.

    Args:
        snippets: a list of {relation_id, target_id, samples: [{name, text}]}.

    Raises:
        FileError: no file. DamagedFileError: another form.
    """
    path = place_of(snippets)
    content = json_content(path)
    if not isinstance(content, list) or not all(isinstance(each, dict) and isinstance(each.get("samples"), list) for each in content):
        raise no_such_form(path, "a list of {relation_id, target_id, samples}", type(content).__name__)
    with damage_of(path, "samples that are objects with name and text"):
        samples = {
            (str(each.get("relation_id")), str(each.get("target_id"))): [(sample["name"], sample["text"]) for sample in each["samples"]]
            for each in content
        }

    def told(record: FactRecord, of: str) -> list[tuple[str, str]]:
        return samples.get((record.relation, of), [])

    return [
        replace(
            record,
            reference_texts=tuple(text for _, text in told(record, record.target_id)),
            essence_texts=tuple(text for name, text in told(record, record.true_id) if name == record.fact.subject),
        )
        for record in records
    ]


def known_facts(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[FactRecord],
    least: float = 0.1,
    *,
    count: int | None = None,
    one_token: bool = False,
    max_tokens: int = 1024,
    progress: bool = True,
) -> list[FactRecord]:
    """Chooses the records whose true object the model knows: its first token is the likeliest behind the prompt, and likely enough.

    Args:
        least: probability of that token at least.
        count: stop when there are so many; None looks at all.
        one_token: leave out objects of several tokens, of which the first says less.
        max_tokens: padded tokens of a batch.
        progress: a bar where the output is a terminal.

    Returns:
        Records in their order; none that say no true object.

    Example:
        >>> known = steer.edits.known_facts(model, tokenizer, records, least=0.0)
    """
    number_within(least, "`least`, the probability of a true object", 0, 1)
    if count is not None:
        whole_number(count, "`count`, the number of known facts", least=1)
    scorer = AnswerScorer(model, tokenizer, max_tokens=max_tokens, progress=False)
    asked = [record for record in map(record_of, records) if record.fact.true is not None]
    known: list[FactRecord] = []
    with tqdm(total=len(asked), desc="known facts", disable=None if progress else True, leave=False) as bar:
        for start in range(0, len(asked), CHUNK):
            chunk = asked[start : start + CHUNK]
            known += _known(scorer, chunk, least, one_token)
            bar.update(len(chunk))
            bar.set_postfix(known=len(known))
            if count is not None and len(known) >= count:
                return known[:count]
    return known


def _known(scorer: AnswerScorer, records: Sequence[FactRecord], least: float, one_token: bool) -> list[FactRecord]:
    questions = [(record.fact.prompt, record.fact.true or "") for record in records]
    if one_token:
        single = [len(scorer.answer_ids(true)) == 1 for _, true in questions]
        records = [record for record, fits in zip(records, single, strict=True) if fits]
        questions = [question for question, fits in zip(questions, single, strict=True) if fits]
    answers = scorer.scores(questions)
    return [
        record
        for record, question in zip(records, questions, strict=True)
        if (answer := answers[question]).hits[0] and answer.first_probability >= least
    ]


def _check_names(records: Sequence[FactRecord], source: object) -> None:
    seen: dict[str, FactRecord] = {}
    for record in records:
        if (other := seen.setdefault(record.name, record)) is not record:
            raise _same_name(source, other, record)


# ---- errors


def _no_file(path: Path) -> FileError:
    named = ", ".join(name for name in RECORD_FORMATS if RECORD_FORMATS.get(name).hub is not None)
    expected = f"a file of JSON or JSON lines, the name of a data set of the hub as owner/name, or {named}"
    found = "a folder" if path.is_dir() else "nothing there"
    return FileError(f"no records of edits at '{path}'", expected=expected, found=found, remedy="check the path")


def _no_known_form(source: object, row: Any) -> DamagedFileError:
    forms = "; ".join(f"{name}: {', '.join(RECORD_FORMATS.get(name).keys)}" for name in RECORD_FORMATS)
    found = f"the keys {', '.join(map(str, row))}" if isinstance(row, dict) else f"{type(row).__name__} {row!r:.40}"
    return no_such_form(source, f"records with the keys of one form ({forms})", found)


def _no_tables(path: Path) -> ConfigError:
    return ConfigError(
        f"records of edits are not read from tables such as '{path}'",
        expected="JSON lines, or a list in JSON, since a record may have several paraphrases and neighbours",
        found=path.suffix,
        remedy='write one object a line: {"prompt": ..., "subject": ..., "target": ..., "true": ...}',
    )


def _no_facts(source: object, rows: int) -> DamagedFileError:
    return damaged(
        str(source),
        "records whose prompt names the subject (or has {} in its place), with a target",
        f"{rows} records, none of them like that",
        f"no record of {source} can be edited",
        remedy="look at their prompts, subjects and targets",
    )


def _same_name(source: object, first: FactRecord, second: FactRecord) -> DamagedFileError:
    found = f"'{first.name}' of {first.fact.prompt!r:.60} and of {second.fact.prompt!r:.60}"
    return damaged(str(source), "a number of its own for each record", found, remedy="number them anew, or leave the numbers out")
