"""`triton`: the whole scan in one kernel, made for any cell from its one function; bfloat16, float16, float32.

float32 products follow `torch.set_float32_matmul_precision`: "highest" is full precision, the others tf32.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
import sysconfig

import torch

from flashrnn.gradients import recurrent_part, transposed
from flashrnn.precision import tf32_allowed
from flashrnn_core.contract import Problem
from flashrnn_core.cuda.model import outside
from flashrnn_core.triton import model
from flashrnn_core.triton.plan import Gpu, Plan, plan, programs, reason_against, saved_states

LAST = 1e12  # µs of a step: after every other
_INSTALLED = importlib.util.find_spec("triton") is not None


def supports(problem: Problem, device: torch.device) -> str | None:
    """None, or the reason why not and what would work."""
    if not _INSTALLED:
        return "it needs the package triton, which is not installed; backend='vanilla' does not"
    if device.type != "cuda":
        if not _interpreted():
            return f"it runs on CUDA tensors, these are on {device.type}; backend='vanilla' runs on every device"
    elif not torch.compiler.is_compiling() and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0; backend='vanilla' runs on every device"
    return reason_against(problem)


def microseconds(problem: Problem, device: torch.device) -> float:
    """A model of the time of a step of a problem supported: forward and, where not h alone is asked for, backward.

    Where `auto` should take another that it can, LAST: a backward that needs R h of all steps at once. Infinite where
    it should never take this one: without a compiler of C, which Triton calls for its launcher, or without a driver.
    """
    try:
        time, gpu = 0.0 if _finds_compiler() else math.inf, _gpu(device)
    except RuntimeError:  # no driver: tensors without memory, as torch traces with
        return math.inf
    for backward in (False,) if problem.hidden_only else (False, True):
        made = plan(problem, _precision(), gpu, backward)
        time += model.scan(made, problem, gpu, backward) + model.call(problem, backward)
    if problem.hidden_only:
        return time
    return time + outside(problem, recurrent=False) if made.recompute else time + LAST


@functools.cache
def _finds_compiler() -> bool:
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    named = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
    return bool(named) and os.path.exists(header)


def saved_dtype(problem: Problem) -> str:
    """That of cell math."""
    return "float32"


def forward(problem: Problem, Wx, R, b, states, resets, lengths, record: bool):
    """(states, last_states, saved), see `backends/__init__.py`."""
    from flashrnn_core.triton import launch

    dtype = getattr(torch, problem.state_dtype)
    out = Wx.new_empty(problem.output_shape("states"), dtype=dtype)
    last = Wx.new_empty(problem.output_shape("last_states"), dtype=dtype)
    kept = len(saved_states(problem)) if record else 0
    saved = Wx.new_empty((kept, *out.shape[1:]), dtype=torch.float32) if kept else None
    if problem.B == 0 or problem.T == 0:
        return out, last.zero_() if states is None else last.copy_(states), saved
    inputs = _prepare(R, b, states, resets, lengths)
    precision = _precision()
    made = plan(problem, precision, _gpu(Wx.device), backward=False)
    with _on(Wx.device):
        memory = _memory(made, problem, Wx)
        launch.forward(problem, made, precision, Wx, *inputs, out, last, saved, memory=memory)
    return out, last, saved


def backward(problem: Problem, Wx, R, b, states, resets, lengths, out, saved, dout, dlast, h_before):
    """(dpre [B T G N D] in the compute dtype, dstates [S B 1 N D] in float32)."""
    from flashrnn_core.triton import launch

    B, T, N, D = problem.B, problem.T, problem.N, problem.D
    dpre = Wx.new_empty(B, T, len(problem.cell.gates), N, D)
    dstates = Wx.new_empty(dlast.shape, dtype=torch.float32)
    if B == 0 or T == 0:
        return dpre, dstates.copy_(dlast)
    dout = dout if dout.stride(-1) == 1 or D == 1 else dout.contiguous()
    inputs = _prepare(R, b, states, resets, lengths)
    precision = _precision()
    made = plan(problem, precision, _gpu(Wx.device), backward=True)
    rec = None
    if not made.recompute:
        rec = recurrent_part(transposed(R), h_before()).permute(3, 0, 1, 2, 4)  # N B T Gr D, contiguous
    with _on(Wx.device):
        memory = _memory(made, problem, Wx)
        tensors = (out.contiguous(), saved if saved.numel() else None, dout, dlast.contiguous(), dpre, dstates)
        launch.backward(problem, made, precision, Wx, *inputs[:2], rec, *inputs[2:], *tensors, memory=memory)
    return dpre, dstates


def _prepare(R, b, states, resets, lengths):
    """The small inputs, contiguous, as the kernels take them."""
    resets = None if resets is None else resets.contiguous().view(torch.uint8)
    R, b, states, lengths = (None if x is None else x.contiguous() for x in (R, b, states, lengths))
    return R, b, states, resets, lengths


def _memory(made: Plan, problem: Problem, Wx) -> torch.Tensor | None:
    heads, tiles = programs(problem, made)
    return Wx.new_empty(heads * tiles * made.memory, dtype=torch.float32) if made.memory else None


def _precision() -> str:
    """Of float32 dots: full precision as products of three bfloat16 parts each, on tensor cores, or tf32."""
    if _interpreted():
        return "ieee"  # the interpreter knows no other
    return "bf16x6" if not tf32_allowed() else "tf32"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _gpu(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu(227 * 1024, 1)  # the interpreter's: any
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.shared_memory_per_block_optin, properties.multi_processor_count)


def _on(device: torch.device):
    """The device made current, for Triton launches there."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
