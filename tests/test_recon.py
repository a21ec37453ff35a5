"""Reconstruction losses and the ELBO: values, gradients, opcheck, compile, layouts, bad arguments."""

import math

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget

import vaeops
from vaeops.ref import gaussian, recon as ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TARGETS = {
    "floating": lambda shape: torch.rand(shape),
    "bfloat16": lambda shape: torch.rand(shape).bfloat16(),
    "uint8": lambda shape: torch.randint(0, 256, shape, dtype=torch.uint8),
    "bool": lambda shape: torch.rand(shape) < 0.5,
}
INF, NAN = math.inf, math.nan


def reductions(kind):
    return ref.MULTINOMIAL_REDUCTIONS if kind == "multinomial" else gaussian.REDUCTIONS


def scale_of(kind):
    return 0.3 if kind in ref.SCALED else None


def make(kind, shape, dtype=torch.float32):
    pred = torch.rand(shape) * 0.96 + 0.02 if kind == "bce" else 2 * torch.randn(shape)
    return pred.to(dtype)


def textbook(pred, target, kind, *, reduction, batch_ndim=1, scale=None, weight=None, mask=None):
    """What a user writes today, in the dtype of the prediction throughout."""
    t = target.to(pred.dtype)
    if target.dtype is torch.uint8 and kind != "multinomial":
        t = t / 255
    if mask is not None:
        weight = mask if weight is None else torch.where(mask, weight, 0)
    weight = torch.ones((), dtype=pred.dtype) if weight is None else weight.to(pred.dtype)
    code = gaussian.REDUCTIONS.index(reduction)
    if kind == "multinomial":
        p = pred if mask is None else pred.masked_fill(~mask, -1e4)
        rows = -(F.log_softmax(p.flatten(batch_ndim), -1) * (t * weight).flatten(batch_ndim)).sum(-1)
        return gaussian.reduce(rows, code, rows.dim())
    s, d = scale, pred - t
    if kind == "discretized_logistic":
        a, b, width = (t + 1 / 510 - pred) / s, (t - 1 / 510 - pred) / s, -math.expm1(-1 / (255 * s))
        inner = F.softplus(-a) + F.softplus(b) - math.log(width)
        loss = torch.where(t < 1 / 510, F.softplus(-a), torch.where(t > 1 - 1 / 510, F.softplus(b), inner))
    else:
        loss = {
            "bce": lambda: -(t * pred.log() + (1 - t) * (1 - pred).log()),
            "bce_logits": lambda: F.binary_cross_entropy_with_logits(pred, t, reduction="none"),
            "mse": lambda: d**2,
            "half_mse": lambda: 0.5 * d**2,
            "l1": lambda: d.abs(),
            "huber": lambda: F.huber_loss(pred, t, delta=s, reduction="none"),
            "gaussian_nll": lambda: 0.5 * (d / s) ** 2 + math.log(s) + 0.5 * math.log(2 * math.pi),
            "laplace_nll": lambda: d.abs() / s + math.log(2 * s),
        }[kind]()
    return gaussian.reduce(loss * weight, code, batch_ndim)


def run(function, pred, target, kind, cotangent, **options):
    """The loss and the gradient of `function` for a fresh leaf."""
    leaf = pred.clone().requires_grad_()
    loss = function(leaf, target, kind, **options)
    loss.backward(cotangent.to(loss.dtype))
    return loss.detach(), leaf.grad


def check_against_reference(impl, kind, shape, dtype, target="floating", *, reduction="sample", batch_ndim=1,
                            weight=None, mask=None):  # fmt: skip
    pred, t = make(kind, shape, dtype), TARGETS[target](shape)
    if target == "floating":
        t = t.to(dtype)
    options = {"reduction": reduction, "batch_ndim": batch_ndim, "scale": scale_of(kind), "weight": weight,
               "mask": mask}  # fmt: skip
    out = gaussian.reduced_shape(pred.shape, gaussian.REDUCTIONS.index(reduction), batch_ndim)
    cotangent = torch.rand(out, dtype=torch.float64) + 0.5
    ours = run(vaeops.recon_loss, pred, t, kind, cotangent, impl=impl, **options)
    exact = run(ref.recon_loss, pred.double(), t, kind, cotangent, **options)
    if dtype is torch.float64:  # the reference has no more digits: what sums of so many may differ by
        for a, b in zip(ours, exact):
            assert float((a - b).abs().max()) <= pred.numel() * torch.finfo(dtype).eps * float(b.abs().max())
        return
    eager = run(textbook, pred, t, kind, cotangent, **options)
    for name, a, b, c, factor in zip(("loss", "d pred"), ours, exact, eager, (2.0, 3.0)):
        assert_within_budget(a, b, c, f"{kind} {name}", factor=factor)


