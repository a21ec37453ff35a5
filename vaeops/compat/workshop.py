"""The perceptual loss of the AMLD 2020 workshop on autoencoders, which hooks two layers of a whole VGG16."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from ..nn.vgg import VGGTrunk
from ..ops.perceptual import TargetCache, perceptual_loss
from ..ref.perceptual import tap_codes

STATISTICS = {"batch": "batch", "eval": "fold"}


class HookPerceptualLoss(nn.Module):
    """The loss that forward hooks on `vgg16_bn(...).features` give, with what that does beside the intention.

        loss = sum over indices of sum (features_i(x_recon) - features_i(x))^2

        loss = HookPerceptualLoss(trunk="vgg16_bn.pth")
        total = kl + l1 + loss(decoder(z), image)

    What the hooked net does, each by an option whose default is the workshop's:
        - Batch norm runs in training mode, since nobody calls `.eval()`: bn="batch". Each call normalizes by
          its own batch, reconstructions by theirs and images by theirs, so an image's loss depends on the
          others in its batch, and features of unlike batches are compared after each was whitened alone.
          bn="eval" takes the running statistics: images are then independent, and a gradient is all that is
          kept for backward.
          The hooked net's running statistics also drift with each call; nothing reads them in training mode,
          and here they stay as they were loaded.
        - The ReLU after a hooked layer works in place, on the very tensor that the hook kept. So index 15,
          the batch norm of conv3_1, gives relu3_1: in_place=True. With in_place=False an index gives
          the output of that layer. Index 5 is relu1_2 either way.
        - Images enter as they are, in [-1, 1], where the net was trained on ImageNet's normalization. A
          VGGTrunk given as `trunk` brings a range and a normalization of its own.
        - The squared differences are summed over channels, pixels and batch, so the loss grows with each:
          reduction="sum". "mean": the mean over channels and pixels, then over the batch.
        - All 44 layers run where 17 suffice. That one has no option: here the net ends at the last index.

    Args:
        arch: one of VGGTrunk's.
        indices: into torchvision's `features`, ascending.
        bn: "batch" | "eval"; for an arch without batch norm only the default, which has no effect there.
        reduction: "sum" | "mean".
        trunk: the weights: a VGGTrunk, a state_dict of torchvision's net, or the path of a file.
        in_place: as above.
        impl: as in `vaeops.perceptual_loss`.

    Shapes: x_recon, x [B, 3, H, W] -> []. x may be what `encode` made of it. The target takes part in the
    graph where it needs a gradient; the workshop detaches it.

    State: none; the trunk is no parameter, and `.train()` and `.eval()` change nothing.

    Source: MaxinAI, AMLD 2020 workshop, notebook "CNN VAE CelebA".
    """

    def __init__(self, arch: str = "vgg16_bn", indices: Sequence[int] = (5, 15), bn: str = "batch",
                 reduction: str = "sum", *, trunk: VGGTrunk | Mapping[str, Tensor] | str | Path,
                 in_place: bool = True, impl: str | None = None) -> None:  # fmt: skip
        super().__init__()
        if bn not in STATISTICS:
            raise ValueError(f"HookPerceptualLoss: bn must be one of {tuple(STATISTICS)}, got {bn!r}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"HookPerceptualLoss: reduction must be 'sum' or 'mean', got {reduction!r}")
        statistics = STATISTICS[bn] if arch.endswith("_bn") else None
        if isinstance(trunk, VGGTrunk):
            if (trunk.arch, trunk.bn) != (arch, statistics):
                raise ValueError(
                    f"HookPerceptualLoss: arch {arch!r} with bn={bn!r} needs a trunk of it with "
                    f"bn={statistics!r}, got {trunk.arch!r} with bn={trunk.bn!r}"
                )
        elif isinstance(trunk, Mapping):
            trunk = VGGTrunk.from_state_dict(trunk, arch, bn=statistics, normalize=None)
        else:
            trunk = VGGTrunk.from_file(trunk, arch, bn=statistics, normalize=None)
        self.trunk, self.reduction, self.impl = trunk, reduction, impl
        self.taps = tuple(_after_relu(arch, i) for i in indices) if in_place else tuple(indices)
        trunk.cut(self.taps)

    def encode(self, x: Tensor) -> TargetCache:
        """The features of x as a target; with bn="batch" they are those of this batch."""
        return self.trunk.encode(x, self.taps)

    def forward(self, x_recon: Tensor, x: Tensor | TargetCache) -> Tensor:
        return perceptual_loss(
            x_recon, x, self.trunk, taps=self.taps, reduction=self.reduction, impl=self.impl
        )


def _after_relu(arch: str, index: int) -> int:
    """The index whose output a hook on `index` ends up with: of the ReLU that comes next, if one does."""
    code = tap_codes(arch).get(index)
    return index + 1 if code is not None and code % 2 == 0 else index
