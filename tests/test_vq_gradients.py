"""Vector quantization: gradients; what transforms a function (compile, functorch, autocast); memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import vaeops
from vaeops.ops.vq import sample
from vaeops.ref import vq as ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SEED = torch.tensor([20_26, 11])


def textbook(x, e, *, metric="l2", estimator="ste", mask=None, channel_dim=-1, reduction="mean", stats=False):
    """What users write, in fp32 (fp64 for fp64) throughout."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, e.dtype), torch.float32)
    rows, codes = x.movedim(channel_dim, -1).to(dtype), e.to(dtype)
    indices = vaeops.vq_assign(x, e, metric=metric, channel_dim=channel_dim, impl="ref")
    used = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask
    q = codes[indices] * used.unsqueeze(-1)
    rows = rows * used.unsqueeze(-1)
    through = rows
    if estimator == "rotation":
        u, v = F.normalize(rows.detach(), dim=-1), F.normalize(q.detach(), dim=-1)
        t = F.normalize(u + v, dim=-1)
        dot = lambda a, b: (a * b).sum(-1, keepdim=True)  # noqa: E731
        turned = rows - 2 * dot(rows, t) * t + 2 * dot(rows, u) * v
        through = (
            turned * (q.norm(dim=-1, keepdim=True) / rows.norm(dim=-1, keepdim=True).clamp(min=1e-6)).detach()
        )
    quantized = q.detach() if estimator == "none" else through + (q - through).detach()

    def loss(a, b):
        error = F.mse_loss(a, b, reduction="none")
        return {"none": error.mean(-1), "sum": error.sum(), "mean": error.mean(-1).sum() / used.sum()}[
            reduction
        ]

    quantized = quantized.to(x.dtype).movedim(-1, channel_dim)
    return ref.VQOutput(quantized, indices, loss(rows, q.detach()), loss(q, rows.detach()), None, None)


def run(function, x, e, cotangents, **options):
    """(quantized, losses, dx, de) of fresh leaves."""
    x, e = x.clone().requires_grad_(), e.clone().requires_grad_()
    out = function(x, e, **options)
    outputs = [o for o in (out.quantized, out.commit_loss, out.codebook_loss) if o.requires_grad]
    wanted = [
        c for c, o in zip(cotangents, (out.quantized, out.commit_loss, out.codebook_loss)) if o.requires_grad
    ]
    torch.autograd.backward(outputs, [c.to(o.dtype).expand_as(o) for c, o in zip(wanted, outputs)])
    return out.quantized, out.commit_loss, out.codebook_loss, x.grad, e.grad


def check(impl, shape, k, x_dtype, e_dtype, dim=-1, masked=False, **options):
    x, e = torch.randn(shape).to(x_dtype), torch.randn(k, shape[dim]).to(e_dtype)
    rows = torch.empty(shape).movedim(dim, -1).shape[:-1]
    if masked:
        options["mask"] = torch.rand(rows) < 0.7
    loss_shape = rows if options.get("reduction") == "none" else ()
    cotangents = torch.randn(shape).to(x_dtype), torch.rand(loss_shape) + 0.5, torch.rand(loss_shape) - 2
    ours = run(vaeops.vector_quantize, x, e, cotangents, channel_dim=dim, impl=impl, **options)
    exact = run(ref.vector_quantize, x.double(), e.double(), cotangents, channel_dim=dim, **options)
    eager = run(textbook, x, e, cotangents, channel_dim=dim, **options)
    for name, a, b, c in zip(("quantized", "commit", "codebook", "d x", "d codebook"), ours, exact, eager):
        if b is None:
            assert a is None or not a.any(), name
        else:
            assert_within_budget(a, b, c, name, factor=3.0 if name.startswith("d ") else 2.0)


@pytest.mark.parametrize("estimator", ref.ESTIMATORS)
@pytest.mark.parametrize("reduction", ref.REDUCTIONS)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_gradients(impl, x_dtype, reduction, estimator):
    e_dtype = torch.float64 if x_dtype is torch.float64 else torch.float32
    options = {"reduction": reduction, "estimator": estimator}
    check(impl, (37, 9), 13, x_dtype, e_dtype, **options)
    check(impl, (2, 16, 5, 4), 11, x_dtype, e_dtype, dim=1, masked=True, stats=True, **options)
    check(impl, (50, 65), 7, x_dtype, e_dtype, masked=True, metric="cosine", **options)


