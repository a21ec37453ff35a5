"""The package as a whole: its files, importing it, the ways to install it."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import vaeops
from vaeops import _native, cli
from vaeops.ops import _library

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("rng", "gaussian", "recon", "vq", "perceptual")
TRITON_ALONE = ("perceptual",)  # on CUDA
GAUSSIAN = ("reparam_kl", "reparam_kl_packed", "reparameterize", "gaussian_kl", "gaussian_log_prob")
RECONSTRUCTION = ("recon_loss", "elbo", "gaussian_nll")
QUANTIZATION = (
    "vq_assign", "vq_topk", "vq_lookup", "vector_quantize", "vq_sample", "perplexity", "usage", "vq_ema_",
    "vq_expire_", "kmeans", "residual_vq", "fsq", "fsq_decode", "lfq", "lfq_decode", "vq_entropy",
)  # fmt: skip
PERCEPTUAL = ("perceptual_loss", "feature_distance")


def python(code: str, **environment: str) -> str:
    """Output of a fresh interpreter."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# ---- layout


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_files(family):
    for folder, suffix in (
        ("vaeops/ref", ".py"),
        ("vaeops/ops", ".py"),
        ("vaeops/kernels", ".py"),
        ("bench/cases", ".py"),
    ):
        assert (ROOT / folder / f"{family}{suffix}").exists() or (ROOT / folder / family).is_dir(), (
            f"{folder}/{family}"
        )
    assert (ROOT / f"tests/test_{family}.py").exists()
    assert (ROOT / f"csrc/bind/{family}.cpp").exists() and (ROOT / f"csrc/cpu/{family}.cpp").exists()
    assert list((ROOT / "csrc/cuda").glob(f"{family}*.cu")) or family in TRITON_ALONE


def test_every_op_is_defined_for_every_implementation():
    assert _library.names
    for name in _library.names:
        packet = getattr(torch.ops.vaeops, name)
        assert set(packet.overloads()) == {"default", *_library.IMPLS}
        assert torch._C._dispatch_has_kernel_for_dispatch_key(
            f"vaeops::{name}.ref", "CompositeExplicitAutograd"
        )
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vaeops::{name}.cpp", "CPU") == (
            _native.why_not("_ops_cpu") is None
        )


@pytest.mark.parametrize("name", GAUSSIAN + RECONSTRUCTION + QUANTIZATION + PERCEPTUAL)
def test_public_functions_are_documented_and_in_the_readme(name):
    doc = getattr(vaeops, name).__doc__
    assert doc and ("Returns:" in doc or name == "vq_ema_")  # which returns nothing
    assert f"`{name}`" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "name"),
    # reparam_kl_packed's reference passes its options on.
    [*(("gaussian", name) for name in GAUSSIAN if name != "reparam_kl_packed"),
     ("gaussian", "gaussian_nll"), ("recon", "recon_loss"), ("vq", "vq_lookup"), ("vq", "vector_quantize")],
)  # fmt: skip
def test_references_take_the_same_arguments(family, name):
    ours = inspect.signature(getattr(vaeops, name)).parameters
    reference = inspect.signature(getattr(getattr(vaeops.ref, family), name)).parameters
    assert list(ours) == list(reference)


def test_imports_keep_to_their_layers():
    """ref imports torch only; nobody imports bench or tests; kernels do not import ops."""
    for path in (ROOT / "vaeops").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) (bench|tests)\b", text, re.M), path
        if "ref" in path.parts:
            found = re.findall(r"^\s*(?:from|import) ([\w.]+)", text, re.M)
            allowed = {"torch", "torch.nn.functional", "math", "typing", ".", "collections.abc"}
            assert set(found) <= allowed, (path, found)
        if "kernels" in path.parts:
            assert "vaeops.ops" not in text and "from ..ops" not in text and "from ...ops" not in text, path


def test_environment_variables_are_the_three_in_the_readme():
    found = set()
    for path in [*(ROOT / "vaeops").rglob("*.py"), ROOT / "setup.py"]:
        found |= set(re.findall(r"VAEOPS_[A-Z]+", path.read_text()))
    assert found <= {"VAEOPS_NATIVE", "VAEOPS_CUDA", "VAEOPS_DATA"}, found


# ---- importing


def test_import_starts_no_cuda_and_imports_no_triton():
    code = (
        "import sys, torch, vaeops; assert not torch.cuda.is_initialized();"
        "assert not any(m == 'triton' or m.startswith('triton.') for m in set(sys.modules) - before)"
    )
    python("import sys, torch; before = set(sys.modules);" + code)


def test_import_costs_less_than_100_ms_over_torch(tmp_path):
    # A full collection walks torch's objects: 60 ms, on whoever is at work when it comes.
    code = (
        "import time; start = time.perf_counter(); import gc, torch; gc.disable(); t = time.perf_counter();"
        "import vaeops; print((time.perf_counter() - t) * 1e3, (t - start) * 1e3)"
    )
    cache = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    python("import vaeops", **cache)  # compiles the bytecode
    runs = [python(code, **cache).split() for _ in range(4)]
    ours, torchs = (min(map(float, times)) for times in zip(*runs))
    assert ours < 100 * max(1, torchs / 1250), (ours, torchs)  # a machine where torch takes longer is slower


def test_works_in_forked_loader_workers():
    code = """
import torch, vaeops
torch.set_num_threads(2)
vaeops.rng.normal((700_000,), torch.tensor([1, 2]))  # starts the parent's threads
class Draws(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return vaeops.rng.normal((700_000,), torch.tensor([i, 0]))
loader = torch.utils.data.DataLoader(Draws(), num_workers=2, multiprocessing_context="fork", timeout=60)
for i, x in enumerate(loader): assert torch.equal(x[0], vaeops.rng.normal((700_000,), torch.tensor([i, 0])))
print("ok")
"""
    assert python(code) == "ok"


