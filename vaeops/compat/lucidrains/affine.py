"""A codebook that follows the scale and the offset of the rows at once, not code by code."""

from typing import Any

import torch
from torch import Tensor

from ...nn.processes import all_reduce, world
from ...ops.vq.quantize import finite_rows
from .codebook import Codebook


class AffineCodebook(Codebook):
    """Codes are looked up as (e - mean_e) std_x / std_e + mean_x; averages get the rows mapped back.

    The moments are moving averages over batches in training: of the codes with `codes_decay`, of the used,
    finite rows with `rows_decay`. Before the first batch, codes are looked up as they are.

    Source: Huh et al., "Straightening Out the Straight-Through Estimator", 2023, section 4.1.
    """

    batch_mean: Tensor | None
    batch_variance: Tensor | None
    codebook_mean: Tensor
    codebook_variance: Tensor
    codebook_mean_needs_init: Tensor
    codebook_variance_needs_init: Tensor

    def __init__(self, *args: Any, rows_decay: float, codes_decay: float, joined: bool, **options: Any):
        super().__init__(*args, **options)
        self.rows_decay, self.codes_decay, self.joined = rows_decay, codes_decay, joined
        heads, _, dim = self.embed.shape
        for name, start in (("mean", 0.0), ("variance", 1.0)):
            self.register_buffer(f"batch_{name}", None)
            self.register_buffer(f"codebook_{name}_needs_init", torch.tensor(True))
            self.register_buffer(f"codebook_{name}", torch.full((heads, 1, dim), start))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in ("batch_mean", "batch_variance"):  # in the state from the first batch on
            setattr(self, name, torch.empty_like(self.codebook_mean) if prefix + name in state_dict else None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def see(self, xs: tuple[Tensor, ...], masks: tuple[Tensor | None, ...]) -> None:
        processes, _ = world(self.joined)
        embed = self.embed.detach()
        moments = [embed.mean(1, keepdim=True), embed.var(1, unbiased=False, keepdim=True)]
        if self.batch_mean is not None:
            old = (self.codebook_mean, self.codebook_variance)
            moments = [o.lerp(m, 1 - self.codes_decay) for o, m in zip(old, moments)]
        self.codebook_mean, self.codebook_variance = moments
        self.codebook_mean_needs_init = self.codebook_variance_needs_init = torch.zeros_like(self.initted)

        used = [finite_rows(x) if m is None else finite_rows(x) & m for x, m in zip(xs, masks)]
        rows = [torch.where(u.unsqueeze(-1), x, 0).flatten(0, -2).to(embed.dtype) for x, u in zip(xs, used)]
        count = torch.stack([u.sum() for u in used]).to(embed.dtype)[:, None, None]
        sums = torch.stack([r.sum(0, keepdim=True) for r in rows])
        count, sums = all_reduce([count, sums], processes)
        mean = sums / count.clamp(min=1)
        away = [(r - m) * u.reshape(-1, 1) for r, m, u in zip(rows, mean, used)]
        (squares,) = all_reduce([torch.stack([a.square().sum(0, keepdim=True) for a in away])], processes)
        old, rate = (self.codebook_mean, self.codebook_variance), 1.0
        if self.batch_mean is not None and self.batch_variance is not None:
            old, rate = (self.batch_mean, self.batch_variance), 1 - self.rows_decay
        seen = (mean, squares / count.clamp(min=1))
        self.batch_mean, self.batch_variance = (
            torch.where(count > 0, o.lerp(m, rate), o) for o, m in zip(old, seen)
        )

    def tables(self, updates: bool) -> tuple[Tensor, ...]:
        tables = super().tables(updates)
        if self.batch_mean is None:
            return tables
        mapped = (torch.stack(tables) - self.codebook_mean) / self._ratio() + self.batch_mean
        return mapped.unbind(0)

    def own_rows(self, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.batch_mean is None:
            return xs
        each = zip(xs, self.batch_mean, self.codebook_mean, self._ratio())
        return tuple(((x - b[0]) * ratio[0] + c[0]).to(x.dtype) for x, b, c, ratio in each)

    def _ratio(self) -> Tensor:
        """std_e / std_x [H, 1, D]"""
        assert self.batch_variance is not None
        return (self.codebook_variance.clamp(min=1e-5) / self.batch_variance.clamp(min=1e-5)).sqrt()
