"""Bad arguments of vector quantization: one text in eager and under compile; and valid arguments, mutated."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from test_bad_arguments import EXPECTED, MUTATIONS, mutate

import vaeops
from vaeops.ref import vq as ref

X, E = torch.zeros(3, 4), torch.zeros(5, 4)
IDX = torch.zeros(3, dtype=torch.int64)
SEED = torch.tensor([1, 2])
STATE = torch.ones(5), torch.ones(5, 4), torch.ones(5, 4)
COUNTS = torch.ones(5), torch.ones(5, 4)
FLOATS = "must be float32, bfloat16, float16 or float64, got"


def on_rows(name):
    """The checks that every function of rows and a codebook makes, for one of them."""
    f = {
        "vq_assign": vaeops.vq_assign,
        "vq_topk": lambda x, e, **kw: vaeops.vq_topk(x, e, 2, **kw),
        "vector_quantize": vaeops.vector_quantize,
        "vq_sample": lambda x, e, **kw: vaeops.vq_sample(x, e, 1.0, SEED, **kw),
        "vq_entropy": vaeops.vq_entropy,
    }[name]
    text = lambda t: f"{name}: {t}"  # noqa: E731
    yield lambda: f([1.0], E), TypeError, text("x must be a tensor, got list")
    yield lambda: f(X.long(), E), TypeError, text(f"x {FLOATS} torch.int64")
    yield lambda: f(X, None), TypeError, text("codebook must be a tensor, got NoneType")
    yield lambda: f(X, E.bool()), TypeError, text(f"codebook {FLOATS} torch.bool")
    yield lambda: f(X, E[0]), ValueError, text(r"codebook must have shape \[K, D\], got \[4\]")
    yield (
        lambda: f(X, E[:0]),
        ValueError,
        text(r"codebook must hold at least one element, got shape \[0, 4\]"),
    )
    yield lambda: f(X, E.to("meta")), ValueError, text("codebook is on meta, it must be on cpu")
    yield (
        lambda: f(X, E[:, :3]),
        ValueError,
        text(r"x \[3, 4\] must have the codebook's D = 3 along dim 1, got 4"),
    )
    yield lambda: f(X.sum(), E), ValueError, text(r"x must have at least one dim, got shape \[\]")
    yield lambda: f(X, E, channel_dim=2), ValueError, text(r"channel_dim must be in \[-2, 1\], got 2")
    yield lambda: f(X, E, channel_dim=1.0), TypeError, text("channel_dim must be an int, got float")
    yield lambda: f(X, E, channel_dim=0), ValueError, text("x .* along dim 0, got 3")
    yield lambda: f(X, E, mask=[True]), TypeError, text("mask must be None or a bool tensor, got list")
    yield lambda: f(X, E, mask=torch.ones(3)), TypeError, text("mask must be bool, got torch.float32")
    yield lambda: f(X, E, mask=X > 0), ValueError, text(r"mask must have x's shape .* \[3\], got \[3, 4\]")
    yield lambda: f(X, E, mask=(IDX > 0).to("meta")), ValueError, text("mask is on meta")
    yield (
        lambda: f(X, E, metric="l1"),
        ValueError,
        text(r"metric must be one of \('l2', 'cosine', 'dot'\), got 'l1'"),
    )


def cases():
    for name in ("vq_assign", "vq_topk", "vector_quantize", "vq_sample", "vq_entropy"):
        yield from on_rows(name)
    for name in ("vq_assign", "vector_quantize"):
        f = getattr(vaeops, name)
        yield lambda f=f: f(X, E, precision="half"), ValueError, f"{name}: precision must be one of"
        yield lambda f=f: f(X, E, impl="gpu"), ValueError, f"{name}: impl must be None or one of"
        yield (
            lambda f=f: f(X, E, impl="cuda"),
            ValueError,
            f"{name}: impl='cuda' cannot run on cpu tensors here",
        )

    yield (
        lambda: vaeops.vq_assign(X, E, index_dtype=torch.int16),
        ValueError,
        "index_dtype must be torch.int64 or",
    )
    yield lambda: vaeops.vq_topk(X, E, 6), ValueError, r"vq_topk: k must be in \[1, 5\], got 6"
    yield lambda: vaeops.vq_topk(X, E, 0), ValueError, r"vq_topk: k must be in \[1, 5\], got 0"
    yield lambda: vaeops.vq_topk(X, E, 1.0), TypeError, "vq_topk: k must be an int, got float"

    yield lambda: vaeops.vq_lookup(IDX, E[0]), ValueError, r"vq_lookup: codebook must have shape \[K, D\]"
    yield lambda: vaeops.vq_lookup([0], E), TypeError, "vq_lookup: indices must be a tensor, got list"
    yield (
        lambda: vaeops.vq_lookup(X, E),
        TypeError,
        "vq_lookup: indices must be int64 or int32, got torch.float32",
    )
    yield lambda: vaeops.vq_lookup(IDX.to("meta"), E), ValueError, "vq_lookup: indices is on meta"
    yield (
        lambda: vaeops.vq_lookup(IDX, E, channel_dim=2),
        ValueError,
        r"channel_dim must be in \[-2, 1\], got 2",
    )
    yield lambda: vaeops.vq_lookup(IDX, E, fill="0"), TypeError, "vq_lookup: fill must be a float, got str"
    yield lambda: vaeops.vq_lookup(IDX, E, impl="gpu"), ValueError, "vq_lookup: impl must be None or one of"

    q = vaeops.vector_quantize
    yield lambda: q(X, E, estimator="gumbel"), ValueError, "vector_quantize: estimator must be one of"
    yield lambda: q(X, E, reduction="batch"), ValueError, "vector_quantize: reduction must be one of"
    yield lambda: q(X, E, deterministic=True), ValueError, "deterministic must be None or 'bitwise', got True"
    yield lambda: q(X, E, deterministic="bitwise"), ValueError, "about counts and sums, it needs stats=True"

    r = vaeops.residual_vq
    yield lambda: r(X, E), ValueError, r"residual_vq: codebooks must have shape \[Q, K, D\], got \[5, 4\]"
    yield lambda: r(X, E[None, :, :2]), ValueError, "residual_vq: x .* must have the codebook's D = 2"
    yield lambda: r(X, E[None], estimator="x"), ValueError, "residual_vq: estimator must be one of"
    yield lambda: r(X, E[None], mask=X > 0), ValueError, "residual_vq: mask must have x's shape"
    yield lambda: r(X, E[None], reduction="x"), ValueError, "reduction must be one of"

    for f in (vaeops.perplexity, vaeops.usage):
        yield lambda f=f: f([1.0]), TypeError, "counts must be a tensor, got list"

    ema, expire = vaeops.vq_ema_, vaeops.vq_expire_
    yield lambda: ema(*STATE, *COUNTS, decay=1.5), ValueError, r"vq_ema_: decay must be in \[0, 1\], got 1.5"
    yield lambda: ema(*STATE, *COUNTS, decay="1"), TypeError, "vq_ema_: decay must be a float, got str"
    yield lambda: ema(*STATE, *COUNTS, eps=-1.0), ValueError, r"vq_ema_: eps must be in \[0, inf\), got -1.0"
    yield lambda: ema(*STATE, *COUNTS, eps=math.nan), ValueError, "vq_ema_: eps must be in"
    yield (
        lambda: ema(*STATE, *COUNTS[::-1]),
        ValueError,
        r"vq_ema_: counts must have shape \[5\] for codebook",
    )
    yield (
        lambda: ema(STATE[0], STATE[0], STATE[2], *COUNTS),
        ValueError,
        r"embed_sum must have shape \[5, 4\]",
    )
    yield lambda: ema(*STATE, COUNTS[0].long(), COUNTS[1]), TypeError, f"vq_ema_: counts {FLOATS}"
    yield lambda: ema(STATE[0], None, STATE[2], *COUNTS), TypeError, "vq_ema_: embed_sum must be a tensor"
    yield lambda: ema(*STATE[:2], STATE[0], *COUNTS), ValueError, r"codebook must have shape \[\*L, K, D\]"
    yield lambda: expire(*STATE, X, threshold=-1.0, seed=SEED), ValueError, "vq_expire_: threshold must be in"
    yield (
        lambda: expire(*STATE, X, threshold=1.0, seed=SEED, reset=0.0),
        ValueError,
        "vq_expire_: reset must be in",
    )
    yield (
        lambda: expire(*STATE, X, threshold=1.0, seed=1),
        TypeError,
        "vq_expire_: seed must be an int64 tensor",
    )
    yield lambda: expire(*STATE, X, threshold=1.0, seed=SEED.expand(3, 2)), ValueError, "vq_expire_: seed"
    yield lambda: expire(*STATE, X[:, :2], threshold=1.0, seed=SEED), ValueError, "vq_expire_: x .* D = 4"
    yield lambda: expire(*STATE, X, threshold=1.0, seed=SEED, mask=X > 0), ValueError, "vq_expire_: mask"
    yield (
        lambda: expire(STATE[1], *STATE[1:], X, threshold=1.0, seed=SEED),
        ValueError,
        "cluster_size must have",
    )

    k = vaeops.kmeans
    yield lambda: k(None, 2, 1, SEED), TypeError, "kmeans: x must be a tensor, got NoneType"
    yield lambda: k(X.long(), 2, 1, SEED), TypeError, f"kmeans: x {FLOATS}"
    yield lambda: k(X, 0, 1, SEED), ValueError, "kmeans: K must be at least 1, got 0"
    yield lambda: k(X, 2.0, 1, SEED), TypeError, "kmeans: K must be an int, got float"
    yield lambda: k(X, 2, 0, SEED), ValueError, "kmeans: iters must be at least 1, got 0"
    yield lambda: k(X, 2, 1, None), TypeError, "kmeans: seed must be an int64 tensor"
    yield (
        lambda: k(X, 2, 1, SEED, metric="dot"),
        ValueError,
        r"kmeans: metric must be one of \('l2', 'cosine'\)",
    )
    yield lambda: k(X[:0], 2, 1, SEED), ValueError, "kmeans: x must have at least one row"
    yield lambda: k(X, 2, 1, SEED, mask=X > 0), ValueError, "kmeans: mask must have x's shape"
    yield lambda: k(X, 2, 1, SEED, impl="gpu"), ValueError, "kmeans: impl must be None or one of"

    s = vaeops.vq_sample
    yield lambda: s(X, E, -1.0, SEED), ValueError, r"vq_sample: temperature must be in \[0, inf\), got -1.0"
    yield lambda: s(X, E, 1.0, SEED.float()), TypeError, "vq_sample: seed must be int64"
    yield lambda: s(X, E, 1.0, SEED.to("meta")), ValueError, "vq_sample: seed is on meta"
    yield (
        lambda: vaeops.vq_entropy(X, E, temperature=0.0),
        ValueError,
        r"temperature must be in \(0, inf\), got 0.0",
    )

    fsq = vaeops.fsq
    yield lambda: fsq(X, 8), TypeError, "fsq: levels must be a list of ints, got 8"
    yield lambda: fsq(X, [8, 8, 8, 1]), ValueError, "fsq: levels must each be at least 2"
    yield lambda: fsq(X, [8, 8]), ValueError, r"fsq: x \[3, 4\] must have 2 channels, .* got 4"
    yield lambda: fsq(X, [2**17] * 4), ValueError, r"fsq: levels must have a product of at most 2\^63"
    yield lambda: fsq(X.long(), [8] * 4), TypeError, f"fsq: x {FLOATS}"
    yield lambda: vaeops.fsq_decode(X, [8]), TypeError, "fsq_decode: indices must be int64 or int32"
    yield lambda: vaeops.fsq_decode([1], [8]), TypeError, "fsq_decode: indices must be a tensor, got list"
    yield lambda: vaeops.lfq(torch.zeros(2, 64)), ValueError, "lfq: x must have at most 63 channels, got 64"
    yield lambda: vaeops.lfq("x"), TypeError, "lfq: x must be a tensor, got str"
    yield lambda: vaeops.lfq(X, channel_dim=5), ValueError, r"lfq: channel_dim must be in \[-2, 1\], got 5"
    yield lambda: vaeops.lfq_decode(IDX, 64), ValueError, r"lfq_decode: dims must be in \[1, 63\], got 64"


CASES = list(cases())


@pytest.mark.parametrize(("call", "error", "text"), CASES)
def test_bad_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize(("call", "error", "text"), CASES)
def test_bad_arguments_under_compile(call, error, text):
    torch._dynamo.reset()
    with pytest.raises(Exception, match=text):
        torch.compile(call, fullgraph=True, backend="eager")()


# ---- valid arguments with one mutation: computes the right shapes, or says what is wrong


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_vector_quantize_of_mutated_arguments(data):
    draw = data.draw
    rows, d = draw(st.lists(st.integers(0, 5), max_size=3)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    tensors = {
        "x": torch.ones(*rows, d, dtype=dtype),
        "codebook": torch.randn(draw(st.integers(1, 5)), d),
        "mask": torch.ones(rows, dtype=torch.bool),
    }
    victim = draw(st.sampled_from(sorted(tensors)))
    tensors[victim] = mutate(draw(st.sampled_from(MUTATIONS)), tensors[victim], draw)
    options = {
        "metric": draw(st.sampled_from([*ref.METRICS, "l1"])),
        "estimator": draw(st.sampled_from([*ref.ESTIMATORS, 3])),
        "reduction": draw(st.sampled_from([*ref.REDUCTIONS, "batchmean"])),
        "stats": draw(st.booleans()),
        "deterministic": draw(st.sampled_from([None, "bitwise"])),
        "channel_dim": draw(st.sampled_from([-1, -1, len(rows), 0, -9])),
    }
    leaves = {k: t.detach().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
              for k, t in tensors.items()}  # fmt: skip
    try:
        out = vaeops.vector_quantize(leaves.pop("x"), leaves.pop("codebook"), **leaves, **options)
    except EXPECTED as error:
        assert str(error)
        return
    x, dim = tensors["x"], options["channel_dim"]
    assert out.quantized.shape == x.shape and out.quantized.dtype is x.dtype
    assert out.indices.shape == x.movedim(dim, -1).shape[:-1]
    assert out.commit_loss.shape == (out.indices.shape if options["reduction"] == "none" else ())
    assert (out.counts is not None) == options["stats"]
    if not x.is_meta:
        (out.quantized.sum() + out.commit_loss.sum() + out.codebook_loss.sum()).backward()


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_low_level_ops_stay_in_bounds(data):
    """The ops below the public checks, as an exported graph calls them: compute in bounds, or raise."""
    draw = data.draw
    n, k, d = draw(st.integers(0, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    option = lambda low, high: draw(st.integers(low - 1, high + 1))  # noqa: E731
    x, e, indices = torch.ones(n, d), torch.ones(k, d), torch.randint(-1, k, (n,))
    mask, w = torch.ones(n, dtype=torch.bool), torch.ones(n)
    name, args = draw(
        st.sampled_from(
            [
                ("vq_assign", [x, e, mask, option(0, 2), True, False]),
                ("vq_topk", [x, e, mask, draw(st.integers(-1, 6)), option(0, 2), True, True]),
                ("vq_gather", [indices, e, x, 0.0, option(-1, 2)]),
                ("vq_gather_bwd", [x, w, x, e, indices, option(0, 2)]),
                ("vq_segment_sum", [x, indices, w, None, k, True, False]),
                ("vq_segment_sum", [x, indices, None, torch.tensor(1.0), k, True, False]),
            ]
        )
    )
    which = draw(st.sampled_from([i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]))
    args[which] = mutate(draw(st.sampled_from(MUTATIONS)), args[which], draw)
    try:
        getattr(torch.ops.vaeops, name)(*args)
    except (*EXPECTED, IndexError):  # on meta tensors the fake indexes shapes
        return
