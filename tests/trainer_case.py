"""Small models and data for the trainer's tests, and what those run in processes of their own."""

import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from vaeops.models import MLPVAE
from vaeops.models.protocol import Terms
from vaeops.nn import VectorQuantize
from vaeops.train import checkpoint
from vaeops.train.config import Config
from vaeops.train.data import Dataset
from vaeops.train.loop import Interrupted, train

SMALL = {"preset": "small", "epochs": None, "steps": 6, "batch": 16, "lr": 1e-2, "log_every": 2,
         "grid_every": 0}  # fmt: skip


class SmallVQ(nn.Module):
    """Each image one code of an averaged codebook, which starts as it is drawn."""

    input_shape, input_range, classes = (16,), (-1.0, 1.0), 0

    def __init__(self):
        super().__init__()
        self.weights = {"recon": 1.0, "commit": 0.25}
        self.encoder, self.decoder = nn.Linear(16, 4), nn.Linear(4, 16)
        self.quantize = VectorQuantize(4, 8, decay=0.8)

    def terms(self, x, label=None, *, seed=None, eps=None, row=0):
        q = self.quantize(self.encoder(x))
        recon = (self.decoder(q.quantized) - x).square().mean()
        return Terms({"recon": recon, "commit": q.commit_loss}, {"used": (q.counts > 0).float().sum()})

    def reconstruct(self, x, label=None):
        return self.decoder(self.quantize(self.encoder(x)).quantized)


def vae():
    torch.manual_seed(0)
    return MLPVAE(16, (12,), 4)


def vq():
    torch.manual_seed(0)
    return SmallVQ()


def interrupted(at, number=signal.SIGTERM):
    """A model that sends its own process a signal in its at-th call."""

    class Interrupts(MLPVAE):
        calls = 0

        def terms(self, *args, **options):
            self.calls += 1
            if self.calls == at:
                os.kill(os.getpid(), number)
            return super().terms(*args, **options)

    model = vae()
    model.__class__ = Interrupts
    return model


def dataset(n=64):
    """Images [n, 1, 4, 4] of two kinds."""
    drawn = np.random.default_rng(0)
    labels = drawn.integers(0, 2, n)
    x = drawn.integers(0, 128, (n, 1, 4, 4)) + 127 * (np.arange(4) // 2 == labels[:, None])[:, None, None]
    return Dataset("blocks", x.astype(np.uint8), labels.astype(np.int64))


def small(out, **changes):
    return Config(**{**SMALL, "out": str(out), **changes})


def weights(result):
    return {name: value.clone() for name, value in result.model.state_dict().items()}


def kill_trials(trials, first_seed, path):
    """Runs in forks, killed at random moments and resumed until they end, against one that is not killed."""
    torch.set_num_threads(1)
    config = {"steps": 40, "checkpoint_every": 5, "keep": 2, "ema": 0.9, "clip": 1.0, "amp": "bf16"}

    def child(out, model):
        tqdm.set_lock(threading.RLock())  # its own is of all forks: one that is killed may never let go of it
        checkpoints = checkpoint.found(Path(out) / "checkpoints")
        if not checkpoints:
            shutil.rmtree(out, ignore_errors=True)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        result = train(small(out, **config), out if checkpoints else None, model=model(), dataset=dataset())
        torch.save((weights(result), result.ema.state_dict(), result.record), Path(out) / "end.pt")

    def run(out, model, seconds=None):
        """Whether it ran to its end within some seconds; it is killed then."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(out, model)
                code = 0
            finally:
                os._exit(code)
        deadline = None if seconds is None else time.perf_counter() + seconds
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert status == 0, f"training failed with {status}"
                return True
            if deadline is not None and time.perf_counter() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return False
            time.sleep(0.001)

    expected = {}
    for name, model in (("warm", vae), ("vae", vae), ("vq", vq)):  # here: a fork then finds all imported
        begin = time.perf_counter()
        right = train(small(f"{path}/{name}", **config), model=model(), dataset=dataset())
        expected[name] = (weights(right), right.ema.state_dict(), right.record), time.perf_counter() - begin
    kills = 0
    for trial in range(trials):
        drawn = random.Random(first_seed + trial)
        name, model = drawn.choice((("vae", vae), ("vq", vq)))
        (right, averaged, record), seconds = expected[name]
        out = f"{path}/{trial}"
        for _ in range(2):
            if run(out, model, drawn.uniform(0.2, 1.0) * seconds):
                break
            kills += 1
        else:
            run(out, model)
        found, found_averaged, found_record = torch.load(f"{out}/end.pt")
        assert all(torch.equal(found[k], right[k]) for k in right), (trial, name)
        assert all(torch.equal(found_averaged[k], averaged[k]) for k in averaged), (trial, name)
        for key in ("step", "loss", "recon", "grad_norm"):
            assert found_record[key] == record[key], (trial, name, key)
        shutil.rmtree(out)
    print(f"{kills} kills")
    assert kills >= trials


def distributed(world, path):
    """Forks that train together; the results of each go to a file."""
    torch.set_num_threads(1)
    train(small(Path(path) / "warm"), model=vae(), dataset=dataset())  # a fork then finds all imported
    forks(world, _rank, path)


def forks(world, work, path):
    """work(rank, path) in forks that are a process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    pids = []
    for rank in range(world):
        pids.append(os.fork())
        if pids[-1] == 0:
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                torch.distributed.init_process_group("gloo")
                work(rank, path)
                torch.distributed.destroy_process_group()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    assert not any(codes), codes


def _rank(rank, path):
    results = {}
    for name, (model, changes) in DISTRIBUTED.items():
        result = train(small(Path(path) / name, **changes), model=model(), dataset=dataset())
        results[name] = weights(result), result.record
    try:
        train(small(Path(path) / "stop"), model=interrupted(3 if rank else 0), dataset=dataset())
    except Interrupted as stop:
        results["stop"] = str(stop)
    torch.save(results, f"{path}/{rank}.pt")


DISTRIBUTED = {
    "vae": (vae, {}),
    "vq": (vq, {}),
    "micro-batches": (vae, {"accumulate": 2}),
    "vq micro-batches": (vq, {"accumulate": 2}),
    "free bits": (vae, {"free_bits": 0.05}),
    "capacity": (vae, {"capacity": 2.0}),
    "clip": (vae, {"clip": 0.1, "ema": 0.9}),
}
