"""What the docstrings of the public names owe their reader, and which of it is missing: read from the source, nothing is imported.

Asked for is what the source says is owed: the shape of what is annotated as a tensor, the unit of what is annotated as a float, `Raises`
for errors that the body or a private function called in it raises, the origin of a registered method.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

# [batch, tokens, width]; a number for each row slot; or the shape of something else
SHAPE = re.compile(r"\[[^\]\n]*\]|\b(?:one per row slot|one number|any shape|the same shape|shape of|as one token of)")
# tensors by name, as files and states hold them: each has a shape of its own
NAMED_TENSORS = re.compile(r"(?:dict|Mapping)\[str, (?:torch\.)?Tensor\]|Callable\[.*")

UNIT = re.compile(
    r"\b(?:shares?|parts of|percent|nat|seconds?|s for one call|bytes|tokens|steps?|probabilit\w+|log-\w+|cosines?|AUC|correlation"
    r"|standard (?:deviations?|errors?)|radians|norm|length|times|multiples?|factor|ratio|quantile|rate|projections?|logits?|units?"
    r"|relative doses?|eigenvalues?|entropy|perplexity|inches|root mean square|amounts?|activations?|number of)\b"
    r"|%|\|\w[^|\n]*\||\d to \d|\babove 0\b|\b[01] (?:is|for|where|leaves|cuts|keeps)\b",
    re.IGNORECASE,
)
ELSEWHERE = re.compile(r"\b(?:as|see|as of|as in|of) `[\w.]+`|\bsee above\b")  # said there
# parameters that are counted in the same thing everywhere
SAME_UNIT = {
    "strength": "factor of the edit; a plan's strength 1 is its vector, or the whole of what an operator does",
    "weight": "factor of a loss in the sum that is trained",
    "lr": "of the optimiser, per step",
    "learning_rate": "of the optimiser, per step",
    "holdout": "share of the texts",
}

# kinds of methods that a publication, a library or we have thought of; others are files, programs and bookkeeping, which say what they are
METHOD_KINDS = {
    *("ACTIVATIONS", "ARCHITECTURES", "ATTRIBUTION_METHODS", "BACKWARD_RULES", "CORRUPTIONS", "DATASETS", "EDITORS", "EDIT_MEASURES"),
    *("EXTRACTORS", "GATES", "LENSES", "MITIGATIONS", "OBJECTIVES", "OPERATORS", "PROBES", "RECORD_FORMATS", "SEARCHES", "SPARSIFIERS"),
}

Definition = ast.ClassDef | ast.FunctionDef


@dataclass(frozen=True)
class Documented:
    """A public function, class or method.

    Attributes:
        title: the path by which it is imported.
        module: where it is defined.
        said: its docstring without the example; of a class also that of its constructor and those of its bases.
        around: of a method, what is said of its class.
        takes: parameter or field -> annotation.
        gives: annotation of the result, empty for a class.
        bodies: what runs when it is called.
    """

    title: str
    module: str
    said: str
    around: str
    takes: dict[str, str]
    gives: str
    bodies: tuple[ast.FunctionDef, ...]

    def said_of(self, name: str) -> str:
        """What is said of a parameter or field: its entry, or the sentence with its name, here or of all methods in the class."""
        entry = re.compile(
            rf"(?:^|\n|(?<=\. )) *(?:\*{{0,2}}\w+, )*\*{{0,2}}{name}(?:, \*{{0,2}}\w+)*: (.*?)(?=\n\n|\n    (?! )|\n(?! )|\Z)", re.S
        )
        sentence = re.compile(rf"(?<![\w.]){name}(?!\w)(.*?)(?:\.\s|\n\n|\Z)", re.S)
        found = [found for text in (self.said, self.around) for pattern in (entry, sentence) for found in pattern.findall(text)]
        return "\n".join(found)


# ---- what is public


def documented(source: Any) -> list[Documented]:
    """The public functions and classes of a `public_names.Source`, each class with the public methods that no base has."""
    found = []
    for name in source.public:
        module, node = name.path.rpartition(".")[0], source.node(name.path)
        if isinstance(node, ast.FunctionDef):
            of = _function(name.title, module, node)
            found.append(replace(of, said=f"{of.said}\n\n{source.contract(name)}"))
        elif node is not None and not _is_error(source, module, node):
            found += _class(source, name.title, module, node)
    return found


def _bases(source: Any, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
    """The class and what it derives from in the package, nearest first."""
    yield module, node
    for base in node.bases:
        path = source.definition(module, ast.unparse(base).partition("[")[0])
        found = source.node(path)
        if isinstance(found, ast.ClassDef):
            yield from _bases(source, path.rpartition(".")[0], found)


def _is_error(source: Any, module: str, node: ast.ClassDef) -> bool:
    """Errors and warnings are met, not called."""
    names = {ast.unparse(base) for _, each in _bases(source, module, node) for base in each.bases}
    return any(name.endswith(("Error", "Exception", "Warning")) for name in names)


def _function(title: str, module: str, node: ast.FunctionDef, around: str = "") -> Documented:
    gives = ast.unparse(node.returns) if node.returns else ""
    return Documented(title, module, _said(node), around, _arguments(node), gives, (node,))


def _said(node: Definition) -> str:
    return (ast.get_docstring(node) or "").partition("Example:\n")[0]


def _class(source: Any, title: str, module: str, node: ast.ClassDef) -> Iterator[Documented]:
    line = list(_bases(source, module, node))
    methods = [{each.name: each for each in part.body if isinstance(each, ast.FunctionDef)} for _, part in line]
    bodies = tuple(own[name] for own in methods for name in ("__init__", "__post_init__") if name in own)
    texts = [each for (_, part), own in zip(line, methods, strict=True) for each in (part, own.get("__init__")) if each is not None]
    said = "\n\n".join(filter(None, map(_said, texts)))
    fields = {name: annotation for _, part in reversed(line) for name, annotation in _fields(part).items()}
    init = next((own["__init__"] for own in methods if "__init__" in own), None)
    yield Documented(title, module, said, "", fields if init is None else fields | _arguments(init), "", bodies)
    inherited = {name for own in methods[1:] for name in own}
    for name, method in methods[0].items():
        if name[0] != "_" and name not in inherited:
            yield _function(f"{title}.{name}", module, method, said)


def _arguments(node: ast.FunctionDef) -> dict[str, str]:
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return {each.arg: ast.unparse(each.annotation) for each in every if each.annotation is not None and each.arg[0] != "_"}


def _fields(node: ast.ClassDef) -> dict[str, str]:
    """Of a dataclass."""
    if not any("dataclass" in ast.unparse(each) for each in node.decorator_list):
        return {}
    every = {ast.unparse(each.target): ast.unparse(each.annotation) for each in node.body if isinstance(each, ast.AnnAssign)}
    return {name: annotation for name, annotation in every.items() if name[0] != "_" and "ClassVar" not in annotation}


# ---- what is missing


def without_shape(of: Documented) -> list[str]:
    """Tensors that are taken or given without a shape."""
    taken = [name for name, annotation in of.takes.items() if _is_tensor(annotation) and not _says(SHAPE, of.said_of(name))]
    results = re.sub(r"(?:\A|\n)Args:\n.*?(?=\n\n|\Z)", "", of.said, flags=re.S)
    return [*taken, *(["the result"] if _is_tensor(of.gives) and not _says(SHAPE, results) else [])]


def _is_tensor(annotation: str) -> bool:
    return re.search(r"\bTensor\b", NAMED_TENSORS.sub("", annotation)) is not None


def without_unit(of: Documented) -> list[str]:
    """Floats that are taken or given without a unit, a range or what they are a multiple of."""
    taken = [name for name, annotation in of.takes.items() if _is_float(annotation) and name not in SAME_UNIT]
    found = [name for name in taken if not _says(UNIT, f"{_words(name)}: {of.said_of(name)}")]
    said = f"{_words(of.title.rpartition('.')[2])}: {of.said}"
    return [*found, *(["the result"] if re.fullmatch(r"float(?: \| None)?", of.gives) and not _says(UNIT, said) else [])]


def _words(name: str) -> str:
    """Some quantities are without units and say so by their names: a probability, a correlation."""
    return name.replace("_", " ")


def _is_float(annotation: str) -> bool:
    return re.search(r"\bfloat\b", re.sub(r"(?:dict|Mapping|Callable)\[.*", "", annotation)) is not None


def _says(pattern: re.Pattern[str], text: str) -> bool:
    words = re.sub(r"\s+", " ", text)
    return pattern.search(words) is not None or ELSEWHERE.search(words) is not None


def without_raises(source: Any, of: Documented) -> list[str]:
    """Typed errors that a call raises in its own body, or in a private function of the same file that it calls, and `Raises` lacks."""
    raised = {error for body in of.bodies for error in _raised(source, of.module, body, private=True)}
    named = " ".join(re.findall(r"\bRaises\b.*?(?=\n\n|\Z)", f"{of.said}\n\n{of.around}", re.S))
    return [] if re.search(r"\b[Aa]s `[\w.]+`", named) else sorted(error for error in raised if error not in named)


def _raised(source: Any, module: str, node: ast.FunctionDef, *, private: bool) -> set[str]:
    known = {each.name for each in source.modules["steer.errors"].body if isinstance(each, ast.ClassDef)} - {"SteerError"}
    found: set[str] = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Raise) and each.exc is not None:
            found |= _errors_of(source, module, each.exc) & known
        elif private and isinstance(each, ast.Call) and isinstance(each.func, ast.Name) and each.func.id[0] == "_":
            called = source.node(f"{module}.{each.func.id}")
            found |= _raised(source, module, called, private=False) if isinstance(called, ast.FunctionDef) else set()
    return found


def _errors_of(source: Any, module: str, raised: ast.expr) -> set[str]:
    """Names of the errors of a `raise`; of one that a function makes, what this returns."""
    made_by = ast.unparse(raised.func if isinstance(raised, ast.Call) else raised)
    path = source.definition(module, made_by)
    found, name = source.node(path), path.rpartition(".")[2]
    return set(re.findall(r"\w+Error", ast.unparse(found.returns) if isinstance(found, ast.FunctionDef) and found.returns else name))


def without_source(source: Any, cites: Callable[[str], Any]) -> list[str]:
    """Registered methods of which neither their docstring nor that of their file says where they come from."""
    texts = {of.title: of.said for of in documented(source)}
    return [
        name.title
        for name in source.public
        if name.registry in METHOD_KINDS and not cites(f"{texts[name.title]}\n{source.introduction(name.path.rpartition('.')[0])}")
    ]
