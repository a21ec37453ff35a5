"""Runs interpreted/ in a process of its own: Triton decides on import whether it compiles or interprets."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_under_the_interpreter():
    folder = Path(__file__).parent / "interpreted"
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
