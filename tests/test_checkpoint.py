"""Checkpoints: complete or not there, whatever happens; and a run that goes on to the same bits."""

import io
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

import trainer_case as case

from vaeops.train import checkpoint, log, loop

STATE = {"versions": {"vaeops": "0"}, "step": 1}


def test_the_newest_stay(tmp_path):
    for step in (5, 10, 15, 100):
        checkpoint.save(tmp_path / checkpoint.name(step), {**STATE, "step": step}, keep=2)
    (tmp_path / "notes.pt").touch()
    assert [p.name for p in checkpoint.found(tmp_path)] == ["step-000000015.pt", "step-000000100.pt"]
    assert checkpoint.load(tmp_path)["step"] == 100
    assert checkpoint.load(tmp_path / checkpoint.name(15))["step"] == 15
    assert (tmp_path / "notes.pt").exists()


def test_a_write_that_fails_changes_nothing(tmp_path):
    path = tmp_path / checkpoint.name(1)
    checkpoint.save(path, STATE, keep=3)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="halfway"), checkpoint.atomic(path) as file:
        file.write(b"half")
        raise RuntimeError("halfway")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


class Full:
    """No file may grow over so many bytes: the system's own refusal to write."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_full_disk_is_an_error_and_the_last_checkpoint_stays(tmp_path):
    loop.train(case.small(tmp_path, steps=2), model=case.vae(), dataset=case.dataset())
    (good,) = checkpoint.found(tmp_path / "checkpoints")
    config = case.small(tmp_path, steps=4)
    with Full(good.stat().st_size - 1), pytest.raises(OSError) as error:
        loop.train(config, tmp_path, model=case.vae(), dataset=case.dataset())
    message = str(error.value)
    assert "step-000000004.pt could not be written" in message and "File too large" in message
    assert "the last good checkpoint is of step 2" in message
    assert os.listdir(good.parent) == [good.name] and checkpoint.load(tmp_path)["step"] == 2
    result = loop.train(config, tmp_path, model=case.vae(), dataset=case.dataset())
    assert result.record["step"] == 4


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        checkpoint.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*x\.pt"):
        checkpoint.load(tmp_path / "x.pt")
    path = tmp_path / checkpoint.name(3)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="is no checkpoint of vaeops train"):
        checkpoint.load(path)
    checkpoint.save(path, STATE, keep=1)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="is no checkpoint of vaeops train"):
        checkpoint.load(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is no checkpoint of vaeops train"):
        checkpoint.load(path)
    torch.save({**STATE, "format": checkpoint.FORMAT + 1, "versions": {"vaeops": "9.9"}}, path)
    with pytest.raises(ValueError, match=r"has format 2 \(vaeops 9\.9\), this vaeops reads format 1"):
        checkpoint.load(path)


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_checkpoint_that_was_cut_off_is_named_and_so_is_the_one_before_it(tmp_path, size):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / checkpoint.name(step), {**STATE, "model": torch.ones(9999)}, keep=3)
    os.truncate(tmp_path / checkpoint.name(3), size)
    with pytest.raises(ValueError, match=r"03\.pt .* is damaged; the one before it is .*000000002\.pt$"):
        checkpoint.load(tmp_path)
    os.truncate(tmp_path / checkpoint.name(1), size)
    with pytest.raises(ValueError, match=r"01\.pt .* is damaged$"):
        checkpoint.load(tmp_path / checkpoint.name(1))


def test_no_code_runs_from_a_checkpoint(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({**STATE, "format": checkpoint.FORMAT, "model": Code()}, tmp_path / checkpoint.name(1))
    with pytest.raises(ValueError, match="is no checkpoint"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_random_states_come_back():
    def draw():
        return random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()

    np.random.standard_normal()  # leaves half a pair
    buffer = io.BytesIO()
    torch.save(checkpoint.random_states(), buffer)
    expected = draw()
    buffer.seek(0)
    checkpoint.restore_random_states(torch.load(buffer, weights_only=True))
    assert draw() == expected


def test_lines_after_a_step_are_dropped(tmp_path):
    path = tmp_path / log.FILE
    kept = '{"step": 2, "loss": 1.5}\n{"step": 4, "loss": 1.25}\n'
    path.write_text(kept + '{"step": 6, "loss": 1.0}\n{"step": 8, "lo')
    log.Log(tmp_path, 4, tensorboard=False).close()
    assert path.read_text() == kept


def kill_trials(trials, seed, path):
    here = Path(__file__).resolve()
    env = {**os.environ, "OMP_NUM_THREADS": "1",
           "PYTHONPATH": os.pathsep.join([str(here.parent.parent), str(here.parent)])}  # fmt: skip
    code = "import sys, trainer_case as t; t.kill_trials(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
    done = subprocess.run([sys.executable, "-c", code, str(trials), str(seed), str(path)], env=env,
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def test_killed_runs_end_with_the_same_bits(tmp_path):
    kill_trials(2, 0, tmp_path)


@pytest.mark.slow
def test_many_killed_runs_end_with_the_same_bits(tmp_path):
    kill_trials(20, 100, tmp_path)
