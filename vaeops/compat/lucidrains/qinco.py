"""Implicit neural codebooks: the codes of a level, as the levels before it make them."""

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Codes of a level, given what the levels before it have quantized to: a residual network of both.

        h = W [condition, code] + b,   h += f_i(h) for each layer i
    codes and condition [..., D], broadcast against each other.

    Source: Huijben et al., "Residual Quantization with Implicit Neural Codebooks", 2024.
    """

    def __init__(self, dim: int, dim_hidden: int | None = None, depth: int = 4) -> None:
        super().__init__()
        hidden = dim if dim_hidden is None else dim_hidden
        self.proj_in = nn.Linear(2 * dim, dim)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim)) for _ in range(depth)
        )

    def forward(self, codes: Tensor, condition: Tensor) -> Tensor:
        # One linear map each: their [condition, code] pairs would be rows x codes x 2 D numbers.
        of_condition, of_code = self.proj_in.weight.chunk(2, 1)
        h = F.linear(condition, of_condition, self.proj_in.bias) + F.linear(codes, of_code)
        for layer in self.layers:
            h = h + layer(h)
        return h
