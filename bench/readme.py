"""Draws the README's benchmark tables from the committed results, so that no figure is typed.

    python bench/readme.py            rewrites README.md
    python bench/readme.py --check    exit status 1 when README.md is out of date

A table stands between `<!-- bench:FAMILY@MACHINE -->` and `<!-- /bench -->`; MACHINE is the stem of a file in
bench/results, and `bench:FAMILY@MACHINE:THREADS` picks one of several thread counts.
"""

import argparse
import re
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its own folder gives way to the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench import results
from bench.text import bytes_text, time_text

BLOCK = re.compile(r"(<!-- bench:(?P<family>[\w-]+)@(?P<machine>[\w-]+)(?::(?P<threads>\d+))? -->\n)"
                   r".*?(<!-- /bench -->)", re.S)  # fmt: skip


def _pick(rows: list[dict], family: str, threads: str | None, where: str) -> list[dict]:
    """The family's rows of one thread count, each (case, row) with its longest direction."""
    rows = [r for r in rows if r["case"].startswith(f"{family}/")]
    counts = sorted({r["threads"] for r in rows if threads in (None, r["threads"])}, key=int)
    if not counts:
        raise ValueError(f"{where}: no rows of that family (and thread count) in the results")
    if len(counts) > 1:
        raise ValueError(
            f"{where}: results at {', '.join(counts)} threads; add one of them, as in {where}:{counts[-1]}"
        )
    both = {(r["case"], r["row"]): r for r in sorted(rows, key=lambda r: len(r["direction"]))
            if r["threads"] == counts[0]}  # fmt: skip
    return [r for r in rows if both.get((r["case"], r["row"])) is r]


def _ours(row: dict) -> bool:
    return row["row"].startswith("vaeops")


def table(rows: list[dict], family: str, threads: str | None, where: str) -> str:
    """Markdown: a line a case, median times, and ours against each rival's fastest round."""
    rows = _pick(rows, family, threads, where)
    names = list(dict.fromkeys(r["row"] for r in rows))
    rivals = list(dict.fromkeys(r["row"] for r in rows if not _ours(r)))
    names.sort(key=lambda name: name.startswith("vaeops"))
    memory = any(int(r["memory_bytes"]) for r in rows)
    head = ["case", *names, *(f"x {name}" for name in rivals), f"share of {rows[0]['ceiling']}"]
    head += [f"memory, {rivals[0]} → ours"] if memory and rivals else []
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
        if memory and rivals:
            first = here.get(rivals[0])
            cells.append(
                " → ".join(bytes_text(int(r["memory_bytes"])) for r in (first, ours) if r is not None)
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + _caption(rows) + "\n"


def _ratio(rival: dict, ours: dict) -> str:
    ratio = float(rival["min_us"]) / float(ours["median_us"])
    return f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2f}"


def _time(row: dict | None, longest: int) -> str:
    if row is None:
        return ""
    note = " (forward)" if len(row["direction"]) < longest else ""
    return time_text(float(row["median_us"]) / 1e6) + note


def _caption(rows: list[dict]) -> str:
    def span(field: str) -> str:
        return ", ".join(sorted({r[field] for r in rows}))

    direction = max((r["direction"] for r in rows), key=len).capitalize().replace("+", " + ")
    return (f"{direction}, median of {span('rounds')} interleaved rounds; a speed-up is the rival's fastest "
            f"round over our median. {span('machine')}, {span('threads')} CPU threads; {span('versions')}; "
            f"commit {span('commit')}; {span('date')}.")  # fmt: skip


def redraw(text: str, folder: Path) -> str:
    """The README's text with every block drawn anew."""

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
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail when the README is out of date"
    )
    parser.add_argument("--readme", type=Path, default=results.ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the CSV files")
    args = parser.parse_args(argv)
    old = args.readme.read_text()
    try:
        new = redraw(old, args.results)
    except ValueError as error:
        print(f"{args.readme}: {error}", file=sys.stderr)
        return 1
    if args.check:
        if new != old:
            print(f"{args.readme} is out of date: run python bench/readme.py", file=sys.stderr)
        return int(new != old)
    if new != old:
        args.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
