"""The command line: `vaeops info`, `vaeops train`, `vaeops bench`. Also `python -m vaeops`."""

import argparse
import subprocess
import sys
from pathlib import Path

_BENCH = Path(__file__).resolve().parent.parent / "bench" / "run.py"


def _info(args: argparse.Namespace) -> int:
    from . import _info

    found = _info.info()
    print(_info.to_json(found) if args.json else found)
    return 0


def _bench(rest: list[str]) -> int:
    if not _BENCH.exists():
        print(
            f"vaeops bench: the benchmarks come with a source checkout; there is none at {_BENCH.parent}",
            file=sys.stderr,
        )
        return 2
    return subprocess.call([sys.executable, str(_BENCH), *rest])


def _train(rest: list[str]) -> int:
    from .train import workshop_celeba, workshop_vq

    presets = {"workshop-celeba": workshop_celeba.main, "workshop-vq": workshop_vq.main}
    if not rest or rest[0] not in presets:
        print(f"usage: vaeops train {{{','.join(presets)}}} ...", file=sys.stderr)
        return 0 if rest[:1] in (["-h"], ["--help"]) else 2
    presets[rest[0]](rest[1:])
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vaeops", description="Fused kernels for variational autoencoders in PyTorch."
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    info = commands.add_parser(
        "info", help="what was built, what this machine offers, and what will run (the default)"
    )
    info.add_argument("--json", action="store_true", help="as JSON")
    commands.add_parser("bench", help="run the benchmarks of a source checkout; takes bench/run.py's options")
    commands.add_parser(
        "train", help="train a reference model: workshop-celeba or workshop-vq; --help after its name"
    )
    argv = (sys.argv[1:] if argv is None else argv) or ["info"]
    if argv[0] == "bench":  # bench/run.py reads its own options, --help among them
        return _bench(argv[1:])
    if argv[0] == "train":
        return _train(argv[1:])
    return _info(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
