"""`vaeops.info()` and the command line."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import vaeops
from vaeops import _info, cli
from vaeops.ops import _library

SECTIONS = ["versions", "native", "cpu", "gpu", "environment", "ops"]


def test_what_serves_cuda_where_everything_is_there(monkeypatch):
    monkeypatch.setattr(
        _library, "why_not", lambda impl, device, name=None: None if impl != "cpp" else "runs on CPU"
    )
    assert _library.serving("cuda", "vq_gather") == "cuda"
    for name in ("vq_assign", "vq_topk", "recon_fwd", "recon_bwd", "multinomial_fwd", "multinomial_bwd"):
        assert _library.serving("cuda", name) == "triton"


def test_info_is_plain_values():
    found = vaeops.info()
    assert list(found) == SECTIONS
    assert json.loads(_info.to_json(found)) == found
    assert found["versions"]["torch"] == torch.__version__


def test_every_op_says_what_runs_and_why_not_the_others():
    ops = vaeops.info()["ops"]
    assert list(ops) == _library.names
    for by_device in ops.values():
        for device, answer in by_device.items():
            assert set(answer) - {"runs"} == set(_library.IMPLS) - {answer["runs"]}, device
            assert all(answer.values())


def test_what_runs_is_what_the_dispatcher_calls():
    """An impl that info() says can run takes a call; one that it says cannot raises."""
    answer = vaeops.info()["ops"]["normal"]["cpu"]
    seed = torch.tensor([1, 2])
    expected = vaeops.rng.normal((8,), seed)
    for impl in _library.IMPLS:
        if impl == answer["runs"] or answer[impl].startswith("can run"):
            assert torch.equal(vaeops.rng.normal((8,), seed, impl=impl), expected)
        else:
            with pytest.raises(ValueError, match="cannot run"):
                vaeops.rng.normal((8,), seed, impl=impl)


def test_a_loaded_library_without_a_kernel_of_the_op_is_noticed(monkeypatch):
    monkeypatch.setattr(_library, "why_not", lambda *_: None)
    monkeypatch.setattr(_library, "serving", lambda *_: "cuda")
    answer = _info._op("normal", "cpu")  # no CUDA kernel of anything is registered for CPU tensors
    assert answer["runs"] == "ref" and answer["cuda"] == "this op has no such kernel"


def test_the_page_names_everything(monkeypatch):
    monkeypatch.setenv("VAEOPS_DATA", "/some/where")
    page = str(vaeops.info())
    assert page == repr(vaeops.info())
    for text in ("VAEOPS_NATIVE", "/some/where", "ops on cpu", "_ops_cuda", *_library.names):
        assert text in page


def test_the_host_module_is_asked_when_there(monkeypatch):
    host = SimpleNamespace(
        cpu_features=lambda: {"avx2": True, "avx512f": False},
        build_info=lambda: {"compiler": "c"},
        isa=lambda library: f"avx2 of {library}",
    )
    monkeypatch.setattr(_info, "_host", lambda: host)
    monkeypatch.setattr(_info._native, "path", lambda stem: f"{stem}.so")
    found = vaeops.info()
    assert found["cpu"]["isa"] == "avx2 of _ops_cpu.so" and found["cpu"]["features"] == ["avx2"]
    assert found["native"]["_host"] == {"compiler": "c"}
    assert "avx2" in str(found) and json.loads(_info.to_json(found)) == found


def test_its_absence_is_said(monkeypatch):
    monkeypatch.setattr(_info, "_host", lambda: None)
    monkeypatch.setattr(_info._native, "path", lambda stem: f"{stem}.so")
    assert "not built" in vaeops.info()["cpu"]["isa"] and "not built" in vaeops.info()["cpu"]["features"]


def test_without_cpu_kernels_there_is_no_isa(monkeypatch):
    monkeypatch.setattr(_info._native, "path", lambda stem: None)
    assert "not loaded" in vaeops.info()["cpu"]["isa"]


def test_import_initialises_no_cuda_and_imports_no_triton():
    code = "import sys, torch, vaeops; print(torch.cuda.is_initialized(), 'triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_command_line():
    done = subprocess.run([sys.executable, "-m", "vaeops", "info", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)) == SECTIONS


def test_no_command_means_info(capsys):
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("versions")


def test_unknown_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fly"])
    assert "fly" in capsys.readouterr().err


def test_bench_hands_its_options_on(monkeypatch):
    seen = []
    monkeypatch.setattr(cli.subprocess, "call", lambda command: seen.append(command) or 7)
    assert cli.main(["bench", "--quick", "--help"]) == 7
    assert seen == [[sys.executable, str(cli._BENCH), "--quick", "--help"]]


def test_bench_without_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "_BENCH", tmp_path / "bench" / "run.py")
    assert cli.main(["bench"]) == 2
    assert "source checkout" in capsys.readouterr().err
