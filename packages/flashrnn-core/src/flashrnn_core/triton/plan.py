"""Which kernels run a problem, and how they are built. Does not import triton.

Tiles, warps and stages are what was fastest on an H100 (`packages/flashrnn-torch/benchmarks/triton_speed.py`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from flashrnn_core.contract import Problem

LARGEST_D = 256
LARGEST_B = 65535 * 16  # of tiles, on the second axis of a grid
TILES = (8, 16)  # sequences of a program: half of a tensor core's operand, for half of the cell's work; or all of it
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
STATE_BYTES = {**BYTES, "float64": 8}


class Gpu(NamedTuple):
    """What a plan must know of a GPU: shared memory that a block may have, in bytes; multiprocessors."""

    shared_bytes: int
    processors: int


class Plan(NamedTuple):
    """How a kernel is built: `constants` are its own, see `scan.py` and `streamed.py`.

    `stream`: it is one of `streamed.py`. `recompute`: a backward that finds R h itself, with a second copy of R in
    registers; any other is given it. `memory`: float32 numbers that each program needs in device memory.
    """

    constants: dict[str, int]
    num_warps: int
    stream: bool
    recompute: bool
    memory: int


def reason_against(problem: Problem) -> str | None:
    """None, or why the kernels cannot run the problem, and what would."""
    if problem.dtype not in BYTES:
        return f"it computes in {', '.join(BYTES)}, not in {problem.dtype}; backend='vanilla' does"
    if problem.D > LARGEST_D:
        return f"D = {problem.D} is above {LARGEST_D}, the most it takes; backend='cuda_fused' or 'cuda' is for that"
    if problem.B > LARGEST_B:
        return f"B = {problem.B} is above {LARGEST_B}, the most it takes; backend='cuda' or 'vanilla' takes it"
    return None


def plan(problem: Problem, precision: str, gpu: Gpu, backward: bool) -> Plan:
    """The plan of a problem. It depends neither on T nor, but for TILE, on B; `launch` compiles both TILES at once.

    `precision`: of float32 dots, "tf32", or "bf16x6", float32 in three bfloat16 parts.
    """
    DP = max(16, 2 ** math.ceil(math.log2(problem.D)))
    size, S = BYTES[problem.dtype], len(problem.cell.states)
    R_bytes = problem.size("Gr") * DP * DP * size
    warps = min(8, DP // 8)
    registers = R_bytes // (warps * 32 * 4)  # of a thread, for one copy of R
    if size == 4 and precision == "bf16x6":
        registers = registers * 3 // 2
    room = gpu.shared_bytes - 8192  # R passes through; the rest is for h or dpre on their way
    recompute = size == 2 and registers <= 32 and 2 * R_bytes <= room
    fetched = problem.size("Gw") * size  # bytes a unit and sequence, of all that a step reads
    if backward:
        fetched += 2 * S * STATE_BYTES[problem.state_dtype] + (0 if recompute else 4 * problem.size("Gr"))
    stages = min(4, 1 + room // (TILES[-1] * DP * fetched))
    if registers <= 128 and R_bytes <= room and stages > 1:
        few = problem.N * -(-problem.B // TILES[0]) <= gpu.processors
        constants = {"DP": DP, "TILE": TILES[0] if few else TILES[1], "STAGES": stages}
        return Plan(constants, warps, stream=False, recompute=recompute, memory=0)
    units = min(DP, 64)
    constants = {"DP": DP, "TILE": TILES[1], "STATES": S, "UNITS": units, "STAGES": 3}
    constants["CHUNK"] = min(units, 64 if size == 2 else 16)
    return Plan(constants, 8, stream=True, recompute=False, memory=(2 * S + backward) * TILES[1] * DP)


def saved_states(problem: Problem) -> tuple[int, ...]:
    """Numbers of the states that the backward wants in float32: what the cell names, or all where out is coarser than
    what h met R in.
    """
    if problem.state_dtype in ("float32", "float64"):
        return ()
    if problem.state_dtype != problem.dtype:
        return tuple(range(len(problem.cell.states)))
    return tuple(problem.cell.states.index(s) for s in problem.cell.float32_states)


def programs(problem: Problem, plan: Plan) -> tuple[int, int]:
    """The grid: heads, tiles of the batch."""
    return problem.N, -(-problem.B // plan.constants["TILE"])
