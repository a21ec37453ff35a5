"""The command line: `vaeops info | train | eval | sample | experiment | bench`. Also `python -m vaeops`."""

import argparse
import dataclasses
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


def _experiment(rest: list[str]) -> int:
    from .train import latent_figures, workshop_celeba, workshop_vq

    experiments = {
        "latent-digits": latent_figures.digits_main,
        "latent-faces": latent_figures.faces_main,
        "workshop-celeba": workshop_celeba.main,
        "workshop-vq": workshop_vq.main,
    }
    if not rest or rest[0] not in experiments:
        print(f"usage: vaeops experiment {{{','.join(experiments)}}} ...", file=sys.stderr)
        return 0 if rest[:1] in (["-h"], ["--help"]) else 2
    experiments[rest[0]](rest[1:])
    return 0


def _train(rest: list[str]) -> int:
    """0; 2: bad input; 3: a loss or parameter is not finite; 1: the disk; 128 + a signal's number: that."""
    from .models import presets
    from .train import checkpoint, config, data, loop

    parser = argparse.ArgumentParser(
        prog="vaeops train", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a reference model. torchrun -m vaeops train ... uses several processes.\n\n"
        f"presets: {', '.join(presets())}\ndata sets: {', '.join(data.names())}\n"
        f"settings: {', '.join(config.HINTS)}\n          (vaeops/train/config.py says what they mean)",
    )  # fmt: skip
    add = parser.add_argument
    add("settings", nargs="*", metavar="PRESET key=value", help="--resume brings the preset along")
    add("--data", help="data set")
    add("--root", help="folder of the data sets")
    add("--out", help="folder of the run (default: runs/PRESET, or the one resumed)")
    add("--ops", choices=("fused", "ref", "compile"), help="vaeops' kernels (default), the same in PyTorch, "
        "or that under torch.compile: the rival in a benchmark")  # fmt: skip
    add("--resume", help="a checkpoint, or the folder of a run, to go on from")
    args = parser.parse_intermixed_args(rest)
    given = [f"preset={text}" if i == 0 and "=" not in text else text for i, text in enumerate(args.settings)]
    options = {name: getattr(args, name) for name in ("data", "root", "out", "ops")}
    given += [f"{name}={value}" for name, value in options.items() if value is not None]
    try:
        base = None
        if args.resume is not None:
            base = config.Config(**checkpoint.load(args.resume)["config"])
            folder = checkpoint.resolve(args.resume).parent
            if folder.name == "checkpoints":  # the run may have been moved
                base = dataclasses.replace(base, out=str(folder.parent))
        settings = config.parse(given, base)
        loop.train(settings, args.resume)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"vaeops train: {error}", file=sys.stderr)
        return 2
    except loop.NonFinite as error:
        print(f"vaeops train: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"vaeops train: {error}", file=sys.stderr)
        return 1
    except loop.Interrupted as stop:
        print(f"vaeops train: {stop}", file=sys.stderr)
        return 128 + stop.signal
    return 0


def _trained(command: str, rest: list[str]) -> int:
    from .train import evaluate

    run = {"eval": evaluate.main, "sample": evaluate.sample_main}[command]
    try:
        return run(rest)
    except (ValueError, OSError) as error:
        print(f"vaeops {command}: {error}", file=sys.stderr)
        return 2


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
    commands.add_parser("train", help="train a reference model; --help lists them")
    commands.add_parser("eval", help="the figures of a trained model on a data set")
    commands.add_parser("sample", help="samples of a trained model, as a picture or an array")
    commands.add_parser("experiment", help="what a tutorial claims, as figures; --help after it lists them")
    argv = (sys.argv[1:] if argv is None else argv) or ["info"]
    if argv[0] == "bench":  # bench/run.py reads its own options, --help among them
        return _bench(argv[1:])
    if argv[0] == "train":
        return _train(argv[1:])
    if argv[0] in ("eval", "sample"):
        return _trained(argv[0], argv[1:])
    if argv[0] == "experiment":
        return _experiment(argv[1:])
    return _info(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