@pytest.mark.parametrize(
    ("x_dtype", "e_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_gradients_of_mixed_dtypes(impl, x_dtype, e_dtype):
    for estimator in ref.ESTIMATORS:
        check(impl, (40, 12), 6, x_dtype, e_dtype, estimator=estimator, stats=True)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1025, 3), (5, 700)])
def test_gradients_of_odd_sizes(impl, shape):
    for estimator in ref.ESTIMATORS:
        check(impl, shape, 4, torch.float32, torch.float32, estimator=estimator)


def test_codebook_gradient_does_not_cancel(impl):
    """Codes that fit their rows, far from the origin: c e and S agree in most of their digits."""
    e = torch.randn(5, 16) + 100
    x = (e[:, None] + 0.01 * torch.randn(5, 200, 16)).flatten(0, 1)
    for stats in (False, True):
        for reduction in ref.REDUCTIONS:
            options = {"reduction": reduction, "stats": stats}
            cotangents = torch.zeros(1000, 16), torch.tensor(0.0), torch.tensor(1.5)
            ours = run(vaeops.vector_quantize, x, e, cotangents, impl=impl, **options)
            exact = run(ref.vector_quantize, x.double(), e.double(), cotangents, **options)
            eager = run(textbook, x, e, cotangents, **options)
            assert_within_budget(ours[4], exact[4], eager[4], "d codebook", factor=3.0)


@pytest.mark.parametrize("estimator", ref.ESTIMATORS)
@pytest.mark.parametrize("reduction", ref.REDUCTIONS)
def test_reference_is_the_textbook(estimator, reduction):
    x, e = torch.randn(30, 6, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    cotangents = torch.randn(30, 6), torch.tensor(0.7), torch.tensor(1.3)
    options = {"estimator": estimator, "reduction": reduction, "mask": torch.rand(30) < 0.7}
    for a, b in zip(
        run(ref.vector_quantize, x, e, cotangents, **options), run(textbook, x, e, cotangents, **options)
    ):
        torch.testing.assert_close(a, b)


def test_rotation_is_a_rotation_and_a_scaling(impl):
    """J, the Jacobian that the gradient belongs to, carries x to its code and keeps angles."""
    x, e = torch.randn(1, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    code = vaeops.vq_lookup(vaeops.vq_assign(x, e), e)
    columns = []
    for basis in torch.eye(5, dtype=torch.float64):
        leaf = x.clone().requires_grad_()
        vaeops.vector_quantize(leaf, e, estimator="rotation", impl=impl).quantized.backward(basis[None])
        columns.append(leaf.grad[0])
    jacobian = torch.stack(columns)
    torch.testing.assert_close(jacobian @ x[0], code[0])
    scale = (code.norm() / x.norm()) ** 2
    torch.testing.assert_close(jacobian @ jacobian.t(), scale * torch.eye(5, dtype=torch.float64))


def test_rotation_falls_back_to_straight_through(impl):
    e = torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, 0.0]])
    x = torch.tensor([[0.0, 0.0], [1e-7, 0.0], [-1.0, -2.0], [1.5, 2.0]], requires_grad=True)
    g = torch.randn(4, 2)
    indices = torch.tensor([0, 1, 0, 0])
    gx = getattr(torch.ops.vaeops.vq_gather_bwd, impl)(g, None, x.detach(), e, indices, 2)
    assert torch.equal(gx[:3], g[:3]) and not torch.equal(gx[3], g[3])
    assert bool(gx.isfinite().all())


