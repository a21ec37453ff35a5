"""What the compiler makes of the perceptual kernels, with no GPU: spills, registers, tensor cores.

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

from vaeops.kernels import perceptual
from vaeops.kernels.perceptual import conv, distance, pool, trunk

FP32, HALF = torch.float32, torch.bfloat16


def image_map(K, dtype, side=32, n=4):
    return torch.empty(n, K, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)


def kept(K, side=32, each=8):
    return torch.empty(4, side * side * K // each, dtype=torch.uint8)


def outputs(K, dtype, pooled):
    """What an epilogue writes: mask and map, or mask, pooled map and codes."""
    if pooled:
        return None, None, kept(K), image_map(K, dtype, 16), kept(K, 16, 4)
    return None, image_map(K, dtype), kept(K), None, None


def first(dtype, pooled, image=FP32):
    weight, x = torch.empty(64, 3, 3, 3, dtype=dtype), torch.empty(4, 3, 32, 32).to(image)
    return lambda: conv.run_conv_first(
        x, trunk.PLAIN, weight, torch.empty(64), True, outputs(64, dtype, pooled)
    )


def narrow(dtype, K, pooled):
    weight, x = torch.empty(K, 3, 3, 64, dtype=dtype), image_map(64, dtype)
    return lambda: conv.run_conv(x, weight, torch.empty(K), True, outputs(K, dtype, pooled))


def narrow_backward(dtype, K, tapped):
    rotated, out = torch.empty(64, 3, 3, K, dtype=dtype), image_map(64, dtype)
    below = (image_map(64, dtype), kept(64), image_map(64, dtype)) if tapped else trunk.NOTHING
    return lambda: conv.run_conv_bwd(image_map(K, dtype), rotated, below, out)


def first_backward(dtype):
    rotated = torch.empty(3, 3, 3, 64, dtype=dtype)
    return lambda: conv.run_conv_first_bwd(
        image_map(64, dtype), rotated, trunk.PLAIN[3:], torch.empty(4, 3, 32, 32)
    )


def finish(dtype, pooled):
    return lambda: pool.run_finish(image_map(256, dtype), torch.empty(256), True, outputs(256, dtype, pooled))


def restrain(dtype, pooled):
    g, code = (image_map(256, dtype, 16), kept(256, 16, 4)) if pooled else (image_map(256, dtype), None)
    below = image_map(256, dtype), kept(256), None
    return lambda: pool.run_restrain(g, code, below, image_map(256, dtype))


def head(kind, dtype=FP32, C=256):
    a, lin = image_map(C, dtype, 8), torch.empty(C)
    return lambda: distance.run_distance(a, a, lin, kind, True, out=torch.empty(4), ga=a)


def public(kind, spatial, dtype=FP32):
    """Contiguous maps, both gradients."""
    a, lin = torch.empty(4, 100, 9, 9, dtype=dtype), torch.empty(100)
    grad = torch.empty((4, 9, 9) if spatial else 4, dtype=torch.float64 if dtype is torch.float64 else FP32)
    return lambda: perceptual.feature_distance_bwd(grad, a, a, lin, kind, True, spatial)


# launch -> {kernel: (registers, bytes of shared memory, static instructions allowed)}
CASES = {
    "first, fp32": (first(FP32, False), {"conv_first": (176, 49152, 1900)}),
    "first, bf16": (first(HALF, False), {"conv_first": (96, 16384, 1450)}),
    "first, bf16, uint8 image": (first(HALF, False, torch.uint8), {"conv_first": (96, 16384, 1450)}),
    "first, bf16, pool": (first(HALF, True), {"conv_first": (112, 32768, 1700)}),
    "first backward, fp32": (first_backward(FP32), {"conv_first_bwd": (128, 40968, 900)}),
    "first backward, bf16": (first_backward(HALF), {"conv_first_bwd": (88, 55312, 1300)}),
    "64 to 64, fp32, pool": (narrow(FP32, 64, True), {"conv": (176, 65544, 1900)}),
    "64 to 64, bf16, pool": (narrow(HALF, 64, True), {"conv": (168, 73744, 2300)}),
    "64 to 128, fp32": (narrow(FP32, 128, False), {"conv": (176, 65544, 1900)}),
    "64 to 128, bf16": (narrow(HALF, 128, False), {"conv": (168, 73744, 2300)}),
    "64 to 64 backward, fp32, taps": (narrow_backward(FP32, 64, True), {"conv_bwd": (176, 65544, 1800)}),
    "64 to 64 backward, bf16, taps": (narrow_backward(HALF, 64, True), {"conv_bwd": (160, 73744, 2000)}),
    "64 to 128 backward, bf16": (narrow_backward(HALF, 128, False), {"conv_bwd": (112, 73744, 800)}),
    "behind ATen, fp32": (finish(FP32, False), {"finish": (56, 8192, 650)}),
    "behind ATen, bf16, pool": (finish(HALF, True), {"finish": (56, 8192, 650)}),
    "before ATen, fp32": (restrain(FP32, False), {"restrain": (56, 512, 600)}),
    "before ATen, bf16, pool": (restrain(HALF, True), {"restrain": (56, 512, 600)}),
    "mse": (head(0), {"distance": (56, 64, 500), "total": (40, 64, 450)}),
    "l1, bf16": (head(1, HALF), {"distance": (48, 64, 500)}),
    "smooth l1": (head(2), {"distance": (56, 64, 500)}),
    "lpips, 64 channels": (head(3, C=64), {"distance": (72, 512, 1000)}),
    "lpips, 512 channels, bf16": (head(3, HALF, 512), {"distance": (64, 512, 1000)}),
    "both gradients, lpips": (public(3, False), {"distance": (72, 512, 900)}),
    "both gradients, spatial, fp16": (public(3, True, torch.float16), {"distance": (72, 512, 900)}),
    "both gradients, mse, fp64": (public(0, False, torch.float64), {"distance": (48, 64, 450)}),
}  # fmt: skip

OTHERS = [pytest.param(capability, marks=pytest.mark.slow) for capability in (80, 100)]


@pytest.mark.parametrize("capability", [90, *OTHERS])
@pytest.mark.parametrize("case", CASES)
def test_resources(case, capability, monkeypatch):
    monkeypatch.setattr(conv, "precision", lambda dtype: "tf32x3")  # the larger of the fp32 kernels
    launch, allowed = CASES[case]
    with aot.compiling(capability) as launched:
        launch()
    found = {kernel.metadata.name.removesuffix("_kernel"): kernel for kernel in launched}
    assert set(allowed) <= set(found)
    for name, (registers, shared, instructions) in allowed.items():
        kernel = aot.report(found[name])
        count = sum(kernel.instructions.values())
        print(f"\n{case:30} {name:14} sm_{capability:<4} {kernel.registers:4} registers {kernel.spills:3} B "
              f"spilled {kernel.shared:7} B shared {count:5} instructions", end="")  # fmt: skip
        assert kernel.spills == 0 and kernel.stack == 0
        assert kernel.registers <= registers
        assert kernel.shared <= shared
        assert count <= instructions
        assert not re.findall(r"\b\w+\.(?:approx|full|ftz)\b\S*", kernel.ptx)


@pytest.mark.parametrize(
    "capability, product", [(80, "HMMA"), (90, "HGMMA"), pytest.param(100, "UTCHMMA", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("launch", [narrow(FP32, 64, True), narrow(HALF, 64, True)], ids=["fp32", "bf16"])
def test_products_run_on_tensor_cores(launch, capability, product):
    with aot.compiling(capability) as launched:
        launch()
    assert aot.report(launched[0]).instructions[product] > 0


def test_three_tf32_products_unless_pytorch_allows_one():
    before, counts = torch.backends.cudnn.conv.fp32_precision, []
    try:
        for precision in ("tf32", "ieee"):
            torch.backends.cudnn.conv.fp32_precision = precision
            with aot.compiling(90) as launched:
                narrow(FP32, 64, True)()
            counts.append(len(re.findall(r"wgmma.mma_async\S*tf32", launched[0].asm["ptx"])))
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert counts[1] == 3 * counts[0] > 0


@pytest.mark.parametrize(
    "launch",
    [narrow(HALF, 64, False), finish(FP32, False), restrain(HALF, True)],
    ids=["narrow", "behind", "before"],
)
def test_maps_move_16_bytes_at_a_time(launch):
    with aot.compiling(90) as launched:
        launch()
    assert re.search(r"st\.global\.v4\.b32", launched[0].asm["ptx"])


def test_at_most_two_compiles_over_twenty_batch_sizes():
    layers = (16, 64, 0, 64, 0)
    weights = [t for C, K in ((3, 16), (16, 64), (64, 64)) for t in (torch.empty(K, C, 3, 3), torch.empty(K))]
    packed = perceptual.vgg_pack(weights, layers, 0)
    with aot.compiling(90) as launched:
        for n in (*range(1, 18), 128, 1000, 4096):
            x = torch.empty(1, 3, 8, 8).expand(n, 3, 8, 8)
            perceptual.perceptual_fwd(
                x, x, [], weights, packed, [torch.empty(64)], layers, (1, 3, 8), trunk.PLAIN, trunk.PLAIN,
                (0, 1, 2), (0, 3, 2), (1.0, 1.0, 1.0), True, 0, True,
            )  # fmt: skip
    kinds = {}
    for kernel in launched:
        constants = tuple(sorted((k, str(v)) for k, v in kernel.src.constants.items()))
        kinds.setdefault((kernel.metadata.name, constants), set()).add(id(kernel))
    assert kinds and all(len(compiled) <= 2 for compiled in kinds.values())
