"""A model of the time of a call, in µs a step: `cuda` takes the plan that it says is fastest, `auto` the backend.

`scan` is a kernel's, `outside` what a backward computes besides, `flashrnn_core.triton.model` the other kernels'. The
constants are fitted to an H100 (`packages/flashrnn-torch/benchmarks/choice.py`): bytes a µs, µs of instructions and
latencies. Other architectures use them until they have their own.
"""

from __future__ import annotations

from flashrnn_core.contract import Problem
from flashrnn_core.cuda.plan import GLOBAL, Plan
from flashrnn_core.cuda.registers import groups_alone, groups_at_once

HELD_BYTES = 30e6  # of what is streamed, that L2 keeps
FROM_L2 = 21e6  # all multiprocessors together
FROM_MEMORY = 3.5e6
FIELDS = 1.7e6  # what a scan's jobs bring from device memory and send there, in pieces of 16 to 32 bytes
SHARED, APART = 5.8e-6, 1.25  # µs a byte; as long, where a warp's k-steps do not come in whole rounds
MMA = 7.6e-4  # µs, for 16 x 8 x 16 of 16 bits
FLOAT32 = 10  # as long: four products of 8 k-steps, and their splits
JOB, ANOTHER = 0.4, 0.155  # a warp's first, behind the exchange: its cell, its way to and from memory; one more
TRIP, WORD = 0.21, 0.028  # through L2, of a round of k-steps; more for each k-step and batch tile
PARTIAL = 8.8e-6  # µs a byte of partial sums
REFILL = 0.1  # of a streamed round, by how little it multiplies
TOGETHER = 1.7, 2.0  # how what overlaps in a round is joined; of three or four teams, which stream nothing
MEETING = 0.32  # of blocks in L2, the least of a round
PAIR = 0.45  # of two blocks that share k
EARLY, LATE = {False: 0.0, True: 0.35}, {False: 0.012, True: 0.075}  # by direction: what a step has else; and of each
# value that a job takes from fields, where it does behind the wait
ON_CHIP = {False: (0.29, 0.002), True: (0.84, 0.015)}  # of a step, its latency beside the exchange; time of a job
MESSAGE, BULK = {False: 1.1e-3, True: 7.5e-4}, 4.5e-5  # of a cluster's exchange: of 16 bytes; a byte in bulk copies
STAGED, STAGED_JOB, STAGED_VALUE = 1.1, 0.7, 0.04  # of kernels/staged.cuh: of a step, of a job, and of its values
WGMMA = 5.5e-4  # as MMA
OVERLAP = 4.5  # how time and time of device memory are joined
MATMUL = 2e9  # operations a µs, of a library's matmul
BESIDE = 1.2e6  # bytes a µs, of what is computed outside of the scans
CALL = {False: 8.0, True: 5.0}  # µs of a call besides its steps


