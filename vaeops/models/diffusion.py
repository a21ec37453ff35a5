"""A small diffusion model of images."""

import math
from collections import deque
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import rng
from ..ops.recon import recon_loss
from .protocol import Terms, check_sizes, check_x, impl_of, row_seeds

SCHEDULES = ("cosine", "linear")


class TinyDDPM(nn.Module):
    """A denoising diffusion model: a U-Net learns the noise in q(x_t | x) = N(sqrt(a_t) x, (1 - a_t) I).

    a_t (Ho et al.'s alpha-bar), t = 0 ... steps - 1, falls from nearly 1 to nearly 0:
        a_t = prod_{s <= t} max(1 - b_s, 0.001)
        "cosine"  1 - b_s = f(s + 1) / f(s),  f(s) = cos^2(pi / 2 (s / steps + 0.008) / 1.008)
        "linear"  b from 0.0001 to 0.02, both times 1000 / steps

    Args:
        channels: C of the image.
        side: H = W; a multiple of 4.
        steps: of the diffusion.
        width: channels of the U-Net at full size; a multiple of 8.
        schedule: "cosine" | "linear".
        ops: "fused" for vaeops' kernels, "ref" for the PyTorch reference.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", 2020; the cosine: Nichol & Dhariwal,
    "Improved Denoising Diffusion Probabilistic Models", 2021.
    """

    input_range = (-1.0, 1.0)
    classes = 0
    alpha_bar: Tensor

    def __init__(self, channels: int = 1, side: int = 28, steps: int = 50, *, width: int = 32,
                 schedule: str = "cosine", ops: str = "fused") -> None:  # fmt: skip
        super().__init__()
        check_sizes(self, channels=channels, side=side, steps=steps, width=width)
        if side < 4 or side % 4:
            raise ValueError(f"TinyDDPM: side must be a positive multiple of 4, got {side}")
        self.impl = impl_of(ops)
        self.input_shape, self.steps = (channels, side, side), steps
        self.weights = {"noise_mse": 1.0}
        self.register_buffer("alpha_bar", alpha_bar(schedule, steps), persistent=False)
        self.unet = UNet(channels, width)

    def add_noise(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """A draw of q(x_t | x): sqrt(a_t) x + sqrt(1 - a_t) eps; x, eps [B, C, H, W], t int64 [B]."""
        a = self.alpha_bar[t].view(-1, 1, 1, 1)
        return (a.sqrt() * x + (1 - a).sqrt() * eps).to(x.dtype)

    def terms(self, x: Tensor, label: Tensor | None = None, *, seed: Tensor | None = None,
              eps: Tensor | None = None, row: int = 0) -> Terms:  # fmt: skip
        """noise_mse: the mean squared error of the noise, at a step t drawn for each image.

        Args:
            x: [B, C, H, W] in [-1, 1]. label: not looked at.
            seed: int64 [2], of steps and noise; fresh where none is given.
            eps: [B, C, H, W], the noise in place of the seed's.
            row: place of the first image in the joined batch.
        """
        check_x(self, x)
        seed = rng.make_seed(x.device) if seed is None else seed
        of_t, of_eps = (row_seeds(child, len(x), row) for child in rng.split(seed, 2))
        pairs = rng.normal((len(x), 2), of_t, impl=self.impl)
        uniform = (-pairs.square().sum(1) / 2).exp()
        t = (uniform * self.steps).long().clamp(max=self.steps - 1)
        if eps is None:
            eps = rng.normal(x.shape, of_eps, impl=self.impl)
        predicted = self.unet(self.add_noise(x, t, eps), t)
        return Terms({"noise_mse": recon_loss(predicted, eps, "mse", reduction="mean", impl=self.impl)}, {})

    @torch.no_grad()
    def denoise(self, n: int, seed: Tensor) -> Iterator[Tensor]:
        """n images out of noise, as they form: steps + 1 tensors [n, C, H, W], the last in [-1, 1].

        Ancestral sampling: x_{t-1} is drawn from q(x_{t-1} | x_t, x), x being what the U-Net takes the image
        for, clipped to [-1, 1]. Seed int64 [2] on the model's device.
        """
        shape = (n, *self.input_shape)
        x = rng.normal(shape, rng.fold_in(seed, self.steps), impl=self.impl)
        yield x
        before = F.pad(self.alpha_bar, (1, 0), value=1.0)  # a_{t-1}
        for t in reversed(range(self.steps)):
            a, b = self.alpha_bar[t], before[t]
            eps = self.unet(x, torch.full((n,), t, device=x.device))
            image = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
            step = a / b
            x = (b.sqrt() * (1 - step) * image + step.sqrt() * (1 - b) * x) / (1 - a)
            if t:
                noise = rng.normal(shape, rng.fold_in(seed, t), impl=self.impl)
                x = x + ((1 - b) / (1 - a) * (1 - step)).sqrt() * noise
            yield x

    def sample(self, n: int, seed: Tensor, label: Tensor | None = None) -> Tensor:
        """n images [n, C, H, W] in [-1, 1]; seed int64 [2] on the model's device."""
        return deque(self.denoise(n, seed), maxlen=1).pop()


def alpha_bar(schedule: str, steps: int) -> Tensor:
    """a_t of `TinyDDPM`: fp32 [steps]."""
    if steps < 1:
        raise ValueError(f"TinyDDPM: steps must be at least 1, got {steps}")
    if schedule == "cosine":
        s = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = ((s + 0.008) / 1.008 * math.pi / 2).cos().square()
        kept = f[1:] / f[:-1]
    elif schedule == "linear":
        kept = 1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * 1000 / steps
    else:
        raise ValueError(f"TinyDDPM: schedule must be one of {SCHEDULES}, got {schedule!r}")
    return kept.clamp(min=1e-3).cumprod(0).float()


class UNet(nn.Module):
    """A U-Net of three sizes (full, half, quarter) that knows the step t: x [B, C, H, W] -> the same shape.

    Residual blocks of GroupNorm, SiLU and 3x3 convolutions, with t added between the two; what the way down
    saw is joined on the way up. The last convolution starts at 0.

    Args:
        channels: C.
        width: channels at full size, twice as many below; a multiple of 8.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        if width < 8 or width % 8:
            raise ValueError(f"UNet: width must be a positive multiple of 8, got {width}")
        wide, time = 2 * width, 4 * width
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.stem = nn.Conv2d(channels, width, 3, 1, 1)
        self.down1, self.half1 = _TimeBlock(width, width, time), nn.Conv2d(width, width, 3, 2, 1)
        self.down2, self.half2 = _TimeBlock(width, wide, time), nn.Conv2d(wide, wide, 3, 2, 1)
        self.middle1, self.middle2 = _TimeBlock(wide, wide, time), _TimeBlock(wide, wide, time)
        self.up2, self.up1 = _TimeBlock(2 * wide, wide, time), _TimeBlock(wide + width, width, time)
        self.upsample = nn.Upsample(scale_factor=2)
        self.out = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, channels, 3, 1, 1))
        nn.init.zeros_(self.out[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.out[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """t int64 [B]."""
        half = self.width // 2
        angles = t.unsqueeze(1) * torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device))
        time = self.time(torch.cat((angles.sin(), angles.cos()), 1))
        wide = self.down1(self.stem(x), time)
        narrow = self.down2(self.half1(wide), time)
        h = self.middle2(self.middle1(self.half2(narrow), time), time)
        h = self.up2(torch.cat((self.upsample(h), narrow), 1), time)
        h = self.up1(torch.cat((self.upsample(h), wide), 1), time)
        return self.out(h)


class _TimeBlock(nn.Module):
    def __init__(self, width: int, out: int, time: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, out, 3, 1, 1))
        self.time = nn.Linear(time, out)
        self.leave = nn.Sequential(nn.GroupNorm(8, out), nn.SiLU(), nn.Conv2d(out, out, 3, 1, 1))
        self.skip = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.enter(x) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.leave(h)
