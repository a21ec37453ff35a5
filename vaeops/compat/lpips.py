"""`lpips.LPIPS` of the lpips package 0.1.4, over the fused perceptual loss."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import vgg_weights
from ..nn.perceptual import LPIPS_TAPS, VERSIONS, layer_distances, read_linear
from ..nn.vgg import VGGTrunk
from ..ops.perceptual import perceptual_loss
from .lpips_nets import CHANNELS, Slices

NETS = {"vgg": "vgg", "vgg16": "vgg", "alex": "alex", "squeeze": "squeeze"}
# torchvision's files, where torch.hub keeps them.
FILES = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
# Of an image in [-1, 1]; ImageNet's mean and standard deviation in those units.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Linear(nn.Module):
    """A weight for each channel, behind a dropout: [B, K, h, w] -> [B, 1, h, w]."""

    def __init__(self, channels: int, dropout: bool) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Dropout() if dropout else nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False)
        )

    @property
    def weight(self) -> Tensor:
        return self.model.get_parameter("1.weight")

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class LPIPS(nn.Module):
    """Learned perceptual similarity, with the package's arguments, values and state_dict.

        loss = LPIPS(net="vgg", trunk_path="vgg16.pth");  d = loss(x, target)         # images in [-1, 1]

    Args:
        pretrained: the linear layers as fitted to human judgements; otherwise random.
        net: "vgg" (or "vgg16") | "alex" | "squeeze". A frozen VGG runs on the fused kernels; the others, and
            a net that learns, on PyTorch's layers.
        version: of the linear layers: "0.1", or "0.0", which was fitted without normalizing the image.
        lpips: False: without linear layers; each channel counts 1.
        spatial: a map [B, 1, H, W] instead of its mean.
        pnet_rand: a random net. pnet_tune: one that learns.
        use_dropout: in front of the linear layers, while they learn.
        model_path: the linear layers' file; None: the installed lpips package's (which is not imported).
        eval_mode: True: the linear layers are constants and there is never a dropout. False: they learn.
        verbose: say what is set up.
        trunk: the net's weights: a VGGTrunk of "vgg16" with input_range=(-1, 1) and normalize="imagenet"
            (None for version "0.0"), or a state_dict of torchvision's net.
        trunk_path: a file of it. Without both, and without pnet_rand, the file that torchvision downloads is
            looked for where torch.hub keeps it. Nothing is downloaded.
        impl: as in `vaeops.perceptual_loss`.

    Returns:
        forward(in0, in1, retPerLayer=False, normalize=False): [B, 1, 1, 1], or [B, 1, H, W] with spatial;
        with retPerLayer also the list of each layer's part. normalize: images are in [0, 1]. fp32, also under
        autocast. Gradients to in0, in1, or both.

    State: `lin0.model.1.weight`, ... and the same as `lins.0.model.1.weight`. A frozen VGG is not in it,
    nor a parameter: nothing to save or to broadcast; the other nets are. State_dicts of the package load with
    strict=True; their net becomes the trunk.

    Where it differs from the package, on purpose:
        - use_dropout=False loads the linear layers; the package looks for them under another name, and goes
          on with random ones.
        - With eval_mode=True, `.train()` of a parent wakes no dropout, and no optimizer moves the linear
          layers, which the package leaves trainable.
        - Files load strictly, and without running code from them.
        - A pixel whose features are all zero has gradient 0 at that map, not NaN.
        - pretrained=True with net="vgg16" finds the files of "vgg".
    """

    def __init__(self, pretrained: bool = True, net: str = "alex", version: str = "0.1", lpips: bool = True,
                 spatial: bool = False, pnet_rand: bool = False, pnet_tune: bool = False,
                 use_dropout: bool = True, model_path: str | Path | None = None, eval_mode: bool = True,
                 verbose: bool = True, *, trunk: VGGTrunk | Mapping[str, Tensor] | None = None,
                 trunk_path: str | Path | None = None, impl: str | None = None) -> None:  # fmt: skip
        super().__init__()
        if net not in NETS:
            raise ValueError(f"LPIPS: net must be one of {tuple(NETS)}, got {net!r}")
        if version not in VERSIONS:
            raise ValueError(f"LPIPS: version must be one of {VERSIONS}, got {version!r}")
        if sum((pnet_rand, trunk is not None, trunk_path is not None)) > 1:
            raise ValueError("LPIPS: give one of trunk, trunk_path and pnet_rand=True")
        self.pnet_type, self.version, self.lpips, self.spatial = net, version, lpips, spatial
        self.pnet_rand, self.pnet_tune, self.eval_mode, self.impl = pnet_rand, pnet_tune, eval_mode, impl
        self._net = NETS[net]
        self.chns = list(CHANNELS[self._net])
        self.L = len(self.chns)
        if verbose:
            kind = "LPIPS" if lpips else "baseline"
            print(f"Setting up [{kind}] perceptual loss: trunk [{net}], v[{version}], spatial [{spatial}]")
        self._set_trunk(trunk, trunk_path)
        if lpips:
            layers = [Linear(c, use_dropout) for c in self.chns]
            self.lins = nn.ModuleList(layers)
            for i, layer in enumerate(layers):
                setattr(self, f"lin{i}", layer)
            if pretrained:
                source = version if model_path is None else model_path
                for layer, weight in zip(layers, read_linear("LPIPS", source, self.chns, self._net)):
                    layer.weight.data.copy_(weight.view_as(layer.weight))
            self.lins.requires_grad_(not eval_mode)
        self.train(not eval_mode)

    def _set_trunk(self, given: VGGTrunk | Mapping[str, Tensor] | None, path: str | Path | None) -> None:
        """`self.net`: a VGGTrunk where it serves, or Slices."""
        composed = self.pnet_tune or self._net != "vgg"
        options: dict[str, Any] = {
            "input_range": (-1.0, 1.0),
            "normalize": "imagenet" if self.version == "0.1" else None,
        }
        if isinstance(given, VGGTrunk):
            if composed:
                raise ValueError(
                    f"LPIPS: a VGGTrunk is for net 'vgg' with pnet_tune=False, got {self.pnet_type!r} with "
                    f"pnet_tune={self.pnet_tune}; give a state_dict"
                )
            found = {"input_range": tuple(given.input_range), "normalize": given.normalize}
            if given.arch != "vgg16" or found != options:
                raise ValueError(
                    f"LPIPS: version {self.version} needs a trunk of 'vgg16' with {options}, "
                    f"got {given.arch!r} with {found}"
                )
            self.net: nn.Module = given
            return
        weights = None
        if not self.pnet_rand:
            weights = vgg_weights.from_file(path or self._cached(), "vgg16") if given is None else given
        if composed:
            self.net = Slices(self._net)
            if weights is not None:
                self.net.load_features(weights)
            self.net.requires_grad_(self.pnet_tune)
        elif weights is None:
            self.net = VGGTrunk.random("vgg16", int(torch.randint(2**31, ())), **options)
        else:
            self.net = VGGTrunk.from_state_dict(weights, "vgg16", **options)

    def _cached(self) -> Path:
        path = Path(torch.hub.get_dir(), "checkpoints", FILES[self._net])
        if not path.exists():
            raise ValueError(
                f"LPIPS: no weights of net {self.pnet_type!r}: give trunk=, trunk_path= or pnet_rand=True; "
                f"torchvision's own file {path} is not there, and nothing is downloaded"
            )
        return path

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(mode and not self.eval_mode)

    def forward(self, in0: Tensor, in1: Tensor, retPerLayer: bool = False,
                normalize: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:  # fmt: skip
        if normalize:
            for name, image in (("in0", in0), ("in1", in1)):
                if not image.is_floating_point():
                    raise TypeError(
                        f"LPIPS: {name} must be floating point for normalize=True, got {image.dtype}"
                    )
            in0, in1 = 2 * in0 - 1, 2 * in1 - 1
        if (
            in0.shape[1:] == in1.shape[1:]
            and in0.shape[0] != in1.shape[0]
            and 1 in (in0.shape[0], in1.shape[0])
        ):
            batch = max(in0.shape[0], in1.shape[0])
            in0, in1 = in0.expand(batch, -1, -1, -1), in1.expand(batch, -1, -1, -1)
        frozen = isinstance(self.net, VGGTrunk) and not self._learning()
        if frozen and not (self.spatial or retPerLayer):
            lin = self._weights(in0.device)
            value = perceptual_loss(in0, in1, self.net, taps=LPIPS_TAPS, kind="lpips", lin=lin,
                                    reduction="none", impl=self.impl)  # fmt: skip
            return value.view(-1, 1, 1, 1)
        maps0, maps1 = self._maps(in0), self._maps(in1)
        size = in0.shape[2:] if self.spatial else None
        if self._learning():
            parts = [self._composed(lin, a, b, size) for lin, a, b in zip(self.lins, maps0, maps1)]
        else:
            parts = layer_distances(maps0, maps1, self._weights(in0.device), size, self.impl)
        parts = [p if self.spatial else p.view(-1, 1, 1, 1) for p in parts]
        value = torch.stack(parts).sum(0)
        return (value, parts) if retPerLayer else value

    def _learning(self) -> bool:
        """Whether the linear layers may get a gradient or drop something."""
        return self.lpips and not self.eval_mode

    def _weights(self, device: torch.device) -> list[Tensor]:
        if not self.lpips:
            return [torch.ones(c, device=device) for c in self.chns]
        return [layer.get_parameter("model.1.weight").detach().flatten() for layer in self.lins]

    def _maps(self, image: Tensor) -> list[Tensor]:
        if isinstance(self.net, VGGTrunk):
            return self.net.features(image, LPIPS_TAPS)
        like = next(self.net.parameters())
        with torch.autocast(image.device.type, enabled=False):
            image = image.to(like.dtype)
            if self.version == "0.1":
                shift, scale = (image.new_tensor(v).view(3, 1, 1) for v in (SHIFT, SCALE))
                image = (image - shift) / scale
            return list(self.net(image))

    def _composed(self, lin: nn.Module, a: Tensor, b: Tensor, size: torch.Size | None) -> Tensor:
        """One layer's part with a gradient to its weights, and its dropout."""
        with torch.autocast(a.device.type, enabled=False):
            difference = lin((_unit(a) - _unit(b)).square())
        if size is None:
            return difference.mean((2, 3))
        return nn.functional.interpolate(difference, size=tuple(size), mode="bilinear", align_corners=False)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                              error_msgs):  # fmt: skip
        """Takes the package's state_dicts too: with its net and constants, with and without dropout, or the
        linear layers alone under one of their two names."""
        for name, value in (("shift", SHIFT), ("scale", SCALE)):
            key = f"{prefix}scaling_layer.{name}"
            found = state_dict.pop(key, torch.tensor(value)).flatten().tolist()
            if any(abs(a - b) > 1e-6 for a, b in zip(found, value)):
                error_msgs.append(f"{key}: must be {value}, got {found}")
        for i in range(self.L if self.lpips else 0):
            names = [
                f"{prefix}{layer}.model.{at}.weight" for at in (1, 0) for layer in (f"lin{i}", f"lins.{i}")
            ]
            given = [state_dict.pop(name) for name in names if name in state_dict]
            state_dict.update({name: given[0] for name in names[:2] if given})
        if isinstance(self.net, VGGTrunk):
            self._load_trunk(state_dict, f"{prefix}net.", error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys,
                                      unexpected_keys, error_msgs)  # fmt: skip

    def _load_trunk(self, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
        """A trunk of the entries `slice1.0.weight`, ..., where there are any; takes them out."""
        keys = [k for k in state_dict if k.startswith(prefix)]
        if not keys:
            return
        old = self.net
        assert isinstance(old, VGGTrunk)
        weights = {k.removeprefix(prefix).partition(".")[2]: state_dict.pop(k) for k in keys}
        try:
            new = VGGTrunk.from_state_dict(weights, "vgg16", input_range=old.input_range,
                                           normalize=old.normalize, precision=old.precision,
                                           winograd=old.winograd)  # fmt: skip
        except ValueError as error:
            error_msgs.append(str(error))
        else:
            self.net = new.to(old.device, old.dtype)


def _unit(x: Tensor) -> Tensor:
    """x / (|x| + 1e-10) over channels, with gradient 0 where x is 0."""
    square = x.square().sum(1, keepdim=True)
    norm = torch.where(square == 0, 1, square).sqrt()
    return torch.where(square == 0, 0, x / (norm + 1e-10))
