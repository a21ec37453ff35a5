"""What only a GPU shows of perceptual losses: cuDNN, tensor cores' rounding, bits, memory, CUDA graphs."""

from functools import cache

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

import vaeops
from vaeops.kernels import perceptual
from vaeops.kernels.perceptual import trunk as driver
from vaeops.ref import perceptual as ref

pytestmark = pytest.mark.gpu

TAPS = ("conv1_1", "relu1_2", "relu2_2", "pool2", "relu3_3", "relu4_3", "relu5_3")
LPIPS_TAPS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
CHANNELS = (64, 128, 256, 512, 512)


@pytest.fixture(autouse=True)
def _without_tf32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@cache
def net(precision="fp32", dtype=torch.float32):
    return vaeops.VGGTrunk.random("vgg16", seed=0, precision=precision).to("cuda", dtype)


def images(batch, height, width, dtype=torch.float32):
    x, noise = (torch.rand(batch, 3, height, width, device="cuda") for _ in range(2))
    return (2 * x - 1).to(dtype), (2 * x - 1 + 0.3 * noise).clamp(-1, 1).to(dtype)


def relative(ours, want):
    return float((ours.double() - want.double()).norm() / want.double().norm())


def terms():
    lin = [torch.rand(k, device="cuda") for k in CHANNELS]
    return [
        vaeops.Term("mse", TAPS),
        vaeops.Term("lpips", LPIPS_TAPS, lin=lin),
        vaeops.Term("gram", LPIPS_TAPS[:3]),
        vaeops.Term("smooth_l1", ("relu2_1", "conv3_3")),
    ]


def run(x, target, trunk, impl="triton", terms=None):
    return vaeops.perceptual_loss(
        x,
        target,
        trunk,
        terms=terms or [vaeops.Term("mse", TAPS)],
        reduction="none",
        return_grad=True,
        impl=impl,
    )


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (50, 73), (256, 256)])
def test_maps_and_masks(size):
    """With equal masks the gradient is the fp64 one to 1e-5."""
    trunk, (x, _) = net(), images(4, *size)
    cut = trunk.cut(TAPS)
    every = tuple(t for i, k in enumerate(cut.layers) for t in ((2 * i, 2 * i + 1) if k else (2 * i + 1,)))
    packed, pixels = cut.packed("triton"), cut.pixels(x.dtype)
    maps, saved = perceptual.vgg_features_fwd(x, cut.weights, packed, cut.layers, every, pixels, 0, True)
    exact = ref.features(x.double(), cut.weights, cut.layers, every, pixels)
    for ours, want in zip(maps, exact):
        assert relative(ours, want) < 5e-6
    at = dict(zip(every, maps))
    layers = [(at[2 * i] if k else at[2 * i - 1], at[2 * i + 1].double()) for i, k in enumerate(cut.layers)]
    grads = [torch.randn_like(m) for m in maps]
    rest = cut.weights, cut.layers, every, pixels, 0
    want = ref._run_back(grads, layers, *rest)
    ours = perceptual.vgg_features_bwd(grads, x, cut.weights, packed, saved, *rest[1:])
    assert relative(ours, want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(16, 16), (64, 64), (129, 65)])
def test_loss_and_gradient(size, dtype):
    trunk, (x, target), losses = net(), images(4, *size, dtype), terms()
    ours = run(x, target, trunk, terms=losses)
    want = run(x.double(), target.double(), net(dtype=torch.float64), "ref", losses)
    assert relative(ours[0], want[0]) < 1e-5
    assert relative(ours[1], want[1]) < (2e-3 if dtype is torch.float32 else 1e-2)
    byte = ((target.float() + 1) * 127.5).round().to(torch.uint8)
    ours, want = run(x.float(), byte, trunk), run(x.float(), byte, trunk, "ref")
    assert relative(ours[0], want[0]) < 1e-5


