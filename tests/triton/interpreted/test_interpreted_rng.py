"""Noise and derived seeds: bit for bit the reference's."""

import pytest
import torch

import vaeops
from vaeops.kernels import rng
from vaeops.ref import rng as ref

SEED = torch.tensor([0x123456789ABCDEF, 0x7665544332211])


@pytest.mark.parametrize("shape", [(), (1,), (3, 7), (63,), (97,), (1025,), (2, 1024), (5000,)])
def test_normal_has_the_reference_bits(shape):
    assert torch.equal(vaeops.rng.normal(shape, SEED, impl="triton"), ref.normal(shape, SEED))


@pytest.mark.parametrize("offset", [2**32 - 3, -(2**32) - 3, -2, 2**63 - 2])
def test_the_counter_is_64_bits_and_wraps(offset):
    seed = torch.tensor([-5, offset])
    assert torch.equal(rng.normal(seed, [97]), ref.normal([97], seed))


@pytest.mark.parametrize("shape", [(5, 64), (5, 63), (3, 1), (2, 1025), (2, 2048)])
def test_batched_seeds_count_from_their_own_first_element(shape):
    seeds = ref.fold_in(SEED, torch.arange(shape[0]))
    got = rng.normal(seeds, list(shape))
    assert torch.equal(got, ref.normal(shape, seeds))
    for row, seed in zip(got, seeds):
        assert torch.equal(row, ref.normal(shape[1:], seed))


def test_seeds_of_two_dims_and_strided_seeds():
    seeds = ref.fold_in(SEED, torch.arange(12)).reshape(4, 3, 2)
    assert torch.equal(rng.normal(seeds, [4, 3, 6]), ref.normal([4, 3, 6], seeds))
    assert torch.equal(
        rng.normal(seeds.transpose(0, 1), [3, 4, 6]), ref.normal([3, 4, 6], seeds.transpose(0, 1))
    )


@pytest.mark.parametrize(
    "index", [torch.tensor(0), torch.tensor(2**40 + 1), torch.arange(300), torch.arange(6).view(2, 3)]
)
def test_fold_in_of_one_seed(index):
    assert torch.equal(rng.fold_in(SEED, index), ref.fold_in(SEED, index))


def test_fold_in_broadcasts():
    seeds = ref.fold_in(SEED, torch.arange(6)).reshape(3, 2, 2)
    for index in (torch.tensor(7), torch.arange(2), torch.arange(3)[:, None], torch.arange(24).view(4, 3, 2)):
        assert torch.equal(rng.fold_in(seeds, index), ref.fold_in(seeds, index))
    assert rng.fold_in(seeds[:0], torch.tensor(1)).shape == (0, 2, 2)


def test_derived_seeds_leave_the_noise_stream():
    """A child is a block whose counter the stream cannot reach, so it differs from the parent's own."""
    child = rng.fold_in(torch.tensor([9, 0]), torch.tensor(0))
    words = ref.philox(torch.tensor(9), (torch.tensor(0),) * 4)
    assert not torch.equal(child, torch.stack((words[0] | words[1] << 32, words[2] | words[3] << 32)))
