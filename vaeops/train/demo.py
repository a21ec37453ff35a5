"""The demonstration, `python -m vaeops.train.demo`: a VAE on handwritten digits, fused and reference ops.

It trains the same model twice from the same weights, batches and noise seeds, once on vaeops' kernels and
once on the PyTorch reference, and prints how the two runs differ; trains a VQ-VAE that gives each image one
code; times the fused op against the textbook formula in eager PyTorch; and writes pictures. The data are the
1,797 images of 8x8 pixels that ship inside scikit-learn: nothing is downloaded.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .. import gaussian_kl, gaussian_log_prob, reparam_kl, rng
from ..models import MLPVAE
from ..nn import KLSchedule, PosteriorMonitor
from ..ops._library import serving
from . import plots, workshop_vq

PICTURES = ("reconstructions.png", "samples.png", "latent_2d.png", "loss.png", "benchmark.png",
            *workshop_vq.PICTURES)  # fmt: skip
CASES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("reparam_kl", (128, 20)),
    ("reparam_kl", (1024, 128)),
    ("reparam_kl", (4096, 256)),
    ("reparam_kl", (8, 16, 128, 128)),
    ("reparam_kl", (64, 16, 128, 128)),
    ("gaussian_kl", (8, 16, 128, 128)),
    ("gaussian_log_prob", (8, 16, 128, 128)),
)
BATCH, HIDDEN, LATENT = 128, (256, 128), 10
CASE_SECONDS = 8  # a case is timed for no longer, once it has three rounds
TRAIN = 1500  # the other 297 images are held out
STEPS = -(-TRAIN // BATCH)  # an epoch
VQ: dict[str, Any] = {"codes": 32, "dim": 64, "hidden": (128,), "commitment": 1.0}
VQ_STEPS = 20  # an epoch of the other trainings
BETA = 0.4  # KL weight at the end: at 1 the latent of so small an image keeps but a blur of it


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """All images [N, 8, 8] in [0, 1] and their labels [N], the TRAIN training images first."""
    images, labels = zip(
        *(workshop_vq.read("digits", None, split, seed) for split in ("train+valid", "test"))
    )
    return torch.cat(images), torch.cat(labels)


@dataclass
class Run:
    """A finished training: losses per step in nats an image, images/s of the median step, latent health."""

    model: MLPVAE
    recon: np.ndarray
    kl: np.ndarray
    images_per_s: float
    health: dict[str, float]


def train(name: str, images: Tensor, epochs: int, seed: int, *, latent: int, ops: str) -> Run:
    """Adam on recon + beta KL, beta rising over the first fifth. All randomness follows from the seed."""
    torch.manual_seed(seed)
    model = MLPVAE(images.shape[1], HIDDEN, latent, ops=ops)
    order = torch.Generator().manual_seed(seed)
    noise = torch.tensor([seed, 0])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    beta = KLSchedule("linear", stop=BETA, steps=max(1, epochs * STEPS // 5))
    monitor = PosteriorMonitor(latent)
    history: list[Tensor] = []
    seconds: list[float] = []  # an image; their median holds on a busy machine, where the mean does not
    with tqdm(
        total=epochs * len(images), desc=f"{name:<16}", unit="img", unit_scale=True, mininterval=0.5
    ) as bar:
        for _ in range(epochs):
            monitor.reset()
            for batch in torch.randperm(len(images), generator=order).split(BATCH):
                begin = time.perf_counter()
                x = images[batch]
                out = model(x, seed=rng.fold_in(noise, len(history)))
                recon = F.binary_cross_entropy_with_logits(out.pred, x, reduction="sum") / len(x)
                kl = out.kl.sum()
                optimizer.zero_grad()
                (recon + beta() * kl).backward()
                optimizer.step()
                beta.step()
                monitor.update(out.mu, out.kl)
                history.append(torch.stack((recon.detach(), kl.detach())))
                seconds.append((time.perf_counter() - begin) / len(x))
                bar.update(len(x))
            recon_mean, kl_mean = torch.stack(history[-STEPS:]).mean(0).tolist()
            bar.set_postfix(recon=f"{recon_mean:.2f}", kl=f"{kl_mean:.2f}", refresh=False)
    losses = torch.stack(history).numpy()
    return Run(model.eval(), losses[:, 0], losses[:, 1], 1 / statistics.median(seconds), monitor.summary())


def _textbook_reparam_kl(mu: Tensor, logvar: Tensor, eps: Tensor | None) -> tuple[Tensor, ...]:
    std = torch.exp(0.5 * logvar)
    z = mu + std * (torch.randn_like(std) if eps is None else eps)
    return z, *_textbook_kl(mu, logvar, None)


def _textbook_kl(mu: Tensor, logvar: Tensor, eps: Tensor | None) -> tuple[Tensor, ...]:
    return (-0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / len(mu),)


def _textbook_log_prob(mu: Tensor, logvar: Tensor, eps: Tensor | None) -> tuple[Tensor, ...]:
    elements = (logvar.detach() - mu).pow(2) / logvar.exp() + logvar + math.log(2 * math.pi)
    return (-0.5 * elements.flatten(1).sum(1),)


# op -> (ours, what every tutorial writes), each (mu, logvar, noise or None to draw it) -> outputs.
# The density takes logvar's values as its data, for want of a third tensor.
TIMED: dict[str, tuple[Callable, Callable]] = {
    "reparam_kl": (lambda mu, logvar, eps: reparam_kl(mu, logvar, eps=eps)[:2], _textbook_reparam_kl),
    "gaussian_kl": (lambda mu, logvar, eps: (gaussian_kl(mu, logvar),), _textbook_kl),
    "gaussian_log_prob": (
        lambda mu, logvar, eps: (gaussian_log_prob(logvar.detach(), mu, logvar),),
        _textbook_log_prob,
    ),
}


def benchmark(cases: Sequence[tuple[str, tuple[int, ...]]], rounds: int) -> list[tuple[str, float, float]]:
    """(op and size, eager ms, fused ms) of forward + backward: medians of rounds in which the two take turns.

    A case is timed only after both gave the same values and gradients for the same noise.
    """
    rows = []
    with tqdm(total=len(cases) * rounds, desc=f"{'timing':<16}", unit="round") as bar:
        for name, size in cases:
            ours, textbook = TIMED[name]
            source = torch.Generator().manual_seed(0)
            mu, logvar, gz, eps = (torch.randn(size, generator=source) for _ in range(4))
            mu.requires_grad_()
            logvar.requires_grad_()
            for a, b in zip(_step(ours, mu, logvar, gz, eps), _step(textbook, mu, logvar, gz, eps)):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            begin = time.perf_counter()
            _step(textbook, mu, logvar, gz)
            repeats = max(1, int(0.02 / (time.perf_counter() - begin)))
            times: dict[Callable, list[float]] = {textbook: [], ours: []}
            started = time.perf_counter()
            for done in range(rounds):
                if done >= 3 and time.perf_counter() - started > CASE_SECONDS:
                    bar.update(rounds - done)
                    break
                for op, record in times.items():
                    _step(op, mu, logvar, gz)  # the other's memory leaves the allocator and the caches
                    begin = time.perf_counter()
                    for _ in range(repeats):
                        _step(op, mu, logvar, gz)
                    record.append((time.perf_counter() - begin) / repeats * 1e3)
                bar.update()
            eager_ms, ours_ms = (statistics.median(record) for record in times.values())
            rows.append((f"{name} {'×'.join(map(str, size))}", eager_ms, ours_ms))
    return rows


def _step(
    op: Callable, mu: Tensor, logvar: Tensor, gz: Tensor, eps: Tensor | None = None
) -> tuple[Tensor, ...]:
    """An op's outputs and the gradients of (z gz).sum() plus the sum of its other outputs."""
    outputs = op(mu, logvar, eps)
    grads = [gz if out.shape == gz.shape else torch.ones_like(out) for out in outputs]
    return *outputs, *torch.autograd.grad(outputs, (mu, logvar), grads)