def test_only_what_is_asked_for_gets_a_gradient(impl):
    x, e = torch.randn(12, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    out = vaeops.vector_quantize(x, e, stats=True, impl=impl)
    assert not any(t.requires_grad for t in (out.indices, out.counts, out.sums))
    grads = torch.autograd.grad(out.quantized.sum(), (x, e), allow_unused=True, retain_graph=True)
    assert torch.equal(grads[0], torch.ones_like(x)) and (grads[1] is None or not grads[1].any())
    grads = torch.autograd.grad(out.commit_loss, (x, e), allow_unused=True, retain_graph=True)
    assert grads[0].any() and (grads[1] is None or not grads[1].any())
    grads = torch.autograd.grad(out.codebook_loss, (x, e), allow_unused=True)
    assert grads[1].any() and (grads[0] is None or not grads[0].any())
    assert not vaeops.vector_quantize(x, e, estimator="none", impl=impl).quantized.requires_grad
    assert vaeops.vector_quantize(x.detach(), e, impl=impl).codebook_loss.requires_grad


def test_a_bad_row_keeps_the_codebooks_gradient_finite(impl):
    x, e = torch.randn(12, 4), torch.randn(5, 4, requires_grad=True)
    x[3, 1] = float("nan")
    vaeops.vector_quantize(x, e, impl=impl).codebook_loss.backward()
    assert bool(e.grad.isfinite().all()) and e.grad.any()


@pytest.mark.parametrize("reduction", ref.REDUCTIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_code_that_is_never_chosen_has_no_gradient(impl, reduction, bad):
    x, e = torch.randn(20, 4), torch.randn(6, 4)
    e[3, 0] = bad
    g = torch.randn(20) if reduction == "none" else torch.tensor(1.0)
    for f, which in ((vaeops.vector_quantize, impl), (ref.vector_quantize, "ref")):
        for stats in (False, True):
            leaf = e.clone().requires_grad_()
            out = f(x, leaf, reduction=reduction, stats=stats, impl=which)
            out.codebook_loss.backward(g)
            assert bool(leaf.grad.isfinite().all()) and not leaf.grad[3].any() and leaf.grad.any()


def test_quantized_and_masked_rows_are_exact_under_straight_through(impl):
    """x + (q - x) is not q; ours is, bit for bit."""
    x, e = torch.randn(300, 8) * 100, torch.randn(20, 8, requires_grad=True)
    out = vaeops.vector_quantize(x.requires_grad_(), e, impl=impl)
    assert torch.equal(out.quantized, e[out.indices])
    assert not torch.equal(x + (e[out.indices] - x), e[out.indices])


def test_memory_kept_for_backward():
    x, e = torch.randn(64, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vaeops.vector_quantize(x, e)
    assert sum(t.numel() * t.element_size() for t in kept) == 4 * (64 * 8 + 16 * 8) + 8 * 64
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vaeops.vq_lookup(torch.arange(5), e)
    assert sum(t.numel() * t.element_size() for t in kept) == 8 * 5


def test_no_grad_keeps_nothing():
    x, e = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    for context in (torch.no_grad, torch.inference_mode):
        with (
            context(),
            torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("kept a tensor"), lambda t: t),
        ):
            out = vaeops.vector_quantize(x, e, stats=True)
            looked_up = vaeops.vq_lookup(out.indices, e)
        assert not out.quantized.requires_grad and not looked_up.requires_grad


def test_codebook_may_be_updated_before_backward(impl):
    x, e = torch.randn(40, 6, requires_grad=True), torch.randn(9, 6)
    want = torch.autograd.grad(vaeops.vector_quantize(x, e, impl=impl).commit_loss, x)[0]
    out = vaeops.vector_quantize(x, e, stats=True, impl=impl)
    vaeops.vq_ema_(torch.ones(9), e.clone(), e, out.counts, out.sums, decay=0.5)
    assert torch.equal(torch.autograd.grad(out.commit_loss, x)[0], want)


@pytest.mark.parametrize("output", ["quantized", "commit_loss", "codebook_loss"])
@pytest.mark.parametrize("wrt", ["x", "codebook"])
def test_double_backward_says_that_there_is_none(output, wrt):
    x, e = torch.randn(12, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    leaf = {"x": x, "codebook": e}[wrt]
    out = vaeops.vector_quantize(x, e, estimator="rotation")
    # A cotangent that depends on x and the codebook, and one that does not.
    for scale in (x.square().sum() + e.square().sum(), 1.0):
        loss = (getattr(out, output).sum() * scale).square()
        grad = torch.autograd.grad(loss, leaf, create_graph=True, allow_unused=True)[0]
        if grad is not None and grad.requires_grad and (output == "codebook_loss") == (wrt == "codebook"):
            with pytest.raises(RuntimeError, match="vector_quantize: there is no double backward"):
                torch.autograd.grad(grad.sum(), leaf)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_lookup_gradients_of_any_order(impl, dim):
    e = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[4, 0, -1], [4, 2, 2]])

    def f(e):
        return vaeops.vq_lookup(indices, e, channel_dim=dim, fill=0.3, impl=impl)

    assert torch.autograd.gradcheck(f, e, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, e, check_fwd_over_rev=True)
    torch.testing.assert_close(f(e), ref.vq_lookup(indices, e, channel_dim=dim, fill=0.3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lookup_gradient_is_added_in_fp64(impl, dtype):
    e = torch.randn(3, 5).to(dtype).requires_grad_()
    indices, g = torch.randint(-1, 3, (4000,)), torch.randn(4000, 5).to(dtype)
    vaeops.vq_lookup(indices, e, impl=impl).backward(g)
    exact = torch.zeros(4, 5, dtype=torch.float64).index_add_(0, indices % 4, g.double())[:3]
    eager = torch.zeros(4, 5).to(dtype).index_add_(0, indices % 4, g)[:3]
    assert_within_budget(e.grad, exact, eager, "d codebook", factor=3.0)


# ---- transforms


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)  # inductor checks its own kernels for it
    yield
    torch._dynamo.reset()


def step(x, e, state, mask=None, **options):
    out = vaeops.vector_quantize(x * 1.5, e, mask=mask, stats=True, channel_dim=1, **options)
    vaeops.vq_ema_(*state, out.counts, out.sums)
    looked_up = vaeops.vq_lookup(out.indices, e, channel_dim=1)
    loss = (out.quantized * x.detach().cos()).sum() + out.commit_loss.sum() + 0.7 * out.codebook_loss.sum()
    return loss + looked_up.square().mean(), out.indices, vaeops.perplexity(out.counts)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("aot_eager", {}),
        ("aot_eager", {"reduction": "none", "estimator": "rotation", "deterministic": "bitwise"}),
        ("aot_eager", {"reduction": "sum", "estimator": "none", "metric": "cosine"}),
        ("inductor", {}),
    ],
)
def test_compile_fullgraph_dynamic_matches_eager(compiler, backend, options):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    for rows in (6, 9, 13):
        results = []
        for f in (compiled, step):
            torch.manual_seed(rows)
            x, e = torch.randn(rows, 4, 5, requires_grad=True), torch.randn(7, 4, requires_grad=True)
            state = torch.ones(7), torch.randn(7, 4), torch.randn(7, 4)
            loss, indices, perplexity = f(x, e, state, mask=torch.rand(rows, 5) < 0.8, **options)
            results.append((loss, indices, perplexity, *torch.autograd.grad(loss, (x, e)), *state))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)
        if rows == 6:
            first = len(graphs)  # Dynamo may trace twice to make a float of the options an input
    assert len(graphs) == first


