"""Every picture of the training code, in one style, on bare Figures: no window system, no global state.

Arrays in, a file out, which appears whole or not at all; its ending, .png, .pdf or .svg, says of what kind.
Images are [n, H, W], drawn as dark ink on white, or [n, H, W, 3], both in [0, 1].
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from .._files import atomic

INK, MUTED, GRID = "#1f2430", "#5b6270", "#e3e6eb"
FUSED, REFERENCE = "#0b6e99", "#d9730d"
# Ten hues that stay apart on white, one a digit.
DIGITS = ("#4477aa", "#ee6677", "#228833", "#b59a1b", "#3aa6cf", "#aa3377", "#777777",
          "#e08e45", "#44aa99", "#332288")  # fmt: skip
SERIES = (FUSED, REFERENCE, "#228833", "#aa3377", "#b59a1b", "#777777")
DPI, TILE = 150, 0.78  # of a picture; inches of an image in it
FAR = 50  # by how much curves of one plot may differ before its axis is logarithmic
# What else a file would say, of its writer and the time, would make two files of one picture differ.
FORMATS: dict[str, dict[str, None]] = {
    "png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}
}  # fmt: skip
_STYLE: dict[Any, Any] = {
    "figure.dpi": DPI, "savefig.dpi": DPI, "figure.facecolor": "white", "font.size": 10, "text.color": INK,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": GRID, "xtick.color": MUTED, "ytick.color": MUTED,
    "legend.frameon": False,
}  # fmt: skip


@contextmanager
def _figure(path: Path, title: str, size: tuple[float, float]) -> Iterator[Figure]:
    """size: in inches; wider where the title needs it."""
    kind = check_path(path)
    with mpl.rc_context(_STYLE):
        size = (max(size[0], 0.11 * len(title) + 0.3), size[1])
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        yield figure
        with atomic(path) as file:
            figure.savefig(file, format=kind, metadata=FORMATS[kind])


def check_path(path: Path, formats: Iterable[str] = FORMATS) -> str:
    """The format that a file's ending names."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in formats:
        raise ValueError(f"a picture's file must end in .{', .'.join(formats)}, got {path}")
    return kind


# ---- images


class Panel(NamedTuple):
    """Rows of images, (name, images) each, a row's name at its left; heads: the names of the columns."""

    rows: Sequence[tuple[str, np.ndarray]]
    heads: Sequence[str] = ()
    title: str = ""


def tiled(images: np.ndarray, columns: int, gap: int, blank: float = 1) -> np.ndarray:
    """images [N, H, W, C] -> one picture [H', W', C], row by row, `gap` pixels of `blank` around each."""
    n, height, width, channels = images.shape
    rows = math.ceil(n / columns)
    picture = np.full((rows, height + 2 * gap, columns, width + 2 * gap, channels), blank, images.dtype)
    for i, image in enumerate(images):
        picture[i // columns, gap : gap + height, i % columns, gap : gap + width] = image
    return picture.reshape(rows * (height + 2 * gap), columns * (width + 2 * gap), channels)


def _enlarged(images: np.ndarray, pixels: float) -> np.ndarray:
    """As colours [n, H', W', 3], framed, each pixel repeated until H' is at least `pixels`."""
    colours = images if images.ndim == 4 else np.repeat(1 - images[..., None], 3, 3)
    factor = max(1, math.ceil(pixels / colours.shape[1]))
    colours = colours.repeat(factor, 1).repeat(factor, 2)
    n, height, width, _ = colours.shape
    framed = np.empty((n, height + 2, width + 2, 3), np.float32)
    framed[:] = to_rgb(GRID)
    framed[:, 1:-1, 1:-1] = colours
    return framed


def _mosaic(axes: Axes, rows: Sequence[np.ndarray], columns: int, size: float, gap: int = 3) -> None:
    """Rows of images as one, image (row, column) with its middle at (column, row). size: of one, inches."""
    tiles = []
    for images in rows:
        tiles.append(_enlarged(images, size * DPI))
        if len(images) < columns:
            tiles.append(np.ones((columns - len(images), *tiles[-1].shape[1:]), np.float32))
    height, width = tiles[0].shape[1:3]
    picture = tiled(np.concatenate(tiles), columns, gap)
    axes.imshow(picture, extent=(-0.5, columns - 0.5, len(rows) - 0.5, -0.5), aspect=height / width)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _panel(axes: Axes, panel: Panel, columns: int, size: float) -> None:
    _mosaic(axes, [images for _, images in panel.rows], columns, size)
    axes.set_anchor("NW")
    axes.set_yticks(range(len(panel.rows)), [name for name, _ in panel.rows], color=INK)
    axes.set_xticks(range(len(panel.heads)), panel.heads, color=INK)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, pad=1)
    if panel.title:
        axes.set_title(panel.title)