# ---- values and gradients against fp64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ref.KINDS)
def test_reductions(isa, kind, dtype):
    for reduction in reductions(kind):
        check_against_reference("cpp", kind, (37, 29), dtype, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ref.KINDS)
def test_targets(isa, kind, target, dtype):
    check_against_reference("cpp", kind, (6, 200), dtype, target)
    check_against_reference("cpp", kind, (3, 784), dtype, target, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ref.KINDS)
def test_weights_and_masks(isa, kind, dtype):
    shape = (7, 3, 45)
    mask, item_mask = torch.rand(shape) < 0.7, torch.rand(45) < 0.7
    weight, sample_weight = torch.rand(shape), torch.rand(7, 1, 1).double()
    for given in ({"mask": mask}, {"mask": item_mask}, {"weight": weight}, {"weight": sample_weight},
                  {"weight": weight.bfloat16(), "mask": item_mask}):  # fmt: skip
        for reduction in ("sample", "sum"):
            check_against_reference("cpp", kind, shape, dtype, reduction=reduction, **given)


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 63), (97, 7), (3, 1025), (2, 17_000), (40, 700), (3, 12_288), (3, 4, 33, 20), (1025, 3)],
)
@pytest.mark.parametrize("kind", ["bce_logits", "mse", "multinomial"])
def test_sizes(isa, kind, shape):
    for reduction in ("sample", "batchmean") if kind == "multinomial" else ("sample", "dim", "batchmean"):
        for batch_ndim in range(1, min(len(shape), 3)):
            for target in ("floating", "uint8"):
                check_against_reference("cpp", kind, shape, torch.float32, target, reduction=reduction,
                                        batch_ndim=batch_ndim)  # fmt: skip


def test_levels_of_an_8_bit_image_are_those_of_a_division(isa):
    levels = torch.arange(256, dtype=torch.uint8)
    zeros = torch.zeros(256)
    assert torch.equal(vaeops.recon_loss(zeros, levels, "l1", reduction="none"), levels.float() / 255)


@pytest.mark.parametrize("scale", [0.002, 0.05, 3.0, 500.0])
def test_discretized_levels_sum_to_one(isa, scale):
    """The probabilities of the 256 levels sum to 1, wherever the mean is."""
    levels = torch.arange(256, dtype=torch.uint8)
    for mean in (-0.5, 0.0, 0.371, 1.0):
        pred = torch.full((256,), mean)
        nll = vaeops.recon_loss(pred, levels, "discretized_logistic", scale=scale, reduction="none")
        assert bool(nll.isfinite().all())
        assert abs(float((-nll.double()).exp().sum()) - 1) < 1e-5
        torch.testing.assert_close(
            nll,
            ref.recon_loss(
                pred.double(), levels, "discretized_logistic", scale=scale, reduction="none"
            ).float(),
        )


def test_gaussian_and_laplace_agree_with_torch_distributions():
    pred, target = torch.randn(4, 9).double(), torch.randn(4, 9).double()
    for kind, law in (
        ("gaussian_nll", torch.distributions.Normal),
        ("laplace_nll", torch.distributions.Laplace),
    ):
        expected = -law(pred, 0.7).log_prob(target).sum(1)
        got = vaeops.recon_loss(pred, target, kind, scale=0.7, reduction="sample")
        torch.testing.assert_close(got, expected)


def test_multinomial_agrees_with_torch_distributions_up_to_a_constant():
    logits, counts = torch.randn(3, 5).double(), torch.tensor([1.0, 0, 4, 2, 0])
    law = torch.distributions.Multinomial(7, logits=logits)
    constant = math.lgamma(8) - sum(math.lgamma(c + 1) for c in counts.tolist())
    nll = vaeops.recon_loss(logits, counts, "multinomial", reduction="sample")
    torch.testing.assert_close(constant - law.log_prob(counts.double()), nll)


