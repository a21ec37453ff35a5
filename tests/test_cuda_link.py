"""The CUDA library built whole against this torch, which need not be a CUDA one: kernels, glue, link.

Only stand-ins for torch's CUDA libraries are at hand, so nothing runs; what shows is that the glue compiles
on the stable ABI and that all it needs of torch are the shim's C symbols.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
TORCH = Path(torch.__file__).parent
STABLE = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY", "-DUSE_CUDA", "-DVAEOPS_CUDA"]

pytestmark = [
    pytest.mark.skipif(not (CUDA / "include/cuda_runtime.h").exists(), reason="no CUDA toolkit"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def glue(source: Path, *flags: object) -> None:
    include = [ROOT / "csrc", TORCH / "include", TORCH / "include/torch/csrc/api/include", CUDA / "include",
               sysconfig.get_path("include")]  # fmt: skip
    run(
        "g++",
        "-std=c++20",
        "-fPIC",
        "-fvisibility=hidden",
        *STABLE,
        *(f"-I{i}" for i in include),
        *flags,
        source,
    )


@pytest.mark.parametrize("source", sorted((ROOT / "csrc/bind").glob("*.cpp")), ids=lambda p: p.stem)
def test_glue_compiles(source):
    glue(source, "-fsyntax-only")


@pytest.mark.slow
def test_library_links_and_needs_only_the_stable_shim(tmp_path):
    nvcc = CUDA / "bin/nvcc"
    if not nvcc.exists():
        pytest.skip("no nvcc")
    objects = []
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        objects.append(tmp_path / f"{source.stem}.cu.o")
        run(
            nvcc,
            "-std=c++17",
            "-arch=sm_90a",
            "-Icsrc",
            "-Xcompiler",
            "-fPIC",
            "-c",
            source,
            "-o",
            objects[-1],
        )
    for source in sorted((ROOT / "csrc/bind").glob("*.cpp")):
        objects.append(tmp_path / f"{source.stem}.o")
        glue(source, "-O1", "-c", "-o", objects[-1])
    stand_ins = ["torch_cuda", "c10_cuda"]
    for name in stand_ins:
        library = tmp_path / f"lib{name}.so"
        run("g++", "-shared", f"-Wl,-soname,{library.name}", "-x", "c++", "/dev/null", "-o", library)
    built = tmp_path / "_ops_cuda.so"
    paths = [f"-L{tmp_path}", f"-L{TORCH / 'lib'}", f"-L{CUDA / 'lib64'}"]
    needed = ["-Wl,--no-as-needed", *(f"-l{name}" for name in stand_ins), "-Wl,--as-needed"]
    system = ["-lc10", "-ltorch_cpu", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    run("g++", "-shared", "-o", built, *objects, *paths, *needed, *system)
    undefined = re.findall(r" U (\w+)", run("nm", "-D", "--undefined-only", built))
    foreign = [s for s in undefined if re.search(r"c10|at\d|torch", s) and not re.match(r"(aoti_)?torch_", s)]
    assert undefined and not foreign
    assert "PyInit__ops_cuda" in run("nm", "-D", "--defined-only", built)
