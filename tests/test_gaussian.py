"""The Gaussian family, in the six blocks: values, gradients, opcheck, compile, layouts, bad arguments."""

import math

import pytest
import torch
from budget import assert_within_budget

import vaeops
from vaeops import rng
from vaeops.ref import gaussian as ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SEED = torch.tensor([20_26, 11])
PRIORS = {"none": None, "dim": (-1,), "row": (0, 1), "scalar": (), "full": None}
INF = math.inf


def make(shape, dtype=torch.float32, param="logvar", spread=1.0):
    mu, rho = torch.randn(shape) * spread, torch.randn(shape) * spread
    return mu.to(dtype), (rho.exp() + 0.05 if param == "std" else rho).to(dtype)


def make_prior(kind, shape, dtype, param):
    if kind == "none":
        return None
    size = {"dim": shape[-1:], "row": (*shape[:1], *[1] * (len(shape) - 1)), "scalar": (), "full": shape}[
        kind
    ]
    mu, rho = make(size, dtype, param, 0.5)
    return mu, rho


def textbook(mu, rho, *, prior, param, clamp, reduction, batch_ndim, temperature, eps):
    """What a user writes today, in the dtype of the inputs throughout."""
    if clamp is not None:
        rho = rho.clamp(*clamp)
    logvar = {"logvar": rho, "logstd": 2 * rho, "std": 2 * rho.log()}[param]
    z = mu + temperature * torch.exp(0.5 * logvar) * eps.to(mu.dtype)
    if prior is None:
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp())
    else:
        prior_logvar = {"logvar": prior[1], "logstd": 2 * prior[1], "std": 2 * prior[1].log()}[param]
        ratio = (logvar - prior_logvar).exp()
        kl = -0.5 * (1 + logvar - prior_logvar - (mu - prior[0]).pow(2) / prior_logvar.exp() - ratio)
    return z, ref.reduce(kl, ref.REDUCTIONS.index(reduction), batch_ndim)