@pytest.mark.parametrize("kind", ["bce", "l1", "huber"])
def test_values_and_gradients_are_torchs(isa, kind):
    """Also where the formula alone does not say: logarithms of 0, the corner of |d|."""
    pred = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.25, 0.5, 1e-30, 0.3]).requires_grad_()
    target = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, 0.5, 1.0, 0.0])
    ours = vaeops.recon_loss(pred, target, kind, reduction="none", scale=0.25 if kind == "huber" else None)
    theirs = {"bce": F.binary_cross_entropy, "l1": F.l1_loss,
              "huber": lambda p, t, reduction: F.huber_loss(p, t, delta=0.25, reduction=reduction)}[kind](
        pred, target, reduction="none")  # fmt: skip
    torch.testing.assert_close(ours, theirs)
    a, b = (torch.autograd.grad(x.sum(), pred)[0] for x in (ours, theirs))
    torch.testing.assert_close(a, b)


def test_infinite_logits(isa):
    """An infinite logit costs nothing on the right side, everything on the wrong; gradients are finite."""
    pred = torch.tensor([INF, INF, INF, -INF, -INF, -INF, NAN]).requires_grad_()
    target = torch.tensor([1.0, 0, 0.5, 0, 1, 0.5, 1])
    loss = vaeops.recon_loss(pred, target, "bce_logits", reduction="none")
    expected = torch.tensor([0, INF, INF, 0, INF, INF, NAN])
    torch.testing.assert_close(loss, expected, equal_nan=True)
    torch.testing.assert_close(
        ref.recon_loss(pred.detach(), target, "bce_logits", reduction="none"), expected, equal_nan=True
    )
    gradient = torch.autograd.grad(loss.sum(), pred)[0]
    torch.testing.assert_close(gradient, torch.tensor([0, 1, 0.5, 0, -1, -0.5, NAN]), equal_nan=True)


def test_large_logits_keep_their_digits(isa):
    pred = torch.linspace(-120, 120, 4801)
    for target in (0.0, 1.0):
        loss = vaeops.recon_loss(pred, torch.tensor(target), "bce_logits", reduction="none")
        exact = F.softplus(pred.double() * (1 - 2 * target), threshold=200)
        normal = exact > 2.0**-126
        relative = ((loss.double() - exact).abs() / exact)[normal]
        assert float(relative.max()) < 3e-7, float(relative.max())


@pytest.mark.parametrize("kind", ref.KINDS)
@pytest.mark.parametrize("impl", ["cpp", "ref"])
def test_what_a_mask_hides_is_not_looked_at(isa, kind, impl):
    pred, target = make(kind, (4, 150)), torch.rand(4, 150)
    mask = torch.rand(4, 150) < 0.6
    options = {"kind": kind, "mask": mask, "reduction": "sample", "scale": scale_of(kind), "impl": impl}
    leaf = pred.clone().requires_grad_()
    clean = vaeops.recon_loss(leaf, target, **options)
    clean.sum().backward()
    assert bool(leaf.grad[~mask].eq(0).all())
    for bad in (NAN, INF, -INF):
        dirty = pred.masked_fill(~mask, bad).requires_grad_()
        loss = vaeops.recon_loss(dirty, target.masked_fill(~mask, bad), **options)
        loss.sum().backward()
        assert torch.equal(loss, clean) and torch.equal(dirty.grad, leaf.grad)
        if kind != "multinomial":
            weighed = {**options, "mask": None, "weight": mask.float()}
            assert torch.equal(vaeops.recon_loss(dirty, target, **weighed), clean)
    everything = vaeops.recon_loss(leaf, target, **{**options, "mask": torch.zeros(150, dtype=torch.bool)})
    assert bool(everything.eq(0).all())
    assert bool(torch.autograd.grad(everything.sum(), leaf)[0].eq(0).all())


