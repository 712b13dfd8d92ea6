"""Place: the folder of a dictionary or a lens, on this disk or in a repository of the Hugging Face hub; files are fetched one by one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from steer.errors import DamagedFileError, FileError, did_you_mean
from steer.reading import damage_of, place_of, read_bytes, read_json

_REPOSITORY = re.compile(r"(?:hf://)?(spaces/(?=[\w.-]+/))?([\w.-]+/[\w.-]+)(?:/(.+?))?(?:@([\w./-]+))?/?")


class Place:
    """The files of one thing.

    Attributes:
        name: path, or repository and folder, as an error shows it.
        file: of several in one folder, the one that was asked for by its path.
        folder: within a repository; empty for its root and for a folder on this disk.
        repository, revision: None for a folder on this disk.
        is_space: the repository is a space of the hub.
    """

    def __init__(self, name: str, root: Path | None, *, file: str | None = None, repository: str | None = None, folder: str = "",
                 revision: str | None = None, is_space: bool = False) -> None:  # fmt: skip
        self.name, self.root, self.file = name, root, file
        self.repository, self.folder, self.revision, self.is_space = repository, folder, revision, is_space

    @classmethod
    def find(
        cls, where: str | Path, folder: str | None = None, revision: str | None = None, *, what: str, shipped: Sequence[str] = ()
    ) -> Place:
        """A file or folder on this disk when there is one, else a repository of the hub: `owner/name`, `owner/name/folder`, and for a
        space `spaces/owner/name/folder`.

        Args:
            folder: within `where`.
            what, shipped: what is looked for, and names that would have done, as an error says them.

        Raises:
            FileError: neither.
        """
        local = place_of(where)
        if folder is not None and local.is_dir():
            local = local / folder
        if local.exists():
            name = str(local)
            return cls(name, local) if local.is_dir() else cls(name, local.parent, file=local.name)
        match = _REPOSITORY.fullmatch(str(where))
        if match is None or str(where).startswith((".", "/", "~")):
            raise _nothing_there(local, what, shipped)
        space, repository, within, at = match.groups()
        inside = "/".join(part for part in (within, folder) if part)
        return cls(
            f"{space or ''}{repository}/{inside}".rstrip("/"),
            None,
            repository=repository,
            folder=inside,
            revision=revision or at,
            is_space=bool(space),
        )

    @cached_property
    def files(self) -> list[str]:
        """Names of the files in the place and in the folders right below it. A repository is asked once. Raises FileError."""
        if self.root is not None:
            found = [*self.root.glob("*"), *self.root.glob("*/*")]  # no deeper: it may be the home of somebody
            return sorted(path.relative_to(self.root).as_posix() for path in found if path.is_file())
        prefix = f"{self.folder}/" if self.folder else ""
        everything = self._listed()
        inside = [name.removeprefix(prefix) for name in everything if name.startswith(prefix)]
        if not inside and self.folder in everything:  # a file, not a folder
            self.folder, _, self.file = self.folder.rpartition("/")
            prefix = f"{self.folder}/" if self.folder else ""
            inside = [name.removeprefix(prefix) for name in everything if name.startswith(prefix)]
        return sorted(inside)

    def has(self, *names: str) -> bool:
        """All of these files are there."""
        return set(names) <= set(self.files)

    def matching(self, pattern: str) -> list[re.Match[str]]:
        """The names of files that a regular expression matches as a whole; of the one that was asked for alone, if it was."""
        matches = [match for name in self.files if (match := re.fullmatch(pattern, name))]
        return [match for match in matches if self.file in (None, match[0])] if any(match[0] == self.file for match in matches) else matches

    def path(self, name: str) -> Path:
        """A file on this disk; one of a repository is downloaded, and kept in the cache of the hub. Raises FileError."""
        if self.root is not None:
            path = self.root / name
            if not path.is_file():
                raise _missing(self, name)
            return path
        return self._downloaded(f"{self.folder}/{name}" if self.folder else name)

    def json(self, name: str) -> dict[str, Any]:
        """An object. Raises DamagedFileError."""
        content = read_json(self.path(name))
        if not isinstance(content, dict):
            raise _no_object(self, name, content)
        return content

    def json_or_nothing(self, name: str) -> dict[str, Any]:
        """An object, or an empty one where there is no such file or nothing of the kind in it."""
        if not self.has(name):
            return {}
        try:
            return self.json(name)
        except FileError:
            return {}

    def yaml(self, name: str) -> dict[str, Any]:
        """A mapping. Raises DamagedFileError."""
        from omegaconf import OmegaConf  # takes a while to import, and every look-up of an operator comes through here

        path = self.path(name)
        with damage_of(path, "a YAML mapping"):
            content = OmegaConf.to_container(OmegaConf.create(read_bytes(path).decode()), resolve=False)
        if not isinstance(content, dict):
            raise _no_object(self, name, content)
        return {str(key): value for key, value in content.items()}

    @property
    def _kind(self) -> str:
        """Of the repository, as the hub calls it."""
        return "space" if self.is_space else "model"

    def _listed(self) -> list[str]:
        """The files of the repository, or those of it that the cache holds where the hub cannot be reached."""
        import huggingface_hub

        assert self.repository is not None
        try:
            return huggingface_hub.HfApi().list_repo_files(self.repository, revision=self.revision, repo_type=self._kind)
        except Exception as error:  # offline, no such repository, no access: many classes
            try:
                kept = Path(
                    huggingface_hub.snapshot_download(self.repository, revision=self.revision, repo_type=self._kind, local_files_only=True)
                )
            except Exception:
                raise _unreachable(self, error) from error
            return [path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()]

    def _downloaded(self, name: str) -> Path:
        import huggingface_hub

        assert self.repository is not None
        try:
            return Path(huggingface_hub.hf_hub_download(self.repository, name, revision=self.revision, repo_type=self._kind))
        except Exception as error:
            raise _unreachable(self, error) from error


# ---- errors


def _nothing_there(path: Path, what: str, shipped: Sequence[str]) -> FileError:
    expected = " or ".join(["a file or folder, a repository of the hub as 'owner/name'", *shipped])
    remedy = did_you_mean(str(path), shipped) or "check the path"
    return FileError(f"no {what} at '{path}'", expected=expected, found="nothing there", remedy=remedy)


def _missing(place: Place, name: str) -> DamagedFileError:
    there = ", ".join(place.files[:8]) or "nothing"
    return DamagedFileError(f"'{place.name}' lacks {name}", expected=name, found=there, remedy="get it again from where it came")


def _no_object(place: Place, name: str, content: object) -> DamagedFileError:
    what = f"{name} of '{place.name}' is damaged"
    return DamagedFileError(what, expected="an object with keys", found=type(content).__name__, remedy="get it again from where it came")


def _unreachable(place: Place, error: Exception) -> FileError:
    return FileError(
        f"'{place.name}' cannot be read from the hub",
        expected="a repository that is there and open to you, and a network or a copy in the cache of the hub",
        found=f"{type(error).__name__}: {str(error)[:200]}",
        remedy="check the name; log in with `hf auth login` for a gated one; or download it and pass the folder",
    )
