"""`torch.library` operators: one forward and one backward for every cell and backend.

`flashrnn::forward` and `flashrnn::backward` have fixed arity, fakes for tracing and a registered autograd; the cell
travels as its key, the rest of the `Problem` as plain arguments. An eager call that nothing intercepts runs their
functions without the dispatcher. The gradient of the backward is `vanilla`'s alone: it differentiates `vanilla.scan`
twice; for the other backends it raises.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from flashrnn.backends import BACKENDS, choose, vanilla
from flashrnn.gradients import contiguous, input_gradient, parameter_gradients, previous
from flashrnn.precision import exact_dtype, tf32_allowed
from flashrnn_core.cells import get_cell
from flashrnn_core.contract import Problem

_TENSORS = "Tensor Wx, Tensor R, Tensor b, Tensor? states, Tensor? resets, Tensor? lengths"
_OPTIONS = "str cell, str backend, bool reverse, bool cut, float? clip"
_LIBRARY = torch.library.Library("flashrnn", "DEF")
_LIBRARY.define(f"forward({_TENSORS}, {_OPTIONS}, bool hidden_only, bool record) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    f"backward({_TENSORS}, Tensor out, Tensor saved, Tensor dout, Tensor dlast, {_OPTIONS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def scan(problem: Problem, backend: str, record: bool, Wx, R, b, states, resets, lengths):
    """(states, last_states) of the problem on the backend; differentiable where `record`."""
    tensors = (Wx, R, b, states, resets, lengths)
    direct = _direct(tensors, record)
    if forward_ad._current_level >= 0 and not (backend == "vanilla" and direct and not record):
        _refuse_tangents(tensors)
    if direct and not record:
        return _compute(problem, BACKENDS[backend], *tensors, record)[:2]
    options = (problem.cell.key, backend, problem.reverse, problem.cut, problem.clip, problem.hidden_only, record)
    call = FlashRNN.apply if direct else torch.ops.flashrnn.forward
    return call(*tensors, *options)[:2]


def _refuse_tangents(tensors: tuple[torch.Tensor | None, ...]) -> None:
    """The operators would drop them without a word."""
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "forward-mode derivatives exist on backend 'vanilla' alone, of tensors that require no gradient, in an "
            "eager call; reverse mode, torch.autograd.grad, works on every backend"
        )


_Key = torch._C.DispatchKey
_PLAIN = functools.reduce(  # dispatch keys behind which there is nothing but the operator's function and its autograd
    operator.or_,
    [
        torch._C.DispatchKeySet(key).raw_repr()
        for key in (
            *(_Key.CPU, _Key.CUDA, _Key.AutogradCPU, _Key.AutogradCUDA, _Key.AutocastCPU, _Key.AutocastCUDA),
            *(_Key.ADInplaceOrView, _Key.BackendSelect),
        )
    ],
)


def _direct(tensors: tuple[torch.Tensor | None, ...], record: bool) -> bool:
    """Whether a call may pass the dispatcher by, which takes longer than the rest of a call: where nothing traces,
    transforms, intercepts or profiles, it comes to the operator's own function (and autograd) all the same.
    """
    if torch.compiler.is_compiling() or torch.autograd._profiler_enabled() or has_torch_function(tensors):
        return False
    keys = torch._C._dispatch_tls_local_include_set().raw_repr()  # of this thread: modes, functorch, tracers
    for x in tensors:
        if x is not None:
            keys |= torch._C._dispatch_keys(x).raw_repr()  # its device, subclass, wrapper, pending negation
    if keys & ~_PLAIN:
        return False
    return not (record and torch._C._dispatch_tls_local_exclude_set().has(_Key.AutogradOther))  # in another operator


def _problem(Wx, states, resets, lengths, cell, reverse, cut, clip, hidden_only=False) -> Problem:
    B, T, _, N, D = Wx.shape
    given = Wx.dtype if states is None else states.dtype, resets is not None, lengths is not None
    make = _make_problem.__wrapped__ if _symbolic(Wx) else _make_problem
    return make(cell, B, T, N, D, Wx.dtype, *given, reverse, cut, clip, hidden_only)


def _symbolic(Wx: torch.Tensor) -> bool:
    """Whether a size is a symbol, as in a trace."""
    return not all(isinstance(size, int) for size in Wx.shape)


def _module(backend: str, problem: Problem, Wx: torch.Tensor) -> ModuleType:
    """The backend of a call; a compiled call leaves the choice, and whether the one named can run it, to here."""
    if _symbolic(Wx):
        return BACKENDS[_traced(backend, problem, Wx.device)]
    return BACKENDS[_chosen(backend, problem, Wx.device, tf32_allowed())]


@functools.lru_cache(maxsize=4096)
def _chosen(backend: str, problem: Problem, device: torch.device, tf32: bool) -> str:
    """`choose`, once for each problem and setting of torch's: a compiled call asks each time. What is saved for a
    backward must be what the trace was told: where the backend chosen saves another thing, it is the trace's.
    """
    name = choose(backend, problem, device)
    if backend in BACKENDS:
        return name
    traced = _traced(backend, problem, device)
    return name if _saves(name, problem) == _saves(traced, problem) else traced


def _traced(backend: str, problem: Problem, device: torch.device) -> str:
    """`choose` of a trace, in which B and T may be symbols."""
    return choose(backend, replace(problem, B=16, T=1, N=int(problem.N), D=int(problem.D)), device)


def _saves(name: str, problem: Problem) -> tuple[tuple[int, ...], str | None]:
    """(states, dtype) of what the backend saves."""
    states = BACKENDS[name].saved_states(problem)
    return states, BACKENDS[name].saved_dtype(problem) if states else None


@functools.lru_cache(maxsize=4096)
def _make_problem(cell, B, T, N, D, dtype, state_dtype, *options) -> Problem:
    dtype, state_dtype = (str(x).removeprefix("torch.") for x in (dtype, state_dtype))
    return Problem(get_cell(cell), B, T, N, D, dtype, state_dtype, *options)


def _forward(Wx, R, b, states, resets, lengths, cell, backend, reverse, cut, clip, hidden_only, record):
    problem = _problem(Wx, states, resets, lengths, cell, reverse, cut, clip, hidden_only)
    out, last, saved = _compute(problem, _module(backend, problem, Wx), Wx, R, b, states, resets, lengths, record)
    return out, last, Wx.new_empty(0, dtype=exact_dtype(Wx)) if saved is None else saved


def _compute(problem: Problem, module: ModuleType, Wx, R, b, states, resets, lengths, record: bool):
    if lengths is not None and lengths.device.type == "cpu":
        _check_lengths(lengths, problem.T)
    with _plain(Wx):
        return module.forward(problem, Wx, R, b, states, resets, lengths, record)


def _plain(Wx: torch.Tensor) -> contextlib.AbstractContextManager:
    """No autocast: dtypes are decided."""
    kind = "cuda" if Wx.is_cuda else Wx.device.type
    ambient = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if ambient else contextlib.nullcontext()


def _check_lengths(lengths: torch.Tensor, T: int) -> None:
    """The one check on values: here, where a compiled call and fake tensors have none or pass later."""
    low, high = (int(lengths.min()), int(lengths.max())) if lengths.numel() else (0, 0)
    if low < 0 or high > T:
        raise ValueError(f"lengths: expected values in [0, T] = [0, {T}], got {low} to {high}")


def _fake_forward(Wx, R, b, states, resets, lengths, cell, backend, reverse, cut, clip, hidden_only, record):
    problem = _problem(Wx, states, resets, lengths, cell, reverse, cut, clip, hidden_only)
    dtype = Wx.dtype if states is None else states.dtype
    out = Wx.new_empty(problem.output_shape("states"), dtype=dtype)
    last = Wx.new_empty(problem.output_shape("last_states"), dtype=dtype)
    kept, saved_dtype = _saves(_traced(backend, problem, Wx.device), problem) if record else ((), None)
    if saved_dtype is None:
        return out, last, Wx.new_empty(0, dtype=exact_dtype(Wx))
    shape = (len(kept), *problem.output_shape("states")[1:])
    return out, last, Wx.new_empty(shape, dtype=getattr(torch, saved_dtype))


def _backward(Wx, R, b, states, resets, lengths, out, saved, dout, dlast, cell, backend, reverse, cut, clip, needs):
    problem = _problem(Wx, states, resets, lengths, cell, reverse, cut, clip)
    with _plain(Wx):
        module = _module(backend, problem, Wx)
        kept = module.saved_states(problem)
        h = out[:1]
        if 0 in kept and out.dtype != Wx.dtype:  # h as it met R, where out holds it rounded to another dtype
            saved_h = saved[kept.index(0) :][:1]
            h = saved_h if saved_h.dtype == exact_dtype(Wx) else h.to(exact_dtype(Wx)) + saved_h

        def h_before(start=0, stop=None):
            return previous(problem, h, states, resets, lengths, start, stop, Wx.dtype)[0]

        tensors = (Wx, R, b, states, resets, lengths, out, saved, dout, dlast)
        dpre, dstates = module.backward(problem, *tensors, h_before)
        needs_Wx, needs_R, needs_b, needs_states = needs
        dR, db = parameter_gradients(problem, dpre, h[0], states, resets, lengths, needs_R, needs_b)
        dR, db = _like(R, dR), _like(b, db)  # not in float32 any more when dWx may take as much as dpre
        dWx = input_gradient(problem, dpre) if needs_Wx else None
        return (
            _like(Wx, dWx),
            dR,
            db,
            _like(states, dstates if needs_states else None) if states is not None else Wx.new_empty(0),
        )


def _like(x: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """The gradient in the dtype of x, contiguous; an empty tensor where none was asked for."""
    return x.new_empty(0) if gradient is None else contiguous(gradient.to(x.dtype))


def _fake_backward(
    Wx, R, b, states, resets, lengths, out, saved, dout, dlast, cell, backend, reverse, cut, clip, needs
):
    def like(x, needed):
        return Wx.new_empty(0) if x is None else x.new_empty(x.shape if needed else 0)

    return tuple(like(x, needed) for x, needed in zip((Wx, R, b, states), needs, strict=True))


def _setup_forward(ctx, inputs, output):
    Wx, R, b, states, resets, lengths, *options, hidden_only, record = inputs
    if hidden_only or not record:
        raise RuntimeError("flashrnn::forward: a gradient needs record=True and hidden_only=False")
    out, _, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)  # else zeros of the size of saved, which has no gradient
    ctx.options = options
    ctx.save_for_backward(Wx, R, b, states, resets, lengths, out, saved)


def _autograd_forward(ctx, dout, dlast, _):
    needs, saved = list(ctx.needs_input_grad[:4]), ctx.saved_tensors
    out = saved[6]
    dout = torch.zeros_like(out) if dout is None else dout
    dlast = out.new_zeros(*out.shape[:2], 1, *out.shape[3:], dtype=exact_dtype(saved[0])) if dlast is None else dlast
    tensors = (*saved, dout, dlast)
    direct = not torch.is_grad_enabled() and _direct(tensors, False)
    call: Any = _backward if direct else torch.ops.flashrnn.backward
    gradients = call(*tensors, *ctx.options, needs)
    gradients = [g if needed else None for g, needed in zip(gradients, needs, strict=True)]
    return (*gradients, None, None, *[None] * (len(ctx.options) + 2))


class FlashRNN(torch.autograd.Function):
    """`flashrnn::forward` and its autograd for calls that pass the dispatcher by."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_forward(ctx, inputs, output)
        return output

    backward = staticmethod(_autograd_forward)