@pytest.mark.parametrize("kind", ref.KINDS)
def test_nan_stays_in_its_row(isa, kind):
    pred, target = make(kind, (6, 300)), torch.rand(6, 300)
    options = {"reduction": "sample", "scale": scale_of(kind)}
    clean = vaeops.recon_loss(pred, target, kind, **options)
    pred[2, 130] = NAN
    loss = vaeops.recon_loss(pred, target, kind, **options)
    rows = [0, 1, 3, 4, 5]
    assert torch.equal(loss[rows], clean[rows]) and bool(loss[2].isnan())


# ---- the multinomial


def test_multinomial_of_many_items(isa):
    """100,000 items, few of them with a count, rows without any, logits masked by -inf."""
    logits = 3 * torch.randn(5, 100_000)
    counts = (torch.rand(5, 100_000) < 1e-3).float() * torch.randint(1, 9, (5, 100_000))
    counts[3] = 0
    hidden = (torch.rand(5, 100_000) < 0.2) & (counts == 0)
    logits[hidden] = -INF
    cotangent = torch.rand(5).double()
    options = {"reduction": "sample"}
    ours = run(vaeops.recon_loss, logits, counts, "multinomial", cotangent, **options)
    exact = run(ref.recon_loss, logits.double(), counts, "multinomial", cotangent, **options)
    eager = run(textbook, logits.masked_fill(hidden, -1e4), counts, "multinomial", cotangent, **options)
    for name, a, b, c, factor in zip(("loss", "d logits"), ours, exact, eager, (2.0, 3.0)):
        assert_within_budget(a, b, c, name, factor=factor)
    assert ours[0][3] == 0 and bool(ours[1][3].eq(0).all()) and bool(ours[1][hidden].eq(0).all())


@pytest.mark.parametrize("impl", ["cpp", "ref"])
def test_multinomial_of_extreme_logits(isa, impl):
    forward, backward = (
        getattr(getattr(torch.ops.vaeops, f"multinomial_{name}"), impl) for name in ("fwd", "bwd")
    )
    logits = torch.tensor(
        [[1e4, 9999.0, -1e4, 0], [-1e4] * 4, [-INF] * 4, [-INF, 3.0, -INF, -INF], [INF, 0, 0, 0]]
    )
    counts = torch.tensor([[1.0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 5, 0, 0], [0, 1, 0, 0]])
    nll, lse, total = forward(logits, counts, None)
    expected = F.softplus(torch.tensor(-1.0))
    torch.testing.assert_close(nll, torch.tensor([3 * expected + 2, math.log(4), 0, 0, INF]))
    torch.testing.assert_close(lse, torch.logsumexp(logits.double(), 1), rtol=1e-9, atol=1e-7)
    assert torch.equal(total, counts.sum(1))
    gradient = backward(torch.ones(5), logits, counts, None, lse, total)
    assert bool(gradient[:4].isfinite().all()) and bool(gradient[2].eq(0).all())
    torch.testing.assert_close(gradient[:4].sum(1), torch.zeros(4), atol=1e-5, rtol=0)


