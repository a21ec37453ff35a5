"""Valid arguments with one mutation: an op computes (right shapes, in bounds) or says what is wrong.

Random tensors find little; one change to a valid call finds what a check forgot. `make sanitize` runs it
under ASan.
"""

import math

import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import vaeops
from vaeops import rng

MUTATIONS = ("none", "dtype", "rank", "size", "transpose", "expand", "meta", "offset", "empty", "nan", "type")
EXPECTED = (ValueError, TypeError, RuntimeError, NotImplementedError)


def mutate(how: str, x: torch.Tensor, draw) -> object:
    if how == "dtype":
        return x.to(
            draw(st.sampled_from([torch.float64, torch.bfloat16, torch.int64, torch.complex64, torch.bool]))
        )
    if how == "rank":
        return x.unsqueeze(draw(st.integers(0, x.dim())))
    if how == "size":
        return torch.ones([s + 1 for s in x.shape], dtype=x.dtype)
    if how == "transpose" and x.dim() > 1:
        return x.transpose(0, 1)
    if how == "expand" and x.dim() > 0 and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    if how == "meta":
        return x.to("meta")
    if how == "offset":
        return torch.ones(x.numel() + 3, dtype=x.dtype)[3:].view(x.shape)
    if how == "empty" and x.dim() > 0:
        return x[..., :0]
    if how == "nan" and x.is_floating_point():
        return torch.full_like(x, math.nan)
    if how == "type":
        return draw(st.sampled_from([None, 1.0, "x", [1.0]]))
    return x


@st.composite
def arguments(draw):
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    batch_ndim = draw(st.integers(0, len(shape)))
    tensors = {"mu": torch.ones(shape, dtype=dtype), "logvar": torch.ones(shape, dtype=dtype)}
    prior = draw(st.sampled_from([None, (), shape[-1:], shape]))
    if prior is not None:
        tensors |= {"prior_mu": torch.zeros(prior, dtype=dtype), "prior_rho": torch.ones(prior, dtype=dtype)}
    noise = draw(st.sampled_from(["fresh", "seed", "streams", "eps"]))
    if noise == "seed":
        tensors["seed"] = torch.tensor([1, 2])
    elif noise == "streams":
        tensors["seed"] = torch.ones(*shape[:batch_ndim], 2, dtype=torch.int64)
    elif noise == "eps":
        tensors["eps"] = torch.ones(shape)
    options = {
        "reduction": draw(st.sampled_from([*vaeops.ref.gaussian.REDUCTIONS, "median"])),
        "param": draw(st.sampled_from([*vaeops.ref.gaussian.PARAMS, "var"])),
        "batch_ndim": draw(st.sampled_from([batch_ndim, batch_ndim, batch_ndim, -1, 9, 1.5])),
        "temperature": draw(st.sampled_from([1.0, 0.5, 0, -1.0, math.nan, math.inf])),
        "clamp": draw(st.sampled_from([None, (-1, 1), (1, -1), (0, math.nan), 3])),
    }
    victim = draw(st.sampled_from(sorted(tensors)))
    tensors[victim] = mutate(draw(st.sampled_from(MUTATIONS)), tensors[victim], draw)
    return tensors, options


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(arguments())
def test_reparam_kl(call):
    tensors, options = call
    if "prior_mu" in tensors:
        options["prior"] = (tensors.pop("prior_mu"), tensors.pop("prior_rho"))
    mu, logvar = tensors.pop("mu"), tensors.pop("logvar")
    leaves = [
        t.detach().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in (mu, logvar)
    ]
    try:
        z, kl, _ = vaeops.reparam_kl(*leaves, **tensors, **options)
    except EXPECTED as error:
        assert str(error)
        return
    shape = torch.broadcast_shapes(mu.shape, logvar.shape)
    assert z.shape == shape and z.dtype == mu.dtype
    code = vaeops.ref.gaussian.REDUCTIONS.index(options["reduction"])
    assert list(kl.shape) == vaeops.ref.gaussian.reduced_shape(shape, code, options["batch_ndim"])
    if not z.is_meta:
        torch.autograd.backward([z, kl], [torch.ones_like(z), torch.ones_like(kl)])
        assert all(t.grad.shape == t.shape for t in leaves if t.requires_grad)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_low_level_op_stays_in_bounds(data):
    """The op below the public checks, as an exported graph calls it: computes in bounds, or raises."""
    shape = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    args = [
        torch.ones(shape),
        torch.ones(shape),
        torch.ones(shape[-1:]),
        torch.ones(shape[-1:]),
        torch.tensor([1, 2]),
        None,
    ]
    which = data.draw(st.integers(0, 4))
    args[which] = mutate(data.draw(st.sampled_from(MUTATIONS)), args[which], data.draw)
    options = (
        data.draw(st.integers(-1, 3)),  # packed_dim
        data.draw(st.integers(-1, 3)),  # param
        -math.inf,
        math.inf,
        data.draw(st.integers(-2, 6)),  # reduction
        data.draw(st.integers(-1, 4)),  # batch_ndim
        1.0,
    )
    try:
        z, kl = torch.ops.vaeops.gaussian_fwd(*args, *options)
    except (*EXPECTED, IndexError):  # on meta tensors the fake indexes shapes
        return
    if z is not None and not z.is_meta:
        torch.ops.vaeops.gaussian_bwd(
            torch.ones_like(z), None if kl is None else torch.ones_like(kl), *args, *options
        )


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_rng(data):
    seed = torch.ones(*data.draw(st.lists(st.integers(0, 3), max_size=2)), 2, dtype=torch.int64)
    size = [*seed.shape[:-1], *data.draw(st.lists(st.integers(0, 5), max_size=2))]
    seed = mutate(data.draw(st.sampled_from(MUTATIONS)), seed, data.draw)
    try:
        assert list(rng.normal(size, seed).shape) == size
        child = rng.fold_in(seed, mutate(data.draw(st.sampled_from(MUTATIONS)), torch.arange(3), data.draw))
        assert child.shape[-1] == 2
    except EXPECTED as error:
        assert str(error)


