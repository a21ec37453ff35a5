"""Draws the benchmark tables of README.md and docs/*.md from the committed results: no figure is typed.

    python bench/readme.py            rewrites the pages
    python bench/readme.py --check    exit status 1 when one is out of date

A table stands between `<!-- bench:FAMILY@MACHINE -->` and `<!-- /bench -->`; MACHINE is the stem of a file in
bench/results, and `bench:FAMILY@MACHINE:THREADS` picks one of several thread counts. The family "step-parts"
is that of bench/profile_step.py.
"""

import argparse
import re
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its own folder gives way to the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench import results
from bench.case import STEP
from bench.text import bytes_text, time_text

BLOCK = re.compile(r"(<!-- bench:(?P<family>[\w-]+)@(?P<machine>[\w-]+)(?::(?P<threads>\d+))? -->\n)"
                   r".*?(<!-- /bench -->)", re.S)  # fmt: skip


def _family(rows: list[dict], family: str, threads: str | None, where: str) -> list[dict]:
    """The family's rows of one thread count."""
    rows = [r for r in rows if r["case"].startswith(f"{family}/")]
    counts = sorted({r["threads"] for r in rows if threads in (None, r["threads"])}, key=int)
    if not counts:
        raise ValueError(f"{where}: no rows of that family (and thread count) in the results")
    if len(counts) > 1:
        raise ValueError(
            f"{where}: results at {', '.join(counts)} threads; add one of them, as in {where}:{counts[-1]}"
        )
    return [r for r in rows if r["threads"] == counts[0]]


def _longest(rows: list[dict]) -> list[dict]:
    """Each (case, row) with its longest direction."""
    both = {(r["case"], r["row"]): r for r in sorted(rows, key=lambda r: len(r["direction"]))}
    return [r for r in rows if both[r["case"], r["row"]] is r]


def _ours(row: dict) -> bool:
    return row["row"].startswith("vaeops")


def table(rows: list[dict], family: str, threads: str | None, where: str) -> str:
    """Markdown: a line a case, median times, and ours against each rival's fastest round."""
    rows = _family(rows, family, threads, where)
    if family.endswith("-parts"):
        return _parts(rows)
    rows = _longest(rows)
    names = list(dict.fromkeys(r["row"] for r in rows))
    rivals = list(dict.fromkeys(r["row"] for r in rows if not _ours(r)))
    names.sort(key=lambda name: name.startswith("vaeops"))
    memory = any(int(r["memory_bytes"]) for r in rows)
    head = ["case", *names, *(f"x {name}" for name in rivals), f"share of {rows[0]['ceiling']}"]
    head += [f"memory, {rivals[0]} → ours"] if memory and rivals else []
    steps = rows[0]["direction"] == STEP
    head += [f"images/s, {rivals[0]} → ours"] if steps and rivals else []
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for case in dict.fromkeys(r["case"] for r in rows):
        here = {r["row"]: r for r in rows if r["case"] == case}
        longest = max(len(r["direction"]) for r in here.values())
        ours = next(
            (r for r in here.values() if _ours(r)), None
        )  # the runner puts what serves the device first
        cells = [case.split("/", 1)[1]]
        cells += [_time(here.get(name), longest) for name in names]
        for name in rivals:
            cells.append("" if ours is None or name not in here else _ratio(here[name], ours))
        cells.append(f"{float(ours['share']):.0%}" if ours else "")
        ends = [r for r in (here.get(rivals[0]) if rivals else None, ours) if r is not None]
        if memory and rivals:
            cells.append(" → ".join(bytes_text(int(r["memory_bytes"])) for r in ends))
        if steps and rivals:
            cells.append(" → ".join(f"{int(r['elements']) / float(r['median_us']) * 1e6:,.0f}" for r in ends))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + _caption(rows) + "\n"


def _parts(rows: list[dict]) -> str:
    """Markdown: a line a row of a case, a column a part of its step: time, and share of the parts' sum."""
    names = list(dict.fromkeys(r["direction"] for r in rows))
    head = ["case", "row", *names, "sum"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for case, row in dict.fromkeys((r["case"], r["row"]) for r in rows):
        here = {r["direction"]: r for r in rows if (r["case"], r["row"]) == (case, row)}
        cells = [case.split("/", 1)[1], row]
        for part in (here.get(name) for name in names):
            cells.append(f"{_time(part, 0)} ({float(part['share']):.0%})" if part else "")
        cells.append(time_text(sum(float(r["median_us"]) for r in here.values()) / 1e6))
        lines.append("| " + " | ".join(cells) + " |")
    return (
        "\n".join(lines)
        + f"\n\nUnder torch.profiler, median of {_span(rows, 'rounds')} steps. {_where(rows)}\n"
    )


def _ratio(rival: dict, ours: dict) -> str:
    ratio = float(rival["min_us"]) / float(ours["median_us"])
    # What a step gains is small where products fill it.
    return f"{ratio:.1f}" if ratio >= (2 if ours["direction"] == STEP else 1) else f"{ratio:.2f}"


def _time(row: dict | None, longest: int) -> str:
    if row is None:
        return ""
    note = " (forward)" if len(row["direction"]) < longest else ""
    return time_text(float(row["median_us"]) / 1e6) + note


def _caption(rows: list[dict]) -> str:
    direction = max((r["direction"] for r in rows), key=len).capitalize().replace("+", " + ")
    return (f"{direction}, median of {_span(rows, 'rounds')} interleaved rounds; a speed-up is the rival's "
            f"fastest round over our median. {_where(rows)}")  # fmt: skip


def _span(rows: list[dict], field: str) -> str:
    return ", ".join(sorted({r[field] for r in rows}))


def _where(rows: list[dict]) -> str:
    machine, threads, versions = (_span(rows, field) for field in ("machine", "threads", "versions"))
    commit, date = (_span(rows, field) for field in ("commit", "date"))
    return f"{machine}, {threads} CPU threads; {versions}; commit {commit}; {date}."


def redraw(text: str, folder: Path) -> str:
    """A page's text with every block drawn anew."""

    def draw(found: re.Match) -> str:
        where = f"bench:{found['family']}@{found['machine']}"
        path = folder / f"{found['machine']}.csv"
        if not path.exists():
            raise ValueError(f"{where}: there is no {path}")
        return found[1] + table(results.read(path), found["family"], found["threads"], where) + found[5]

    if text.count("<!-- bench:") != len(BLOCK.findall(text)):
        raise ValueError(
            "a bench marker is not `<!-- bench:FAMILY@MACHINE -->` ... `<!-- /bench -->`, on their own lines"
        )
    return BLOCK.sub(draw, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/readme.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is out of date")
    pages = [results.ROOT / "README.md", *sorted((results.ROOT / "docs").glob("*.md"))]
    parser.add_argument("--readme", type=Path, nargs="+", default=pages, metavar="PAGE")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the CSV files")
    args = parser.parse_args(argv)
    stale = False
    for page in args.readme:
        old = page.read_text()
        try:
            new = redraw(old, args.results)
        except ValueError as error:
            print(f"{page}: {error}", file=sys.stderr)
            return 1
        if new != old and args.check:
            print(f"{page} is out of date: run python bench/readme.py", file=sys.stderr)
            stale = True
        elif new != old:
            page.write_text(new)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