def test_multinomial_keeps_two_numbers_a_sample():
    logits, counts = torch.randn(8, 500, requires_grad=True), torch.randint(0, 3, (8, 500), dtype=torch.uint8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vaeops.recon_loss(logits, counts, "multinomial")
    assert sum(t.nbytes for t in kept) == logits.nbytes + counts.nbytes + 8 * (4 + 8)


# ---- gradients


@pytest.mark.parametrize("impl", ["cpp", "ref"])
@pytest.mark.parametrize("kind", ref.KINDS)
def test_gradcheck_and_gradgradcheck(kind, impl):
    pred = make(kind, (3, 5), torch.float64).requires_grad_()
    target = torch.rand(3, 5).double()
    given = ({}, {"mask": torch.rand(5) < 0.6}, {"weight": torch.rand(3, 1).double()})
    for i, reduction in enumerate(reductions(kind)):
        options = given[i % 3] | {"reduction": reduction, "scale": scale_of(kind), "impl": impl}

        def f(pred, options=options):
            return vaeops.recon_loss(pred, target, kind, **options)

        assert torch.autograd.gradcheck(f, (pred,), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, (pred,))


@pytest.mark.parametrize("kind", ref.KINDS)
def test_memory_kept_for_backward_and_no_grad(kind):
    pred, target = make(kind, (16, 32)).requires_grad_(), torch.randint(0, 5, (16, 32), dtype=torch.uint8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vaeops.recon_loss(pred, target, kind)
        inputs = pred.nbytes + target.nbytes + (16 * (4 + 8) if kind == "multinomial" else 0)
        assert sum(t.nbytes for t in kept) == inputs
        kept.clear()
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert vaeops.recon_loss(pred, target, kind).grad_fn is None
    assert not kept


def test_results_do_not_depend_on_batch_or_threads():
    threads = torch.get_num_threads()
    for kind in ref.KINDS:
        pred, target = make(kind, (64, 1700)), torch.rand(64, 1700)
        rows = vaeops.recon_loss(pred, target, kind, reduction="sample")
        part = vaeops.recon_loss(pred[10:13], target[10:13], kind, reduction="sample")
        assert torch.equal(part, rows[10:13])
        for reduction in reductions(kind):
            results = []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                leaf = pred.clone().requires_grad_()
                loss = vaeops.recon_loss(leaf, target, kind, reduction=reduction)
                results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
            torch.set_num_threads(threads)
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# ---- transforms


@pytest.mark.parametrize("kind", ref.KINDS)
def test_torch_func(kind):
    pred, target = make(kind, (4, 3, 5), torch.float64), torch.rand(3, 5).double()
    mask = torch.rand(4, 3, 1) < 0.7
    for reduction in reductions(kind):
        options = {"reduction": reduction, "scale": scale_of(kind)}

        def loss(pred, mask, options=options):
            return vaeops.recon_loss(pred, target, kind, mask=mask, **options)

        got = torch.func.vmap(loss)(pred, mask)
        expected = torch.stack([loss(p, m) for p, m in zip(pred, mask)])
        torch.testing.assert_close(got, expected)

    def total(pred, mask):
        return vaeops.recon_loss(pred, target, kind, mask=mask, reduction="sum", scale=scale_of(kind))

    def of_reference(pred, mask):
        return ref.recon_loss(pred, target, kind, mask=mask, reduction="sum", scale=scale_of(kind))

    got = torch.func.vmap(torch.func.grad(total))(pred, mask)
    expected = torch.stack([torch.func.grad(of_reference)(p, m) for p, m in zip(pred, mask)])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.func.hessian(total)(pred[0], mask[0]), torch.func.hessian(of_reference)(pred[0], mask[0])
    )
    _, tangent = torch.func.jvp(lambda p: total(p, mask[0]), (pred[0],), (torch.ones_like(pred[0]),))
    torch.testing.assert_close(tangent, torch.func.grad(of_reference)(pred[0], mask[0]).sum())


# ---- opcheck


def _op_arguments():
    pred, target = torch.rand(6, 10), torch.rand(6, 10)
    image = torch.randint(0, 256, (6, 10), dtype=torch.uint8)
    yield "mse", (pred, target, None, 2, 1.0, 3, 1)
    yield "image, weight", (pred, image, torch.rand(10), 1, 1.0, 2, 1)
    yield "transposed, mask", (torch.rand(10, 6).t(), target, torch.rand(6, 1) < 0.5, 8, 0.1, 0, 1)
    yield "no rows", (pred[:0], target[:0], None, 5, 1.0, 1, 1)
    yield "bfloat16", (pred.bfloat16(), target, None, 0, 1.0, 5, 2)


@pytest.mark.parametrize(
    ("name", "args"), list(_op_arguments()), ids=lambda a: a if isinstance(a, str) else ""
)
@pytest.mark.parametrize("overload", ["default", "ref", "cpp"])
def test_opcheck(name, args, overload):
    torch.library.opcheck(getattr(torch.ops.vaeops.recon_fwd, overload), args)
    grad = torch.rand(gaussian.reduced_shape(args[0].shape, *args[5:]))
    torch.library.opcheck(getattr(torch.ops.vaeops.recon_bwd, overload), (grad, *args))


@pytest.mark.parametrize("overload", ["default", "ref", "cpp"])
def test_opcheck_multinomial(overload):
    for logits, target, weight in (
        (torch.randn(6, 10), torch.rand(6, 10), None),
        (torch.randn(10, 6).t(), torch.ones(6, 10, dtype=torch.bool), torch.rand(10) < 0.5),
        (torch.randn(0, 10), torch.rand(0, 10), torch.rand(0, 1)),
    ):
        args = (logits, target, weight)
        torch.library.opcheck(getattr(torch.ops.vaeops.multinomial_fwd, overload), args)
        _, lse, total = torch.ops.vaeops.multinomial_fwd(*args)
        grad = torch.rand(logits.shape[0])
        torch.library.opcheck(getattr(torch.ops.vaeops.multinomial_bwd, overload), (grad, *args, lse, total))


# ---- compile


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_dynamic_matches_eager(backend):
    torch._dynamo.reset()

    def step(x, mask, image):
        a = vaeops.recon_loss(x.sin(), image, "bce_logits", mask=mask)
        b = vaeops.recon_loss(x, x.detach() + 1, "huber", scale=0.5, weight=mask.float(), reduction="sample")
        c = vaeops.recon_loss(x, image, "multinomial", reduction="sample")
        return a * 2 + b.square().sum() + c.mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for rows in (6, 9, 13):
        x = torch.randn(rows, 8, requires_grad=True)
        arguments = torch.rand(rows, 1) < 0.5, torch.randint(0, 256, (rows, 8), dtype=torch.uint8)
        a, b = (f(x, *arguments) for f in (compiled, step))
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(torch.autograd.grad(a, x), torch.autograd.grad(b, x))


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, pred, target):
            return vaeops.recon_loss(pred, target, "bce_logits"), vaeops.recon_loss(
                pred, target, "multinomial"
            )

    arguments = torch.randn(4, 6), torch.rand(4, 6)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Loss(), arguments, dynamic_shapes=({0: rows}, {0: rows}))
    other = torch.randn(9, 6), torch.rand(9, 6)
    torch.testing.assert_close(program.module()(*other), Loss()(*other))