@pytest.mark.parametrize("size", [(64, 64), (129, 65)])
def test_bf16(size):
    (x, target), losses = images(8, *size), terms()
    ours = run(x, target, net("bf16"), terms=losses)
    want = run(x.double(), target.double(), net(dtype=torch.float64), "ref", losses)
    assert relative(ours[0], want[0]) < 2e-2
    assert torch.nn.functional.cosine_similarity(ours[1].flatten().double(), want[1].flatten(), dim=0) > 0.995


def test_tf32_where_pytorch_allows_it():
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    x, target = images(4, 64, 64)
    ours, want = run(x, target, net()), run(x.double(), target.double(), net(dtype=torch.float64), "ref")
    assert relative(ours[0], want[0]) < 5e-3 and relative(ours[1], want[1]) < 5e-2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_chunks(precision, monkeypatch):
    """Bit-equal where Triton makes all layers; to rounding where cuDNN chooses by the size of the chunk."""
    x, target = images(6, 40, 33)
    for everything, most in ((True, 0.0), (False, 2e-3 if precision == "fp32" else 0.1)):
        with monkeypatch.context() as patch:
            if everything:
                patch.setattr(driver, "by_triton", lambda C, K: True)
            trunk = net.__wrapped__(precision)  # packed for these kernels
            whole = run(x, target, trunk)
            patch.setattr(driver, "CHUNK_BYTES", 1)
            assert all(relative(a, b) <= most for a, b in zip(run(x, target, trunk), whole))


def test_it_synchronises_nowhere_and_repeats_its_bits():
    trunk, (x, target), losses = net("bf16"), images(4, 64, 64), terms()
    first = run(x, target, trunk, terms=losses)
    torch.cuda.set_sync_debug_mode("error")
    try:
        others = [run(x, target, trunk, terms=losses) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cuda_graph_replays_it(precision):
    trunk, (x, target), losses = net(precision), images(4, 64, 64), terms()
    run(x, target, trunk, terms=losses)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x, target, trunk, terms=losses)
    for _ in range(2):
        x.uniform_(-1, 1)
        graph.replay()
        for a, b in zip(captured, run(x, target, trunk, terms=losses)):
            assert relative(a, b) < (1e-4 if precision == "fp32" else 0.1)


def test_autocast_changes_nothing():
    trunk, (x, target), losses = net(), images(4, 32, 32), terms()
    want = run(x, target, trunk, terms=losses)
    with torch.autocast("cuda"):
        ours = run(x, target, trunk, terms=losses)
    assert all(torch.equal(a, b) for a, b in zip(ours, want))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_does_not_grow_with_the_batch(precision, monkeypatch):
    monkeypatch.setattr(driver, "CHUNK_BYTES", 32 << 20)
    trunk, peaks = net(precision), []
    for batch in (64, 64, 256):
        x, target = images(batch, 64, 64)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(x, target, trunk)
        peaks.append(torch.cuda.max_memory_allocated() - before - x.nbytes)
    assert peaks[2] <= 1.1 * peaks[1] + (1 << 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ref.DISTANCES)
def test_feature_distance(kind, dtype):
    lin = torch.rand(300, device="cuda") if kind == "lpips" else None
    for layout in (torch.contiguous_format, torch.channels_last):
        a, b = (torch.randn(3, 300, 17, 30, device="cuda").to(dtype, memory_format=layout) for _ in range(2))
        a[0, :, 3, 4] = 0
        for spatial in (False, True)[: 1 if kind == "gram" else 2]:
            found = []
            for impl, x, y in (("triton", a, b), ("ref", a.double(), b.double())):
                x, y = x.requires_grad_(), y.requires_grad_()
                d = vaeops.feature_distance(
                    x, y, kind=kind, lin=lin, spatial=spatial, reduction="none", impl=impl
                )
                large = torch.full_like(d, 1e9 if kind == "gram" else 1e4)  # fp16 has a short range
                found.append((d.detach(), *torch.autograd.grad(d, (x, y), large)))
            for ours, want in zip(*found):
                assert ours.isfinite().all()
                assert relative(ours, want) < {torch.float16: 1e-3, torch.bfloat16: 5e-3}.get(dtype, 1e-5)
