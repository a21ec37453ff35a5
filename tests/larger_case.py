"""A small celeba-vae-xl and small VQ-VAEs in processes of their own: DDP by the trainer, FSDP2 by torch."""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import train_fsdp
import trainer_case

from vaeops import models
from vaeops.nn import VectorQuantize
from vaeops.train import log
from vaeops.train.config import make
from vaeops.train.data import Dataset
from vaeops.train.loop import train
from vaeops.train.machine import Place

MODEL = {"latent": 4, "side": 16, "widths": (16, 32), "checkpointing": True}
RUN = {"batch": 16, "lr": 1e-3, "warmup": 2, "ema": 0.5}
STEPS = 4
TRAINER = {"fp32": {"accumulate": 2}, "bf16": {"accumulate": 2, "amp": "bf16"}}
SEED = torch.tensor([5, 0])


def faces(n=48):
    """Smooth images [n, 3, 16, 16]."""
    coarse = np.random.default_rng(0).integers(0, 256, (n, 3, 4, 4))
    return Dataset("faces", coarse.repeat(4, 2).repeat(4, 3).astype(np.uint8))


def trained(out, **changes):
    """(state of the averaged weights, loss of each step) by the trainer."""
    config = make("celeba-vae-xl", steps=STEPS, model=MODEL, lr_schedule="constant", log_every=1,
                  grid_every=0, checkpoint_every=0, out=str(out), **RUN, **changes)  # fmt: skip
    result = train(config, dataset=faces())
    return result.ema.state_dict(), [line["loss"] for line in log.read(Path(out) / log.FILE)]


def quantized(name, rows, group=None):
    """(state, losses) of a VQ-VAE after three steps on its rows of each batch, sharded over a group."""
    torch.manual_seed(0)
    if name == "moving averages":
        model = models.VQVAE(3, 8, hidden=8, inner=4, blocks=1, dim=4, codes=8)
    else:
        model = models.MLPVQVAE(192, (16,), 4, 8)
    if group is not None:
        for part in (model.encoder, model.decoder):
            fully_shard(part)
        fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    losses = []
    for step in range(3):
        x = torch.rand(16, *model.input_shape, generator=torch.Generator().manual_seed(step))[rows]
        terms = model.terms(x).losses
        loss = sum(model.weights[key] * value for key, value in terms.items())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach() if group is None else group.mean(loss.detach()))
    state = {key: value.full_tensor() if hasattr(value, "full_tensor") else value
             for key, value in model.state_dict().items()}  # fmt: skip
    return state, torch.stack(losses)


def distributed(world, path):
    torch.set_num_threads(1)
    trained(Path(path) / "warm")  # a fork then finds all imported
    trainer_case.forks(world, _rank, path)


def _rank(rank, path):
    path, world = Path(path), torch.distributed.get_world_size()
    place = Place(torch.device("cpu"), rank, world)
    results = {f"ddp {name}": trained(path / f"ddp {name}", **changes) for name, changes in TRAINER.items()}
    for name in ("fp32", "bf16", "resumed"):
        out, options = path / f"fsdp {name}", {**RUN, **MODEL, "amp": name == "bf16", "every": 2}
        if name == "resumed":
            if rank == 0:
                shutil.copytree(path / "fsdp fp32" / "step-000000002", out / "step-000000002")
            torch.distributed.barrier()
        results[f"fsdp {name}"] = train_fsdp.train(place, faces(), out, steps=STEPS, **options)
    share = 16 // world
    for name in ("moving averages", "learned"):
        results[name] = quantized(name, slice(rank * share, (rank + 1) * share), place)
    results["samples"], results["share"] = _samples()
    results["refused"] = _refused()
    torch.save(results, path / f"{rank}.pt")


def _samples():
    """Images of a sharded model, and the share of its weights that this process has."""
    torch.manual_seed(0)
    model = train_fsdp.sharded(train_fsdp.MixedPrecisionPolicy(), **MODEL)
    register_fsdp_forward_method(model, "sample")
    samples = model.eval().sample(3, SEED)
    model.reshard()
    parameters = list(model.parameters())
    share = sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters)
    return samples, share


def _refused():
    """What a learned codebook under fully_shard says when its codes are to be revived."""
    model = fully_shard(nn.Sequential(nn.Linear(4, 4), VectorQuantize(4, 8, ema=False, revive_below=0.5)))
    try:
        model(torch.rand(16, 4))
    except RuntimeError as error:
        return str(error)