def run(function, tensors, cotangents, prior, **options):
    """Outputs and gradients of `function` for fresh leaves of `tensors`."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    priors = None if prior is None else tuple(p.clone().requires_grad_() for p in prior)
    outputs = function(*leaves, prior=priors, **options)[:2]
    torch.autograd.backward(outputs, [c.to(o.dtype) for c, o in zip(cotangents, outputs)])
    return [*outputs, *(t.grad for t in leaves), *(p.grad for p in priors or ())]


def check_against_reference(impl, shape, dtype, *, param="logvar", prior_kind="none", clamp=None,
                            reduction="batchmean", batch_ndim=1, temperature=1.0, noise="seed"):  # fmt: skip
    mu, rho = make(shape, dtype, param)
    prior = make_prior(prior_kind, shape, dtype, param)
    streams = shape[:batch_ndim]
    seed = rng.split(SEED, math.prod(streams)).view(*streams, 2) if noise == "streams" else SEED
    eps = rng.normal(shape, seed)
    options = {"param": param, "clamp": clamp, "reduction": reduction, "batch_ndim": batch_ndim,
               "temperature": temperature}  # fmt: skip
    given = {"eps": eps} if noise == "eps" else {"seed": seed}
    gz = torch.randn(shape).to(dtype)
    gkl = (
        torch.rand(
            ref.reduced_shape(mu.shape, ref.REDUCTIONS.index(reduction), batch_ndim), dtype=torch.float64
        )
        + 0.5
    )
    wide = lambda ts: None if ts is None else tuple(t.double() for t in ts)  # noqa: E731
    ours = run(vaeops.reparam_kl, (mu, rho), (gz, gkl), prior, impl=impl, **options, **given)
    exact = run(ref.reparam_kl, wide((mu, rho)), (gz.double(), gkl), wide(prior), eps=eps.double(), **options)
    eager = run(textbook, (mu, rho), (gz, gkl), prior, eps=eps, **options)
    for name, a, b, c in zip(("z", "kl", "d mu", "d rho", "d prior mu", "d prior rho"), ours, exact, eager):
        assert_within_budget(a, b, c, name, factor=2.0 if name in ("z", "kl") else 3.0)


# ---- values and gradients against fp64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ref.REDUCTIONS)
def test_reductions(isa, dtype, reduction):
    check_against_reference("cpp", (37, 29), dtype, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param", ref.PARAMS)
@pytest.mark.parametrize("prior", PRIORS)
def test_parametrisations_and_priors(isa, dtype, param, prior):
    check_against_reference(
        "cpp", (31, 40), dtype, param=param, prior_kind=prior, reduction="sample", temperature=0.7
    )


@pytest.mark.parametrize("noise", ["seed", "eps", "streams"])
@pytest.mark.parametrize("clamp", [None, (-1.0, 0.5), (-INF, 0.0)])
@pytest.mark.parametrize("batch_ndim", [0, 1, 2, 3])
def test_clamp_noise_and_batch_dims(isa, noise, clamp, batch_ndim):
    for reduction in ("sample", "dim", "batchmean"):
        check_against_reference("cpp", (5, 3, 17), torch.float32, clamp=clamp, noise=noise,
                                batch_ndim=batch_ndim, reduction=reduction)  # fmt: skip


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 63), (97, 7), (3, 1025), (2, 17_000), (40, 700), (3, 4, 33, 20), (1025, 3)]
)
@pytest.mark.parametrize("reduction", ["sample", "dim", "batchmean"])
def test_sizes(isa, shape, reduction):
    check_against_reference("cpp", shape, torch.float32, reduction=reduction)
    check_against_reference("cpp", shape, torch.float32, reduction=reduction, prior_kind="dim")


@pytest.mark.parametrize("shape", [(300, 192), (250, 320), (90, 768), (300, 64), (40, 1024), (12, 2, 16_384)])
def test_rows_that_do_and_do_not_fit_tasks(isa, shape):
    """Rows of whole vectors take paths of their own; more elements than a task, packed and not."""
    for batch_ndim in range(1, len(shape)):
        check_against_reference("cpp", shape, torch.float32, reduction="sample", batch_ndim=batch_ndim)
        moments = torch.randn(2, *shape).movedim(0, -2).flatten(-2)
        mu, logvar = moments.chunk(2, -1)
        options = {"seed": SEED, "reduction": "sample", "batch_ndim": batch_ndim}
        expected = vaeops.reparam_kl(mu.contiguous(), logvar.contiguous(), **options)
        got = vaeops.reparam_kl_packed(moments, dim=-1, **options)
        assert torch.equal(got.z, expected.z) and torch.equal(got.kl, expected.kl)


@pytest.mark.parametrize("reduction", ref.REDUCTIONS)
@pytest.mark.parametrize("param", ref.PARAMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_prob(isa, dtype, param, reduction):
    (mu, rho), x = make((13, 70), dtype, param), torch.randn(13, 70).to(dtype)
    code = ref.REDUCTIONS.index(reduction)
    cotangent = torch.rand(ref.reduced_shape(x.shape, code, 1), dtype=torch.float64) + 0.5

    def eager(x, mu, rho, **_):
        sigma = {"logvar": (0.5 * rho).exp(), "logstd": rho.exp(), "std": rho}[param]
        element = -((x - mu) ** 2) / (2 * sigma**2) - sigma.log() - math.log(math.sqrt(2 * math.pi))
        return (ref.reduce(element, code, 1),)

    def one(f, **kw):
        return lambda *t, prior=None: (f(*t, param=param, reduction=reduction, **kw),)

    tensors = (x, mu, rho)
    ours = run(one(vaeops.gaussian_log_prob), tensors, (cotangent,), None)
    exact = run(one(ref.gaussian_log_prob), tuple(t.double() for t in tensors), (cotangent,), None)
    theirs = run(eager, tensors, (cotangent,), None)
    for name, a, b, c in zip(("log p", "d x", "d mu", "d rho"), ours, exact, theirs):
        assert_within_budget(a, b, c, name, factor=2.0 if name == "log p" else 3.0)


def test_log_prob_agrees_with_torch_distributions():
    (mu, std), x = make((6, 9), torch.float64, "std"), torch.randn(6, 9, dtype=torch.float64)
    expected = torch.distributions.Normal(mu, std).log_prob(x).sum(1)
    torch.testing.assert_close(vaeops.gaussian_log_prob(x, mu, std, param="std"), expected)


def test_kl_agrees_with_torch_distributions():
    (mu, std), (mu_p, std_p) = make((6, 9), torch.float64, "std"), make((9,), torch.float64, "std")
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, std), normal(mu_p, std_p)).sum(1)
    kl = vaeops.gaussian_kl(mu, std, prior=(mu_p, std_p), param="std", reduction="sample")
    torch.testing.assert_close(kl, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
def test_kl_near_the_prior_does_not_cancel(isa, dtype, scale):
    mu, logvar = (torch.randn(64, 256) * scale).to(dtype), (torch.randn(64, 256) * scale).to(dtype)
    kl = vaeops.gaussian_kl(mu, logvar, reduction="sum")
    exact = ref.gaussian_kl(mu.double(), logvar.double(), reduction="sum")
    assert abs(float(kl) - float(exact)) <= 1e-6 * float(exact)
    if scale == 1e-4:
        eager = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum()
        assert abs(float(eager) - float(exact)) > 0.1 * float(
            exact
        )  # what this replaces is wrong in its first digit
    assert bool((vaeops.gaussian_kl(mu, logvar, reduction="none") >= 0).all())


def test_z_is_the_same_bits_on_every_instruction_set(isa):
    mu, logvar = make((200, 77))
    extreme = torch.cat(
        (logvar.flatten()[:-8] * 30, torch.tensor([-300.0, 177.0, 176.9, 300.0, 0.0, -0.0, 1e-40, -174.0]))
    )
    for rho in (logvar, extreme.view(200, 77)):
        z = vaeops.reparameterize(mu, rho, seed=SEED, impl="cpp")
        from vaeops import _host, _native

        path = str(_native.path("_ops_cpu"))
        _host.set_isa(path, "scalar")
        assert torch.equal(z, vaeops.reparameterize(mu, rho, seed=SEED, impl="cpp"))
        _host.set_isa(path, isa)


def test_extreme_log_variances(isa):
    logvar = torch.tensor([[-INF, -1e9, -400.0, -104.0, 88.0, 176.0, 177.4, 200.0, INF, math.nan]])
    mu = torch.zeros_like(logvar)
    eps = torch.ones_like(logvar)
    z, kl, _ = vaeops.reparam_kl(mu, logvar, eps=eps, reduction="none")
    sigma = (0.5 * logvar.double()).exp().float().double()
    # Half a power of two below overflow, above 176.7, the polynomial is asked beyond its range.
    torch.testing.assert_close(z.double(), sigma, equal_nan=True, rtol=1e-5, atol=1e-44)
    torch.testing.assert_close(z[:, :6].double(), sigma[:, :6], rtol=2e-7, atol=1e-44)
    exact = (0.5 * ref.expm1_gap(logvar.double())).float()
    torch.testing.assert_close(kl, exact, equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("param", "extreme"), [("std", [0.0, -1.0, 1e-30]), ("logvar", [100.0, -400.0]), ("logstd", [80.0])]
)
@pytest.mark.parametrize("with_prior", [False, True])
def test_the_samples_gradient_needs_no_kl(isa, dtype, param, extreme, with_prior):
    """Where the KL of an element is infinite, the sample's gradient is not: the KL takes no part in it."""
    rho = torch.tensor([(extreme * 70)[:70]] * 2, dtype=dtype)
    mu, eps = torch.randn(2, 70).to(dtype), torch.randn(2, 70)
    prior = (torch.zeros(70, requires_grad=True), torch.ones(70, requires_grad=True)) if with_prior else None

    def gradients(impl):
        leaves = [t.clone().requires_grad_() for t in (mu, rho)]
        z = vaeops.reparam_kl(*leaves, prior=prior, param=param, eps=eps, reduction="sample", impl=impl).z
        return torch.autograd.grad(z.sum(), leaves)

    for ours, exact in zip(gradients("cpp"), gradients("ref")):
        assert bool(exact.isfinite().all())
        rtol = 2**-7 if dtype is torch.bfloat16 else 2e-5  # a unit in the last place of bf16
        torch.testing.assert_close(ours, exact, rtol=rtol, atol=0)


