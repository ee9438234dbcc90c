"""Launches of the kernels on tensors: anything that Triton takes (`data_ptr()`, `dtype`) with `stride(i)` in elements,
torch's for example.
"""

from __future__ import annotations

import math
from typing import Any

import triton

from flashrnn_core.contract import Problem
from flashrnn_core.triton.emit import kernels
from flashrnn_core.triton.plan import TILES, Plan, programs, saved_states


def forward(problem: Problem, plan: Plan, precision: str, *tensors, memory=None):
    """Launch the forward on the current stream.

    `tensors`: Wx R b states resets lengths out last saved, as in `scan.forward`; `memory`: where the plan needs it.
    """
    kernel = kernels(problem.cell, problem.dtype == "float32", _kept(problem, tensors[8]), plan.stream).forward
    _launch(kernel, problem, plan, precision, tensors, tensors[:1], (), memory, HIDDEN_ONLY=problem.hidden_only)


def backward(problem: Problem, plan: Plan, precision: str, *tensors, memory=None):
    """Launch the backward on the current stream.

    `tensors`: Wx R b rec states resets lengths out saved dout dlast dpre dstates, as in `scan.backward`; `memory`:
    where the plan needs it. `rec` is None where the plan recomputes.
    """
    kernel = kernels(problem.cell, problem.dtype == "float32", _kept(problem, tensors[8]), plan.stream).backward
    constants = {
        "GATES": problem.size("G"),
        "GR": problem.size("Gr"),
        "CUT": problem.cut,
        "CLIP": problem.clip is not None,
    }
    strided, numbers = (tensors[0], tensors[9]), (problem.clip or 0.0,)
    _launch(kernel, problem, plan, precision, tensors, strided, numbers, memory, **constants)


def _launch(kernel, problem: Problem, plan: Plan, precision: str, tensors, strided, numbers, memory, **constants: Any):
    strides = [x.stride(i) for x in strided for i in range(4)]
    align = math.gcd(16, problem.D, *strides)  # elements read at once; of contiguous tensors the same for any B and T
    arguments = (
        *tensors,
        *(stride // align for stride in strides),
        *numbers,
        *(problem.B, problem.T, problem.N),
    )
    options = {
        "D": problem.D,
        "PRECISION": precision,
        "ALIGN": align,
        "REVERSE": problem.reverse,
        **plan.constants,
        **constants,
        **({"memory": memory} if plan.stream else {}),
        "num_warps": plan.num_warps,
        "num_stages": 1,  # loops say it themselves
        "maxnreg": 255,  # without it ptxas spills a few registers for an occupancy that nothing here can use
        "enable_fp_fusion": True,
    }
    grid = programs(problem, plan)
    if not plan.stream and isinstance(kernel, triton.JITFunction):
        _compile_other_tile(kernel, arguments, tensors, options)
    kernel[grid](*arguments, **options)


def _compile_other_tile(kernel, arguments, tensors, options: dict[str, Any]) -> None:
    """At the first launch of a kernel: compile it for the other TILE too, so that another B compiles nothing."""
    constants = tuple(v for k, v in options.items() if k != "TILE")
    key = (kernel, constants, tuple(x is not None and x.dtype for x in tensors))
    if key not in _compiled:
        _compiled.add(key)
        other = next(tile for tile in TILES if tile != options["TILE"])
        kernel.warmup(*arguments, grid=(1,), **{**options, "TILE": other})


_compiled: set[tuple] = set()


def _kept(problem: Problem, saved) -> tuple[int, ...]:
    return () if saved is None else saved_states(problem)
