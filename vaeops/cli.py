"""`vaeops info | train | eval | sample | plot | experiment | bench`. Also `python -m vaeops`."""

import argparse
import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_BENCH = Path(__file__).resolve().parent.parent / "bench" / "run.py"
# Packages of the extra [train], by the name that they are imported by.
_TRAIN_EXTRA = {"numpy": "numpy", "sklearn": "scikit-learn", "matplotlib": "matplotlib", "PIL": "pillow",
                "tqdm": "tqdm", "safetensors": "safetensors", "torchmetrics": "torchmetrics"}  # fmt: skip


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
    import safetensors.torch  # noqa: F401  # which is first used when the training is over

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
    add("--ops", choices=("fused", "fused-compile", "ref", "compile"), help="vaeops' kernels (default), or "
        "these under torch.compile; the same in PyTorch, or that under torch.compile: rivals in a benchmark"
        )  # fmt: skip
    add("--resume", help="a checkpoint, or the folder of a run, to go on from")
    args = parser.parse_intermixed_args(rest)
    given = [f"preset={text}" if i == 0 and "=" not in text else text for i, text in enumerate(args.settings)]
    options = {name: getattr(args, name) for name in ("data", "root", "out", "ops")}
    given += [f"{name}={value}" for name, value in options.items() if value is not None]
    try:
        base = None
        if args.resume is not None:
            base = config.Config(**checkpoint.load(args.resume)["config"])
            path = checkpoint.resolve(args.resume)
            folder = path.parent if path.parent.name else path.absolute().parent
            if folder.name == "checkpoints":  # the run may have been moved
                base = dataclasses.replace(base, out=str(folder.parent))
            elif not any(text.startswith("out=") for text in given):  # its run may have gone on
                raise ValueError(
                    f"out: {path} lies in no run's folder checkpoints: give a folder to go on in"
                )
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

    run = {"eval": evaluate.main, "sample": evaluate.sample_main, "plot": _plot}[command]
    try:
        return run(rest)
    except (ValueError, OSError) as error:
        print(f"vaeops {command}: {error}", file=sys.stderr)
        return 2


def _with_train_extra(command: str, rest: list[str]) -> int:
    """A command's exit status; 1, and one line, where a package of the extra [train] is missing."""
    try:
        if command == "train":
            return _train(rest)
        return _experiment(rest) if command == "experiment" else _trained(command, rest)
    except ImportError as error:
        found = error if error.name else error.__cause__  # an ImportError of ours tells its own story
        name = found.name if isinstance(found, ModuleNotFoundError) else None
        package = _TRAIN_EXTRA.get((name or "").partition(".")[0])
        if package is None:
            print(f"vaeops {command}: {error}", file=sys.stderr)
            return 2
        install = 'pip install --no-build-isolation ".[train]"'
        print(f"vaeops {command} needs the package {package}, which is not installed; the extra [train] has "
              f"it: {install}", file=sys.stderr)  # fmt: skip
        return 1


def _plot(rest: Sequence[str]) -> int:
    from ._names import unknown
    from .train import evaluate, plots
    from .train.pictures import KINDS
    from .train.runs import Run, distinct

    if rest and not rest[0].startswith("-") and rest[0] not in KINDS:
        raise ValueError(unknown("KIND", rest[0], KINDS))
    options = vars(_plot_parser().parse_args(rest))
    kind, paths, device = (options.pop(name) for name in ("kind", "run", "device"))
    out = options.pop("out") or Path(f"{kind}.png")
    plots.check_path(out)
    distinct(runs := [Run(path, device) for path in paths])
    draw = KINDS[kind]
    takes = inspect.signature(draw).parameters
    given: list[Any] = [runs] if "runs" in takes else [*runs]
    if "read" in takes:
        data, root, cache, among = (options.pop(key) for key in ("data", "root", "cache", "split"))

        def read(run: Run, name: str | None = None, split: str = among) -> Any:
            if (wanted := name or data or run.config.get("data")) is None:
                raise ValueError(f"{run.path} does not say what it was trained on: give --data")
            # Of another data set than the picture's, the cache is not meant unless it can have one.
            own = cache if name is None or name in evaluate.CACHED else None
            return evaluate.read_split(wanted, split, run.model, run.config, root=root, cache=own)

        given.append(read)
    figures = draw(*given, out, **options)
    print(f"{out}: {kind} of {', '.join(run.name for run in runs)}")
    for figure, value in figures.items():
        print(f"  {figure:<40}{value if isinstance(value, int) else f'{value:.4g}':>10}")
    return 0


def _plot_parser() -> argparse.ArgumentParser:
    """A kind's options are its keyword arguments."""
    from .train.evaluate import device, positive
    from .train.pictures import HELP, KINDS

    parser = argparse.ArgumentParser(prog="vaeops plot", description="A picture of trained models.")
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, draw in KINDS.items():
        doc = inspect.getdoc(draw) or ""
        sub = kinds.add_parser(name, help=doc.splitlines()[0], description=doc,
                               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        add, takes = sub.add_argument, inspect.signature(draw).parameters
        add("run", type=Path, nargs="+" if "runs" in takes else 1, metavar="RUN",
            help="a run's folder, a checkpoint, or a .safetensors model")  # fmt: skip
        add("--out", type=Path, help=f"the picture, .png, .pdf or .svg (default: {name}.png)")
        add("--device", type=device, help="of the models (default: CUDA where there is a GPU)")
        for option in takes.values():
            if option.kind is option.KEYWORD_ONLY:
                kind = positive if option.annotation is int and option.name != "seed" else option.annotation
                needed = option.default is option.empty
                default = "" if needed or option.default == "" else f" (default: {option.default})"
                add(f"--{option.name}", type=kind, required=needed, help=HELP[option.name] + default,
                    default=None if needed else option.default)  # fmt: skip
        if "read" in takes:
            add("--data", help="data set (default: the training's)")
            add("--root", help="folder of the data sets (default: the training's)")
            add("--cache", help="folder of decoded images (default: the training's)")
            add("--split", default="test", help="train, valid, test or train+valid (default: test)")
    return parser


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
    commands.add_parser("plot", help="a picture of trained models; --help lists the kinds")
    commands.add_parser("experiment", help="what a tutorial claims, as figures; --help after it lists them")
    argv = (sys.argv[1:] if argv is None else argv) or ["info"]
    if argv[0] == "bench":  # bench/run.py reads its own options, --help among them
        return _bench(argv[1:])
    if argv[0] in ("train", "eval", "sample", "plot", "experiment"):
        return _with_train_extra(argv[0], argv[1:])
    return _info(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