@pytest.mark.parametrize(("mu", "logvar"), [(1e-3, 1e-3), (1e-4, 0.0), (0.5, 0.5)])
@pytest.mark.parametrize("shape", [(4, 4096), (3, 5000), (2, 20000)])
def test_the_kl_of_equal_elements_does_not_drift(isa, mu, logvar, shape):
    """A collapsed posterior's elements are all alike: sums in one long chain would all round the same way."""
    mu, logvar = torch.full(shape, mu), torch.full(shape, logvar)
    for reduction in ("sum", "sample", "batchmean"):
        kl = vaeops.gaussian_kl(mu, logvar, reduction=reduction)
        exact = ref.gaussian_kl(mu.double(), logvar.double(), reduction=reduction)
        torch.testing.assert_close(kl.double(), exact, rtol=5e-7, atol=0)
    x = torch.full(shape, 0.3)
    nll = vaeops.gaussian_log_prob(x, mu, logvar, reduction="sample")
    exact = ref.gaussian_log_prob(x.double(), mu.double(), logvar.double(), reduction="sample")
    torch.testing.assert_close(nll.double(), exact, rtol=5e-7, atol=0)


def test_nan_and_inf_stay_in_their_row(isa):
    mu, logvar = make((6, 70))
    clean = vaeops.reparam_kl(mu, logvar, seed=SEED, reduction="sample")
    mu[2, 3], logvar[4, 5] = math.nan, math.inf
    z, kl, _ = vaeops.reparam_kl(mu, logvar, seed=SEED, reduction="sample")
    rows = [0, 1, 3, 5]
    assert torch.equal(z[rows], clean.z[rows]) and torch.equal(kl[rows], clean.kl[rows])
    assert kl[2].isnan() and kl[4].isinf()


