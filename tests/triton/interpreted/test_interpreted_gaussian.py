"""The Gaussian step: values and gradients against fp64, over options, priors, layouts and sizes."""

import itertools
import math

import pytest
import torch
from budget import assert_within_budget
from torch.utils._python_dispatch import TorchDispatchMode

import vaeops
from vaeops.kernels import _layout, gaussian
from vaeops.ops._library import why_not
from vaeops.ops.gaussian.reparam_kl import _fake_bwd, _fake_fwd
from vaeops.ref import gaussian as ref

SEED = torch.tensor([11, 2**33 - 1])
INF = math.inf
# The interpreter truncates to bf16 where a GPU rounds: one ulp more. In fp64 the reference is inexact, too.
ALLOWANCE = {torch.bfloat16: 1, torch.float64: 16}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def inputs(*shape, dtype=torch.float32, param=0):
    generator = torch.Generator().manual_seed(hash((shape, param)) & 0xFFFF)
    mu, rho = (torch.randn(shape, generator=generator) for _ in range(2))
    return mu.to(dtype), (rho.exp() if param == 2 else rho).to(dtype)


def doubled(args):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def check_step(mu, rho, prior=(None, None), *, seed=SEED, eps=None, packed_dim=0, param=0, clamp=(-INF, INF),
               reduction=3, batch_ndim=1, temperature=1.0, gz=None):  # fmt: skip
    """Both launchers against the reference; their outputs' shapes, dtypes and strides against the fakes."""
    args = (mu, rho, *prior, seed, eps, packed_dim, param, *clamp, reduction, batch_ndim, temperature)
    ours, exact = gaussian.gaussian_fwd(*args), ref.gaussian_fwd(*doubled(args))
    check_outputs(("z", "kl"), ours, ref.gaussian_fwd(*args), exact, _fake_fwd(*args), 2)
    generator = torch.Generator().manual_seed(5)
    z, kl = ours
    if z is not None and gz is None:
        gz = torch.randn(z.shape, generator=generator).to(z.dtype)
    gkl = None if kl is None else torch.randn(kl.shape, generator=generator, dtype=kl.dtype)
    for g in ((gz, gkl), (gz, None), (None, gkl)):
        if g == (None, None):
            continue
        ours, exact = gaussian.gaussian_bwd(*g, *args), ref.gaussian_bwd(*doubled(g), *doubled(args))
        names = ("d mu", "d rho", "d prior_mu", "d prior_rho")
        check_outputs(names, ours, ref.gaussian_bwd(*g, *args), exact, _fake_bwd(*g, *args), 3)


def check_outputs(names, ours, eager, exact, fakes, factor):
    for name, o, e, x, fake in zip(names, ours, eager, exact, fakes, strict=True):
        assert (o is None) == (fake is None)
        if o is not None:
            assert (o.shape, o.dtype, o.stride()) == (fake.shape, fake.dtype, fake.stride())
            assert_within_budget(o, x, e, name, factor=factor + ALLOWANCE.get(o.dtype, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", range(-1, 6))
def test_reductions(reduction, dtype):
    check_step(*inputs(13, 20, dtype=dtype), reduction=reduction)


@pytest.mark.parametrize("param, clamp", list(itertools.product(range(3), [(-INF, INF), (0.25, 1.5)])))
@pytest.mark.parametrize("with_prior", [False, True])
def test_parameters_and_clamps(param, clamp, with_prior):
    prior = inputs(20, param=param) if with_prior else (None, None)
    check_step(*inputs(5, 20, param=param), prior, param=param, clamp=clamp, reduction=2, temperature=0.5)


def test_clamp_bounds_pass_the_gradient():
    rho = torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0]])
    args = (torch.zeros_like(rho), rho, None, None, None, None, 0, 0, -0.5, 0.5, 5, 1, 1.0)
    got = gaussian.gaussian_bwd(None, torch.ones(()), *args)[1]
    assert got.ne(0).tolist() == [[False, True, False, True, False]]  # 0 at rho = 0: expm1(0)


