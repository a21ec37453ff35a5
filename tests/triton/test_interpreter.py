"""Runs interpreted/ in a process of its own: Triton decides on import whether it compiles or interprets."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


def why_not() -> str | None:
    try:
        triton, numpy = (tuple(int(v) for v in version(p).split(".")[:2]) for p in ("triton", "numpy"))
    except PackageNotFoundError as error:
        return f"{error.name} is not installed"
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of triton 3.6 has no loops with numpy 2.4"
    return None


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("path", sorted(FOLDER.glob("test_*.py")), ids=lambda path: path.stem)
def test_kernels_under_the_interpreter(path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]