def panels(path: Path, title: str, *parts: Panel) -> None:
    """Panels of images, one under the other; all images are of one size."""
    columns = max(len(images) for part in parts for _, images in part.rows)
    height, width = parts[0].rows[0][1].shape[1:3]
    size = max(TILE, height / DPI)
    heights = [size * len(part.rows) for part in parts]
    beside = sum(0.22 * bool(part.heads) + 0.28 * bool(part.title) + 0.06 for part in parts)
    named = max(len(name) for part in parts for name, _ in part.rows)
    whole = (columns * size * width / height + 0.1 * named + 0.1, sum(heights) + beside + 0.4)
    with _figure(path, title, whole) as figure:
        grid = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights)
        for axes, part in zip(grid.flat, parts):
            _panel(axes, part, columns, size)


def image_grid(path: Path, title: str, images: np.ndarray, columns: int) -> None:
    """images, row by row."""
    panels(path, title, Panel([("", images[i : i + columns]) for i in range(0, len(images), columns)]))


def image_rows(path: Path, title: str, rows: Mapping[str, np.ndarray]) -> None:
    """rows: name -> images, a row each."""
    panels(path, title, Panel([*rows.items()]))


def image_bands(path: Path, title: str, rows: Mapping[str, np.ndarray], columns: int) -> None:
    """rows: name -> images [n, ...], as many each: bands of `columns` images of every row."""
    n = max(map(len, rows.values()))
    bands = range(0, n, columns)
    panels(path, title, *(Panel([(k, v[i : i + columns]) for k, v in rows.items()]) for i in bands))


def reconstructions(path: Path, title: str, originals: np.ndarray, decoded: np.ndarray, columns: int) -> None:
    """originals, decoded [N, ...]: rows of originals, each over the row of what became of it."""
    image_bands(path, title, {"original": originals, "decoded": decoded}, columns)


class Map(NamedTuple):
    """Images at the places of a plane: [rows, columns, ...], at y [rows] and x [columns], both ascending."""

    images: np.ndarray
    x: np.ndarray
    y: np.ndarray


