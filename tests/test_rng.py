"""The noise stream: known answers, the same bits everywhere, public functions' promises, statistics."""

import math

import pytest
import torch

import vaeops
from vaeops import rng
from vaeops.ref import rng as ref

SEED = torch.tensor([0x0123456789ABCDEF, 0x77665544332211])


# ---- values: known answers and bits


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # Random123's kat_vectors, philox4x32-10
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(key, counter, expected):
    words = ref.philox(torch.tensor(key), tuple(torch.tensor(c) for c in counter))
    assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize("n", [0, 1, 3, 4, 63, 64, 65, 1025, 40_000])
def test_cpu_kernel_has_the_reference_bits(isa, n):
    assert torch.equal(rng.normal((n,), SEED, impl="cpp"), ref.normal((n,), SEED))


@pytest.fixture(scope="module")
def million():
    return ref.normal((1 << 20,), SEED)


def test_every_instruction_set_makes_the_same_bits(isa, million):
    # Enough draws to meet every branch of the logarithm's and the angle's range reduction many times.
    assert torch.equal(rng.normal((1 << 20,), SEED), million)


@pytest.mark.parametrize("offset", [2**32 - 3, 2**63 - 5, -3, 2**40])
def test_counters_carry_past_32_bits_and_wrap_past_64(offset):
    seed = torch.tensor([5, offset])
    whole = rng.normal((64,), seed)
    assert torch.equal(whole, ref.normal((64,), seed))
    # The block behind the carry is what a stream that begins there draws.
    assert torch.equal(whole[32:], rng.normal((32,), rng.advance(seed, 32)))
    assert whole.unique().numel() == 64


@pytest.mark.parametrize("offset", [2**32 - 100, 2**40 - 16, -77])
def test_a_carry_in_the_middle_of_a_draw(isa, offset):
    # Kernels draw ahead, and take a short cut as long as the counter's high word stays the same.
    seed = torch.tensor([SEED[0], offset])
    assert torch.equal(rng.normal((1000,), seed), ref.normal((1000,), seed))


@pytest.mark.parametrize("length", [1, 4, 13, 64, 100])
def test_batched_seeds_are_one_stream_each(length):
    seeds = rng.make_seed(batch=(3, 2))
    noise = rng.normal((3, 2, length), seeds)
    for i in range(3):
        for j in range(2):
            assert torch.equal(noise[i, j], rng.normal((length,), seeds[i, j]))


def test_a_sharded_batch_draws_the_joined_batch_noise():
    whole = rng.normal((8, 3, 20), SEED)
    for rank in range(4):
        assert torch.equal(
            whole[2 * rank : 2 * rank + 2], rng.normal((2, 3, 20), rng.advance(SEED, rank * 2 * 60))
        )


def test_advance_by_a_tensor():
    steps = torch.tensor([0, 4, 400])
    for row, n in zip(rng.advance(SEED, steps), steps.tolist()):
        assert torch.equal(row, rng.advance(SEED, n))


def test_noise_does_not_depend_on_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = rng.normal((100_000,), SEED)
        torch.set_num_threads(3)
        assert torch.equal(one, rng.normal((100_000,), SEED))
    finally:
        torch.set_num_threads(threads)


# ---- seeds


def test_make_seed_follows_the_generators():
    torch.manual_seed(3)
    a, b = rng.make_seed(), rng.make_seed()
    torch.manual_seed(3)
    assert torch.equal(a, rng.make_seed()) and torch.equal(b, rng.make_seed()) and not torch.equal(a, b)
    g = torch.Generator().manual_seed(5)
    c = rng.make_seed(generator=g, batch=4)
    assert c.shape == (4, 2) and torch.equal(
        c, rng.make_seed(generator=torch.Generator().manual_seed(5), batch=4)
    )


def test_fold_in_matches_the_reference_and_separates_streams():
    index = torch.arange(1000)
    children = rng.fold_in(SEED, index)
    assert torch.equal(children, ref.fold_in(SEED, index))
    assert children.unique(dim=0).shape[0] == 1000
    assert torch.equal(rng.split(SEED, 5), children[:5])
    assert torch.equal(rng.fold_in(SEED, 7), children[7])
    # Folding an advanced seed is no other fold of the first one.
    assert not torch.equal(rng.fold_in(rng.advance(SEED, 4), 0), rng.fold_in(SEED, 1))
    seeds = rng.split(SEED, 6).view(3, 1, 2, 2)
    assert torch.equal(
        rng.fold_in(seeds, torch.arange(4).view(4, 1)), ref.fold_in(seeds, torch.arange(4).view(4, 1))
    )


def test_ops_add_this_very_noise():
    mu = torch.zeros(33, 7)
    z = vaeops.reparameterize(mu, mu, seed=SEED)
    assert torch.equal(z, rng.normal((33, 7), SEED))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        wide = vaeops.reparameterize(mu.to(dtype), mu.to(dtype), seed=SEED)
        assert torch.equal(wide, rng.normal((33, 7), SEED).to(dtype))


# ---- opcheck, compile


@pytest.mark.parametrize("seed", [SEED, rng.split(SEED, 3)])
def test_opcheck(seed):
    torch.library.opcheck(torch.ops.vaeops.normal.default, (seed, [3, 5]))
    torch.library.opcheck(torch.ops.vaeops.fold_in.default, (SEED, torch.arange(3)))


