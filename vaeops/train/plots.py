"""Every picture of the training code, in one style, on bare Figures: no window system, no global state."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2430", "#5b6270", "#e3e6eb"
FUSED, REFERENCE = "#0b6e99", "#d9730d"
# Ten hues that stay apart on white, one a digit.
DIGITS = ("#4477aa", "#ee6677", "#228833", "#b59a1b", "#3aa6cf", "#aa3377", "#777777",
          "#e08e45", "#44aa99", "#332288")  # fmt: skip
_STYLE: dict[Any, Any] = {
    "figure.dpi": 150, "savefig.dpi": 150, "figure.facecolor": "white", "font.size": 10, "text.color": INK,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": GRID, "xtick.color": MUTED, "ytick.color": MUTED,
    "legend.frameon": False,
}  # fmt: skip


@contextmanager
def _figure(path: Path, title: str, size: tuple[float, float]) -> Iterator[Figure]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        yield figure
        figure.savefig(path, metadata={"Software": None})


def _image(axes, image: np.ndarray) -> None:
    axes.imshow(image, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=GRID)


def image_grid(path: Path, title: str, images: np.ndarray, columns: int) -> None:
    """images [N, H, W] in [0, 1], dark ink on white, row by row."""
    rows = -(-len(images) // columns)
    with _figure(path, title, (0.78 * columns, 0.78 * rows + 0.5)) as figure:
        for axes, image in zip(figure.subplots(rows, columns, squeeze=False).flat, images):
            _image(axes, image)


def reconstructions(path: Path, title: str, originals: np.ndarray, decoded: np.ndarray, columns: int) -> None:
    """originals, decoded [N, H, W] in [0, 1]: rows of originals, each over the row of what became of it."""
    bands = -(-len(originals) // columns)
    with _figure(path, title, (0.78 * columns + 1.0, 1.62 * bands + 0.6)) as figure:
        grid = figure.add_gridspec(3 * bands - 1, columns, height_ratios=([1, 1, 0.18] * bands)[:-1])
        for i, pair in enumerate(zip(originals, decoded)):
            band, column = divmod(i, columns)
            for row, (image, name) in enumerate(zip(pair, ("original", "decoded"))):
                axes = figure.add_subplot(grid[3 * band + row, column])
                _image(axes, image)
                if column == 0:
                    axes.set_ylabel(name, rotation=0, ha="right", va="center")


def image_rows(path: Path, title: str, rows: Mapping[str, np.ndarray]) -> None:
    """rows: name -> colour images [N, H, W, 3] in [0, 1], a row each."""
    columns = max(len(images) for images in rows.values())
    with _figure(path, title, (0.95 * columns + 1.0, 0.95 * len(rows) + 0.5)) as figure:
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for axes_of_row, (name, images) in zip(grid, rows.items()):
            for axes, image in zip(axes_of_row, images):
                _image(axes, image)
            axes_of_row[0].set_ylabel(name, rotation=0, ha="right", va="center")


def latent_plane(path: Path, title: str, mu: np.ndarray, labels: np.ndarray) -> None:
    """mu [N, 2], labels [N] in 0..9: each digit in its colour, and its name at the median of its points."""
    with _figure(path, title, (7.2, 6.2)) as figure:
        axes = figure.subplots()
        for digit, colour in enumerate(DIGITS):
            points = mu[labels == digit]
            if len(points) == 0:
                continue
            axes.scatter(
                points[:, 0], points[:, 1], s=14, color=colour, alpha=0.75, linewidths=0, label=str(digit)
            )
            axes.annotate(
                str(digit),
                np.median(points, axis=0),
                ha="center",
                va="center",
                fontsize=12,
                fontweight="bold",
                color=colour,
                bbox={"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": colour},
            )
        axes.set(xlabel="posterior mean, dimension 1", ylabel="posterior mean, dimension 2", aspect="equal")
        axes.legend(
            title="digit", loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=1.8, alignment="left"
        )


def code_table(path: Path, title: str, table: np.ndarray, codes: Sequence[int]) -> None:
    """table [K, 10]: how many images of each digit (columns) have each code (rows, named by `codes`)."""
    with _figure(path, title, (6.2, 0.21 * len(table) + 1.4)) as figure:
        axes = figure.subplots()
        share = table / np.maximum(table.sum(1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (row, column), count in np.ndenumerate(table):
            if count:
                colour = "white" if share[row, column] > 0.55 else INK
                axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=colour)
        axes.set(xlabel="digit", ylabel="code", xticks=range(10), yticks=range(len(table)))
        axes.set_yticklabels([str(k) for k in codes], fontsize=7)
        axes.grid(False)


def loss_curves(path: Path, title: str, runs: Mapping[str, Mapping[str, np.ndarray]], window: int) -> None:
    """runs: two of them, name -> {"recon": [steps], "kl": [steps]}, drawn as means over `window` steps, the
    second dashed over the first; below, how far their totals lie apart at every step."""
    (first, a), (second, b) = runs.items()
    with _figure(path, title, (9.0, 6.0)) as figure:
        grid = figure.add_gridspec(2, 2, height_ratios=(2, 1))
        for column, (key, name) in enumerate((("recon", "Reconstruction"), ("kl", "KL to the prior"))):
            axes = figure.add_subplot(grid[0, column])
            axes.plot(*_means(a[key], window), color=FUSED, linewidth=4, alpha=0.5, label=first)
            axes.plot(
                *_means(b[key], window), color=REFERENCE, linewidth=1.4, linestyle=(0, (4, 2)), label=second
            )
            axes.set(title=name, xlabel="step", ylabel="nats per image")
            axes.legend(loc="upper right" if key == "recon" else "lower right")
        axes = figure.add_subplot(grid[1, :])
        totals = [run["recon"] + run["kl"] for run in (a, b)]
        gap = np.abs(totals[0] - totals[1]) / np.abs(totals[1])
        axes.semilogy(np.maximum(gap, 1e-9), color=INK, linewidth=0.8)
        axes.set(
            title="Relative difference of the two totals, every step", xlabel="step", ylabel="0 drawn as 1e-9"
        )


def _means(values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """(middle step, mean) of each full window."""
    full = values[: len(values) // window * window].reshape(-1, window)
    return np.arange(len(full)) * window + window / 2, full.mean(1)


def benchmark_bars(
    path: Path, title: str, rows: Sequence[tuple[str, float, float]], names: tuple[str, str]
) -> None:
    """rows: (op and size, eager ms, ours ms); names: of the two. The ratio stands at the right."""
    with _figure(path, title, (8.6, 0.75 * len(rows) + 1.7)) as figure:
        axes = figure.subplots()
        place = np.arange(len(rows))
        figures = [ms for _, *pair in rows for ms in pair]
        shortest, longest = min(figures), max(figures)
        for offset, index, name, colour in ((-0.19, 1, names[0], REFERENCE), (0.19, 2, names[1], FUSED)):
            values = [row[index] for row in rows]
            axes.barh(place + offset, values, height=0.36, color=colour, label=name)
            for y, value in zip(place + offset, values):
                axes.annotate(
                    f"{value:.3g} ms",
                    (value, y),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8.5,
                    color=MUTED,
                )
        for y, (_, eager, ours) in zip(place, rows):
            axes.annotate(
                f"{eager / ours:.1f}×",
                (1.0, y),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="center",
                fontsize=12,
                fontweight="bold",
            )
        axes.set(xscale="log", xlabel="milliseconds, forward + backward (logarithmic)", yticks=place)
        axes.set_xlim(shortest / 2, longest * 10)  # room for the figures beside the longest bar
        axes.set_yticklabels([row[0] for row in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
