"""`vaeops eval` and `vaeops sample`: the figures of a trained model on a data set, and what it draws.

Which figures there are follows from what the model can do: every loss of its `terms`; errors of what it
reconstructs; the latent's health where `encode` gives (mu, logvar); the codes' use where it gives integers;
the likelihood by importance sampling where it has `log_weights`; rankings where the data set holds items out;
the Frechet distance where it samples and a network for the features is given.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import perplexity, rng
from .._files import atomic
from ..models.prior import decode_codes
from ..nn import PosteriorMonitor
from . import data as datasets, machine, metrics
from .checkpoint import load_model
from .data import DECODED, Dataset
from .data.codes import check_codes, checksum, load_vq

Model = Any  # an nn.Module with the protocol of vaeops.models, or with the part of it that its kind has
Found = defaultdict[str, list[Tensor]]  # by name, a value for each sample
RANKS = (20, 50, 100)
NLL_ROWS = 1024  # posterior samples that are decoded at once
CACHED = {*DECODED, "codes"}  # data sets that may have a cache of decoded images
SAMPLE_BATCH = 256  # fixed, so that a seed's samples do not depend on how many are asked for

# What a figure is: of each, the beginning of its name.
MEANING = {
    "loss_": "term of the loss, the mean of a batch",
    "mse": "squared error of an element, as a share of the range",
    "psnr": "peak signal-to-noise ratio, dB, mean of an image",
    "ssim": "structural similarity, mean of an image",
    "kl_dim": "KL of the latent dimensions, nats: the 20 largest; all by --json",
    "active_units": "latent dimensions whose posterior mean varies by more than 0.01",
    "mean_abs_mu": "|mean of mu|, mean of a latent dimension",
    "mean_logvar": "log-variance of the posterior, mean of a latent dimension",
    "iwae_nll": "-log p(x) in nats, an upper bound by importance sampling",
    "perplexity": "of the codes' use over the whole split",
    "codes_used": "codes in use",
    "recall": "of the held-out items, in the first k (at most k of them count)",
    "ndcg": "discounted gain of the first k",
    "popularity": "the same with the items in order of popularity",
    "auroc": "of the reconstruction error: outliers against this data set",
    "frechet": "distance between the features of samples and those of data",
}


def batches(model: Model, data: Dataset, batch: int, device: torch.device | str,
            what: str) -> Iterator[tuple[int, Tensor, Tensor | None]]:  # fmt: skip
    """(row of the first sample, x as the model takes it, labels if it takes any) of every batch, in order."""
    if math.prod(data.x.shape[1:]) != math.prod(model.input_shape):
        raise ValueError(f"the model takes samples of {tuple(model.input_shape)}, those of {data.name} are "
                         f"{tuple(data.x.shape[1:])}")  # fmt: skip
    if "codes" in data.extra:
        check_codes(model, data.extra["codes"], data.extra.get("source"), "the data set")
    with tqdm(total=len(data), desc=f"{what:<16}", unit="sample", unit_scale=True, disable=None) as bar:
        for row in range(0, len(data), batch):
            x, label = data.batch(torch.arange(row, min(row + batch, len(data))), device)
            x = datasets.scale(x, data.peak, model.input_range).reshape(len(x), *model.input_shape)
            yield row, x, label if model.classes else None
            bar.update(len(x))


@torch.no_grad()
def evaluate(model: Model, data: Dataset, *, popularity: Tensor | None = None, nll_samples: int = 0,
             batch: int = 256, seed: int = 0,
             device: torch.device | str = "cpu") -> dict[str, Any]:  # fmt: skip
    """The figures of a model on the whole of a data set.

    Args:
        model: in eval mode, on the device.
        popularity: [items], how often each was taken in training: the baseline of a ranking.
        nll_samples: K of the importance-weighted likelihood; 0 leaves it out.
        batch: samples at once. No figure but the likelihood, through its noise, depends on it.
        seed: of the noise.

    Returns:
        By the names of `MEANING`: floats and counts, of levels of codes with the level after the name, of
        rankings with @k; and kl_dim, the KL of each latent dimension in nats, a list.
    """
    if nll_samples and not hasattr(model, "log_weights"):
        raise ValueError(
            f"{type(model).__name__} has no likelihood: nll_samples must be 0, got {nll_samples}"
        )
    noise = torch.tensor([seed, 0], device=device)
    found: Found = defaultdict(list)
    monitor: PosteriorMonitor | None = None
    uses: dict[str, Tensor] = {}
    held_out = data.extra.get("held_out")
    for row, x, label in batches(model, data, batch, device, "eval"):
        losses = model.terms(x, label, seed=noise, row=row).losses
        for name, loss in losses.items():
            found[f"loss_{name}"].append(loss.sum().expand(len(x)))
        codes = _encode(model, x, label)
        if len(codes) == 2 and codes[0].is_floating_point():
            mu, logvar = codes
            monitor = monitor or PosteriorMonitor(tuple(mu.shape[1:])).to(device)
            monitor.update(mu, losses["kl"].reshape(mu.shape[1:]))
            found["mean_logvar"].append(logvar.flatten(1).mean(1))
        elif codes and not codes[0].is_floating_point():
            for level, code in zip(("",) if len(codes) == 1 else ("_top", "_bottom"), codes):
                uses[level] = uses.get(level, 0) + torch.bincount(code.flatten(), minlength=model.codes)
        if held_out is not None:
            held = torch.as_tensor(held_out[row : row + len(x)], device=device)
            _rank(found, "", model.reconstruct(x), x, held)
            if popularity is not None:
                _rank(found, "popularity_", popularity.to(device).expand_as(x).float(), x, held)
        elif hasattr(model, "reconstruct"):
            _compare(found, model.reconstruct(x, label), x, model.input_range, tuple(data.x.shape[1:]))
        if nll_samples:
            found["iwae_nll"].append(_nll(model, x, label, nll_samples, rng.fold_in(noise, row)))
    result: dict[str, Any] = {name: float(torch.cat(v).cpu().double().mean()) for name, v in found.items()}
    if monitor is not None:
        result["active_units"] = int(monitor.active_units())
        result["mean_abs_mu"] = float(monitor.mean.abs().mean())
        result["kl_dim"] = monitor.kl.flatten().tolist()
    for level, counts in uses.items():
        result[f"perplexity{level}"] = float(perplexity(counts))
        result[f"codes_used{level}"] = int((counts > 0).sum())
    return result


def _encode(model: Model, x: Tensor, label: Tensor | None) -> tuple[Tensor, ...]:
    """What the model calls its code, as a tuple; () of a model without one."""
    if not hasattr(model, "encode"):
        return ()
    code = model.encode(x) if label is None else model.encode(x, label)
    return code if isinstance(code, tuple) else (code,)


def _error(recon: Tensor, x: Tensor, input_range: tuple[float, float] | None) -> Tensor:
    """[B]: the mean squared error of a sample's elements, as a share of the range."""
    low, high = input_range or (0.0, 1.0)
    return ((recon - x) / (high - low)).square().flatten(1).mean(1)