def report(fused_run: Run, ref_run: Run, rows: Sequence[tuple[str, float, float]], kernel: str) -> str:
    """The tables that the demonstration prints."""
    lines = ["", "Training, the same weights, batches and noise (nats per image)",
             f"{'':<36}{'fused':>12}{'reference':>12}{'difference':>13}"]  # fmt: skip
    for label, place in (("first step", slice(1)), ("last epoch", slice(-STEPS, None))):
        for key in ("recon", "kl"):
            a, b = (float(getattr(run, key)[place].mean()) for run in (fused_run, ref_run))
            lines.append(f"{f'{label}, {key}':<36}{a:>12.5f}{b:>12.5f}{a - b:>13.1e}")
    a, b = fused_run.images_per_s, ref_run.images_per_s
    lines.append(f"{'images/s, 1 thread':<36}{a:>12,.0f}{b:>12,.0f}{f'{a / b:.1f}x':>13}")
    lines.append(
        f"{'active units':<36}{fused_run.health['active_units']:>12}{ref_run.health['active_units']:>12}"
    )
    threads = torch.get_num_threads()
    lines += ["", f"Forward + backward, fp32, {threads} threads, kernel: {kernel}",
              f"{'size':<36}{'eager ms':>12}{'fused ms':>12}{'speed-up':>13}"]  # fmt: skip
    lines += [
        f"{size:<36}{eager:>12.3f}{ours:>12.3f}{f'{eager / ours:.1f}x':>13}" for size, eager, ours in rows
    ]
    return "\n".join(lines)


