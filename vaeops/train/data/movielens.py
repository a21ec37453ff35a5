"""MovieLens-100k as Mult-VAE is evaluated on it.

Source: Harper & Konstan 2015, "The MovieLens Datasets"; the protocol is that of Liang, Krishnan, Hoffman &
Jebara 2018, "Variational Autoencoders for Collaborative Filtering".
"""

import io
from pathlib import Path

import numpy as np

from .dataset import Dataset, part
from .files import read

_FOLDER = "ml-100k"
_RATINGS, _USERS, _ITEMS = 100_000, 943, 1_682
_LIKED = 4  # stars, at least
_LEAST = 5  # liked items that a user must have
_HELD_OUT = 0.2  # of a user's items


def movielens(root: Path, split: str, seed: int) -> Dataset:
    """x uint8 [users, 1682]: 1 where a user rated an item with 4 or 5 stars.

    Users with fewer than five such items are left out. The others are split, not their ratings: 10 % are for
    "valid" and 10 % for "test" (strong generalisation). Of each of those, a fifth of the items, rounded down,
    is held out of x into `extra["held_out"]`, bool [users, 1682]; items that no training user has are in
    neither, and a user who is left with too few to hold any out is left out.

    extra: "item_titles" (1,682 names), "users" (int64 [users], their numbers in u.data), "held_out" (of
    "valid" and "test").
    """
    titles, ratings = _titles(root), _ratings(root)
    user, item, stars, _ = ratings.T
    liked = np.zeros((_USERS, _ITEMS), np.uint8)
    liked[user[stars >= _LIKED] - 1, item[stars >= _LIKED] - 1] = 1
    users = np.flatnonzero(liked.sum(1) >= _LEAST)
    tenth = len(users) // 10
    rows = users[part(split, len(users), (tenth, tenth), seed)]
    x = liked[rows]
    extra = {"item_titles": titles, "users": rows + 1}
    if split in ("valid", "test"):
        x *= liked[users[part("train", len(users), (tenth, tenth), seed)]].any(0)
        held_out = _hold_out(x, rows, seed)
        kept = held_out.any(1)
        x, held_out = (x & ~held_out)[kept], held_out[kept]
        extra |= {"users": extra["users"][kept], "held_out": held_out}
    return Dataset("movielens", x, peak=1, extra=extra)


def _hold_out(x: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    """bool, of x's shape: a fifth of each row's items, drawn from the seed and the user alone."""
    held_out = np.zeros(x.shape, bool)
    for row, (items, user) in enumerate(zip(x, rows)):
        found = np.flatnonzero(items)
        drawn = np.random.default_rng([seed, int(user)]).permutation(found)
        held_out[row, drawn[: int(_HELD_OUT * len(found))]] = True
    return held_out


def _ratings(root: Path) -> np.ndarray:
    """int64 [100,000, 4]: user, item, stars, time."""
    path, content = read("movielens", "u.data", root, _FOLDER)
    try:
        found = np.loadtxt(io.BytesIO(content), np.int64, delimiter="\t", ndmin=2)
    except ValueError as error:
        raise ValueError(f"movielens: {path}: {error}") from error
    if found.shape != (_RATINGS, 4):
        raise ValueError(f"movielens: {path} must have {[_RATINGS, 4]} numbers, it has {list(found.shape)}")
    for what, column, most in zip(("user", "item", "rating"), found.T, (_USERS, _ITEMS, 5)):
        if column.min() < 1 or column.max() > most:
            raise ValueError(
                f"movielens: {path}: every {what} must be 1 to {most}, they are {column.min()} to "
                f"{column.max()}"
            )
    return found


def _titles(root: Path) -> tuple[str, ...]:
    path, content = read("movielens", "u.item", root, _FOLDER)
    lines = [line.split("|") for line in content.decode("latin-1").splitlines()]
    if [line[0] for line in lines] != [str(number) for number in range(1, _ITEMS + 1)]:
        raise ValueError(f"movielens: {path} must have {_ITEMS:,} lines that begin 1|, 2|, ...")
    return tuple(line[1] for line in lines)
