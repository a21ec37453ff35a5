"""What only a GPU shows of the reconstruction losses: bits of sums, memory, CUDA graphs."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

import vaeops  # noqa: F401
from vaeops.kernels import _layout
from vaeops.ops._library import why_not
from vaeops.ref import recon as ref

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPS = ("recon_fwd", "recon_bwd", "multinomial_fwd", "multinomial_bwd")


@pytest.fixture(params=["triton", "cuda"])
def recon(request):
    """Runs the test once per implementation of the low-level ops."""
    if reason := why_not(request.param, "cuda", "recon_fwd"):
        pytest.skip(reason)
    return SimpleNamespace(**{op: getattr(getattr(torch.ops.vaeops, op), request.param) for op in OPS})


def uniform(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def options(kind, reduction=3):
    return ref.KINDS.index(kind), 0.3 if kind in ref.SCALED else 1.0, reduction, 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ref.ELEMENTWISE)
def test_values_and_gradients(recon, kind, dtype):
    pred, image = uniform(300, 20, dtype=dtype), (255 * uniform(300, 20, seed=1)).to(torch.uint8)
    for target in (uniform(300, 20, seed=1, dtype=dtype), image, image > 99):
        for weight in (None, uniform(300, 20, seed=2) > 0.5, uniform(20, seed=2)):
            for reduction in range(6):
                args = pred, target, weight, *options(kind, reduction)
                ours, want = recon.recon_fwd(*args), ref.recon_fwd(*args)
                torch.testing.assert_close(ours, want)
                grad = torch.randn_like(ours)
                torch.testing.assert_close(recon.recon_bwd(grad, *args), ref.recon_bwd(grad, *args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(300, 20), (7, 1025), (5, 100_000), (2, 3_000_000)])
def test_multinomial(recon, shape, dtype):
    logits, counts = (8 * uniform(*shape) - 4).to(dtype), (3 * uniform(*shape, seed=1)).floor().to(dtype)
    for weight in (None, uniform(*shape, seed=2) > 0.5, uniform(shape[1], seed=2)):
        args = logits, counts, weight
        ours, want = recon.multinomial_fwd(*args), ref.multinomial_fwd(*args)
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)
        grad = torch.randn_like(ours[0])
        got, expected = (m.multinomial_bwd(grad, *args, *want[1:]) for m in (recon, ref))
        torch.testing.assert_close(got, expected)


def step(recon, pred, target, logits, counts):
    loss = recon.recon_fwd(pred, target, None, *options("bce_logits"))
    grad = recon.recon_bwd(loss, pred, target, None, *options("bce_logits"))
    nll, lse, total = recon.multinomial_fwd(logits, counts, None)
    return loss, grad, nll, lse, recon.multinomial_bwd(nll, logits, counts, None, lse, total)


def inputs():
    return (uniform(64, 50_000), uniform(64, 50_000, seed=1),
            8 * uniform(64, 50_000, seed=2), (3 * uniform(64, 50_000, seed=3)).floor())  # fmt: skip


def test_a_step_is_the_same_bits_every_time_and_synchronises_nowhere(recon):
    args = inputs()
    first = step(recon, *args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        others = [step(recon, *args) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))
    assert all(not t.any() for t in _layout._tickets.values())


def test_a_row_does_not_depend_on_how_many_there_are(recon):
    _, _, logits, counts = inputs()
    whole = recon.multinomial_fwd(logits, counts, None)
    alone = recon.multinomial_fwd(logits[3:4], counts[3:4], None)
    assert all(torch.equal(w[3:4], a) for w, a in zip(whole, alone))


def test_a_cuda_graph_replays_a_step(recon):
    args = inputs()
    step(recon, *args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(recon, *args)
    for _ in range(3):
        args[0].uniform_()
        args[2].normal_()
        graph.replay()
        assert all(torch.equal(c, w) for c, w in zip(captured, step(recon, *args)))


def test_the_softmax_is_not_stored(recon):
    logits, counts = 8 * uniform(512, 100_000), uniform(512, 100_000, seed=1)
    recon.multinomial_fwd(logits, counts, None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    recon.multinomial_fwd(logits, counts, None)
    assert torch.cuda.max_memory_allocated() - before <= 1 << 20
