"""The benchmark suite: it refuses wrong rows, stores what it measures, and draws the README's tables."""

import csv
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import vaeops
from vaeops.ops._library import serving

ROOT = Path(__file__).resolve().parent.parent
TINY = "gaussian-wrapper/8x4"


@pytest.fixture
def bench(monkeypatch):
    """`bench("run")` is the module bench.run."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"bench.{name}")


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_quick_run_as_a_script(tmp_path):
    command = [
        sys.executable,
        "bench/run.py",
        "--quick",
        "--case",
        TINY,
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.csv")
    found = rows_of(path)
    assert {r["case"].split("-fp32")[0] for r in found} == {"machine/copy", TINY}
    assert {r["row"] for r in found} >= {"eager", "vaeops, seed given", "vaeops, low-level op"}
    assert {r["direction"] for r in found if r["row"] == "eager"} == {"forward", "forward+backward"}
    for r in found:
        assert 0 < float(r["min_us"]) <= float(r["median_us"]) <= float(r["p80_us"])
        assert r["machine"] == path.stem


def test_rows_replace_their_case_in_its_place_and_leave_others(tmp_path, bench):
    results, path = bench("results"), tmp_path / "m.csv"
    row = dict.fromkeys(results.FIELDS, "1")
    results.store(path, row | {"case": "a"}, [{"row": "old"}, {"row": "older"}])
    results.store(path, row | {"case": "b"}, [{"row": "kept"}])
    results.store(path, row | {"case": "a"}, [{"row": "new"}])
    results.store(path, row | {"case": "a", "threads": "2"}, [{"row": "other threads"}])
    assert [r["row"] for r in rows_of(path)] == ["new", "kept", "other threads"]
    results.store(path, row | {"case": "a"}, [])  # no row of the case was right
    assert [r["row"] for r in rows_of(path)] == ["kept", "other threads"]


def test_a_broken_write_leaves_the_file(tmp_path, bench, monkeypatch):
    results, path = bench("results"), tmp_path / "m.csv"
    row = dict.fromkeys(results.FIELDS, "1")
    results.store(path, row, [{}])
    before = path.read_bytes()
    monkeypatch.setattr(results.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        results.store(path, row | {"case": "a"}, [{}])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def _shrunk_kl(out):
    return out._replace(kl=out.kl * 0.99)


def _another_seed(out):
    return out._replace(seed=out.seed + 1)


def _kl_without_gradient(out):
    return out._replace(kl=out.kl.detach() + 0 * out.z.sum())


def _nan_in_z(out):
    return out._replace(z=out.z * torch.where(torch.arange(out.z.numel()) == 3, math.nan, 1.0).view_as(out.z))


def _constant_noise(out):
    return out._replace(z=out.z * 0 + 0.25, seed=None)[:2]


@pytest.mark.parametrize(
    "broken", [_shrunk_kl, _another_seed, _kl_without_gradient, _nan_in_z, _constant_noise]
)
def test_a_wrong_row_prints_no_time(broken, tmp_path, bench, monkeypatch, capsys):
    honest = vaeops.reparam_kl
    monkeypatch.setattr(vaeops, "reparam_kl", lambda *args, **options: broken(honest(*args, **options)))
    arguments = ["--quick", "--case", TINY, "--out", str(tmp_path), "--device", "cpu"]
    assert bench("run").main(arguments) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert len(wrong) == 2 and all(line.split()[0].startswith("vaeops") for line in wrong)
    (path,) = tmp_path.glob("*.csv")
    assert {r["row"] for r in rows_of(path)} == {"torch copy", "eager", "vaeops, low-level op"}


def test_training_steps(tmp_path, bench):
    assert bench("run").main(["--quick", "--case", "step", "--out", str(tmp_path), "--device", "cpu"]) == 0
    (path,) = tmp_path.glob("*.csv")
    found = [r for r in rows_of(path) if r["case"].startswith("step")]
    assert {r["direction"] for r in found} == {"training step"}
    rows = {case: {r["row"] for r in found if r["case"] == case} for case in {r["case"] for r in found}}
    eager = {"eager", "eager, fused Adam", f"vaeops ({serving('cpu')})"}
    peer = importlib.util.find_spec("vector_quantize_pytorch")
    rivals = {"lucidrains"} if peer else set()
    assert rows == {
        "step/vae-mlp-small-b16": eager, "step/celeba-vae-perceptual-small-b2": eager,
        "step-vq/vq-vae-small-b4-K32": rivals | {f"vaeops ({serving('cpu')})"},
    }  # fmt: skip
    assert all(int(r["work"]) > 0 and int(r["memory_bytes"]) > 0 for r in found)


def _larger_recon(train, monkeypatch):
    honest = train.vaeops.models.vae.recon_loss

    def larger(*args, impl, **options):
        return honest(*args, impl=impl, **options) * (1 if impl else 1.0005)

    monkeypatch.setattr(train.vaeops.models.vae, "recon_loss", larger)


def _kl_without_its_gradient(train, monkeypatch):
    honest = train.our_vae

    def without(model):
        loss = honest(model)

        def wrong(x, seed):
            kl = model(x, seed=seed).kl.sum()
            return loss(x, seed) - kl + kl.detach()

        return loss if model.impl else wrong

    monkeypatch.setattr(train, "our_vae", without)


def _other_noise(train, monkeypatch):
    honest = train.our_vae
    monkeypatch.setattr(
        train, "our_vae", lambda model: lambda x, seed: honest(model)(x, seed + (not model.impl))
    )


def _adam_that_rests(train, monkeypatch):
    honest = train.Step.__init__

    def rests(self, model, *args, **options):
        honest(self, model, *args, **options)
        if options["fused"]:
            self.optimizer.step = lambda: None

    monkeypatch.setattr(train.Step, "__init__", rests)


@pytest.mark.parametrize("broken", [_larger_recon, _kl_without_its_gradient, _other_noise, _adam_that_rests])
def test_a_wrong_training_step_prints_no_time(broken, tmp_path, bench, monkeypatch, capsys):
    train = bench("cases.train")
    train._start.cache_clear()
    broken(train, monkeypatch)
    arguments = ["--quick", "--case", "step/vae-mlp", "--out", str(tmp_path), "--device", "cpu"]
    assert bench("run").main(arguments) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert any(line.split()[0].startswith("vaeops") for line in wrong)
    (path,) = tmp_path.glob("*.csv")
    assert "eager" in {r["row"] for r in rows_of(path)}
    assert not [r for r in rows_of(path) if r["row"].startswith("vaeops")]


def test_a_wrong_quantizer_prints_no_time(bench, monkeypatch, capsys):
    def other_codes(self, x, *args, honest=vaeops.nn.VectorQuantize.forward, **options):
        out = honest(self, x, *args, **options)
        return out._replace(quantized=out.quantized.roll(1, 0))

    bench("cases.train")._start.cache_clear()
    monkeypatch.setattr(vaeops.nn.VectorQuantize, "forward", other_codes)
    assert bench("run").main(["--quick", "--case", "step-vq", "--device", "cpu"]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert len(wrong) == 1 and wrong[0].split()[0] == "vaeops"


def test_parts_of_a_training_step(tmp_path, bench, capsys):
    out, page = tmp_path / "box.csv", tmp_path / "page.md"
    assert bench("profile_step").main(["--quick", "--steps", "3", "--out", str(out)]) == 0
    found = rows_of(out)
    always = {"products", "reconstruction", "Adam", "rest"}
    parts = {case: set() for case in {r["case"] for r in found}}
    for r in found:
        parts[r["case"]].add(r["direction"])
        assert 0 < float(r["share"]) < 1
    assert parts == {
        "step-parts/vae-mlp-small-b16": always | {"latent"},
        "step-parts/celeba-vae-perceptual-small-b2": always | {"latent", "perceptual"},
        "step-parts/vq-vae-small-b4-K32": always | {"quantization"},
    }
    for case, row in {(r["case"], r["row"]) for r in found}:
        here = {r["direction"]: float(r["share"]) for r in found if (r["case"], r["row"]) == (case, row)}
        assert sum(here.values()) == pytest.approx(1, abs=1e-3)
    page.write_text("<!-- bench:step-parts@box -->\n<!-- /bench -->\n")
    assert bench("readme").main(["--readme", str(page), "--results", str(tmp_path)]) == 0
    assert "| case | row | products | latent |" in page.read_text()
    assert f"| vae-mlp-small-b16 | vaeops ({serving('cpu')}) |" in page.read_text()


def test_backward_counts_for_the_part_that_made_the_node(bench):
    device = torch.device("cpu")
    case = next(c for c in bench("cases.train").CASES if c.small and c.perceptual)
    step = case.rows(device, compiled=False)[0].call
    found = bench("profile_step").attributed(step, *case.inputs(device).leaves)
    backward = [part for event, part in found if event.name == "aten::convolution_backward"]
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in step.model.modules())
    # Of the VGG those up to relu3_3.
    assert (backward.count("perceptual"), backward.count("products")) == (7, convolutions)
    assert {part for event, part in found if event.name.startswith("Optimizer.")} == {"Adam"}


def test_our_failure_fails_the_run_and_a_rivals_does_not(bench, monkeypatch, capsys):
    run, gaussian = bench("run"), bench("cases.gaussian")
    arguments = ["--quick", "--case", TINY, "--device", "cpu"]

    def fails(*args, **options):
        raise RuntimeError("no such thing here")

    with monkeypatch.context() as patched:
        patched.setattr(gaussian, "textbook", fails)
        # The textbook formula also sets the budget, so nothing passes without it: ours must say so.
        assert run.main(arguments) == 1
    assert "not run: RuntimeError: no such thing here" in capsys.readouterr().out
    monkeypatch.setattr(gaussian.vaeops, "reparam_kl", fails)
    assert run.main(arguments) == 1
    assert "FAILED: RuntimeError: no such thing here" in capsys.readouterr().out


def test_plots(tmp_path, bench):
    assert bench("run").main(["--quick", "--case", "packed", "--out", str(tmp_path), "--plots", str(tmp_path),
                              "--device", "cpu"]) == 0  # fmt: skip
    assert len([p for p in tmp_path.glob("*.png") if p.stat().st_size > 1000]) == 3


@pytest.mark.parametrize("arguments, message", [
    (["--rounds", "2"], "--rounds must be at least 3"),
    (["--threads", "0"], "--threads must be at least 1"),
    (["--device", "mps"], "--device must be cpu or cuda"),
    (["--device", "nonsense"], "--device"),
    (["--case", "nothing"], "no case matches"),
    (["--quick", "--plots", "x"], "give --out as well"),
])  # fmt: skip
def test_bad_options(arguments, message, bench, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench("run").parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def readme(tmp_path, bench):
    """(call of bench/readme.py on a README with one block, the README, the CSV)"""
    results, path = bench("results"), tmp_path / "box.csv"
    common = dict.fromkeys(results.FIELDS, "1") | {"machine": "box", "memory_bytes": "2048"}
    results.store(path, common | {"case": "gaussian/128x20"}, [
        {"row": "eager", "direction": "forward", "median_us": "50", "min_us": "40"},
        {"row": "eager", "direction": "forward+backward", "median_us": "100", "min_us": "90"},
        {"row": "vaeops (cpp)", "direction": "forward+backward", "median_us": "30", "min_us": "20"},
    ])  # fmt: skip
    text = tmp_path / "README.md"
    text.write_text("# T\n<!-- bench:gaussian@box -->\n<!-- /bench -->\nrest\n")
    module = bench("readme")
    return lambda *more: module.main(["--readme", str(text), "--results", str(tmp_path), *more]), text, path


def test_readme_is_drawn_and_checked(readme, bench):
    draw, text, _ = readme
    assert draw("--check") == 1
    assert draw() == 0
    assert draw("--check") == 0
    # 90 us, eager's fastest round with backward, over 30 us, our median
    assert "| 128x20 | 100 us | 30.0 us | 3.0 | 100% | 2.0 KiB → 2.0 KiB |" in text.read_text()
    assert text.read_text().startswith("# T\n") and text.read_text().endswith("<!-- /bench -->\nrest\n")
    text.write_text(text.read_text().replace("3.0", "9.0"))
    assert draw("--check") == 1


def test_a_table_of_training_steps(tmp_path, bench):
    results, page = bench("results"), tmp_path / "page.md"
    common = dict.fromkeys(results.FIELDS, "1") | {
        "machine": "box", "memory_bytes": "2048", "elements": "64", "share": "0.5",
        "direction": "training step",
    }  # fmt: skip
    results.store(tmp_path / "box.csv", common | {"case": "step/vae-b64"}, [
        {"row": "eager", "median_us": "2000", "min_us": "1300"}, {"row": "vaeops (cpp)", "median_us": "1000"},
    ])  # fmt: skip
    page.write_text("<!-- bench:step@box -->\n<!-- /bench -->\n")
    other = tmp_path / "other.md"
    other.write_text("nothing to draw\n")
    draw = bench("readme").main
    assert draw(["--check", "--readme", str(other), str(page), "--results", str(tmp_path)]) == 1
    assert draw(["--readme", str(other), str(page), "--results", str(tmp_path)]) == 0
    line = "| vae-b64 | 2.00 ms | 1.00 ms | 1.30 | 50% | 2.0 KiB → 2.0 KiB | 32,000 → 64,000 |"
    assert line in page.read_text() and "Training step, median of" in page.read_text()


@pytest.mark.parametrize("block, message", [
    ("<!-- bench:gaussian@elsewhere -->\n<!-- /bench -->", "there is no"),
    ("<!-- bench:vq@box -->\n<!-- /bench -->", "no rows of that family"),
    ("<!-- bench:gaussian@box:7 -->\n<!-- /bench -->", "no rows of that family (and thread count)"),
    ("<!-- bench:gaussian -->\n<!-- /bench -->", "a bench marker is not"),
    ("<!-- bench:gaussian@box -->\n", "a bench marker is not"),
])  # fmt: skip
def test_readme_blocks_that_cannot_be_drawn(block, message, readme, capsys):
    draw, text, _ = readme
    text.write_text(block)
    assert draw() == 1
    assert message in capsys.readouterr().err
    assert text.read_text() == block


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="no README.md beside the package")
def test_the_readme_shows_the_committed_results():
    done = subprocess.run(
        [sys.executable, "bench/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpu_run_without_a_gpu(tmp_path):
    done = subprocess.run([sys.executable, "bench/gpu.py", "--out", str(tmp_path), "--case"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert list(stages) == ["build", "test", "benchmark", "memcheck", "racecheck", "sweep"]
    assert {stage["status"] for stage in stages.values()} == {"not run: no CUDA GPU"}


@pytest.mark.parametrize("script, status", [
    ("print('fine')", "ok"),
    ("raise SystemExit(3)", "failed: exit status 3"),
    ("raise SystemExit('Device not supported')", "not run: compute-sanitizer: device not supported"),
])  # fmt: skip
def test_gpu_stage_outcomes(script, status, tmp_path, bench):
    gpu = bench("gpu")
    stage = gpu.Stage("s", 60, [sys.executable, "-c", script], refused=gpu._sanitizer_refused)
    assert gpu.run(stage, tmp_path / "s.log", 60)["status"] == status


def test_gpu_stage_over_its_limit_is_stopped_with_its_children(tmp_path, bench):
    gpu = bench("gpu")
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    outcome = gpu.run(gpu.Stage("s", 1, [sys.executable, "-c", script]), tmp_path / "s.log", 1)
    assert outcome["status"] == "failed: over its limit of 1 s" and time.monotonic() - start < 2.5
    time.sleep(3)
    assert not mark.exists()


def test_gpu_stages_after_the_time_is_up(tmp_path, bench):
    gpu = bench("gpu")
    outcome = gpu.run(gpu.Stage("s", 60, ["false"]), tmp_path / "s.log", 0.2)
    assert outcome["status"].startswith("not run: the time")


def test_launchers_take_the_settings_that_the_sweep_puts_in_place():
    """Under Triton's interpreter, which needs a process of its own."""
    pytest.importorskip("triton")
    pytest.importorskip("vaeops.kernels._layout")
    code = """if True:
        import torch, vaeops
        from bench import sweep
        from vaeops.kernels import _layout
        asked, present = [], _layout.settings
        sweep.use(_layout, lambda *a, **o: asked.append(a) or present(*a, **o))
        seed = torch.tensor([1, 2])
        vaeops.rng.normal((8,), seed, impl="triton")
        mu, logvar = (torch.zeros(2, 4, requires_grad=True) for _ in range(2))
        out = vaeops.reparam_kl(mu, logvar, seed=seed, impl="triton")
        out.kl.backward()
        from vaeops.kernels.vq import assign
        original = assign.settings
        sweep.use(assign, lambda *a: asked.append(a) or original(*a))
        vaeops.vq_assign(torch.randn(3, 4), torch.randn(5, 4), impl="triton")
        case = sweep.select(["vq/16384x8192x256"])[0]
        use = sweep.hook(case)
        assert use.present in use.candidates and use.module is assign
        from vaeops.kernels.perceptual import conv
        plain = conv.settings
        sweep.use(conv, lambda *a: asked.append(a) or plain(*a))
        net, x = vaeops.VGGTrunk.random("vgg11", seed=0), torch.zeros(1, 3, 4, 4)
        vaeops.perceptual_loss(x, x, net, taps=("relu1_1",), impl="triton")
        use = sweep.hook(sweep.select(["perceptual/64x64x64"])[0])
        assert use.present in use.candidates and use.module is conv
        print(len(asked))"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "8", done.stdout + done.stderr


def test_what_the_sanitizer_watches_runs(bench, monkeypatch):
    """Its calls are legal; on a CPU, where there is no sanitizer to watch them."""
    sanitize = bench("sanitize")
    monkeypatch.setattr(sanitize, "DEVICE", "cpu")
    ran = []
    monkeypatch.setattr(
        vaeops, "reparam_kl", lambda *a, f=vaeops.reparam_kl, **o: ran.append(o["impl"]) or f(*a, **o)
    )
    for family in sanitize.FAMILIES.values():
        family(serving("cpu"))
    assert set(ran) == {serving("cpu")} and len(ran) == 3 * (len(sanitize.SHAPES) + 1)


def test_gpu_stages_on_a_machine_with_a_gpu(tmp_path, bench, monkeypatch):
    gpu = bench("gpu")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "toolkit_tool", lambda name: "/opt/nvcc" if name == "nvcc" else None)
    found = {stage.name: stage for stage in gpu.stages(tmp_path, "gaussian")}
    assert found["build"].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert {name: stage.refusal for name, stage in found.items() if stage.refusal} == {
        "memcheck": "compute-sanitizer is not installed", "racecheck": "compute-sanitizer is not installed",
    }  # fmt: skip
    for stage in found.values():
        scripts = [part for part in stage.command if part.endswith(".py")]
        assert all((ROOT / script).is_file() for script in scripts)
        assert "gaussian" in stage.command or stage.name == "build"
