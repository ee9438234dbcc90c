"""Registers: what a thread needs beside R, what that leaves for R, and how many groups the chip so runs at once.

Estimates, fitted to what the compiler took; it has the last word, see `fewer_registers` of `fused` and `streamed`.
"""

from __future__ import annotations

from flashrnn_core.cuda.emit import prepared_values
from flashrnn_core.cuda.plan import GLOBAL, Plan

REGISTERS = 65536  # of a multiprocessor, 32 bits each


def spare(plan: Plan) -> int:
    """Registers of a thread left for R, about; much below 0, the loop alone would spill."""
    return min(247, REGISTERS // (plan.TEAMS * plan.WARPS * 32) // 8 * 8) - _working(plan)


def filled(plan: Plan) -> Plan:
    """The plan with as many k-steps in registers as fit beside what the loop needs."""
    return plan.but(KR=max(0, min(plan.KW, spare(plan) // (plan.MT * 4))))


def groups_at_once(plan: Plan, multiprocessors: int) -> int:
    """Groups of a plan that the chip runs at once, where blocks may share a multiprocessor."""
    resident = _resident(plan)
    if resident == 1:
        return groups_alone(plan.C, multiprocessors)
    return multiprocessors * resident * (9 if 8 < plan.C <= 16 else 10) // (10 * plan.C)


def groups_alone(C: int, multiprocessors: int) -> int:
    """Groups of C blocks that run at once, each block with a multiprocessor to itself. A cluster lies in one part of
    the chip (GPC), of 18 multiprocessors or a few less: of more than 8 blocks each has one. An H100 runs 7 of 16.
    """
    return multiprocessors // (18 if 8 < C <= 16 else C)


def _resident(plan: Plan) -> int:
    """Blocks of a plan that one multiprocessor holds, by their registers."""
    fitted = filled(plan)
    return max(1, REGISTERS // (fitted.WARPS * 32 * (_working(fitted) + fitted.KR * fitted.MT * 4)))


def _working(plan: Plan) -> int:
    """Registers of a thread beside R, about."""
    return _working_streamed(plan) if plan.STREAM else _working_fused(plan)


def _working_fused(plan: Plan) -> int:
    cell = plan.problem.cell
    gates, states = len(cell.gates), len(cell.states)
    chains = 1 if plan.MT * plan.NT >= 4 else 4 if plan.MT * plan.NT == 1 and plan.KW >= 8 else 2
    working = 40 + chains * plan.MT * plan.NT * 4 + plan.JOBS * (2 * states + 4 * plan.CHUNKS_A_LANE)
    if plan.backward:
        working += 32 + plan.JOBS * 2 * (states + prepared_values(cell)) + 2 * gates
    else:
        working += plan.JOBS * 2 * gates + 2 * (gates + states)
    if plan.exchange == GLOBAL:
        working += 14 if plan.backward else 30
        if plan.NT == 1 and not plan.wide:
            working -= (54 if plan.KW <= 32 else 22) if plan.backward else 36
            if plan.problem.resets or plan.problem.lengths:
                working += 16 if plan.backward else 10
        working += plan.POLL * plan.NT * 2 * (2 if plan.POLL < plan.KW else 1) + (12 if plan.POLL * plan.NT > 8 else 0)
        if plan.backward:
            many = plan.POLL > 4
            working += 36 if plan.NT > 2 else 16 if plan.NT == 2 and (many or plan.TILES > 1) else 0
            working += 8 if plan.NT == 1 and many and plan.wide else 0
        else:
            working += 10 * (plan.JOBS - 1) + (10 if plan.MT != 2 else 0)
        working += plan.POLL * plan.NT * 2 if plan.element == "float32" else 0
        if states > 2:
            working += 0 if plan.backward else 36 if plan.NT > 1 and plan.WARPS > 8 else 0
    elif plan.element == "float32":
        working += 150 if plan.KS == 1 and plan.KW * plan.MT >= 48 else 24  # the splits of so many tiles never fit
    elif plan.KS == 1 and plan.MT > 2:
        working += 20 * plan.JOBS
    if plan.element == "float32":
        working += 24
    return working


def _working_streamed(plan: Plan) -> int:
    cell = plan.problem.cell
    gates, states = len(cell.gates), len(cell.states)
    if plan.STAGED:
        masks = 5 * plan.JOBS * (plan.problem.resets + plan.problem.lengths)
        return 74 + plan.NT * 4 + 2 * plan.JOBS * states + masks
    sums = plan.MT * plan.NT * 4 * (1 if plan.MT * plan.NT >= 4 else 2)
    polled = plan.POLL * plan.NT * 4
    kept = 2 * plan.JOBS * (states + plan.problem.resets + plan.problem.lengths)  # from step to step
    working = 56 + sums + polled + kept + 2 * plan.JOBS
    working += 24 if plan.MT * plan.NT >= 32 else 0
    working += 8 if polled >= 64 else 0
    if plan.SPLIT > 1 and plan.backward and not plan.wide:
        # Fitted like all here: long rounds of half the k-steps want less, many rows more.
        working += -36 if polled == 64 and plan.POLL == plan.WARPS == 8 else 16 if plan.MT > 2 else 0
    working += 12 if plan.backward and plan.JOBS > 4 else 0
    job = 2 * (gates + states) + (2 * (states + prepared_values(cell)) + 8 if plan.backward else 0)
    if plan.TEAMS > 1 or plan.WARPS > 8:  # where there are few: else a spill is rare, and R goes before caution
        job += 8 * (plan.JOBS - 1) + (18 if plan.backward else 0)
        working += 16 * (plan.JOBS - 1)
    working = max(working, 56 + kept + job + (sums if plan.KS == 1 else 0))
    if plan.backward and polled >= 32 and plan.WARPS > 8 and plan.KW > 16:  # long rounds of a long slice spilled by two
        working += 6
    if not plan.backward and states > 2 and plan.WARPS > 8:
        working += 24
    if plan.wide and plan.POLL == 2:
        working += 8
    if plan.element == "tf32":
        working += 32
    if plan.element == "float32":
        working += 40 + 4 * plan.MT * plan.NT + polled // 4  # products of a k-step are summed apart
        working += 20 if plan.WARPS > 8 else 0
    return working
