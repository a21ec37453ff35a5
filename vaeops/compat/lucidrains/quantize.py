"""`vector_quantize_pytorch.VectorQuantize` over the fused quantizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.codebook import learn, recomputing
from ...nn.processes import all_reduce, world
from ...nn.quantize import mask_of
from ...ops.vq import vq_lookup
from . import losses
from .affine import AffineCodebook
from .codebook import Codebook
from .losses import masked_mean
from .parts import How, Part, pick, quantize_part


class LossBreakdown(NamedTuple):
    """The terms of the loss, unweighted; 0 for those that are off."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class VectorQuantize(nn.Module):
    """`vector_quantize_pytorch.VectorQuantize` 1.32: its arguments, defaults, outputs and state_dict.

    Args:
        As the peer's; what belongs to an option that is off does nothing. Combinations that the peer refuses
        raise ValueError. Random codes, losses over all codes and straight_through take the rows in chunks.
        straight_through: the softmax's gradient, where route_gradients_to_input is False or the input takes
            none; otherwise, as with the peer, the input gets the plain straight-through gradient.
        layernorm_after_project_in: where there is a projection.
        sync_kmeans: False: k-means over the first process's rows alone, for all.
        sync_codebook: None or True joins the processes wherever there are several; False does not.

    Returns:
        (quantized, indices, loss), and a LossBreakdown with return_loss_breakdown. The loss is 0 in eval,
        except with topk; (quantized, cross entropy) where the call gives indices.

    Where it differs from the peer, on purpose:
        - Indices are exact (`vaeops.vq_assign`), on equality the lowest; quantized is the code bit for bit.
        - Low precision: codebook and averages stay fp32 in a .half() or .bfloat16() module.
        - A row with NaN or Inf touches neither averages nor codes; the peer's whole codebook turns NaN.
        - With a mask the commitment loss is that of the quantizer's own input, as without one: an all-True
          mask changes nothing. The peer takes the layer's raw input: wrong for cosine, an error with a
          projection or heads. A mask works for images too.
        - Losses over all codes leave masked rows out. Their gradients are those of the codes that were looked
          up; the peer's averages overwrite these before backward.
        - Codebook diversity is that of each codebook; the peer adds up code k of all heads.
        - Given indices: for any layout, and quantized is projected. The peer raises, or leaves it inside.
        - affine_param: the moments stay in eval; decoding gives what forward gave, with vq_bridge too; a
          state with moments loads; a revived code is at its row. With the peer none of these holds.
        - The loss of in_place_codebook_optimizer adds no gradient to the parameters of a transform.
        - A batch without a used row has loss 0 and moves nothing.
        - The rotation falls back to straight-through near x = 0, where the peer's gradient explodes.
        - k-means and revival draw other rows than the peer's generator would, with several codebooks and
          processes too; a k-means start that leaves a cluster empty keeps its code.
        - A forward that runs again under checkpointing does not move the codebook twice; one with
          in_place_codebook_optimizer cannot be checkpointed, nor compiled without a graph break.
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
                straight_through and (rotation or directional_reparam),
                "straight_through goes with neither rotation_trick, the default, nor directional_reparam",
            ),
            (straight_through and learnable, "straight_through does not go with learnable_codebook"),
            (affine_param and use_cosine_sim, "affine_param does not go with use_cosine_sim"),
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

        self.use_cosine_sim, self.learnable_codebook = use_cosine_sim, learnable
        self.freeze_codebook, self.commitment_weight = freeze_codebook, commitment_weight
        self.has_commitment_loss = commitment_weight > 0 and not directional_reparam
        self.commitment_use_cross_entropy_loss = commitment_use_cross_entropy_loss
        self.codebook_diversity_loss_weight = codebook_diversity_loss_weight
        self.codebook_diversity_temperature = codebook_diversity_temperature
        self.stochastic_sample_codes, self.straight_through = stochastic_sample_codes, straight_through
        self.sample_codebook_temp = sample_codebook_temp
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.rotation_trick, self.directional_reparam = rotation, directional_reparam
        self.directional_reparam_variance, self.sync_update_v = directional_reparam_variance, sync_update_v
        self.route_gradients_to_input = route_gradients_to_input
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.channel_first = accept_image_fmap or accept_3d_fmap or not channel_last
        self.deferred = False  # a layer above calls `learn`, for several codebooks at once
        options: dict[str, Any] = {}
        if affine_param:
            options = {"rows_decay": affine_param_batch_decay, "codes_decay": affine_param_codebook_decay,
                       "joined": sync_affine_param}  # fmt: skip
        self._codebook: Codebook = (AffineCodebook if affine_param else Codebook)(
            inner // heads, codebook_size, heads=heads if separate_codebook_per_head else 1, ema=ema,
            normalize=use_cosine_sim, decay=decay, eps=eps, kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters, revive_below=threshold_ema_dead_code, sync=sync_codebook is not False,
            sync_kmeans=sync_kmeans, learnable=learnable or orthogonal_reg_weight > 0,
            manual=manual_ema_update, bridge=vq_bridge, **options,
        )  # fmt: skip
        self.in_place_codebook_optimizer: torch.optim.Optimizer | None = None
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update
        if in_place_codebook_optimizer is not None:
            if not list(self._codebook.parameters()):
                raise ValueError("VectorQuantize: in_place_codebook_optimizer needs learnable_codebook")
            self.in_place_codebook_optimizer = in_place_codebook_optimizer(self._codebook.parameters())

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

    def forward(self, x: Tensor, indices: Tensor | None = None, mask: Tensor | None = None,
                lens: Tensor | None = None, topk: int | None = None,
                sample_codebook_temp: float | None = None, freeze_codebook: bool | None = None,
                return_loss_breakdown: bool = False,
                codebook_transform_fn: Callable[[Tensor], Tensor] | None = None,
                ema_update_weight: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None,
                accum_ema_update: bool = False, ema_update: bool | None = None) -> tuple:  # fmt: skip
        """x [B, N, dim] or [B, dim]; channel-first where the options say so. mask bool [B, N], True = use.

        indices [B, N(, heads)], -1 for none: returns (quantized, cross entropy of the logits against them).
        topk: the k nearest codes of each row: quantized [..., k, dim], indices and loss [..., k]; the
            codebook does not move. Channel-first: quantized [B, dim, ..., k].
        codebook_transform_fn: codes [H, K, D] -> codes for each row [H, B, N, K, D].
        """
        book = self._codebook
        k = self._checked_topk(topk)
        first = self.channel_first and x.dim() > 2
        rows = x.movedim(1, -1) if first else x
        mask = mask_of("VectorQuantize", rows.shape[:-1], mask, lens)
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook

        h = self.project_in(rows)
        parts, masks = self._split(h, mask)
        how = self._how(parts[0].requires_grad, k, sample_codebook_temp, frozen)
        if not book.started:
            book.start([p.detach() for p in parts], masks)
        if self.training and not recomputing():
            book.see(tuple(p.detach() for p in parts), masks)
        moves = book.ema if ema_update is None else ema_update
        learning = self.training and not frozen and k is None and (moves or book.revive_below > 0)
        optimizing = self.training and not frozen and self.in_place_codebook_optimizer is not None

        def quantize(stats: bool) -> tuple[list[Tensor], list[Part]]:
            tables = book.tables(optimizing or (learning and not accum_ema_update))
            codes = self._own(tables, parts, codebook_transform_fn)
            each = zip(parts, codes, masks)
            return codes, [quantize_part(p, c, m, how, stats) for p, c, m in each]

        with torch.set_grad_enabled(torch.is_grad_enabled() or optimizing):
            codes, outs = quantize(learning)
        if learning and not recomputing():
            found = [o.found for o in outs if o.found is not None]
            book.observe(parts, [o.indices for o in outs], found or None)
            book.moves, book.weight = moves and not book.manual, ema_update_weight
            if not (accum_ema_update or self.deferred):
                learn([book])
        terms = LossBreakdown(*[torch.zeros((), device=x.device)] * 4)
        if optimizing and not recomputing():
            terms = terms._replace(inplace_optimize=self._optimize(parts, masks, codes, outs))
            codes, outs = quantize(False)

        fixed = [c.detach() if frozen else c for c in codes]
        if indices is not None:
            given = indices.reshape(h.shape[:-1] if self.heads == 1 else (*h.shape[:-1], self.heads))
            targets = given.unbind(-1) if self.separate else (given,)
            loss = losses.cross_entropy(parts, fixed, targets, masks, self.use_cosine_sim)
        else:
            loss, terms = self._loss(parts, fixed, masks, outs, terms, k)

        if self.separate:
            quantized = torch.stack([o.quantized for o in outs], -2)
            index = torch.stack([o.indices for o in outs], -1)
        else:
            quantized, index = outs[0].quantized, outs[0].indices
        y = self.project_out((quantized.flatten(-2) if self.heads > 1 else quantized).to(h.dtype))
        if mask is not None:
            rest = torch.zeros_like(rows) if self.return_zeros_for_masked_padding else rows
            used, rest = (mask, rest) if k is None else (mask.unsqueeze(-1), rest.unsqueeze(-2))
            y = torch.where(used.unsqueeze(-1), y, rest)
        y = y.movedim(-1, 1) if first else y
        if indices is not None:
            return y, loss
        return (y, index, loss, terms) if return_loss_breakdown else (y, index, loss)

    def _how(self, gradient: bool, topk: int | None, temperature: float | None, frozen: bool) -> How:
        """gradient: whether the rows take one."""
        temperature = self.sample_codebook_temp if temperature is None else temperature
        random = self.training and temperature > 0
        return How(
            cosine=self.use_cosine_sim,
            topk=topk,
            draw=temperature if random and self.stochastic_sample_codes else None,
            soft=temperature if random and self.straight_through else None,
            routed=self.training and gradient and self.route_gradients_to_input,
            rotation=self.rotation_trick,
            directional=self.directional_reparam_variance if self.directional_reparam else None,
            learned=self.learnable_codebook and not frozen,
            sync_update_v=self.sync_update_v if self.training else 0.0,
        )

    def _checked_topk(self, topk: int | None) -> int | None:
        if topk is None:
            return None
        if topk < 1:
            raise ValueError("VectorQuantize: topk must be >= 1")
        if self.heads > 1:
            raise ValueError("VectorQuantize: topk does not go with heads")
        for other in ("commitment_use_cross_entropy_loss", "in_place_codebook_optimizer"):
            if self.training and getattr(self, other):
                raise ValueError(f"VectorQuantize: topk does not go with {other} in training")
        return min(int(topk), self.codebook_size)

    def _loss(self, parts: tuple[Tensor, ...], codes: list[Tensor], masks: tuple[Tensor | None, ...],
              outs: list[Part], terms: LossBreakdown, k: int | None
              ) -> tuple[Tensor, LossBreakdown]:  # fmt: skip
        """(the loss, its terms)"""
        loss, cosine = terms.commitment, self.use_cosine_sim
        if (self.training and self.has_commitment_loss) or (k is not None and not self.training):
            if self.training and self.commitment_use_cross_entropy_loss:
                chosen = [o.indices for o in outs]
                commit = losses.cross_entropy(parts, codes, chosen, masks, cosine)
            else:
                commit = outs[0].commit if len(outs) == 1 else torch.stack([o.commit for o in outs]).mean()
            loss = loss + commit * (self.commitment_weight if self.has_commitment_loss else 1)
            terms = terms._replace(commitment=commit)
        if self.training and self.codebook_diversity_loss_weight > 0:
            shared = self.heads > 1 and not self.separate
            diversity = losses.diversity(
                parts, codes, masks, cosine, self.codebook_diversity_temperature, shared
            )
            loss = loss + diversity * self.codebook_diversity_loss_weight
            terms = terms._replace(codebook_diversity=diversity)
        if self.training and self.orthogonal_reg_weight > 0:
            used = outs[0].indices if self.orthogonal_reg_active_codes_only else None
            orthogonal = losses.orthogonal(self._codebook.embed, used, self.orthogonal_reg_max_codes)
            loss = loss + orthogonal * self.orthogonal_reg_weight
            terms = terms._replace(orthogonal_reg=orthogonal)
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            loss = loss if loss.requires_grad else loss.requires_grad_()  # as the peer's, fit for backward
        return loss, terms

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

    def _own(self, tables: tuple[Tensor, ...], parts: tuple[Tensor, ...],
             transform: Callable[[Tensor], Tensor] | None) -> list[Tensor]:  # fmt: skip
        """Each codebook's codes [K, D], or with a transform each row's [*R, K, D]."""
        if transform is None:
            return list(tables)
        each = transform(torch.stack(tables))
        each = F.normalize(each, dim=-1) if self.use_cosine_sim else each
        if self.heads > 1 and not self.separate:  # [1, B * heads, N, K, D]
            each = each.unflatten(1, (-1, self.heads)).movedim(2, -3)
        return [c.reshape(*p.shape[:-1], *c.shape[-2:]) for p, c in zip(parts, each)]

    def _optimize(self, parts: tuple[Tensor, ...], masks: tuple[Tensor | None, ...], codes: list[Tensor],
                  outs: list[Part]) -> Tensor:  # fmt: skip
        """The codebook's own loss, its gradients, and unless manual the step of its optimizer."""
        with torch.enable_grad():
            each = zip(parts, masks, outs)
            errors = [masked_mean((pick(c, o.indices) - p.detach()).square().mean(-1), m)
                      for c, (p, m, o) in zip(codes, each)]  # fmt: skip
            loss = torch.stack(errors).mean()
        # Not by .backward(): wrappers of the model take that for the end of its own backward pass.
        own = [p for p in self._codebook.parameters() if p.requires_grad]
        for p, g in zip(own, torch.autograd.grad(loss, own, allow_unused=True)):
            if g is not None:
                p.grad = g if p.grad is None else p.grad + g
        if not self.manual_in_place_optimizer_update:
            self.update_in_place_optimizer()
        return loss.detach()

    @torch.no_grad()
    def update_in_place_optimizer(self) -> None:
        """A step of in_place_codebook_optimizer, by the processes' mean gradient."""
        if self.in_place_codebook_optimizer is None:
            return
        processes, _ = world(self._codebook.sync)
        grads = [p.grad for p in self._codebook.parameters() if p.grad is not None]
        for grad, total in zip(grads, all_reduce(grads, processes)):
            if processes > 1:
                grad.copy_(total / processes)
        self.in_place_codebook_optimizer.step()
        self.in_place_codebook_optimizer.zero_grad()

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes before the projection; channel-first where x is."""
        if self.separate:
            each = zip(indices.unbind(-1), self._codebook.tables(False))
            codes = torch.cat([vq_lookup(i, e) for i, e in each], -1)
        else:
            codes = vq_lookup(indices, self._codebook.tables(False)[0])
            codes = codes.flatten(-2) if self.heads > 1 else codes
        return codes.movedim(-1, 1) if self.channel_first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        return self.project_out(self.get_codes_from_indices(indices))

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Move the codebook as if the rows of x had been given these indices."""
        rows = x.movedim(1, -1) if self.channel_first and x.dim() > 2 else x
        self.observe(self.project_in(rows), indices, mask)
        learn([self._codebook])

    def observe(self, h: Tensor, indices: Tensor, mask: Tensor | None) -> None:
        """What `update_indices` does to rows h [..., heads * D], less the step itself."""
        parts, masks = self._split(h, mask)
        each = indices.unbind(-1) if self.separate else (indices,)
        found = [i if m is None else i.masked_fill(~m, -1) for i, m in zip(each, masks)]
        self._codebook.moves, self._codebook.weight = self.ema_update and not self._codebook.manual, None
        self._codebook.observe(parts, found)

    update_ema_indices = update_indices

    def expire_codes_(self, x: Tensor) -> None:
        """Dead codes become rows of x [..., heads * D], as they come out of the projection."""
        self._codebook.expire_codes_(self._split(x, None)[0])
