"""What only a GPU shows of vector quantization: tensor cores' rounding, bits, memory, CUDA graphs."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

import vaeops  # noqa: F401
from vaeops.kernels import _layout
from vaeops.ops._library import why_not
from vaeops.ref import vq as ref

pytestmark = pytest.mark.gpu
OPS = ("vq_assign", "vq_topk", "vq_gather", "vq_gather_bwd", "vq_segment_sum")


@pytest.fixture(params=["triton", "cuda"])
def vq(request):
    """Runs the test once per implementation of the low-level ops."""
    if reason := why_not(request.param, "cuda"):
        pytest.skip(reason)
    return SimpleNamespace(**{op: getattr(getattr(torch.ops.vaeops, op), request.param) for op in OPS})


def rows(N, D, dtype=torch.float32, seed=0):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("D", [1, 3, 8, 33, 64, 128, 256, 300, 1000])
def test_indices_are_the_reference_s(vq, D, dtype):
    for N, K in ((3000, 1500), (5, 5000)):
        x, e = rows(N, D, dtype), rows(K, D, seed=1)
        some = slice(None, None, 20 if dtype is torch.float64 else 1)  # the reference's fp64 fma is slow
        for metric in range(3):
            ours = vq.vq_assign(x, e, None, metric, True, False)[some]
            assert torch.equal(ours, ref.vq_assign(x[some], e, None, metric, True, False))
        ours, want = (f.vq_topk(x[:50], e, None, 3, 0, True, True) for f in (vq, ref))
        assert all(torch.equal(o, w) for o, w in zip(ours, want))


@pytest.mark.parametrize("D", [8, 64, 256])
@pytest.mark.parametrize("offset, scale", [(0, 1), (1000, 1), (0, 1e15), (0, 1e-15), (0, 1e-40)])
def test_indices_of_near_ties(vq, D, offset, scale):
    """Rows half-way between two codes: any error of the fast pass beyond its bound would show."""
    e = rows(4096, D, torch.float64, seed=1)
    e[2048:] = e[:2048] + 0.1 * rows(2048, D, torch.float64, seed=2)
    middle = (e[:2048] + e[2048:]) / 2
    x, e = ((t * scale + offset).float() for t in (middle, e))
    ours, want = (f.vq_assign(x, e, None, 0, True, False) for f in (vq, ref))
    assert torch.equal(ours, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gather_backward_and_sums(vq, dtype):
    x, e, g = rows(5000, 70, dtype), rows(300, 70, seed=1), rows(5000, 70, dtype, seed=2)
    indices = torch.randint(-1, 300, (5000,), device="cuda")
    indices[1000:4000] = 7  # a code of several pieces
    w = torch.rand(5000, device="cuda")
    for reduction in range(3):
        ours, want = (f.vq_gather(indices, e, x, 0.5, reduction) for f in (vq, ref))
        assert torch.equal(ours[0], want[0])
        torch.testing.assert_close(ours[1], want[1])
    for estimator in range(3):
        ours, want = (f.vq_gather_bwd(g, w, x, e, indices, estimator) for f in (vq, ref))
        torch.testing.assert_close(ours, want)
    ours, want = (f.vq_segment_sum(x, indices, w, None, 300, True, True) for f in (vq, ref))
    torch.testing.assert_close(ours, want)
    absmax = x.abs().amax().float()
    ours, want = (f.vq_segment_sum(x, indices, None, absmax, 300, True, False) for f in (vq, ref))
    assert all(torch.equal(o, w) for o, w in zip(ours, want))


def step(vq, x, e):
    indices = vq.vq_assign(x, e, None, 0, True, False)
    quantized, loss = vq.vq_gather(indices, e, x, 0.0, 1)
    gx = vq.vq_gather_bwd(quantized, loss, x, e, indices, 2)
    return indices, quantized, loss, gx, *vq.vq_segment_sum(x, indices, None, None, len(e), True, False)


def test_a_step_is_the_same_bits_every_time_and_synchronises_nowhere(vq):
    x, e = rows(20000, 64), rows(512, 64, seed=1)
    first = step(vq, x, e)
    torch.cuda.set_sync_debug_mode("error")
    try:
        others = [step(vq, x, e) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))
    assert all(not t.any() for t in _layout._tickets.values())


def test_a_cuda_graph_replays_a_step(vq):
    x, e = rows(2000, 64), rows(512, 64, seed=1)
    step(vq, x, e)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(vq, x, e)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(vq, x, e)))


@pytest.mark.parametrize("N, K, D", [(65536, 1024, 64), (1000, 65536, 8), (4096, 16384, 256)])
def test_memory(vq, N, K, D):
    x, e = rows(N, D), rows(K, D, seed=1)
    vq.vq_assign(x, e, None, 0, True, False)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    vq.vq_assign(x, e, None, 0, True, False)
    assert torch.cuda.max_memory_allocated() - before <= 8 * K * D + 64 * N + (16 << 20)
