"""A model of the time of Triton's kernels, in µs a step, beside that of CUDA's: see `flashrnn_core.cuda.model`.

Does not import triton. Fitted to an H100; other architectures use it until they have their own.
"""

from __future__ import annotations

import math

from flashrnn_core.contract import Problem
from flashrnn_core.cuda.emit import old_states_used
from flashrnn_core.cuda.model import CALL, joined
from flashrnn_core.triton.plan import BYTES, STATE_BYTES, TILES, Gpu, Plan, programs

FORWARD = 0.31, 0.012, 0.0022  # the least of a step; else so much, and more for each row of a gate of a head
BACKWARD = 0.55, 0.051, 0.0048
STREAMED = {False: 0.016, True: 0.021}  # for each row, where R comes from L2
WIDE = 0.0022  # more for each unit, of a tile of all 16 rows of a tensor core's operand
SHARE = 0.86  # of its time alone, that a program takes beside others
FIELDS = 5.8e6  # bytes a µs
OVERLAP = 6
FLOAT32 = 4  # as long


def scan(plan: Plan, problem: Problem, gpu: Gpu, backward: bool) -> float:
    """The time of a step of all of the problem, in µs."""
    DP, gates = plan.constants["DP"], problem.size("Gr")
    rounds = math.prod(programs(problem, plan)) / gpu.processors
    if plan.stream:
        return STREAMED[backward] * DP * gates * max(1.0, rounds)
    least, start, row = BACKWARD if backward else FORWARD
    time = max(least * (gates / 4 if backward else 1), start + row * gates * DP)
    if plan.constants["TILE"] == TILES[1]:
        time *= 1 + WIDE * DP
    if problem.dtype == "float32":
        time *= FLOAT32
    time *= max(1.0, SHARE * (rounds if DP <= 32 else math.ceil(rounds)))  # small ones share a multiprocessor
    return joined(OVERLAP, time, _bytes(plan, problem, backward) / FIELDS)


def call(problem: Problem, backward: bool) -> float:
    """What a call takes besides its steps, in µs for each of them."""
    return CALL[backward] / max(problem.T, 1)


def _bytes(plan: Plan, problem: Problem, backward: bool) -> int:
    """What a step reads and writes of tensors that have time."""
    cell, element, state = problem.cell, BYTES[problem.dtype], STATE_BYTES[problem.state_dtype]
    states = element * len(cell.input_gates) + state * (1 if problem.hidden_only else len(cell.states))
    if backward:
        states += element * len(cell.gates) + state * len(old_states_used(cell))
        states += 0 if plan.recompute else 4 * problem.size("Gr")
    return problem.B * problem.N * problem.D * states
