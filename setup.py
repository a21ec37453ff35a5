"""Builds the native parts of vaeops, all optional.

VAEOPS_NATIVE = auto | require | 0   the CPU kernels and the `_host` module: auto builds them where torch and
                                     a C++ compiler are at hand, require fails where they are not,
                                     0 makes a pure-Python install
VAEOPS_CUDA   = auto | require | 0   the CUDA kernels: auto builds them where torch is a CUDA build and
                                     a toolkit is found (whether a GPU is present does not matter)

Flags of one's own (say a sanitizer's) go into CXXFLAGS and LDFLAGS.
"""

import os
import shutil
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent.resolve()
STABLE_ABI = "0x020b000000000000"  # the oldest torch that the operator libraries run on: 2.11
OLDEST_TORCH = (2, 11)
ARCHITECTURES = "8.0;9.0a;10.0;12.0+PTX"


def wish(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "require", "0"):
        raise SystemExit(f"{name} must be auto, require or 0, got {value!r}")
    return value


def cuda_home() -> str | None:
    """A toolkit with its headers; an `nvcc` on PATH may be a wrapper script that stands somewhere else."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and os.path.isfile(f"{home}/bin/nvcc") and os.path.isfile(f"{home}/include/cuda_runtime.h"):
            return home
    return None


def missing() -> str | None:
    """Why nothing native can be built here."""
    try:
        import pybind11  # noqa: F401
        import torch
    except ImportError as error:
        return f"{error.name} is not importable at build time (install it first and use --no-build-isolation)"
    if tuple(int(v) for v in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    compiler = os.environ.get("CXX", "g++").split()[0]
    return None if shutil.which(compiler) else f"no C++ compiler ({compiler})"


def sources(*patterns: str) -> list[str]:
    return sorted(os.path.relpath(f, ROOT) for p in patterns for f in glob(str(ROOT / "csrc" / p)))


def native() -> dict:
    want, want_cuda = wish("VAEOPS_NATIVE"), wish("VAEOPS_CUDA")
    if want == "0":
        return {}
    # BuildExtension falls back to a slow build when the environment's own ninja is not on PATH.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    why = missing()
    if why:
        if "require" in (want, want_cuda):
            raise SystemExit(f"vaeops: the native parts are required, but {why}")
        print(f"vaeops: pure-Python install: {why}", file=sys.stderr)
        return {}

    import pybind11
    import torch

    home = cuda_home()
    cuda = want_cuda != "0" and torch.version.cuda is not None and home is not None
    if want_cuda == "require" and not cuda:
        raise SystemExit(f"vaeops: CUDA is required; torch.version.cuda={torch.version.cuda}, toolkit={home}")
    if cuda:
        # Both before cpp_extension is imported: it reads them at import, and guesses wrong without a GPU.
        os.environ["CUDA_HOME"] = str(home)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    # No contraction and no value-changing option: the noise stream's bits depend on each
    # operation rounding by itself.
    flags = ["-O3", "-g0", "-fvisibility=hidden", f"-fmacro-prefix-map={ROOT}/=", "-ffp-contract=off",
             "-fno-math-errno", "-fno-trapping-math"]  # fmt: skip
    stable = [*flags, "-std=c++20", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DTORCH_STABLE_ONLY"]
    include = [str(ROOT / "csrc")]
    extensions = [
        CppExtension("vaeops._ops_cpu", sources("cpu/*.cpp", "bind/*.cpp"), include_dirs=include,
                     py_limited_api=True, extra_compile_args={"cxx": stable}),
        Extension("vaeops._host", sources("host/*.cpp"), include_dirs=[*include, pybind11.get_include()],
                  extra_compile_args={"cxx": [*flags, "-std=c++17"]}, language="c++"),
    ]  # fmt: skip
    if cuda:
        extensions.append(
            CUDAExtension("vaeops._ops_cuda", sources("cuda/*.cu", "bind/*.cpp"), include_dirs=include,
                          py_limited_api=True,
                          extra_compile_args={"cxx": [*stable, "-DUSE_CUDA", "-DVAEOPS_CUDA"],
                                              "nvcc": ["-O3", "-std=c++17", "-lineinfo", "--threads", "2"]})
        )  # fmt: skip

    class Build(BuildExtension):
        def build_extension(self, extension):
            # The bindings are compiled once per device: their objects must not meet.
            base = self.build_temp
            self.build_temp = os.path.join(base, extension.name)
            try:
                super().build_extension(extension)
            finally:
                self.build_temp = base

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                if "require" in (want, want_cuda):
                    raise
                print(f"vaeops: the native build failed, pure-Python install: {error}", file=sys.stderr)
                self.extensions[:] = []

    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build.with_options(use_ninja=bool(shutil.which("ninja")))},
    }


os.chdir(ROOT)
setup(**native())
