"""`vaeops experiment workshop-celeba`: the workshop's VAE of faces, with and without a perceptual loss.

The same training three times, from the same weights, batches and noise: the pixels' L1 alone; plus a
perceptual loss by hooks on a whole VGG, as the workshop writes it; plus that loss by
`vaeops.perceptual_loss`. It prints how far the losses of the last two lie apart and images/s of the three,
and draws reconstructions.

Without `--vgg` the trunk's weights are random: enough to show that the two agree, not to judge pictures by.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .. import rng
from ..models import CelebAVAE
from ..nn import VGGTrunk
from ..ops.perceptual import perceptual_loss
from . import data, plots

PICTURE = "reconstructions.png"
ARMS = ("pixels", "hooks", "vaeops")
TAPS = {"relu2_1": 6, "relu3_3": 15}  # names, and indices into torchvision's vgg16().features
FACES = 8  # columns of the picture
SIDE = 64  # of an image
TAIL = 20  # steps over which the last losses are averaged
PerceptualLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Run:
    """losses [steps]; seconds: of the steps, without the first."""

    model: CelebAVAE
    losses: list[float]
    seconds: float


class HookLoss:
    """Squared distance of hooked features, as the workshop has it: the whole net, both images, with hooks."""

    def __init__(self, trunk: VGGTrunk) -> None:
        self.features = trunk.sequential()
        self.found: dict[int, Tensor] = {}
        for index in TAPS.values():
            self.features[index].register_forward_hook(self._keep(index))

    def _keep(self, index: int):
        def hook(module, inputs, output):
            self.found[index] = output.clone()

        return hook

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        self.features(x)
        ours = dict(self.found)
        self.features(target)
        return torch.stack([F.mse_loss(ours[i], self.found[i], reduction="sum") for i in TAPS.values()]).sum()


def train(
    faces: Tensor, arm: str, trunk: VGGTrunk, *, steps: int, batch: int, gamma: float, lr: float, seed: int
) -> Run:
    """Adam on (L1 summed over an image + KL + gamma * perceptual distance), a batch's mean.

    Args:
        faces: uint8 [N, 3, 64, 64].
        arm: one of ARMS.
    """
    torch.manual_seed(seed)
    model = CelebAVAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    order = torch.Generator().manual_seed(seed)
    noise = rng.make_seed(generator=torch.Generator().manual_seed(seed))
    by_hooks = HookLoss(trunk) if arm == "hooks" else None
    losses, begin = [], 0.0
    for step in tqdm(range(steps), desc=f"{arm:<8}", unit="step", mininterval=0.5):
        if step == 1:
            begin = time.perf_counter()
        x = faces[torch.randint(len(faces), (batch,), generator=order)].float() / 127.5 - 1
        out = model(x, seed=rng.fold_in(noise, step))
        loss = F.l1_loss(out.pred, x, reduction="sum") / batch + out.kl.sum()
        if by_hooks is not None:
            loss = loss + gamma * by_hooks(out.pred, x) / batch
        elif arm == "vaeops":
            distance = perceptual_loss(out.pred, x, trunk, taps=tuple(TAPS), reduction="sum")
            loss = loss + gamma * distance / batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    seconds = time.perf_counter() - begin
    return Run(model.eval(), torch.stack(losses).tolist(), seconds)


def agreement(hooks: Run, ours: Run) -> tuple[float, float]:
    """Largest relative difference of the first 10 losses; relative difference of the last TAIL's means."""
    first = max(abs(a - b) / abs(a) for a, b in itertools.islice(zip(hooks.losses, ours.losses), 10))
    last_hooks, last_ours = (sum(run.losses[-TAIL:]) / TAIL for run in (hooks, ours))
    return first, abs(last_hooks - last_ours) / abs(last_hooks)


@torch.no_grad()
def draw(path: Path, runs: dict[str, Run], faces: Tensor, random_trunk: bool) -> None:
    x = faces[:FACES].float() / 127.5 - 1
    rows = {"original": x, **{arm: run.model.reconstruct(x) for arm, run in runs.items()}}
    note = " (the VGG's weights are random)" if random_trunk else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.image_rows(
        path, f"Held-out faces after {len(runs['vaeops'].losses)} steps{note}",
        {name: ((images.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy() for name, images in rows.items()},
    )  # fmt: skip


def read(source: Path, split: str, cache: Path | None) -> Tensor:
    """A split's faces, uint8 [N, 3, 64, 64]."""
    found = data.load("celeba", source, split=split, size=SIDE, cache=cache)
    return found.batch(torch.arange(len(found)))[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="vaeops experiment workshop-celeba", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/celeba_64.tar"),
        help="CelebA's layout, a folder, a .zip or a .tar (default: %(default)s)")  # fmt: skip
    add("--cache", type=Path, help="folder of the decoded images (default: vaeops-cache beside them)")
    add("--vgg", type=Path, help="weights of torchvision's vgg16; without them the trunk is random")
    add("--steps", type=int, default=300)
    add("--batch", type=int, default=64)
    add("--gamma", type=float, default=0.01, help="weight of the perceptual distance (default: %(default)s)")
    add("--lr", type=float, default=1e-4,
        help="Adam's (default: %(default)s; at the workshop's 1e-3 two memory formats of the same PyTorch "
        "already lie 1e-2 apart after ten steps)")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("workshop-celeba"), help="folder for the picture")
    args = parser.parse_args(arguments)
    if args.steps < TAIL:
        parser.error(f"--steps must be at least {TAIL}")
    options: dict[str, Any] = {"input_range": (-1.0, 1.0), "normalize": None}  # as the workshop feeds it
    try:
        faces, held_out = (read(args.data, split, args.cache) for split in ("train", "valid"))
        trunk = (VGGTrunk.random("vgg16", args.seed, **options) if args.vgg is None
                 else VGGTrunk.from_file(args.vgg, "vgg16", **options))  # fmt: skip
    except (OSError, ValueError) as error:
        parser.error(str(error))
    runs = {
        arm: train(
            faces,
            arm,
            trunk,
            steps=args.steps,
            batch=args.batch,
            gamma=args.gamma,
            lr=args.lr,
            seed=args.seed,
        )
        for arm in ARMS
    }
    draw(args.out / PICTURE, runs, held_out, args.vgg is None)
    for arm, run in runs.items():
        speed = (args.steps - 1) * args.batch / run.seconds
        mean = sum(run.losses[-TAIL:]) / TAIL
        print(f"{arm:<8} loss {run.losses[0]:10.2f} -> {mean:10.2f}   {speed:7.1f} images/s")
    first, last = agreement(runs["hooks"], runs["vaeops"])
    print(
        f"vaeops against hooks: first 10 losses within {first:.1e}, mean of the last {TAIL} within {last:.1e}"
    )
    print(f"Picture: {args.out / PICTURE}")


if __name__ == "__main__":
    main()
