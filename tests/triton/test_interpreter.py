"""Runs interpreted/ in a process of its own: Triton decides on import whether it compiles or interprets."""

from importlib.metadata import PackageNotFoundError, version

import pytest


def why_not() -> str | None:
    try:
        triton, numpy = (tuple(int(v) for v in version(p).split(".")[:2]) for p in ("triton", "numpy"))
    except PackageNotFoundError as error:
        return f"{error.name} is not installed"
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of triton 3.6 has no loops with numpy 2.4"
    return None


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_kernels_under_the_interpreter(interpreted):
    """It has run beside the other tests since the session began, see tests/conftest.py."""
    process, output = interpreted
    process.wait()
    assert process.returncode == 0, output.read_text()[-12000:]
