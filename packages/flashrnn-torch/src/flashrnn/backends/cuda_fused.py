"""`cuda_fused`: the persistent kernels of `flashrnn_core.cuda` on PyTorch's tensors and streams."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import torch

from flashrnn.gradients import by_pieces, edge, is_first, one_pass, step_before, transposed
from flashrnn.precision import tf32_allowed, to_tf32
from flashrnn_core.contract import Problem
from flashrnn_core.cuda import launch, model, product
from flashrnn_core.cuda.plan import ELEMENTS, Plan
from flashrnn_core.cuda.streamed import resident_plan

_DTYPES = ("bfloat16", "float16", "float32")


def supports(problem: Problem, device: torch.device, make=resident_plan) -> str | None:
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
            plan = _plan(problem, backward, True, _element(problem), device.index or 0, make)
        except RuntimeError as error:  # no driver: tensors without memory, as torch traces with
            return str(error)
        if isinstance(plan, str):
            return plan
    return None


def microseconds(problem: Problem, device: torch.device, make=resident_plan) -> float:
    """A model of the time of a step of a problem supported: forward and, where not h alone is asked for, backward."""
    index = device.index or 0
    _, multiprocessors = launch.device_properties(index)
    time = 0.0 if problem.hidden_only else model.outside(problem, recurrent=True)
    for backward in (False,) if problem.hidden_only else (False, True):
        plan = _supported_plan(problem, backward, not problem.hidden_only, _element(problem), index, make)
        time += model.scan(plan, problem, multiprocessors) + model.call(plan, problem)
    return time


def saved_dtype(problem: Problem) -> str:
    """That of the states: what rounding took of them is saved, of which 16 bits are enough."""
    return problem.state_dtype


def saved_states(problem: Problem) -> tuple[int, ...]:
    """Those that the cell wants more exactly than in 16 bits, where these are returned."""
    names = problem.cell.float32_states if problem.state_dtype != "float32" else ()
    return tuple(sorted(problem.cell.states.index(name) for name in names))  # as the kernel has them


def _element(problem: Problem) -> str:
    """What meets R; it follows torch's setting of the moment."""
    return "tf32" if problem.dtype == "float32" and tf32_allowed() else problem.dtype


@functools.lru_cache(maxsize=4096)
def _plan(problem: Problem, backward: bool, record: bool, element: str, device: int, make) -> Plan | str:
    hidden_only = problem.hidden_only and not backward  # the backward has all states
    asked = replace(problem, B=max(problem.B, 1), T=1, hidden_only=hidden_only)
    plan = launch.plan_for(asked, backward, element, saved_states(problem), device, make)
    return replace(plan, saved=()) if isinstance(plan, Plan) and not record else plan


def _supported_plan(*kind) -> Plan:
    """`_plan`, where `supports` has said that there is one. By another setting of torch's since there may be none."""
    plan = _plan(*kind)
    if not isinstance(plan, Plan):
        raise NotImplementedError(plan)
    return plan


def forward(problem: Problem, Wx, R, b, states, resets, lengths, record: bool, make=resident_plan):
    """(states, last_states, saved), see `backends/__init__.py`."""
    dtype = getattr(torch, problem.state_dtype)
    out = Wx.new_empty(problem.output_shape("states"), dtype=dtype)
    last = Wx.new_empty(problem.output_shape("last_states"), dtype=dtype)
    kept = saved_states(problem) if record else ()
    saved = Wx.new_empty((len(kept), *out.shape[1:]), dtype=dtype) if kept else None
    if problem.T == 0 or problem.B == 0:
        return out, last.zero_() if states is None else last.copy_(states), saved
    kind = problem, False, record, _element(problem), Wx.get_device(), make
    R, b = _parameters(kind, R, b)
    tensors = Wx, R, b, resets, None if lengths is None else lengths.contiguous(), _rows(states), out, last, saved
    _launch(kind, problem.T, Wx, [_place(x) for x in tensors], 1)
    return out, last, saved


