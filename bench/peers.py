"""torchvision and the lpips package as rivals: `peers.torchvision()`, `peers.lpips()`; or NotInstalled.

A CUDA build of torchvision next to a CPU torch cannot load its operators, and then its import fails because
two of them have no schema. Defining the schemas first mends that; the networks need none of the operators.
`make` keeps torchvision in a folder of its own, so that nothing else stumbles over it.
"""

import functools
import importlib
import importlib.util
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn


class NotInstalled(ImportError):
    """The peer is not there at all: one that is there and does not import raises an error of its own."""


@functools.cache
def torchvision():
    folder = Path(sys.prefix) / "peers"
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise NotInstalled("torchvision is not installed")
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        for op in ("nms", "qnms"):
            _schemas().define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")


@functools.cache
def _schemas() -> torch.library.Library:
    """Kept: what a library defined goes away with it."""
    return torch.library.Library("torchvision", "FRAGMENT")


@functools.cache
def lpips():
    torchvision()
    if importlib.util.find_spec("lpips") is None:
        raise NotInstalled("lpips is not installed")
    return importlib.import_module("lpips")


def lpips_module(**options) -> nn.Module:
    """`lpips.LPIPS` with a random trunk, from torch's generator; VGG without its huge classifier."""
    package, models = lpips(), torchvision().models
    features = SimpleNamespace(vgg16=_vgg16, alexnet=models.alexnet, squeezenet1_1=models.squeezenet1_1)
    with warnings.catch_warnings(), mock.patch.object(package.pretrained_networks, "tv", features):
        warnings.simplefilter("ignore")  # of torchvision, about arguments that the package uses
        return package.LPIPS(pnet_rand=True, verbose=False, **options)


def _vgg16(pretrained: bool) -> SimpleNamespace:
    vgg = torchvision().models.vgg
    features = vgg.make_layers(vgg.cfgs["D"])
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.uniform_(layer.bias, -0.2, 0.2)
    return SimpleNamespace(features=features)