def test_without_native_parts_the_reference_serves_and_says_so():
    code = """
import torch, vaeops
from vaeops.ops import _library
assert _library.serving("cpu") == "ref" and "VAEOPS_NATIVE=0" in _library.why_not("cpp", "cpu")
mu = torch.randn(5, 7, requires_grad=True)
z, kl, seed = vaeops.reparam_kl(mu, mu.detach())
(z.sum() + kl).backward()
assert torch.equal(z, vaeops.reparameterize(mu, mu.detach(), seed=seed, impl="ref"))
try: vaeops.reparam_kl(mu, mu, impl="cpp")
except ValueError as e: print(e)
f = torch.compile(lambda m: vaeops.reparam_kl(m, m)[1], fullgraph=True, backend="aot_eager")
f(mu).backward()
"""
    assert "left out by VAEOPS_NATIVE=0" in python(code, VAEOPS_NATIVE="0")


def test_a_required_part_that_is_missing_stops_the_import():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "VAEOPS_CUDA": "require"}
    result = subprocess.run([sys.executable, "-c", "import vaeops"], env=env, capture_output=True, text=True)
    assert (result.returncode == 0) == (_native.why_not("_ops_cuda") is None)
    if result.returncode:
        assert "VAEOPS_CUDA=require, but _ops_cuda is missing" in result.stderr


def test_a_wrong_wish_is_an_error():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "VAEOPS_NATIVE": "yes"}
    result = subprocess.run([sys.executable, "-c", "import vaeops"], env=env, capture_output=True, text=True)
    assert "VAEOPS_NATIVE must be auto, require or 0, got 'yes'" in result.stderr


# ---- without the extra [train]


def test_a_missing_package_of_training_is_one_line_that_names_the_extra():
    """Packages go one after the other; each command's first missing one is the one that went last."""
    pytest.importorskip("matplotlib")
    code = """
import contextlib, io, sys
from vaeops import cli
for module, package, commands in (
    ("sklearn", "scikit-learn", ["train vae-mlp data=digits model.in_dim=64 steps=1 out=/nowhere/run"]),
    ("matplotlib", "matplotlib", ["plot --help", "experiment --help"]),
    ("safetensors", "safetensors", ["train --help"]),
    ("PIL", "pillow", ["eval run", "sample run", "plot kl run", "experiment workshop-vq"]),
    ("tqdm", "tqdm", ["eval --help", "sample --help", "plot --help"]),
):
    for name in [*sys.modules]:
        if name.startswith(("vaeops.train", f"{module}.")):
            del sys.modules[name]
    sys.modules[module] = None
    for command in commands:
        with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()):
            status = cli.main(command.split())
        (line,) = stderr.getvalue().splitlines()
        needs = f"vaeops {command.split()[0]} needs the package {package}, which is not installed; the extra "
        assert status == 1 and line.startswith(f"{needs}[train] has it"), (command, status, line)
print("ok")
"""
    assert python(code) == "ok"


def test_the_extra_and_its_packages_are_the_same():
    (listed,) = re.findall(r"^train = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert sorted(re.findall(r'"([\w-]+)', listed)) == sorted(cli._TRAIN_EXTRA.values())
    assert '".[train]"' in (ROOT / "README.md").read_text()


# ---- installing


def copy_sources(to: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to / name)
    for name in ("csrc", "vaeops"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))


def build_wheel(source: Path, to: Path, **environment: str) -> subprocess.CompletedProcess:
    """As an offline machine installs: nothing is fetched, and the torch at hand is built against."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-build-isolation", "--no-deps"]
    env = {**os.environ, **environment}
    return subprocess.run([*command, "-w", str(to), str(source)], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "how", [{"VAEOPS_NATIVE": "0"}, {"CXX": "no-such-compiler", "VAEOPS_NATIVE": "auto"}]
)
def test_install_without_a_compiler_is_pure_python(tmp_path, how):
    copy_sources(tmp_path)
    wheels = tmp_path / "wheels"
    built = build_wheel(tmp_path, wheels, **how)
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.iterdir()
    assert wheel.name.endswith("py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [n for n in archive.namelist() if n.endswith(".so")]
        archive.extractall(tmp_path / "installed")
    code = "import torch, vaeops; x = torch.zeros(2); print(vaeops.gaussian_kl(x, x).item(), vaeops.__file__)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "VAEOPS_NATIVE": "auto"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path / "wheels"
    )
    assert out.stdout.startswith("0.0") and str(tmp_path) in out.stdout, out.stderr


def test_install_that_requires_a_compiler_fails_without_one(tmp_path):
    copy_sources(tmp_path)
    built = build_wheel(tmp_path, tmp_path / "wheels", CXX="no-such-compiler", VAEOPS_NATIVE="require")
    assert built.returncode != 0 and "no C++ compiler" in built.stderr + built.stdout


@pytest.mark.slow
def test_offline_install_builds_the_kernels(tmp_path):
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    copy_sources(tmp_path)
    wheels = tmp_path / "wheels"
    built = build_wheel(tmp_path, wheels, VAEOPS_NATIVE="require")
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert any("_ops_cpu.abi3" in n for n in names) and any("_host" in n for n in names)


@pytest.mark.slow
def test_editable_tree_is_left_clean():
    """What the build and the tests leave is ignored by git."""
    status = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=all"], capture_output=True, text=True, cwd=ROOT
    )
    if status.returncode:
        pytest.skip("not a git checkout")
    leftovers = [line for line in status.stdout.splitlines() if line.endswith((".so", ".o", ".pyc"))]
    assert not leftovers
