"""Vector quantization: the nearest code alone, and a whole training step.

A row of ours must choose the very code of the definition. A rival works in fp32 and may miss it by rounding:
its choice has to be as near as fp32 can tell, that of our fast search as near as bf16 can.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import vaeops

from ..case import COMPILE, Inputs, Row, our_impls

FAST = "vaeops, fast"
_PROBE = 512  # rows that are checked: the definition in fp64 is far too slow for all


def textbook(x: Tensor, codebook: Tensor) -> Tensor:
    """|x|^2 + |e|^2 - 2 x.e, as taming-transformers and its descendants write it."""
    distance = x.pow(2).sum(1, keepdim=True) + codebook.pow(2).sum(1) - 2 * x @ codebook.t()
    return distance.argmin(1)


def cdist(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(x, codebook).argmin(1)


def faiss_knn(x: Tensor, codebook: Tensor) -> Tensor:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return torch.from_numpy(faiss.knn(x.numpy(), codebook.numpy(), 1)[1][:, 0])


def flash_kmeans(x: Tensor, codebook: Tensor) -> Tensor:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    return euclid_assign_triton(x[None], codebook[None], x.pow(2).sum(1)[None])[0]


def _probe(x: Tensor) -> slice:
    return slice(None, None, max(1, x.shape[0] // _PROBE))


def _scores(x: Tensor, codebook: Tensor) -> Tensor:
    return (codebook.double() ** 2).sum(1) / 2 - x.double() @ codebook.double().t()


def _gap_share(x: Tensor, codebook: Tensor, score: Tensor, rounding: float) -> float:
    """How much worse than the best score, over what is allowed: `rounding` times |x|^2 + max |e|^2."""
    best = _scores(x, codebook).amin(1)
    size = x.double().pow(2).sum(1) + codebook.double().pow(2).sum(1).amax()
    return float(((score - best) / (rounding * size)).amax())


def _sums_in_fp32(x: Tensor) -> float:
    """What sums over D can lose in fp32."""
    return x.shape[1] * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class AssignCase:
    n: int
    k: int
    d: int
    small: bool = False
    family: str = "vq"
    dtype: torch.dtype = torch.float32
    ceiling: str = "matmul"
    work_backward: int = 0
    memory: str = "peak"

    @property
    def name(self) -> str:
        return f"{self.n}x{self.k}x{self.d}"

    @property
    def elements(self) -> int:
        return self.n * self.k

    @property
    def work_forward(self) -> int:
        return 2 * self.n * self.k * self.d

    def inputs(self, device: torch.device) -> Inputs:
        shapes = (self.n, self.d), (self.k, self.d)
        return Inputs(tuple(torch.randn(shape, device=device) for shape in shapes), None)

    def rows(self, device: torch.device, compiled: bool) -> list[Row]:
        def row(name: str, assign: Callable[..., Tensor], **options) -> Row:
            return Row(name, lambda *leaves: (assign(*leaves, **options),), ours=name.startswith("vaeops"))

        rows = [row("eager", textbook), row("torch.cdist", cdist)]
        if compiled:
            rows.append(row(COMPILE, torch.compile(textbook, fullgraph=True, dynamic=False)))
        if device.type == "cpu" and importlib.util.find_spec("faiss"):
            rows.append(row("faiss", faiss_knn))
        if device.type == "cuda" and importlib.util.find_spec("flash_kmeans"):
            rows.append(row("flash-kmeans", flash_kmeans))
        rows += [row(name, vaeops.vq_assign, impl=impl) for name, impl in our_impls(device, "vq_assign")]
        rows.append(row(FAST, vaeops.vq_assign, precision="fast"))
        return rows

    def check(self, row: Row, inputs: Inputs) -> dict[str, float]:
        x, codebook = inputs.leaves
        (indices,) = row.call(x, codebook)
        x, indices = x[_probe(x)], indices[_probe(x)]
        chosen = _scores(x, codebook).gather(1, indices[:, None].long())[:, 0]
        if row.name == FAST:
            # Operands in bf16 lose 2^-8 |x| |e| a score at most, and two scores are compared.
            return {"gap": _gap_share(x, codebook, chosen, torch.finfo(torch.bfloat16).eps / 2)}
        shares = {"gap": _gap_share(x, codebook, chosen, _sums_in_fp32(x))}
        if row.ours:
            wrong = indices != vaeops.vq_assign(x, codebook, impl="ref")
            shares["wrong rows"] = float("inf") if bool(wrong.any()) else 0.0
        return shares


class _Layer:
    """A quantizer in training, as a row calls it: (quantized, loss). Both libraries name their state so."""

    def __init__(self, module: torch.nn.Module, outputs: Callable[..., tuple]) -> None:
        self.module, self.outputs = module.train(), outputs

    @torch.no_grad()
    def load(self, codebook: Tensor) -> None:
        state = self.module.get_submodule("_codebook")
        state.embed.copy_(codebook)
        state.embed_avg.copy_(codebook)
        state.cluster_size.fill_(1)

    def __call__(self, x: Tensor, codebook: Tensor) -> tuple:
        return self.outputs(self.module(x))


@dataclass(frozen=True)
class TrainingCase(AssignCase):
    """Assign, gather, straight-through, commitment loss, EMA update, and the backward of it all."""

    family: str = "vq-training"
    work_backward: int = 1  # the gradient of x: nothing beside the assignment

    def inputs(self, device: torch.device) -> Inputs:
        x, codebook = super().inputs(device).leaves
        return Inputs((x.requires_grad_(), codebook), torch.randn_like(x))

    def rows(self, device: torch.device, compiled: bool) -> list[Row]:
        rows = []
        if importlib.util.find_spec("vector_quantize_pytorch"):
            from vector_quantize_pytorch import VectorQuantize

            peer = VectorQuantize(self.d, self.k, decay=0.99, rotation_trick=False).to(device)
            rows.append(Row("lucidrains", _Layer(peer, lambda out: (out[0], out[2].sum()))))
        ours = vaeops.nn.VectorQuantize(self.d, self.k, decay=0.99).to(device)
        layer = _Layer(ours, lambda out: (out.quantized, out.commit_loss))
        return [*rows, Row(our_impls(device, "vq_assign")[0][0], layer, ours=True)]

    def check(self, row: Row, inputs: Inputs) -> dict[str, float]:
        x, codebook = inputs.leaves
        assert isinstance(row.call, _Layer)
        row.call.load(codebook)
        quantized, loss = row.call(x, codebook)
        x, quantized = x.detach(), quantized.detach()
        mean = (x.double() - quantized.double()).pow(2).mean()
        shares = {"loss": float((loss.detach().double() - mean).abs() / (mean * 1e-5))}
        x, quantized = x[_probe(x)], quantized[_probe(x)]
        score = (quantized.double() ** 2).sum(1) / 2 - (x.double() * quantized.double()).sum(1)
        return shares | {"gap": _gap_share(x, codebook, score, _sums_in_fp32(x))}


CASES = [
    AssignCase(65536, 1024, 64),
    AssignCase(16384, 8192, 64),
    AssignCase(16384, 8192, 256),
    AssignCase(16384, 16384, 8),
    AssignCase(1024, 512, 64, small=True),
    TrainingCase(16384, 8192, 64),
]