# ---- layouts


def _layouts():
    yield "contiguous", lambda x: x.clone()
    yield "sliced", lambda x: torch.cat((x, x, x), -1)[..., x.shape[-1] : 2 * x.shape[-1]]
    yield "every second", lambda x: x.repeat_interleave(2, -1)[..., ::2]
    yield "transposed", lambda x: x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1])
    yield "expanded batch", lambda x: x[:1].expand(x.shape)
    yield "expanded inside", lambda x: x[:, :1].expand(x.shape)
    yield "offset", lambda x: torch.cat((x.flatten()[:3], x.flatten()))[3:].view(x.shape)


@pytest.mark.parametrize(("name", "layout"), list(_layouts()), ids=lambda a: a if isinstance(a, str) else "")
@pytest.mark.parametrize("shape", [(5, 6, 7), (3, 4, 33, 34), (2, 3, 4, 5, 6)])
def test_layouts(isa, name, layout, shape):
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    plain = torch.randn(shape), image, torch.rand(shape)
    for strided in range(3):
        tensors = [layout(t) if i == strided else t for i, t in enumerate(plain)]
        grad = torch.linspace(0.5, 1, shape[0])
        for options in ((1, 1.0, 2, 1), (8, 0.2, 2, 1)):
            results = []
            for args in (tensors, [t.contiguous() for t in tensors]):
                loss = torch.ops.vaeops.recon_fwd.cpp(*args, *options)
                results.append((loss, torch.ops.vaeops.recon_bwd.cpp(grad, *args, *options)))
            assert all(torch.equal(a, b) for a, b in zip(*results)), name
        results = []
        for args in (
            [t.reshape(shape[0], -1) for t in tensors],
            [t.flatten(1).contiguous() for t in tensors],
        ):
            nll, lse, total = torch.ops.vaeops.multinomial_fwd.cpp(*args)
            results.append((nll, torch.ops.vaeops.multinomial_bwd.cpp(grad, *args, lse, total)))
        assert all(torch.equal(a, b) for a, b in zip(*results)), name


