"""Data sets, read from files that the user has; nothing is downloaded.

`load` gives a split of one; `Batches` draws its rows, `Dataset.batch` gathers them as bytes on the device,
`scale` makes floats of them there. Photographs are decoded once, into a cache of bytes beside them.
"""

import os
from pathlib import Path

from ..._names import unknown
from . import arrays, codes, images, movielens
from .dataset import (
    DECODED as DECODED,
    SPLITS as SPLITS,
    Batches as Batches,
    Dataset as Dataset,
    scale as scale,
    side as side,
)

_NAMES = ("digits", "points", "mnist", "fashion-mnist", "celeba", "movielens", "images", "codes")


def names() -> tuple[str, ...]:
    """The data sets that `load` knows."""
    return _NAMES


def load(name: str, root: str | os.PathLike | None = None, *, split: str = "train", size: int | None = None,
         seed: int = 0, cache: str | os.PathLike | None = None) -> Dataset:  # fmt: skip
    """A split of a data set.

    | name | what, and the files it is read from | train, valid, test |
    |---|---|---|
    | `digits` | digits of 8x8 pixels, 0 to 16, inside scikit-learn | 1,350, 150, 297, seeded |
    | `points` | two clusters on a plane | 256 each, always the same |
    | `mnist`, `fashion-mnist` | idx files, `.gz` or not | 55,000 and 5,000, seeded; t10k |
    | `celeba` | aligned faces in CelebA's own layout: a folder, a .zip or a .tar | as its list has it |
    | `movielens` | MovieLens-100k's `u.data` and `u.item`, `.gz` or not | 80, 10, 10 % of the users, seeded |
    | `images` | every image under a folder, or in a .zip or .tar | 80, 10, 10 %, seeded |
    | `codes` | the codes that a trained VQ-VAE gives its images: a run of it | as its training had them |

    Args:
        name: one of `names()`.
        root: where the files are: a folder that has the data set under its name (`mnist`, `fashion-mnist`,
            `ml-100k`, `celeba` or `celeba.zip` or `celeba.tar`), or that data set itself. Default: the
            environment variable VAEOPS_DATA, or else `data`. `images` and `codes` need it; `digits` and
            `points` have no files.
        split: "train" | "valid" | "test", which share nothing, or "train+valid", both in one.
        size: of `celeba` and `images`: the side of the square images. None: as they are, all of one size.
        seed: draws what is seeded in the table.
        cache: of `celeba` and `images`, and of `codes` of them: the folder of the decoded images. Default:
            `vaeops-cache` in the folder of the images, or beside the archive; of `codes`, its training's.
            Processes that share it should not fill it at once: let one of them load first.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: on an unknown name or split, a size that is not positive, a set without rows, a file whose
            content is not the data set's or not an image, naming it.
    """
    if name not in _NAMES:
        raise ValueError(unknown("data set", name, _NAMES))
    if split not in SPLITS:
        raise ValueError(unknown("split", split, SPLITS))
    if name not in DECODED and (size is not None or (cache is not None and name != "codes")):
        option = "size" if size is not None else "cache"
        raise ValueError(f"{name} takes no {option}; {' and '.join(DECODED)} do")
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if name == "digits":
        return arrays.digits(split, seed)
    if name == "points":
        return arrays.points(split)
    if name == "codes" and root is None:
        raise ValueError("codes: root must be the folder of a VQ-VAE's run, or a checkpoint of it, got None")
    if name == "images" and root is None:
        raise ValueError("images: root must be a folder of images, a .zip or a .tar, got None")
    place = Path(os.environ.get("VAEOPS_DATA", "data") if root is None else root)
    store = None if cache is None else Path(cache)
    if name == "codes":
        return codes.codes(place, split, store, load)
    if name == "images":
        return images.images(place, split, size, seed, store)
    if name == "celeba":
        return images.celeba(place, split, size, store)
    if name == "movielens":
        return movielens.movielens(place, split, seed)
    return arrays.idx(name, place, split, seed)
