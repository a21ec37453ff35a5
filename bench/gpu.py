"""Everything that a GPU machine is needed for, in stages, in under nine minutes: what `make gpu` calls.

    python bench/gpu.py --out DIR [--case FAMILY]

build, test, benchmark, memcheck, racecheck, sweep: each stage has a time limit and a log of its own in DIR.
DIR/summary.json is rewritten after each, so that an interrupted run keeps what it has. What the machine
refuses (no GPU, no compiler, no sanitizer) is "not run: reason" and no failure. The exit status is 1 when a
stage failed.

Needs torch, triton, pytest and a compiler; nothing is downloaded.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its own folder gives way to the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench import results

TOTAL_SECONDS = 530
NO_TESTS_COLLECTED = 5  # pytest's exit status
PLANTED = 99  # exit status asked of compute-sanitizer when it has found an error


@dataclass(frozen=True)
class Stage:
    """`command`, run in the repository's root. `refused(status, log)`: why the machine stopped it."""

    name: str
    seconds: int
    command: list[str]
    refusal: str | None = None  # why it cannot even start
    refused: Callable[[int, str], str | None] = lambda status, log: None
    environment: dict[str, str] = field(default_factory=dict)


def toolkit_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on the PATH or where torch finds the toolkit."""
    from torch.utils.cpp_extension import CUDA_HOME

    homes = [Path(CUDA_HOME) / "bin", Path(CUDA_HOME) / "compute-sanitizer"] if CUDA_HOME else []
    return shutil.which(name) or next((str(h / name) for h in homes if (h / name).is_file()), None)


def architecture() -> str:
    """The present device's, as TORCH_CUDA_ARCH_LIST spells it; from 9.0 on with that chip's own features."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + ("a" if major >= 9 else "")


def _tests_refused(status: int, log: str) -> str | None:
    return "no test is marked gpu" if status == NO_TESTS_COLLECTED else None


def _sanitizer_refused(status: int, log: str) -> str | None:
    phrases = ("Device not supported", "Unable to attach", "Failed to initialize", "could not be initialized")
    return next((f"compute-sanitizer: {p.lower()}" for p in phrases if p in log), None) if status else None


def _sweep_refused(status: int, log: str) -> str | None:
    reason = next((line for line in log.splitlines() if line.startswith("not run: ")), None)
    return reason.removeprefix("not run: ") if reason else None


def stages(out: Path, family: str | None) -> list[Stage]:
    python = sys.executable
    gpu = torch.cuda.is_available()
    no_gpu = None if gpu else "no CUDA GPU"
    compiler, sanitizer = toolkit_tool("nvcc"), toolkit_tool("compute-sanitizer")
    case = ["--case", family] if family else []
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-build-isolation",
        "--no-deps",
        "-v",
        "-e",
        ".",
    ]
    # Plain allocations, so that an access past a tensor's end is outside every allocation.
    checked = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def sanitize(tool: str) -> Stage:
        command = [
            sanitizer or "",
            "--tool",
            tool,
            "--error-exitcode",
            str(PLANTED),
            python,
            "bench/sanitize.py",
            *case,
        ]
        missing = None if sanitizer else "compute-sanitizer is not installed"
        return Stage(tool, 90, command, no_gpu or missing, _sanitizer_refused, checked)

    no_compiler = None if compiler else "no nvcc: Triton kernels serve the GPU"
    building = {"TORCH_CUDA_ARCH_LIST": architecture() if gpu else "", "VAEOPS_CUDA": "require"}
    tests = [python, "-m", "pytest", "-m", "gpu", *(["-k", family] if family else [])]
    benchmark = [python, "bench/run.py", "--device", "cuda", "--rounds", "9", "--out", str(out), *case]
    sweep = [python, "bench/sweep.py", "--out", str(out / "sweep.csv"), *case]
    return [
        Stage("build", 150, install, no_gpu or no_compiler, environment=building),
        Stage("test", 180, tests, no_gpu, _tests_refused),
        Stage("benchmark", 220, benchmark, no_gpu),
        sanitize("memcheck"),
        sanitize("racecheck"),
        Stage("sweep", 120, sweep, no_gpu, _sweep_refused),
    ]


def run(stage: Stage, log: Path, limit: float) -> dict:
    """{"status": "ok" | "failed: why" | "not run: why", ...}. The log is written as it comes."""
    if stage.refusal:
        return {"status": f"not run: {stage.refusal}"}
    if limit < 1:
        return {"status": "not run: the time of the whole run was used up"}
    start = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment}
    with log.open("w") as file:
        child = subprocess.Popen(
            stage.command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=results.ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            status: int | None = child.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # compilers that it started as well
                child.wait()
    text = log.read_text(errors="replace")
    if status is None:
        verdict = f"failed: over its limit of {limit:.0f} s"
    elif reason := stage.refused(status, text):
        verdict = f"not run: {reason}"
    else:
        verdict = "ok" if status == 0 else f"failed: exit status {status}"
    return {
        "status": verdict,
        "seconds": round(time.monotonic() - start, 1),
        "command": stage.command,
        "log": log.name,
        "last_line": (text.rstrip().splitlines() or [""])[-1],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    # Empty when make passes on a variable that is not set.
    parser.add_argument(
        "--case", nargs="?", default=None, metavar="FAMILY", help="rng, gaussian, ...; default: all"
    )
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="limit of the whole run")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    summary = {"machine": results.machine(device), "commit": results.commit(), "date": results.today(),
               "versions": results.versions(), "case": args.case or "all", "stages": {}}  # fmt: skip
    failed = False
    for stage in stages(args.out, args.case or None):
        left = args.seconds - (time.monotonic() - begin)
        outcome = run(stage, args.out / f"{stage.name}.log", min(stage.seconds, left))
        summary["stages"][stage.name] = outcome
        failed |= outcome["status"].startswith("failed")
        print(f"{stage.name:10s} {outcome.get('seconds', 0):6.1f} s  {outcome['status']}", flush=True)
        partial = args.out / "summary.json.part"
        partial.write_text(json.dumps(summary, indent=2) + "\n")
        os.replace(partial, args.out / "summary.json")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
