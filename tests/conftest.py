"""What every test shares: fixed seeds, poisoned memory, the machine's instruction sets."""

import ctypes
import os

import pytest

# pytest-xdist's processes fill the cores: a second thread would wait for its turn. Tests of threads ask for
# theirs.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

from vaeops import _native


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    skip_slow = pytest.mark.skip(reason="slow: run with --slow (make test-all)")
    skip_gpu = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(skip_slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip_gpu)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


# glibc fills what malloc hands out with the complement of the low byte: 0xFF everywhere, NaN in every float.
_M_PERTURB = -6
_POISON = 0x100


@pytest.fixture(autouse=True)
def _poison_memory():
    """Fresh tensors hold NaN, so a forgotten element shows; and no op may object to deterministic mode."""
    if hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(_M_PERTURB, _POISON)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def isas() -> list[str]:
    """Instruction sets that the CPU kernels can use here, least first."""
    path = _native.path("_ops_cpu")
    if path is None:
        return []
    try:
        from vaeops import _host
    except ImportError:
        return []
    return _host.isas(str(path))


# Kernels that do not use its tiles run their AVX-512 code under "amx".
@pytest.fixture(
    params=[name for name in isas() if name != "amx"]
    or [pytest.param(None, marks=pytest.mark.skip(reason="no native CPU kernels or no _host"))]
)
def isa(request):
    """Runs the test once per instruction set."""
    from vaeops import _host

    path = str(_native.path("_ops_cpu"))
    best = _host.isa(path)
    _host.set_isa(path, request.param)
    yield request.param
    _host.set_isa(path, best)


@pytest.fixture(params=["ref", *(f"cpp {name}" for name in isas())])
def impl(request):
    """Runs the test once per implementation that this CPU has: the reference, C++ by instruction set."""
    name, _, wanted = request.param.partition(" ")
    if not wanted:
        yield name
        return
    from vaeops import _host

    path = str(_native.path("_ops_cpu"))
    best = _host.isa(path)
    _host.set_isa(path, wanted)
    yield name
    _host.set_isa(path, best)


def pytest_report_header(config):
    return f"vaeops CPU kernels: {', '.join(isas()) or _native.why_not('_ops_cpu') or 'no _host'}"
