"""Data sets, and the one-code-an-image experiment on them."""

import gzip
import io
import os
import re
import tarfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
image = pytest.importorskip("matplotlib.image")

from vaeops import cli  # noqa: E402
from vaeops.train import data, workshop_celeba, workshop_vq  # noqa: E402

ROOT = Path(os.environ.get("VAEOPS_DATA", "data"))
needs_mnist = pytest.mark.skipif(
    not (ROOT / "mnist").is_dir(), reason=f"no mnist/ in {ROOT}: set VAEOPS_DATA to where the data sets are"
)


def test_digits():
    images, labels = data.digits(0)
    assert images.shape == (1797, 8, 8) and images.min() == 0 and images.max() == 1
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert not torch.equal(images, data.digits(1).images)


@needs_mnist
def test_mnist():
    images, labels = data.mnist(ROOT / "mnist", train=True)
    assert images.shape == (60_000, 28, 28) and images.max() == 1
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert float(images.mean()) == pytest.approx(0.1307, abs=1e-4)
    assert data.mnist(ROOT / "mnist", train=False).labels.shape == (10_000,)


def test_mnist_says_what_is_missing_or_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        data.mnist(tmp_path, train=True)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"not images"))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz is not MNIST's: sha256"):
        data.mnist(tmp_path, train=False)


def celeba_files(sizes):
    """CelebA's layout: one grey image of each (width, height), the last one of the validation split."""
    image = pytest.importorskip("PIL.Image")
    files, lines = {}, []
    for i, size in enumerate(sizes):
        buffer = io.BytesIO()
        image.new("RGB", size, (10 * i, 10 * i, 10 * i)).save(buffer, "JPEG", quality=95)
        files[f"img_align_celeba/{i:06d}.jpg"] = buffer.getvalue()
        lines.append(f"{i:06d}.jpg {int(i == len(sizes) - 1)}")
    return files | {"list_eval_partition.txt": "\n".join(lines).encode()}


def write(files, path):
    for name, content in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)


def test_celeba_from_a_folder_and_a_tar(tmp_path):
    files = celeba_files([(6, 4)] * 4)
    write(files, tmp_path)
    with tarfile.open(tmp_path / "celeba.tar", "w") as archive:
        for name in files:
            archive.add(tmp_path / name, f"celeba/{name}")
    faces = data.celeba(tmp_path, "train")
    assert faces.shape == (3, 3, 4, 6) and faces.dtype == torch.uint8
    assert [int(face.float().mean().round()) for face in faces] == [0, 10, 20]
    assert torch.equal(data.celeba(tmp_path / "celeba.tar", "train"), faces)
    assert data.celeba(tmp_path / "celeba.tar", "valid").float().mean().round() == 30


def test_celeba_says_what_is_missing_or_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*celeba\.tar"):
        data.celeba(tmp_path / "celeba.tar", "train")
    with pytest.raises(FileNotFoundError, match=r"there is no list_eval_partition\.txt"):
        data.celeba(tmp_path, "train")
    write(celeba_files([(6, 4), (4, 4), (4, 4)]), tmp_path)
    with pytest.raises(ValueError, match=r"must have one size, they have \[\(4, 4\), \(4, 6\)\]"):
        data.celeba(tmp_path, "train")
    with pytest.raises(ValueError, match="no image of the split 'test'"):
        data.celeba(tmp_path, "test")
    with pytest.raises(ValueError, match=r"split must be one of .*got 'training'"):
        data.celeba(tmp_path, "training")


def test_train_command_on_digits(tmp_path, capsys):
    steps = str(workshop_vq.TAIL)
    assert cli.main(["train", "workshop-vq", "--steps", steps, "--codes", "7", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"recon 0\.\d+ +perplexity \d+\.\d +codes used \d of 7 +purity [01]\.\d+", printed)
    for name in workshop_vq.PICTURES:
        assert image.imread(tmp_path / name)[..., :3].std() > 0.05


def test_train_command_on_faces(tmp_path, capsys):
    write(celeba_files([(64, 64)] * 8), tmp_path)
    options = ["--steps", str(workshop_celeba.TAIL), "--batch", "2", "--lr", "1e-5", "--out", str(tmp_path)]
    assert cli.main(["train", "workshop-celeba", "--data", str(tmp_path), *options]) == 0
    printed = capsys.readouterr().out
    for arm in workshop_celeba.ARMS:
        assert re.search(rf"^{arm} +loss +\d+\.\d+ -> +\d+\.\d+ +\d+\.\d images/s", printed, re.M)
    first = re.search(r"first 10 losses within (\S+),", printed)
    assert first is not None and float(first[1]) < 1e-3
    assert image.imread(tmp_path / workshop_celeba.PICTURE)[..., :3].std() > 0.05


def test_train_command_refuses(tmp_path, capsys):
    assert cli.main(["train", "nothing"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["train", "workshop-vq", "--data", "mnist", "--root", str(tmp_path)])
    assert "there is no train-images-idx3-ubyte.gz" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "workshop-celeba", "--data", str(tmp_path / "celeba.tar")])
    assert "there is no" in capsys.readouterr().err
    write(celeba_files([(6, 4)] * 3), tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["train", "workshop-celeba", "--data", str(tmp_path)])
    assert "the images must be 64x64" in capsys.readouterr().err


@needs_mnist
@pytest.mark.slow
def test_the_workshop_s_figures_on_mnist(tmp_path):
    """Measured with the workshop's own code: reconstruction 0.043, perplexity 24 to 28 after 5,000 steps."""
    images = data.mnist(ROOT / "mnist", train=True).images
    run = workshop_vq.train(images, codes=32, dim=256, hidden=(512,), commitment=1.0, steps=5000, seed=0)
    print(run.recon, run.perplexity)
    assert run.recon == pytest.approx(0.043, abs=0.003) and 24 <= run.perplexity <= 28
    tested = data.mnist(ROOT / "mnist", train=False)
    table = workshop_vq.codes_by_label(run.model, *tested)
    assert int(table.sum()) == 10_000 and int((table.sum(1) > 0).sum()) >= 30
