"""What only a GPU shows: the bits of noise and sums, streams, CUDA graphs. The interpreter does the rest."""

import math

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

import vaeops
from vaeops.kernels import _layout, gaussian, rng
from vaeops.ref import gaussian as ref

pytestmark = pytest.mark.gpu
SEED = torch.tensor([11, 2**33 - 1])


def arguments(mu, rho, prior=(None, None), reduction=3):
    return mu, rho, *prior, SEED.to(mu.device), None, 0, 0, -math.inf, math.inf, reduction, 1, 1.0


@pytest.mark.parametrize("shape", [(1 << 20,), (97,), (3, 1025)])
def test_noise_has_the_reference_bits(shape):
    want = vaeops.ref.rng.normal(shape, SEED)
    assert torch.equal(rng.normal(SEED.cuda(), list(shape)).cpu(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", range(6))
def test_values_and_gradients(dtype, reduction):
    mu, rho = torch.randn(2, 300, 20, device="cuda").to(dtype)
    prior = torch.randn(2, 20, device="cuda")
    args = arguments(mu, rho, prior, reduction)
    ours, want = gaussian.gaussian_fwd(*args), ref.gaussian_fwd(*args)
    torch.testing.assert_close(ours, want)
    cotangents = torch.randn_like(ours[0]), torch.randn_like(ours[1])
    got = gaussian.gaussian_bwd(*cotangents, *args)
    torch.testing.assert_close(tuple(got), tuple(ref.gaussian_bwd(*cotangents, *args)))


def test_sums_are_the_same_bits_every_time():
    mu, rho = torch.randn(2, 4096, 4096, device="cuda")
    prior = torch.randn(2, 4096, device="cuda")
    for reduction in (1, 2, 5):
        args = arguments(mu, rho, prior, reduction)
        first = gaussian.gaussian_fwd(*args)[1]
        gkl = torch.ones_like(first)
        grads = gaussian.gaussian_bwd(None, gkl, *args)[2:]
        for _ in range(20):
            assert torch.equal(gaussian.gaussian_fwd(*args)[1], first)
            assert all(torch.equal(a, b) for a, b in zip(gaussian.gaussian_bwd(None, gkl, *args)[2:], grads))


def test_streams_do_not_share_tickets():
    mu, rho = torch.randn(2, 1 << 22, device="cuda")
    args = arguments(mu, rho, reduction=5)
    want = gaussian.gaussian_fwd(*args)[1]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    got = []
    for _ in range(25):
        for stream in streams:
            with torch.cuda.stream(stream):
                got.append(gaussian.gaussian_fwd(*args)[1])
    torch.cuda.synchronize()
    assert all(torch.equal(g, want) for g in got)
    assert all(not t.any() for t in _layout._tickets.values())


def test_a_cuda_graph_replays_both_directions():
    mu, rho = torch.randn(2, 64, 5000, device="cuda")
    args = arguments(mu, rho, reduction=2)
    gkl = torch.ones(64, device="cuda")

    def both():
        z, kl = gaussian.gaussian_fwd(*args)
        return z, kl, *gaussian.gaussian_bwd(z, gkl, *args)[:2]

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for _ in range(3):
        mu.normal_()
        graph.replay()
        assert all(torch.equal(c, w) for c, w in zip(captured, both()))


def test_nothing_synchronises():
    mu, rho = torch.randn(2, 64, 5000, device="cuda")
    args = arguments(mu, rho)
    gaussian.gaussian_fwd(*args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        z, kl = gaussian.gaussian_fwd(*args)
        gaussian.gaussian_bwd(z, kl, *args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
