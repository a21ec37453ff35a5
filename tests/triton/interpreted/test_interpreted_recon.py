"""Reconstruction losses: values and gradients against the reference in fp64."""

import pytest
import torch
from budget import assert_within_budget

import vaeops
from vaeops.kernels import recon
from vaeops.ops.recon import _fake_multinomial_fwd, _fake_recon_bwd, _fake_recon_fwd
from vaeops.ref import recon as ref

SCALES = {"huber": 0.7, "gaussian_nll": 0.5, "laplace_nll": 0.5, "discretized_logistic": 0.02}


def draw(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape) + seed))


def inputs(*shape, kind="mse", dtype=torch.float32):
    p = draw(*shape)
    return (6 * p - 3 if kind == "bce_logits" else p).to(dtype), draw(*shape, seed=1).to(dtype)


def in_fp64(pred, target, weight):
    target = ref.values(target, torch.float64)
    return pred.double(), target, weight if weight is None or weight.dtype is torch.bool else weight.double()


def check(ours, eager, exact, fake, factor, name):
    assert (ours.shape, ours.dtype, ours.stride()) == (fake.shape, fake.dtype, fake.stride())
    # The interpreter truncates to bf16 where a GPU rounds. In fp64 the reference is not exact either.
    more = {torch.bfloat16: 1, torch.float64: 16}.get(ours.dtype, 0)
    assert_within_budget(ours, exact, eager, name, factor=factor + more)


def check_elementwise(pred, target, weight=None, kind="mse", reduction=3, batch_ndim=1):
    options = (ref.KINDS.index(kind), SCALES.get(kind, 1.0), reduction, batch_ndim)
    args, exact = (pred, target, weight), in_fp64(pred, target, weight)
    ours = recon.recon_fwd(*args, *options)
    check(ours, ref.recon_fwd(*args, *options), ref.recon_fwd(*exact, *options),
          _fake_recon_fwd(*args, *options), 2, f"{kind} loss")  # fmt: skip
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=ours.dtype)
    ours = recon.recon_bwd(grad, *args, *options)
    check(ours, ref.recon_bwd(grad, *args, *options), ref.recon_bwd(grad.double(), *exact, *options),
          _fake_recon_bwd(grad, *args, *options), 3, f"{kind} gradient")  # fmt: skip
    assert ours.isfinite().all()


def check_multinomial(logits, target, weight=None):
    args = logits, target, weight
    exact = logits.double(), target.double(), in_fp64(*args)[2]
    ours, eager, want = recon.multinomial_fwd(*args), ref.multinomial_fwd(*args), ref.multinomial_fwd(*exact)
    for name, o, e, x, fake in zip(("nll", "lse", "total"), ours, eager, want, _fake_multinomial_fwd(*args)):
        check(o, e, x, fake, 2, name)
    grad = torch.linspace(-1, 1, len(logits), dtype=ours[0].dtype)
    gradient = recon.multinomial_bwd(grad, *args, *ours[1:])
    want = ref.multinomial_bwd(grad.double(), *exact, *want[1:])
    eager = ref.multinomial_bwd(grad, *args, *eager[1:])
    check(gradient, eager, want, _fake_recon_bwd(grad, logits), 3, "gradient")
    return ours, gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ref.ELEMENTWISE)
def test_kinds(kind, dtype):
    check_elementwise(*inputs(7, 20, kind=kind, dtype=dtype), kind=kind)


@pytest.mark.parametrize("reduction", range(6))
def test_reductions(reduction):
    check_elementwise(*inputs(13, 20), reduction=reduction)
    check_elementwise(*inputs(2, 2500), reduction=reduction)
    check_elementwise(*inputs(3, 4, 5), reduction=reduction, batch_ndim=2)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (63, 5)])
@pytest.mark.parametrize("reduction", [1, 2, 3])
def test_shapes(shape, reduction):
    check_elementwise(*inputs(*shape), reduction=reduction)


def test_layouts():
    pred, target = inputs(4, 3, 5, 2)
    check_elementwise(pred.to(memory_format=torch.channels_last), target)
    check_elementwise(pred, target[:1].expand_as(pred), draw(3, 1, 1), reduction=2)
    check_elementwise(pred[:, :1].expand_as(pred), target, draw(4, 1, 1, 2) > 0.5, reduction=0)


