"""Data sets, read from files that the user has. Nothing is downloaded."""

import gzip
import hashlib
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