def _compare(found: Found, recon: Tensor, x: Tensor, input_range: tuple[float, float] | None,
             shape: tuple[int, ...]) -> None:  # fmt: skip
    """shape: of a sample as it is stored; a model may take an image as a row."""
    found["mse"].append(_error(recon, x, input_range))
    if input_range is not None and len(shape) == 3:
        recon, x = recon.reshape(-1, *shape), x.reshape(-1, *shape)
        found["psnr"].append(metrics.psnr(recon, x, input_range))
        if min(shape[1:]) >= metrics.SSIM_WINDOW:
            found["ssim"].append(metrics.ssim(recon, x, input_range))


def _rank(found: Found, prefix: str, scores: Tensor, seen: Tensor, held_out: Tensor) -> None:
    """Users with nothing held out do not count."""
    some = held_out.sum(1) > 0
    for k in RANKS:
        recall, ndcg = metrics.ranking(scores[some], seen[some], held_out[some], k)
        found[f"{prefix}recall@{k}"].append(recall)
        found[f"{prefix}ndcg@{k}"].append(ndcg)


def _nll(model: Model, x: Tensor, label: Tensor | None, samples: int, seed: Tensor) -> Tensor:
    at_once = max(1, NLL_ROWS // len(x))
    drawn = [
        model.log_weights(x, min(at_once, samples - done), rng.fold_in(seed, done), label)
        for done in range(0, samples, at_once)
    ]
    return metrics.iwae_nll(torch.cat(drawn))


@torch.no_grad()
def errors(model: Model, data: Dataset, *, batch: int = 256,
           device: torch.device | str = "cpu") -> np.ndarray:  # fmt: skip
    """[N]: each sample's squared error of reconstruction, mean of an element as a share of the range."""
    if not hasattr(model, "reconstruct"):
        raise ValueError(f"{type(model).__name__} does not reconstruct")
    found = [
        _error(model.reconstruct(x, label), x, model.input_range).cpu()
        for _, x, label in batches(model, data, batch, device, data.name)
    ]
    return torch.cat(found).numpy()


@torch.no_grad()
def draw(model: Model, n: int, *, seed: int = 0, label: int | None = None,
         device: torch.device | str = "cpu") -> Tensor:  # fmt: skip
    """n samples of a model, [n, ...] as its `sample` gives them, on the CPU.

    The first m of n are those that a call for m draws, up to rounding.

    Args:
        label: that all samples of a model with classes have; None: 0, 1, ... in turn.

    Raises:
        ValueError: the model does not sample, or has no such label; n is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not hasattr(model, "sample"):
        raise ValueError(f"{type(model).__name__} does not sample")
    if label is not None and not 0 <= label < model.classes:
        has = f"labels 0 to {model.classes - 1}" if model.classes else "no labels"
        raise ValueError(f"label must be one of the model's, which has {has}, got {label}")
    noise = torch.tensor([seed, 0], device=device)
    found = []
    for row in range(0, n, SAMPLE_BATCH):
        labels = None
        rows = torch.arange(row, min(row + SAMPLE_BATCH, n), device=device)
        if model.classes:
            labels = rows % model.classes if label is None else torch.full_like(rows, label)
        found.append(model.sample(len(rows), rng.fold_in(noise, row), labels).cpu())
    return torch.cat(found)


def as_images(x: Tensor, input_range: tuple[float, float] | None) -> Tensor:
    """x [N, ...] in input_range -> [N, C, H, W] in [0, 1]. A row of H H elements is a grey image.

    Raises:
        ValueError: these are no images.
    """
    side = math.isqrt(math.prod(x.shape[1:]))
    if x.dim() == 2 and side * side == x.shape[1]:
        x = x.unflatten(1, (1, side, side))
    if input_range is None or x.dim() != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"samples of shape {list(x.shape[1:])} are no images")
    low, high = input_range
    return ((x - low) / (high - low)).clamp(0, 1)


def check_decoded(x: Tensor, whose: str) -> None:
    """What is drawn as a picture may not be codes."""
    if not x.is_floating_point():
        raise ValueError(f"samples of {whose} are codes: give the --decoder of them")


def grid(images: Tensor) -> np.ndarray:
    """images [N, C, H, W] in [0, 1] -> one uint8 picture [H', W', C], row by row, white between them.

    Every pixel is one of the images', which a plot's are not.
    """
    from . import plots

    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return plots.tiled(pixels, math.ceil(math.sqrt(len(pixels))), gap=1, blank=255)


def table(result: dict[str, Any]) -> str:
    """The figures, a line each with what it is."""
    lines = []
    for name, value in result.items():
        meaning = next(text for start, text in MEANING.items() if name.startswith(start))
        many = sorted(value, reverse=True)[:20] if isinstance(value, list) else []
        shown = "" if many else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
        lines.append(f"{name:<22}{shown:>12}  {meaning}")
        lines += [" " * 4 + " ".join(f"{v:8.4f}" for v in many[i : i + 10]) for i in range(0, len(many), 10)]
    return "\n".join(lines)


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"vaeops {command}", description=description)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, a run's folder, or a .safetensors model")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--device", type=device, default=machine.device(None),
                        help="of the model (default: CUDA where there is a GPU)")  # fmt: skip
    return parser


def device(text: str) -> torch.device:
    try:
        return machine.device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: Sequence[str]) -> int:
    """`vaeops eval`."""
    parser = _parser("eval", "The figures of a trained model on a data set.")
    parser.add_argument("--data", help="data set (default: the training's)")
    parser.add_argument("--root", help="folder of the data sets (default: the training's)")
    parser.add_argument("--cache", help="folder of decoded images (default: the training's)")
    parser.add_argument("--split", default="test", help="train, valid, test or train+valid (default: test)")
    parser.add_argument("--batch", type=positive, default=256, help="samples at once (default: 256)")
    parser.add_argument("--nll-samples", type=positive, default=0, metavar="K",
                        help="also -log p(x), by K draws of each posterior")  # fmt: skip
    parser.add_argument("--outliers", metavar="NAME",
                        help="also how well the reconstruction error tells this data set apart")  # fmt: skip
    parser.add_argument("--extractor", type=Path, metavar="FILE.pt2",
                        help="also the Frechet distance, by this program of torch.export, which makes "
                             "features [B, D] of images [B, C, H, W] in [0, 1]")  # fmt: skip
    parser.add_argument("--features", type=Path, metavar="FILE",
                        help="its features of the data, .npy [N, D] or .npz with mu and sigma "
                             "(default: made of the split)")  # fmt: skip
    parser.add_argument("--samples", type=positive, metavar="N",
                        help="how many to draw for it (default: as many as the split has)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON; what is not finite is null")
    args = parser.parse_args(argv)
    if args.extractor is None and (args.features or args.samples):
        parser.error("--features and --samples are of the Frechet distance, which needs --extractor")
    model, config, loaded = load_model(args.checkpoint)
    name = args.data or config.get("data")
    if name is None:
        parser.error(f"{args.checkpoint} does not say what it was trained on: give --data")
    if args.cache and not {name, args.outliers} & CACHED:
        parser.error(f"--cache is of {', '.join(sorted(CACHED))}; {name} has none")

    def read(name: str, split: str) -> Dataset:
        cache = args.cache if name in CACHED else None
        return read_split(name, split, model, config, root=args.root, cache=cache)

    data = read(name, args.split)
    popularity = None
    if "held_out" in data.extra:
        popularity = torch.as_tensor(read(name, "train").x).sum(0)
    model = model.to(args.device)
    options = {"batch": args.batch, "device": args.device}
    asked = {}  # first, since what was asked for and does not apply raises
    if args.outliers:
        others = read(args.outliers, args.split)
        asked["auroc"] = metrics.auroc(errors(model, data, **options), errors(model, others, **options))
    if args.extractor:
        asked["frechet"] = _frechet(model, data, args)
    result = asked | evaluate(model, data, popularity=popularity, nll_samples=args.nll_samples,
                              seed=args.seed, **options)  # fmt: skip
    header = {"model": model.preset, "loaded": loaded, "data": name, "split": args.split,
              "samples": len(data)}  # fmt: skip
    if args.json:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}
        print(json.dumps(header | finite))
    else:
        print(f"{header['model']}, {loaded}; {name}, {args.split}, {len(data):,} samples\n{table(result)}")
    return 0


def read_split(name: str, split: str, model: Model, config: dict[str, Any], *, root: str | None = None,
               cache: str | None = None) -> Dataset:  # fmt: skip
    """A split as the training had it: by its seed and, of data sets that are resized, in the model's size.

    root, cache: where it is and where its decoded images are, if not where the training found them.
    """
    size = datasets.side(name, model.input_shape, config.get("size") if name in DECODED else None)
    if name in CACHED:
        cache = cache or config.get("cache")
    return datasets.load(name, root or config.get("root"), split=split, size=size,
                         seed=config.get("split_seed", 0), cache=cache)  # fmt: skip


def _frechet(model: Model, data: Dataset, args: argparse.Namespace) -> float:
    try:
        extract = torch.export.load(args.extractor).module().to(args.device)
    except OSError:
        raise
    except Exception as error:  # another file fails in many ways
        raise ValueError(f"--extractor: {args.extractor} is no program of torch.export: {error}") from error

    @torch.no_grad()
    def moments(batches: Iterable[Tensor]) -> metrics.Moments:
        images = (as_images(x.to(args.device), model.input_range) for x in batches)
        return metrics.moments(torch.cat([extract(x).cpu() for x in images]).numpy())

    drawn = moments(
        draw(model, args.samples or len(data), seed=args.seed, device=args.device).split(args.batch)
    )
    if args.features:
        return metrics.frechet(drawn, metrics.load_moments(args.features))
    return metrics.frechet(
        drawn, moments(x for _, x, _ in batches(model, data, args.batch, args.device, "features"))
    )


def sample_main(argv: Sequence[str]) -> int:
    """`vaeops sample`."""
    parser = _parser("sample", "Samples of a trained model, as a picture, and as an array on request.")
    parser.add_argument("--n", type=positive, default=64, help="how many (default: 64)")
    parser.add_argument("--label", type=int, help="of a model with classes (default: all, in turn)")
    parser.add_argument("--decoder", type=Path, metavar="CHECKPOINT",
                        help="the VQ-VAE, or its run, that makes images of a code-prior's codes")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE.png",
                        help="a picture of all (default: samples.png, or none with --npy alone)")  # fmt: skip
    parser.add_argument("--npy", type=Path, metavar="FILE.npy", help="an array of all, in the model's range")
    args = parser.parse_args(argv)
    if not args.npy and not args.out:
        args.out = Path("samples.png")
    if args.out:
        from . import plots

        plots.check_path(args.out, ("png",))
    model, _, loaded = load_model(args.checkpoint)
    if args.decoder:
        decoder, _ = load_vq(args.decoder)
        check_codes(model, decoder.codes, checksum(decoder), f"the model of {args.decoder}")
    x = draw(model.to(args.device), args.n, seed=args.seed, label=args.label, device=args.device)
    if args.decoder:
        x = torch.cat([decode_codes(decoder, codes) for codes in x.split(SAMPLE_BATCH)])
        input_range = decoder.input_range
    else:
        input_range = model.input_range
    if args.out:
        check_decoded(x, model.preset)
        picture = grid(as_images(x, input_range))
    if args.npy:
        with atomic(args.npy) as file:
            np.save(file, x.numpy())
    if args.out:
        from PIL import Image

        with atomic(args.out) as file:
            Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture).save(file, "PNG")
    files = " and ".join(str(path) for path in (args.out, args.npy) if path)
    print(f"{model.preset}, {loaded}: {args.n:,} samples in {files}")
    return 0
