"""`vector_quantize_pytorch.VectorQuantize` over the fused quantizer."""

from collections.abc import Callable
from math import sqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.codebook import learn, recomputing
from ...nn.quantize import mask_of
from ...ops.vq import VQOutput, vector_quantize, vq_lookup
from .codebook import Codebook

# Arguments that would need an N x K array or one more way to train a codebook, and what asks for nothing.
_REFUSED = {
    "commitment_use_cross_entropy_loss": False,
    "codebook_diversity_loss_weight": 0.0,
    "codebook_diversity_temperature": 100.0,
    "stochastic_sample_codes": False,
    "sample_codebook_temp": 1.0,
    "straight_through": False,
    "in_place_codebook_optimizer": None,
    "manual_in_place_optimizer_update": False,
    "affine_param": False,
    "sync_affine_param": False,
    "affine_param_batch_decay": 0.99,
    "affine_param_codebook_decay": 0.9,
    "sync_kmeans": True,  # processes that start from different codebooks would stay apart
}


def refuse(op: str, taken: dict[str, Any], given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not taken[name] and value != taken[name]:
            raise ValueError(
                f"{op}: {name} must be {taken[name]!r}, vaeops has no such option; got {value!r}"
            )


class LossBreakdown(NamedTuple):
    """The terms of the loss, unweighted; 0 for those that are off."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class VectorQuantize(nn.Module):
    """`vector_quantize_pytorch.VectorQuantize` 1.32: its arguments, defaults, outputs and state_dict.

    Args:
        As the peer's. Those for which it builds a rows x codes array (commitment_use_cross_entropy_loss,
        codebook_diversity_*, stochastic_sample_codes, sample_codebook_temp, straight_through), affine_param*
        and in_place_codebook_optimizer with theirs, and sync_kmeans=False, raise where they ask for
        something; so do topk, indices, sample_codebook_temp and codebook_transform_fn of the call.
        sync_codebook: None or True joins the processes wherever there are several; False does not.

    Returns:
        (quantized, indices, loss), and a LossBreakdown with return_loss_breakdown. The loss is 0 in eval.

    Where it differs from the peer, on purpose:
        - Indices are exact (`vaeops.vq_assign`), on equality the lowest; quantized is the code bit for bit.
        - Low precision: codebook and averages stay fp32 in a .half() or .bfloat16() module.
        - A row with NaN or Inf touches neither averages nor codes; the peer's whole codebook turns NaN.
        - With a mask the commitment loss is that of the quantizer's own input, as without one: an all-True
          mask changes nothing. The peer takes the layer's raw input: wrong for cosine, an error with a
          projection or heads. A mask works for images too.
        - A batch without a used row has loss 0 and moves nothing.
        - The rotation falls back to straight-through near x = 0, where the peer's gradient explodes.
        - k-means and revival draw other rows than the peer's generator would, with several codebooks and
          processes too; a k-means start that leaves a cluster empty keeps its code.
        - A forward that runs again under checkpointing does not move the codebook twice.
    """

    def __init__(self, dim: int, codebook_size: int, codebook_dim: int | None = None, heads: int = 1,
                 separate_codebook_per_head: bool = False, decay: float = 0.8, eps: float = 1e-5,
                 freeze_codebook: bool = False, kmeans_init: bool = False, kmeans_iters: int = 10,
                 sync_kmeans: bool = True, use_cosine_sim: bool = False,
                 layernorm_after_project_in: bool = False, threshold_ema_dead_code: float = 0,
                 channel_last: bool = True, accept_image_fmap: bool = False, accept_3d_fmap: bool = False,
                 commitment_weight: float = 1.0,
                 commitment_use_cross_entropy_loss: bool = False, orthogonal_reg_weight: float = 0.0,
                 orthogonal_reg_active_codes_only: bool = False, orthogonal_reg_max_codes: int | None = None,
                 codebook_diversity_loss_weight: float = 0.0, codebook_diversity_temperature: float = 100.0,
                 stochastic_sample_codes: bool = False, sample_codebook_temp: float = 1.0,
                 straight_through: bool = False, rotation_trick: bool | None = None,
                 directional_reparam: bool = False, directional_reparam_variance: float = 5e-3,
                 sync_codebook: bool | None = None, sync_affine_param: bool = False,
                 ema_update: bool | None = None, vq_bridge: nn.Module | None = None,
                 manual_ema_update: bool = False, learnable_codebook: bool | None = None,
                 in_place_codebook_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
                 manual_in_place_optimizer_update: bool = False, affine_param: bool = False,
                 affine_param_batch_decay: float = 0.99, affine_param_codebook_decay: float = 0.9,
                 sync_update_v: float = 0.0, return_zeros_for_masked_padding: bool = True,
                 route_gradients_to_input: bool = True) -> None:  # fmt: skip
        super().__init__()
        given = locals()
        refuse("VectorQuantize", _REFUSED, {name: given[name] for name in _REFUSED})
        ema = not directional_reparam and vq_bridge is None if ema_update is None else ema_update
        learnable = directional_reparam or vq_bridge is not None
        learnable = learnable if learnable_codebook is None else learnable_codebook
        rotation = not directional_reparam and dim > 1 if rotation_trick is None else rotation_trick
        for wrong, text in (
            (use_cosine_sim and learnable, "use_cosine_sim does not go with learnable_codebook"),
            (ema and learnable, "ema_update does not go with learnable_codebook"),
            (vq_bridge is not None and not learnable, "vq_bridge needs learnable_codebook"),
            (rotation and directional_reparam, "rotation_trick does not go with directional_reparam"),
            (
                directional_reparam and not threshold_ema_dead_code,
                "directional_reparam needs threshold_ema_dead_code > 0",
            ),
            (not 0 <= sync_update_v <= 1, f"sync_update_v must be in [0, 1], got {sync_update_v}"),
            (sync_update_v > 0 and not learnable, "sync_update_v needs learnable_codebook"),
            (
                orthogonal_reg_active_codes_only and separate_codebook_per_head and heads > 1,
                "orthogonal_reg_active_codes_only does not go with separate_codebook_per_head",
            ),
        ):
            if wrong:
                raise ValueError(f"VectorQuantize: {text}")

        self.dim, self.heads, self.codebook_size = dim, heads, codebook_size
        self.separate_codebook_per_head = separate_codebook_per_head
        self.separate = separate_codebook_per_head and heads > 1
        inner = (dim if codebook_dim is None else codebook_dim) * heads
        self.has_projections = inner != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, inner)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
            self.project_out = nn.Linear(inner, dim)
        elif layernorm_after_project_in:
            raise ValueError("VectorQuantize: layernorm_after_project_in needs a projection, there is none")

        self.use_cosine_sim, self.learnable_codebook = use_cosine_sim, learnable
        self.freeze_codebook, self.commitment_weight = freeze_codebook, commitment_weight
        self.has_commitment_loss = commitment_weight > 0 and not directional_reparam
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.rotation_trick, self.directional_reparam = rotation, directional_reparam
        self.directional_reparam_variance, self.sync_update_v = directional_reparam_variance, sync_update_v
        self.route_gradients_to_input = route_gradients_to_input
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.channel_first = accept_image_fmap or accept_3d_fmap or not channel_last
        self.deferred = False  # a layer above calls `learn`, for several codebooks at once
        self._codebook = Codebook(
            inner // heads, codebook_size, heads=heads if separate_codebook_per_head else 1, ema=ema,
            normalize=use_cosine_sim, decay=decay, eps=eps, kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters, revive_below=threshold_ema_dead_code, sync=sync_codebook is not False,
            learnable=learnable or orthogonal_reg_weight > 0, manual=manual_ema_update, bridge=vq_bridge,
        )  # fmt: skip

    @property
    def ema_update(self) -> bool:
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        embed = self._codebook.embed
        return embed if self.separate_codebook_per_head else embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self._codebook.embed.copy_(codes if self.separate_codebook_per_head else codes.unsqueeze(0))

    def forward(self, x: Tensor, indices: None = None, mask: Tensor | None = None, lens: Tensor | None = None,
                topk: None = None, sample_codebook_temp: None = None, freeze_codebook: bool | None = None,
                return_loss_breakdown: bool = False, codebook_transform_fn: None = None,
                ema_update_weight: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None,
                accum_ema_update: bool = False, ema_update: bool | None = None) -> tuple:  # fmt: skip
        """x [B, N, dim] or [B, dim]; channel-first where the options say so. mask bool [B, N], True = use."""
        unsupported = {"indices": indices, "topk": topk, "sample_codebook_temp": sample_codebook_temp,
                       "codebook_transform_fn": codebook_transform_fn}  # fmt: skip
        refuse("VectorQuantize.forward", dict.fromkeys(unsupported), unsupported)
        first = self.channel_first and x.dim() > 2
        rows = x.movedim(1, -1) if first else x
        mask = mask_of("VectorQuantize", rows.shape[:-1], mask, lens)
        book = self._codebook
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook

        h = self.project_in(rows)
        parts, masks = self._split(h, mask)
        if not book.started:
            book.start([p.detach() for p in parts], masks)
        moves = book.ema if ema_update is None else ema_update
        learning = self.training and not frozen and (moves or book.revive_below > 0)
        tables = book.tables(learning and not accum_ema_update)
        outs = [self._quantize(p, t, m, frozen, learning) for p, t, m in zip(parts, tables, masks)]
        if learning and not recomputing():
            found = [(o.counts, o.sums) for o in outs if o.counts is not None and o.sums is not None]
            book.observe(parts, [o.indices for o in outs], found)
            book.moves, book.weight = moves and not book.manual, ema_update_weight
            if not (accum_ema_update or self.deferred):
                learn([book])

        loss = torch.zeros((), device=x.device)
        terms = LossBreakdown(*[torch.zeros((), device=x.device)] * 4)
        if self.training and self.has_commitment_loss:
            commit = torch.stack([o.commit_loss for o in outs]).mean()
            loss = loss + commit * self.commitment_weight
            terms = terms._replace(commitment=commit)
        if self.training and self.orthogonal_reg_weight > 0:
            orthogonal = self._orthogonal(outs[0].indices)
            loss = loss + orthogonal * self.orthogonal_reg_weight
            terms = terms._replace(orthogonal_reg=orthogonal)
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            loss = loss if loss.requires_grad else loss.requires_grad_()  # as the peer's, fit for backward

        if self.separate:
            quantized = torch.stack([o.quantized for o in outs], -2)
            index = torch.stack([o.indices for o in outs], -1)
        else:
            quantized, index = outs[0].quantized, outs[0].indices
        y = self.project_out((quantized.flatten(-2) if self.heads > 1 else quantized).to(h.dtype))
        if mask is not None:
            rest = torch.zeros_like(rows) if self.return_zeros_for_masked_padding else rows
            y = torch.where(mask.unsqueeze(-1), y, rest)
        y = y.movedim(-1, 1) if first else y
        return (y, index, loss, terms) if return_loss_breakdown else (y, index, loss)

    def _split(self, h: Tensor, mask: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Rows [*R, heads * D] and their mask, one for each codebook."""
        h = h if self.heads == 1 else h.unflatten(-1, (self.heads, -1))
        if self.use_cosine_sim:
            h = F.normalize(h.to(torch.promote_types(h.dtype, torch.float32)), dim=-1)
        if self.separate:
            return h.unbind(-2), (mask,) * self.heads
        if mask is not None and self.heads > 1:
            mask = mask.unsqueeze(-1).expand(h.shape[:-1])
        return (h,), (mask,)

    def _quantize(self, x: Tensor, table: Tensor, mask: Tensor | None, frozen: bool, stats: bool) -> VQOutput:
        """One codebook's part, its commit_loss with the gradients of the peer's."""
        routed = self.training and x.requires_grad and self.route_gradients_to_input
        learned = self.learnable_codebook and not frozen
        estimator = "rotation" if self.rotation_trick else "ste"
        if not routed or self.directional_reparam:
            estimator = "none"
        metric = "cosine" if self.use_cosine_sim else "l2"
        out = vector_quantize(x, table if learned else table.detach(), mask=mask, stats=stats, metric=metric,
                              estimator=estimator)  # fmt: skip
        quantized, commit = out.quantized, out.commit_loss
        if learned:  # one loss, which both sides minimise
            commit = commit + (out.codebook_loss - out.codebook_loss.detach())
        if routed and self.directional_reparam:
            quantized = directional(x, vq_lookup(out.indices, table), self.directional_reparam_variance)
        elif not routed and table.requires_grad:
            quantized = vq_lookup(out.indices, table).to(x.dtype)
        if self.training and self.sync_update_v > 0:
            quantized = quantized + self.sync_update_v * (quantized - quantized.detach())
        return out._replace(quantized=quantized, commit_loss=commit)

    def _orthogonal(self, indices: Tensor) -> Tensor:
        """sum of squared cosines of all pairs of codes / K^2 - 1 / K, from a D x D matrix.

        Source: Shin et al., "Translation-equivariant Image Quantizer", 2021, eq. 2.
        """
        codes = F.normalize(self._codebook.embed, dim=-1, eps=1e-6)
        heads, size, _ = codes.shape
        kept = torch.ones(size, dtype=torch.bool, device=codes.device)
        if self.orthogonal_reg_active_codes_only:
            kept = torch.zeros(size + 1, dtype=torch.bool, device=codes.device)
            kept = kept.index_fill(0, indices.flatten() % (size + 1), True)[:size]  # -1 is the code more
        most = self.orthogonal_reg_max_codes
        if most is not None and size > most:
            drawn = (torch.rand(size, device=codes.device) + kept).topk(most).indices
            codes, kept = codes[:, drawn], kept[drawn]
        codes = codes * kept.unsqueeze(-1)
        gram = codes.mT @ codes
        n = kept.sum().to(codes.dtype)
        return gram.square().sum() / (heads * n**2) - 1 / n

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes before the projection; channel-first where x is."""
        if self.separate:
            each = zip(indices.unbind(-1), self._codebook.embed)
            codes = torch.cat([vq_lookup(i, e) for i, e in each], -1)
        else:
            codes = vq_lookup(indices, self._codebook.embed[0])
            codes = codes.flatten(-2) if self.heads > 1 else codes
        return codes.movedim(-1, 1) if self.channel_first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        return self.project_out(self.get_codes_from_indices(indices))

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Move the codebook as if the rows of x had been given these indices."""
        rows = x.movedim(1, -1) if self.channel_first and x.dim() > 2 else x
        parts, masks = self._split(self.project_in(rows), mask)
        each = indices.unbind(-1) if self.separate else (indices,)
        found = [i if m is None else i.masked_fill(~m, -1) for i, m in zip(each, masks)]
        self._codebook.moves, self._codebook.weight = self.ema_update and not self._codebook.manual, None
        self._codebook.observe(parts, found)
        learn([self._codebook])

    update_ema_indices = update_indices

    def expire_codes_(self, x: Tensor) -> None:
        """Dead codes become rows of x [..., heads * D], as they come out of the projection."""
        self._codebook.expire_codes_(self._split(x, None)[0])


def directional(x: Tensor, e: Tensor, variance: float) -> Tensor:
    """x moved by |e - x| in the direction of e - x plus noise.

    Source: Vali et al., "DiVeQ: Differentiable Vector Quantization Using the Reparameterization Trick", 2025.
    """
    error = e.to(x.dtype) - x
    towards = F.normalize(error + sqrt(variance) * torch.randn_like(error), dim=-1, eps=1e-6)
    return x + towards.detach() * error.norm(dim=-1, keepdim=True)
