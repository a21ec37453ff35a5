"""Reconstruction losses under transforms: torch.func, opcheck, compile, export; and in every layout."""

import math

import pytest
import torch
from recon_case import make, reductions, scale_of

import vaeops
from vaeops.ref import gaussian, recon as ref


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
