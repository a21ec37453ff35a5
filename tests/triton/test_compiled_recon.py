"""What the compiler makes of the reconstruction losses, with no GPU: spills, registers, instructions.

Run with `pytest -s` for the table.
"""

import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets", allow_module_level=True)

import aot

from vaeops.kernels import recon
from vaeops.ops._library import serving
from vaeops.ref import gaussian
from vaeops.ref.recon import ELEMENTWISE

FLAT, HALF, WIDE = (4096, 256), torch.bfloat16, torch.float64


def forward(kind, shape=FLAT, dtype=torch.float32, target=None, weight=None, reduction=3):
    pred = torch.empty(shape, dtype=dtype)
    t = torch.empty(shape, dtype=target or dtype)
    w = None if weight is None else torch.empty(shape, dtype=weight)
    return lambda: recon.recon_fwd(pred, t, w, ELEMENTWISE.index(kind), 1.0, reduction, 1)


def backward(kind, shape=FLAT, dtype=torch.float32, target=None, weight=None, reduction=3):
    pred = torch.empty(shape, dtype=dtype)
    t = torch.empty(shape, dtype=target or dtype)
    w = None if weight is None else torch.empty(shape, dtype=weight)
    grad = torch.empty(gaussian.reduced_shape(pred.shape, reduction, 1), dtype=gaussian.compute_dtype(dtype))
    return lambda: recon.recon_bwd(grad, pred, t, w, ELEMENTWISE.index(kind), 1.0, reduction, 1)


def multinomial(shape=(512, 20000), dtype=torch.float32, weight=None, backwards=False):
    logits, rows = torch.empty(shape, dtype=dtype), torch.empty(shape[0])
    lse = rows.double()
    w = None if weight is None else torch.empty(shape, dtype=weight)
    if backwards:
        return lambda: recon.multinomial_bwd(rows, logits, logits, w, lse, rows)
    return lambda: recon.multinomial_fwd(logits, logits, w)


# launch -> (what runs, elements of a tile, registers allowed, static instructions per element allowed)
# A thread has 8 elements of a tile (4 in fp64), so a sum's last steps weigh on each.
CASES = {
    "bce forward": (forward("bce"), 1024, 64, 145),
    "bce_logits forward": (forward("bce_logits"), 1024, 64, 100),
    "discretized_logistic forward": (forward("discretized_logistic"), 1024, 80, 155),
    "mse forward": (forward("mse"), 1024, 48, 55),
    "mse forward, sample": (forward("mse", reduction=2), 1024, 48, 40),
    "mse forward, dim": (forward("mse", reduction=1), 1024, 64, 85),
    "mse forward, uint8": (forward("mse", target=torch.uint8), 1024, 48, 60),
    "mse forward, fp64": (forward("mse", dtype=WIDE), 512, 64, 140),
    "bce_logits forward, fp64": (forward("bce_logits", dtype=WIDE), 512, 96, 335),
    "bce backward": (backward("bce"), 1024, 64, 55),
    "bce_logits backward": (backward("bce_logits"), 1024, 64, 80),
    "discretized_logistic backward": (backward("discretized_logistic"), 1024, 96, 145),
    "mse backward": (backward("mse"), 1024, 48, 25),
    "mse backward, bf16, mask": (backward("mse", dtype=HALF, weight=torch.bool), 1024, 48, 30),
    "multinomial forward": (multinomial(), 1024, 96, 185),
    "multinomial forward, mask": (multinomial(weight=torch.bool), 1024, 96, 190),
    "multinomial forward, rows of 20": (multinomial((512, 20)), 1024, 128, 210),
    "multinomial backward": (multinomial(backwards=True), 1024, 64, 55),
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
    print(f"\n{case:32} sm_{capability:<4} {found.registers:4} registers {found.spills:3} B spilled "
          f"{found.shared:6} B shared {per_element:6.1f} instructions / element", end="")  # fmt: skip
    assert found.spills == 0 and found.stack == 0
    assert found.registers <= registers
    assert per_element <= instructions
    inexact = set(re.findall(r"\b\w+\.(?:approx|full|ftz)\b\S*", found.ptx))
    assert inexact <= {"abs.ftz.f32", "rcp.approx.ftz.f64"}  # steps of fp64's exact exp and log


@pytest.mark.slow
@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_every_kind_and_operand_compiles(kind):
    for step in (forward, backward):
        for dtype, target, weight in ((HALF, torch.uint8, torch.bool), (WIDE, torch.bool, HALF)):
            with aot.compiling(90) as launched:
                step(kind, (5, 3), dtype, target, weight, reduction=2)()
            found = aot.report(launched[0])
            assert found.spills == 0 and found.stack == 0


@pytest.mark.parametrize("case", ["mse backward", "bce_logits backward", "multinomial backward"])
def test_aligned_tiles_move_16_bytes_at_a_time(case):
    with aot.compiling(90) as launched:
        CASES[case][0]()
    ptx = launched[0].asm["ptx"]
    assert re.search(r"ld\.global\S*\.v4\.b32", ptx) and re.search(r"st\.global\S*\.v4\.b32", ptx)


@pytest.mark.parametrize("step", [forward, backward, multinomial])
def test_at_most_two_compiles_over_twenty_batch_sizes(step):
    with aot.compiling(90) as launched:
        for rows in (*range(1, 18), 128, 1000, 4096):
            (step((rows, 20)) if step is multinomial else step("mse", (rows, 20), reduction=2))()
    assert len(launched) == 20
    assert len({id(kernel) for kernel in launched}) <= 2


@pytest.mark.parametrize("op", ["recon_fwd", "recon_bwd", "multinomial_fwd", "multinomial_bwd"])
def test_triton_serves_cuda_tensors_first(op):
    assert serving("cuda", op) == "triton"
