"""What the compiler makes of the vector-quantization kernels, with no GPU: spills, registers, instructions.

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

from vaeops.kernels import vq

N, K = 65536, 8192
HALF, WIDE = torch.bfloat16, torch.float64


def assign(D, dtype=torch.float32, metric=0, rows=N):
    codes = torch.float64 if dtype is torch.float64 else torch.float32
    x, codebook = torch.empty(rows, D, dtype=dtype), torch.empty(K, D, dtype=codes)
    return lambda: vq.vq_assign(x, codebook, None, metric, True, False)


def topk():
    return lambda: vq.vq_topk(torch.empty(8, 64), torch.empty(K, 64), None, 5, 0, True, False)


def gather(D, dtype=torch.float32):
    x, indices = torch.empty(N, D, dtype=dtype), torch.empty(N, dtype=torch.int64)
    return lambda: vq.vq_gather(indices, torch.empty(K, D), x, 0.0, 1)


def backward(D, estimator, dtype=torch.float32):
    x, indices = torch.empty(N, D, dtype=dtype), torch.empty(N, dtype=torch.int64)
    return lambda: vq.vq_gather_bwd(x, torch.empty(N), x, torch.empty(K, D), indices, estimator)


def segment_sum(D, dtype=torch.float32, absmax=None):
    x, indices = torch.empty(N, D, dtype=dtype), torch.zeros(N, dtype=torch.int64)
    return lambda: vq.vq_segment_sum(x, indices, None, absmax, K, True, False)


# launch -> {kernel: (registers, bytes of shared memory, static instructions allowed)}
PACK, REFINE = (168, 2048, 2700), (64, 2048, 700)
CASES = {
    "assign, D 8": (assign(8), {"pack": PACK, "nearest_tiles": (192, 8192, 2300), "refine": REFINE}),
    "assign, D 64": (assign(64), {"pack": PACK, "nearest_tiles": (176, 49152, 1800), "refine": REFINE}),
    "assign, D 256": (assign(256), {"pack": PACK, "nearest_tiles": (168, 135168, 2500), "refine": REFINE}),
    "assign, D 512": (assign(512), {"pack": PACK, "nearest_tiles": (255, 114688, 2100), "refine": REFINE}),
    "assign, D 64, fp64": (
        assign(64, WIDE), {"pack": PACK, "nearest_tiles": (192, 49152, 2600), "refine": REFINE}
    ),
    "assign, D 256, bf16": (
        assign(256, HALF), {"pack": PACK, "nearest_tiles": (168, 135168, 2200), "refine": REFINE}
    ),
    "assign, D 16384": (assign(16384, rows=8), {"pack": PACK}),
    "assign, few rows": (
        assign(64, rows=256), {"nearest_tiles": (176, 49152, 1800), "refine": (128, 4096, 900)}
    ),
    "assign, cosine": (
        assign(64, metric=1), {"pack": PACK, "nearest_tiles": (176, 49152, 1700), "refine": (64, 2048, 900)}
    ),
    "topk": (topk(), {"scores": (48, 512, 250)}),
    "gather, D 8": (gather(8), {"gather": (64, 64, 1000)}),
    "gather, D 64": (gather(64), {"gather": (64, 64, 1100)}),
    "gather, D 256, bf16": (gather(256, HALF), {"gather": (64, 64, 1100)}),
    "backward, ste": (backward(64, 1), {"gather_bwd": (64, 64, 250)}),
    "backward, rotation": (backward(64, 2), {"gather_bwd": (96, 64, 1000)}),
    "backward, rotation, D 256": (backward(256, 2), {"gather_bwd": (96, 64, 1000)}),
    "segment sum": (
        segment_sum(64), {"keys": (40, 256, 250), "pieces": (56, 4096, 700), "segments": (56, 4096, 1000)}
    ),
    "segment sum, bf16": (
        segment_sum(256, HALF),
        {"keys": (40, 256, 250), "pieces": (56, 4096, 700), "segments": (56, 4096, 1000)},
    ),
    "segment sum, fixed point": (
        segment_sum(64, absmax=torch.ones(())), {"pieces": (64, 4096, 700), "segments": (64, 4096, 1000)}
    ),
}  # fmt: skip

OTHERS = [pytest.param(capability, marks=pytest.mark.slow) for capability in (80, 100)]


@pytest.mark.parametrize("capability", [90, *OTHERS])
@pytest.mark.parametrize("case", CASES)
def test_resources(case, capability):
    launch, allowed = CASES[case]
    with aot.compiling(capability) as launched:
        launch()
    found = {kernel.metadata.name.removesuffix("_kernel"): kernel for kernel in launched}
    assert set(allowed) <= set(found)
    for name, (registers, shared, instructions) in allowed.items():
        kernel = aot.report(found[name])
        count = sum(kernel.instructions.values())
        print(f"\n{case:26} {name:14} sm_{capability:<4} {kernel.registers:4} registers {kernel.spills:3} B "
              f"spilled {kernel.shared:7} B shared {count:5} instructions", end="")  # fmt: skip
        assert kernel.spills == 0 and kernel.stack == 0
        assert kernel.registers <= registers
        assert kernel.shared <= shared
        assert count <= instructions
        assert not re.findall(r"\b\w+\.(?:approx|full|ftz)\b\S*", kernel.ptx)


@pytest.mark.parametrize(
    "capability, product", [(80, "HMMA"), (90, "HGMMA"), pytest.param(100, "UTCHMMA", marks=pytest.mark.slow)]
)
def test_the_fast_pass_runs_on_tensor_cores(capability, product):
    with aot.compiling(capability) as launched:
        assign(64)()
    (kernel,) = (k for k in launched if k.metadata.name == "nearest_tiles_kernel")
    assert aot.report(kernel).instructions[product] > 0


def test_exact_scores_are_fp64_fma_chains():
    with aot.compiling(90) as launched:
        assign(64)()
    ptx = launched[-1].asm["ptx"]
    assert "fma.rn.f64" in ptx and not re.findall(r"\b(?:mul|add|sub)\.f64\b", ptx)


def test_more_codes_than_the_second_dim_of_a_grid_takes():
    with aot.compiling(90) as launched:
        vq.vq_topk(torch.empty(3, 1), torch.empty(2**22 + 1, 1), None, 1, 0, True, False)
    assert len(launched) == 5


LAUNCHES = {
    "assign": lambda x, e, i: vq.vq_assign(x, e, None, 0, True, False),
    "topk": lambda x, e, i: vq.vq_topk(x, e, None, 5, 0, True, False),
    "gather": lambda x, e, i: vq.vq_gather(i, e, x, 0.0, 1),
    "backward": lambda x, e, i: vq.vq_gather_bwd(x, None, x, e, i, 2),
    "segment sum": lambda x, e, i: vq.vq_segment_sum(x, i, None, None, 100, True, False),
}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_at_most_two_compiles_over_twenty_batch_sizes(launch):
    codebook = torch.empty(100, 20)
    with aot.compiling(90) as launched:
        for rows in (*range(1, 18), 128, 1000, 4096):
            LAUNCHES[launch](torch.empty(rows, 20), codebook, torch.zeros(rows, dtype=torch.int64))
    for name in {kernel.metadata.name for kernel in launched}:
        compiled = {id(kernel) for kernel in launched if kernel.metadata.name == name}
        assert len(compiled) <= 2, name


@pytest.mark.parametrize("launch", LAUNCHES)
def test_one_dim_and_one_code_compile(launch):
    launches = LAUNCHES | {
        "topk": lambda x, e, i: vq.vq_topk(x, e, None, 1, 0, True, False),
        "segment sum": lambda x, e, i: vq.vq_segment_sum(x, i, None, torch.ones(()), 1, True, False),
    }
    for shape, codes in (((5, 1), 1), ((1, 1), 1), ((2000, 1, 1, 1), 3)):
        with aot.compiling(90) as launched:
            launches[launch](
                torch.empty(shape), torch.empty(codes, 1), torch.zeros(shape[:-1], dtype=torch.int64)
            )
        assert launched
