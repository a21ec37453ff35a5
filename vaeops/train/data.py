"""Data sets, read from files that the user has. Nothing is downloaded."""

import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Images(NamedTuple):
    """images [N, H, W] in [0, 1], fp32; labels [N], int64."""

    images: Tensor
    labels: Tensor


def digits(seed: int) -> Images:
    """The 1,797 handwritten digits of 8x8 pixels inside scikit-learn, in an order drawn by the seed."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    return Images(
        torch.tensor(data.images, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]
    )


# sha256 of the files unpacked: LeCun, Cortes & Burges, "The MNIST database of handwritten digits".
_MNIST = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def mnist(root: Path, train: bool) -> Images:
    """MNIST's 60,000 training or 10,000 test images, in the files' order.

    Args:
        root: the folder with the four idx files, gzipped (`.gz`) or not.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: naming a file whose content is not MNIST's.
    """
    split = "train" if train else "t10k"
    images = _idx(root, f"{split}-images-idx3-ubyte", 16)
    labels = _idx(root, f"{split}-labels-idx1-ubyte", 8)
    return Images(
        torch.from_numpy(images.reshape(-1, 28, 28)).float() / 255, torch.from_numpy(labels.astype(np.int64))
    )


def _idx(root: Path, name: str, header: int) -> np.ndarray:
    """The bytes after the header of an idx file, checked."""
    for path in (root / f"{name}.gz", root / name):
        if path.exists():
            break
    else:
        raise FileNotFoundError(f"mnist: there is no {name}.gz, nor {name}, in {root}")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != _MNIST[name]:
        raise ValueError(f"mnist: {path} is not MNIST's: sha256 {found}, expected {_MNIST[name]}")
    return np.frombuffer(content, np.uint8)[header:].copy()


CELEBA_SPLITS = ("train", "valid", "test")


def celeba(source: Path, split: str) -> Tensor:
    """The faces of a split, uint8 [N, 3, H, W], in the files' order; they must have one size.

    Args:
        source: CelebA's own layout, a folder or a .tar of it: `img_align_celeba/*.jpg` and
            `list_eval_partition.txt`.
        split: "train" | "valid" | "test".

    Raises:
        FileNotFoundError: naming what is missing.
        ValueError: on an unknown split, a split without images, images of several sizes.
    """
    if split not in CELEBA_SPLITS:
        raise ValueError(f"celeba: split must be one of {CELEBA_SPLITS}, got {split!r}")
    from PIL import Image

    name = "list_eval_partition.txt"
    partition = _files(source, lambda file: file == name).get(name)
    if partition is None:
        raise FileNotFoundError(f"celeba: there is no {name} in {source}")
    wanted = str(CELEBA_SPLITS.index(split))
    lines = (line.split() for line in partition.decode().splitlines())
    chosen = {line[0] for line in lines if len(line) == 2 and line[1] == wanted}
    images = sorted(_files(source, chosen.__contains__).items())
    if not images:
        raise ValueError(f"celeba: {source} has no image of the split {split!r}")
    faces = [np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for _, content in images]
    sizes = {face.shape[:2] for face in faces}
    if len(sizes) > 1:
        raise ValueError(f"celeba: the images of {source} must have one size, they have {sorted(sizes)[:3]}")
    return torch.from_numpy(np.stack(faces)).permute(0, 3, 1, 2).contiguous()


def _files(source: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """{name: content} of the wanted files in a folder or a tar, names without folders."""
    if source.is_dir():
        return {p.name: p.read_bytes() for p in source.rglob("*") if wanted(p.name) and p.is_file()}
    if not source.exists():
        raise FileNotFoundError(f"celeba: there is no {source}")
    with tarfile.open(source) as archive:
        members = ((Path(m.name).name, archive.extractfile(m)) for m in archive if wanted(Path(m.name).name))
        return {name: file.read() for name, file in members if file is not None}
