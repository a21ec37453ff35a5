"""taming's `VectorQuantizer2` over the fused quantizer, and the adaptive weight of its discriminator."""

import torch
from torch import Tensor, nn

from ..ops.vq import vector_quantize, vq_lookup


def adaptive_weight(nll_grad: Tensor, gan_grad: Tensor, discriminator_weight: float = 1.0, *,
                    eps: float = 1e-4, limit: float = 1e4) -> Tensor:  # fmt: skip
    """How much the adversarial loss counts: as much as makes its gradient as long as the reconstruction's.

        weight = discriminator_weight * min(|nll_grad| / (|gan_grad| + eps), limit)

    taming takes both gradients at the decoder's last layer, each by an autograd pass from its loss: that of
    the reconstruction goes through VGG, and so does the step's own backward, once more. The gradient at the
    image is there already with `perceptual_loss(..., return_grad=True)`, and only the last layer is left:

        perceptual, image_grad = vaeops.perceptual_loss(x, target, trunk, return_grad=True)
        l1 = (x - target).abs().mean()
        image_grad = image_grad + torch.autograd.grad(l1, x, retain_graph=True)[0]
        nll_grad = torch.autograd.grad(x, last_layer, image_grad, retain_graph=True)[0]
        gan_grad = torch.autograd.grad(gan, last_layer, retain_graph=True)[0]
        (l1 + perceptual + adaptive_weight(nll_grad, gan_grad) * gan).backward()

    Args:
        nll_grad, gan_grad: gradients of the two losses with respect to the last layer's weight, one shape.
        discriminator_weight: a factor of it, as in taming's configuration.
        eps, limit: taming's constants.

    Returns:
        [], a constant without a graph, on the gradients' device; does not wait for it.

    Source: Esser, Rombach & Ommer, "Taming Transformers for High-Resolution Image Synthesis", 2021, eq. 7.
    """
    if nll_grad.shape != gan_grad.shape:
        raise ValueError(
            f"adaptive_weight: gan_grad must have nll_grad's shape {list(nll_grad.shape)}, "
            f"got {list(gan_grad.shape)}"
        )
    ratio = nll_grad.detach().norm() / (gan_grad.detach().norm() + eps)
    return discriminator_weight * ratio.clamp(0, limit)


class VectorQuantizer2(nn.Module):
    """VQGAN's quantizer: codes learned by gradient, indices that can be renumbered to those in use.

        loss = commit + beta * codebook (legacy), or beta * commit + codebook
    where both are the mean of (z - e)^2, commit with its gradient to z, codebook with that to the codes.
    Legacy has beta on the term that it was not meant for, and is what checkpoints were trained with.

    Args:
        n_e, e_dim, beta: K, D, the weight in the loss.
        remap: path of a .npy file with the codes in use [U]: indices are then positions in it.
        unknown_index: what a code that is not in use becomes: "random" among those in use, "extra" = U, or an
            int.
        sane_index_shape: indices [B, H, W] rather than flat.
        legacy: as above.

    Returns:
        (z_q, loss, (None, None, indices)) for z [B, D, H, W]; any number of dims after D will do. indices
        [N], [N, 1] with remap, or [B, H, W].

    State: `embedding.weight`, and `used` with remap.

    Where it differs from the peer, on purpose:
        - Indices are exact (`vaeops.vq_assign`), where the peer's fp32 formula takes a farther code in a few
          rows of a hundred; z_q is the code bit for bit, the peer's z + (e - z) is not.
        - loss is fp32 for fp16 and bf16 z.
        - Remapping makes no N x U array, and does not write into the indices given to `get_codebook_entry`.
        - "random" draws other numbers than the peer does from the same generator.
    """

    used: Tensor

    def __init__(self, n_e: int, e_dim: int, beta: float, remap: str | None = None,
                 unknown_index: str | int = "random", sane_index_shape: bool = False,
                 legacy: bool = True) -> None:  # fmt: skip
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)
        self.remap, self.re_embed, self.sane_index_shape = remap, n_e, sane_index_shape
        if remap is not None:
            import numpy as np

            self.register_buffer("used", torch.from_numpy(np.load(remap)))
            self.re_embed = self.used.shape[0]
            if unknown_index == "extra":
                unknown_index = self.re_embed
                self.re_embed += 1
            elif unknown_index != "random" and not isinstance(unknown_index, int):
                raise ValueError(
                    f"{type(self).__name__}: unknown_index must be 'random', 'extra' or an int, "
                    f"got {unknown_index!r}"
                )
        self.unknown_index = unknown_index

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Codes -> their positions in `used`, the first where there are several."""
        used, order = self.used.to(inds).sort(stable=True)
        at = torch.searchsorted(used, inds.contiguous()).clamp(max=used.shape[0] - 1)
        if self.unknown_index == "random":
            unknown = torch.randint_like(inds, self.re_embed)
        else:
            unknown = torch.full_like(inds, int(self.unknown_index))
        return torch.where(used[at] == inds, order[at], unknown)

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """Positions in `used` -> codes; the extra one -> the first in use."""
        used = self.used.to(inds)
        if self.re_embed > used.shape[0]:
            inds = torch.where(inds >= used.shape[0], 0, inds)
        return used[inds]

    def forward(self, z: Tensor, temp: float | None = None, rescale_logits: bool = False,
                return_logits: bool = False) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:  # fmt: skip
        """temp, rescale_logits, return_logits: of taming's Gumbel interface, only their defaults."""
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError(
                f"{type(self).__name__}: temp must be None or 1.0, rescale_logits and return_logits False, "
                f"got {temp!r}, {rescale_logits!r}, {return_logits!r}"
            )
        z_q, found, commit, codebook, _, _ = vector_quantize(z, self.embedding.weight, channel_dim=1)
        loss = commit + self.beta * codebook if self.legacy else self.beta * commit + codebook
        indices = found.flatten()
        if self.remap is not None:
            indices = self.remap_to_used(indices).unsqueeze(1)
        if self.sane_index_shape:
            indices = indices.view(found.shape)
        return z_q, loss, (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """Codes of indices: [*, D], or with shape (B, H, W, D) as [B, D, H, W]."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        z_q = vq_lookup(indices, self.embedding.weight)
        return z_q if shape is None else z_q.reshape(shape).movedim(-1, 1).contiguous()
