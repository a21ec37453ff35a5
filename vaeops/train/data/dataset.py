"""What every data set is, batches of its rows, and their way to the device."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._names import unknown

SPLITS = ("train", "valid", "test", "train+valid")
DECODED = ("celeba", "images")  # data sets that are read at any size, from a cache of decoded images


@dataclass
class Dataset:
    """N samples as they are stored.

    x: images uint8 [N, C, H, W], which may be mapped from a file; items that a user took, uint8 [N, items];
        points fp32 [N, 2].
    labels: int64 [N] or None; label_names: of 0, 1, ..., where they have names.
    peak: x's largest possible value: 255, 16 for `digits`, 1 for items; 0 for points, which are not scaled.
    attributes: bool [N, A] or None; attribute_names: of the A columns.
    extra: what one data set alone has.
    """

    name: str
    x: np.ndarray | Tensor
    labels: np.ndarray | Tensor | None = None
    peak: int = 255
    label_names: tuple[str, ...] = ()
    attributes: np.ndarray | None = None
    attribute_names: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Tensor, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor | None]:
        """(x[indices], labels[indices] or None) on the device, in x's dtype: one gather each.

        indices: int64 [B]. A batch for a GPU is copied to it from pinned memory, and the host does not wait.
        """
        device = torch.device(device)
        labels = None if self.labels is None else _gather(self.labels, indices, device)
        return _gather(self.x, indices, device), labels

    def resident(self, device: str | torch.device) -> "Dataset":
        """This set with x and labels in the device's memory, where its batches are then gathered."""
        labels = None if self.labels is None else _copy(self.labels, device)
        return replace(self, x=_copy(self.x, device), labels=labels)

    def attribute(self, name: str) -> np.ndarray:
        """bool [N]: which samples have the attribute of that name."""
        if self.attributes is None:
            raise ValueError(f"{self.name} has no attributes here")
        if name not in self.attribute_names:
            raise ValueError(unknown("attribute", name, self.attribute_names))
        return self.attributes[:, self.attribute_names.index(name)]


def _gather(rows: np.ndarray | Tensor, indices: Tensor, device: torch.device) -> Tensor:
    if isinstance(rows, Tensor):
        return rows.index_select(0, indices.to(rows.device, non_blocking=True)).to(device)
    taken = torch.from_numpy(rows[indices.cpu().numpy()])
    return taken.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else taken.to(device)


def _copy(rows: np.ndarray | Tensor, device: str | torch.device) -> Tensor:
    return rows.to(device) if isinstance(rows, Tensor) else torch.tensor(rows, device=device)


def scale(x: Tensor, peak: int, input_range: tuple[float, float] | None) -> Tensor:
    """x / peak (hi - lo) + lo, fp32, on x's device: 0 ... peak becomes lo ... hi.

    With peak 0 or input_range None, x as it is.
    """
    if peak == 0 or input_range is None:
        return x
    lo, hi = input_range
    unit = x.float().div_(peak) if x.dtype != torch.float32 else x / peak
    return unit if (lo, hi) == (0, 1) else unit.mul_(hi - lo).add_(lo)


def side(name: str, input_shape: tuple[int, ...], asked: int | None = None) -> int | None:
    """The side at which the images of a data set are read for a model: as asked, or else the model's."""
    if asked is None and name in DECODED and len(input_shape) == 3:
        return input_shape[-1]
    return asked


class Batches:
    """Endless batches of rows of a data set, each epoch in an order of its own.

    The order of an epoch follows from (seed, epoch) alone; the rows at its end that fill no batch are left
    out of that epoch. With several ranks, the batch is what all of them draw together: rank r gets its r-th
    part, which begins at `row` of the joined batch.

    Args:
        n: rows of the data set.
        batch: rows of the joined batch, at most n; a multiple of `world`.
        seed: at least 0.
        rank, world: of this process, and how many there are.
        position: where to go on, a `position` of another one with the same n, batch and seed.

    Yields: int64 [batch / world].
    """

    def __init__(self, n: int, batch: int, seed: int = 0, *, rank: int = 0, world: int = 1,
                 position: tuple[int, int] = (0, 0)) -> None:  # fmt: skip
        if not 1 <= batch <= n:
            raise ValueError(f"batch must be 1 to the data set's {n} rows, got {batch}")
        if not 0 <= rank < world or batch % world:
            raise ValueError(
                f"batch must be a multiple of world, and rank 0 to world - 1; got batch {batch}, "
                f"rank {rank}, world {world}"
            )
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.n, self.batch, self.seed = n, batch, seed
        self.share = batch // world
        self.row = rank * self.share
        self.position = position

    @property
    def position(self) -> tuple[int, int]:
        """(epoch, rows of it that were drawn). It can be set."""
        return self._epoch, self._offset

    @position.setter
    def position(self, position: tuple[int, int]) -> None:
        epoch, offset = position
        if epoch < 0 or not 0 <= offset <= self.n or offset % self.batch:
            raise ValueError(
                f"position must be (epoch, a multiple of batch {self.batch} up to {self.n}), got {position}"
            )
        self._epoch, self._offset = int(epoch), int(offset)
        self._order = self._permutation()

    @property
    def steps_per_epoch(self) -> int:
        return self.n // self.batch

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Tensor:
        if self._offset + self.batch > self.n:
            self._epoch, self._offset = self._epoch + 1, 0
            self._order = self._permutation()
        begin = self._offset + self.row
        self._offset += self.batch
        return self._order[begin : begin + self.share]

    def _permutation(self) -> Tensor:
        return torch.from_numpy(np.random.default_rng([self.seed, self._epoch]).permutation(self.n))


def part(split: str, n: int, held_out: tuple[int, int], seed: int) -> np.ndarray:
    """Rows of a split of n, in ascending order: held_out rows (valid, test) are drawn by the seed."""
    order = np.random.default_rng(seed).permutation(n)
    valid, test = held_out
    bounds = {"train": (0, n - valid - test), "valid": (n - valid - test, n - test), "test": (n - test, n),
              "train+valid": (0, n - test)}  # fmt: skip
    begin, end = bounds[split]
    return np.sort(order[begin:end])
