"""`vector_quantize_pytorch.ResidualVQ` over the fused quantizer."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.codebook import learn, recomputing
from ...ops.vq import vq_lookup
from .quantize import VectorQuantize, directional, refuse

# What needs the k nearest codes of each row with gradients, or a codebook for each row.
_REFUSED = {
    "implicit_neural_codebook": False,
    "mlp_kwargs": {},
    "beam_size": None,
    "eval_beam_size": None,
    "beam_score_quantizer_weights": None,
}


class ResidualVQ(nn.Module):
    """`vector_quantize_pytorch.ResidualVQ`, version 1.32: its arguments, defaults, outputs and state_dict.

    Args:
        As the peer's. implicit_neural_codebook with mlp_kwargs, and beam_size with its kin, raise when they
        ask for something; so do indices, beam_size and sample_codebook_temp of the call. vq_kwargs go to each
        level's `VectorQuantize`.

    Returns:
        (quantized, indices [..., Q], losses [Q]), and all codes [Q, ..., D] with return_all_codes.

    As with the peer, each level passes its own straight-through gradient on, so that of the sum is Q times
    the output's; `vaeops.nn.ResidualVQ` passes it on once. Other differences are `VectorQuantize`'s. Without
    shared_codebook all codebooks move after the last level, with one all-reduce; quantize_dropout draws from
    torch's default generator, on the CPU, and needs it equal in all processes.
    """

    layers: Sequence[VectorQuantize]

    def __init__(self, *, dim: int, num_quantizers: int | None = None, codebook_size: int | tuple[int, ...],
                 codebook_dim: int | None = None, shared_codebook: bool = False, diveq: bool = False,
                 heads: int = 1, quantize_dropout: bool = False, quantize_dropout_cutoff_index: int = 0,
                 quantize_dropout_multiple_of: int = 1, accept_image_fmap: bool = False,
                 implicit_neural_codebook: bool = False, mlp_kwargs: dict | None = None,
                 beam_size: int | None = None, eval_beam_size: int | None = None,
                 beam_score_quantizer_weights: list[float] | None = None, quant_grad_frac: float = 0.0,
                 return_zeros_for_masked_padding: bool = True, **vq_kwargs: Any) -> None:  # fmt: skip
        super().__init__()
        given = {**locals(), "mlp_kwargs": mlp_kwargs or {}}
        refuse("ResidualVQ", _REFUSED, {name: given[name] for name in _REFUSED})
        if heads != 1:
            raise ValueError(f"ResidualVQ: heads must be 1, got {heads}")
        if not isinstance(codebook_size, tuple):
            if num_quantizers is None:
                raise TypeError("ResidualVQ: num_quantizers is needed where codebook_size is no tuple")
            codebook_size = (codebook_size,) * num_quantizers
        if num_quantizers not in (None, len(codebook_size)):
            raise ValueError(
                f"ResidualVQ: num_quantizers must be the length of codebook_size {codebook_size}, "
                f"got {num_quantizers}"
            )
        if shared_codebook and len(set(codebook_size)) > 1:
            raise ValueError(f"ResidualVQ: shared_codebook needs one codebook_size, got {codebook_size}")
        if quantize_dropout_cutoff_index < 0:
            raise ValueError(
                f"ResidualVQ: quantize_dropout_cutoff_index must be >= 0, got {quantize_dropout_cutoff_index}"
            )
        inner = dim if codebook_dim is None else codebook_dim
        self.has_projections = inner != dim
        self.project_in = nn.Linear(dim, inner) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(inner, dim) if self.has_projections else nn.Identity()
        if shared_codebook:
            vq_kwargs["manual_ema_update"] = True
        if diveq:
            vq_kwargs |= {"ema_update": False, "learnable_codebook": True, "route_gradients_to_input": False,
                          "commitment_weight": 0.0}  # fmt: skip
        layers = [
            VectorQuantize(inner, size, inner, accept_image_fmap=accept_image_fmap,
                           return_zeros_for_masked_padding=return_zeros_for_masked_padding, **vq_kwargs)
            for size in codebook_size
        ]  # fmt: skip
        for layer in layers:
            layer.deferred = not shared_codebook
            if shared_codebook:
                layer._codebook = layers[0]._codebook
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.codebook_dim, self.codebook_sizes = inner, codebook_size
        self.num_quantizers, self.uniform_codebook_size = len(codebook_size), len(set(codebook_size)) == 1
        self.shared_codebook, self.diveq = shared_codebook, diveq
        self.accept_image_fmap = accept_image_fmap
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.quantize_dropout = quantize_dropout and self.num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.quant_grad_frac = 1.0 if diveq else quant_grad_frac

    @property
    def codebook_size(self) -> int:
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """[Q, K, D], or a tuple where the sizes differ."""
        each = tuple(layer.codebook for layer in self.layers)
        return torch.stack(each) if self.uniform_codebook_size else each

    def forward(self, x: Tensor, mask: Tensor | None = None, indices: None = None,
                return_all_codes: bool = False, sample_codebook_temp: None = None,
                freeze_codebook: bool = False, beam_size: int | None = None,
                rand_quantize_dropout_fixed_seed: int | None = None) -> tuple:  # fmt: skip
        """x [B, N, dim]; [B, dim, H, W] with accept_image_fmap. mask bool [B, N], True = use."""
        unsupported = {
            "indices": indices,
            "sample_codebook_temp": sample_codebook_temp,
            "beam_size": beam_size,
        }
        refuse("ResidualVQ.forward", dict.fromkeys(unsupported), unsupported)
        levels = self._levels(rand_quantize_dropout_fixed_seed)
        h = self.project_in(x)
        residual, total = h, torch.zeros_like(h)
        residuals, found, losses = [], [], []
        for layer in self.layers[:levels]:
            residuals.append(residual)
            quantized, index, loss = layer(residual, mask=mask, freeze_codebook=freeze_codebook)
            passed = quantized.detach()
            if self.quant_grad_frac > 0:
                passed = self.quant_grad_frac * quantized + (1 - self.quant_grad_frac) * passed
            residual = residual - passed
            total = total + quantized
            found.append(index)
            losses.append(loss)
        for _ in range(self.num_quantizers - levels):
            found.append(torch.full_like(found[0], -1))
            losses.append(torch.zeros_like(losses[0]))
        if self.training and not freeze_codebook and not recomputing():
            self._learn(residuals)

        if self.diveq:
            total = directional(h, total, 5e-3)
        y = self.project_out(total)
        if mask is not None:
            rest = torch.zeros_like(y) if self.return_zeros_for_masked_padding else x
            y = torch.where(mask.unsqueeze(1 if self.accept_image_fmap else -1), y, rest)
        stacked = torch.stack(found, -1)
        result = (y, stacked, torch.stack(losses))
        return (*result, self.get_codes_from_indices(stacked)) if return_all_codes else result

    def _levels(self, seed: int | None) -> int:
        """How many levels this call uses: all, or in training with dropout a random number of them."""
        if not (self.training and self.quantize_dropout):
            return self.num_quantizers
        if seed is None:
            seed = int(torch.randint(10_000, ()))
        last = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return min(-(-(last + 1) // multiple) * multiple, self.num_quantizers)

    def _learn(self, residuals: list[Tensor]) -> None:
        books = [layer._codebook for layer in self.layers[: len(residuals)]]
        if not self.shared_codebook:
            learn([b for b in books if b.tracks])
            return
        if books[0].ema:
            books[0].update_ema()
        dim = 1 if self.accept_image_fmap else -1
        rows = torch.stack([r.detach().movedim(dim, -1) for r in residuals], -2)
        self.layers[0].expire_codes_(rows)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """indices [..., Q'], Q' <= Q -> codes [Q, ..., D]; 0 at -1 and at levels that are left out."""
        missing = self.num_quantizers - indices.shape[-1]
        if missing:
            if not self.quantize_dropout:
                raise ValueError("ResidualVQ: fewer indices than quantizers need quantize_dropout")
            indices = torch.nn.functional.pad(indices, (0, missing), value=-1)
        each = zip(self.layers, indices.unbind(-1))
        return torch.stack([vq_lookup(i, layer._codebook.embed[0]) for layer, i in each])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        return self.project_out(self.get_codes_from_indices(indices).sum(0))
