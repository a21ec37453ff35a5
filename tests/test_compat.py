"""Drop-ins against an independent statement of the peer's maths, and the peer where it is installed."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vaeops.compat.diffusers import DiagonalGaussianDistribution
from vaeops.compat.distributions import kl_normal


class Stated:
    """The documented behaviour of diffusers' class, with the sums over every dim but the first."""

    def __init__(self, parameters):
        half = parameters.shape[1] // 2
        self.m = parameters[:, :half]
        self.lv = parameters[:, half:].clamp(min=-30.0, max=20.0)

    def per_sample(self, x):
        return x.reshape(len(x), -1).sum(-1)

    def sample(self, eps):
        return self.m + self.lv.div(2).exp() * eps

    def kl(self, other=None):
        m, lv = (other.m, other.lv) if other is not None else (torch.zeros(()), torch.zeros(()))
        return self.per_sample(((self.lv - lv).exp() - (self.lv - lv) - 1 + (self.m - m) ** 2 / lv.exp()) / 2)

    def nll(self, x):
        return self.per_sample((math.log(2 * math.pi) + self.lv + (x - self.m) ** 2 * (-self.lv).exp()) / 2)


SHAPES = [(3, 8, 4, 5), (2, 8, 3, 4, 5), (3, 6), (2, 4, 7)]


