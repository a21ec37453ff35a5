"""Reading the weights of a VGG: torchvision's names, or Keras' and NumPy's by block, from a dict or a file.

What comes out is flat: for each convolution weight [K, C, 3, 3] and bias [K], and of nets with batch norm
also its weight, bias, running_mean and running_var, each [K].
"""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ref.perceptual import ARCHS

PARTS = ("weight", "bias")
NORM_PARTS = (*PARTS, "running_mean", "running_var")
NORM_EPS = 1e-5  # torchvision's


def layout(arch: str) -> list[tuple[str, tuple[int, ...]]]:
    """(torchvision's name, shape) of every tensor, without "features."."""
    found, index, channels = [], 0, 3
    batch_norm = arch.endswith("_bn")
    for out in ARCHS[arch.removesuffix("_bn")]:
        if not out:
            index += 1
            continue
        found += [(f"{index}.weight", (out, channels, 3, 3)), (f"{index}.bias", (out,))]
        if batch_norm:
            found += [(f"{index + 1}.{part}", (out,)) for part in NORM_PARTS]
        index += 3 if batch_norm else 2
        channels = out
    return found


def from_state_dict(state_dict: Mapping[str, Tensor], arch: str) -> list[Tensor]:
    """Flat weights from torchvision's names, with or without "features."; everything wrong in one error.

    The classifier's entries and batch norm's counters are of no use here; any other surplus is an error.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"VGGTrunk: state_dict must be a dict of tensors, got {type(state_dict).__name__}")
    found = {}
    for key, value in state_dict.items():
        if not key.startswith("classifier."):
            found[key.removeprefix("features.")] = value
    expected = dict(layout(arch))
    problems = [f"missing {key}" for key in expected if key not in found]
    for key, value in found.items():
        counter = key.removesuffix("num_batches_tracked") + "running_mean"
        if key not in expected and (counter == key or counter not in expected):
            problems.append(f"extra {key}")
        elif key in expected and not isinstance(value, Tensor):
            problems.append(f"{key} is a {type(value).__name__}, not a tensor")
        elif key in expected and tuple(value.shape) != expected[key]:
            problems.append(f"{key} has shape {list(value.shape)} instead of {list(expected[key])}")
        elif key in expected and not value.is_floating_point():
            problems.append(f"{key} is {value.dtype}, not floating point")
    if problems:
        raise ValueError(f"VGGTrunk: weights do not fit {arch}: {'; '.join(problems)}")
    return [found[key] for key in expected]


def from_blocks(arrays: Mapping[str, Any], arch: str, bgr: bool) -> dict[str, Tensor]:
    """Torchvision's names from "conv3_1" names: 4-D kernels [3, 3, C, K], 1-D biases.

    bgr: the net was trained on BGR images; its first convolution is turned, so that it takes RGB.
    """
    places, at = {}, iter(key for key, _ in layout(arch) if key.endswith("weight"))
    block, place = 1, 1
    for out in ARCHS[arch]:
        if out:
            places[block, place] = next(at).removesuffix("weight")
        block, place = (block, place + 1) if out else (block + 1, 1)
    result: dict[str, Tensor] = {}
    for key, array in arrays.items():
        if re.search(r"(^|/)(fc\d|predictions)", key):
            continue
        match = re.search(r"(?:block(\d)_)?conv(\d)(?:_(\d))?", key)
        numbers = [int(n) for n in match.groups() if n] if match else []
        prefix = places.get((numbers[0], numbers[1])) if len(numbers) == 2 else None
        value = torch.from_numpy(array)
        if prefix is None:
            result[key] = value  # the check of names will list it
        elif value.dim() == 4:
            value = value.permute(3, 2, 0, 1)
            result[f"{prefix}weight"] = value.flip(1) if bgr and prefix == "0." else value
        else:
            result[f"{prefix}bias"] = value
    return result


def from_file(path: str | Path, arch: str) -> dict[str, Tensor]:
    """The state_dict in a file, by its suffix; none of them runs code out of the file."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"VGGTrunk: there is no file {path}")
    suffix = path.suffix.lower()
    if suffix in (".pth", ".pt"):
        return torch.load(path, map_location="cpu", weights_only=True)
    if suffix == ".safetensors":
        return _needed("safetensors.torch", path).load_file(path)
    if suffix == ".npz":
        with _needed("numpy", path).load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        if any(key.startswith("conv1_1") for key in arrays):
            return from_blocks(arrays, arch, bgr=False)
        return {key: torch.from_numpy(array) for key, array in arrays.items()}
    if suffix in (".h5", ".hdf5"):
        h5py, arrays = _needed("h5py", path), {}
        with h5py.File(path, "r") as file:
            file.visititems(
                lambda name, item: arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
            )
        return from_blocks(arrays, arch, bgr=True)
    raise ValueError(f"VGGTrunk: path must end in .pth, .pt, .safetensors, .npz or .h5, got {path.name}")


def _needed(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"VGGTrunk: reading {path.name} needs the package {package}: {error}") from error


def download(arch: str) -> Mapping[str, Tensor]:
    """ImageNet weights by torchvision's own table, which checks their hash."""
    try:
        models = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:  # next to another torch it raises RuntimeError
        raise ImportError(
            f"VGGTrunk: download=True goes through torchvision, which does not import here: {error}"
        ) from error
    return models.get_model_weights(arch).DEFAULT.get_state_dict(progress=False, check_hash=True)


def folded(weights: list[Tensor]) -> list[Tensor]:
    """[w0, b0, ...] in fp32 with the batch norm of each convolution (six tensors) in it; made in fp64."""
    result = []
    for at in range(0, len(weights), 6):
        w, b, gamma, beta, mean, var = (t.double() for t in weights[at : at + 6])
        scale = gamma / (var + NORM_EPS).sqrt()
        result += [(w * scale.view(-1, 1, 1, 1)).float(), ((b - mean) * scale + beta).float()]
    return result


def random(arch: str, seed: int) -> list[Tensor]:
    """He normal convolutions with small biases; batch norms off the identity, so that folding shows."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(shape: tuple[int, ...], low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    ranges = {
        "bias": (-0.2, 0.2),
        "weight": (0.7, 1.3),
        "running_mean": (-0.3, 0.3),
        "running_var": (0.6, 1.6),
    }
    weights = []
    for key, shape in layout(arch):
        if len(shape) == 4:
            weights.append(torch.randn(shape, generator=generator) * (2 / (9 * shape[1])) ** 0.5)
        else:
            weights.append(uniform(shape, *ranges[key.partition(".")[2]]))
    return weights