def scan(plan: Plan, problem: Problem, multiprocessors: int) -> float:
    """The time of a step of all of the problem, which the plan lays out in so many rounds of items, in µs."""
    items, memory = plan.items(problem), problem.B * problem.N * problem.D * plan.unit_bytes / FIELDS
    if plan.STAGED:
        rounds = -(-items // plan.groups(items, multiprocessors))
        return joined(OVERLAP, rounds * _staged(plan), memory)
    if plan.idle or plan.exchange != GLOBAL:
        time = _on_chip(plan, items, multiprocessors)
    else:
        groups = plan.groups(items, multiprocessors)
        step = _through_l2(plan, groups, min(groups, problem.N))
        time = -(-items // groups) * step + EARLY[plan.backward] + plan.LATE * LATE[plan.backward] * plan.AHEAD
    return joined(OVERLAP, time, memory)


def joined(power: float, *times: float) -> float:
    """The time of what overlaps, a norm: the sum at a power of 1, the longest at infinity."""
    return sum(time**power for time in times) ** (1 / power)


def outside(problem: Problem, recurrent: bool) -> float:
    """Of a backward, the matmuls over all steps, in µs a step: dR and db; `recurrent`: R h too."""
    h = problem.B * problem.N * problem.D
    gates, element = problem.size("G"), 4 if problem.dtype == "float32" else 2
    products = 2 * h * problem.D * problem.size("Gr") / MATMUL
    moved = h * element * (1 + (2 if problem.N == 1 else 1) * gates)  # a library's sum reads dpre once more
    if recurrent:
        products, moved = 2 * products, moved + h * (4 * problem.size("Gr") + 3 * element)
    return products + moved / BESIDE


def call(plan: Plan, problem: Problem) -> float:
    """What a call takes besides its steps, in µs for each of them: launches, and R packed."""
    packing = 2 * problem.N * plan.packed_bytes / FROM_MEMORY
    return (CALL[plan.backward] + packing) / max(problem.T, 1)


def _on_chip(plan: Plan, items: int, multiprocessors: int) -> float:
    """A block or a cluster an item: the latency of a step, or where many share a multiprocessor, what all of them do;
    in rounds, where not all are there at once.
    """
    latency, job = ON_CHIP[plan.backward]
    if plan.idle:  # blocks that need nothing of each other
        alone = at_once = max(1, multiprocessors // plan.C)
    else:
        alone = max(1, groups_alone(plan.C, multiprocessors))
        at_once = max(alone, groups_at_once(plan, multiprocessors))
    sharing = min(-(-min(items, at_once) // alone), -(-at_once * plan.C // multiprocessors))
    exchanged = plan.VECTOR * (MESSAGE[plan.backward] / 4 if plan.SMALL else 4 * BULK)
    exchanged = exchanged if plan.C > 1 and not plan.idle else 0.0
    busy = plan.UB * plan.NT * job + _products(plan) + plan.WARPS * plan.KM * plan.MT * 512 * SHARED
    return -(-items // at_once) * joined(2, latency + sharing * exchanged, sharing * busy)


def _through_l2(plan: Plan, groups: int, heads: int) -> float:
    """A step of one round."""
    vector = plan.WARPS * plan.KW * plan.NT * 256  # bytes that a team reads
    streamed = plan.NX * plan.POLL * plan.WARPS * plan.MT * 512  # and of R
    apart = plan.C * streamed * heads  # groups of one head share what L2 has
    terms = (
        plan.TEAMS * groups * plan.C * (vector + streamed) / FROM_L2,
        max(0.0, apart - HELD_BYTES) / FROM_MEMORY,
        plan.KW / plan.POLL * (TRIP + WORD * plan.POLL * plan.NT),
        plan.TEAMS * (plan.WARPS * plan.KM * plan.MT * 512 + 2 * streamed) * SHARED * (1 if plan.STREAM else APART),
        plan.TEAMS * _products(plan),
    )
    sums = plan.UB * plan.row_blocks * plan.NT * 256  # bytes of those of a team, of one slice
    partials = plan.TEAMS * 2 * plan.SLICES * sums * PARTIAL
    meeting = MEETING + partials + JOB + ANOTHER * (plan.JOBS - 1)
    if plan.SPLIT > 1:
        meeting += PAIR + plan.TEAMS * plan.SPLIT * sums / 16 * MESSAGE[True]
    meeting += REFILL * plan.NX / (plan.POLL * plan.NT)
    return meeting + joined(TOGETHER[plan.TEAMS > 2 and plan.NX == 0], *terms)


def _staged(plan: Plan) -> float:
    """A step of one round of kernels/staged.cuh."""
    multiplied = plan.WARPS * plan.KW * plan.NT * WGMMA
    return STAGED + multiplied + plan.JOBS * (STAGED_JOB + STAGED_VALUE * plan.AHEAD)


def _products(plan: Plan) -> float:
    return plan.WARPS * plan.KW * plan.MT * plan.NT * MMA * (FLOAT32 if plan.element == "float32" else 1)