def moments(shape, seed=0, dtype=torch.float32, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def half(shape):
    return (shape[0], shape[1] // 2, *shape[2:])


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape):
    ours_in, theirs_in = (moments(shape).requires_grad_() for _ in range(2))
    ours, theirs = DiagonalGaussianDistribution(ours_in), Stated(theirs_in)
    q, p = moments(shape, 1), moments(half(shape), 2)
    generator = torch.Generator().manual_seed(5)
    z = ours.sample(generator)
    eps = torch.randn(half(shape), generator=torch.Generator().manual_seed(5))
    pairs = [
        (z, theirs.sample(eps)),
        (ours.kl(), theirs.kl()),
        (ours.kl(), theirs.kl()),  # not the one that sample() left
        (ours.kl(DiagonalGaussianDistribution(q)), theirs.kl(Stated(q))),
        (ours.nll(p), theirs.nll(p)),
    ]
    for a, b in pairs:
        torch.testing.assert_close(a, b)
        w = torch.randn(a.shape, generator=torch.Generator().manual_seed(9))
        torch.testing.assert_close(*(torch.autograd.grad(t, i, w, retain_graph=True)[0]
                                     for t, i in ((a, ours_in), (b, theirs_in))))  # fmt: skip


def test_clamp_and_attributes():
    parameters = torch.tensor([[1.0, 2.0, 3.0, -80.0, 0.5, 90.0]], requires_grad=True)
    q = DiagonalGaussianDistribution(parameters)
    assert q.mean.tolist() == [[1.0, 2.0, 3.0]] and torch.equal(q.mode(), q.mean)
    assert q.logvar.tolist() == [[-30.0, 0.5, 20.0]]
    torch.testing.assert_close(q.std, (0.5 * q.logvar).exp())
    torch.testing.assert_close(q.var, q.logvar.exp())
    torch.testing.assert_close(q.kl(), Stated(parameters).kl())
    q.kl().sum().backward()
    assert parameters.grad[0, 3] == 0 and parameters.grad[0, 5] == 0 and parameters.grad[0, 4] != 0


def test_attributes_follow_the_grad_mode_of_their_reader():
    q = DiagonalGaussianDistribution(moments((2, 4)).requires_grad_())
    with torch.no_grad():
        assert not q.std.requires_grad
        q.sample()
        assert not q.kl().requires_grad
        q.sample()
    assert q.std.requires_grad and q.kl().requires_grad  # not the one made without a graph


def test_the_kl_is_of_the_moments_as_they_are_now():
    p = moments((2, 4))
    q = DiagonalGaussianDistribution(p.clone())
    q.sample()
    q.parameters.mul_(2)
    torch.testing.assert_close(q.kl(), DiagonalGaussianDistribution(2 * p).kl())
    q.sample()
    q.parameters = p
    torch.testing.assert_close(q.kl(), DiagonalGaussianDistribution(p).kl())
    with torch.inference_mode():
        q = DiagonalGaussianDistribution(p.clone())
        q.sample()
        q.parameters.mul_(2)
        torch.testing.assert_close(q.kl(), DiagonalGaussianDistribution(2 * p).kl())


def test_kl_to_a_batch_of_others():
    one, others = moments((1, 4)), moments((3, 4), seed=1)
    kl = DiagonalGaussianDistribution(one).kl(DiagonalGaussianDistribution(others))
    again = DiagonalGaussianDistribution(one.expand(3, 4)).kl(DiagonalGaussianDistribution(others))
    assert kl.shape == (3,) and torch.equal(kl, again)


def test_one_generator_per_sample_draws_each_alone():
    q = DiagonalGaussianDistribution(moments((3, 8, 4, 5)))
    z = q.sample([torch.Generator().manual_seed(i) for i in range(3)])
    for i in range(3):
        alone = DiagonalGaussianDistribution(q.parameters[i : i + 1]).sample(torch.Generator().manual_seed(i))
        assert torch.equal(z[i : i + 1], alone)
    one = q.sample([torch.Generator().manual_seed(4)])
    assert torch.equal(one, q.sample(torch.Generator().manual_seed(4)))
    with pytest.raises(ValueError, match="one for each of the 3 samples, got 2"):
        q.sample([torch.Generator(), torch.Generator()])


def test_without_a_generator_the_fused_stream_draws():
    q = DiagonalGaussianDistribution(moments((512, 64), scale=0.1))
    torch.manual_seed(0)
    a, b = q.sample(), q.sample()
    torch.manual_seed(0)
    assert torch.equal(a, q.sample()) and not torch.equal(a, b)
    eps = (a - q.mean) / q.std
    assert eps.mean().abs() < 0.03 and (eps.std() - 1).abs() < 0.03


def test_traces():
    def loss(parameters):
        q = DiagonalGaussianDistribution(parameters)
        z = q.sample()
        return q.kl().sum() + q.nll(q.mode()).sum() + 0 * z.sum()

    parameters = moments((2, 8, 3, 4)).requires_grad_()
    compiled, eager = torch.compile(loss, fullgraph=True, backend="aot_eager")(parameters), loss(parameters)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(*(torch.autograd.grad(t, parameters)[0] for t in (compiled, eager)))


def test_deterministic():
    parameters = moments((3, 8, 4, 5)).requires_grad_()
    q = DiagonalGaussianDistribution(parameters, deterministic=True)
    g = torch.Generator().manual_seed(0)
    assert torch.equal(q.sample(g), q.mean)
    moved = torch.Generator().manual_seed(0)
    torch.randn(half(parameters.shape), generator=moved)
    assert torch.equal(g.get_state(), moved.get_state())  # the peer draws too
    assert not q.std.any() and not q.var.any()
    assert q.kl().tolist() == q.nll(q.mean).tolist() == [0.0] * 3
    with pytest.raises(ValueError, match="other is deterministic"):
        DiagonalGaussianDistribution(parameters).kl(q)


def test_nll_over_given_dims():
    parameters = moments((2, 8, 3, 4))
    q, x = DiagonalGaussianDistribution(parameters), moments((2, 4, 3, 4), 3)
    torch.testing.assert_close(q.nll(x, dims=[1, 2, 3]), q.nll(x))
    torch.testing.assert_close(q.nll(x, dims=(-1, 1, 2)), q.nll(x))
    apart = q.nll(x, dims=[1])
    assert apart.shape == (2, 3, 4)
    torch.testing.assert_close(apart.sum((1, 2)), q.nll(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    parameters = moments((2, 8, 4, 4), dtype=dtype)
    q, exact = DiagonalGaussianDistribution(parameters), Stated(parameters.double())
    reduced = torch.float64 if dtype is torch.float64 else torch.float32
    x = moments((2, 4, 4, 4), 3)
    assert q.sample().dtype is q.std.dtype is dtype and q.kl().dtype is q.nll(x.to(dtype)).dtype is reduced
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(q.kl().double(), exact.kl(), **tolerance)
    torch.testing.assert_close(q.nll(x).double(), exact.nll(x.double()), **tolerance)


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.zeros(2, 5), torch.zeros(2, 3, 4)])
def test_refuses_other_shapes(bad):
    with pytest.raises(ValueError, match=r"parameters must be \[B, 2C, ...\]"):
        DiagonalGaussianDistribution(bad)


def test_against_diffusers_itself():
    peer = pytest.importorskip("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution
    parameters, other, x = (
        moments((2, 8, 4, 4), scale=3.0),
        moments((2, 8, 4, 4), 1),
        moments((2, 4, 4, 4), 2),
    )
    for deterministic in (False, True):
        ours, theirs = (
            c(parameters, deterministic=deterministic) for c in (DiagonalGaussianDistribution, peer)
        )
        for name in ("mean", "logvar", "std", "var"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
        torch.testing.assert_close(*(d.sample(torch.Generator().manual_seed(3)) for d in (ours, theirs)))
        torch.testing.assert_close(ours.mode(), theirs.mode())
        torch.testing.assert_close(ours.kl(), theirs.kl().expand(2))
        torch.testing.assert_close(ours.kl(peer(other)), theirs.kl(peer(other)).expand(2))
        torch.testing.assert_close(ours.nll(x), theirs.nll(x).expand(2))


def normals(p_shape=(5, 3), q_shape=(3,), dtype=torch.float64):
    g = torch.Generator().manual_seed(0)

    def draw(s):
        return torch.randn(s, generator=g, dtype=dtype)

    leaves = [
        t.requires_grad_() for t in (draw(p_shape), draw(p_shape).exp(), draw(q_shape), draw(q_shape).exp())
    ]
    return leaves, Normal(*leaves[:2]), Normal(*leaves[2:])


@pytest.mark.parametrize(
    ("p_shape", "q_shape"), [((5, 3), (3,)), ((3,), (5, 3)), ((5, 1), (1, 3)), ((), ()), ((4,), ())]
)
def test_kl_normal(p_shape, q_shape):
    leaves, p, q = normals(p_shape, q_shape)
    ours, theirs = kl_normal(p, q), kl_divergence(p, q)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(2 * ours.sum(), leaves), torch.autograd.grad(2 * theirs.sum(), leaves)
    ):
        torch.testing.assert_close(a, b)


def test_kl_normal_reduces():
    _, p, q = normals()
    torch.testing.assert_close(kl_normal(p, q, reduction="sample"), kl_divergence(p, q).sum(1))
    torch.testing.assert_close(kl_normal(p, q, reduction="dim", batch_ndim=2), kl_divergence(p, q).mean())


def test_kl_normal_of_several_dtypes():
    p, q = normals()[1], normals(dtype=torch.float32)[2]
    ours, theirs = kl_normal(p, q), kl_divergence(p, q)
    assert ours.dtype is theirs.dtype is torch.float64
    torch.testing.assert_close(ours, theirs)


def test_kl_normal_where_the_peer_breaks():
    p, q = Normal(torch.tensor(0.0), torch.tensor(1e-25)), Normal(torch.tensor(0.0), torch.tensor(1.0))
    assert kl_divergence(p, q).isinf()
    torch.testing.assert_close(kl_normal(p, q), torch.tensor(-math.log(1e-25) - 0.5))


def test_kl_normal_refuses_other_distributions():
    _, p, q = normals()
    with pytest.raises(TypeError, match=r"q must be a torch\.distributions\.Normal, got Independent"):
        kl_normal(p, torch.distributions.Independent(q, 1))
