"""The record of a training: a line of JSON at each log point, TensorBoard's files on request."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from .._files import atomic

FILE = "log.jsonl"


class Log:
    """`log.jsonl` of a run, and what TensorBoard reads beside it.

    Args:
        out: folder of the run.
        step: where the run begins. Lines after it are of a past that this run leaves: `drop_after`.
        tensorboard: write its files, too.

    Raises:
        ValueError: tensorboard is asked for and not installed.
    """

    def __init__(self, out: Path, step: int, tensorboard: bool) -> None:
        self.writer = None
        if tensorboard:
            if importlib.util.find_spec("tensorboard") is None:
                raise ValueError("tensorboard=true needs the package tensorboard, which is not installed")
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        path = out / FILE
        if path.exists():
            drop_after(path, step)
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """record: Python numbers by name, "step" among them. What is not finite becomes null."""
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()
        if self.writer is not None:
            for name, value in record.items():
                if name not in ("step", "seconds"):
                    self.writer.add_scalar(name, value, record["step"])
            self.writer.flush()

    def close(self) -> None:
        self.file.close()
        if self.writer is not None:
            self.writer.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The log's lines, up to one that was cut off by a kill."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def drop_after(path: Path, step: int) -> None:
    """Keep the lines up to a step, atomically; later ones go to the end of a file beside it, .old."""
    lines: tuple[list[str], list[str]] = [], []
    for record in read(path):
        lines[record["step"] > step].append(json.dumps(record) + "\n")
    kept, dropped = lines
    if dropped:
        with path.with_name(f"{path.name}.old").open("a", encoding="utf-8") as file:
            file.writelines(dropped)
    with atomic(path) as file:
        file.write("".join(kept).encode())
