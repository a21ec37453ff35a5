"""`pytest bench`: the runner's cases under pytest-benchmark, small ones alone unless --large is given."""

import pytest
import torch

from .case import Row
from .cases import ALL
from .measure import directions, input_sets, steps

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc):
    large = metafunc.config.getoption("--large")
    params = []
    for case in ALL:
        if case.small or large:
            for row in case.rows(DEVICE, compiled=large):
                for direction in directions(case, row):
                    name = f"{case.family}/{case.name}-{row.name}-{direction}"
                    params.append(pytest.param(case, row, direction, id=name))
    metafunc.parametrize(("case", "row", "direction"), params)


def test_speed(benchmark, case, row: Row, direction: str):
    torch.manual_seed(0)
    torch._dynamo.reset()  # the cases share code, of which torch.compile keeps few versions
    sets = input_sets(case, DEVICE)
    shares = case.check(row, sets[0])
    assert all(share <= 1 for share in shares.values()), f"over the error budget: {shares}"
    step = steps(case, row, sets)[direction]

    def timed():
        for i in range(len(sets)):
            step(i)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.family}/{case.name} {direction}"
    benchmark.extra_info["calls"] = len(sets)
    benchmark(timed)
