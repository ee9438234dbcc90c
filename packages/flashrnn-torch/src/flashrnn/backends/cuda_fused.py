"""`cuda_fused`: the persistent kernels of `flashrnn_core.cuda` on PyTorch's tensors and streams."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import torch

from flashrnn.gradients import edge, pieces, recurrent_part, transposed
from flashrnn.precision import tf32_allowed, to_tf32
from flashrnn_core.contract import Problem
from flashrnn_core.cuda import emit, launch, model
from flashrnn_core.cuda.plan import Plan, make_plan

_DTYPES = ("bfloat16", "float16", "float32")


def supports(problem: Problem, device: torch.device, make=make_plan) -> str | None:
    """None, or the reason why not and what would work. `make` makes the plans, here and below: `cuda` has its own."""
    if device.type != "cuda":
        return f"it runs on CUDA tensors, these are on {device.type}; backend='vanilla' runs on every device"
    if problem.dtype not in _DTYPES:
        return f"it computes in bfloat16, float16 or float32, not {problem.dtype}; backend='vanilla' does"
    allowed = _DTYPES if problem.dtype == "float32" else ("float32", problem.dtype)
    if problem.state_dtype not in allowed:
        return f"it keeps states in {' or '.join(allowed)} here, not {problem.state_dtype}; backend='vanilla' does"
    for backward in (False,) if problem.hidden_only else (False, True):  # h alone has no backward
        try:
            plan = _plan(problem, backward, device.index or 0, make)
        except RuntimeError as error:  # no driver: tensors without memory, as torch traces with
            return str(error)
        if isinstance(plan, str):
            return plan
    return None


def microseconds(problem: Problem, device: torch.device, make=make_plan) -> float:
    """A model of the time of a step of a problem supported: forward and, where not h alone is asked for, backward."""
    index = device.index or 0
    plans = [_plan(problem, backward, index, make) for backward in ((False,) if problem.hidden_only else (False, True))]
    multiprocessors = launch.device_properties(index)[1]
    return sum(model.microseconds(plan, problem, multiprocessors) for plan in plans if isinstance(plan, Plan))


def saved_states(problem: Problem) -> tuple[int, ...]:
    """Those that the cell wants in float32, where the outputs are not."""
    names = problem.cell.float32_states if problem.state_dtype != "float32" else ()
    return tuple(problem.cell.states.index(name) for name in names)


def _plan(problem: Problem, backward: bool, device: int, make) -> Plan | str:
    tf32 = problem.dtype == "float32" and tf32_allowed()
    return _planned(problem, backward, device, "tf32" if tf32 else problem.dtype, make)


@functools.lru_cache(maxsize=4096)
def _planned(problem: Problem, backward: bool, device: int, element: str, make) -> Plan | str:
    asked = replace(problem, T=1, hidden_only=problem.hidden_only and not backward)  # the backward has all states
    return launch.plan_for(asked, backward, element, saved_states(problem), device, make)


def forward(problem: Problem, Wx, R, b, states, resets, lengths, record: bool, make=make_plan):
    """(states, last_states, saved), see `backends/__init__.py`."""
    dtype = getattr(torch, problem.state_dtype)
    out = Wx.new_empty(problem.output_shape("states"), dtype=dtype)
    last = Wx.new_empty(problem.output_shape("last_states"), dtype=dtype)
    kept = saved_states(problem) if record else ()
    saved = Wx.new_empty((len(kept), *out.shape[1:]) if kept else 0, dtype=torch.float32)
    if problem.T == 0 or problem.B == 0:
        return out, last.zero_() if states is None else last.copy_(states), saved
    plan = _plan(problem, False, Wx.device.index, make)
    assert isinstance(plan, Plan), plan  # `supports` has said so
    if plan.saved and not kept:
        plan = replace(plan, saved=())
    states = _rows(states)
    arguments = _common(plan, problem, R, b) | _piece(Wx, resets, lengths, 0, problem.T)
    arguments |= _strides("STATES", states, "SB N") | _strides("OUT", out, "SBT") | _strides("LAST", last, "SB")
    arguments["SAVED"] = saved.data_ptr()
    _launch(plan, problem, [Wx], arguments)
    return out, last, saved


def backward(problem: Problem, Wx, R, b, states, resets, lengths, out, saved, dout, dlast, h_before, make=make_plan):
    """(dpre [B T G N D] in the compute dtype, dstates [S B 1 N D] in float32). Piece by piece in time, so that the
    pre-activations, which are computed again, never stand in memory all at once.
    """
    B, T, _, N, D = Wx.shape
    dpre = Wx.new_empty(B, T, len(problem.cell.gates), N, D)
    if T == 0 or B == 0:
        return dpre, dlast.to(torch.float32, copy=True)
    carry = dlast.to(torch.float32).contiguous()
    plan = _plan(problem, True, Wx.device.index, make)
    assert isinstance(plan, Plan), plan
    arguments = _common(plan, problem, R.transpose(2, 3), b)
    arguments["CLIP"] = int(np.float32(problem.clip or 0.0).view(np.int32))
    dout, Rt = _rows(dout), transposed(R)
    if plan.element == "tf32":  # of what met R, whatever the library rounds: the forward's pre-activations
        Rt = to_tf32(Rt)
    kept = saved_states(problem)
    old = [saved[kept.index(k)] if k in kept else out[k] for k in range(len(problem.cell.states))]
    in_order = pieces(problem) if problem.reverse else reversed(pieces(problem))
    for start, stop in in_order:
        time = slice(start, stop)
        met = h_before(start, stop)
        rec = recurrent_part(Rt, to_tf32(met) if plan.element == "tf32" else met)
        fields = [Wx, rec, dout[:, :, time]]
        pieced = arguments | _piece(Wx, resets, lengths, start, stop)
        for k in emit.old_states_used(problem.cell):
            initial = None if states is None else states[k : k + 1]
            begin = edge(problem, old[k][None], initial, lengths, start, stop)[0]
            pieced |= _strides(f"OLD{k}", old[k][:, time], "BTN") | _strides(f"INITIAL{k}", begin, "B N")
            fields += [old[k][:, time], begin]
        dstates = Wx.new_empty(carry.shape, dtype=torch.float32)
        pieced |= _strides("REC", rec, "BTGN") | _strides("DOUT", dout[:, :, time], "SBTN")
        pieced |= _strides("DLAST", carry, "SB N") | _strides("LAST", dstates, "SB")
        pieced |= _strides("DPRE", dpre[:, time], "BTG") | {"DSTATES": dstates.data_ptr()}
        _launch(plan, problem, fields, pieced)
        arguments.pop("pack", None)  # once is enough
        carry = dstates
        del met, rec, fields  # before the next piece takes as much
    return dpre, carry


def _common(plan: Plan, problem: Problem, R, b) -> dict:
    """Arguments that all pieces of time share."""
    bias = b.to(torch.float32).contiguous()
    arguments = {"B": problem.B, "N": problem.N, "BIAS": bias.data_ptr()}
    if plan.packed_bytes:
        packed = torch.empty(problem.N * plan.packed_bytes, dtype=torch.uint8, device=R.device)
        arguments |= {"PACKED": packed.data_ptr(), "pack": True, "keep": (R, bias, packed)}
        return arguments | _strides("R", R, "GNDP")
    even = R.data_ptr() % 4 == 0 and all(stride % 2 == 0 for stride in R.stride()[:-1])
    if R.stride(-1) != 1 or (R.element_size() == 2 and problem.D % 2 == 0 and not even):
        R = R.clone(memory_format=torch.contiguous_format)
    return arguments | {"keep": (R, bias)} | _strides("R", R, "GND")


def _piece(Wx, resets, lengths, start: int, stop: int) -> dict:
    """Arguments of the steps from start to stop."""
    resets = None if resets is None else resets[:, start:stop]
    lengths = None if lengths is None else lengths - start if start else lengths.contiguous()
    arguments = {"T": stop - start, "keep_lengths": lengths} | _strides("WX", Wx[:, start:stop], "BTGN")
    arguments |= _strides("RESETS", resets, "BT")
    arguments["LENGTHS"] = 0 if lengths is None else lengths.data_ptr()
    arguments["LENGTHS_BYTES"] = 0 if lengths is None else lengths.element_size()
    return arguments


def _strides(name: str, x: torch.Tensor | None, dims: str) -> dict[str, int]:
    """Pointer and strides by name, dims in order; a blank is a dim that needs none."""
    names, places = _names(name, dims)
    if x is None:
        return dict.fromkeys(names, 0)
    strides = x.stride()
    return dict(zip(names, (x.data_ptr(), *[strides[i] for i in places]), strict=True))


@functools.cache
def _names(name: str, dims: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    places = tuple(i for i, d in enumerate(dims) if d != " ")
    return (name, *(f"{name}_{dims[i]}" for i in places)), places


def _rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """x with its last dim contiguous."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _launch(plan: Plan, problem: Problem, fields: list[torch.Tensor], arguments: dict) -> None:
    Wx = fields[0]
    device = Wx.device.index
    tiles = -(-problem.B // plan.item_rows)
    aligned = problem.D % 8 == 0 and all(
        x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1]) for x in fields
    )
    with torch.cuda.device(device):
        kernel = launch.kernel_for(plan, aligned, device)
        items = problem.N * tiles
        count = kernel.vectors(items)
        vectors = torch.full((count,), -1, dtype=torch.int32, device=Wx.device) if count else None
        arguments["VECTORS"] = 0 if vectors is None else vectors.data_ptr()
        arguments["TILES"] = tiles
        stream = torch.cuda.current_stream(device).cuda_stream
        if arguments.pop("pack", False):
            kernel.pack(arguments, stream)
        kernel.launch(arguments, items, stream)