@pytest.mark.parametrize("kind", ref.ELEMENTWISE)
def test_channels_last_keeps_its_format(isa, kind):
    pred, target = make(kind, (2, 8, 5, 6)), torch.rand(2, 8, 5, 6)
    last = pred.contiguous(memory_format=torch.channels_last).requires_grad_()
    loss = vaeops.recon_loss(last, target, kind, reduction="sample", scale=scale_of(kind))
    torch.testing.assert_close(
        loss,
        vaeops.recon_loss(pred, target, kind, reduction="sample", scale=scale_of(kind)),
        rtol=1e-6,
        atol=0,
    )
    gradient = torch.autograd.grad(loss.sum(), last)[0]
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_samples_of_one_target_are_an_expanded_target():
    """K reconstructions of one batch: the target broadcasts and is not copied."""
    pred, image = torch.randn(5, 4, 30), torch.randint(0, 256, (4, 30), dtype=torch.uint8)
    loss = vaeops.recon_loss(pred, image, "bce_logits", reduction="sample", batch_ndim=2)
    assert torch.equal(loss[3], vaeops.recon_loss(pred[3], image, "bce_logits", reduction="sample"))


@pytest.mark.parametrize("kind", ref.KINDS)
@pytest.mark.parametrize("impl", ["cpp", "ref"])
def test_empty_batches_and_empty_samples(kind, impl):
    for shape in ((0, 6), (4, 0)):
        for reduction in reductions(kind):
            pred = torch.rand(shape, requires_grad=True)
            loss = vaeops.recon_loss(pred, torch.rand(shape), kind, reduction=reduction, impl=impl)
            expected = gaussian.reduced_shape(pred.shape, gaussian.REDUCTIONS.index(reduction), 1)
            assert loss.shape == torch.Size(expected) and float(loss.detach().sum()) == 0
            loss.sum().backward()
            assert pred.grad.shape == shape


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    n = 2**31 + 64
    pred = torch.full((1, 1), 0.5, dtype=torch.float16).expand(1, n)
    target = torch.ones(1, 1, dtype=torch.uint8).expand(1, n)
    loss = torch.ops.vaeops.recon_fwd.cpp(pred, target, None, 4, 1.0, 5, 1)
    assert abs(float(loss) / (n * (0.5 - 1 / 255)) - 1) < 1e-5
    _, lse, total = torch.ops.vaeops.multinomial_fwd.cpp(pred, target, None)
    assert abs(float(total) / n - 1) < 1e-6
    assert abs(float(lse) - 0.5 - math.log(n)) < 1e-5


# ---- the ELBO


@pytest.mark.parametrize("reduction", ["sample", "batchmean", "sum"])
@pytest.mark.parametrize("beta", [2.5, torch.tensor(2.5)], ids=["float", "tensor"])
def test_elbo_is_its_two_terms(reduction, beta):
    pred, target = torch.randn(6, 20, requires_grad=True), torch.rand(6, 20)
    mu, logvar = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
    latent = vaeops.reparam_kl(mu, logvar, reduction=reduction)
    mask = torch.rand(6, 20) < 0.5
    for given in (latent, latent.kl):
        out = vaeops.elbo(pred, target, given, kind="mse", beta=beta, reduction=reduction, mask=mask)
        recon = vaeops.recon_loss(pred, target, "mse", reduction=reduction, mask=mask)
        assert torch.equal(out.recon, recon) and torch.equal(out.kl, latent.kl)
        torch.testing.assert_close(out.loss, recon + 2.5 * latent.kl)
    a = torch.autograd.grad(out.loss.sum(), (pred, mu, logvar), retain_graph=True)
    b = torch.autograd.grad((recon + 2.5 * latent.kl).sum(), (pred, mu, logvar))
    torch.testing.assert_close(a, b)


def test_gaussian_nll_is_minus_the_log_density(isa):
    x, mu, logvar = (torch.randn(5, 80, requires_grad=True) for _ in range(3))
    for reduction in gaussian.REDUCTIONS:
        for param, rho in (("logvar", logvar), ("std", logvar.exp())):
            nll = vaeops.gaussian_nll(x, mu, rho, param=param, reduction=reduction)
            assert torch.equal(nll, -vaeops.gaussian_log_prob(x, mu, rho, param=param, reduction=reduction))
    fixed = vaeops.recon_loss(mu, x.detach(), "gaussian_nll", scale=0.5)
    torch.testing.assert_close(vaeops.gaussian_nll(x, mu, torch.full_like(mu, 0.5), param="std"), fixed)


