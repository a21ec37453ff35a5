"""Data sets that are arrays, batches, and the one-code-an-image experiment on them."""

import gzip
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
image = pytest.importorskip("matplotlib.image")

from vaeops import cli  # noqa: E402
from vaeops.train import data, workshop_vq  # noqa: E402
from vaeops.train.data import movielens  # noqa: E402
from vaeops.train.data.dataset import part  # noqa: E402

ROOT = Path(os.environ.get("VAEOPS_DATA", "data"))


def needs(folder):
    reason = f"no {folder}/ in {ROOT}: set VAEOPS_DATA to where the data sets are"
    return pytest.mark.skipif(not (ROOT / folder).is_dir(), reason=reason)


# ---- arrays


def test_splits_share_nothing():
    for n, held_out, sizes in (
        (100, (10, 20), (70, 10, 20)),
        (7, (0, 0), (7, 0, 0)),
        (60, (5, 0), (55, 5, 0)),
    ):
        parts = {split: part(split, n, held_out, 3).tolist() for split in data.SPLITS}
        assert tuple(len(parts[split]) for split in ("train", "valid", "test")) == sizes
        assert sorted(parts["train"] + parts["valid"] + parts["test"]) == list(range(n))
        assert parts["train+valid"] == sorted(parts["train"] + parts["valid"])
    assert part("train", 100, (10, 20), 3).tolist() != part("train", 100, (10, 20), 4).tolist()


def test_digits():
    parts = [data.load("digits", split=split) for split in ("train", "valid", "test")]
    assert [part.x.shape for part in parts] == [(1350, 1, 8, 8), (150, 1, 8, 8), (297, 1, 8, 8)]
    assert parts[0].x.dtype == np.uint8 and parts[0].x.max() == parts[0].peak == 16
    labels = np.concatenate([part.labels for part in parts])
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    both = data.load("digits", split="train+valid")
    assert np.array_equal(both.x, np.concatenate([parts[0].x, parts[1].x]))
    assert not np.array_equal(both.x, data.load("digits", split="train+valid", seed=1).x)


def test_points_are_the_tutorial_s():
    torch.manual_seed(4)
    right, left = (torch.randn(128, 2) * 0.15 + torch.tensor([side, 0.0]) for side in (1.0, -1.0))
    found = data.load("points")
    assert np.array_equal(found.x, torch.cat([right, left]).numpy()) and found.peak == 0
    assert found.labels.tolist() == [0] * 128 + [1] * 128
    parts = [data.load("points", split=split) for split in ("train", "valid", "test")]
    assert len(np.unique(np.concatenate([part.x for part in parts]), axis=0)) == 3 * 256
    both = data.load("points", split="train+valid")
    assert both.x.shape == (512, 2) and both.labels.shape == (512,)
    x, labels = found.batch(torch.tensor([200, 3]))
    assert torch.equal(data.scale(x, found.peak, (0, 1)), x) and labels.tolist() == [1, 0]


@needs("mnist")
def test_mnist():
    found = data.load("mnist", ROOT, split="train+valid")
    assert found.x.shape == (60_000, 1, 28, 28) and found.x.max() == found.peak == 255
    assert found.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert found.x.mean() / 255 == pytest.approx(0.1307, abs=1e-4)
    rows = part("valid", 60_000, (5_000, 0), 0)
    valid = data.load("mnist", ROOT / "mnist", split="valid")
    assert np.array_equal(valid.x, found.x[rows]) and np.array_equal(valid.labels, found.labels[rows])
    assert data.load("mnist", ROOT, split="test").labels.shape == (10_000,)


@needs("fashion-mnist")
def test_fashion_mnist_s_test_images():
    found = data.load("fashion-mnist", ROOT, split="test")
    assert found.x.shape == (10_000, 1, 28, 28)
    assert np.bincount(found.labels).tolist() == [1_000] * 10 and found.label_names[9] == "Ankle boot"