@pytest.mark.parametrize(
    "shape", [(), (4,), (5, 4), (5, 1), (6, 1, 1), (6, 5, 1), (6, 1, 4), (1, 5, 1), (6, 5, 4)]
)
@pytest.mark.parametrize("reduction", [0, 1, 2, 3])
def test_priors_broadcast(shape, reduction):
    check_step(*inputs(6, 5, 4), inputs(*shape), reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_priors_of_another_dtype(dtype):
    prior = inputs(20, dtype=dtype)
    check_step(*inputs(7, 20), prior)
    check_step(*inputs(7, 20, dtype=torch.float16), prior)


def test_a_prior_with_strides_of_its_own():
    p, s = inputs(4, 6)
    check_step(*inputs(3, 6, 4), (p.T, s.T))
    check_step(*inputs(3, 6, 4), (p[:1].T, s[:1].expand(4, 6).T[:, :1]))


@pytest.mark.parametrize("rows", [0, 1, 63, 97, 1025])
@pytest.mark.parametrize("reduction", [1, 2, 3])
def test_rows(rows, reduction):
    check_step(*inputs(rows, 3), inputs(3), reduction=reduction)
    check_step(*inputs(rows, 4), reduction=reduction)


@pytest.mark.parametrize(
    "shape, batch_ndim", [((0, 3), 1), ((3, 0), 1), ((2, 0, 3), 2), ((4,), 1), ((), 0), ((4, 3), 0)]
)
@pytest.mark.parametrize("reduction", range(6))
def test_degenerate_shapes(shape, batch_ndim, reduction):
    check_step(*inputs(*shape), reduction=reduction, batch_ndim=batch_ndim)


@pytest.mark.parametrize("reduction, prior", [(1, ()), (2, (1, 2500)), (5, (2, 1))])
def test_sums_over_several_programs(monkeypatch, reduction, prior):
    """A long row, a long total, and chunks of several tiles; the tickets are zero again afterwards."""
    check_step(*inputs(2, 2500), inputs(*prior), reduction=reduction)
    for limit in ("MAX_CHUNKS", "MAX_ROW_CHUNKS", "COLUMN_PROGRAMS"):
        monkeypatch.setattr(_layout, limit, 2)
    _layout.plan.cache_clear()
    check_step(*inputs(2, 2500), inputs(*prior), reduction=reduction)
    check_step(*inputs(700, 12), inputs(12), reduction=reduction)
    _layout.plan.cache_clear()
    assert all(not t.any() for t in _layout._tickets.values())


def test_kept_tickets_are_not_the_calling_thread_s(monkeypatch):
    """It may be allocating from the memory pool of a CUDA graph, where nothing may be kept."""
    monkeypatch.setattr(_layout, "_tickets", {})
    made = []

    class Watch(TorchDispatchMode):  # of one thread, as a pool is
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made.append(function)
            return function(*args, **(kwargs or {}))

    x = torch.empty(1)
    with Watch():
        found = _layout.tickets(x, 5)
    assert found.numel() >= 5 and not found.any() and not made
    assert _layout.tickets(x, 1000) is found and _layout.tickets(x, 2000) is not found


@pytest.mark.parametrize("cols", [5, 20, 1500])
def test_a_row_does_not_depend_on_the_others(cols):
    mu, rho = inputs(70, cols)
    options = (0, 0, -INF, INF, 2, 1, 1.0)
    whole = gaussian.gaussian_fwd(mu, rho, None, None, None, None, *options)[1]
    for part in (slice(0, 1), slice(3, 5), slice(64, 70)):
        assert torch.equal(
            gaussian.gaussian_fwd(mu[part], rho[part], None, None, None, None, *options)[1], whole[part]
        )


def test_nan_and_inf_stay_in_their_row():
    mu, rho = inputs(6, 20)
    mu[1, 3], rho[2, 4], mu[3, 0], rho[5, 2] = math.nan, math.nan, INF, -INF
    check_step(mu, rho, reduction=2)
    check_step(mu, rho, inputs(20), reduction=2)
    rho[4, 1] = INF
    z, kl = gaussian.gaussian_fwd(mu, rho, None, None, SEED, None, 0, 0, -INF, INF, 2, 1, 1.0)
    assert kl.isnan().tolist() == [False, True, True, False, False, False]
    assert kl.isinf().tolist() == [False, False, False, True, True, True]
    assert z.isnan().sum(1).tolist() == [0, 1, 1, 0, 0, 0]


def test_deviation_of_zero_and_below():
    rho = torch.tensor([[0.0, 1e-40, 1.0, 1e18, -1.0]])
    check_step(torch.full_like(rho, 0.5), rho, param=2, reduction=0)


def test_log_variance_over_the_whole_range():
    """The KL of fp32 overflows at a log-variance of 88.7, sigma at 177."""
    rho = torch.linspace(-230, 87, 635)[None]
    check_step(torch.zeros_like(rho), rho, reduction=0, eps=torch.ones_like(rho), seed=None)
    for first, last in ((80, 176), (180, 230)):
        rho = torch.linspace(first, last, 193)[None]
        one = torch.ones_like(rho)
        check_step(torch.zeros_like(rho), rho, reduction=-1, eps=one, seed=None, gz=one)


@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-4, 1e-6])
def test_kl_near_the_prior_does_not_cancel(scale):
    mu, rho = (scale * t for t in inputs(3, 200))
    args = (mu, rho, None, None, None, None, 0, 0, -INF, INF, 2, 1, 1.0)
    exact = ref.gaussian_fwd(*doubled(args))[1]
    assert ((gaussian.gaussian_fwd(*args)[1].double() - exact).abs() / exact).max() < 1e-6


