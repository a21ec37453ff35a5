"""Small sets that are arrays already: digits, points, MNIST, Fashion-MNIST."""

import hashlib
import struct
from pathlib import Path

import numpy as np
import torch

from .dataset import Dataset, part
from .files import place, read

_DIGITS = {"train": slice(1350), "valid": slice(1350, 1500), "test": slice(1500, None),
           "train+valid": slice(1500)}  # fmt: skip
_TEN = tuple("0123456789")


def digits(split: str, seed: int) -> Dataset:
    """Handwritten digits of 8x8 pixels, 0 to 16, inside scikit-learn: 1,797 in an order drawn by the seed."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed)).numpy()
    rows = order[_DIGITS[split]]
    images = data.images.astype(np.uint8)[rows, None]
    return Dataset("digits", images, data.target.astype(np.int64)[rows], peak=16, label_names=_TEN)


def points(split: str) -> Dataset:
    """128 points around (1, 0), then 128 around (-1, 0), standard deviation 0.15; their labels are 0 and 1.

    The training points are the first draws of torch's generator seeded with 4; then come valid and test.
    """
    source = torch.Generator().manual_seed(4)
    drawn = {}
    for name in ("train", "valid", "test"):
        clusters = [torch.randn(128, 2, generator=source) * 0.15 + torch.tensor([side, 0.0])
                    for side in (1.0, -1.0)]  # fmt: skip
        drawn[name] = torch.cat(clusters).numpy()
    x = np.concatenate([drawn[name] for name in split.split("+")])
    return Dataset("points", x, np.tile(np.repeat([0, 1], 128), len(x) // 256), peak=0,
                   label_names=("right", "left"))  # fmt: skip


# sha256 of the files unpacked. MNIST: LeCun, Cortes & Burges, "The MNIST database of handwritten digits".
# Fashion-MNIST: Xiao, Rasul & Vollgraf 2017; the .gz files of this content have the md5 that its authors
# published: bef4ecab320f06d8554ea6380940ec79 and bb300cfdad3c16e7a12a480ee83cd310.
_SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion-mnist": {
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}
_LABELS = {
    "mnist": _TEN,
    "fashion-mnist": ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
                      "Bag", "Ankle boot"),
}  # fmt: skip
_VALID = 5_000  # of the 60,000 training images


def idx(name: str, root: Path, split: str, seed: int) -> Dataset:
    """MNIST's or Fashion-MNIST's 28x28 images, in the files' order."""
    prefix = "t10k" if split == "test" else "train"
    n = 10_000 if split == "test" else 60_000
    images = _read(name, root, f"{prefix}-images-idx3-ubyte", (n, 28, 28))[:, None]
    labels = _read(name, root, f"{prefix}-labels-idx1-ubyte", (n,)).astype(np.int64)
    # The checksums of Fashion-MNIST's training files are not known here. Its classes are known to be equally
    # many, and MNIST's are not.
    if name == "fashion-mnist" and np.unique(np.bincount(labels)).tolist() != [n // 10]:
        raise ValueError(
            f"{name}: the labels in {place(root, name)} are not Fashion-MNIST's, {n // 10} a class"
        )
    if split in ("train", "valid"):
        rows = part(split, n, (_VALID, 0), seed)
        images, labels = images[rows], labels[rows]
    return Dataset(name, images, labels, label_names=_LABELS[name])


def _read(name: str, root: Path, file: str, shape: tuple[int, ...]) -> np.ndarray:
    """The uint8 array of an idx file: its checksum where that is known, or else its header and length."""
    path, content = read(name, file, root, name)
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)  # 8: bytes
    known = _SHA256[name].get(file)
    if known is not None and (found := hashlib.sha256(content).hexdigest()) != known:
        raise ValueError(f"{name}: {path} is another file: sha256 {found}, expected {known}")
    if not content.startswith(header) or len(content) != len(header) + np.prod(shape):
        raise ValueError(
            f"{name}: {path} is no idx file of bytes {list(shape)}: it begins {content[: len(header)].hex()} "
            f"and has {len(content):,} bytes"
        )
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)