def idx_file(path, shape, content):
    path.write_bytes(struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + content)


def test_idx_files_are_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no train-images-idx3-ubyte\.gz, .* nor is there .*mnist"):
        data.load("mnist", tmp_path)
    folder = tmp_path / "mnist"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no t10k-images-idx3-ubyte\.gz, nor .*, in .*mnist$"):
        data.load("mnist", tmp_path, split="test")
    idx_file(folder / "t10k-images-idx3-ubyte", (10_000, 28, 28), bytes(7_840_000))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte is another file: sha256 \w+, expected 0fa"):
        data.load("mnist", tmp_path, split="test")
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(99))[:-9])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz is damaged"):
        data.load("mnist", tmp_path, split="test")


def test_fashion_mnist_s_training_files_are_checked_by_structure(tmp_path):
    images, labels = (tmp_path / f"train-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    idx_file(images, (60_000, 28, 28), bytes(47_040_000 - 1))
    idx_file(labels, (60_000,), bytes(range(10)) * 6_000)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte is no idx file .* has 47,040,015 bytes"):
        data.load("fashion-mnist", tmp_path)
    idx_file(images, (60_000, 28, 28), bytes(47_040_000))
    assert data.load("fashion-mnist", tmp_path).x.shape == (55_000, 1, 28, 28)
    idx_file(labels, (60_000,), bytes(9) + bytes(range(10)) * 5_999 + bytes([9]))
    with pytest.raises(ValueError, match="are not Fashion-MNIST's, 6000 a class"):
        data.load("fashion-mnist", tmp_path)
    idx_file(labels, (60_000, 1), bytes(range(10)) * 6_000)
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte is no idx file"):
        data.load("fashion-mnist", tmp_path)


# ---- MovieLens


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder in MovieLens-100k's layout: 100,000 drawn ratings; stars [943, 1682]."""
    path = tmp_path_factory.mktemp("drawn") / "ml-100k"
    path.mkdir()
    rng = np.random.default_rng(0)
    stars = np.zeros((943, 1682), np.int64)
    stars.ravel()[rng.choice(stars.size, 100_000, replace=False)] = rng.integers(1, 6, 100_000)
    user, item = stars.nonzero()
    lines = np.stack([user + 1, item + 1, stars[user, item], np.full_like(user, 874_965_758)], 1)
    (path / "u.data").write_text("\n".join("\t".join(map(str, line)) for line in lines.tolist()) + "\n")
    titles = [f"{i}|Film N\N{LATIN SMALL LETTER O WITH DIAERESIS} {i}|" + "|" * 21 for i in range(1, 1683)]
    (path / "u.item").write_bytes("\n".join(titles).encode("latin-1"))
    return path, stars


def test_movielens_follows_mult_vae_s_protocol(drawn):
    root, liked = drawn[0].parent, drawn[1] >= 4
    liked[liked.sum(1) < 5] = False
    train, valid, test = (data.load("movielens", root, split=s) for s in ("train", "valid", "test"))
    assert train.x.shape[1] == 1682 and train.x.dtype == np.uint8 and train.peak == 1
    assert train.extra["item_titles"][1] == "Film N\N{LATIN SMALL LETTER O WITH DIAERESIS} 2"
    assert "held_out" not in train.extra
    assert np.array_equal(train.x, liked[train.extra["users"] - 1])
    known = train.x.any(0)
    users = set(train.extra["users"])
    for split in (valid, test):
        assert not users & set(split.extra["users"])
        users |= set(split.extra["users"])
        held_out = split.extra["held_out"]
        assert held_out.dtype == bool and held_out.shape == split.x.shape and not (held_out & split.x).any()
        every = liked[split.extra["users"] - 1] & known
        assert np.array_equal(split.x | held_out, every)
        assert np.array_equal(held_out.sum(1), every.sum(1) // 5) and held_out.any(1).all()
    assert len(valid) <= len(users) // 10 + 1 and len(users) <= liked.any(1).sum()
    both = data.load("movielens", root, split="train+valid")
    assert set(both.extra["users"]) == set(train.extra["users"]) | set(valid.extra["users"])
    again = data.load("movielens", root, split="test")
    assert np.array_equal(again.x, test.x)
    assert not np.array_equal(data.load("movielens", root, split="test", seed=1).x[:9], test.x[:9])


def test_movielens_says_what_is_missing_or_wrong(tmp_path, drawn):
    with pytest.raises(FileNotFoundError, match=r"movielens: there is no u\.item\.gz, nor u\.item, in"):
        data.load("movielens", tmp_path)
    lines = (drawn[0] / "u.data").read_text().splitlines()
    titles = (drawn[0] / "u.item").read_bytes()
    (tmp_path / "u.item").write_bytes(titles)
    for broken, message in (
        (lines[1:], r"must have \[100000, 4\] numbers, it has \[99999, 4\]"),
        (["944\t1\t5\t0", *lines[1:]], "every user must be 1 to 943, they are 1 to 944"),
        (["1\t1683\t5\t0", *lines[1:]], "every item must be 1 to 1682"),
        (["1\t1\t6\t0", *lines[1:]], "every rating must be 1 to 5"),
        ([*lines[:9], "1\t1\t5"], "u.data: .*columns"),
        (["1\t1\tfive\t0", *lines[1:]], "u.data: .*five"),
    ):
        (tmp_path / "u.data").write_text("\n".join(broken))
        with pytest.raises(ValueError, match=message):
            data.load("movielens", tmp_path)
    (tmp_path / "u.item").write_bytes(titles[:-50])
    with pytest.raises(ValueError, match=r"u\.item must have 1,682 lines"):
        data.load("movielens", tmp_path)


@needs("ml-100k")
def test_movielens_itself():
    train, test = (data.load("movielens", ROOT, split=split) for split in ("train", "test"))
    assert train.extra["item_titles"][:2] == ("Toy Story (1995)", "GoldenEye (1995)")
    assert len(train) + 2 * len(test) == pytest.approx(movielens._USERS, abs=10)


# ---- what every set has


def test_load_refuses():
    for arguments, message in (
        ({"name": "minst"}, "data set 'minst' is unknown: did you mean 'mnist'"),
        ({"name": "digits", "split": "testing"}, "split 'testing' is unknown: did you mean 'test'"),
        ({"name": "digits", "size": 64}, "digits takes no size; celeba and images do"),
        ({"name": "mnist", "cache": "there"}, "mnist takes no cache"),
        ({"name": "celeba", "size": 0}, "size must be at least 1, got 0"),
        ({"name": "digits", "seed": -1}, "seed must be at least 0"),
        ({"name": "images"}, "root must be a folder of images"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(**arguments)
    assert set(data.names()) >= {"digits", "mnist", "celeba", "images"}


def test_root_is_found_by_the_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("VAEOPS_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        data.load("mnist")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_come_as_they_are_stored(device):
    found = data.load("digits")
    indices = torch.tensor([7, 0, 1349, 7])
    x, labels = found.batch(indices, device)
    assert x.dtype == torch.uint8 and labels.dtype == torch.int64 and x.device.type == device
    assert np.array_equal(x.cpu(), found.x[indices.numpy()])
    resident = found.resident(device)
    assert len(resident) == 1350
    for ours, theirs in zip(resident.batch(indices, device), (x, labels)):
        assert torch.equal(ours, theirs) and ours.device == theirs.device
    with pytest.raises(IndexError):
        found.batch(torch.tensor([1350]))


def test_scale():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.scale(x, 255, (0, 1)), x.float() / 255)
    assert torch.equal(data.scale(x, 255, (-1.0, 1.0)), x.float() / 255 * 2 - 1)
    floats = torch.tensor([0.0, 8.0])
    assert data.scale(floats, 16, (-1, 1)).tolist() == [-1, 0] and floats.tolist() == [0, 8]
    assert data.scale(x, 255, None) is x


def test_batches_cover_an_epoch_and_follow_from_the_seed():
    batches = data.Batches(10, 3, seed=5)
    assert batches.steps_per_epoch == 3
    epochs = [torch.cat([next(batches) for _ in range(3)]) for _ in range(2)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 9 and set(epoch.tolist()) <= set(range(10))
    assert not torch.equal(*epochs)
    assert torch.equal(next(data.Batches(10, 3, seed=5, position=(1, 0))), epochs[1][:3])
    assert not torch.equal(next(data.Batches(10, 3, seed=6)), epochs[0][:3])
    whole = data.Batches(4, 4)
    assert sorted(next(whole).tolist()) == sorted(next(whole).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("drawn", [0, 1, 3, 4, 7])
def test_batches_go_on_where_they_stopped(drawn):
    batches = data.Batches(10, 3, seed=5)
    for _ in range(drawn):
        next(batches)
    other = data.Batches(10, 3, seed=5)
    other.position = batches.position
    for _ in range(7):
        assert torch.equal(next(other), next(batches))


def test_ranks_draw_their_parts_of_the_joined_batch():
    joined = data.Batches(20, 6, seed=1)
    ranks = [data.Batches(20, 6, seed=1, rank=r, world=3) for r in range(3)]
    assert [r.row for r in ranks] == [0, 2, 4]
    for _ in range(5):
        assert torch.equal(torch.cat([next(r) for r in ranks]), next(joined))


def test_batches_refuse():
    for arguments, message in (
        ((10, 11), "batch must be 1 to the data set's 10 rows, got 11"),
        ((10, 0), "batch must be 1"),
        ((10, 4, 0, 0, 3), "batch must be a multiple of world"),
        ((10, 4, 0, 2, 2), "rank 0 to world - 1; got batch 4, rank 2"),
        ((10, 4, -1), "seed must be at least 0"),
        ((10, 4, 0, 0, 1, (0, 3)), r"position must be \(epoch, a multiple of batch 4"),
    ):
        n, batch, seed, rank, world, position = (*arguments, *(0, 0, 1, (0, 0))[len(arguments) - 2 :])
        with pytest.raises(ValueError, match=message):
            data.Batches(n, batch, seed, rank=rank, world=world, position=position)


# ---- the experiment


def test_train_command_on_digits(tmp_path, capsys):
    steps = str(workshop_vq.TAIL)
    options = ["--steps", steps, "--codes", "7", "--out", str(tmp_path)]
    assert cli.main(["experiment", "workshop-vq", *options]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"recon 0\.\d+ +perplexity \d+\.\d +codes used \d of 7 +purity [01]\.\d+", printed)
    for name in workshop_vq.PICTURES:
        assert image.imread(tmp_path / name)[..., :3].std() > 0.05


def test_train_command_refuses(tmp_path, capsys):
    assert cli.main(["experiment", "nothing"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["experiment", "workshop-vq", "--data", "mnist", "--root", str(tmp_path)])
    assert "there is no train-images-idx3-ubyte.gz" in capsys.readouterr().err


@needs("mnist")
@pytest.mark.slow
def test_the_workshop_s_figures_on_mnist(tmp_path):
    """Measured with the workshop's own code: reconstruction 0.043, perplexity 24 to 28 after 5,000 steps."""
    images, _ = workshop_vq.read("mnist", ROOT, "train+valid", 0)
    run = workshop_vq.train(images, codes=32, dim=256, hidden=(512,), commitment=1.0, steps=5000, seed=0)
    print(run.recon, run.perplexity)
    assert run.recon == pytest.approx(0.043, abs=0.003) and 24 <= run.perplexity <= 28
    table = workshop_vq.codes_by_label(run.model, *workshop_vq.read("mnist", ROOT, "test", 0))
    assert int(table.sum()) == 10_000 and int((table.sum(1) > 0).sum()) >= 30