def test_results_do_not_depend_on_batch_threads_or_neighbours():
    mu, logvar = make((64, 700))
    seed = rng.split(SEED, 64)
    z, kl, _ = vaeops.reparam_kl(mu, logvar, seed=seed, reduction="sample")
    part = vaeops.reparam_kl(mu[10:13], logvar[10:13], seed=seed[10:13], reduction="sample")
    assert torch.equal(part.z, z[10:13]) and torch.equal(part.kl, kl[10:13])
    threads = torch.get_num_threads()
    for reduction in ref.REDUCTIONS:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(vaeops.gaussian_kl(mu, logvar, reduction=reduction))
        torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("reduction", ref.REDUCTIONS)
def test_gradcheck_and_gradgradcheck(reduction):
    mu, rho = (t.requires_grad_() for t in make((4, 5), torch.float64))
    prior = tuple(t.requires_grad_() for t in make((5,), torch.float64))

    def f(mu, rho, *prior):
        return vaeops.reparam_kl(mu, rho, prior=prior or None, seed=SEED, reduction=reduction)[:2]

    assert torch.autograd.gradcheck(f, (mu, rho), check_forward_ad=True, check_batched_grad=False)
    assert torch.autograd.gradcheck(f, (mu, rho, *prior), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (mu, rho, *prior))


