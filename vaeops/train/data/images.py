"""Photographs: CelebA in its own layout, and any folder of images."""

from contextlib import closing
from pathlib import Path

import numpy as np

from .cache import decoded
from .dataset import Dataset, part
from .files import Files, missing, place

_FACES, _ATTRIBUTES, _PARTITION = "img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt"
_ARCHIVE = f"{_FACES}.zip"  # the official one: 202,599 faces, md5 00d2c5bc6d35e252742224ab0c1e8fcb
_PLACES = ("celeba", "celeba.zip", "celeba.tar")
_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def celeba(root: Path, split: str, size: int | None, cache: Path | None) -> Dataset:
    """Aligned faces uint8 [N, 3, H, W], with 40 attributes where their list is there; extra: "files", the
    names, which are in ascending order.

    Found at any depth of a folder or an archive: `list_eval_partition.txt`, `list_attr_celeba.txt`, and the
    faces in a folder `img_align_celeba` or, in a folder, in `img_align_celeba.zip`. With a size, the middle
    148x148 of the 178x218 originals is resampled to it; square images are taken whole.

    The members of a .zip carry checksums of their own, which are checked as they are read; of the rest, the
    lists are checked against each other and against the images.

    Source: Liu, Luo, Wang & Tang 2015, "Deep Learning Face Attributes in the Wild".
    """
    with closing(Files("celeba", place(root, *_PLACES))) as files:
        lists = {n.split("/")[-1]: n for n in files.names() if n.endswith(".txt")}
        if _PARTITION not in lists:
            raise missing("celeba", _PARTITION, root, *_PLACES)
        partition = _partition(files.read(lists[_PARTITION]).decode(errors="replace"))
        codes = [("train", "valid", "test").index(name) for name in split.split("+")]
        wanted = sorted(file for file, code in partition.items() if code in codes)
        if not wanted:
            raise ValueError(f"celeba: {files.path} has no image of the split {split!r}")
        names: tuple[str, ...] = ()
        attributes = None
        if _ATTRIBUTES in lists:
            names, attributes = _attributes(files.read(lists[_ATTRIBUTES]).decode(errors="replace"), wanted)
        archive = next((n for n in files.names() if n.split("/")[-1] == _ARCHIVE), None)
        if archive is None or not files.path.is_dir() or _by_name(files):
            x = _faces(files, wanted, split, size, cache)
        else:
            with closing(Files("celeba", files.path / archive)) as faces:
                x = _faces(faces, wanted, split, size, cache)
    extra = {"files": tuple(wanted)}
    return Dataset("celeba", x, attributes=attributes, attribute_names=names, extra=extra)


def _faces(files: Files, wanted: list[str], split: str, size: int | None, cache: Path | None) -> np.ndarray:
    where = _by_name(files)
    absent = [file for file in wanted if file not in where]
    if absent:
        raise FileNotFoundError(
            f"celeba: {files.path} has no {_FACES}/{absent[0]}, and {len(absent) - 1:,} more of the "
            f"{len(wanted):,} images of the split {split!r} are missing"
        )
    members = [where[file] for file in wanted]
    return decoded(files, members, split, size=size, side=face_side, mode="RGB", folder=cache)


def _by_name(files: Files) -> dict[str, str]:
    # CelebA's uncropped images, where someone has them too, have the same names in another folder.
    parts = ((name, name.split("/")) for name in files.names())
    return {file: name for name, (*folders, file) in parts if folders[-1:] == [_FACES]}


def face_side(width: int, height: int) -> int:
    if (width, height) == (178, 218):
        return 148
    if width != height:
        raise ValueError(f"is {width}x{height}; 178x218 or square images are taken")
    return width


def _partition(text: str) -> dict[str, int]:
    """{file: 0, 1 or 2}, for training, validation and test."""
    found = {}
    for number, line in enumerate(text.strip().splitlines(), 1):
        match line.split():
            case [file, ("0" | "1" | "2") as code]:
                found[file] = int(code)
            case _:
                raise ValueError(
                    f"celeba: {_PARTITION}, line {number}: a file and 0, 1 or 2 are expected, got {line!r}"
                )
    return found


def _attributes(text: str, wanted: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The 40 names, and bool [N, 40] of the wanted files."""
    lines = text.strip().splitlines()
    names = tuple(lines[1].split()) if len(lines) > 1 else ()
    if len(names) != 40:
        raise ValueError(f"celeba: {_ATTRIBUTES}, line 2: 40 names are expected, got {len(names)}")
    rows = {file: row for row, file in enumerate(wanted)}
    table = np.zeros((len(wanted), 40), bool)
    absent = dict.fromkeys(wanted)
    for number, line in enumerate(lines[2:], 3):
        file, *values = line.split() or [""]
        if len(values) != 40 or values.count("1") + values.count("-1") != 40:
            raise ValueError(
                f"celeba: {_ATTRIBUTES}, line {number}: a file and 40 of 1 or -1 are expected, got {line!r}"
            )
        if file in rows:
            table[rows[file]] = [value == "1" for value in values]
            absent.pop(file, None)
    if absent:
        raise ValueError(
            f"celeba: {_ATTRIBUTES} has no line of {next(iter(absent))}, and of {len(absent) - 1:,} more"
        )
    return names, table


def images(root: Path, split: str, size: int | None, seed: int, cache: Path | None) -> Dataset:
    """Every image under a folder, or in an archive, by name: uint8 [N, 1, H, W] if all are grey, or else
    [N, 3, H, W]. Labels number the first sub-folders by name, if every image is in one; extra: "files".

    With a size, the middle square of each is resampled to it.
    """
    with closing(Files("images", root)) as files:
        found = sorted(name for name in files.names() if name.lower().endswith(_SUFFIXES))
        if not found:
            raise ValueError(f"images: {root} has no image: {', '.join(_SUFFIXES)}")
        tenth = len(found) // 10
        chosen = [found[row] for row in part(split, len(found), (tenth, tenth), seed)]
        if not chosen:
            raise ValueError(
                f"images: {root} has no image of the split {split!r}: it has {len(found)} in all"
            )
        named = f"{split}-seed-{seed}"
        x = decoded(files, chosen, named, size=size, side=shorter_side, folder=cache)
    folders = sorted({n.split("/")[0] for n in found})
    extra = {"files": tuple(chosen)}
    if not all("/" in n for n in found):
        return Dataset("images", x, extra=extra)
    number = {folder: k for k, folder in enumerate(folders)}
    labels = np.array([number[n.split("/")[0]] for n in chosen], dtype=np.int64)
    return Dataset("images", x, labels, label_names=tuple(folders), extra=extra)


def shorter_side(width: int, height: int) -> int:
    return min(width, height)