# ---- bad arguments: the same check and text in eager and under compile

X = torch.zeros(3, 4)
WANTS = torch.zeros(3, 4, requires_grad=True)
MASK = torch.ones(3, 4, dtype=torch.bool)
loss, elbo = vaeops.recon_loss, vaeops.elbo
CASES = [
    (lambda: loss([1.0], X, "mse"), TypeError, "pred must be a tensor, got list"),
    (lambda: loss(X, 1.0, "mse"), TypeError, "target must be a tensor, got float"),
    (lambda: loss(X.long(), X, "mse"), TypeError, "pred must be float32, .* got torch.int64"),
    (
        lambda: loss(X, X.long(), "mse"),
        TypeError,
        "target must be floating point, uint8 or bool, got torch.int64",
    ),
    (
        lambda: loss(X, torch.zeros(4, 4), "mse"),
        ValueError,
        r"target \[4, 4\] does not broadcast to pred \[3, 4\]",
    ),
    (lambda: loss(X[0], X, "mse"), ValueError, r"target \[3, 4\] does not broadcast to pred \[4\]"),
    (lambda: loss(X, X.to("meta"), "mse"), ValueError, "target is on meta"),
    (lambda: loss(X, WANTS, "mse"), ValueError, r"target gets no gradient; pass target.detach\(\)"),
    (lambda: loss(X, X, "l2"), ValueError, "kind must be one of .*, got 'l2'"),
    (lambda: loss(X, X, "mse", reduction="avg"), ValueError, "reduction must be one of"),
    (
        lambda: loss(X, X, "multinomial", reduction="mean"),
        ValueError,
        "reduction must be one of .* for kind='mult",
    ),
    (lambda: loss(X, X, "mse", batch_ndim=3), ValueError, r"batch_ndim must be in \[0, 2\]"),
    (lambda: loss(X, X, "multinomial", batch_ndim=2), ValueError, r"batch_ndim must be in \[0, 1\]"),
    (lambda: loss(X, X, "mse", batch_ndim=1.0), TypeError, "batch_ndim must be an int"),
    (lambda: loss(X, X, "mse", scale=1.0), ValueError, "kind='mse' has no scale"),
    (lambda: loss(X, X, "huber", scale="1"), TypeError, "scale must be a float, got str"),
    (lambda: loss(X, X, "huber", scale=0.0), ValueError, "scale must be finite and > 0, got 0.0"),
    (lambda: loss(X, X, "laplace_nll", scale=NAN), ValueError, "scale must be finite and > 0, got nan"),
    (lambda: loss(X, X, "mse", weight=2.0), TypeError, "weight must be None or a tensor, got float"),
    (
        lambda: loss(X, X, "mse", weight=MASK),
        TypeError,
        r"weight must be floating point \(a bool one is a mask=\)",
    ),
    (lambda: loss(X, X, "mse", mask=X), TypeError, "mask must be bool, got torch.float32"),
    (lambda: loss(X, X, "mse", mask=MASK[:2]), ValueError, r"mask \[2, 4\] does not broadcast"),
    (lambda: loss(X, X, "mse", weight=WANTS), ValueError, "weight gets no gradient"),
    (lambda: loss(X, X, "mse", impl="gpu"), ValueError, "impl must be None or one of"),
    (lambda: loss(X, X, "mse", impl="cuda"), ValueError, "impl='cuda' cannot run on cpu tensors here"),
    (lambda: elbo(X, X, 1.0, kind="mse"), TypeError, "latent must be a LatentOutput or its kl, got float"),
    (
        lambda: elbo(X, X, X[0, 0], kind="mse", reduction="dim"),
        ValueError,
        "reduction must be 'sample' or one",
    ),
    (
        lambda: elbo(X, X, X[:, 0], kind="mse"),
        ValueError,
        r"kl \[3\] and the reconstruction \[\] must have one shape",
    ),
    (
        lambda: elbo(X, X, X[0, 0], kind="mse", beta="1"),
        TypeError,
        "beta must be a float or a 0-d tensor, got str",
    ),
    (
        lambda: elbo(X, X, X[0, 0], kind="mse", beta=X),
        ValueError,
        r"beta must be a float or a 0-d tensor, got \[3",
    ),
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