@torch.no_grad()
def draw(out: Path, fused_run: Run, ref_run: Run, plane: MLPVAE, images: Tensor, labels: Tensor, seed: int,
         rows: Sequence[tuple[str, float, float]], kernel: str) -> None:  # fmt: skip
    """Every picture of PICTURES. images [N, 64], labels [N]: all of them, the training images first."""
    found = [torch.nonzero(labels[TRAIN:] == digit).flatten()[:2] for digit in range(10)]
    held_out = images[TRAIN:][torch.stack(found, 1).flatten()]  # two rows of 0 to 9
    decoded = fused_run.model.reconstruct(held_out)
    plots.reconstructions(out / PICTURES[0], "Held-out digits and their reconstructions", _square(held_out),
                          _square(decoded), columns=10)  # fmt: skip
    samples = fused_run.model.sample(60, rng.fold_in(torch.tensor([seed, 0]), 2**62))
    plots.image_grid(out / PICTURES[1], "Samples from the prior, decoded", _square(samples), columns=12)
    mu = plane.encode(images)[0]
    plots.latent_plane(out / PICTURES[2], "Digits in a two-dimensional latent", mu.numpy(), labels.numpy())
    runs = {"fused ops": fused_run, "reference ops": ref_run}
    curves = {name: {"recon": run.recon, "kl": run.kl} for name, run in runs.items()}
    plots.loss_curves(out / PICTURES[3], "Training with fused and with reference ops", curves, STEPS)
    plots.benchmark_bars(out / PICTURES[4], "Fused ops against the textbook formula", rows,
                         ("eager PyTorch, textbook formula", f"vaeops ({kernel})"))  # fmt: skip


def _square(images: Tensor) -> np.ndarray:
    return images.unflatten(1, (8, 8)).numpy()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vaeops.train.demo", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for the pictures (default: demo)"
    )
    parser.add_argument("--epochs", type=int, default=100, help="of each training (default: 100)")
    parser.add_argument("--rounds", type=int, default=7, help="of timing, at most, a case (default: 7)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    squares, labels = digits(args.seed)
    images = squares.flatten(1)
    kernel = {"cpp": "C++"}.get(serving("cpu"), "PyTorch reference: no compiled kernel here")
    cases = CASES if serving("cpu") == "cpp" else CASES[:2]  # the reference draws its noise slowly
    options = {"epochs": args.epochs, "seed": args.seed}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the layers are small: on a busy machine threads would wait for each other
    fused_run = train("fused ops", images[:TRAIN], **options, latent=LATENT, ops="fused")
    ref_run = train("reference ops", images[:TRAIN], **options, latent=LATENT, ops="ref")
    plane = train("2-D latent, fused", images[:TRAIN], **options, latent=2, ops="fused")
    vq_steps = max(workshop_vq.TAIL, VQ_STEPS * args.epochs)
    vq = workshop_vq.train(squares[:TRAIN], **VQ, steps=vq_steps, seed=args.seed, name="codebook, fused")
    table = workshop_vq.codes_by_label(vq.model, squares, labels)
    torch.set_num_threads(threads)
    rows = benchmark(cases, args.rounds)
    print(report(fused_run, ref_run, rows, kernel))
    print("\nOne code an image, all images\n" + workshop_vq.summary(vq, table))
    workshop_vq.draw(args.out, vq.model, table, squares.shape[-1])
    draw(args.out, fused_run, ref_run, plane.model, images, labels, args.seed, rows, kernel)
    print("\nPictures: " + ", ".join(str(args.out / name) for name in PICTURES))


if __name__ == "__main__":
    main()