@st.composite
def reconstructions(draw):
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    target = draw(st.sampled_from([dtype, torch.float32, torch.uint8, torch.bool]))
    batch_ndim = draw(st.integers(0, len(shape)))
    tensors = {"pred": torch.full(shape, 0.5, dtype=dtype), "target": torch.ones(shape, dtype=target)}
    if draw(st.booleans()):
        tensors["weight"] = torch.ones(draw(st.sampled_from([(), shape[-1:], shape])))
    if draw(st.booleans()):
        tensors["mask"] = torch.ones(draw(st.sampled_from([(), shape[-1:], shape])), dtype=torch.bool)
    options = {
        "kind": draw(st.sampled_from([*vaeops.ref.recon.KINDS, "l3"])),
        "reduction": draw(st.sampled_from([*vaeops.ref.gaussian.REDUCTIONS, "median"])),
        "batch_ndim": draw(st.sampled_from([batch_ndim, batch_ndim, batch_ndim, -1, 9, 1.5])),
        "scale": draw(st.sampled_from([None, None, 0.5, 0, -1.0, math.nan, math.inf, "1"])),
    }
    victim = draw(st.sampled_from(sorted(tensors)))
    tensors[victim] = mutate(draw(st.sampled_from(MUTATIONS)), tensors[victim], draw)
    return tensors, options


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(reconstructions())
def test_recon_loss(call):
    tensors, options = call
    pred = tensors.pop("pred")
    if isinstance(pred, torch.Tensor) and pred.is_floating_point():
        pred = pred.detach().requires_grad_()
    try:
        loss = vaeops.recon_loss(pred, **tensors, **options)
    except EXPECTED as error:
        assert str(error)
        return
    code = vaeops.ref.gaussian.REDUCTIONS.index(options["reduction"])
    assert list(loss.shape) == vaeops.ref.gaussian.reduced_shape(pred.shape, code, options["batch_ndim"])
    if not loss.is_meta:
        loss.backward(torch.ones_like(loss))
        assert pred.grad.shape == pred.shape


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_low_level_losses_stay_in_bounds(data):
    shape = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    args = [torch.ones(shape), torch.ones(shape, dtype=torch.uint8), torch.ones(shape[-1:])]
    which = data.draw(st.integers(0, 2))
    args[which] = mutate(data.draw(st.sampled_from(MUTATIONS)), args[which], data.draw)
    options = (
        data.draw(st.integers(-1, 10)),  # kind
        data.draw(st.sampled_from([1.0, 0.0, math.nan])),  # scale
        data.draw(st.integers(-2, 6)),  # reduction
        data.draw(st.integers(-1, 4)),  # batch_ndim
    )
    rows = torch.ones(shape[0] + data.draw(st.integers(0, 1)))
    for forward, backward, extra in (
        (torch.ops.vaeops.recon_fwd, torch.ops.vaeops.recon_bwd, options),
        (torch.ops.vaeops.multinomial_fwd, torch.ops.vaeops.multinomial_bwd, ()),
    ):
        try:
            out = forward(*args, *extra)
            if extra:
                backward(torch.ones_like(out), *args, *extra)
            else:
                backward(rows, *args, rows.double(), rows)
        except (*EXPECTED, IndexError):  # on meta tensors the fake indexes shapes
            continue
