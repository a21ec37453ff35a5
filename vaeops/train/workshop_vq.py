"""`vaeops experiment workshop-vq`: a VQ-VAE that gives each image of a digit one code.

The experiment of a 2020 workshop: if the codebook has about as many codes as there are digits, does each code
become a digit? It writes the decoded codebook and the table of codes against digits, and prints how far it
came: reconstruction, perplexity, codes in use, purity (the share of images that their code's commonest digit
names right).
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..models import MLPVQVAE
from ..ops.vq import perplexity
from . import data, plots

PICTURES = ("codebook.png", "codes_by_digit.png")
BATCH = 128
SIZES: dict[str, dict[str, Any]] = {
    "mnist": {"hidden": (512,), "dim": 256},
    "digits": {"hidden": (128,), "dim": 64},
}
TAIL = 100  # steps over which the last losses are averaged


@dataclass
class Run:
    """A finished training. recon: mean squared error a pixel; both of them means over the last TAIL steps."""

    model: MLPVQVAE
    recon: float
    perplexity: float


def train(images: Tensor, *, codes: int, dim: int, hidden: Sequence[int], commitment: float, steps: int,
          seed: int, ops: str = "fused", name: str = "workshop-vq") -> Run:  # fmt: skip
    """Adam on mse + codebook loss + commitment * commitment loss; each step a fresh random batch.

    Args:
        images: [N, H, W] in [0, 1].
    """
    torch.manual_seed(seed)
    x = images.flatten(1)
    model = MLPVQVAE(x.shape[1], hidden, dim, codes, ops=ops)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history: list[Tensor] = []
    with tqdm(total=steps * BATCH, desc=f"{name:<16}", unit="img", unit_scale=True, mininterval=0.5) as bar:
        for step in range(steps):
            batch = x[torch.randint(len(x), (BATCH,), generator=order)]
            out = model(batch)
            recon = F.mse_loss(out.recon, batch)
            optimizer.zero_grad()
            (recon + out.codebook_loss + commitment * out.commit_loss).backward()
            optimizer.step()
            history.append(torch.stack((recon.detach(), perplexity(out.counts))))
            bar.update(BATCH)
            if step % TAIL == TAIL - 1:
                mean = torch.stack(history[-TAIL:]).mean(0).tolist()
                bar.set_postfix(recon=f"{mean[0]:.4f}", perplexity=f"{mean[1]:.1f}", refresh=False)
    last = torch.stack(history[-TAIL:]).mean(0).tolist()
    return Run(model.eval(), last[0], last[1])


@torch.no_grad()
def codes_by_label(model: MLPVQVAE, images: Tensor, labels: Tensor) -> Tensor:
    """How many images of each label have each code: int64 [codes, 10]."""
    codes = model.codebook.shape[0]
    indices = model.encode(images.flatten(1))
    return torch.bincount(indices * 10 + labels, minlength=codes * 10).view(codes, 10)


@torch.no_grad()
def draw(out: Path, model: MLPVQVAE, table: Tensor, side: int) -> None:
    """The decoded codebook and the code x digit table, codes ordered by the digit that they stand for.

    Codes that no image has come last, and are not in the table.
    """
    out.mkdir(parents=True, exist_ok=True)
    order = sorted(range(len(table)), key=lambda k: (int(table[k].sum()) == 0, int(table[k].argmax()), k))
    decoded = model.decode(torch.tensor(order)).unflatten(1, (side, side)).numpy()
    used = [k for k in order if int(table[k].sum()) > 0]
    unused = len(order) - len(used)
    title = "What each code decodes to" + (f" (the last {unused} are not in use)" if unused else "")
    plots.image_grid(out / PICTURES[0], title, decoded, columns=min(8, len(order)))
    plots.code_table(out / PICTURES[1], "Images of each digit by code", table[used].numpy(), used)


def summary(run: Run, table: Tensor) -> str:
    used = int((table.sum(1) > 0).sum())
    purity = float(table.amax(1).sum() / table.sum())
    return (f"recon {run.recon:.4f}   perplexity {run.perplexity:.1f}   "
            f"codes used {used} of {len(table)}   purity {purity:.3f}")  # fmt: skip


def read(name: str, root: Path | None, split: str, seed: int) -> tuple[Tensor, Tensor]:
    """A split's images [N, H, W] in [0, 1] and their labels [N]."""
    found = data.load(name, root, split=split, seed=seed)
    x, labels = found.batch(torch.arange(len(found)))
    assert labels is not None
    return data.scale(x, found.peak, (0, 1)).squeeze(1), labels


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="vaeops experiment workshop-vq", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--data", choices=("mnist", "digits"), default="digits", help="digits ships inside scikit-learn")
    add("--root", type=Path, help="its mnist/ holds the idx files (default: $VAEOPS_DATA or data)")
    add("--codes", type=int, default=32)
    add("--commitment", type=float, default=1.0, help="weight of the commitment loss")
    add("--steps", type=int, default=5000)
    add("--seed", type=int, default=0)
    add("--ops", choices=("fused", "ref"), default="fused")
    add("--out", type=Path, default=Path("workshop-vq"), help="folder for the pictures")
    args = parser.parse_args(arguments)
    if args.codes < 1 or args.steps < TAIL:
        parser.error(f"--codes must be at least 1 and --steps at least {TAIL}")
    options: dict[str, Any] = {
        "codes": args.codes,
        "commitment": args.commitment,
        "steps": args.steps,
        "seed": args.seed,
    }
    try:
        (images, _), tested = (read(args.data, args.root, s, args.seed) for s in ("train+valid", "test"))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    run = train(images, **SIZES[args.data], **options, ops=args.ops)
    table = codes_by_label(run.model, *tested)
    draw(args.out, run.model, table, images.shape[-1])
    print(summary(run, table))
    print("Pictures: " + ", ".join(str(args.out / picture) for picture in PICTURES))


if __name__ == "__main__":
    main()
