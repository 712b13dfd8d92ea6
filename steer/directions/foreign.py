"""Vectors and plans from the files of other programs, each with its own conversion of layers into sites (docs/formats.md)."""

from __future__ import annotations

from pathlib import Path

from steer.checks import of_type, whole_number
from steer.directions.direction import Directions
from steer.directions.importer import Importer, Source, choose, read_by
from steer.errors import ConfigError, WrongKindError
from steer.intervene.plan import Plan
from steer.intervene.scope import Scope
from steer.reading import place_of


def import_directions(path: str | Path, format: str | None = None, *, n_layers: int | None = None, site: str | None = None) -> Directions:
    """Reads steering vectors of another program, at the sites where that program read them.

    Args:
        path: a file or a folder.
        format: a name of `IMPORTERS`; by content when None.
        n_layers: number of blocks of the model (`model.config.num_hidden_layers`), for formats that count `hidden_states`, of which the
            last comes after the final norm; a file of any format that has other layers is refused.
        site: a site with `{layer}` in place of the layer, e.g. `layers.{layer}.output`, where the file does not say or is to be
            overruled.

    Returns:
        Directions without metrics, with what else the file says in their provenance.

    Raises:
        FileError: nothing there. WrongKindError: of no known format, with a list of what was looked for, or a plan.
        ConfigError: the file does not say which tensor is meant, and neither did the caller; a site without `{layer}` for several layers.
        UnsafeFileError: a pickle of more than tensors. DamagedFileError, NonFiniteError, WidthError: a broken file.

    Example:
        >>> steer.to_gguf(plan, "warm.gguf", model_hint="llama")
        PosixPath('warm.gguf')
        >>> steer.import_directions("warm.gguf")["layers.12.output"].vector.shape  # [width]
    """
    if n_layers is not None:
        whole_number(n_layers, "n_layers", least=1)
    read = _read(_source(path, site, n_layers), format, "directions", "steer.import_plan")
    assert isinstance(read, Directions)
    return read


def import_plan(path: str | Path, format: str | None = None, *, scope: str | Scope, site: str | None = None) -> Plan:
    """Reads interventions of another program as a plan.

    Args:
        path, format, site: as for `import_directions`.
        scope: on which tokens they act. pyvene and pyreft are told by the caller of the model, and their files do not say.

    Returns:
        A plan that is not attached.

    Raises:
        As `import_directions`, and WrongKindError for a file of vectors, or for an intervention that no operator here is equal to.

    Example:
        >>> imported = steer.import_plan(folder_of_pyvene, scope="prompt[-1:]")
        >>> print(imported.explain())
    """
    read = _read(_source(path, site, None, str(scope)), format, "plan", "steer.import_directions")
    assert isinstance(read, Plan)
    return read


def _source(path: str | Path, site: str | None, n_layers: int | None, scope: str | None = None) -> Source:
    of_type(path, (str, Path), "the file to import", "pass its path")
    of_type(site, (str, type(None)), "`site`", "pass text such as 'layers.{layer}.output'")
    try:
        (site or "").format(layer=0)
    except (IndexError, KeyError, ValueError) as error:
        raise _site_error(site, error) from error
    return Source(place_of(path), n_layers, site, scope)


def _read(source: Source, format: str | None, kind: str, alternative: str) -> Directions | Plan:
    """Reads what is to be of this kind; `alternative` reads the other one."""
    importer = choose(source, format)
    if importer.makes != kind:
        raise _kind_error(source, importer, kind, alternative)
    return read_by(importer, source)


def _site_error(site: str | None, error: Exception) -> ConfigError:
    return ConfigError(
        f"cannot read the site '{site}'",
        expected="a site with {layer} in place of the layer",
        found=f"{type(error).__name__}: {error}",
        remedy="e.g. site='layers.{layer}.output'",
    )


def _kind_error(source: Source, importer: type[Importer], kind: str, alternative: str) -> WrongKindError:
    return WrongKindError(
        f"'{source.path}' holds something else",
        expected=kind,
        found=f"{importer.makes}: {importer.looks_for}",
        remedy=f"read it with {alternative}",
    )


__all__ = ["import_directions", "import_plan"]