@pytest.mark.parametrize("kind", ["bce", "bce_logits", "mse", "discretized_logistic"])
def test_targets_of_bytes_and_other_dtypes(kind):
    pred, target = inputs(6, 30, kind=kind)
    levels = (256 * target).to(torch.uint8)
    levels[0, :2] = torch.tensor([0, 255])
    for t in (levels, target > 0.5, target.half(), target.double()):
        check_elementwise(pred, t, kind=kind, reduction=0)
    check_elementwise(pred.double(), levels, kind=kind)
    everything = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(  # t / 255 correctly rounded
        recon.recon_fwd(torch.zeros(256), everything, None, ref.KINDS.index("l1"), 1.0, 0, 0),
        everything / 255,
    )


@pytest.mark.parametrize("kind", ref.ELEMENTWISE)
def test_what_does_not_count_is_not_looked_at(kind):
    pred, target = inputs(6, 30, kind=kind)
    mask = draw(6, 30, seed=5) > 0.3
    pred[~mask], target[~mask] = torch.nan, torch.inf
    check_elementwise(pred, target, mask, kind=kind, reduction=2)
    check_elementwise(pred, target, mask * draw(6, 30), kind=kind, reduction=0)


def test_extreme_logits():
    inf = torch.inf
    pred = torch.tensor([inf, -inf, inf, -inf, 200.0, -200.0, 1e-3, torch.nan])
    target = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.25, 0.75, 1.0, 0.5])
    options = (ref.KINDS.index("bce_logits"), 1.0, 0, 0)
    for name in ("recon_fwd", "recon_bwd"):
        grad = (torch.ones(8),) if name == "recon_bwd" else ()
        ours, want = (getattr(m, name)(*grad, pred, target, None, *options) for m in (recon, ref))
        torch.testing.assert_close(ours, want, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5, 20), (1, 1), (3, 1500), (2, 20000)])
def test_multinomial(shape, dtype):
    logits, counts = (8 * draw(*shape) - 4).to(dtype), (3 * draw(*shape, seed=1)).floor()
    check_multinomial(logits, counts.to(dtype))


def test_multinomial_operands():
    logits, counts = 8 * draw(3, 2500) - 4, (3 * draw(3, 2500, seed=1)).floor()
    mask = draw(3, 2500, seed=2) > 0.3
    for target in (counts.to(torch.uint8), counts > 0, counts.double()):
        check_multinomial(logits, target)
    check_multinomial(logits, counts, draw(2500, seed=3))
    check_multinomial(logits.t().contiguous().t(), counts, mask)
    check_multinomial(logits[:, :30], counts[:, :30], mask[:, :30])
    _, gradient = check_multinomial(logits.masked_fill(~mask, torch.nan), counts, mask)
    assert bool((gradient[~mask] == 0).all())


@pytest.mark.parametrize("D", [3, 9000])
def test_multinomial_rows_of_special_values(D):
    logits, counts = 8 * draw(6, D) - 4, (3 * draw(6, D, seed=1)).floor()
    logits[0] = -torch.inf
    counts[0] = 0  # nothing possible, nothing drawn
    counts[1] = 0
    logits[2, 0] = -torch.inf
    counts[2, 0] = 0
    logits[3, 1] = torch.nan
    logits[4, D - 1] = torch.inf
    logits[5] += 1e4
    for ours, want in zip(
        recon.multinomial_fwd(logits, counts, None), ref.multinomial_fwd(logits, counts, None)
    ):
        torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-6, equal_nan=True)
    _, lse, total = ref.multinomial_fwd(logits, counts, None)
    args = torch.ones(6), logits, counts, None, lse, total
    torch.testing.assert_close(recon.multinomial_bwd(*args), ref.multinomial_bwd(*args), equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_multinomial_without_elements(shape):
    empty = torch.empty(shape)
    for ours, want in zip(recon.multinomial_fwd(empty, empty, None), ref.multinomial_fwd(empty, empty, None)):
        assert torch.equal(ours, want)


@pytest.mark.parametrize("kind", ["bce_logits", "multinomial"])
def test_the_public_function_takes_it(kind):
    pred, target = inputs(6, 7, kind="bce_logits")
    pred.requires_grad_()
    ours, want = (vaeops.recon_loss(pred, target, kind, impl=impl) for impl in ("triton", "ref"))
    torch.testing.assert_close(ours, want)
    torch.testing.assert_close(*(torch.autograd.grad(o.sin(), pred) for o in (ours, want)))
