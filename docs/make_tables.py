"""Writes the tables of the documentation that the code knows best: methods, sites, scopes.

    python docs/make_tables.py

Each table stands between `<!-- <name>:begin -->` and `<!-- <name>:end -->`; a test fails when one is out of date. A method is described by
the first line of its docstring, so a new one needs nothing here. Nor does a new kind of method, which docs/methods.md lists
until a page has its markers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import agreement_tables
import drift_tables
import edit_tables
import experiment_results
import experiment_tables
import feature_results
import result_tables
import speed_tables

from steer.commands.info import methods
from steer.model.site import LAYER_PARTS, MODEL_PARTS
from steer.registry import REGISTRIES

ROOT = Path(__file__).resolve().parents[1]


class Place(NamedTuple):
    """Where the methods of a kind are listed.

    Attributes:
        page: the file, which needs the markers of `table`.
        head: titles of the columns.
        public: their classes are public, as `steer.Add`, and have a column of their own.
        leading: the first line begins with something and a colon, such as a formula, which has a column of its own.
    """

    page: str
    table: str
    head: tuple[str, ...]
    public: bool = False
    leading: bool = False


PLACES = {
    "operator": Place("docs/operators.md", "operators", ("operator", "class", "`h` becomes", "what it does"), public=True, leading=True),
    "gate": Place("docs/gates.md", "gates", ("gate", "class", "when it is open"), public=True),
    "schedule": Place("docs/concepts.md", "schedules", ("schedule", "class", "factor of the strength"), public=True),
    "scope": Place("docs/concepts.md", "scopes", ("scope", "tokens")),
    "extractor": Place("docs/directions.md", "extractors", ("method", "the direction")),
    "objective": Place("docs/directions.md", "objectives", ("method", "what is learned")),
    "import format": Place("docs/formats.md", "import_formats", ("format", "file", "conversion"), leading=True),
    "dictionary": Place("docs/features.md", "architectures", ("architecture", "what it is")),
    "dictionary activation": Place("docs/features.md", "activations", ("activation", "the feature"), leading=True),
    "dictionary format": Place("docs/features.md", "formats", ("format", "files", "what is applied"), leading=True),
    "feature search": Place("docs/finding_features.md", "searches", ("search", "how features are scored")),
    "explainer": Place("docs/finding_features.md", "explainers", ("explainer", "the name of a feature")),
    "probe": Place("docs/lens.md", "probes", ("probe", "what it is")),
    "lens": Place("docs/lens.md", "lenses", ("lens", "what it is"), leading=True),
    "bias data set": Place("docs/bias.md", "datasets", ("data set", "what is measured")),
    "mitigation": Place("docs/bias_mitigation.md", "mitigations", ("mitigation", "what it does")),
    "attribution method": Place("docs/attribution.md", "attribution_methods", ("method", "where gradients are taken")),
    "backward rule": Place("docs/attribution.md", "backward_rules", ("rule", "what stands for the derivative")),
    "editor": Place("docs/editing.md", "editors", ("editor", "what it does")),
    "edit measure": Place("docs/editing.md", "measures", ("measure", "what it says")),
    "edit data set": Place("docs/editing.md", "data_sets", ("data set", "what it has")),
    "corruption": Place("docs/causal_tracing.md", "corruptions", ("corruption", "what takes the place of the subject")),
    "sparsifier": Place("docs/features.md", "sparsifiers", ("sparsifier", "what is on in training")),
    "drift metric": Place("docs/drift.md", "metrics", ("metric", "what it says")),
    "metric": Place("docs/experiments.md", "metrics", ("metric", "what it says")),
    "treatment": Place("docs/experiments.md", "treatments", ("treatment", "what it is")),
}


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def kind_table(kind: str) -> str:
    """Every method of a kind, as its page shows them."""
    place = PLACES[kind]
    rows = []
    for name, description in methods()[kind]:
        row = [", ".join(f"`{known_as}`" for known_as in (name, *aliases(kind, name)))]
        if place.public:
            row.append(f"`steer.{REGISTRIES[kind].get(name).__name__}`")
        if place.leading:
            start, colon, description = description.partition(": ") if ": " in description else ("", "", description)
            row.append(formula(start) if kind == "operator" else start)
        rows.append([*row, description])
    return markdown(place.head, rows)


def aliases(kind: str, name: str) -> list[str]:
    return REGISTRIES[kind].aliases_of(name) if kind in REGISTRIES else []


def formula(text: str) -> str:
    plain = text.replace("`", "")
    return f"`{plain}`" if plain else ""


def listed_kinds() -> list[str]:
    """Kinds that have a table on a page of their own."""
    known = [kind for kind in methods() if kind in PLACES]
    return [kind for kind in known if f"<!-- {PLACES[kind].table}:begin -->" in (ROOT / PLACES[kind].page).read_text(encoding="utf-8")]


def overview_table() -> str:
    """Kind by kind, the names of the methods and the page that describes them."""
    rows = []
    for kind, entries in sorted(methods().items()):
        page = PLACES[kind].page if kind in listed_kinds() else None
        names = ", ".join(f"`{name}`" for name, _ in entries)
        rows.append((kind, names, f"[{Path(page).stem}]({Path(page).name})" if page else "below"))
    return markdown(("kind", "methods", "described in"), rows)


def methods_table() -> str:
    """The methods of all kinds that no page lists."""
    listed = listed_kinds()
    kinds = [kind for kind in sorted(methods()) if kind not in listed]
    return markdown(("kind", "name", "what it does"), [(kind, f"`{name}`", text) for kind in kinds for name, text in methods()[kind]])


def sites_table() -> str:
    parts = [(f"`layers.<n>.{part}`", tensor) for part, tensor in LAYER_PARTS.items()]
    parts += [(f"`{part}`", tensor) for part, tensor in MODEL_PARTS.items()]
    any_module = ("`module:<dotted path>:<input|output>`", "any module of any model")
    return markdown(("site", "tensor"), [*parts, any_module])


def tables() -> dict[tuple[str, str], Callable[[], str]]:
    """(file, name of the table) -> what makes it."""
    return {
        ("docs/methods.md", "kinds"): overview_table,
        ("docs/methods.md", "methods"): methods_table,
        **{(PLACES[kind].page, PLACES[kind].table): lambda kind=kind: kind_table(kind) for kind in listed_kinds()},
        ("docs/drift.md", "metrics"): lambda: drift_tables.metrics(markdown),  # with units, modes and directions
        ("docs/experiments.md", "metrics"): lambda: experiment_tables.metrics(markdown),  # with units and directions
        ("docs/concepts.md", "sites"): sites_table,
        ("docs/results/experiments.md", "runs"): lambda: experiment_results.runs(markdown),
        ("docs/results/experiments.md", "details"): lambda: experiment_results.details(markdown),
        **{
            ("docs/results/features.md", name): lambda name=name: getattr(feature_results, name)(markdown)
            for name in ("runs", "tried", "dose_response", "at_equal_loss", "said", "tuned", "spurious", "decimals")
        },
        **{("docs/results/editing.md", name): lambda name=name: edit_tables.TABLES[name](markdown) for name in edit_tables.available()},
        ("docs/results/steering.md", "command"): lambda: result_tables.command(markdown),
        ("docs/results/steering.md", "effects"): lambda: result_tables.effects(markdown),
        ("docs/results/steering.md", "successor"): lambda: result_tables.successor(markdown),
        ("docs/results/speed.md", "setting"): lambda: speed_tables.setting(markdown),
        ("docs/results/speed.md", "against_steer"): lambda: speed_tables.against_steer(markdown),
        ("docs/results/speed.md", "against_plain"): lambda: speed_tables.against_plain(markdown),
        ("docs/results/speed.md", "hook_cost"): lambda: speed_tables.hook_cost(markdown),
        ("docs/results/speed.md", "growth"): lambda: speed_tables.growth(markdown),
        ("docs/results/agreement.md", "setting"): lambda: agreement_tables.setting(markdown),
        ("docs/results/agreement.md", "programs"): lambda: agreement_tables.programs(markdown),
    }


def between(text: str, name: str, content: str) -> str:
    """`text` with new content between the two markers of a name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"expected one '{begin}' and one '{end}'")
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)


def updated() -> dict[Path, str]:
    """Every file that holds a table, as it should be."""
    texts: dict[Path, str] = {}
    for (file, name), make in tables().items():
        path = ROOT / file
        texts[path] = between(texts.get(path) or path.read_text(encoding="utf-8"), name, make())
    return texts


if __name__ == "__main__":
    for path, text in updated().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
