"""Images are decoded once, into a file of bytes that later runs map into memory."""

import hashlib
import io
import itertools
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from ..._files import atomic
from .files import Files

FOLDER = "vaeops-cache"
_CHUNK = 64  # images that are decoded at a time
_PROCESSES = 16  # at most
_PROCESSES_FROM = 20_000  # images; fewer are decoded before the processes have imported what they need
_LOG = logging.getLogger("vaeops")
Side = Callable[[int, int], int]  # (width, height) -> side of the square in the middle that is kept


def decoded(files: Files, wanted: Sequence[str], part: str, *, size: int | None, side: Side,
            mode: str | None = None, folder: Path | None = None) -> np.ndarray:  # fmt: skip
    """The wanted images, uint8 [N, C, H, W], mapped from the cache, which is filled first if need be.

    The cache of a part of a source is two files: the array as .npy, and a .json that says of which files, by
    name, size and time of change, and with what options it was made, and how the array was left. Where that
    does not hold any more it is made anew. Both are written beside their place and then moved there.

    Args:
        part: which of the source's images they are, for the files' names.
        size: side of the square images, cut from the middle and resampled by Lanczos; None: as they are.
        side: of the square that is cut, when there is a size.
        mode: "RGB" | "L"; None: "L" if every image is grey, or else "RGB".
        folder: of the cache; None: FOLDER in the source or, of an archive, beside it.
    """
    if folder is None:
        folder = (files.path if files.path.is_dir() else files.path.parent) / FOLDER
    made_of = {"source": str(files.path.resolve()), "part": part, "size": size, "crop": side.__name__}
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:10]
    path = folder / f"{files.path.stem}-{part}-{size or 'as-is'}-{key}.npy"
    made_of["files"] = files.fingerprint(wanted)
    if not _holds(path, made_of):
        if path.exists():
            _LOG.warning("%s is of other files, or was changed; it is made anew", path)
        try:
            with atomic(path) as array:
                _fill(array, part, files, wanted, size, side, mode)
            with atomic(path.with_suffix(".json")) as record:
                record.write(json.dumps({**made_of, "left": _left(path)}, indent=1).encode())
        except OSError as error:
            if error.filename is not None:
                raise  # an image that cannot be read
            raise OSError(error.errno, f"{error.strerror}; cache= or --cache names another folder") from error
    return np.asarray(np.load(path, mmap_mode="r"))


def _holds(path: Path, made_of: dict[str, Any]) -> bool:
    try:
        record = json.loads(path.with_suffix(".json").read_bytes())
        return record == {**made_of, "left": _left(path)}
    except (OSError, ValueError):
        return False


def _left(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _fill(array: IO[bytes], part: str, files: Files, wanted: Sequence[str], size: int | None, side: Side,
          mode: str | None) -> None:  # fmt: skip
    """Writes a .npy file, row by row where each belongs: an archive's order need not be that of `wanted`."""
    rows = {file: row for row, file in enumerate(wanted)}
    mode = mode or ("L" if all(_is_grey(content) for _, content in files.contents(rows)) else "RGB")
    first, begin = "", 0
    shape: tuple[int, ...] = ()
    source = f"{files.name}: {files.path}"
    title = f"decoding {files.name}, {part}"
    with tqdm(total=len(wanted), desc=title, unit="img", unit_scale=True) as bar:
        for names, images in _decode_all(files.contents(rows), len(wanted), source, mode, size, side):
            for file, pixels in zip(names, images):
                if not first:
                    first, shape = file, pixels.shape
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(wanted), *shape)}
                    np.lib.format.write_array_header_1_0(array, header)
                    begin = array.tell()
                if pixels.shape != shape:
                    raise ValueError(
                        f"{source}: the images must have one size, or a size be given: {first} is "
                        f"{shape[2]}x{shape[1]}, {file} is {pixels.shape[2]}x{pixels.shape[1]}"
                    )
                array.seek(begin + rows[file] * pixels.nbytes)
                array.write(pixels.tobytes())
            bar.update(len(names))


def _decode_all(contents: Iterator[tuple[str, bytes]], n: int, *how: Any
                ) -> Iterator[tuple[list[str], list[np.ndarray]]]:  # fmt: skip
    """(names, images) of the n contents by the chunk, in their order. how: what else `decode` takes."""
    chunks = iter(lambda: list(itertools.islice(contents, _CHUNK)), [])
    workers = min(os.cpu_count() or 1, _PROCESSES)
    if n < _PROCESSES_FROM or workers == 1:
        for chunk in chunks:
            yield [file for file, _ in chunk], decode(chunk, *how)
        return
    pending: deque[tuple[list[str], Future]] = deque()
    try:
        # Not forked: the kernels' and torch's threads would be missing in a forked process.
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for chunk in chunks:
                pending.append(([file for file, _ in chunk], pool.submit(decode, chunk, *how)))
                if len(pending) > 2 * workers:  # so that not all files are in memory
                    names, future = pending.popleft()
                    yield names, future.result()
            for names, future in pending:
                yield names, future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that decodes images ended early: out of memory, or the script that loads them is read "
            'from a pipe, or has no `if __name__ == "__main__":`, and each such process runs it again'
        ) from error


def decode(chunk: Sequence[tuple[str, bytes]], source: str, mode: str, size: int | None, side: Side
           ) -> list[np.ndarray]:  # fmt: skip
    """uint8 [C, H, W] of each (name, content), upright as its EXIF says. source: what errors begin with."""
    images = []
    for name, content in chunk:
        try:
            with Image.open(io.BytesIO(content)) as image:
                if image.mode[0] in "IF":
                    raise ValueError("has more than 8 bits a channel")
                ImageOps.exif_transpose(image, in_place=True)
                images.append(_pixels(image.convert(mode), size, side))
        except UnidentifiedImageError:
            raise ValueError(f"{source}: {name} is no image that Pillow can read") from None
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{source}: {name} is damaged: {error}") from None
        except ValueError as error:
            raise ValueError(f"{source}: {name} {error}") from None
    return images


def _pixels(image: Image.Image, size: int | None, side: Side) -> np.ndarray:
    width, height = image.size
    if size is not None:
        kept = side(width, height)
        left, top = (width - kept) // 2, (height - kept) // 2
        if (width, height) != (kept, kept):
            image = image.crop((left, top, left + kept, top + kept))
        if kept != size:
            image = image.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels.reshape(image.height, image.width, -1).transpose(2, 0, 1))


def _is_grey(content: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.mode in ("1", "L", "LA")
    except UnidentifiedImageError:
        return True  # `decode` names it
