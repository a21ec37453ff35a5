"""What a picture is made of: trained models by their paths, images, codes, some samples of a data set."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import latent
from . import evaluate, log, machine
from .checkpoint import load_model
from .data import Dataset


class Run:
    """A trained model by its path: a run's folder, a checkpoint or a .safetensors file.

    name: the folder's or the file's. log: the file of the training's log, or None. The model is read when
    it is asked for.

    Args:
        device: of the model; None: CUDA where there is a GPU.
    """

    def __init__(self, path: Path, device: str | torch.device | None = None) -> None:
        self.path, self.device = path, device or machine.device(None)
        folder = next((p for p in (path, *path.parents[:2]) if (p / log.FILE).exists()), None)
        self.log = None if folder is None else folder / log.FILE
        self.name = (folder or path).resolve().name.removesuffix(".safetensors").removesuffix(".pt")

    @cached_property
    def loaded(self) -> tuple[Any, dict[str, Any], str]:
        model, config, words = load_model(self.path)
        return model.to(self.device), config, words

    @property
    def model(self) -> Any:
        return self.loaded[0]

    @property
    def config(self) -> dict[str, Any]:
        """The training's settings; of a saved model none are known."""
        return self.loaded[1]

    def __str__(self) -> str:
        return f"{self.name} ({self.model.preset})"

    def inputs(self, data: Dataset) -> tuple[Tensor, Tensor | None]:
        """(x as the model takes it, labels if it takes any) of a small data set."""
        [(_, x, label)] = evaluate.batches(self.model, data, len(data), self.device, "images")
        return x, label

    def codes(self, x: Tensor) -> Tensor:
        """The codes [N, D] of samples in the model's range."""
        return latent.encode(self.model, Dataset("samples", x, peak=0), device=self.device)

    def decoded(self, z: Tensor) -> np.ndarray:
        """The images of codes [*B, D], as `images` gives them: [*B, ...]."""
        images = self.images(latent.decode(self.model, z.flatten(0, -2).to(self.device)))
        return images.reshape(*z.shape[:-1], *images.shape[1:])

    def images(self, x: Tensor) -> np.ndarray:
        """Samples [N, ...] in the model's range as `plots` takes them: [N, H, W] or [N, H, W, 3]."""
        found = evaluate.as_images(x, self.model.input_range)
        return (found[:, 0] if found.shape[1] == 1 else found.permute(0, 2, 3, 1)).cpu().numpy()


def distinct(runs: Sequence[Run]) -> None:
    """Name runs that have a name in common by their paths."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.path)
    if len({run.name for run in runs}) < len(runs):
        raise ValueError(f"a RUN is given twice: {' '.join(run.name for run in runs)}")


def rows(data: Dataset, chosen: np.ndarray) -> Dataset:
    """A data set of some of its rows."""
    labels = None if data.labels is None else np.asarray(data.labels)[chosen]
    attributes = None if data.attributes is None else data.attributes[chosen]
    return replace(data, x=np.asarray(data.x)[chosen], labels=labels, attributes=attributes)


def at_most(data: Dataset, n: int) -> Dataset:
    """n samples at equal distances, or all of them."""
    return data if len(data) <= n else rows(data, np.linspace(0, len(data) - 1, n).astype(int))


def varied(data: Dataset, n: int) -> Dataset:
    """The first n samples, with the labels in turn where there are any."""
    if data.labels is None:
        return rows(data, np.arange(min(n, len(data))))
    labels = np.asarray(data.labels)
    turn = np.zeros(len(labels), int)
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    return rows(data, np.lexsort((labels, turn))[:n])
