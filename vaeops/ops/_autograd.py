"""Every derivative of an op, built once from its kernels.

No one entry point of PyTorch serves everything: `register_autograd` knows no torch.func and returns silent
zeros for forward AD; a Function with a `jvp` breaks compile; a Function with `setup_context` costs 20 us a
call more than one whose forward takes `ctx`. So an op gets three Functions over the same two kernels, and
`Differentiable` picks:

    plain eager            forward takes ctx; backward runs the kernel, or the reference's formula when
                           a graph is being made of it (double backward)
    torch.compile, export  setup_context, no jvp
    torch.func, forward AD setup_context, vmap and jvp; backward is itself such a Function, so transforms nest

Conventions of an op with T tensor arguments (each may be None), followed by plain Python options:
    forward kernel   (*tensors, *options) -> outputs, None for one that was not asked for
    backward kernel  (*output gradients, *tensors, *kept outputs, *options) -> a gradient per tensor of `wrt`,
                     None for None
    reference        backward's formula in differentiable PyTorch, a function of the tensors: what it is given
                     as kept outputs it makes again
The Functions take the options as one tuple: autograd handles every argument it is given.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_dynamic_layer_stack_depth as _functorch_depth
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter as _functorch_top
from torch.autograd import Function, forward_ad

from ._library import IMPLS, overloads

_is_compiling = torch.compiler.is_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_is_grad_enabled = torch.is_grad_enabled


class Differentiable:
    """`op(impl, *tensors, *options)`: the low-level op with every derivative.

    name        what users call it, for errors
    forward, backward   the low-level ops
    tensors     how many leading arguments are tensors; the first `wrt` of them have gradients
    kept        how many of the last outputs are there for backward alone: they have no gradient
    reference   the backward formula in differentiable PyTorch
    fold_fwd, fold_bwd   the op on tensors of which some carry a vmapped dim:
                (info, in_dims, tensors, options, call) -> outputs, all with the vmapped dim in front, made by
                call(options, *tensors) on more rows
    """

    def __init__(self, name: str, forward: str, backward: str, *, outputs: int, tensors: int, wrt: int,
                 reference: Callable, fold_fwd: Callable, fold_bwd: Callable,
                 kept: int = 0) -> None:  # fmt: skip
        fwd, bwd = overloads(forward), overloads(backward)
        self._op = fwd
        # The same, less a Python frame; Dynamo cannot trace it.
        self._kernel = {impl: op._op for impl, op in fwd.items()}
        build = (name, outputs - kept, kept, tensors, wrt, reference, fold_fwd, fold_bwd)
        by_impl = {impl: _functions(fwd[impl], bwd[impl], *build) for impl in (None, *IMPLS)}
        self._eager = {impl: f[0] for impl, f in by_impl.items()}
        self._traced = {impl: f[1] for impl, f in by_impl.items()}
        self._transformed = {impl: f[2] for impl, f in by_impl.items()}
        self._name, self._wrt = name, wrt

    def __call__(self, impl: str | None, options: tuple, *tensors: Tensor | None) -> Any:
        wants_gradient = False
        if _is_grad_enabled():
            for t in tensors[: self._wrt]:
                if t is not None and t.requires_grad:
                    wants_gradient = True
                    break
        if _is_compiling():
            check_traced(self._name)
            if wants_gradient:
                return self._traced[impl].apply(options, *_distinct(tensors))
            return self._op[impl](*tensors, *options)
        if _functorch_active() or forward_ad._current_level >= 0:
            return self._transformed[impl].apply(options, *tensors)
        if wants_gradient:
            return self._eager[impl](options, *tensors)
        return self._kernel[impl](*tensors, *options)


def check_traced(op: str) -> None:
    """Inside a compiled graph torch.func.grad and jvp would see the bare op, and its derivative as zero.

    Dynamo traces no Function under them. vmap alone is served by the op's own rule.
    """
    if not _is_compiling() or (not _functorch_active() and forward_ad._current_level < 0):
        return
    if _functorch_active() and _functorch_depth() == 1 and _functorch_top().key() == TransformType.Vmap:
        return
    raise NotImplementedError(
        f"{op}: torch.func.grad, jvp and the like do not pass through it inside torch.compile; leave them "
        "out of the compiled function, or differentiate it by torch.autograd"
    )


def forward_mode() -> bool:
    """Whether an input may carry a tangent: it need not require a gradient, and the bare op would lose it.

    A Function without a jvp raises where one does.
    """
    return not _is_compiling() and forward_ad._current_level >= 0


class Once(Function):
    """The identity on a gradient of `op`, whose own derivative, by whichever of its causes, is an error."""

    @staticmethod
    def forward(op, gradient, *causes):
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.op}: there is no double backward")

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError(f"{ctx.op}: there is no double backward")

    @staticmethod
    def vmap(info, in_dims, op, gradient, *causes):
        return Once.apply(op, gradient, *causes), in_dims[1]


def _distinct(tensors: tuple) -> list:
    """The same tensors, each an object of its own: Dynamo refuses a Function that is given one twice."""
    result: list[Tensor | None] = []
    for t in tensors:
        result.append(t.view_as(t) if t is not None and any(t is other for other in result) else t)
    return result


def _functions(fwd, bwd, name, outputs, kept, tensors, wrt, reference, fold_fwd, fold_bwd):
    fwd_op, bwd_op = fwd._op, bwd._op

    def check_tangents(rest):
        if any(t is not None for t in rest):
            raise NotImplementedError(
                f"{name}: noise, targets, weights and masks have no derivative, in forward mode either; pass "
                "them detached"
            )

    nothing = (None,) * (tensors - wrt)
    no_gradient = (None,) * (1 + tensors)

    class Eager(Function):
        @staticmethod
        def forward(ctx, options, *args):
            ctx.options = options
            ctx.set_materialize_grads(False)
            result = fwd_op(*args, *options)
            if kept:
                args = *args, *result[outputs:]
                ctx.mark_non_differentiable(*result[outputs:])
            ctx.save_for_backward(*args)
            return result

        @staticmethod
        def backward(ctx, *grads):
            for g in grads:
                if g is not None:
                    break
            else:  # an undefined gradient reached every output
                return no_gradient
            kernel = reference if _is_grad_enabled() else bwd_op
            return None, *_tuple(kernel(*grads[:outputs], *ctx.saved_tensors, *ctx.options)), *nothing

    def keep(ctx, inputs, result):
        ctx.options, *saved = inputs
        if kept:
            saved += result[outputs:]
            ctx.mark_non_differentiable(*result[outputs:])
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return saved

    class Traced(Function):
        @staticmethod
        def forward(options, *args):
            return fwd(*args, *options)

        @staticmethod
        def setup_context(ctx, inputs, output):
            keep(ctx, inputs, output)

        @staticmethod
        def backward(ctx, *grads):
            return None, *_tuple(bwd(*grads[:outputs], *ctx.saved_tensors, *ctx.options)), *nothing

    class TransformedBackward(Function):
        @staticmethod
        def forward(options, *args):
            return bwd(*args, *options)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.options, *saved = inputs
            ctx.save_for_backward(*saved)
            ctx.save_for_forward(*saved)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, *grads):
            saved, options = ctx.saved_tensors, ctx.options
            present = [i for i, t in enumerate(saved[: outputs + wrt]) if t is not None]
            wanted = [i for i in range(wrt) if grads[i] is not None]
            formula = _partial(reference, saved, options, present, wanted)
            _, pullback = torch.func.vjp(formula, *(saved[i] for i in present))[:2]
            found = dict(zip(present, pullback(tuple(grads[i] for i in wanted))))
            return None, *(found.get(i) for i in range(len(saved)))

        @staticmethod
        def jvp(ctx, _, *tangents):
            saved, options = ctx.saved_tensors, ctx.options
            check_tangents(tangents[outputs + wrt : outputs + tensors])
            live = [i for i in range(outputs + wrt) if tangents[i] is not None]
            given = [i for i in range(wrt) if saved[outputs + i] is not None]
            formula = _partial(reference, saved, options, live, given)
            found = dict(zip(given, _jvp(formula, [saved[i] for i in live], [tangents[i] for i in live])))
            return tuple(found.get(i) for i in range(wrt)) if wrt > 1 else found[0]

        @staticmethod
        def vmap(info, in_dims, options, *args):
            return _folded(fold_bwd(info, in_dims[1:], args, options, TransformedBackward.apply))

    class Transformed(Function):
        @staticmethod
        def forward(options, *args):
            return fwd(*args, *options)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_forward(*keep(ctx, inputs, output))
            ctx.like = [o if o is None else (o.shape, o.dtype) for o in _tuple(output)[:outputs]]

        @staticmethod
        def backward(ctx, *grads):
            gradients = TransformedBackward.apply(ctx.options, *grads[:outputs], *ctx.saved_tensors)
            return None, *_tuple(gradients), *nothing

        @staticmethod
        def jvp(ctx, _, *tangents):
            saved, options = ctx.saved_tensors, ctx.options
            check_tangents(tangents[wrt:])
            live = [i for i in range(wrt) if tangents[i] is not None]
            made = [i for i in range(outputs) if ctx.like[i] is not None]
            # The gradient formula is linear in the output gradients; its transpose is the forward derivative.
            formula = _partial(reference, (*[None] * outputs, *saved), options, made, live)
            zeros = [saved[0].new_zeros(shape, dtype=dtype) for shape, dtype in (ctx.like[i] for i in made)]
            _, transpose = torch.func.vjp(formula, *zeros)[:2]
            found = dict(zip(made, transpose(tuple(tangents[i] for i in live))))
            return tuple(found.get(i) for i in range(outputs + kept)) if outputs + kept > 1 else found[0]

        @staticmethod
        def vmap(info, in_dims, options, *args):
            return _folded(fold_fwd(info, in_dims[1:], args, options, Transformed.apply))

    # _FunctionBase.apply: Function.apply's argument binding and functorch check are of no use in plain eager.
    return super(Function, Eager).apply, Traced, Transformed


def _partial(
    reference: Callable, saved: tuple, options: tuple, free: list[int], wanted: list[int]
) -> Callable:
    """reference(*saved, *options)[wanted] as a function of saved[free]."""

    def formula(*values):
        full = list(saved)
        for i, value in zip(free, values):
            full[i] = value
        result = _tuple(reference(*full, *options))
        return tuple(result[i] for i in wanted)

    return formula


def _tuple(result: Tensor | tuple) -> tuple:
    return (result,) if isinstance(result, Tensor) else result


def _folded(result: Tensor | tuple[Tensor | None, ...]) -> tuple:
    """Outputs with their vmapped dims: in front, none for one that was not asked for."""
    if isinstance(result, Tensor):
        return result, 0
    return result, tuple(None if r is None else 0 for r in result)


def _jvp(formula: Callable, primals: list[Tensor], tangents: list[Tensor]) -> tuple[Tensor, ...]:
    """Forward derivative by transposing the reverse one twice: needs no forward AD inside forward AD."""
    outputs, pullback = torch.func.vjp(formula, *primals)[:2]
    _, transpose = torch.func.vjp(lambda *g: pullback(g), *(torch.zeros_like(o) for o in outputs))[:2]
    return transpose(tuple(tangents))
