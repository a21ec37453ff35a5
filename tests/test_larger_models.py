"""celeba-vae-xl in two processes (gloo, on CPU) against one: DDP by the trainer, FSDP2 by torch's own API."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

for package in ("tqdm", "matplotlib", "safetensors"):
    pytest.importorskip(package)
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch without gloo", allow_module_level=True)

import larger_case as case  # noqa: E402
from test_data_celeba import celeba_files, write  # noqa: E402

from vaeops import cli, models  # noqa: E402
from vaeops.train import machine  # noqa: E402

HERE = Path(__file__).resolve()
ENV = {**os.environ, "OMP_NUM_THREADS": "1",
       "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE.parent)])}  # fmt: skip
WORLD = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    code = "import sys, larger_case as c; c.distributed(int(sys.argv[1]), sys.argv[2])"
    command = [sys.executable, "-c", code, str(WORLD), str(path)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return path, [torch.load(path / f"{r}.pt") for r in range(WORLD)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    path = tmp_path_factory.mktemp("alone")
    joined = {name: {**changes, "accumulate": 1} for name, changes in case.TRAINER.items()}
    return {name: case.trained(path / name, **changes) for name, changes in joined.items()}


def distance(state, right):
    """|state - right| as a share of how far training went."""
    machine.seed_all(0)
    begin = models.create("celeba-vae-xl", **case.MODEL).state_dict()
    off, way = (torch.cat([(a[name] - b[name]).flatten() for name in right]).norm()
                for a, b in ((state, right), (right, begin)))  # fmt: skip
    return (off / way).item()


@pytest.mark.parametrize(("name", "loss", "weights"), [("fp32", 1e-5, 2e-4), ("bf16", 5e-4, 0.1)])
def test_two_processes_of_the_trainer_train_what_one_does(results, alone, name, loss, weights):
    """Micro-batches, averaged weights, checkpointing; in bf16 up to its rounding, which Adam makes larger."""
    _, (first, second) = results
    state, losses = first[f"ddp {name}"]
    right, right_losses = alone[name]
    assert all(torch.equal(value, second[f"ddp {name}"][0][key]) for key, value in state.items())
    assert losses == pytest.approx(right_losses, rel=loss)
    assert distance(state, right) < weights
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("name", "loss", "weights"), [("fp32", 1e-5, 2e-4), ("bf16", 5e-4, 0.15)])
def test_sharded_training_is_that_of_one_process(results, alone, name, loss, weights):
    path, (first, second) = results
    right, right_losses = alone[name]
    assert first[f"fsdp {name}"] == second[f"fsdp {name}"] == pytest.approx(right_losses, rel=loss)
    saved = models.load(path / f"fsdp {name}" / "model.safetensors")
    assert saved.preset == "celeba-vae-xl" and not saved.training
    assert distance(saved.state_dict(), right) < weights


def test_sharded_training_goes_on_to_the_same_bits(results):
    path, (first, _) = results
    assert first["fsdp resumed"] == first["fsdp fp32"][2:]
    runs = path / "fsdp fp32", path / "fsdp resumed"
    whole, resumed = (models.load(run / "model.safetensors") for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


@pytest.mark.parametrize("name", ["moving averages", "learned"])
def test_codebooks_under_fully_shard(results, name):
    """Averages are of all processes' rows, and every process has the same bits of them."""
    _, (first, second) = results
    right, losses = case.quantized(name, slice(None))
    for key, value in right.items():
        assert torch.equal(first[name][0][key], second[name][0][key]), key
        torch.testing.assert_close(first[name][0][key], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first[name][1], losses, rtol=1e-5, atol=0)


def test_a_method_of_a_sharded_model(results):
    _, ranks = results
    torch.manual_seed(0)
    expected = models.create("celeba-vae-xl", **case.MODEL).eval().sample(3, case.SEED)
    for rank in ranks:
        torch.testing.assert_close(rank["samples"], expected)
        assert rank["share"] == pytest.approx(1 / WORLD, abs=0.02)


def test_what_a_sharded_codebook_cannot_do(results):
    for rank in results[1]:
        assert "with fully_shard a learned codebook can be neither started" in rank["refused"]


@pytest.mark.slow
def test_both_by_torchrun(tmp_path, capsys):
    """The trainer, and the example, which goes on with another number of processes."""
    root = str(write(celeba_files([(16, 16)] * 20, [0] * 16 + [2] * 4), tmp_path / "celeba"))

    def torchrun(processes, *command):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        done = subprocess.run([*launch, str(processes), *command, "--root", root], env=ENV,
                              capture_output=True, text=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    settings = ["steps=2", "batch=8", "accumulate=2", "amp=bf16", "grid_every=0", "model.latent=4",
                "model.side=16", "model.widths=(16, 32)", "model.checkpointing=true"]  # fmt: skip
    run = str(tmp_path / "run")
    printed = torchrun(2, "-m", "vaeops", "train", "celeba-vae-xl", *settings, "--out", run)
    assert "2 x cpu" in printed
    assert cli.main(["eval", run, "--json"]) == 0

    script, out = str(HERE.parent.parent / "examples" / "train_fsdp.py"), str(tmp_path / "sharded")
    model = '{"latent": 4, "side": 16, "widths": [16, 32]}'
    options = ["--out", out, "--batch", "8", "--model", model]
    assert "step 2: loss" in torchrun(2, script, *options, "--steps", "2")
    assert "step 4: loss" in torchrun(1, script, *options, "--steps", "4")
    assert cli.main(["eval", f"{out}/model.safetensors", "--data", "celeba", "--root", root, "--json"]) == 0
    assert '"samples": 4' in capsys.readouterr().out
