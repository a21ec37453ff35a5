"""What the compiler makes of the kernels, with no GPU: spills, registers, instructions, exact arithmetic.

Run with `pytest -s` for the table.
"""

import math
import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets", allow_module_level=True)

import aot

from vaeops.kernels import gaussian, rng
from vaeops.ref import gaussian as ref

SEED = torch.tensor([1, 2])


def step_arguments(shape, dtype=torch.float32, prior=None, packed_dim=None, seed=SEED, eps=None, param=0,
                   clamp=(-math.inf, math.inf), reduction=3, batch_ndim=1):  # fmt: skip
    q = torch.empty(shape, dtype=dtype)
    rho = torch.empty_like(q) if packed_dim is None else None
    p = None if prior is None else torch.empty(prior)
    return q, rho, p, p, seed, eps, packed_dim or 0, param, *clamp, reduction, batch_ndim, 1.0


def forward(shape, **options):
    return lambda: gaussian.gaussian_fwd(*step_arguments(shape, **options))


def backward(shape, **options):
    def launch():
        arguments = step_arguments(shape, **options)
        q, rho, packed_dim, reduction, batch_ndim = *arguments[:2], arguments[6], *arguments[10:12]
        mu = q if rho is not None else q.narrow(packed_dim, 0, q.shape[packed_dim] // 2)
        gkl = torch.empty(ref.reduced_shape(mu.shape, reduction, batch_ndim))
        gaussian.gaussian_bwd(torch.empty(mu.shape, dtype=mu.dtype), gkl, *arguments)

    return launch


def density(backward):
    x, out = torch.empty(512, 256), torch.empty(512)
    if backward:
        return lambda: gaussian.log_prob_bwd(out, x, x, x, 0, 2, 1)
    return lambda: gaussian.log_prob_fwd(x, x, x, 0, 2, 1)


# launch -> (what runs, elements of a tile, registers allowed, static instructions per element allowed)
FLAT, IMAGES, HALF = (4096, 256), (32, 8, 64, 64), torch.bfloat16
CASES = {
    "normal": (lambda: rng.normal(SEED, [1 << 20]), 1024, 48, 70),
    "normal, odd size": (lambda: rng.normal(SEED, [(1 << 20) + 1]), 1024, 64, 80),
    "forward, batchmean": (forward(FLAT), 1024, 96, 145),
    "forward, bf16": (forward(FLAT, dtype=HALF), 1024, 96, 150),
    "forward, fp16": (forward(FLAT, dtype=torch.float16), 1024, 96, 150),
    "forward, fp64": (forward(FLAT, dtype=torch.float64), 512, 128, 370),
    "forward, sample": (forward(FLAT, reduction=2), 1024, 96, 140),
    "forward, dim": (forward(FLAT, reduction=1), 1024, 128, 180),
    "forward, prior [D]": (forward(FLAT, prior=(256,)), 1024, 128, 195),
    "forward, packed": (forward(IMAGES, packed_dim=1), 1024, 96, 150),
    "forward, rows of 20": (forward((128, 20), reduction=2), 1024, 96, 160),
    "forward, rows of 10": (forward((128, 10), reduction=2), 1024, 168, 270),
    "backward, batchmean": (backward(FLAT), 1024, 96, 130),
    "backward, bf16": (backward(FLAT, dtype=HALF), 1024, 96, 135),
    "backward, fp64": (backward(FLAT, dtype=torch.float64), 512, 128, 290),
    "backward, sample": (backward(FLAT, reduction=2), 1024, 96, 140),
    "backward, prior [D]": (backward(FLAT, prior=(256,)), 1024, 192, 300),
    "backward, prior [B, 1]": (backward(FLAT, prior=(4096, 1)), 1024, 168, 210),
    "backward, std, clamp": (backward(FLAT, param=2, clamp=(0.1, 2.0)), 1024, 128, 250),
    "backward, packed": (backward(IMAGES, packed_dim=1), 1024, 96, 135),
    "log_prob forward": (density(False), 1024, 64, 75),
    "log_prob backward": (density(True), 1024, 64, 75),
}


OTHERS = [pytest.param(capability, marks=pytest.mark.slow) for capability in (80, 100)]


@pytest.mark.parametrize("capability", [90, *OTHERS])
@pytest.mark.parametrize("case", CASES)
def test_resources(case, capability):
    launch, elements, registers, instructions = CASES[case]
    with aot.compiling(capability) as launched:
        launch()
    (kernel,) = launched  # one launch
    found = aot.report(kernel)
    per_element = found.per_element(elements / (32 * kernel.metadata.num_warps))
    print(f"\n{case:24} sm_{capability:<4} {found.registers:4} registers {found.spills:3} B spilled "
          f"{found.shared:6} B shared {per_element:6.1f} instructions / element")  # fmt: skip
    assert found.spills == 0 and found.stack == 0
    assert found.registers <= registers
    assert per_element <= instructions
    inexact = set(re.findall(r"\b\w+\.(?:approx|full|ftz)\b\S*", found.ptx))
    assert inexact <= {"abs.ftz.f32"}  # looks at a double's upper half, in exp


@pytest.mark.parametrize("case", ["normal", "forward, batchmean", "backward, batchmean"])
def test_multiply_and_add_are_not_fused(case):
    """The PTX holds no fp32 multiply or add that ptxas may fuse: each names its rounding."""
    with aot.compiling(90) as launched:
        CASES[case][0]()
    ptx = launched[0].asm["ptx"]
    assert "mul.rn.f32" in ptx and "fma.rn.f32" in ptx
    assert not re.findall(r"\b(?:mul|add|sub)\.f32\b", ptx)


@pytest.mark.parametrize("case", ["normal", "forward, batchmean", "backward, packed"])
def test_aligned_tiles_move_16_bytes_at_a_time(case):
    with aot.compiling(90) as launched:
        CASES[case][0]()
    assert re.search(r"st\.global\.v4\.b32", launched[0].asm["ptx"])


@pytest.mark.parametrize("reduction", range(6))
@pytest.mark.parametrize("prior", [None, (20,)])
def test_at_most_two_compiles_over_twenty_batch_sizes(reduction, prior):
    for step in (forward, backward):
        with aot.compiling(90) as launched:
            for rows in (*range(1, 18), 128, 1000, 4096):
                step((rows, 20), reduction=reduction, prior=prior)()
        assert len(launched) == 20
        assert len({id(kernel) for kernel in launched}) <= 2


def test_at_most_two_compiles_of_the_noise():
    for seed in (SEED, None):
        with aot.compiling(90) as launched:
            for rows in (*range(1, 18), 128, 1000, 4096):
                rng.normal(seed if seed is not None else torch.zeros(rows, 2, dtype=torch.int64), [rows, 20])
        assert len({id(kernel) for kernel in launched}) <= 2
