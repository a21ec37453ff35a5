"""`vector_quantize_pytorch.ResidualVQ` over the fused quantizer."""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...nn.codebook import learn, recomputing
from ...nn.processes import all_reduce, world
from ...ops.vq import vq_lookup
from .losses import directional, masked_mean
from .qinco import MLP
from .quantize import VectorQuantize


class Chain(NamedTuple):
    """What a chain of levels makes of rows [*R, D]."""

    total: Tensor  # [*R, D]
    indices: list[Tensor]  # [*R] each
    losses: list[Tensor]  # [] each
    residuals: list[Tensor]  # [*R, D] each: what came to the level


class ResidualVQ(nn.Module):
    """`vector_quantize_pytorch.ResidualVQ`, version 1.32: its arguments, defaults, outputs and state_dict.

    Args:
        As the peer's. vq_kwargs go to each level's `VectorQuantize`. eval_beam_size needs no beam_size.

    Returns:
        (quantized, indices [..., Q], losses [Q]), and all codes [Q, ..., D] with return_all_codes;
        (quantized, the sum of cross entropies) where the call gives indices.

    As with the peer, each level passes its own straight-through gradient on, so that of the sum is Q times
    the output's; `vaeops.nn.ResidualVQ` passes it on once. Without shared_codebook all codebooks move after
    the last level, with one all-reduce. An implicit codebook needs rows x codes x D numbers at each level.

    Where it differs from the peer, on purpose, beside what `VectorQuantize` says:
        - Given indices work; the peer raises. The residual is that of the level's own code.
        - With a beam all levels learn, the peer's first alone; it works without a commitment loss, with
          implicit, affine and small codebooks, k-means and images too, where the peer raises.
        - Images work; the peer raises. Frozen levels stay, whoever froze them; the peer forgets
          freeze_codebook of the constructor, and with a beam that of the call.
        - A shared codebook with in_place_codebook_optimizer moves, once a call; the peer's never does.
        - diveq adds noise in training alone; the peer's output in eval is random.
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
        weights = beam_score_quantizer_weights
        if weights is not None and len(weights) != len(codebook_size):
            raise ValueError(
                f"ResidualVQ: beam_score_quantizer_weights must have {len(codebook_size)} elements, "
                f"one of each quantizer, got {len(weights)}"
            )
        inner = dim if codebook_dim is None else codebook_dim
        self.has_projections = inner != dim
        self.project_in = nn.Linear(dim, inner) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(inner, dim) if self.has_projections else nn.Identity()
        if shared_codebook:
            vq_kwargs |= {"manual_ema_update": True, "manual_in_place_optimizer_update": True}
        if implicit_neural_codebook:
            vq_kwargs |= {"learnable_codebook": True, "ema_update": False}
        if diveq:
            vq_kwargs |= {"ema_update": False, "learnable_codebook": True, "route_gradients_to_input": False,
                          "commitment_weight": 0.0}  # fmt: skip
        layers = [
            VectorQuantize(inner, size, inner,
                           return_zeros_for_masked_padding=return_zeros_for_masked_padding, **vq_kwargs)
            for size in codebook_size
        ]  # fmt: skip
        for layer in layers:
            layer.deferred = not shared_codebook
            if shared_codebook:
                layer._codebook = layers[0]._codebook
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.mlps: nn.ModuleList | None = None
        if implicit_neural_codebook:
            self.mlps = nn.ModuleList(MLP(inner, **(mlp_kwargs or {})) for _ in layers[1:])
        self.beam_size = beam_size
        self.eval_beam_size = beam_size if eval_beam_size is None else eval_beam_size
        self.beam_weights = [1.0] * len(layers) if weights is None else list(weights)
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

    def forward(self, x: Tensor, mask: Tensor | None = None, indices: Tensor | list[Tensor] | None = None,
                return_all_codes: bool = False, sample_codebook_temp: float | None = None,
                freeze_codebook: bool = False, beam_size: int | None = None,
                rand_quantize_dropout_fixed_seed: int | None = None) -> tuple:  # fmt: skip
        """x [B, N, dim]; [B, dim, H, W] with accept_image_fmap. mask bool [B, N], True = use.

        indices [B, N, Q], -1 for none: returns (quantized, the sum over levels of the cross entropies).
        """
        if isinstance(indices, list):
            indices = torch.stack(indices)
        beam = beam_size or (self.beam_size if self.training else self.eval_beam_size) or 1
        if beam > 1 and indices is not None:
            raise ValueError("ResidualVQ: indices do not go with a beam search, give beam_size=1")
        levels = self.num_quantizers
        if indices is None and self.training and self.quantize_dropout:
            levels = self._levels(x.device, rand_quantize_dropout_fixed_seed)
        call = {"sample_codebook_temp": sample_codebook_temp, "freeze_codebook": freeze_codebook or None}
        rows = x.movedim(1, -1) if self.accept_image_fmap else x
        h = self.project_in(rows)
        if beam > 1:
            chain = self._search(h, mask, levels, beam, call)
        else:
            chain = self._chain(h, mask, levels, indices, call)
        if self.training and not freeze_codebook and not recomputing():
            self._learn(chain, mask if beam > 1 else None, observe=beam > 1)

        total = directional(h, chain.total, 5e-3) if self.diveq and self.training else chain.total
        y = self.project_out(total)
        if mask is not None:
            rest = torch.zeros_like(y) if self.return_zeros_for_masked_padding else rows
            y = torch.where(mask.unsqueeze(-1), y, rest)
        y = y.movedim(-1, 1) if self.accept_image_fmap else y
        if indices is not None:
            return y, torch.stack(chain.losses).sum()
        missing = self.num_quantizers - levels
        found = torch.stack(chain.indices + [torch.full_like(chain.indices[0], -1)] * missing, -1)
        losses = torch.stack(chain.losses + [torch.zeros_like(chain.losses[0])] * missing)
        return (
            (y, found, losses, self.get_codes_from_indices(found)) if return_all_codes else (y, found, losses)
        )

    def _chain(self, h: Tensor, mask: Tensor | None, levels: int, indices: Tensor | None,
               call: dict[str, Any]) -> Chain:  # fmt: skip
        """Each level takes what the nearest code of the one before leaves over."""
        chain = Chain(torch.zeros_like(h), [], [], [])
        residual, total = h, chain.total
        for i, layer in enumerate(self.layers[:levels]):
            chain.residuals.append(residual)
            transform = self._transform(i, total)
            if indices is not None:
                quantized, loss = layer(
                    residual, indices[..., i], mask, codebook_transform_fn=transform, **call
                )
            else:
                quantized, found, loss = layer(residual, None, mask, codebook_transform_fn=transform, **call)
                chain.indices.append(found)
            residual = residual - self._passed(quantized)
            total = total + quantized
            chain.losses.append(loss)
        return chain._replace(total=total)

    def _search(self, h: Tensor, mask: Tensor | None, levels: int, beam: int, call: dict[str, Any]) -> Chain:
        """The best of the `beam` chains [*R, J] that are kept at each level; J is `beam` at most.

        Each chain goes on with the `beam` nearest codes; those with the smallest sum of losses are kept.
        """
        residual, score = h.unsqueeze(-2), torch.zeros_like(h[..., :1])
        total = torch.zeros_like(residual)
        found: list[Tensor] = []
        losses: list[Tensor] = []
        residuals: list[Tensor] = []
        for i, layer in enumerate(self.layers[:levels]):
            used = None if mask is None else mask.unsqueeze(-1).expand(residual.shape[:-1])
            transform = self._transform(i, total)
            quantized, index, loss = layer(
                residual, None, used, topk=beam, codebook_transform_fn=transform, **call
            )
            cost = loss.detach()
            if loss.dim() == 0:  # no commitment loss
                cost = (quantized.detach() - residual.detach().unsqueeze(-2)).square().mean(-1)
                cost, loss = cost if used is None else cost * used.unsqueeze(-1), loss.expand(index.shape)
            score = (score.unsqueeze(-1) - cost * self.beam_weights[i]).flatten(-2)
            kept = min(beam, score.shape[-1]) if i + 1 < levels else 1
            score, best = score.topk(kept, -1)
            chosen = best // index.shape[-1]  # which chain each of the kept goes on with
            residual, total = _take(residual, chosen), _take(total, chosen)
            residuals = [_take(r, chosen) for r in residuals] + [residual]
            found = [f.gather(-1, chosen) for f in found] + [index.flatten(-2).gather(-1, best)]
            losses = [v.gather(-1, chosen) for v in losses] + [loss.flatten(-2).gather(-1, best)]
            quantized = _take(quantized.flatten(-3, -2), best)
            residual = residual - self._passed(quantized)
            total = total + quantized
        means = [masked_mean(v.squeeze(-1), mask) for v in losses]
        rows = [r.squeeze(-2) for r in residuals]
        return Chain(total.squeeze(-2), [f.squeeze(-1) for f in found], means, rows)

    def _passed(self, quantized: Tensor) -> Tensor:
        """The codes as the next level subtracts them, with their gradient or a part of it."""
        passed = quantized.detach()
        if self.quant_grad_frac > 0:
            passed = self.quant_grad_frac * quantized + (1 - self.quant_grad_frac) * passed
        return passed

    def _transform(self, level: int, total: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Codes [1, K, D] of a level as those for each row [1, *R, K, D], given the sum so far [*R, D]."""
        if level == 0 or self.mlps is None:
            return None
        mlp = self.mlps[level - 1]
        return lambda codes: mlp(codes, total.unsqueeze(-2)).unsqueeze(0)

    def _levels(self, device: torch.device, seed: int | None) -> int:
        """How many levels a call in training uses with dropout."""
        if seed is None:
            processes, _ = world(True)
            drawn = torch.randint(10_000, (), device=device if processes > 1 else None)
            seed = int(all_reduce([drawn], processes)[0])
        last = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return min(-(-(last + 1) // multiple) * multiple, self.num_quantizers)

    @torch.no_grad()
    def _learn(self, chain: Chain, mask: Tensor | None, observe: bool) -> None:
        """observe: the levels have not seen their rows, because a search chose the codes."""
        layers = [layer for layer in self.layers[: len(chain.residuals)] if not layer.freeze_codebook]
        for layer, rows, found in zip(layers, chain.residuals, chain.indices if observe else ()):
            if layer._codebook.tracks:
                layer.observe(rows, found, mask)
                if self.shared_codebook:
                    learn([layer._codebook])
        books = [layer._codebook for layer in layers]
        if not self.shared_codebook:
            learn([b for b in books if b.tracks])
        elif books:
            if books[0].ema:
                books[0].update_ema()
            layers[0].update_in_place_optimizer()
            layers[0].expire_codes_(torch.stack([r.detach() for r in chain.residuals], -2))

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """indices [..., Q'], Q' <= Q -> codes [Q, ..., D]; 0 at -1 and at levels that are left out."""
        missing = self.num_quantizers - indices.shape[-1]
        if missing:
            if not self.quantize_dropout:
                raise ValueError("ResidualVQ: fewer indices than quantizers need quantize_dropout")
            indices = torch.nn.functional.pad(indices, (0, missing), value=-1)
        codes: list[Tensor] = []
        total: Tensor | None = None
        for level, (layer, index) in enumerate(zip(self.layers, indices.unbind(-1))):
            code = vq_lookup(index, layer._codebook.tables(False)[0])
            if self.mlps is not None and total is not None:
                code = self.mlps[level - 1](code, total).masked_fill(index.unsqueeze(-1) < 0, 0)
            total = code if total is None else total + code
            codes.append(code)
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        return self.project_out(self.get_codes_from_indices(indices).sum(0))


def _take(rows: Tensor, at: Tensor) -> Tensor:
    """Rows [*R, J, D] at [*R, k]: [*R, k, D]."""
    return rows.gather(-2, at.unsqueeze(-1).expand(*at.shape, rows.shape[-1]))