def test_compile_of_the_other_functions(compiler):
    def f(x, e, state):
        scores, indices = vaeops.vq_topk(x, e, 2, metric="dot")
        codebook, counts = vaeops.kmeans(x, 5, 2, SEED)
        revived = vaeops.vq_expire_(*state, x, threshold=0.5, seed=SEED)
        out = vaeops.residual_vq(x, torch.stack((e, 0.3 * e)), estimator="rotation", stats=True)
        entropies = vaeops.vq_entropy(x, e, temperature=0.5)
        drawn = vaeops.vq_sample(x, e, 0.7, SEED)
        fsq, lfq = vaeops.fsq(x, [8, 5, 5]), vaeops.lfq(x)
        loss = out.quantized.square().sum() + out.commit_loss.sum() + out.codebook_loss.sum()
        loss = loss + entropies[0] - entropies[1] + fsq[0].sum() + (lfq[0] * x.detach()).sum()
        others = (scores, indices, codebook, counts, revived, out.indices, drawn, fsq[1], lfq[1])
        return (
            loss,
            *others,
            vaeops.fsq_decode(fsq[1], [8, 5, 5]),
            vaeops.lfq_decode(lfq[1], 3),
            vaeops.usage(counts),
        )

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (8, 11, 30):
        results = []
        for g in (compiled, f):
            torch.manual_seed(rows)
            x, e = torch.randn(rows, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
            state = torch.tensor([0.0, 1, 2, 0, 0, 3, 4]), torch.randn(7, 3), torch.randn(7, 3)
            loss, *others = g(x, e, state)
            results.append((loss, *others, *torch.autograd.grad(loss, (x, e)), *state))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


def test_one_tensor_given_twice_under_compile(compiler):
    e = torch.randn(6, 4, requires_grad=True)

    def f(e):
        out = vaeops.vector_quantize(e, e)
        return out.quantized.sum() + out.commit_loss

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(e), e)[0], torch.autograd.grad(f(e), e)[0])