def test_compile_fullgraph_and_dynamic():
    torch.use_deterministic_algorithms(False)
    f = torch.compile(
        lambda s, x: rng.normal(x.shape, rng.fold_in(s, 3)) + x,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for n in (5, 9):
        x = torch.ones(n, 3)
        assert torch.equal(f(SEED, x), ref.normal((n, 3), ref.fold_in(SEED, torch.tensor(3))) + 1)


# ---- bad arguments


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: rng.normal((3,), SEED.float()), TypeError, "seed must be int64"),
        (lambda: rng.normal((3,), SEED[:1]), ValueError, r"seed must have shape \[2\]"),
        (lambda: rng.normal((3,), [1, 2]), TypeError, "seed must be an int64 tensor"),
        (lambda: rng.normal((-3,), SEED), ValueError, "shape must hold non-negative ints"),
        (lambda: rng.normal(3, SEED), TypeError, "shape must be a list or tuple of ints, got int"),
        (lambda: rng.normal((3,), SEED.expand(4, 2)), ValueError, "leading batch dims"),
        (lambda: rng.normal((), rng.split(SEED, 2)), ValueError, "stream dims|leading batch dims"),
        (lambda: rng.normal((3,), SEED, impl="fast"), ValueError, "impl must be None or one of"),
        (lambda: rng.normal((3,), SEED, impl="cuda"), ValueError, "impl='cuda' cannot run on cpu"),
        (lambda: rng.advance(SEED, 6), ValueError, "multiple of 4"),
        (lambda: rng.advance(SEED, 2**65), ValueError, r"elements must be in \[-2\^65, 2\^65\)"),
        (lambda: rng.advance(SEED, 4.0), TypeError, "elements must be an int"),
        (lambda: rng.fold_in(SEED, -1), ValueError, r"index must be in \[0, 2\^63\)"),
        (lambda: rng.fold_in(SEED, 1.5), TypeError, "index must be an int"),
        (lambda: rng.fold_in(SEED.expand(3, 2), torch.arange(2)), ValueError, "does not broadcast"),
        (lambda: rng.split(SEED, -1), ValueError, "n must be a non-negative int"),
        (lambda: rng.split(SEED.expand(3, 2), 2), ValueError, r"seed must have shape \[2\]"),
        (lambda: rng.make_seed(batch=-1), ValueError, "batch must hold non-negative ints"),
        (lambda: rng.make_seed(generator="g"), TypeError, "generator must be a torch.Generator"),
    ],
)
def test_bad_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()


# ---- statistics


def _check_statistics(n: int, seeds: list[int]) -> None:
    """Moments, tails, Kolmogorov-Smirnov, correlations of n normals; each within about 5 standard errors."""
    total = n * len(seeds)
    moments = torch.zeros(4, dtype=torch.float64)
    tails = torch.zeros(3, dtype=torch.float64)
    lags = torch.zeros(8, dtype=torch.float64)
    edges = torch.linspace(-4, 4, 1025, dtype=torch.float64)
    counts = torch.zeros(1024 + 2, dtype=torch.float64)
    for key in seeds:
        x = rng.normal((n,), torch.tensor([key, 0]))
        d = x.double()
        moments += torch.stack([(d**k).sum() for k in (1, 2, 3, 4)])
        tails += torch.stack([(x.abs() > s).sum().double() for s in (4.0, 4.5, 5.0)])
        lags += torch.stack([(d[k:] * d[:-k]).sum() for k in range(1, 9)])
        counts += torch.bincount(torch.bucketize(d, edges), minlength=1026).double()
    # Variances of x, x^2, x^3, x^4 for a standard normal: 1, 2, 15, 96.
    for mean, expected, variance in zip(moments / total, (0, 1, 0, 3), (1, 2, 15, 96)):
        assert abs(float(mean) - expected) < 5 * math.sqrt(variance / total)
    for seen, s in zip(tails.tolist(), (4.0, 4.5, 5.0)):
        expected = total * math.erfc(s / math.sqrt(2))
        assert abs(seen - expected) < 5 * math.sqrt(expected) + 5
    assert float((lags / total).abs().max()) < 5 / math.sqrt(total)
    cdf = 0.5 * torch.erfc(-edges / math.sqrt(2))
    empirical = counts.cumsum(0)[:-1] / total
    ks = float((empirical - cdf).abs().max())
    assert ks < 1.95 / math.sqrt(total)  # p about 1e-3; on a grid it can only be smaller
    probability = torch.diff(torch.cat((torch.zeros(1), cdf, torch.ones(1))).double())
    chi2 = float(((counts - total * probability) ** 2 / (total * probability)).sum())
    assert abs(chi2 - 1025) < 5 * math.sqrt(2 * 1025)


def test_statistics():
    _check_statistics(1 << 21, [1, 2])


@pytest.mark.slow
def test_statistics_of_2_to_the_27_normals():
    _check_statistics(1 << 22, list(range(32)))


def test_neighbouring_keys_and_offsets_are_uncorrelated():
    n = 1 << 18
    base = rng.normal((n,), torch.tensor([7, 0])).double()
    others = [
        torch.tensor([8, 0]),
        torch.tensor([7 + (1 << 32), 0]),
        torch.tensor([7, 1 << 40]),
        rng.fold_in(torch.tensor([7, 0]), 1),
    ]
    for seed in others:
        other = rng.normal((n,), seed).double()
        assert abs(float((base * other).mean())) < 5 / math.sqrt(n)
    lanes = base.view(-1, 4)
    correlation = torch.corrcoef(lanes.T) - torch.eye(4, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / math.sqrt(n / 4)