def image_maps(path: Path, title: str, maps: Mapping[str, Map], axes_names: tuple[str, str]) -> None:
    """Maps of images side by side, y upwards; axes_names: of x and y."""
    first = next(iter(maps.values())).images
    size = min(TILE, max(7.5 / max(first.shape[:2]), first.shape[2] / DPI / 1.5))
    whole = ((first.shape[1] * size + 0.8) * len(maps), first.shape[0] * size + 1.2)
    with _figure(path, title, whole) as figure:
        grid = figure.subplots(1, len(maps), squeeze=False).flat
        for axes, (name, (images, x, y)) in zip(grid, maps.items()):
            _mosaic(axes, list(images[::-1]), images.shape[1], size, gap=0)
            for axis, at in ((axes.xaxis, x), (axes.yaxis, y[::-1])):
                few = next(k for k in (4, 3, 2, 1) if (len(at) - 1) % k == 0)
                shown = range(0, len(at), max(1, (len(at) - 1) // few))
                axis.set_ticks(shown, [f"{at[i]:.2g}" for i in shown])
            axes.set(xlabel=axes_names[0], ylabel=axes_names[1], title=name)


# ---- points


class Plane(NamedTuple):
    """points [N, 2] and the names of their two axes, which are drawn in one scale."""

    points: np.ndarray
    axes_names: tuple[str, str]


def planes(path: Path, title: str, parts: Mapping[str, Plane], labels: np.ndarray | None,
           names: Sequence[str], legend: str) -> None:  # fmt: skip
    """Points side by side, of label k in k's colour, with its name, where all are short, at their median.

    labels: [N] in 0 ... len(names) - 1, or None for points of one colour. legend: what the labels are.
    """
    short = all(len(name) < 3 for name in names)
    colours = DIGITS if len(names) <= len(DIGITS) else mpl.colormaps["turbo"](np.linspace(0, 1, len(names)))
    with _figure(path, title, (6.2 * len(parts) + 1.0, 6.2)) as figure:
        grid = figure.subplots(1, len(parts), squeeze=False).flat
        for axes, (name, part) in zip(grid, parts.items()):
            if labels is None:
                axes.scatter(*part.points.T, s=10, color=FUSED, alpha=0.5, linewidths=0)
            for k, label in enumerate(names if labels is not None else ()):
                points = part.points[labels == k]
                if len(points) == 0:
                    continue
                axes.scatter(*points.T, s=14, color=colours[k], alpha=0.75, linewidths=0, label=label)
                if short:
                    axes.annotate(
                        label, np.median(points, axis=0), ha="center", va="center", fontsize=12,
                        fontweight="bold", color=colours[k],
                        bbox={"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": colours[k]},
                    )  # fmt: skip
            axes.set(xlabel=part.axes_names[0], ylabel=part.axes_names[1])
            axes.set_aspect("equal", "datalim")
            if len(parts) > 1:
                axes.set_title(name)
        if labels is not None:
            figure.legend(*axes.get_legend_handles_labels(), title=legend, loc="outside right center",
                          markerscale=1.8, alignment="left")  # fmt: skip


def latent_plane(path: Path, title: str, mu: np.ndarray, labels: np.ndarray) -> None:
    """mu [N, 2], labels [N] in 0..9: each digit in its colour, and its name at the median of its points."""
    names = ("posterior mean, dimension 1", "posterior mean, dimension 2")
    planes(path, title, {"": Plane(mu, names)}, labels, "0123456789", "digit")


# ---- numbers


def code_order(table: np.ndarray) -> np.ndarray:
    """The codes of table [K, labels], by the label that most of their images have; those without one last."""
    return np.lexsort((np.arange(len(table)), table.argmax(1), table.sum(1) == 0))


def code_table(path: Path, title: str, table: np.ndarray, codes: Sequence[int],
               labels: Sequence[str] = "0123456789", label: str = "digit") -> None:  # fmt: skip
    """table [K, labels]: how many images of each label (columns) have each code (rows, named by `codes`)."""
    with _figure(path, title, (max(6.2, 0.62 * len(labels)), 0.21 * len(table) + 1.4)) as figure:
        axes = figure.subplots()
        share = table / np.maximum(table.sum(1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (row, column), count in np.ndenumerate(table):
            if count:
                colour = "white" if share[row, column] > 0.55 else INK
                axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=colour)
        axes.set(xlabel=label, ylabel="code")
        axes.set_xticks(range(len(labels)), labels, rotation=45 * any(len(name) > 4 for name in labels))
        axes.set_yticks(range(len(table)), [str(k) for k in codes], fontsize=7)
        axes.grid(False)


def curves(path: Path, title: str, parts: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
           xlabel: str) -> None:  # fmt: skip
    """parts: name -> {series: (x, y)}, a small plot each; a series has one colour in all of them.

    x counts something. The y axis is logarithmic where series differ so much that a linear one would show the
    largest alone.
    """
    columns = min(3, len(parts))
    rows = math.ceil(len(parts) / columns)
    series = list(dict.fromkeys(name for part in parts.values() for name in part))
    with _figure(path, title, (3.9 * columns + 0.6, 2.7 * rows + 0.8)) as figure:
        grid = [*figure.subplots(rows, columns, squeeze=False).flat]
        for axes, (name, lines) in zip(grid, parts.items()):
            for one, (x, y) in lines.items():
                axes.plot(x, y, color=SERIES[series.index(one) % len(SERIES)], linewidth=1.5, label=one)
            axes.set(title=name, xlabel=xlabel, yscale="log" if _far_apart(lines) else "linear")
            axes.xaxis.set_major_locator(MaxNLocator("auto", steps=(1, 2, 5, 10), integer=True))
        for axes in grid[len(parts) :]:
            axes.set_visible(False)
        if len(series) > 1:
            keys = [Line2D([], [], color=SERIES[i % len(SERIES)]) for i in range(len(series))]
            figure.legend(keys, series, loc="outside lower left", ncols=len(series))


def _far_apart(lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> bool:
    """Whether the series' medians differ by more than the factor FAR, and all values have a logarithm."""
    drawn = [y[np.isfinite(y)] for _, y in lines.values()]
    medians = [np.median(y) for y in drawn if len(y)]
    return len(medians) > 1 and all((y > 0).all() for y in drawn) and max(medians) > FAR * min(medians)


def histograms(path: Path, title: str, parts: Mapping[str, Mapping[str, np.ndarray]], xlabel: str) -> None:
    """parts: name -> {series: positive values [N]}, a histogram each, on a logarithmic axis."""
    with _figure(path, title, (7.2 * len(parts), 4.2)) as figure:
        grid = figure.subplots(1, len(parts), squeeze=False).flat
        for axes, (name, values) in zip(grid, parts.items()):
            together = np.concatenate([*values.values()])
            least = max(together.min(), together.max() * 1e-6)
            bins = np.geomspace(least, together.max() * 1.001, 61)
            for colour, (one, found) in zip(SERIES, values.items()):
                inside, share = np.maximum(found, least), np.full(len(found), 1 / len(found))
                axes.hist(inside, bins, weights=share, color=colour, alpha=0.3, label=one)
                axes.hist(inside, bins, weights=share, color=colour, histtype="step", linewidth=1.5)
            axes.set(xscale="log", xlabel=xlabel, ylabel="share", title=name)
            axes.legend(loc="upper left")


def holes(path: Path, title: str, drawn: Mapping[str, np.ndarray],
          confidence: Mapping[str, np.ndarray]) -> None:  # fmt: skip
    """drawn: name -> images [n, ...], a block of rows each; under them how confidence [N] is spread."""
    columns = 12
    blocks = [Panel([("", images[i : i + columns]) for i in range(0, len(images), columns)], title=name)
              for name, images in drawn.items()]  # fmt: skip
    heights = [TILE * len(block.rows) for block in blocks]
    with _figure(path, title, (columns * TILE + 0.2, sum(heights) + 0.35 * len(blocks) + 3.4)) as figure:
        grid = figure.subplots(len(blocks) + 1, 1, height_ratios=[*heights, 2.5])
        for axes, block in zip(grid, blocks):
            _panel(axes, block, columns, TILE)
        for colour, (name, found) in zip(SERIES, confidence.items()):
            grid[-1].ecdf(found, color=colour, linewidth=1.8, label=name)
        xlabel = "probability of the class that the classifier takes an image for"
        grid[-1].set(xlabel=xlabel, ylabel="share of images below", xlim=(0, 1))
        grid[-1].legend(loc="upper left")


def kl_bars(path: Path, title: str, parts: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """parts: name -> (KL [D] in nats, active bool [D]): a bar for each dimension, the largest first."""
    widths = [min(14.0, 0.16 * len(kl) + 3.0) for kl, _ in parts.values()]
    with _figure(path, title, (sum(widths) + 0.5, 4.2)) as figure:
        grid = figure.subplots(1, len(parts), squeeze=False, sharey=True, width_ratios=widths)[0]
        for axes, width, (name, (kl, active)) in zip(grid, widths, parts.items()):
            order = np.argsort(-kl, kind="stable")
            colours = np.where(active[order], FUSED, REFERENCE)
            axes.bar(range(len(kl)), kl[order], width=0.8, color=colours)
            step = math.ceil(len(kl) / (6 * width))
            axes.set_xticks(range(0, len(kl), step), [str(k) for k in order[::step]], fontsize=7, rotation=90)
            axes.set(xlabel="latent dimension", title=f"{name}: {active.sum()} of {len(kl)} active")
            axes.set_xlim(-0.8, len(kl) - 0.2)
            axes.grid(axis="x", visible=False)
        grid[0].set_ylabel("KL to the prior, nats")
        bars = [Rectangle((0, 0), 1, 1, color=colour) for colour in (FUSED, REFERENCE)]
        figure.legend(bars, ("active", "not active"), loc="outside lower left", ncols=2)


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