def test_export_with_a_dynamic_batch(compiler):
    class Encode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codebook", torch.randn(9, 4))

        def forward(self, x):
            return vaeops.vector_quantize(x, self.codebook, channel_dim=1)[:2]

    module = Encode()
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(module, (torch.randn(3, 4, 6),), dynamic_shapes=({0: batch},))
    x = torch.randn(11, 4, 6)
    for a, b in zip(exported.module()(x), module(x)):
        assert torch.equal(a, b)


def test_functorch_gradients():
    x, e = torch.randn(10, 4), torch.randn(6, 4)

    def f(x, e):
        out = vaeops.vector_quantize(x, e, estimator="rotation", stats=True)
        return out.quantized.square().sum() + out.commit_loss + 0.5 * out.codebook_loss

    leaves = [t.clone().requires_grad_() for t in (x, e)]
    want = torch.autograd.grad(f(*leaves), leaves)
    for a, b in zip(torch.func.grad(f, argnums=(0, 1))(x, e), want):
        torch.testing.assert_close(a, b)
    indices = torch.tensor([0, 3, 3])
    got = torch.func.grad(lambda e: vaeops.vq_lookup(indices, e).square().sum())(e)
    torch.testing.assert_close(got, torch.zeros_like(e).index_add_(0, indices, 2 * e[indices]))
    got = torch.func.grad(lambda x: sum(vaeops.vq_entropy(x, e)))(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(sum(vaeops.vq_entropy(leaf, e)), leaf)[0])


def test_forward_mode_is_no_silent_zero():
    x, e, indices = torch.randn(10, 4), torch.randn(6, 4), torch.tensor([0, 3, -1, 3])
    jvp = torch.func.jvp
    got = jvp(lambda e: vaeops.vq_lookup(indices, e).square().sum(), (e,), (e,))[1]
    torch.testing.assert_close(got, 2 * e[indices[indices >= 0]].square().sum())
    match = "vector_quantize: there is no forward-mode derivative"
    for f in (
        lambda x, e: vaeops.vector_quantize(x, e).quantized,
        lambda x, e: vaeops.vector_quantize(x, e, estimator="none", stats=True).commit_loss,
        lambda x, e: vaeops.residual_vq(x, e[None]).quantized,
    ):
        with pytest.raises(NotImplementedError, match=match):
            jvp(f, (x, e), (x, e))
    with pytest.raises(NotImplementedError, match=match):
        jvp(lambda e: vaeops.vector_quantize(x, e, stats=True).codebook_loss, (e,), (e,))
    with torch.autograd.forward_ad.dual_level():
        leaf, dual = x.clone().requires_grad_(), torch.autograd.forward_ad.make_dual(e, e)
        with pytest.raises(NotImplementedError, match=match):
            vaeops.vector_quantize(x, dual)
        out = vaeops.vector_quantize(leaf, e)  # constants are served all the same
        loss = out.commit_loss * vaeops.vq_lookup(indices, dual).sum()
        with pytest.raises(RuntimeError, match="vector_quantize: there is no double backward"):
            torch.autograd.grad(loss, leaf)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    x, e = torch.randn(10, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)

    def f(x, e):
        out = vaeops.vector_quantize(x, e)
        return out.quantized.square().sum() + out.commit_loss + out.codebook_loss

    want = torch.autograd.grad(f(x, e), (x, e))
    checkpoint(f, x, e, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, want[0]) and torch.equal(e.grad, want[1])


