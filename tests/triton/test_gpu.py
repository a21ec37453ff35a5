"""What only a GPU shows: the bits of noise and sums, streams, CUDA graphs. The interpreter does the rest."""

import math
from types import SimpleNamespace

import pytest
import torch
from budget import assert_within_budget

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

import vaeops
from vaeops.kernels import _layout
from vaeops.ops._library import why_not
from vaeops.ref import gaussian as ref

pytestmark = pytest.mark.gpu
SEED = torch.tensor([11, 2**33 - 1])
OPS = ("normal", "gaussian_fwd", "gaussian_bwd", "gaussian_log_prob_fwd", "gaussian_log_prob_bwd")


@pytest.fixture(params=["triton", "cuda"])
def ops(request):
    """Runs the test once per implementation of the low-level ops."""
    if reason := why_not(request.param, "cuda"):
        pytest.skip(reason)
    found = {op: getattr(getattr(torch.ops.vaeops, op), request.param) for op in OPS}
    return SimpleNamespace(**found, impl=request.param)


def arguments(mu, rho, prior=(None, None), reduction=3):
    return mu, rho, *prior, SEED.to(mu.device), None, 0, 0, -math.inf, math.inf, reduction, 1, 1.0


@pytest.mark.parametrize("shape", [(1 << 20,), (97,), (3, 1025)])
def test_noise_has_the_reference_bits(ops, shape):
    want = vaeops.ref.rng.normal(shape, SEED)
    assert torch.equal(ops.normal(SEED.cuda(), list(shape)).cpu(), want)


def doubled(args):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def check(run, reference, args, factor):
    """Each output within its error budget; in fp64 the reference is inexact, too."""
    outputs = run(*args), reference(*doubled(args)), reference(*args)
    outputs = [[o] if isinstance(o, torch.Tensor) else o for o in outputs]
    for place, (ours, exact, eager) in enumerate(zip(*outputs, strict=True)):
        assert ours.dtype is eager.dtype
        more = 16 if ours.dtype is torch.float64 else 0
        assert_within_budget(ours, exact, eager, f"output {place}", factor=factor + more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", range(6))
def test_values_and_gradients(ops, dtype, reduction):
    mu, rho, x = torch.randn(3, 300, 20, device="cuda").to(dtype)
    prior = torch.randn(2, 20, device="cuda")
    args = arguments(mu, rho, prior, reduction)
    check(ops.gaussian_fwd, ref.gaussian_fwd, args, 2)
    cotangents = [torch.randn_like(out) for out in ref.gaussian_fwd(*args)]
    check(ops.gaussian_bwd, ref.gaussian_bwd, (*cotangents, *args), 3)
    density = x, mu, rho, 0, reduction, 1
    check(ops.gaussian_log_prob_fwd, ref.log_prob_fwd, density, 2)
    grad = torch.randn_like(ref.log_prob_fwd(*density))
    check(ops.gaussian_log_prob_bwd, ref.log_prob_bwd, (grad, *density), 3)


def test_sums_are_the_same_bits_every_time(ops):
    mu, rho = torch.randn(2, 4096, 4096, device="cuda")
    prior = torch.randn(2, 4096, device="cuda")
    for reduction in (1, 2, 5):
        args = arguments(mu, rho, prior, reduction)
        first = ops.gaussian_fwd(*args)[1]
        gkl = torch.ones_like(first)
        grads = ops.gaussian_bwd(None, gkl, *args)[2:]
        for _ in range(20):
            assert torch.equal(ops.gaussian_fwd(*args)[1], first)
            assert all(torch.equal(a, b) for a, b in zip(ops.gaussian_bwd(None, gkl, *args)[2:], grads))


def test_streams_do_not_share_tickets(ops):
    mu, rho = torch.randn(2, 1 << 22, device="cuda")
    args = arguments(mu, rho, reduction=5)
    want = ops.gaussian_fwd(*args)[1]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    got = []
    for _ in range(25):
        for stream in streams:
            with torch.cuda.stream(stream):
                got.append(ops.gaussian_fwd(*args)[1])
    torch.cuda.synchronize()
    assert all(torch.equal(g, want) for g in got)
    assert all(not t.any() for t in _layout._tickets.values())


def test_a_cuda_graph_replays_both_directions(ops):
    mu, rho = torch.randn(2, 64, 5000, device="cuda")
    args = arguments(mu, rho, reduction=2)
    gkl = torch.ones(64, device="cuda")

    def both():
        z, kl = ops.gaussian_fwd(*args)
        return z, kl, *ops.gaussian_bwd(z, gkl, *args)[:2]

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for _ in range(3):
        mu.normal_()
        graph.replay()
        assert all(torch.equal(c, w) for c, w in zip(captured, both()))


def test_torch_compile_takes_it_into_cuda_graphs(ops):
    """Nothing that the first call keeps lies in the graphs' memory pool, or torch refuses to go on."""
    _layout._tickets.clear()
    mu, rho = torch.randn(2, 64, 5000, device="cuda")
    seed = SEED.cuda()

    def step(mu, rho, seed):
        out = vaeops.reparam_kl(mu, rho, seed=seed, impl=ops.impl)
        return out.z * 2, out.kl

    compiled = torch.compile(step, mode="reduce-overhead")
    for _ in range(4):  # warms up, records, replays
        mu.normal_()
        torch.compiler.cudagraph_mark_step_begin()
        assert all(torch.equal(c, w) for c, w in zip(compiled(mu, rho, seed), step(mu, rho, seed)))


def test_nothing_synchronises(ops):
    mu, rho = torch.randn(2, 64, 5000, device="cuda")
    args = arguments(mu, rho)
    ops.gaussian_fwd(*args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        z, kl = ops.gaussian_fwd(*args)
        ops.gaussian_bwd(z, kl, *args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
