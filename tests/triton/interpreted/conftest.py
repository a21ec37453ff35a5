"""Kernels under Triton's interpreter, on CPU tensors.

TRITON_INTERPRET=1 must be set before Triton is imported, and a process either interprets or compiles:
../test_interpreter.py starts one of its own for this folder.
"""

import os

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]

if INTERPRETING:
    import faithful

    faithful.install()
