"""`audiocraft.quantization.core_vq.EuclideanCodebook`, also encodec's, over the fused quantizer."""

from typing import Any

from torch import Tensor

from ..nn.codebook import Codebook, learn, recomputing
from ..ops.vq import vq_assign, vq_lookup


class EuclideanCodebook(Codebook):
    """A codebook that follows moving averages: its arguments, outputs and state_dict are the peer's.

    Args:
        dim, codebook_size: D, K.
        kmeans_init, kmeans_iters: the first batch starts the codebook.
        decay, epsilon: of the averages.
        threshold_ema_dead_code: a code whose average count falls below it becomes a row of the batch; 0:
            none does.

    Shapes: x [*R, D] -> (quantize [*R, D], indices [*R]); the output has no gradient, as with the peer.
    State: inited [1], a float, cluster_size [K], embed [K, D], embed_avg [K, D].

    Where it differs from the peer, on purpose:
        - Indices are exact; averages stay fp32 in a .half() or .bfloat16() module; a row with NaN or Inf
          touches nothing.
        - Dead codes are replaced after the averages moved, and the averages with them. The peer replaces them
          before, and the same step overwrites the replacement with the stale average.
        - After the k-means start, embed_avg is the sum of a cluster's rows. The peer takes their mean, so the
          next step shrinks every code by its cluster's size.
        - Several processes join their statistics. The peer moves each one's codebook by its own rows and then
          broadcasts the first one's, so that the rows of all others are lost.
    """

    def __init__(self, dim: int, codebook_size: int, kmeans_init: bool = False, kmeans_iters: int = 10,
                 decay: float = 0.99, epsilon: float = 1e-5,
                 threshold_ema_dead_code: float = 2) -> None:  # fmt: skip
        super().__init__(dim, codebook_size, decay=decay, eps=epsilon, kmeans_init=kmeans_init,
                         kmeans_iters=kmeans_iters, revive_below=threshold_ema_dead_code)  # fmt: skip
        self.codebook_size = codebook_size
        self.cluster_size.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.started:
            self.start((x,), (None,))
        (table,) = self.tables(self.training)
        indices = vq_assign(x, table)
        if self.training and not recomputing():
            self.observe((x,), (indices,))
            learn([self])
        return vq_lookup(indices, table), indices

    def encode(self, x: Tensor) -> Tensor:
        """x [*R, D] -> indices [*R]."""
        return vq_assign(x, self.embed[0])

    def decode(self, embed_ind: Tensor) -> Tensor:
        """indices [*R] -> codes [*R, D]."""
        return vq_lookup(embed_ind, self.embed[0])

    quantize, dequantize = encode, decode

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "inited"] = self.initted.to(self.cluster_size.dtype).view(1)
        for name in ("cluster_size", "embed", "embed_avg"):
            buffer = getattr(self, name)[0]
            destination[prefix + name] = buffer if keep_vars else buffer.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        ours = dict(state_dict)
        for name in ("cluster_size", "embed", "embed_avg"):
            if prefix + name in ours:
                ours[prefix + name] = ours[prefix + name].unsqueeze(0)
        if prefix + "inited" in ours:
            ours[prefix + "initted"] = ours.pop(prefix + "inited").bool().view(())
        super()._load_from_state_dict(ours, prefix, *args)
