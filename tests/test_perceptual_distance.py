"""Distances between maps: values, gradients of any order, layouts, corners, by every implementation."""

import pytest
import torch
from perceptual_case import KINDS, gradient, relative, textbook_distance

import vaeops
from vaeops.ref import perceptual as ref


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_distance(impl, kind, dtype, layout):
    a, b = (torch.randn(2, 19, 5, 7).to(dtype) for _ in range(2))
    if layout == "channels_last":
        a, b = (t.to(memory_format=torch.channels_last) for t in (a, b))
    elif layout == "strided":
        a, b = (torch.randn(2, 38, 5, 14).to(dtype)[:, ::2, :, 1::2] for _ in range(2))
    elif layout == "expanded":
        a = a[:1].expand(2, -1, -1, -1)
    lin = torch.rand(19) if kind == "lpips" else None
    g = torch.randn(2) * (1e4 if kind == "gram" else 1)  # above fp16's denormals
    for mean in (True, False):

        def ours(a, b, mean=mean):
            return vaeops.ops.perceptual.distance.DISTANCE(impl, (KINDS.index(kind), mean, False), a, b, lin)

        x, y = (t.detach().requires_grad_() for t in (a, b))
        value = ours(x, y)
        grads = torch.autograd.grad(value, (x, y), g.to(value.dtype))
        p, q = (t.detach().double().requires_grad_() for t in (a, b))
        exact = textbook_distance(p, q, kind, lin, mean)
        want = torch.autograd.grad(exact, (p, q), g.double())
        assert value.dtype is ref.compute_dtype(a) and relative(value, exact) < 1e-6
        for got, exact_gradient, like in zip(grads, want, (a, b)):
            assert got.dtype is dtype and relative(got, exact_gradient) < (
                1e-5 if dtype in (torch.float32, torch.float64) else 1e-2
            )
            assert got.stride() == torch.empty_like(like).stride()


@pytest.mark.parametrize("kind", KINDS[:4])
def test_distance_of_pixels(impl, kind):
    a, b = (torch.randn(2, 16, 5, 3) for _ in range(2))
    lin = torch.rand(16) if kind == "lpips" else None
    got = vaeops.feature_distance(a, b, kind=kind, lin=lin, spatial=True, reduction="none", impl=impl)
    pixels = [[t[..., i : i + 1, j : j + 1].double() for t in (a, b)] for i in range(5) for j in range(3)]
    want = [textbook_distance(*pair, kind, lin, True) for pair in pixels]
    assert got.shape == (2, 1, 5, 3) and relative(got.flatten(1), torch.stack(want, 1)) < 1e-6
    mean = vaeops.feature_distance(a, b, kind=kind, lin=lin, reduction="none", impl=impl)
    assert relative(got.flatten(1).mean(1), mean) < 1e-6


def test_gradients_at_corners(impl):
    """l1 at 0 and lpips at a zero pixel: 0 and never NaN."""
    a, b = torch.randn(2, 16, 3, 3), torch.randn(2, 16, 3, 3)
    b[0] = a[0]
    assert not gradient(vaeops.feature_distance, a, b, kind="l1", impl=impl)[1][0].any()
    a[:, :, 1, 1] = 0
    for first, second in ((a, b), (b, a), (a, a)):
        value, g = gradient(
            vaeops.feature_distance, first, second, kind="lpips", lin=torch.rand(16), impl=impl
        )
        assert value.isfinite() and g.isfinite().all()
        if first is a:
            assert not g[:, :, 1, 1].any()


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("mean", [True, False])
def test_gradcheck_of_the_distance(kind, mean):
    a, b = (torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lin = torch.rand(3, dtype=torch.float64) if kind == 3 else None
    for spatial in (False, True)[: 1 if kind == 4 else 2]:
        call = lambda a, b, spatial=spatial: vaeops.feature_distance(  # noqa: E731
            a, b, kind=KINDS[kind], lin=lin, spatial=spatial, reduction="none" if mean else "sum"
        )
        assert torch.autograd.gradcheck(call, (a, b))
        assert torch.autograd.gradgradcheck(call, (a, b))
