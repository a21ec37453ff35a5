"""The trainer over two processes (gloo, on CPU) against one on the joined batch; and under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

import trainer_case as case

from vaeops.train import checkpoint, log
from vaeops.train.loop import train

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"
)
HERE = Path(__file__).resolve()
ENV = {**os.environ, "OMP_NUM_THREADS": "1",
       "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE.parent)])}  # fmt: skip
WORLD = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    code = "import sys, trainer_case as t; t.distributed(int(sys.argv[1]), sys.argv[2])"
    command = [sys.executable, "-c", code, str(WORLD), str(path)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return path, [torch.load(path / f"{r}.pt") for r in range(WORLD)]


@pytest.mark.parametrize("name", case.DISTRIBUTED)
def test_two_processes_train_what_one_does(results, name, tmp_path):
    """Up to rounding, which Adam lets grow; and both processes hold the same bits."""
    path, ranks = results
    model, changes = case.DISTRIBUTED[name]
    alone = train(case.small(tmp_path, **changes, checkpoint_every=0), model=model(), dataset=case.dataset())
    (ours, record), (theirs, _) = (rank[name] for rank in ranks)
    for key, value in case.weights(alone).items():
        assert torch.equal(ours[key], theirs[key]), key
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=2e-5)
    for key in ("loss", "recon"):
        assert record[key] == pytest.approx(alone.record[key], rel=1e-5)
    lines = log.read(path / name / log.FILE)  # one process writes
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert len(checkpoint.found(path / name / "checkpoints")) == 1


def test_a_signal_to_one_process_stops_all_at_the_next_line_of_the_log(results):
    path, ranks = results
    assert ranks[0]["stop"] == ranks[1]["stop"] and ranks[0]["stop"].startswith("stopped after step 4; saved")
    assert checkpoint.load(path / "stop")["step"] == 4


@pytest.mark.slow
def test_torchrun_trains_and_resumes(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
                "vaeops", "train"]  # fmt: skip
    command = [*torchrun, "tiny-2d", "steps=40", "batch=64", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout and checkpoint.load(tmp_path / "run")["step"] == 40
    more = [*torchrun, "--resume", str(tmp_path / "run"), "steps=60"]
    done = subprocess.run(more, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(tmp_path / "run")["step"] == 60
