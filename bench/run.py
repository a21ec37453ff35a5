"""The benchmark runner: eager, torch.compile, the best peer and vaeops, case by case.

    python bench/run.py --case 64x16 --threads 2 --plots plots

Each row is first checked against the fp64 reference; a wrong one prints no time and makes the exit status 1.
Rounds of all rows are interleaved in rotating order. A speed-up is the rival's FASTEST round over our MEDIAN.
G/s counts the work of the fused kernel, whatever a row really does: bytes where a plain copy bounds it,
floating-point operations where matrix products do. Its share is of that ceiling, measured in the same run;
above 100 % of a copy the data came from a cache. Memory: on a CPU the bytes kept for backward or the peak
above the inputs, as the case says, on a GPU the peak. A training step has images/s beside its time.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its own folder gives way to the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench import measure, results
from bench.case import COMPILE, STEP, Case, Inputs, Row
from bench.cases import ALL, select
from bench.measure import Timing
from bench.text import UNITS, bytes_text, time_text

QUICK_TURN_SECONDS = 0.002


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--case", action="append", metavar="TEXT", help="cases whose family/name contains TEXT; repeatable")
    add("--rounds", type=int, help="interleaved rounds (default 11, quick 3)")
    add("--quick", action="store_true",
        help="small cases, short rounds, no torch.compile; stores nothing unless --out is given")  # fmt: skip
    add("--out", type=Path, metavar="CSV", help="file or folder (default bench/results/<machine>.csv)")
    add("--device", default=default_device, help="cpu, cuda, cuda:1, ... (default here: %(default)s)")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--plots", type=Path, metavar="DIR", help="draw what the file holds of this machine into DIR as PNGs")
    add("--list", action="store_true", help="list the cases and stop")
    args = parser.parse_args(argv)
    if args.rounds is not None and args.rounds < 3:
        parser.error(f"--rounds must be at least 3, got {args.rounds}")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    try:
        args.device = torch.device(args.device)
    except RuntimeError as error:
        parser.error(f"--device: {error}")
    if args.device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {args.device}")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA GPU")
    if args.plots is not None and args.quick and args.out is None:
        parser.error("--plots draws what --out stores: with --quick give --out as well")
    args.cases = [c for c in select(args.case) if c.small or not args.quick]
    if not args.cases:
        names = "\n  ".join(f"{c.family}/{c.name}" for c in ALL if c.small or not args.quick)
        parser.error(f"no case matches {args.case}; there are\n  {names}")
    return args


def checked(case: Case, device: torch.device, compiled: bool, inputs: Inputs) -> tuple[list[Row], bool]:
    """The rows that are right; whether all were, and all of ours ran. A rival may be unable to run here."""
    good, all_right = [], True
    for row in case.rows(device, compiled):
        try:
            shares = case.check(row, inputs)
        except Exception as error:
            all_right &= not row.ours
            text = "".join(str(error).splitlines()[:1])
            print(f"  {row.name:26s} {'FAILED' if row.ours else 'not run'}: {type(error).__name__}: {text}")
            continue
        wrong = {name: share for name, share in shares.items() if not share <= 1}
        if wrong:
            all_right = False
            text = ", ".join(f"{name} at {share:.3g}" for name, share in wrong.items())
            print(f"  {row.name:26s} WRONG: {text} times its error budget")
        else:
            print(f"  {row.name:26s} right: {max(shares.values()):.0%} of the error budget at most")
            good.append(row)
    return good, all_right


def run_case(case: Case, args: argparse.Namespace, ceilings: dict[str, float]) -> tuple[list[dict], bool]:
    """Check, time and print one case. (rows for the CSV, whether every row was right)"""
    print(f"\n{case.family}/{case.name}")
    torch.manual_seed(0)
    torch._dynamo.reset()
    sets = measure.input_sets(case, args.device)
    rows, right = checked(case, args.device, not args.quick, sets[0])
    if not rows:
        return [], right
    kept = {row.name: measure.memory(case, row, sets[0]) for row in rows}
    work = {}
    for row in rows:
        work |= {(row.name, way): step for way, step in measure.steps(case, row, sets).items()}
    turn = QUICK_TURN_SECONDS if args.quick else measure.TURN_SECONDS
    timings = measure.interleaved(work, args.rounds, turn, args.device)
    ours = {row.name for row in rows if row.ours}
    rate = "images/s" if rows[0].step else "elem/ns"
    print(f"  {'row':26s} {'direction':17s} {'median':>9s} {'p20':>9s} {'p80':>9s} {'min':>9s} "
          f"{UNITS[case.ceiling]:>7s} {'share':>6s} {rate:>8s}  memory")  # fmt: skip
    stored = []
    for (name, direction), timing in timings.items():
        amount = case.work_forward + (case.work_backward if "backward" in direction else 0)
        row = csv_row(name, direction, timing, case.ceiling, amount, ceilings)
        times = " ".join(f"{time_text(t):>9s}" for t in (timing.median, timing.p20, timing.p80, timing.min))
        print(f"  {name:26s} {direction:17s} {times} {float(row['g_per_s']):7.2f} {float(row['share']):6.1%} "
              f"{speed(case.elements, direction, timing):>8s}  {bytes_text(kept[name])}"
              f"{_against(name, direction, timings, ours)}")  # fmt: skip
        stored.append(row | {"elements": case.elements, "memory_bytes": kept[name]})
    return stored, right


def speed(elements: int, direction: str, timing: Timing) -> str:
    rate = elements / timing.median
    return f"{rate:,.0f}" if direction == STEP else f"{rate / 1e9:.4f}"


def csv_row(
    name: str, direction: str, timing: Timing, ceiling: str, amount: int, ceilings: dict[str, float]
) -> dict:
    rate = amount / timing.median
    return {
        "row": name,
        "direction": direction,
        **timing.microseconds(),
        "rounds": timing.rounds,
        "ceiling": ceiling,
        "work": amount,
        "g_per_s": f"{rate / 1e9:.3f}",
        "share": f"{rate / ceilings[ceiling]:.4f}",
    }


def _against(name: str, direction: str, timings: dict[tuple[str, str], Timing], ours: set[str]) -> str:
    """ ", 12.1x eager" for a row of ours: the rival's fastest round over our median."""
    if name not in ours:
        return ""
    median = timings[name, direction].median
    rivals = ((rival, t.min) for (rival, d), t in timings.items() if rival not in ours and d == direction)
    return "".join(f"  {fastest / median:.2f}x {rival}" for rival, fastest in rivals)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        print("\n".join(f"{c.family}/{c.name}" for c in args.cases))
        return 0
    args.rounds = args.rounds or (3 if args.quick else 11)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)  # events are recorded on the current device
    name = results.machine(args.device)
    out = args.out or (None if args.quick else results.FOLDER)
    if out is not None and out.suffix != ".csv":
        out = out / f"{name}.csv"
    common = {
        "commit": results.commit(), "versions": results.versions(), "machine": name, "date": results.today(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(f"{name}, {common['threads']} CPU threads; {common['versions']}; commit {common['commit']}")
    print(f"{args.rounds} rounds" + f"; --quick leaves {COMPILE} out" * args.quick)
    ceilings = {}
    for kind in sorted({case.ceiling for case in args.cases}):
        timing, amount = measure.ceiling(kind, args.device, args.rounds, args.quick)
        ceilings[kind] = amount / timing.min
        print(f"{kind} ceiling {ceilings[kind] / 1e9:.1f} {UNITS[kind]}")
        if out is not None:
            row = csv_row(f"torch {kind}", "forward", timing, kind, amount, ceilings)
            common_row = common | {"case": f"machine/{kind}"}
            results.store(out, common_row, [row | {"elements": 0, "memory_bytes": 0}])
    all_right = True
    for case in args.cases:
        rows, right = run_case(case, args, ceilings)
        all_right &= right
        if out is not None:  # after every case: an interrupted run keeps what it has
            results.store(out, common | {"case": f"{case.family}/{case.name}"}, rows)
    if out is not None:
        print(f"\nstored in {out}")
    if args.plots:
        from bench.plots import draw

        print("drawn:", *draw(results.read(out), args.plots, name, torch.get_num_threads()))
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
