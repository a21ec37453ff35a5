"""Vector quantization: indices equal to the reference's, values within budget."""

import pytest
import torch
from budget import assert_within_budget

import vaeops
from vaeops.kernels import vq
from vaeops.kernels.vq import _pack, assign, segment
from vaeops.ref import vq as ref

L2, COSINE, DOT = range(3)


@pytest.fixture(autouse=True)
def _large_programs(monkeypatch):
    """The interpreter's time goes by operations, whatever their size."""
    monkeypatch.setattr(assign, "REFINED_ROWS", 64)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_assign(x, codebook, metric=L2, mask=None, exact=True, int32=False):
    ours = vq.vq_assign(x, codebook, mask, metric, exact, int32)
    want = ref.vq_assign(x, codebook, mask, metric, exact, int32)
    assert ours.dtype is want.dtype
    assert torch.equal(ours, want), f"{int((ours != want).sum())} of {want.numel()} rows differ"
    return ours


@pytest.mark.parametrize("D", [1, 3, 8, 16, 33, 64])
@pytest.mark.parametrize("metric", [L2, COSINE, DOT])
def test_assign(D, metric):
    check_assign(normal(70, D), normal(150, D, seed=1), metric)


def test_assign_of_many_dims():
    check_assign(normal(20, 260), normal(70, 260, seed=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("codes", [torch.float32, torch.float64], ids=str)
def test_assign_dtypes(dtype, codes):
    check_assign(normal(40, 8, dtype=dtype), normal(150, 8, dtype=codes, seed=1), int32=True)


def near_ties(rows, codes, D, gap, dtype=torch.float32):
    """Rows half-way between two codes, give or take `gap`: neighbours of the fast pass in different tiles."""
    e = normal(codes, D, seed=1, dtype=torch.float64)
    order = torch.randperm(codes, generator=torch.Generator().manual_seed(2))[: 2 * rows].view(2, rows)
    e[order[1]] = e[order[0]] + 0.1 * normal(rows, D, seed=3)
    tilt = 0.5 + gap * normal(rows, 1, seed=4)
    return (tilt * e[order[0]] + (1 - tilt) * e[order[1]]).to(dtype), e.to(dtype)


def hard_cases():
    x, e = normal(64, 8), normal(200, 8, seed=1)
    unit = torch.nn.functional.normalize
    cauchy = torch.distributions.Cauchy(0, 1).icdf
    uniform = torch.rand(200, 8, generator=torch.Generator().manual_seed(5)).clamp(1e-4, 1 - 1e-4)
    tilted, tied = near_ties(64, 256, 8, 1e-7)
    yield "near ties", tilted, tied
    yield "near ties in fp64", *near_ties(64, 256, 8, 1e-15, torch.float64)
    yield "near ties in bf16", *near_ties(64, 256, 8, 1e-7, torch.bfloat16)
    yield "far from the origin", tilted + 1000, tied + 1000
    yield "rows far from the codes", x * 1e6, e
    yield "codes far from the rows", x * 1e-6, e
    yield "start of training", x, (uniform * 2 - 1) / 200
    yield "on the sphere", unit(x), unit(e)
    yield "low rank", x[:, :2] @ e[:2], e[:, :2] @ e[:2]
    yield "heavy tails", cauchy(uniform[:64]), cauchy(uniform)
    yield "every code five times", x, e[:64].repeat(5, 1)
    yield "every code the same", x[:8], e[:1].expand(400, 8)
    yield "only zeros", x[:8], torch.zeros(300, 8)
    yield "large", tilted * 1e15, tied * 1e15
    yield "small", tilted * 1e-15, tied * 1e-15
    yield "largest", x[:8] * 3e38 / x.abs().amax(), e[:100] * 3e38 / e.abs().amax()
    yield "subnormal", x[:8] * 1e-40, e[:100] * 1e-40
    yield "largest in fp64", x[:8].double() * 1e154, e[:100].double() * 1e154
    yield "small in fp64", x[:8].double() * 1e-140, e[:100].double() * 1e-140


@pytest.mark.parametrize("name, x, e", [pytest.param(*case, id=case[0]) for case in hard_cases()])
def test_assign_of_hard_cases(name, x, e):
    for metric in (L2, COSINE) if name != "subnormal" else (L2,):
        check_assign(x, e, metric)
