"""A model of the time of a step: `cuda` takes the plan that it says is fastest, `auto` the backend.

The constants are fitted to an H100: of L2 and shared memory in bytes a µs, of instructions and latencies in µs. Other
architectures use them until they have their own.
"""

from __future__ import annotations

from flashrnn_core.contract import Problem
from flashrnn_core.cuda.plan import GLOBAL, Plan

HELD_BYTES = 30e6  # of what is streamed, that L2 keeps
FROM_L2 = 10.3e6  # all multiprocessors together
FROM_MEMORY = 3.5e6
SHARED = 4.6e-6  # µs a byte
MMA = 1.0e-3  # µs, for 16 x 8 x 16 of 16 bits
FLOAT32 = 10  # as long: four products of 8 k-steps, and their splits
JOB = 0.6  # its cell, and its way to and from memory, behind the exchange
EARLY = 0.88  # of the time, where fields are looked at before the wait for the vector
ON_CHIP = {False: (0.25, 0.025, 0.04), True: (0.75, 0.035, 0.10)}  # by direction: latency, more a block; time of a job


def microseconds(plan: Plan, problem: Problem, multiprocessors: int) -> float:
    """The time of a step of all of the problem, which the plan lays out in so many rounds of items, in µs."""
    items = problem.N * -(-max(problem.B, 1) // plan.item_rows)
    if plan.idle or plan.exchange != GLOBAL:
        return _on_chip(plan, items / multiprocessors)
    groups = min(items, multiprocessors // plan.C)
    step = _through_l2(plan, groups, min(groups, problem.N))
    return -(-items // groups) * step * (1.0 if plan.LATE else EARLY)


def _on_chip(plan: Plan, items: float) -> float:
    """A block or a cluster an item: the latency of a step, or where many share a multiprocessor, their instructions."""
    latency, block, job = ON_CHIP[plan.backward]
    jobs = items * plan.C * plan.UB * plan.NT
    products = items * plan.C * _products(plan)
    return ((latency + block * plan.C) ** 2 + (jobs * job + products) ** 2) ** 0.5


def _through_l2(plan: Plan, groups: int, heads: int) -> float:
    """A step of one round. What overlaps is joined by a norm between the largest and the sum."""
    vector = plan.K_STEPS * plan.NT * 256 * plan.TILES  # bytes that a team reads
    streamed = plan.NX * plan.POLL * plan.WARPS * plan.MT * 512  # and of R
    apart = plan.C * streamed * heads  # groups of one head share what L2 has
    terms = (
        plan.TEAMS * groups * plan.C * (vector + streamed) / FROM_L2,
        max(0.0, apart - HELD_BYTES) / FROM_MEMORY,
        plan.KW / plan.POLL * (0.285 + 0.021 * plan.POLL * plan.NT),  # a round's trip through L2
        plan.TEAMS * (plan.WARPS * plan.KM * plan.MT * 512 + 2 * streamed) * SHARED,
        plan.TEAMS * _products(plan),
    )
    partials = plan.TEAMS * 2 * plan.KS * plan.UB * plan.row_blocks * plan.NT * 256 * 1.5e-6
    return 0.45 + partials + JOB * plan.JOBS + sum(term**1.75 for term in terms) ** (1 / 1.75)


def _products(plan: Plan) -> float:
    return plan.WARPS * plan.KW * plan.MT * plan.NT * MMA * (FLOAT32 if plan.element == "float32" else 1)
