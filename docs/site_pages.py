"""MkDocs hook: the pages that are made rather than written, and the navigation over those that are there.

`api/`: the public names of each room, their docstrings rendered by mkdocstrings. `errors/`: a page for each error class. `notebooks/`: the
notebooks as they are stored, with their outputs. CONTRIBUTING.md and CHANGELOG.md from the top of the repository.
"""

from __future__ import annotations

import ast
import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from docstring_sections import without_tags
from error_pages import error_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from notebook_pages import notebook_page
from public_names import ROOT, PublicName, Source, package

ROOMS = {
    "model": "Models and sites",
    "intervene": "Interventions and plans",
    "directions": "Directions",
    "callbacks": "Callbacks",
    "drift": "Drift",
    "experiment": "Experiments",
    "report": "Reports",
    "lens": "Lenses and probes",
    "features": "Features",
    "circuits": "Circuits",
    "edits": "Edits of facts",
    "bias": "Bias",
    "kernels": "Kernels",
    "files": "Files",
}


@event_priority(100)  # before autorefs and search look at the files
def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = generated_pages(package())
    for address, text in pages.items():
        files.append(File.generated(config, address, content=text))
    written = {file.src_uri for file in files.documentation_pages()}
    config.nav = filled(config.nav, written, pages)
    return files


def generated_pages(source: Source) -> dict[str, str]:
    """Address below docs/ -> Markdown, in the order of the navigation."""
    pages = {"api/index.md": "", **api_pages(source)}
    pages["api/index.md"] = api_index(source, pages)
    pages |= error_pages(source)
    pages |= {f"notebooks/{file.stem}.md": notebook_page(file) for file in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    for name in ("CONTRIBUTING", "CHANGELOG"):
        pages[f"{name.lower()}.md"] = (ROOT / f"{name}.md").read_text(encoding="utf-8").replace("](docs/", "](")
    return pages


# ---- reference


def api_pages(source: Source) -> dict[str, str]:
    """A page for each room: what it exports; and one for its methods that are known by a registered name."""
    pages = {}
    rooms = by_room(source)
    for room, title in titles(rooms).items():
        exported, methods = [name for name in rooms[room] if name.exports], [name for name in rooms[room] if not name.exports]
        pages[f"api/{room}.md"] = f"# {title}\n\n{introduction(source, room)}\n\n" + "\n".join(entry(source, name) for name in exported)
        if methods:
            pages[f"api/{room}_methods.md"] = methods_page(source, title, methods)
    return pages


def titles(rooms: Iterable[str]) -> dict[str, str]:
    """Room -> title, in the order of the navigation; errors have pages of their own."""
    further = {room: room.capitalize() for room in sorted(rooms) if room not in ROOMS and room != "errors"}
    return {room: title for room, title in (ROOMS | further).items() if room in rooms}


def methods_page(source: Source, title: str, methods: list[PublicName]) -> str:
    """The registered methods of a room, kind by kind."""
    text = f"# {title}: methods by name\n\nMade by the name in quotation marks; the options are those of the constructor.\n"
    kinds = defaultdict(list)
    for name in methods:
        kinds[name.registry].append(name)
    for registry, names in sorted(kinds.items()):
        about = "\n\n".join(filter(None, [source.contract(names[0]), use_of(names)]))
        text += f"\n## {registry.replace('_', ' ').capitalize()}\n\n{about}\n\n" + "\n".join(entry(source, name) for name in names)
    return text


def use_of(methods: list[PublicName]) -> str:
    """The page that shows how a kind of method is used, as docs/methods.md has it."""
    named = {f"`{method.registered[0]}`" for method in methods}
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| \[(\w+)\]\((\w+\.md)\) \|$", (ROOT / "docs/methods.md").read_text(encoding="utf-8"), re.M)
    page = next(((title, file) for listed, title, file in rows if named <= set(listed.split(", "))), None)
    return "" if page is None else f"How they are used: [{page[0].replace('_', ' ')}](../{page[1]})."


def entry(source: Source, name: PublicName) -> str:
    """One object, by mkdocstrings. Its anchors are all the paths by which it can be imported."""
    paths = [path for path in name.exports if path != name.path]
    registered = " and ".join(f'"{known}"' for known in name.registered)
    heading = name.title if name.exports else f"{registered}: {name.path.rpartition('.')[2]}"
    facts = [f"registered as {registered} in `{name.registry}`"] if registered and name.exports else []
    facts += [f"also `{path}`" for path in name.exports[1:]] + [f"defined in `{source.file_of(name.path.rpartition('.')[0])}`"]
    origin = without_tags(source.origin(name))
    return "\n".join(
        [
            *(f"[](){{#{path}}}" for path in paths),
            f"\n::: {name.path}",
            "    options:",
            f"      heading: '{heading}'",
            f"      toc_label: '{heading.rpartition('.')[2] if name.exports else heading}'",
            *([f"\nSource: {origin}"] if origin else []),
            f"\n*{', '.join(facts)[0].upper()}{', '.join(facts)[1:]}*{{.defined}}\n",
        ]
    )


def introduction(source: Source, room: str) -> str:
    """What the package says of itself, in one paragraph."""
    return (ast.get_docstring(source.modules[f"steer.{room}"]) or "").partition("\n\n")[0].replace("\n", " ")


def api_index(source: Source, pages: dict[str, str]) -> str:
    """Every public name with the first line of its docstring."""
    text = "# Reference\n\nEvery public name. What `steer` exports itself is imported as `import steer`; the rest as its path says.\n"
    rooms = by_room(source)
    for room, title in titles(rooms).items():
        text += f"\n## {title}\n\n| name | what it is |\n| --- | --- |\n"
        exported = [name for name in rooms[room] if name.exports]
        text += "\n".join(f"| [`{name.title}`][{name.path}] | {without_tags(first_line(source, name))} |" for name in exported)
        methods = f", [methods by name]({room}_methods.md)" if f"api/{room}_methods.md" in pages else ""
        text += f"\n\n[{title}]({room}.md){methods}\n"
    return text


def by_room(source: Source) -> dict[str, list[PublicName]]:
    rooms = defaultdict(list)
    for name in source.public:
        rooms[name.room].append(name)
    return rooms


def first_line(source: Source, name: PublicName) -> str:
    node = source.node(name.path)
    return "" if node is None else (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")


# ---- navigation


def filled(nav: Any, written: set[str], order: dict[str, str]) -> Any:
    """The navigation with every starred entry replaced by pages, and without what is not there."""
    named = set(re.findall(r"[\w/.-]+\.md", repr(nav)))

    def pages(pattern: str) -> list[str]:
        folder = pattern.rpartition("/")[0]
        found = [page for page in written - named if fnmatch.fnmatch(page, pattern) and page.rpartition("/")[0] == folder]
        known = list(order)
        return sorted(found, key=lambda page: (not page.endswith("/index.md"), known.index(page) if page in known else 0, page))

    def walk(entry: Any) -> list[Any]:
        if isinstance(entry, str):
            return pages(entry) if "*" in entry else [entry] if entry in written else []
        if isinstance(entry, list):
            return [item for inner in entry for item in walk(inner)]
        filled_in = [(title, inner if isinstance(inner, str) and "*" not in inner else walk(inner)) for title, inner in entry.items()]
        return [{title: inner} for title, inner in filled_in if inner]

    return walk(nav)
