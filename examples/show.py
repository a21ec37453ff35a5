"""The notebooks' pictures of images: rows with names, and grids."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import torch.nn.functional as F
from torch import Tensor

from vaeops.train.evaluate import as_images

plt.rcParams.update({
    "figure.dpi": 80, "savefig.dpi": 80, "figure.constrained_layout.use": True, "font.size": 10,
    "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "image.cmap": "gray_r", "image.interpolation": "nearest",
})  # fmt: skip


def tiled(images: Tensor, columns: int, input_range: tuple[float, float] = (0, 1)) -> np.ndarray:
    """images [N, C, H, W], or flat grey ones [N, H H], in input_range -> one picture in [0, 1], row by row.

    Grey ones are dark on white, as ink is: 0 is white there.
    """
    images = as_images(images.detach().float(), input_range)
    paper = 0.0 if images.shape[1] == 1 else 1.0
    absent = -len(images) % columns
    images = F.pad(images, (1, 1, 1, 1, 0, 0, 0, absent), value=paper)
    lines = images.permute(0, 2, 3, 1).unflatten(0, (-1, columns))
    return lines.transpose(1, 2).flatten(2, 3).flatten(0, 1).squeeze(2).numpy()


def rows(named: Mapping[str, Tensor], input_range: tuple[float, float] = (0, 1), *, title: str = "",
         size: float = 0.65) -> None:  # fmt: skip
    """name -> images as in `tiled`, a row each; size: of an image, in inches."""
    columns = max(len(images) for images in named.values())
    width = size * columns + 0.1 * max(len(name) for name in named)
    figure, lines = plt.subplots(len(named), figsize=(width, size * len(named) + 0.3), squeeze=False)
    for axes, (name, images) in zip(lines.flat, named.items()):
        axes.imshow(tiled(images, columns, input_range), vmin=0, vmax=1)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.suptitle(title)
    plt.show()


def grid(images: Tensor, columns: int, input_range: tuple[float, float] = (0, 1), *, title: str = "",
         size: float = 0.5, axes: plt.Axes | None = None) -> None:  # fmt: skip
    """images as in `tiled`, row by row, on their own or in the axes."""
    alone = axes is None
    if alone:
        _, axes = plt.subplots(figsize=(size * columns, size * -(-len(images) // columns) + 0.3))
    axes.imshow(tiled(images, columns, input_range), vmin=0, vmax=1)
    axes.set_title(title)
    axes.set_axis_off()
    if alone:
        plt.show()
