"""Kernels under Triton's interpreter, on CPU tensors.

TRITON_INTERPRET=1 must be set before Triton is imported, and a process either interprets or compiles:
../test_interpreter.py starts one of its own for this folder.
"""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]

if INTERPRETING:
    import faithful

    faithful.install()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that a kernel ought to write and does not shows as NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