@pytest.mark.parametrize("param", ["logstd", "std"])
def test_gradcheck_of_other_parametrisations(param):
    mu, rho = (t.requires_grad_() for t in make((3, 4), torch.float64, param))
    prior = tuple(t.requires_grad_() for t in make((3, 1), torch.float64, param))
    moments = torch.randn(2, 6, 3, dtype=torch.float64).exp().requires_grad_()

    def f(mu, rho, *prior):
        return vaeops.reparam_kl(
            mu, rho, prior=prior, param=param, seed=SEED, clamp=(-0.5, 0.9), temperature=0.5
        )[:2]

    def packed(moments):
        return vaeops.reparam_kl_packed(moments, param=param, seed=SEED)[:2]

    def log_prob(*args):
        return vaeops.gaussian_log_prob(*args, param=param)

    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for function, inputs in ((f, (mu, rho, *prior)), (packed, (moments,)), (log_prob, (x, mu, rho))):
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_only_what_is_asked_for_gets_a_gradient():
    mu, logvar = make((5, 6))
    leaf = mu.clone().requires_grad_()
    vaeops.reparam_kl(leaf, logvar, seed=SEED).kl.backward()
    torch.testing.assert_close(leaf.grad, mu / 5)
    leaf.grad = None
    vaeops.reparameterize(leaf, logvar, seed=SEED).sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(mu))
    prior = tuple(t.requires_grad_() for t in make((6,)))
    z = vaeops.reparam_kl(leaf, logvar, prior=prior, seed=SEED).z
    grads = torch.autograd.grad(z.sum(), prior, allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


def test_clamp_gradient_is_torch_clamps():
    rho = torch.tensor([[-31.0, -30.0, 0.0, 20.0, 21.0]])
    ours, theirs = rho.clone().requires_grad_(), rho.clone().requires_grad_()
    vaeops.gaussian_kl(torch.zeros_like(rho), ours, clamp=(-30, 20), reduction="sum").backward()
    ref.gaussian_kl(torch.zeros_like(rho), theirs, clamp=(-30, 20), reduction="sum").backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad[0, 0] == 0 and ours.grad[0, 4] == 0 and ours.grad[0, 1] == -0.5


def test_memory_kept_for_backward_is_the_inputs():
    mu, logvar = (t.requires_grad_() for t in make((64, 32)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vaeops.reparam_kl(mu, logvar)
    assert sum(t.numel() * t.element_size() for t in kept) == 2 * mu.numel() * 4 + 16


def test_no_grad_keeps_nothing():
    mu, logvar = (t.requires_grad_() for t in make((4, 4)))
    for context in (torch.no_grad, torch.inference_mode):
        with (
            context(),
            torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("kept a tensor"), lambda t: t),
        ):
            z, kl, _ = vaeops.reparam_kl(mu, logvar)
        assert z.grad_fn is None and not kl.requires_grad


# ---- opcheck


def _op_arguments():
    mu, rho = make((6, 10))
    packed = torch.randn(3, 8, 5)
    prior = make((10,))
    options = (0, 0, -INF, INF, 3, 1, 1.0)
    seed = SEED
    yield "plain", (mu, rho, None, None, seed, None, *options)
    yield "transposed", (make((10, 6))[0].t(), make((10, 6))[0].t(), *prior, seed, None, *options)
    yield "no rows", (mu[:0], rho[:0], None, None, seed, None, *options)
    yield "packed", (packed, None, None, None, seed, None, 1, 0, -30.0, 20.0, 2, 1, 1.0)
    yield "kl only", (mu, rho, *prior, None, None, 0, 1, -INF, INF, 1, 1, 1.0)
    yield "z only", (mu, rho, None, None, None, torch.randn(6, 10), 0, 0, -INF, INF, ref.NO_KL, 1, 0.5)


@pytest.mark.parametrize(
    ("name", "args"), list(_op_arguments()), ids=lambda a: a if isinstance(a, str) else ""
)
@pytest.mark.parametrize("overload", ["default", "ref", "cpp"])
def test_opcheck(name, args, overload):
    torch.library.opcheck(getattr(torch.ops.vaeops.gaussian_fwd, overload), args)
    mu = args[0] if args[1] is not None else args[0].chunk(2, args[6])[0]
    reduction, batch_ndim = args[10], args[11]
    sampled = args[4] is not None or args[5] is not None
    gkl = None if reduction == ref.NO_KL else torch.rand(ref.reduced_shape(mu.shape, reduction, batch_ndim))
    gz = torch.randn(mu.shape) if sampled else None
    torch.library.opcheck(getattr(torch.ops.vaeops.gaussian_bwd, overload), (gz, gkl, *args))


def test_opcheck_log_prob():
    x, (mu, rho) = torch.randn(6, 10), make((6, 10))
    for overload in ("default", "ref", "cpp"):
        torch.library.opcheck(
            getattr(torch.ops.vaeops.gaussian_log_prob_fwd, overload), (x, mu, rho, 0, 2, 1)
        )
        torch.library.opcheck(
            getattr(torch.ops.vaeops.gaussian_log_prob_bwd, overload), (torch.rand(6), x, mu, rho, 0, 2, 1)
        )


# ---- layouts


def _layouts():
    yield "contiguous", lambda s: torch.randn(s)
    yield "sliced", lambda s: torch.randn(*s[:-1], 2 * s[-1] + 1)[..., 1 : s[-1] + 1]
    yield "every second", lambda s: torch.randn(*s[:-1], 2 * s[-1])[..., ::2]
    yield "transposed", lambda s: torch.randn(s[::-1]).permute(*range(len(s))[::-1])
    yield "expanded batch", lambda s: torch.randn(1, *s[1:]).expand(s)
    yield "expanded inside", lambda s: torch.randn(s[0], 1, *s[2:]).expand(s)
    yield "offset", lambda s: torch.randn(math.prod(s) + 3)[3:].view(s)


@pytest.mark.parametrize(("name", "layout"), list(_layouts()), ids=lambda a: a if isinstance(a, str) else "")
@pytest.mark.parametrize("shape", [(5, 6, 7), (3, 4, 33, 34), (2, 3, 4, 5, 6)])
def test_layouts(isa, name, layout, shape):
    mu, rho = layout(shape), torch.randn(shape)
    prior = (layout(shape), layout(shape))
    gz = layout(shape)
    for a, b in ((mu, rho), (rho, mu)):
        got = run_strided(a, b, prior, gz, "cpp")
        expected = run_strided(
            a.contiguous(), b.contiguous(), tuple(p.contiguous() for p in prior), gz.contiguous(), "cpp"
        )
        for x, y in zip(got, expected):
            assert torch.equal(x, y), name


def run_strided(mu, rho, prior, gz, impl):
    """Outputs and gradients by the low-level ops, which see the strides as they are."""
    options = (0, 0, -INF, INF, 2, 1, 1.0)
    fwd, bwd = getattr(torch.ops.vaeops.gaussian_fwd, impl), getattr(torch.ops.vaeops.gaussian_bwd, impl)
    z, kl = fwd(mu, rho, *prior, SEED, None, *options)
    grads = bwd(gz, torch.linspace(0.5, 1, mu.shape[0]), mu, rho, *prior, SEED, None, *options)
    return z, kl, *grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("streams", [(), (5,)])
@pytest.mark.parametrize("shape", [(5, 8, 5, 6), (5, 8, 16, 16), (5, 5, 13, 11), (5, 12, 64, 41)])
def test_channels_last_keeps_its_format_and_its_noise(isa, shape, streams, dtype):
    plain = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(2)]
    last = [
        t.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        for t in (plain[0], plain[1])
    ]
    seed = rng.split(SEED, 5) if streams else SEED
    gz, gkl = torch.randn(shape).to(dtype), torch.rand(5)
    outputs = []
    for leaves in (plain, last):
        z, kl, _ = vaeops.reparam_kl(*leaves, seed=seed, reduction="sample")
        torch.autograd.backward([z, kl], [gz.to(memory_format=torch.channels_last), gkl.to(kl.dtype)])
        outputs.append((z, kl))
    (z, kl), (z_last, kl_last) = outputs
    assert z_last.is_contiguous(memory_format=torch.channels_last) and torch.equal(z, z_last)
    torch.testing.assert_close(kl_last, kl, rtol=1e-6, atol=0)  # summed in the order of memory
    for a, b in zip(plain, last):
        assert b.grad.is_contiguous(memory_format=torch.channels_last) and torch.equal(a.grad, b.grad)


def test_packed_channels_last_is_packed():
    moments = torch.randn(2, 8, 16, 16)
    last = moments.contiguous(memory_format=torch.channels_last)
    runs = [vaeops.reparam_kl_packed(m, seed=SEED, reduction="sample") for m in (moments, last)]
    assert torch.equal(runs[0].z, runs[1].z)
    torch.testing.assert_close(runs[0].kl, runs[1].kl, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_is_the_two_halves(isa, dim, dtype):
    moments = torch.randn(6, 8, 10, dtype=dtype).requires_grad_()
    twin = moments.detach().clone().requires_grad_()
    options = {"seed": SEED, "clamp": (-1, 1), "reduction": "sample"}
    a = vaeops.reparam_kl_packed(moments, dim=dim, **options)
    b = vaeops.reparam_kl(*twin.chunk(2, dim), **options)
    assert torch.equal(a.z, b.z) and torch.equal(a.kl, b.kl)
    gz = torch.randn_like(a.z)
    torch.autograd.backward([a.z, a.kl], [gz, torch.ones_like(a.kl)])
    torch.autograd.backward([b.z, b.kl], [gz, torch.ones_like(b.kl)])
    assert torch.equal(moments.grad, twin.grad)


def test_samples_of_one_posterior_are_an_expanded_mu():
    mu, logvar = (t.requires_grad_() for t in make((5, 8)))
    z, kl, _ = vaeops.reparam_kl(
        mu.expand(7, 5, 8), logvar.expand(7, 5, 8), seed=SEED, batch_ndim=2, reduction="sample"
    )
    assert (
        z.shape == (7, 5, 8)
        and kl.shape == (7, 5)
        and torch.equal(kl[0], kl[6])
        and not torch.equal(z[0], z[1])
    )
    z.sum().backward()
    torch.testing.assert_close(mu.grad, torch.full((5, 8), 7.0))


@pytest.mark.parametrize("reduction", ref.REDUCTIONS)
@pytest.mark.parametrize("impl", ["cpp", "ref"])
def test_no_rows_give_an_empty_sample_and_no_loss(reduction, impl):
    mu, logvar = (torch.randn(0, 6, requires_grad=True) for _ in range(2))
    z, kl, _ = vaeops.reparam_kl(mu, logvar, reduction=reduction, impl=impl)
    assert z.shape == (0, 6)
    assert kl.shape == torch.Size(ref.reduced_shape(mu.shape, ref.REDUCTIONS.index(reduction), 1))
    assert float(kl.detach().sum()) == 0
    (z.sum() + kl.sum()).backward()
    assert mu.grad.shape == (0, 6)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """A row of 2^31 + 64 elements, one block expanded by stride tricks; z in fp16 is the one large tensor."""
    n = 2**31 + 64
    mu = torch.zeros(1, 1, dtype=torch.float16).expand(1, n)
    z, kl = torch.ops.vaeops.gaussian_fwd.cpp(mu, mu, None, None, SEED, None, 0, 0, -INF, INF, 5, 1, 1.0)
    assert float(kl) == 0
    tail = rng.normal((64,), rng.advance(SEED, 2**31))
    assert torch.equal(z[0, -64:], tail.half())


# ---- bad arguments: the same check and text in eager and under compile

MU = torch.zeros(3, 4)
CASES = [
    (lambda: vaeops.reparam_kl([1.0], MU), TypeError, "mu must be a tensor, got list"),
    (lambda: vaeops.reparam_kl(MU, None), TypeError, "logvar must be a tensor, got NoneType"),
    (
        lambda: vaeops.reparam_kl(MU.long(), MU.long()),
        TypeError,
        "mu must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    (
        lambda: vaeops.reparam_kl(MU, MU.double()),
        TypeError,
        "logvar must have mu's dtype torch.float32, got torch.float64",
    ),
    (
        lambda: vaeops.reparam_kl(MU, torch.zeros(3, 5)),
        ValueError,
        r"logvar \[3, 5\] does not broadcast with mu \[3, 4\]",
    ),
    (lambda: vaeops.reparam_kl(MU, MU.to("meta")), ValueError, "logvar is on meta"),
    (lambda: vaeops.reparam_kl(MU, MU, param="sigma"), ValueError, "param must be one of"),
    (lambda: vaeops.reparam_kl(MU, MU, reduction="avg"), ValueError, "reduction must be one of"),
    (lambda: vaeops.reparam_kl(MU, MU, batch_ndim=3), ValueError, r"batch_ndim must be in \[0, 2\]"),
    (lambda: vaeops.reparam_kl(MU, MU, batch_ndim=1.0), TypeError, "batch_ndim must be an int"),
    (
        lambda: vaeops.reparam_kl(MU, MU, temperature=-1.0),
        ValueError,
        "temperature must be finite and >= 0, got -1.0",
    ),
    (
        lambda: vaeops.reparam_kl(MU, MU, temperature=math.nan),
        ValueError,
        "temperature must be finite and >= 0, got nan",
    ),
    (lambda: vaeops.reparam_kl(MU, MU, temperature="1"), TypeError, "temperature must be a float, got str"),
    (lambda: vaeops.reparam_kl(MU, MU, clamp=(1, -1)), ValueError, "clamp must have lo <= hi"),
    (lambda: vaeops.reparam_kl(MU, MU, clamp=3), TypeError, "clamp must be None or two floats"),
    (lambda: vaeops.reparam_kl(MU, MU, prior=MU), TypeError, "prior must be None or two tensors"),
    (
        lambda: vaeops.reparam_kl(MU, MU, prior=(MU.long(), MU.long())),
        TypeError,
        "prior must be floating point",
    ),
    (
        lambda: vaeops.reparam_kl(MU, MU, prior=(torch.zeros(5), torch.zeros(5))),
        ValueError,
        "prior .* does not broadcast",
    ),
    (
        lambda: vaeops.reparam_kl(MU, MU, prior=(torch.zeros(2, 3, 4),) * 2),
        ValueError,
        "prior .* does not broadcast",
    ),
    (lambda: vaeops.reparam_kl(MU, MU, seed=torch.zeros(2)), TypeError, "seed must be int64"),
    (lambda: vaeops.reparam_kl(MU, MU, seed=SEED[:1]), ValueError, r"seed must have shape \[2\]"),
    (lambda: vaeops.reparam_kl(MU, MU, seed=SEED.expand(4, 2)), ValueError, "leading batch dims"),
    (
        lambda: vaeops.reparam_kl(MU, MU, seed=SEED.expand(3, 4, 2)),
        ValueError,
        "leading batch dims|more stream dims",
    ),
    (lambda: vaeops.reparam_kl(MU, MU, seed=SEED.to("meta")), ValueError, "seed is on meta"),
    (
        lambda: vaeops.reparam_kl(MU, MU, seed=SEED, eps=MU),
        ValueError,
        "give one of seed, generator and eps, got seed and eps",
    ),
    (
        lambda: vaeops.reparam_kl(MU, MU, eps=torch.zeros(3)),
        ValueError,
        "eps must have the shape of the sample",
    ),
    (lambda: vaeops.reparam_kl(MU, MU, eps=MU.long()), TypeError, "eps must be floating point"),
    (lambda: vaeops.reparam_kl(MU, MU, eps=MU.clone().requires_grad_()), ValueError, "eps gets no gradient"),
    (lambda: vaeops.reparam_kl(MU, MU, impl="gpu"), ValueError, "impl must be None or one of"),
    (
        lambda: vaeops.reparam_kl(MU, MU, impl="cuda"),
        ValueError,
        "impl='cuda' cannot run on cpu tensors here: .*cpp: can run",
    ),
    (
        lambda: vaeops.reparam_kl_packed(torch.zeros(3, 5)),
        ValueError,
        "moments must have an even size along dim 1",
    ),
    (lambda: vaeops.reparam_kl_packed(MU, dim=2), ValueError, r"dim must be in \[-2, 1\]"),
    (lambda: vaeops.reparam_kl_packed(MU, dim="1"), TypeError, "dim must be an int"),
    (lambda: vaeops.reparam_kl_packed("x"), TypeError, "moments must be a tensor"),
    (lambda: vaeops.gaussian_log_prob(MU, MU, MU.double()), TypeError, "logvar must have mu's dtype"),
    (lambda: vaeops.gaussian_log_prob(torch.zeros(5), MU, MU), ValueError, "mu .* does not broadcast with x"),
]


@pytest.mark.parametrize(("call", "error", "text"), CASES)
def test_bad_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize(("call", "error", "text"), CASES)
def test_bad_arguments_under_compile(call, error, text):
    torch._dynamo.reset()
    with pytest.raises(Exception, match=text):
        torch.compile(call, fullgraph=True, backend="eager")()


def test_an_unknown_generator_raises_under_compile_with_advice():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(Exception, match=r"draw the seed outside .* pass seed="):
        torch.compile(
            lambda m: vaeops.reparam_kl(m, m, generator=generator), fullgraph=True, backend="eager"
        )(MU)
    with pytest.raises(ValueError, match="generator is on"):
        vaeops.reparam_kl(MU.to("meta"), MU.to("meta"), generator=generator)


@pytest.mark.parametrize("reduction", ref.REDUCTIONS)
def test_each_half_alone_has_the_bits_of_both(isa, reduction):
    mu, rho = make((40, 70))
    prior = make((70,))
    z, kl, _ = vaeops.reparam_kl(mu, rho, prior=prior, seed=SEED, reduction=reduction)
    assert torch.equal(vaeops.reparameterize(mu, rho, seed=SEED), z)
    assert torch.equal(vaeops.gaussian_kl(mu, rho, prior=prior, reduction=reduction), kl)
    z, kl, _ = vaeops.reparam_kl(mu, rho, seed=SEED, reduction=reduction)
    assert torch.equal(vaeops.reparameterize(mu, rho, seed=SEED), z)
    assert torch.equal(vaeops.gaussian_kl(mu, rho, reduction=reduction), kl)


def test_large_outputs_are_reused_and_given_back():
    vaeops.empty_cache()
    mu, logvar = make((1024, 1024))
    z = vaeops.reparameterize(mu, logvar, seed=SEED)
    expected, address = z.clone(), z.data_ptr()
    assert vaeops.empty_cache() == 0  # in use, so not in the cache
    del z
    again = vaeops.reparameterize(mu, logvar, seed=SEED)
    assert again.data_ptr() == address and torch.equal(again, expected)
    del again
    assert vaeops.empty_cache() == expected.numel() * 4
    assert vaeops.empty_cache() == 0


def test_no_more_than_512_mib_are_kept():
    vaeops.empty_cache()
    rho = torch.zeros(10, 1 << 20)
    held = [vaeops.reparameterize(rho, rho, seed=SEED) for _ in range(14)]
    total = sum(z.numel() * 4 for z in held)
    assert total > 512 << 20
    held.clear()
    assert 0 < vaeops.empty_cache() <= 512 << 20
