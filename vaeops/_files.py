"""Files that are either complete or not there."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes its name only when it is complete and on the disk.

    A process that is killed at any point leaves the file that was there before. The file that is written in
    the meantime stands beside it: `.NAME.` and eight more characters.

    Raises:
        OSError: what the system says, with the path; the file that was there before stays.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too
        finally:
            os.close(folder)
    except OSError as error:
        if error.filename is not None and Path(error.filename) not in (part, *path.parents):
            raise  # of a file that the caller reads meanwhile
        raise OSError(error.errno, f"{path} could not be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # it has its name by now, or could not be made
            part.unlink()
