"""The codes of a trained VQ-VAE as a data set: what a prior over them learns."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import encode_dataset
from ..checkpoint import load_model
from .dataset import Dataset, scale, side

_BATCH = 256


def codes(run: Path, split: str, cache: Path | None, read: Callable[..., Dataset]) -> Dataset:
    """The codes of the images that a VQ-VAE was trained on, int32 [N, T], as `encode_dataset` orders them.

    The split is one of that training's data set, by that training's seed; labels are its labels. Every call
    encodes anew, on the CPU, by the averaged weights where there are any. extra: "codes", K, and "source",
    the checksum of those weights.

    Args:
        run: the folder of the training, or a checkpoint of it.
        cache: of decoded images; None: the training's.
        read: `vaeops.train.data.load`.
    """
    model, config = load_vq(run)
    if not config:
        raise ValueError(f"codes: {run} does not say what it was trained on: give the folder of its run")
    name = config["data"]
    images = read(name, config["root"], split=split, size=side(name, model.input_shape, config["size"]),
                  seed=config["split_seed"], cache=cache or config["cache"])  # fmt: skip

    def batches() -> Iterator[Tensor]:
        with tqdm(total=len(images), desc=f"encoding {images.name}", unit="img", unit_scale=True) as bar:
            for rows in torch.arange(len(images)).split(_BATCH):
                x = scale(images.batch(rows)[0], images.peak, model.input_range)
                yield x.reshape(-1, *model.input_shape)
                bar.update(len(rows))

    x = encode_dataset(model, batches()).int().numpy()
    return Dataset("codes", x, images.labels, peak=0, label_names=images.label_names,
                   extra={"codes": model.codes, "source": checksum(model)})  # fmt: skip


def load_vq(path: Path) -> tuple[Any, dict[str, Any]]:
    """A model with codes, in eval mode, and its training's settings: as `load_model`."""
    model, config, _ = load_model(path)
    if not hasattr(model, "grids"):
        raise ValueError(f"codes: {path} holds no VQ-VAE but a {type(model).__name__}")
    return model, config


def checksum(model: Any) -> str:
    """SHA-256 of a model's state: equal weights give an image equal codes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_codes(model: Any, codes: int, source: str | None, whose: str) -> None:
    """A model of codes must know as many, of the same VQ-VAE, as its data or what decodes its samples.

    A source that either of them does not know is not compared.
    """
    known = getattr(model, "codes", None)
    if known != codes:
        raise ValueError(f"{type(model).__name__} has {known or 'no'} codes, {whose} has {codes}")
    learned = getattr(model, "source", None)
    if learned is not None and source is not None and learned != source:
        raise ValueError(f"{type(model).__name__} learned the codes of a VQ-VAE with other weights (sha256 "
                         f"{learned[:12]}) than {whose} has ({source[:12]}): if it was trained further, give "
                         "its checkpoint of then in place of its run")  # fmt: skip