def test_autocast_changes_nothing(impl):
    x, e = torch.randn(64, 6, requires_grad=True), torch.randn(20, 6, requires_grad=True)

    def f():
        out = vaeops.vector_quantize(x, e, stats=True, estimator="rotation", metric="cosine", impl=impl)
        levels = vaeops.residual_vq(x, torch.stack((e, e)), impl=impl)
        entropies = vaeops.vq_entropy(x, e, metric="cosine")
        means = vaeops.kmeans(x, 4, 2, SEED, metric="cosine", impl=impl)
        drawn = vaeops.vq_sample(x, e, 1.0, SEED)
        loss = (
            out.quantized.sum()
            + out.commit_loss
            + out.codebook_loss
            + sum(entropies)
            + levels.commit_loss.sum()
        )
        return *out, *levels[:4], *entropies, *means, drawn, *torch.autograd.grad(loss, (x, e))

    want = f()
    with torch.autocast("cpu", torch.bfloat16):
        got = f()
    for a, b in zip(got, want):
        assert a is b is None or (a.dtype is b.dtype and torch.equal(a, b))


# ---- memory


class Largest(TorchDispatchMode):
    """The most elements that any operation inside returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_no_array_of_rows_times_codes(monkeypatch):
    n, k, d = 3000, 200, 4
    x, e = torch.randn(n, d), torch.randn(k, d)
    indices, used, choosable = (
        torch.randint(k, (n,)),
        torch.ones(n, dtype=torch.bool),
        torch.ones(k, dtype=torch.bool),
    )
    monkeypatch.setattr(sample, "_CHUNK", ref._CHUNK)
    g = torch.tensor(1.0)
    share = torch.full((k,), 1 / k)
    for call in (
        lambda: ref.vq_assign(x, e, None, 0, True, False),
        lambda: ref.vq_topk(x, e, None, 3, 1, True, False),
        lambda: ref.vq_gather(indices, e, x, 0.0, 1),
        lambda: ref.vq_gather_bwd(x, g, x, e, indices, 2),
        lambda: ref.vq_segment_sum(x, indices, None, None, k, True, False),
        lambda: sample._sample(x, e, choosable, SEED, 1.0, 0),
        lambda: sample._entropies(x, e, choosable, used, 1.0, 0),
        lambda: sample._entropies_bwd(g, g, x, e, choosable, used, share, 1.0, 0),
        lambda: vaeops.vector_quantize(x, e, stats=True, deterministic="bitwise"),
        lambda: vaeops.kmeans(x, k, 2, SEED),
    ):
        with Largest() as largest:
            call()
        # Noise is two normals a score, and its words are made four at a time.
        assert n * d <= largest.numel < 4 * ref._CHUNK < n * k / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "call", ["vq_assign(x, e)", "vector_quantize(x, e)", "vector_quantize(x, e, stats=True)"]
)
@pytest.mark.parametrize(("n", "k", "d"), [(65536, 1024, 64), (16384, 8192, 256), (100_000, 4096, 8)])
def test_peak_memory(call, n, k, d):
    """Beyond inputs and outputs, at most 8 K D + 64 N bytes + 16 MB: the kernel's own high-water mark."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    code = f"""
import torch, vaeops
def high_water():
    return [int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
def run(x, e):
    return vaeops.{call}
run(torch.randn(3000, {d}), torch.randn(64, {d}))  # threads and their arenas
x, e = torch.randn({n}, {d}), torch.randn({k}, {d})
vaeops.empty_cache()
open("/proc/self/clear_refs", "w").write("5")
before = high_water()
out = run(x, e)
after = high_water()
outputs = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
sizes = {{t.data_ptr(): t.numel() * t.element_size() for t in outputs}}
print(after - before - sum(sizes.values()))
"""
    if vaeops.info()["ops"]["vq_assign"]["cpu"]["runs"] != "cpp":
        pytest.skip("no native CPU kernels")
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    used, bound = int(done.stdout), 8 * k * d + 64 * n + (16 << 20)
    print(f"{call} {n}x{k}x{d}: {used / 2**20:.1f} of {bound / 2**20:.1f} MiB")
    assert used <= bound
