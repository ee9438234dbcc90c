"""`vanilla`: the scan in plain PyTorch, on any device and in any dtype. The reference, and the CPU's backend.

`scan` is the forward, differentiable as it stands, any number of times. `backward` is written out, from the cell's
derived gradient: the recurrent part of all pre-activations in one matmul, then the loop over time.
Internally a state is [N, B, D] in float32 (float64 for float64), so that a step's recurrent matmul is one batched
product. h is rounded to the compute dtype only where it meets R, dpre once, as it is dWx.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from flashrnn.gradients import previous
from flashrnn_core.contract import Problem


def supports(problem: Problem, device: torch.device) -> str | None:
    """None: it runs every problem on every device."""
    return None


def saved_states(problem: Problem) -> tuple[int, ...]:
    """All of them, unless the outputs are as exact already."""
    exact = problem.state_dtype == saved_dtype(problem)
    return () if exact else tuple(range(len(problem.cell.states)))


def saved_dtype(problem: Problem) -> str:
    """That of cell math."""
    return str(_math_dtype(problem)).removeprefix("torch.")


def forward(problem: Problem, Wx, R, b, states, resets, lengths, record: bool):
    """(states, last_states, saved), see `backends/__init__.py`."""
    out, last = scan(problem, Wx, R, b, states, resets, lengths)
    saved = out.contiguous() if record and saved_states(problem) else None
    dtype = getattr(torch, problem.state_dtype)
    return out[: 1 if problem.hidden_only else None].to(dtype).contiguous(), last.to(dtype).contiguous(), saved


def scan(problem: Problem, Wx, R, b, states, resets, lengths):
    """(states [S B T N D], last_states [S B 1 N D]) in float32 (float64), differentiable."""
    cell, compute, math = problem.cell, Wx.dtype, _math_dtype(problem)
    B, T, _, N, D = Wx.shape
    S, Gr = len(cell.states), len(cell.recurrent_gates)
    state = _initial(problem, Wx, states).unbind()  # S times N B D
    Rt = R.to(math).permute(1, 3, 0, 2).reshape(N, D, Gr * D)  # N P (Gr D)
    cut = torch.Tensor.detach if problem.cut else lambda h: h
    clip = _clip(problem)
    bound = (lambda h: _BoundGradient.apply(h, clip)) if problem.clip is not None else lambda h: h
    outs = []
    for t in _times(problem):
        active, fresh = _step_masks(t, resets, lengths)
        old = state if fresh is None else tuple(s.masked_fill(fresh, 0.0) for s in state)
        old = (bound(old[0]), *old[1:])
        rec = torch.matmul(cut(old[0]).to(compute).to(math), Rt).view(N, B, Gr, D)
        x = Wx[:, t].to(math)
        if active is not None:  # autograd multiplies what is in the padding by zero, and NaN times zero is NaN
            x = x.masked_fill(~active[..., None, None], 0.0)
        pre = _pre_activations(cell, x, rec, b.to(math))
        new = _evaluate(cell.forward, math, [*pre, *old], rec[:, :, 0])
        out = new
        if active is not None:
            out = tuple(x.masked_fill(~active, 0.0) for x in new)
            new = tuple(torch.where(active, x, s) for x, s in zip(new, state, strict=True))
        state = new
        outs.append(torch.stack(out))
    if not outs:
        return Wx.new_zeros(S, B, 0, N, D, dtype=math), torch.stack(state).permute(0, 2, 1, 3)[:, :, None]
    if problem.reverse:
        outs.reverse()
    stacked = torch.stack(outs, 1)  # S T N B D
    return stacked.permute(0, 3, 1, 2, 4), torch.stack(state).permute(0, 2, 1, 3)[:, :, None]


def backward(problem: Problem, Wx, R, b, states, resets, lengths, out, saved, dout, dlast, h_before):
    """(dpre [B T G N D], dstates [S B 1 N D]) in float32 (float64)."""
    cell, compute, math = problem.cell, Wx.dtype, _math_dtype(problem)
    B, T, _, N, D = Wx.shape
    G, Gr = len(cell.gates), len(cell.recurrent_gates)
    if T == 0:
        return Wx.new_zeros(B, 0, G, N, D, dtype=math), dlast.to(math, copy=True)  # an operator's output is its own
    before = previous(problem, saved if saved.numel() else out, states, resets, lengths)  # S B T N D
    before = before.to(math).permute(0, 2, 3, 1, 4).contiguous()  # S T N B D
    Rm, clip = R.to(math), _clip(problem)
    Rt = Rm.permute(1, 3, 0, 2).reshape(N, D, Gr * D)
    met = before[0].to(compute).to(math).transpose(0, 1).reshape(N, T * B, D)  # one product a head, R not repeated
    rec = torch.bmm(met, Rt).view(N, T, B, Gr, D).transpose(0, 1)
    Rb = Rm.permute(1, 0, 2, 3).reshape(N, Gr * D, D)  # N (Gr D) P
    dout = dout.to(math).permute(0, 2, 3, 1, 4)  # S T N B D
    carry = list(dlast[:, :, 0].to(math).transpose(1, 2).unbind())
    recurrent = list(cell.recurrent_gates)
    dpre = Wx.new_empty(T, N, B, G, D, dtype=math)
    for t in reversed(_times(problem)):
        active, fresh = _step_masks(t, resets, lengths)
        pre = _pre_activations(cell, Wx[:, t].to(math), rec[t], b.to(math))
        dnew = [c + d for c, d in zip(carry, dout[:, t], strict=True)]
        grads = _evaluate(cell.backward, math, [*pre, *before[:, t], *dnew], dnew[0])
        if active is not None:
            grads = tuple(g.masked_fill(~active, 0.0) for g in grads)
        torch.stack(grads[:G], 2, out=dpre[t])
        if compute != math:  # dpre is dWx, so it is rounded once, here, and meets R and h as such
            dpre[t] = dpre[t].to(compute)
        dold = list(grads[G:])
        if not problem.cut:
            chosen = dpre[t] if Gr == G else dpre[t][:, :, recurrent]
            dold[0] = torch.baddbmm(dold[0], chosen.reshape(N, B, Gr * D), Rb)
        if problem.clip is not None:
            dold[0] = dold[0].clamp(-clip, clip)
        if fresh is not None:
            dold = [d.masked_fill(fresh, 0.0) for d in dold]
        if active is not None:
            dold = [torch.where(active, d, c) for d, c in zip(dold, carry, strict=True)]
        carry = dold
    return dpre.permute(2, 0, 3, 1, 4), torch.stack(carry).transpose(1, 2)[:, :, None]


class _BoundGradient(torch.autograd.Function):
    """The identity; its gradient is clamped to [-bound, bound]."""

    @staticmethod
    def forward(ctx, x, bound):
        ctx.bound = bound
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return dy.clamp(-ctx.bound, ctx.bound), None


def _clip(problem: Problem) -> float:
    """The bound, which is none where cell math cannot hold it."""
    bound = torch.inf if problem.clip is None else problem.clip
    return bound if bound <= torch.finfo(_math_dtype(problem)).max else torch.inf


def _math_dtype(problem: Problem) -> torch.dtype:
    return torch.float64 if problem.dtype == "float64" else torch.float32


def _times(problem: Problem) -> range:
    return range(problem.T)[:: -1 if problem.reverse else 1]


def _initial(problem: Problem, Wx, states) -> torch.Tensor:
    S, N, B, D = len(problem.cell.states), problem.N, problem.B, problem.D
    if states is None:
        return Wx.new_zeros(S, N, B, D, dtype=_math_dtype(problem))
    return states[:, :, 0].to(_math_dtype(problem)).transpose(1, 2)


def _step_masks(t: int, resets, lengths):
    """Masks [B, 1] of step t, for states N B D: in the sequence; starts afresh. None: always; never."""
    active = None if lengths is None else (t < lengths)[:, None]
    fresh = None if resets is None else resets[:, t, None]
    return active, fresh


def _pre_activations(cell, Wx, rec, b) -> list[torch.Tensor]:
    """Aggregated pre-activations, one [N, B, D] a gate, from Wx [B Gw N D], rec = R h [N B Gr D], b [G N D]."""
    G = len(cell.gates)
    if len(cell.input_gates) == len(cell.recurrent_gates) == G:
        return list((rec + (Wx + b).permute(2, 0, 1, 3)).unbind(2))
    pre = []
    for g in range(G):
        x = b[g][:, None]  # N 1 D
        if g in cell.recurrent_gates:
            x = x + rec[:, :, cell.recurrent_gates.index(g)]
        if g in cell.input_gates:
            x = x + Wx[:, cell.input_gates.index(g)].transpose(0, 1)
        pre.append(x)
    return pre


def _evaluate(graph, dtype: torch.dtype, inputs: list[torch.Tensor], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The graph's outputs, each a tensor of the shape of `like`, constants too."""
    values = graph.evaluate(_words(dtype), inputs)
    return tuple(_tensor(v, dtype, like).expand(like.shape) for v in values)


def _tensor(x, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """A constant becomes a tensor filled in on the device of `like`: a copy from the host would wait for it."""
    return x if isinstance(x, torch.Tensor) else torch.full((), x, dtype=dtype, device=like.device)


@functools.cache
def _words(dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """The vocabulary in PyTorch. A constant is a Python number."""

    def tensor(x, like):
        return _tensor(x, dtype, like)

    return {
        "add": lambda x, y: x + y,
        "subtract": lambda x, y: x - y,
        "multiply": lambda x, y: x * y,
        "divide": lambda x, y: x / y,
        "negative": lambda x: -x,
        "exp": torch.exp,
        "log_sigmoid": F.logsigmoid,
        "maximum": lambda x, y: torch.maximum(tensor(x, y), tensor(y, x)),
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "where": lambda c, x, y: torch.where(c, tensor(x, c), tensor(y, c)),
        "equal": lambda x, y: x == y,
        "less": lambda x, y: x < y,
        "less_equal": lambda x, y: x <= y,
    }