def backward(
    problem: Problem, Wx, R, b, states, resets, lengths, out, saved, dout, dlast, h_before, make=resident_plan
):
    """(dpre [B T G N D] in the compute dtype, dstates [S B 1 N D] in float32). Piece by piece in time, so that the
    pre-activations, which are computed again, never stand in memory all at once.
    """
    B, T, _, N, D = Wx.shape
    states = _rows(states)
    dpre = Wx.new_empty(B, T, len(problem.cell.gates), N, D)
    if T == 0 or B == 0:
        return dpre, dlast.to(torch.float32, copy=True)
    carry = dlast = dlast.to(torch.float32).contiguous()  # which lives until the scans have joined this stream
    rooms = [Wx.new_empty(carry.shape, dtype=torch.float32) for _ in range(2)]  # of dstates, in turns
    kind = problem, True, True, _element(problem), Wx.get_device(), make
    kept, plan = saved_states(problem), _supported_plan(*kind)
    Rt = transposed(R)
    R, b = _parameters(kind, Rt.view(N, D, -1, D).permute(2, 0, 1, 3), b)  # Gr N P D
    tf32 = plan.element == "tf32"
    if tf32:  # of what met R, whatever the library rounds: the forward's pre-activations
        Rt = to_tf32(Rt)
    states_and_rests = dict(enumerate(out)) | {len(out) + k: rest for k, rest in zip(kept, saved, strict=True)}
    old = {k: states_and_rests[k] for k in plan.old}
    over_time = {"WX": _InTime(Wx, 1), "DOUT": _InTime(_rows(dout), 2), "RESETS": _InTime(resets, 1)}
    over_time |= {"DPRE": _InTime(dpre, 1)} | {f"OLD{k}": _InTime(x, 1) for k, x in old.items()}
    fields, others = _names(plan)
    before = None

    def met(start: int, stop: int) -> torch.Tensor:
        return to_tf32(h_before(start, stop)) if tf32 else h_before(start, stop)

    def scan(start: int, stop: int, rec: torch.Tensor) -> None:
        nonlocal carry, before
        dstates = rooms[1] if carry is rooms[0] else rooms[0]
        tensors = {"REC": rec, "R": R, "BIAS": b, "DLAST": carry, "LAST": dstates, "DSTATES": dstates}
        tensors["LENGTHS"] = None if lengths is None else lengths - start if start else lengths.contiguous()
        places = {name: x.at(start) for name, x in over_time.items()}
        begins = is_first(problem, start, stop)
        for k, x in old.items():
            initial = None if states is None or k >= len(states) else states[k : k + 1]
            if begins and initial is None:
                tensors[f"INITIAL{k}"] = None  # zeros, which the kernel knows
            elif begins or (problem.reverse and lengths is not None):
                tensors[f"INITIAL{k}"] = edge(problem, x[None], initial, lengths, start, stop)[0]
            else:
                places[f"INITIAL{k}"] = over_time[f"OLD{k}"].at(step_before(problem, start, stop))
        places |= {name: _place(x) for name, x in tensors.items()}
        before = _launch(kind, stop - start, Wx, [places[name] for name in (*fields, *others)], len(fields), before)
        carry = dstates

    by_pieces(problem, Rt, met, scan, len(kept) * out.element_size())
    return dpre, carry


def _parameters(kind, R, b) -> tuple[torch.Tensor, torch.Tensor]:
    """R and b as the kernels of `_plan(*kind)` take them: R with contiguous rows, at places of which they may read two
    16-bit values at once where D is even, unless they read a packed copy; b contiguous, of 16 bits or in float32.
    """
    if b.dtype == torch.float64 or not b.is_contiguous():
        b = b.to(torch.float32).contiguous()
    if not (R.is_contiguous() and R.data_ptr() % 4 == 0):
        problem, plan = kind[0], _supported_plan(*kind)
        even = R.data_ptr() % 4 == 0 and all(stride % 2 == 0 for stride in R.stride()[:-1])
        apart = R.stride(-1) != 1 or (R.element_size() == 2 and problem.D % 2 == 0 and not even)
        if apart and not plan.packed_bytes:
            R = R.clone(memory_format=torch.contiguous_format)
    return R, b


