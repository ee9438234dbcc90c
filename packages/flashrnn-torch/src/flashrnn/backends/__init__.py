"""The backends by name, and the choice among them. A new backend is one file here and one line in `BACKENDS`.

A backend is a module with
    supports(problem, device) -> None, or the reason why it cannot run the problem and what would
    saved_states(problem) -> numbers of the states that its backward wants more exactly than the outputs have them
    saved_dtype(problem) -> name of the dtype in which they are saved: that of cell math; or that of the outputs, where
        what rounding to it took of them is saved
    forward(problem, Wx, R, b, states, resets, lengths, record) -> states, last_states, saved
    backward(problem, Wx, R, b, states, resets, lengths, out, saved, dout, dlast, h_before) -> dpre [B T G N D], dstates
and, where there is a model of its time,
    microseconds(problem, device) -> of a step, forward and, where not h alone is asked for, backward
`h_before(start=0, stop=None)` is the h that met R at each step [B T' N P], in the compute dtype. `out` holds all S
states; `saved` [len(saved_states), B, T, N, D] comes from a forward as None where there is none, as where `record` is
False, and is given to a backward as an empty tensor.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch

from flashrnn.backends import cuda, cuda_fused, triton, vanilla
from flashrnn_core.contract import Problem

BACKENDS: dict[str, ModuleType] = {"cuda_fused": cuda_fused, "cuda": cuda, "triton": triton, "vanilla": vanilla}
SPELLINGS = {"triton_fused": "triton", "vanilla_fwbw": "vanilla"}  # of PyPI flashrnn 1.0.8


def canonical(backend: str) -> str:
    """`auto` or a name of `BACKENDS`. Raises TypeError or ValueError for anything else."""
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a name, got {backend!r}")
    name = SPELLINGS.get(backend, backend)
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: expected auto, {', '.join(BACKENDS)}, got {backend!r}")
    return name


def choose(backend: str, problem: Problem, device: torch.device) -> str:
    """The name of the backend to run: the one named, or for `auto` what `_fastest` says.

    Raises TypeError or ValueError for what is no name of one, NotImplementedError where the backend named cannot run
    the problem.
    """
    name = canonical(backend)
    if name == "auto":
        return _fastest(problem, device)
    reason = BACKENDS[name].supports(problem, device)
    if reason is not None:
        raise NotImplementedError(f"backend {backend!r} cannot run this call: {reason}")
    return name


def _fastest(problem: Problem, device: torch.device) -> str:
    """Of the backends that have a model of their time and support the problem, the one that takes least; where there is
    none, `vanilla`, which was slower wherever one of those could run.
    """
    times = {
        name: backend.microseconds(problem, device)
        for name, backend in BACKENDS.items()
        if hasattr(backend, "microseconds") and backend.supports(problem, device) is None
    }
    finite = {name: time for name, time in times.items() if time < math.inf}
    return min(finite, key=lambda name: finite[name], default="vanilla")
