"""What only a GPU shows of vector quantization: tensor cores' rounding, bits, memory, CUDA graphs."""

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from vaeops.kernels import _layout, vq
from vaeops.ref import vq as ref

pytestmark = pytest.mark.gpu


def rows(N, D, dtype=torch.float32, seed=0):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("D", [1, 3, 8, 33, 64, 128, 256, 300, 1000])
def test_indices_are_the_reference_s(D, dtype):
    for N, K in ((3000, 1500), (5, 5000)):
        x, e = rows(N, D, dtype), rows(K, D, seed=1)
        for metric in range(3):
            ours, want = (f.vq_assign(x, e, None, metric, True, False) for f in (vq, ref))
            assert torch.equal(ours, want)
        ours, want = (f.vq_topk(x[:50], e, None, 3, 0, True, True) for f in (vq, ref))
        assert all(torch.equal(o, w) for o, w in zip(ours, want))


@pytest.mark.parametrize("D", [8, 64, 256])
@pytest.mark.parametrize("offset, scale", [(0, 1), (1000, 1), (0, 1e15), (0, 1e-15), (0, 1e-40)])
def test_indices_of_near_ties(D, offset, scale):
    """Rows half-way between two codes: any error of the fast pass beyond its bound would show."""
    e = rows(4096, D, torch.float64, seed=1)
    e[2048:] = e[:2048] + 0.1 * rows(2048, D, torch.float64, seed=2)
    middle = (e[:2048] + e[2048:]) / 2
    x, e = ((t * scale + offset).float() for t in (middle, e))
    ours, want = (f.vq_assign(x, e, None, 0, True, False) for f in (vq, ref))
    assert torch.equal(ours, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gather_backward_and_sums(dtype):
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


def step(x, e):
    indices = vq.vq_assign(x, e, None, 0, True, False)
    quantized, loss = vq.vq_gather(indices, e, x, 0.0, 1)
    gx = vq.vq_gather_bwd(quantized, loss, x, e, indices, 2)
    return indices, quantized, loss, gx, *vq.vq_segment_sum(x, indices, None, None, len(e), True, False)


def test_a_step_is_the_same_bits_every_time_and_synchronises_nowhere():
    x, e = rows(20000, 64), rows(512, 64, seed=1)
    first = step(x, e)
    torch.cuda.set_sync_debug_mode("error")
    try:
        others = [step(x, e) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))
    assert all(not t.any() for t in _layout._tickets.values())


def test_a_cuda_graph_replays_a_step():
    x, e = rows(2000, 64), rows(512, 64, seed=1)
    step(x, e)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, e)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(x, e)))


@pytest.mark.parametrize("N, K, D", [(65536, 1024, 64), (1000, 65536, 8), (4096, 16384, 256)])
def test_memory(N, K, D):
    x, e = rows(N, D), rows(K, D, seed=1)
    vq.vq_assign(x, e, None, 0, True, False)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    vq.vq_assign(x, e, None, 0, True, False)
    assert torch.cuda.max_memory_allocated() - before <= 8 * K * D + 64 * N + (16 << 20)
