"""Calls captured as CUDA graphs and replayed: of small images, launching costs more than computing."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

SHAPES = 8  # captured at a time; each holds memory of its own


class _Capture:
    """One call with static inputs and outputs. It holds `function`, whose tensors the graph reads."""

    def __init__(self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
        self.function = function
        self.inputs = [t.clone() for t in inputs]
        self.graph = torch.cuda.CUDAGraph()
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):  # what happens in a first call only must not be captured
            for _ in range(2):
                function(*self.inputs)
        current.wait_stream(aside)
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = function(*self.inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        for static, given in zip(self.inputs, inputs):
            static.copy_(given)
        self.graph.replay()
        return [t.clone() for t in self.outputs]


class Captured:
    """`captured(key, function, *inputs)` is function(*inputs) without autograd, captured once, then replayed.

    The function must be pure, and the same for equal keys; a call with new shapes, dtypes or device captures
    anew, and the least recently used of more than SHAPES is dropped. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._captures: dict[Hashable, _Capture] = {}

    @staticmethod
    def possible() -> bool:
        """Not while something else captures or compiles."""
        return not (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())

    @torch.inference_mode(False)  # what is captured serves calls outside of it too
    @torch.no_grad()
    def __call__(
        self, key: Hashable, function: Callable[..., Sequence[Tensor]], *inputs: Tensor
    ) -> list[Tensor]:
        key = (key, *((t.shape, t.dtype, t.device) for t in inputs))
        with torch.cuda.device(inputs[0].device):
            capture = self._captures.pop(key, None) or _Capture(function, inputs)
            self._captures[key] = capture
            if len(self._captures) > SHAPES:
                del self._captures[next(iter(self._captures))]
            return capture(inputs)

    def clear(self) -> None:
        self._captures.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Captured":
        return Captured()

    def __reduce__(self) -> tuple:
        return Captured, ()
