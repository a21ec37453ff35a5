"""The reference models by name, with the sizes of the lessons and papers that they come from.

model = create("vae-mlp", latent=10);  save(model, "digits.safetensors");  load("digits.safetensors")
"""

import inspect
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._files import atomic
from .._names import unknown
from .ae import ConvAutoencoder, DenoisingAutoencoder, MLPAutoencoder, SparseAutoencoder
from .conv import CelebAVAE, CelebAVAEXL, ConvVAE, ConvVAESmall
from .diffusion import TinyDDPM
from .prior import CodePrior
from .recommend import MultVAE
from .vae import MLPVAE, WorkshopVAE
from .vq import MLPVQVAE, VQVAE, VQVAE2

PRESETS: dict[str, partial[Any]] = {
    "tiny-2d": partial(
        MLPVAE, in_dim=2, hidden=(16,), latent=2, input_range=None, recon="mse", reduction="mean", beta=0.05
    ),
    "ae-mlp": partial(MLPAutoencoder, in_dim=784, hidden=(256, 128, 64), latent=32),
    "ae-conv": partial(ConvAutoencoder),
    "ae-denoise": partial(DenoisingAutoencoder, in_dim=784, hidden=(256, 128), latent=64, noise=0.5),
    "ae-sparse": partial(SparseAutoencoder, in_dim=784, hidden=(256, 128), latent=64),
    "vae-mlp": partial(MLPVAE, in_dim=784, hidden=(256, 256), latent=20),
    "vae-mlp-10": partial(MLPVAE, in_dim=784, hidden=(256, 256), latent=10, beta=4.0),
    "vae-mlp-50": partial(MLPVAE, in_dim=784, hidden=(512, 256), latent=50, recon="mse"),
    "vae-conv": partial(ConvVAE),
    "vae-conv-small": partial(ConvVAESmall),
    "cvae": partial(MLPVAE, in_dim=784, hidden=(256, 256), latent=20, classes=10),
    "workshop-ae": partial(MLPAutoencoder, in_dim=784, hidden=(512,), latent=20, init="he"),
    "workshop-vae": partial(WorkshopVAE),
    "workshop-vq": partial(MLPVQVAE, in_dim=784, hidden=(512,), dim=256, codes=32),
    "celeba-vae": partial(CelebAVAE),
    "celeba-vae-xl": partial(CelebAVAEXL),
    "vq-vae": partial(VQVAE),
    "vq-vae-2": partial(VQVAE2),
    "code-prior": partial(CodePrior),
    "mult-vae": partial(MultVAE, items=1682),
    "ddpm-tiny": partial(TinyDDPM),
}


def presets() -> tuple[str, ...]:
    """The names that `create` takes."""
    return tuple(PRESETS)


def create(preset: str, **overrides: Any) -> nn.Module:
    """The model of a preset, some of its constructor's arguments replaced: create("cvae", latent=2).

    It remembers both as `model.preset` and `model.overrides`.

    Raises:
        ValueError: preset or an override unknown, with the nearest names; or as the model raises.
    """
    if preset not in PRESETS:
        raise ValueError("create: " + unknown("preset", preset, PRESETS))
    takes = inspect.signature(PRESETS[preset]).parameters
    for name in overrides:
        if name not in takes:
            raise ValueError(unknown(f"create: {preset}'s argument", name, takes))
    model = PRESETS[preset](**overrides)
    model.preset, model.overrides = preset, dict(overrides)
    return model


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a model that `create` made: its state in safetensors, with the preset and the overrides.

    The file appears whole or not at all, and an older one of its name stays until then. A module among the
    overrides (a VGGTrunk) is not written; give it to `load` again. Of a model that `fully_shard` divided
    every process must call it; the first one writes.

    Raises:
        ValueError: model did not come from `create`. TypeError: an override is no plain value.
    """
    from safetensors.torch import save as serialize

    from .. import __version__

    preset, overrides = getattr(model, "preset", None), getattr(model, "overrides", {})
    if preset is None:
        raise ValueError(
            f"save: model must come from create(), got a {type(model).__name__} without a preset"
        )
    plain = {name: value for name, value in overrides.items() if not isinstance(value, nn.Module)}
    try:
        metadata = {"vaeops": __version__, "preset": preset, "overrides": json.dumps(plain)}
    except TypeError as error:
        raise TypeError(f"save: overrides must be plain values, got {plain}: {error}") from error
    parts = model.state_dict()
    shards = any(hasattr(v, "full_tensor") for v in parts.values())
    whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in parts.items()}
    if shards and torch.distributed.get_rank():
        return
    # Copies: tensors that share memory are refused, and so are those of another memory format.
    state = {k: v.detach().cpu().contiguous().clone() for k, v in whole.items()}
    with atomic(Path(path)) as file:
        file.write(serialize(state, metadata))


def load(path: str | os.PathLike, **overrides: Any) -> nn.Module:
    """The model in a file of `save`, on the CPU and in eval.

    Args:
        overrides: beside those in the file and before them: ops="ref", trunk=VGGTrunk(...).

    Raises:
        FileNotFoundError; ValueError: the file is damaged, was not written by `save`, or does not fit its
        model: naming the path and what is wrong.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(f"load: {path} is no safetensors file, or is damaged: {error}") from error
    if not {"preset", "overrides"} <= metadata.keys():
        raise ValueError(f"load: {path} was not written by save(): its metadata name no preset")
    try:
        model = create(metadata["preset"], **(json.loads(metadata["overrides"]) | overrides))
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"load: {path} does not fit the preset {metadata['preset']!r}: {error}") from error
    return model.eval()
