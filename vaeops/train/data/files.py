"""Where the files of a data set are, and what is in them."""

import gzip
import hashlib
import json
import os
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def place(root: Path, *candidates: str) -> Path:
    """The first of root / candidate that exists, or else root itself."""
    return next((root / name for name in candidates if (root / name).exists()), root)


def missing(name: str, file: str, root: Path, *candidates: str) -> FileNotFoundError:
    """For a file that is not where `place` sends."""
    beside = "".join(f", nor is there {root / c}" for c in candidates if not (root / c).exists())
    return FileNotFoundError(f"{name}: there is no {file} in {place(root, *candidates)}{beside}")


def read(name: str, file: str, root: Path, *candidates: str) -> tuple[Path, bytes]:
    """A file in `place(root, *candidates)`, with .gz or without, and its content unpacked."""
    folder = place(root, *candidates)
    path = next((p for p in (folder / f"{file}.gz", folder / file) if p.exists()), None)
    if path is None:
        raise missing(name, f"{file}.gz, nor {file},", root, *candidates)
    content = path.read_bytes()
    try:
        return path, gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name}: {path} is damaged: {error}") from error


class Files:
    """The files under a folder or in a .zip or .tar (compressed or not), by their relative names with `/`.

    Hidden files, and what lies in hidden folders, are left out. name: of the data set, for errors.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self._archive: zipfile.ZipFile | tarfile.TarFile | None = None
        members: dict[str, Any]
        if path.is_dir():
            members = _walk(path)
        elif not path.exists():
            raise FileNotFoundError(f"{name}: there is no folder or archive {path}")
        elif zipfile.is_zipfile(path):
            self._archive = zipfile.ZipFile(path)
            members = {m.filename: m for m in self._archive.infolist() if not m.is_dir()}
        elif tarfile.is_tarfile(path):
            self._archive = tarfile.open(path)  # noqa: SIM115 (`close` closes it)
            with self._damage():
                members = {m.name.removeprefix("./"): m for m in self._archive if m.isfile()}
        else:
            raise ValueError(f"{name}: {path} is neither a folder nor a .zip nor a .tar, or it is incomplete")
        self._members = {n: m for n, m in members.items() if not n.startswith(".") and "/." not in n}

    @contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
            raise ValueError(f"{self.name}: {self.path} is damaged: {error}") from error

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()

    def names(self) -> Collection[str]:
        return self._members.keys()

    def read(self, name: str) -> bytes:
        member = self._members[name]
        with self._damage():
            if isinstance(self._archive, zipfile.ZipFile):
                return self._archive.read(member)
            if isinstance(self._archive, tarfile.TarFile):
                file = self._archive.extractfile(member)
                assert file is not None  # only of links and folders
                return file.read()
        return Path(member).read_bytes()

    def contents(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """(name, content) of the wanted ones, in the order in which they lie."""
        return ((name, self.read(name)) for name in self._members if name in wanted)

    def fingerprint(self, wanted: Collection[str]) -> str:
        """Changes when the wanted files' names, sizes or times of change do; of an archive, its own."""
        stats = [self.path] if self._archive is not None else [self._members[name] for name in wanted]
        seen = [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, stats)]
        return hashlib.sha256(json.dumps([list(wanted), seen]).encode()).hexdigest()


def _walk(folder: Path) -> dict[str, str]:
    """{relative name: path}, sorted in each folder. Strings: CelebA's 200,000 Paths would take seconds."""
    found: dict[str, str] = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        inside = os.path.relpath(parent, folder).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        found.update((prefix + file, os.path.join(parent, file)) for file in sorted(files))
    return found
