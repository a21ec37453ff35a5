"""The CUDA kernels compiled for three architectures, without a GPU: spills, registers, instruction counts.

`python tests/test_cuda_static.py` prints the table.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = ("sm_80", "sm_90a", "sm_100")
STATIC_SHARED = 48 << 10

# Registers a thread may have: 65536 / 256 threads / the blocks per multiprocessor that launch bounds promise.
# The first pattern that is found counts.
REGISTERS = (
    (r"^normal_kernel|^fold_in_kernel|^place_kernel|^scatter_kernel", 32),
    (r"^tiles_kernel|^scan_kernel", 128),
    (r"^gather_backward_kernel", 80),
    (r"^(pack|frame|refine|gather|keys|sum|combine|fixed_point)_kernel", 64),
    (r"^columns_kernel|<double|^rows_kernel<Backward", 128),
    (r"^rows_kernel|^flat_kernel<Backward<\w+, Path|, Path::linear|, Path::strided", 80),
    (r"^multinomial_\w+_kernel", 80),
    (r"^flat_kernel", 64),
)
# (elements, instructions per element) of the loop in the kernels that carry training: fp32 at N(0, I). Counts
# hold cold code (64-bit division, square roots of extreme numbers) too, and in the reconstruction losses all
# kinds and all types of an operand, of which a call runs one each. A jump: something is computed twice.
LOOPS = {
    r"^flat_kernel<Forward<float, Path::plain": (8, 115),
    r"^flat_kernel<Backward<float, Path::plain": (8, 120),
    r"^normal_kernel": (4, 125),
    r"^flat_kernel<Loss<float, true": (8, 450),
    r"^flat_kernel<Slope<float, true": (8, 390),
    r"^multinomial_forward_kernel<float": (8, 380),
    r"^multinomial_backward_kernel<float": (8, 260),
}
# Share of a kernel's busiest loop that is multiply-adds.
FMA_SHARE = {r"^tiles_kernel": 0.87}


def tool(name: str) -> str | None:
    """A CUDA binary: in the toolkit, or in Triton's wheel."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    places = [home / "bin" / name, Path(shutil.which(name) or "")]
    try:
        import triton

        places.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    except ImportError:
        pass
    return next((str(p) for p in places if p.is_file()), None)


def output(*command: str, text: str = "") -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def readable(symbols: list[str]) -> list[str]:
    """Kernel names without namespaces and arguments: `flat_kernel<Forward<float, Path::plain>>`."""
    names = output("c++filt", text="\n".join(symbols))
    paths = ("plain", "linear", "strided")
    out = []
    for name in names.splitlines():
        name = re.sub(r"vaeops::cuda::|\(anonymous namespace\)::|^void ", "", name)
        name = re.sub(r"\(Path\)(\d)", lambda m: f"Path::{paths[int(m[1])]}", name).replace("> >", ">>")
        out.append(re.sub(r"(>|kernel)\(.*", r"\1", name))
    return out


def loops(sass: str) -> list[list[str]]:
    """The instructions of every loop: from the target of a backward branch to the branch."""
    code = [(int(at, 16), op) for at, op in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", sass)]
    found = []
    for at, op in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", op)
        if target and int(target[1], 16) < at:
            found.append([o for a, o in code if int(target[1], 16) <= a <= at])
    return found


def compile_kernels(source: Path, arch: str, folder: Path) -> list[dict]:
    """One row per kernel.

    `loop` counts its longest loop's instructions, None without a disassembler; `fma` is the largest share
    of fp32 multiply-adds in any of its loops.
    """
    nvcc, cuobjdump = tool("nvcc"), tool("cuobjdump")
    assert nvcc
    cubin = folder / f"{source.stem}.{arch}.cubin"
    options = ("-std=c++17", "-O3", f"-arch={arch}", "-Xptxas", "-v", "-cubin")
    done = subprocess.run([nvcc, *options, "-o", str(cubin), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "warning" not in done.stderr, done.stderr[:2000]
    kernels = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(.*?)\n", done.stderr, re.S,
    )  # fmt: skip
    assert kernels, done.stderr[:2000]
    code = {}
    if cuobjdump:
        for function in output(cuobjdump, "-sass", str(cubin)).split("Function : ")[1:]:
            code[function.split()[0]] = loops(function)
    rows = []
    for (symbol, stores, loads, registers, rest), name in zip(kernels, readable([k[0] for k in kernels])):
        shared = re.search(r"(\d+) bytes smem", rest)
        lengths = [len(loop) for loop in code.get(symbol, [])]
        shares = [sum("FFMA" in op for op in loop) / len(loop) for loop in code.get(symbol, [])]
        rows.append(
            {
                "name": name,
                "arch": arch,
                "registers": int(registers),
                "spills": int(stores) + int(loads),
                "shared": int(shared[1]) if shared else 0,
                "loop": max(lengths, default=0) if cuobjdump else None,
                "fma": max(shares, default=0),
            }
        )
    return rows


def budget(name: str) -> int:
    return next(most for pattern, most in REGISTERS if re.search(pattern, name))


def print_table(rows: list[dict]) -> None:
    print(f"{'kernel':58} {'arch':7} {'registers':>9} {'shared':>7} {'spills':>7} {'loop':>6}")
    for r in sorted(rows, key=lambda r: (r["name"], r["arch"])):
        loop = "-" if r["loop"] is None else r["loop"]
        print(f"{r['name']:58} {r['arch']:7} {r['registers']:9} {r['shared']:7} {r['spills']:7} {loop:>6}")


@pytest.mark.skipif(tool("nvcc") is None, reason="no nvcc: set CUDA_HOME or put it on the path")
@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=() if a == "sm_90a" else pytest.mark.slow) for a in ARCHS]
)
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_budgets(source: Path, arch: str, tmp_path: Path) -> None:
    rows = compile_kernels(source, arch, tmp_path)
    print_table(rows)
    for row in rows:
        assert row["spills"] == 0, row
        assert row["registers"] <= budget(row["name"]), row
        assert row["shared"] <= STATIC_SHARED, row
        for pattern, (elements, most) in LOOPS.items():
            if row["loop"] is not None and re.search(pattern, row["name"]):
                assert 0 < row["loop"] / elements <= most, row
        for pattern, least in FMA_SHARE.items():
            if row["loop"] is not None and re.search(pattern, row["name"]):
                assert row["fma"] >= least, row


def test_every_kernel_has_a_budget() -> None:
    assert SOURCES
    assert budget("flat_kernel<Forward<float, Path::plain>>") == 64
    assert budget("rows_kernel<Backward<Half, Path::linear>>") == 128
    with pytest.raises(StopIteration):
        budget("unknown_kernel")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        print_table([row for s in SOURCES for a in ARCHS for row in compile_kernels(s, a, Path(scratch))])
