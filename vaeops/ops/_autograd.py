"""Every derivative of an op, built once from its kernels.

No one entry point of PyTorch serves everything: `register_autograd` knows no torch.func and returns silent zeros for
forward AD; a Function with a `jvp` breaks compile; a Function with `setup_context` costs 20 us a call more than one whose
forward takes `ctx`. So an op gets three Functions over the same two kernels, and `Differentiable` picks:

    plain eager            forward takes ctx; backward runs the kernel, or the reference's formula when a graph is being
                           made of it (double backward)
    torch.compile, export  setup_context, no jvp
    torch.func, forward AD setup_context, vmap and jvp; backward is itself such a Function, so transforms nest

Conventions of an op with T tensor arguments (each may be None), followed by plain Python options:
    forward kernel   (*tensors, *options) -> tuple of outputs
    backward kernel  (*output gradients, *tensors, *options) -> one gradient per tensor of `wrt`, no elements for None
    reference        backward's formula in differentiable PyTorch, None for None
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ._library import IMPLS, overloads

_is_compiling = torch.compiler.is_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_is_grad_enabled = torch.is_grad_enabled


def _forward_ad_active() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


class Differentiable:
    """`op(impl, *tensors, *options)`: the low-level op with every derivative.

    name        forward op; `name_bwd` style partner in `backward`
    tensors     how many leading arguments are tensors; the first `wrt` of them have gradients
    reference   the backward formula in differentiable PyTorch
    fold_fwd, fold_bwd   the op on arguments of which some carry a vmapped dim: (info, in_dims, args, call) -> outputs,
                all with the vmapped dim in front, made by a call of the op on more rows
    """

    def __init__(self, forward: str, backward: str, *, outputs: int, tensors: int, wrt: int, reference: Callable,
                 fold_fwd: Callable, fold_bwd: Callable) -> None:  # fmt: skip
        fwd, bwd = overloads(forward), overloads(backward)
        self._fwd = {impl: op._op for impl, op in fwd.items()}  # ._op skips a Python frame
        build = (outputs, tensors, wrt, reference, fold_fwd, fold_bwd)
        by_impl = {impl: _functions(fwd[impl], bwd[impl], *build) for impl in (None, *IMPLS)}
        self._eager = {impl: f[0] for impl, f in by_impl.items()}
        self._traced = {impl: f[1] for impl, f in by_impl.items()}
        self._transformed = {impl: f[2] for impl, f in by_impl.items()}
        self._wrt = wrt

    def __call__(self, impl: str | None, *args: Any) -> tuple[Tensor, ...]:
        if _is_compiling():
            return self._traced[impl].apply(*args)
        if _functorch_active() or _forward_ad_active():
            return self._transformed[impl].apply(*args)
        if _is_grad_enabled() and any(t is not None and t.requires_grad for t in args[: self._wrt]):
            return self._eager[impl](*args)
        return self._fwd[impl](*args)


def _functions(fwd, bwd, outputs, tensors, wrt, reference, fold_fwd, fold_bwd):
    fwd_op, bwd_op = fwd._op, bwd._op

    def pad(grads: tuple, saved: tuple, options: tuple) -> tuple:
        """Kernel gradients to one per forward argument: None for absent tensors, seeds and options."""
        present = [g if t is not None else None for g, t in zip(grads, saved[:wrt])]
        return *present, *[None] * (tensors - wrt + len(options))

    class Eager(Function):
        @staticmethod
        def forward(ctx, *args):
            ctx.save_for_backward(*args[:tensors])
            ctx.options = args[tensors:]
            ctx.set_materialize_grads(False)
            return fwd_op(*args)

        @staticmethod
        def backward(ctx, *grads):
            kernel = reference if _is_grad_enabled() else bwd_op
            return pad(kernel(*grads, *ctx.saved_tensors, *ctx.options), ctx.saved_tensors, ctx.options)

    class Traced(Function):
        @staticmethod
        def forward(*args):
            return fwd(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs[:tensors])
            ctx.options = inputs[tensors:]
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, *grads):
            # AOTAutograd materializes a gradient of the output that was not asked for: zeros of its shape, [0].
            grads = tuple(None if g is not None and g.shape == (0,) else g for g in grads)
            return pad(bwd(*grads, *ctx.saved_tensors, *ctx.options), ctx.saved_tensors, ctx.options)

    class TransformedBackward(Function):
        @staticmethod
        def forward(*args):
            return bwd(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs[: outputs + tensors])
            ctx.save_for_forward(*inputs[: outputs + tensors])
            ctx.options = inputs[outputs + tensors :]
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, *grads):
            saved, options = ctx.saved_tensors, ctx.options
            present = [i for i, t in enumerate(saved[: outputs + wrt]) if t is not None]
            wanted = [i for i in range(wrt) if saved[outputs + i] is not None and grads[i] is not None]

            def formula(*live):
                full = list(saved)
                for i, t in zip(present, live):
                    full[i] = t
                result = reference(*full, *options)
                return tuple(result[i] for i in wanted)

            _, pullback = torch.func.vjp(formula, *(saved[i] for i in present))
            found = dict(zip(present, pullback(tuple(grads[i] for i in wanted))))
            return *[found.get(i) for i in range(len(saved))], *[None] * len(options)

        @staticmethod
        def jvp(ctx, *tangents):
            saved, options = ctx.saved_tensors, ctx.options
            live = [i for i in range(outputs + wrt) if saved[i] is not None and tangents[i] is not None]

            def formula(*primals):
                full = list(saved)
                for i, t in zip(live, primals):
                    full[i] = t
                result = reference(*full, *options)
                return tuple(result[i] for i in range(wrt) if result[i] is not None)

            found = iter(_jvp(formula, [saved[i] for i in live], [tangents[i] for i in live]))
            given = saved[outputs : outputs + wrt]
            return tuple(next(found) if t is not None else saved[outputs].new_zeros(0) for t in given)

        @staticmethod
        def vmap(info, in_dims, *args):
            return _folded(fold_bwd(info, in_dims, args, TransformedBackward.apply))

    class Transformed(Function):
        @staticmethod
        def forward(*args):
            return fwd(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs[:tensors])
            ctx.save_for_forward(*inputs[:tensors])
            ctx.options = inputs[tensors:]
            ctx.shapes = [(o.shape, o.dtype) for o in (output if outputs > 1 else (output,))]
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, *grads):
            result = TransformedBackward.apply(*grads, *ctx.saved_tensors, *ctx.options)
            return pad(result, ctx.saved_tensors, ctx.options)

        @staticmethod
        def jvp(ctx, *tangents):
            saved, options = ctx.saved_tensors, ctx.options
            live = [i for i in range(wrt) if saved[i] is not None and tangents[i] is not None]
            filled = [i for i, (shape, _) in enumerate(ctx.shapes) if shape != (0,)]

            # The gradient formula is linear in the output gradients; its transpose is the forward derivative.
            def formula(*grads):
                full = [None] * outputs
                for i, g in zip(filled, grads):
                    full[i] = g
                result = reference(*full, *saved, *options)
                return tuple(result[i] for i in live)

            zeros = [saved[0].new_zeros(shape, dtype=dtype) for shape, dtype in (ctx.shapes[i] for i in filled)]
            _, transpose = torch.func.vjp(formula, *zeros)
            found = dict(zip(filled, transpose(tuple(tangents[i] for i in live))))
            result = tuple(found.get(i, saved[0].new_zeros(0, dtype=ctx.shapes[i][1])) for i in range(outputs))
            return result if outputs > 1 else result[0]

        @staticmethod
        def vmap(info, in_dims, *args):
            return _folded(fold_fwd(info, in_dims, args, Transformed.apply))

    # _FunctionBase.apply: Function.apply's argument binding and functorch check are of no use in plain eager.
    return super(Function, Eager).apply, Traced, Transformed


def _folded(result: Tensor | tuple[Tensor, ...]) -> tuple:
    """Outputs with their vmapped dims: in front, none for one that was not asked for."""
    if isinstance(result, Tensor):
        return result, 0
    return result, tuple(None if r.shape == (0,) else 0 for r in result)


def _jvp(formula: Callable, primals: list[Tensor], tangents: list[Tensor]) -> tuple[Tensor, ...]:
    """Forward derivative by transposing the reverse one twice: needs no forward AD inside forward AD."""
    outputs, pullback = torch.func.vjp(formula, *primals)
    _, transpose = torch.func.vjp(lambda *g: pullback(g), *(torch.zeros_like(o) for o in outputs))
    return transpose(tuple(tangents))
