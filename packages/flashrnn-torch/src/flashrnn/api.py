"""The public function: checks, autocast, choice of backend. From here x goes through `ops.py` to one backend."""

from __future__ import annotations

from typing import Any

import torch

from flashrnn import ops
from flashrnn.backends import canonical, choose
from flashrnn.config import FlashRNNConfig
from flashrnn.precision import tf32_allowed
from flashrnn_core.cells import Cell, get_cell
from flashrnn_core.contract import DTYPES, TENSORS, Info, Problem, check, check_options


def flashrnn(
    Wx: torch.Tensor,  # B T Gw N D
    R: torch.Tensor,  # Gr N D P
    b: torch.Tensor,  # G N D
    states: torch.Tensor | None = None,  # S B 1 N D
    function: str | Cell = "lstm",
    config: FlashRNNConfig | None = None,
    backend: str = "auto",
    dtype: str | torch.dtype | None = None,
    *,
    resets: torch.Tensor | None = None,  # B T
    lengths: torch.Tensor | None = None,  # B
    reverse: bool = False,
    gradient_recurrent_cut: bool = False,
    gradient_recurrent_clipval: float | None = None,
    hidden_only: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """states[t] = cell(Wx[t] + R h[t-1] + b, states[t-1]) for all t: a recurrent network of N heads of dim D.

    Args:
        Wx: [B, T, Gw, N, D] input pre-activations. The last dim is contiguous, other strides are free.
        R: [Gr, N, D, P] recurrent matrix, P == D.
        b: [G, N, D] bias.
        states: [S, B, 1, N, D] initial states; None: zeros.
        function: name of a cell (`elman`, `gru`, `lstm`, `slstm`) or a `Cell`, your own for example.
        config: options in the spelling of PyPI flashrnn 1.0.8; decides function, backend and dtype.
        backend: `cuda_fused`, `cuda`, `triton`, `vanilla`, or `auto`, the fastest that supports the call.
        dtype: compute dtype of Wx, R and of h where it meets R (float64, float32, bfloat16, float16); None:
            autocast's where it is active, else that of Wx. Cell math and accumulation are float32 (float64).
        resets: [B, T] bool; before step t the state goes back to zeros, and no gradient crosses.
        lengths: [B] int32 or int64, on the device of Wx; from step lengths[b] on the state is frozen and outputs
            are zero. On a GPU it is never read on the host: there a value above T acts as T, below 0 as 0.
        reverse: time runs from the end (with lengths, each sequence's own end); outputs stay in place.
        gradient_recurrent_cut: no gradient flows through R to the previous h. R itself has its gradient.
        gradient_recurrent_clipval: bound, elementwise, of what flows back to the previous h from a step.
        hidden_only: return h alone as `states`, [1, B, T, N, D]; at inference the rest is never written.

    Returns:
        states [S, B, T, N, D] and last_states [S, B, 1, N, D], in the dtype of the initial states if given, else
        the compute dtype. State 0 is h. last_states may be passed as the next call's states.

    Raises:
        ValueError, TypeError: a tensor or option does not fit; the message names it, what was expected, what came.
        NotImplementedError: the backend named cannot run this call; the message says why and what can. Or a tensor has
            a forward-mode tangent, which eager `vanilla` alone carries on.
        RuntimeError: in the backward of a backward, which `vanilla` alone has.

    Example:
        >>> import torch
        >>> from flashrnn import flashrnn
        >>> Wx = torch.randn(2, 5, 4, 3, 8)  # batch, time, gates, heads, head dim
        >>> R, b = torch.randn(4, 3, 8, 8) / 8**0.5, torch.zeros(4, 3, 8)
        >>> states, last_states = flashrnn(Wx, R, b, function="lstm")
        >>> h, c = states
        >>> h.shape, last_states.shape
        (torch.Size([2, 5, 3, 8]), torch.Size([2, 2, 1, 3, 8]))
    """
    if not (isinstance(reverse, bool) and isinstance(gradient_recurrent_cut, bool) and isinstance(hidden_only, bool)):
        _check_flags(reverse=reverse, gradient_recurrent_cut=gradient_recurrent_cut, hidden_only=hidden_only)
    if config is not None and not isinstance(config, FlashRNNConfig):
        raise TypeError(f"config: expected a FlashRNNConfig or None, got {type(config).__name__}")
    restore = None
    if config is not None:
        _check_tensors(Wx=Wx, R=R, b=b, states=states)
        function, backend, dtype = config.function, config.backend, config.dtype
        gradient_recurrent_cut = gradient_recurrent_cut or config.gradient_recurrent_cut
        if gradient_recurrent_clipval is None:
            gradient_recurrent_clipval = config.gradient_recurrent_clipval
        if any(x is None for x in (Wx, R, b)):
            raise TypeError("Wx, R, b: expected tensors, got None")
        Wx, R, b, states, restore = config.arrange(Wx, R, b, states)
    if gradient_recurrent_clipval is not None:
        check_options(gradient_recurrent_clipval)

    tensors = (Wx, R, b, states, resets, lengths)
    options = (function, backend, dtype, reverse, gradient_recurrent_cut, gradient_recurrent_clipval, hidden_only)
    record = torch.is_grad_enabled() and any(x is not None and getattr(x, "requires_grad", False) for x in tensors)
    problem, name, compute = _resolve(tensors, options, record)
    if Wx.dtype != compute:
        Wx = Wx.to(compute)
    if R.dtype != compute:
        R = R.to(compute)
    if Wx.stride(-1) != 1 and Wx.shape[-1] > 1:
        Wx = Wx.contiguous()
    out, last = ops.scan(problem, name, record, Wx, R, b, states, resets, lengths)
    if hidden_only and record:
        out = out[:1]
    return (out, last) if restore is None else (restore(out), restore(last))


_RESOLVED: dict[Any, tuple[Problem, str, torch.dtype]] = {}  # calls of one signature are checked once


def _resolve(tensors, options, record: bool) -> tuple[Problem, str, torch.dtype]:
    """(problem, name of the backend, compute dtype) of a call, checked; raises what `flashrnn` raises."""
    if torch.compiler.is_compiling():
        return _check_and_choose(tensors, options, record)
    try:
        kind = "cuda" if tensors[0].is_cuda else tensors[0].device.type
        ambient = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
        kinds = [None if x is None else (x.shape, x.dtype, x.device, x.layout) for x in tensors]
        signature = (options, record, ambient, tf32_allowed(), *kinds)
        known = _RESOLVED.get(signature)
    except (AttributeError, TypeError):  # no tensor, or not hashable: the checks say what is wrong
        return _check_and_choose(tensors, options, record)
    if known is None:
        known = _check_and_choose(tensors, options, record)
        if len(_RESOLVED) >= 4096:
            _RESOLVED.clear()
        _RESOLVED[signature] = known
    return known


def _check_and_choose(tensors, options, record: bool) -> tuple[Problem, str, torch.dtype]:
    given = dict(zip(TENSORS, tensors, strict=True))
    function, backend, dtype, reverse, cut, clip, hidden_only = options
    _check_tensors(**given)
    cell = get_cell(function)
    check(cell, {name: None if x is None else _info(x) for name, x in given.items()})
    Wx, states = given["Wx"], given["states"]
    compute = _compute_dtype(Wx, dtype)
    B, T, _, N, D = Wx.shape
    problem = Problem(
        cell,
        *(B, T, N, D),
        dtype=_name(compute),
        state_dtype=_name(compute if states is None else states.dtype),
        resets=given["resets"] is not None,
        lengths=given["lengths"] is not None,
        reverse=reverse,
        cut=cut,
        clip=None if clip is None else float(clip),
        hidden_only=hidden_only and not record,
    )
    if torch.compiler.is_compiling():  # which is not to look into drivers: the operator chooses
        return problem, canonical(backend), compute
    return problem, choose(backend, problem, Wx.device), compute


def _check_flags(**given: Any) -> None:
    for name, flag in given.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, got {flag!r}")


def _check_tensors(**given: Any) -> None:
    for name, tensor in given.items():
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got one of layout {tensor.layout}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _info(x: torch.Tensor) -> Info:
    return Info(x.shape, _name(x.dtype), str(x.device))


def _compute_dtype(Wx: torch.Tensor, dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None:
        kind = Wx.device.type
        active = kind != "meta" and torch.is_autocast_enabled(kind)  # torch.compile 2.11 follows no more than this
        return torch.get_autocast_dtype(kind) if active else Wx.dtype
    name = _name(dtype) if isinstance(dtype, torch.dtype) else dtype
    if not isinstance(name, str) or name not in DTYPES:
        raise TypeError(f"dtype: expected {', '.join(DTYPES)} or None, got {dtype!r}")
    return getattr(torch, name)
