"""celeba-vae-xl with its parameters divided among processes (FSDP2): for models that outgrow one GPU.

    torchrun --nproc-per-node 8 examples/train_fsdp.py --root DIR --out RUN --model '{"side": 256}'

Weights, gradients, averaged weights and the optimizer's state are sharded; every process trains on its part
of each batch, with its part of the joined batch's noise. Started again, it goes on from its last checkpoint.
`vaeops eval` and `vaeops sample` take RUN/model.safetensors, the averaged weights. docs/larger-models.md says
when this is worth while.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vaeops import models, rng
from vaeops.train import data, machine


def sharded(policy, **overrides):
    """The model in groups: each stage's weights are whole only while it runs."""
    model = models.create("celeba-vae-xl", **overrides)
    for stage in (*model.encoder, *model.decoder):
        fully_shard(stage, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def train(place, dataset, out, *, steps, batch, lr=2e-4, warmup=500, clip=1.0, ema=0.999, seed=0, every=1000,
          amp=True, **overrides):  # fmt: skip
    """What `vaeops train celeba-vae-xl` makes of these settings, up to rounding; the loss of each step."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if amp else MixedPrecisionPolicy()
    machine.seed_all(seed)  # all processes begin with the same weights
    model, average = sharded(policy, **overrides), sharded(policy, **overrides)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    batches = data.Batches(len(dataset), batch, seed, rank=place.rank, world=place.world)
    noise = rng.make_seed(generator=torch.Generator().manual_seed(seed)).to(place.device)
    losses, first = [], 0
    if saved := sorted(out.glob("step-*/.metadata")):  # of a checkpoint it is written last
        state = _state(model, average, optimizer) | {"step": 0, "position": (0, 0)}
        dcp.load(state, checkpoint_id=saved[-1].parent)  # into these very shards
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        first, batches.position = state["step"], state["position"]
    for step in range(first, steps):
        x, _ = dataset.batch(next(batches), place.device)
        x = data.scale(x, dataset.peak, model.input_range)
        terms, _ = model.terms(x, seed=rng.fold_in(noise, step), row=batches.row)
        loss = torch.stack([model.weights[name] * term.sum() for name, term in terms.items()]).sum()
        loss.backward()  # and a mean of the gradients over the processes
        losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup)
        optimizer.step()
        optimizer.zero_grad()
        get_ema_multi_avg_fn(ema)(list(average.parameters()), list(model.parameters()), None)
        if (step + 1) % every == 0 or step + 1 == steps:
            state = _state(model, average, optimizer) | {"step": step + 1, "position": batches.position}
            dcp.save(state, checkpoint_id=out / f"step-{step + 1:09d}")
            recent = place.mean(torch.stack(losses[-every:])).mean()
            if place.rank == 0:
                print(f"step {step + 1:,}: loss {recent:.5g}", flush=True)
    models.save(average, out / "model.safetensors")  # gathers the shards
    return place.mean(torch.stack(losses)).tolist() if losses else []


def _state(model, average, optimizer):
    """References to each process's shards."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "average": average.state_dict()}


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--root", type=Path, required=True, help="CelebA: a folder, .zip or .tar")
    parser.add_argument("--cache", type=Path, help="folder of the decoded images (default: beside them)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=64, help="images of a step, over all processes")
    parser.add_argument("--model", type=json.loads, default={}, help="arguments of CelebAVAEXL, as JSON")
    args = parser.parse_args()
    side = args.model.get("side", 128)
    with machine.processes(None) as place:
        if place.rank:
            place.any(False)  # the first process fills the cache
        faces = data.load("celeba", args.root, size=side, cache=args.cache)
        if not place.rank:
            place.any(False)
        train(place, faces, args.out, steps=args.steps, batch=args.batch, **args.model)


if __name__ == "__main__":
    main()