LAYOUTS = {
    "half": lambda t: t.repeat(1, 1, 2, 1)[:, :, :4],
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "rows_of_a_wider_tensor": lambda t: (
        t.repeat(1, 2, 1, 1).flatten(1)[:, : t[0].numel()].unflatten(1, t.shape[1:])
    ),
    "window": lambda t: torch.nn.functional.pad(t, (1, 2, 3, 0))[:, :, 3:, 1:-2],
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "every_other": lambda t: t.repeat_interleave(2, 3)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", [0, 1, 2, 3])
def test_strided_inputs(layout, reduction):
    mu, rho = inputs(3, 5, 4, 6)
    strided = LAYOUTS[layout]
    assert torch.equal(strided(mu), mu) and not strided(mu).is_contiguous()
    check_step(strided(mu), strided(rho), reduction=reduction)
    check_step(strided(mu), rho, inputs(5, 1, 1), reduction=reduction, eps=inputs(3, 5, 4, 6)[0], seed=None)


@pytest.mark.parametrize("axis", range(3))
def test_expanded_inputs(axis):
    """K samples of one posterior, and broadcasts along any dim, read in place."""
    shape = (4, 5, 6)
    mu, rho = inputs(*shape)
    mu = mu.select(axis, 0).unsqueeze(axis).expand(shape)
    check_step(mu, rho.select(axis, 1).unsqueeze(axis).expand(shape), batch_ndim=2, reduction=2)
    check_step(mu, rho, inputs(6), reduction=3)


def test_an_expanded_gradient():
    check_step(*inputs(7, 20), gz=torch.tensor(0.5).expand(7, 20))


@pytest.mark.parametrize("dim", range(4))
def test_packed_moments(dim):
    q = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    check_step(q, None, packed_dim=dim, reduction=2)
    check_step(q.to(memory_format=torch.channels_last), None, inputs(2, 1, 1), packed_dim=1, reduction=1)


@pytest.mark.parametrize("shape", [(6, 16), (6, 7), (2, 3, 5), (6, 2, 3, 4)])
@pytest.mark.parametrize("reduction", [-1, 1, 2, 3])
def test_batched_seeds(shape, reduction):
    seeds = vaeops.rng.split(SEED, 6)
    check_step(*inputs(*shape), seed=seeds.view(2, 3, 2) if shape[0] == 2 else seeds, reduction=reduction)
    check_step(*inputs(*shape), inputs(*shape[1:]), seed=seeds[: shape[0]], reduction=reduction)


def test_streams_and_other_rows():
    """A seed per element, strided inputs, and streams that begin inside the rows of a prior's gradient."""
    images = [t.to(memory_format=torch.channels_last) for t in inputs(3, 4, 2, 2)]
    check_step(*images, seed=vaeops.rng.split(SEED, 3))
    check_step(*inputs(2, 3), seed=vaeops.rng.split(SEED, 6).view(2, 3, 2), reduction=-1, batch_ndim=0)
    seeds = vaeops.rng.split(SEED, 6).view(2, 3, 2)
    check_step(*inputs(2, 3, 5), inputs(3, 5), seed=seeds, reduction=3, batch_ndim=2)


def test_the_noise_is_the_stream():
    mu, rho = torch.zeros(9, 7), torch.zeros(9, 7)
    drawn = gaussian.gaussian_fwd(mu, rho, None, None, SEED, None, 0, 0, -INF, INF, -1, 0, 1.0)[0]
    assert torch.equal(drawn, vaeops.ref.rng.normal([9, 7], SEED))
    half = gaussian.gaussian_fwd(mu.half(), rho.half(), None, None, SEED, None, 0, 0, -INF, INF, -1, 0, 1.0)[
        0
    ]
    assert torch.equal(half, drawn.half())


def test_the_public_function_takes_it():
    mu, rho = (t.requires_grad_() for t in inputs(9, 20))
    moments = torch.randn(2, 6, 3, requires_grad=True)
    for function in (
        lambda impl: vaeops.reparam_kl(mu, rho, seed=SEED, impl=impl),
        lambda impl: vaeops.reparam_kl_packed(moments, seed=SEED, reduction="dim", impl=impl),
    ):
        ours, want = function("triton"), function("ref")
        torch.testing.assert_close((ours.z, ours.kl), (want.z, want.kl))
        leaves = [t for t in (mu, rho, moments) if function("ref").z.numel() == t.numel() or t is moments]
        leaves = [moments] if ours.z.dim() == 3 else [mu, rho]
        grads = [torch.autograd.grad(o.z.sin().sum() + (3 * o.kl).sum(), leaves) for o in (ours, want)]
        torch.testing.assert_close(*grads)


@pytest.mark.skipif(why_not("cpp", "cpu") is not None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("param", ["logvar", "logstd", "std"])
def test_samples_have_the_bits_of_the_cpu_kernels(param, dtype):
    mu, rho = inputs(41, 25, dtype=dtype, param=2)
    options = {"param": param, "seed": SEED, "temperature": 0.7, "clamp": (0.1, 9.0)}
    ours, cpu = (vaeops.reparam_kl(mu, 3 * rho, impl=impl, **options) for impl in ("triton", "cpp"))
    assert torch.equal(ours.z, cpu.z)
    rho = torch.linspace(-230, 180, 4097)[None]
    eps = torch.ones_like(rho)
    ours, cpu = (vaeops.reparameterize(0 * rho, rho, eps=eps, impl=impl) for impl in ("triton", "cpp"))
    assert torch.equal(ours, cpu)
