"""The density: values and gradients against the reference in fp64."""

import pytest
import torch
from budget import assert_within_budget

import vaeops
from vaeops.kernels import gaussian
from vaeops.ops.gaussian.log_prob import _fake_log_prob_bwd, _fake_log_prob_fwd
from vaeops.ref import gaussian as ref


def inputs(*shape, dtype=torch.float32, param=0):
    generator = torch.Generator().manual_seed(len(shape) + param)
    x, mu, rho = (torch.randn(shape, generator=generator) for _ in range(3))
    return x.to(dtype), mu.to(dtype), (rho.exp() if param == 2 else rho).to(dtype)


def check_density(*tensors, param=0, reduction=2, batch_ndim=1):
    options = (param, reduction, batch_ndim)
    exact = [t.double() for t in tensors]
    ours, want = gaussian.log_prob_fwd(*tensors, *options), ref.log_prob_fwd(*exact, *options)
    fakes = [_fake_log_prob_fwd(*tensors, *options)]
    check_outputs([ours], [ref.log_prob_fwd(*tensors, *options)], [want], fakes, 2)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=ours.dtype)
    ours, want = (
        gaussian.log_prob_bwd(grad, *tensors, *options),
        ref.log_prob_bwd(grad.double(), *exact, *options),
    )
    fakes = _fake_log_prob_bwd(grad, *tensors, *options)
    check_outputs(ours, ref.log_prob_bwd(grad, *tensors, *options), want, fakes, 3)


def check_outputs(ours, eager, exact, fakes, factor):
    for name, o, e, x, fake in zip(("x", "mu", "rho"), ours, eager, exact, fakes):
        assert (o.shape, o.dtype, o.stride()) == (fake.shape, fake.dtype, fake.stride())
        # The interpreter truncates to bf16 where a GPU rounds. In fp64 the reference is not exact either.
        more = {torch.bfloat16: 1, torch.float64: 16}.get(o.dtype, 0)
        assert_within_budget(o, x, e, name, factor=factor + more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", range(6))
def test_reductions(reduction, dtype):
    check_density(*inputs(13, 20, dtype=dtype), reduction=reduction)


@pytest.mark.parametrize("param", range(3))
def test_parameters(param):
    check_density(*inputs(5, 20, param=param), param=param)


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (63, 5), (2, 2500), (2, 3, 4)])
@pytest.mark.parametrize("reduction", [1, 2, 3])
def test_shapes(shape, reduction):
    check_density(*inputs(*shape), reduction=reduction)


def test_layouts():
    x, mu, rho = inputs(4, 3, 5, 2)
    check_density(x.to(memory_format=torch.channels_last), mu, rho)
    check_density(x, mu[:1].expand_as(x), rho[:, :1].expand_as(x), reduction=3)


def test_the_public_function_takes_it():
    tensors = [t.requires_grad_() for t in inputs(6, 7)]
    ours, want = (vaeops.gaussian_log_prob(*tensors, impl=impl) for impl in ("triton", "ref"))
    torch.testing.assert_close(ours, want)
    torch.testing.assert_close(*(torch.autograd.grad(o.sin().sum(), tensors) for o in (ours, want)))
