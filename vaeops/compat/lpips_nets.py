"""The networks of the lpips package other than a frozen VGG, in PyTorch's own layers: AlexNet, SqueezeNet, a
VGG16 that learns. Module names are the package's, so its state_dicts load; files are torchvision's."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..ref.perceptual import ARCHS

# A slice ends before each of these indices of torchvision's `features`; its output is a map that counts.
CUTS = {
    "vgg": (4, 9, 16, 23, 30),
    "alex": (2, 5, 8, 10, 12),
    "squeeze": (2, 5, 8, 10, 11, 12, 13),
}
CHANNELS = {
    "vgg": (64, 128, 256, 512, 512),
    "alex": (64, 192, 384, 256, 256),
    "squeeze": (64, 128, 256, 384, 384, 512, 512),
}


class Fire(nn.Module):
    """SqueezeNet's block: few channels by 1x1, then as many by 1x1 as by 3x3, side by side."""

    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], 1).relu()


def _vgg() -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 3
    for out in ARCHS["vgg16"]:
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()] if out else [nn.MaxPool2d(2)]
        channels = out or channels
    return layers


def _alex() -> list[nn.Module]:
    return [
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    ]  # fmt: skip


def _squeeze() -> list[nn.Module]:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    return [
        nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(),
        pool(), Fire(64, 16, 64), Fire(128, 16, 64),
        pool(), Fire(128, 32, 128), Fire(256, 32, 128),
        pool(), Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256),
    ]  # fmt: skip


class Slices(nn.Module):
    """A net cut at the maps that LPIPS compares: x -> [maps].

    State: `slice1.0.weight`, ... : the slice, then the index of torchvision's `features`.
    """

    def __init__(self, net: str) -> None:
        super().__init__()
        self.net = net
        layers, first = {"vgg": _vgg, "alex": _alex, "squeeze": _squeeze}[net](), 0
        for number, end in enumerate(CUTS[net], 1):
            part = nn.Sequential()
            for index in range(first, end):
                part.add_module(str(index), layers[index])
            self.add_module(f"slice{number}", part)
            first = end

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for part in self.children():
            x = part(x)
            maps.append(x)
        return maps

    def load_features(self, weights: Mapping[str, Tensor]) -> None:
        """From torchvision's state_dict of the whole net, less its classifier; anything else must fit."""
        given = {k: v for k, v in weights.items() if not k.startswith("classifier.")}
        names = {f"features.{name.partition('.')[2]}": name for name in self.state_dict()}
        missing, extra = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
        if missing or extra:
            missing_extra = f"missing {missing or 'none'}, unknown {extra or 'none'}"
            raise ValueError(f"LPIPS: not the weights of net {self.net!r}: {missing_extra}")
        self.load_state_dict({names[k]: v for k, v in given.items()})
