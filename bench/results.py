"""Rows of measurements as CSV, one file a machine, written whole or not at all."""

import csv
import datetime
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results"
FIELDS = (
    "commit", "versions", "machine", "date", "threads", "case", "row", "direction", "median_us", "p20_us",
    "p80_us", "min_us", "rounds", "ceiling", "work", "g_per_s", "share", "elements", "memory_bytes",
)  # fmt: skip


def machine(device: torch.device) -> str:
    """A name that is a file name and tells no host: the GPU's, or the CPU's with its core count."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        model = platform.processor() or platform.machine()
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M)):
            model = re.sub(r"\((R|TM)\)|@.*|\b(CPU|Processor)\b", " ", found[1])
        name = f"{model} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> str:
    import vaeops

    info = vaeops.info()
    found = {name: value for name, value in info["versions"].items() if value}
    return "; ".join(f"{name} {value}" for name, value in (found | {"cpu isa": info["cpu"]["isa"]}).items())


def commit() -> str:
    """The short hash, with + when tracked files differ from it; results and pages do not count."""

    def git(*args: str) -> str:
        return subprocess.run(
            ("git", "-C", str(ROOT), *args), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + (
            "+" if git("status", "--porcelain", "-uno", "--", ".", ":!bench/results", ":!*.md") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(f"{path}: columns are {reader.fieldnames}, expected {list(FIELDS)}")
        return list(reader)


def store(path: Path, common: dict, rows: Iterable[dict]) -> None:
    """Replace what the file holds of `common`'s machine, case and threads by `rows`, `common` added to each.

    A case is replaced whole: rows of one table then come from one run, and none outlives a row that has gone.
    """

    def key(row: dict) -> tuple[str, str, str]:
        return row["machine"], row["case"], str(row["threads"])

    new = [{field: str((common | row)[field]) for field in FIELDS} for row in rows]
    old = read(path)
    # The new rows take the old ones' place: tables keep their order.
    place = next((i for i, row in enumerate(old) if key(row) == key(common)), len(old))
    rest = [[row for row in part if key(row) != key(common)] for part in (old[:place], old[place:])]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rest[0] + new + rest[1])
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