def _rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """x with its last dim contiguous."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


# Where a launch finds a tensor: the address, and what of it stays from call to call, its dtype and strides; 0 and None
# for one that is not there.
_Place = tuple[int, tuple[torch.dtype, tuple[int, ...]] | None]


def _place(x: torch.Tensor | None) -> _Place:
    return (0, None) if x is None else (x.data_ptr(), (x.dtype, x.stride()))


class _InTime:
    """Places of a tensor, which it keeps alive, from any step on: as of views, which take longer to make."""

    def __init__(self, x: torch.Tensor | None, dim: int):
        self._tensor, (self._address, self._layout) = x, _place(x)
        self._step = 0 if x is None else x.stride(dim) * x.element_size()

    def at(self, step: int) -> _Place:
        return self._address + step * self._step, self._layout


def _launch(kind, steps: int, Wx, places: list[_Place], fields: int, before: tuple | None = None) -> tuple:
    """Launch the kernel of `_plan(*kind)` on tensors in the order of `_names`, fields first. Returns `before` of a next
    launch, which goes on where this one ends: the kernel, its workspace, and the steps done.
    """
    device = kind[-2]
    if torch._C._cuda_getDevice() != device:  # torch.cuda.current_device, of a device that is there
        with torch.cuda.device(device):  # for what the driver is asked of a new kernel, too
            return _launch(kind, steps, Wx, places, fields, before)
    addresses = [address for address, _ in places]
    aligned = not any(address % 16 for address in addresses[:fields])
    call = _call(kind, steps, aligned, tuple([layout for _, layout in places]))
    kernel, workspace, done = before or (None, None, 0)
    if kernel is not call.kernel:  # nor is its workspace
        workspace, done = None, 0
    if workspace is None and call.workspace_bytes:
        workspace = Wx.new_empty(call.workspace_bytes, dtype=torch.int8)
    at = workspace.data_ptr() if call.workspace_bytes else 0
    stream = torch._C._cuda_getCurrentRawStream(device)  # what torch.cuda.current_stream wraps, for a tenth
    call.launch(addresses, at, stream, done)
    return call.kernel, workspace, done + steps


# Tensors of a launch by the kernel's name, and the dims of which it takes the stride; a blank: a dim that needs none.
_DIMS = {
    "WX": "BTGN",
    "R": "GNDP",
    "BIAS": "",
    "RESETS": "BT",
    "LENGTHS": "",
    "STATES": "SB N",
    "OUT": "SBT",
    "LAST": "SB",
    "SAVED": "",
    "REC": "BTGN",
    "OLD": "BTN",
    "INITIAL": "B N",
    "DOUT": "SBTN",
    "DLAST": "SB N",
    "DPRE": "BTG",
    "DSTATES": "",
}


def _names(plan: Plan) -> tuple[list[str], list[str]]:
    """(fields, others), in the order in which `forward` and `backward` give them to a launch. Fields are those of which
    the kernel's ring brings rows.
    """
    others = ["R", "BIAS", "RESETS", "LENGTHS"]
    if not plan.backward:
        return ["WX"], [*others, "STATES", "OUT", "LAST", "SAVED"]
    old = [f"{name}{k}" for k in plan.old for name in ("OLD", "INITIAL")]
    return ["WX", "REC", "DOUT", *old], [*others, "DLAST", "DPRE", "LAST", "DSTATES"]


@functools.lru_cache(maxsize=4096)
def _call(kind, steps: int, aligned: bool, layouts) -> launch.Call:
    """The launches for tensors of these layouts (dtype, strides; None: not there)."""
    problem, backward, record, element, device, make = kind
    plan = _supported_plan(*kind)
    clip = int(np.float32(problem.clip or 0.0).view(np.int32))
    arguments = {"B": problem.B, "T": steps, "CLIP": clip}
    fields, others = _names(plan)
    names = (*fields, *others)
    for name, layout in zip(names, layouts, strict=True):
        dims = _DIMS[name.rstrip("0123456789")]
        dtype, strides = layout or (None, (0,) * len(dims))
        arguments |= {f"{name}_{dim}": stride for dim, stride in zip(dims, strides, strict=False) if dim != " "}
        if name == "LENGTHS":
            arguments["LENGTHS_BYTES"] = dtype.itemsize if dtype else 0
        if name == "BIAS":
            arguments["BIAS_KIND"] = ELEMENTS[str(dtype).removeprefix("torch.")]
    there = [layout for layout in layouts[: len(fields)] if layout is not None]
    rows = [dtype.itemsize * stride for dtype, strides in there for stride in strides[:-1]]
    aligned = aligned and problem.D % 8 == 0 and all(step % 16 == 0 for step in rows)
    if record and not (backward or problem.hidden_only):
        # What the backward needs is compiled beside this kernel; its rows are most likely aligned as these.
        launch.begin(_supported_plan(problem, True, True, element, device, make), aligned, device)
        if one_pass(problem):
            product.begin(element, device)
    kernel = launch.kernel_for(plan, aligned, device)
    return launch.Call(kernel, problem.N, plan.tiles(problem), arguments, names)
