"""Pictures of a results file: time by size, share of the copy ceiling, memory."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .text import UNITS

CASE_SHAPE = re.compile(r"(?P<family>[\w-]+)/(?P<prefix>packed-)?(?P<shape>[\dx^]+)(?P<kind>.*)")


def _by(rows: Iterable[dict], *fields: str) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[f] for f in fields), []).append(row)
    return groups


def _last_direction(rows: list[dict]) -> list[dict]:
    """Forward+backward where a row has it, else forward."""
    best = {(r["threads"], r["case"], r["row"]): r for r in sorted(rows, key=lambda r: len(r["direction"]))}
    return list(best.values())


def _kind(row: dict) -> str:
    """The case without its shape: what a line of the time plot has in common. N x K x D: without N and K."""
    parts = CASE_SHAPE.fullmatch(row["case"])
    assert parts is not None, row["case"]
    if parts["family"].startswith("vq"):
        return f"{parts['family']} D = {parts['shape'].split('x')[-1]}"
    return f"{parts['family']} {parts['prefix'] or ''}{parts['kind'].lstrip('-')}"


def _colors(rows: list[dict]) -> dict[str, Any]:
    """One colour a contender, the same in every picture."""
    import matplotlib

    palette = matplotlib.colormaps["tab20"].colors  # the strong one of each pair first
    order = [*palette[::2], *palette[1::2]]
    return {name: order[i % len(order)] for i, (name,) in enumerate(sorted(_by(rows, "row")))}


def _time_by_size(rows: list[dict], title: str, path: Path, colors: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    kinds = _by(({**r, "kind": _kind(r)} for r in rows), "kind")
    columns = min(3, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.5 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in grid[len(kinds) :]:
        axes.remove()
    for axes, ((kind,), group) in zip(grid, kinds.items()):
        for (name,), line in _by(group, "row").items():
            line = sorted(line, key=lambda r: int(r["elements"]))
            sizes = [int(r["elements"]) for r in line]
            times = [[float(r[f"{q}_us"]) for r in line] for q in ("median", "p20", "p80")]
            axes.plot(sizes, times[0], "o-", label=name, color=colors[name])
            axes.fill_between(sizes, times[1], times[2], alpha=0.2, color=colors[name])
        axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="us (median, p20 to p80)", title=kind)
        axes.legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path)


def _bars(rows: list[dict], value: str, scale: float, label: str, title: str, path: Path,
          colors: dict[str, Any], log: bool = False) -> None:  # fmt: skip
    from matplotlib.figure import Figure

    cases = _by(rows, "case")
    figure = Figure(figsize=(8, 1.5 + 0.16 * (len(rows) + len(cases))), layout="constrained")
    axes = figure.subplots()
    places, middles, top = {}, [], 0
    for group in cases.values():  # a bar each, and the space of one between the cases
        places |= {id(r): top + i for i, r in enumerate(group)}
        middles.append(top + (len(group) - 1) / 2)
        top += len(group) + 1
    for (name,), group in _by(rows, "row").items():
        values = [float(r[value]) * scale for r in group]
        axes.barh([places[id(r)] for r in group], values, 0.9, label=name, color=colors[name])
    axes.set_yticks(middles, [case for (case,) in cases], fontsize=7)
    axes.set_ylim(top - 1, -1)
    axes.set(xlabel=label, title=title, xscale="log" if log else "linear")
    figure.legend(loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(path)


def draw(rows: list[dict], folder: Path, machine: str, threads: int) -> list[Path]:
    """Three PNGs of one machine's rows at one number of threads; returns their paths."""
    rows = [r for r in rows if r["machine"] == machine and int(r["threads"]) == threads]
    rows = _last_direction([r for r in rows if r["direction"].startswith("forward")])  # training has tables
    ceilings = {r["ceiling"]: float(r["g_per_s"]) for r in rows if r["case"].startswith("machine/")}
    rows = [r for r in rows if not r["case"].startswith("machine/")]
    if not rows:
        raise ValueError(f"no rows of {machine} with {threads} threads to draw")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{machine}-{name}.png" for name in ("time", "share", "memory")]
    title = f"{machine}, {threads} CPU threads"
    colors = _colors(rows)
    _time_by_size(rows, title, paths[0], colors)
    bounds = ", ".join(f"{name} {rate:.0f} {UNITS[name]}" for name, rate in ceilings.items())
    share = f"work of the fused kernel over time, % of the ceiling\n({bounds})"
    _bars(rows, "share", 100, share, title, paths[1], colors)
    kept = [r for r in rows if int(r["memory_bytes"])]
    _bars(kept, "memory_bytes", 2**-20, "MiB", title + ": memory", paths[2], colors, log=True)
    return paths