def _setup_backward(ctx, inputs, output):
    Wx, R, b, states, resets, lengths, out, saved, dout, dlast, *options, needs = inputs
    cell, backend, *flags = options
    module = _module(backend, _problem(Wx, states, resets, lengths, cell, *flags), Wx)
    if module is not vanilla:
        name = next(name for name, known in BACKENDS.items() if known is module)
        raise RuntimeError(
            f"the gradient of a gradient exists on backend 'vanilla' alone, this call ran on {name!r}: "
            "call flashrnn(..., backend='vanilla') where create_graph=True is needed"
        )
    ctx.options, ctx.needs = options, needs
    ctx.save_for_backward(Wx, R, b, states, resets, lengths, dout, dlast)


def _autograd_backward(ctx, *cotangents):
    Wx, R, b, states, resets, lengths, dout, dlast = ctx.saved_tensors
    cell, _, reverse, cut, clip = ctx.options
    problem = _problem(Wx, states, resets, lengths, cell, reverse, cut, clip)
    with torch.enable_grad(), torch.autocast(Wx.device.type, enabled=False):
        leaves: list[Any] = [
            None if x is None else x.detach().requires_grad_() for x in (Wx, R, b, states, dout, dlast)
        ]
        out, last = vanilla.scan(problem, leaves[0], leaves[1], leaves[2], leaves[3], resets, lengths)
        asked = [x for x, needed in zip(leaves[:4], ctx.needs, strict=True) if needed]
        first = torch.autograd.grad(
            (out, last),
            asked,
            (leaves[4].to(out.dtype), leaves[5].to(out.dtype)),
            create_graph=True,
            materialize_grads=True,
        )
        given = [d for d, needed in zip(cotangents, ctx.needs, strict=True) if needed]
        product = sum(((g * d.to(g.dtype)).sum() for g, d in zip(first, given, strict=True)), out.new_zeros(()))
        wanted = [x for x in leaves if x is not None]
        product = product + sum((0 * x.sum() for x in wanted), out.new_zeros(()))  # each gradient exists, if zero
        second = iter(torch.autograd.grad(product, wanted))
    gradients = [None if x is None else next(second) for x in leaves]
    return (*gradients[:4], None, None, None, None, *gradients[4:], *[None] * (len(ctx.options) + 1))


for _name, _run, _fake, _setup, _autograd in (
    ("forward", _forward, _fake_forward, _setup_forward, _autograd_forward),
    ("backward", _backward, _fake_backward, _setup_backward, _autograd_backward),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashrnn::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"flashrnn::{_name}", _autograd, setup_context=_setup, lib=_LIBRARY)
