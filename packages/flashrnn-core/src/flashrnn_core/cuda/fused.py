"""Plans of `cuda_fused`, whose R stays in registers and shared memory, or the reason why a problem has none.

The candidates stand in the order of preference; the first that fits is the plan. `streamed.resident_plan` compares it
with plans of `cuda` where they compete.
"""

from __future__ import annotations

from collections.abc import Iterator

from flashrnn_core.archs import Arch
from flashrnn_core.contract import Problem
from flashrnn_core.cuda.plan import BLOCK, CLUSTER, GLOBAL, Plan
from flashrnn_core.cuda.registers import filled, groups_alone, groups_at_once, spare

CLUSTER_BYTES = 32768  # of a vector, up to which a cluster exchanges it faster than L2
SMALL_BYTES = 16384  # of a vector, up to which messages of 16 bytes beat bulk copies


def make_plan(problem: Problem, backward: bool, arch: Arch, multiprocessors: int, element: str, saved) -> Plan | str:
    """The plan, or the reason why there is none."""
    smallest = Plan.smallest(problem, backward, element, saved)
    for candidate in _candidates(smallest, problem, arch, multiprocessors):
        plan = _fit(candidate, arch.shared_bytes)
        if plan is not None:
            return plan
    return (
        f"the recurrent matrix of one head ({problem.cell.name}, D={problem.D}, {problem.dtype}) does not fit the "
        f"registers and shared memory of {arch.name} with {multiprocessors} multiprocessors; "
        "backend='cuda' has no limit on D"
    )


def _candidates(base: Plan, problem: Problem, arch: Arch, multiprocessors: int) -> Iterator[Plan]:
    """Plans in the order of preference, registers and ring not yet given out. Measured on an H100, see docs."""
    D, N, tiles = problem.D, problem.N, -(-problem.B // 8)
    unit = 8 * base.SUB if base.wide else 16 if base.SUB == 2 else 8

    def lay(exchange: int, C: int, U: int, KS: int, NT: int) -> Plan:
        if not base.wide and C * U // 8 % 2:  # a k-step takes two blocks of 8 units
            C, U = (C, U + unit) if exchange != GLOBAL else (C + 1, U)
        plan = base.but(exchange=exchange, C=C, U=U, KS=KS, NT=NT)
        return plan.but(SMALL=int(plan.VECTOR * 4 <= SMALL_BYTES))

    def units(C: int) -> int:
        return -(-D // (C * unit)) * unit

    if base.idle:  # elementwise: blocks that need nothing of each other
        U = min(64, -(-D // 16) * 16)
        yield lay(BLOCK, -(-D // U), U, 2, 1)  # two slices of no k: twice the warps, a job each
        return

    # Where there is a multiprocessor for each 16 units of a long step.
    blocks = -(-D // 16)
    if base.long and arch.cluster > 1 and blocks > 1 and N * tiles <= groups_alone(blocks, multiprocessors):
        if blocks <= arch.cluster:
            for KS in ((4, 8) if D <= 64 else (8, 4)) if base.backward else (4, 2) if base.SUB == 2 else (2,):
                plan = lay(CLUSTER, blocks, 16, KS, 1)
                if plan.VECTOR * 4 <= CLUSTER_BYTES:
                    yield plan
        elif base.backward:
            yield lay(GLOBAL, blocks, 16, 8, 1)

    # One block, or one cluster: the words go through shared memory. One tile an item, if all items then fit the chip.
    for C in range(1, arch.cluster + 1):
        last = arch.cluster == C
        U = units(C)
        bytes_of_r = U * D * len(problem.cell.recurrent_gates) * (4 if base.wide else 2)
        if (128 if arch.cluster == 1 else 48 if last and bytes_of_r <= 2**17 else 32) < U:
            continue
        slices = ((4, 2, 1) if D <= 64 else (4, 2, 8)) if base.backward else ((1, 2) if D < 512 else (2, 1, 4))
        for NT in (1, 2) if tiles > 1 else (1,):
            for KS in slices:
                plan = lay(CLUSTER if C > 1 else BLOCK, C, U, KS, NT)
                crowded = N * tiles > groups_at_once(plan, multiprocessors)
                if (C == 1 or plan.VECTOR * 4 <= CLUSTER_BYTES) and not (NT == 1 < tiles and crowded):
                    yield plan
        break

    # Blocks that meet in L2, all of a group on the chip at once. (NT, widest U): first so that all groups fit together,
    # then in rounds.
    one_round = ((1, 16), (2, 16 if base.backward else 24), (4, 16), (8, 16))
    in_rounds = ((4, 16), (2, 32), (1, 128)) if base.backward else ((2, 24), (4, 16), (2, 128), (1, 128))
    for pairs, rounds in ((one_round, False), (in_rounds, True)):
        for NT, widest in pairs:
            if 2 * tiles <= NT:
                continue
            widths = range(unit, widest + 1, unit)
            for U in reversed(widths) if rounds else widths:
                C = -(-D // U)
                if (multiprocessors if rounds else multiprocessors // (N * -(-tiles // NT))) < C:
                    continue
                for KS in (8, 4, 16) if base.backward or (D <= 768 and len(problem.cell.states) <= 2) else (4, 8, 16):
                    plan = lay(GLOBAL, C, U, KS, NT)
                    if plan.WARPS <= 16 and multiprocessors >= plan.C:
                        yield plan


def _fit(plan: Plan, shared_bytes: int) -> Plan | None:
    """The plan with registers given out and the ring, the partial sums and the polling as large as fit, or None."""
    if not 1 <= plan.WARPS <= 32:
        return None
    sizes: tuple[tuple[int, int, int], ...] = ((4, 2, 0), (3, 2, 0), (3, 1, 0), (2, 1, 0))
    if plan.may_serve:
        sizes = (*((stages, parts, 1) for stages, parts, _ in sizes[:3]), *sizes)
    for most in (
        (24, 16, 8, 4, 2) if plan.backward else (16, 8, 4, 2)
    ):  # words; at least two k-steps, as of one the compiler makes a loop, arrays in memory
        poll = max(2, _divisor(plan.KW, max(2, most // plan.NT))) if plan.KW > 1 else 1
        polled = filled(plan.but(POLL=poll))
        if spare(polled) <= (-8 if plan.NT == 1 and not plan.backward else -1):
            continue
        for stages, parts, served in sizes:
            fitted = polled.but(STAGES=stages, PARTS=parts, SERVED=served)
            if fitted.layout["total"] <= shared_bytes - 1024:
                return fitted
    return None


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`, where it is not much less; else `most`."""
    best = max(d for d in range(1, most + 1) if n % d == 0)
    return best if best * 2 >= min(n, most) else most


def fewer_registers(plan: Plan, arch: Arch) -> Plan | None:
    """The plan with less in registers, for a compiler that spilled: less of R, or where shared memory has no room for
    it, fewer words polled at once, or a shorter ring; at last half the warps, each of which may have twice as many.
    None where there is no such plan.
    """
    drops = [plan.but(KR=max(0, plan.KR - n)) for n in (max(2, plan.KR // 4), 1)]
    polls = [plan.but(POLL=max(2, plan.POLL // 2))] if plan.exchange == GLOBAL and plan.POLL > 2 else []
    shorter = [p.but(STAGES=2, PARTS=1) for p in drops]
    halves = [plan.but(KS=plan.KS // 2, KR=2 * plan.KR, SERVED=0)] if plan.WARPS > 8 and plan.KS > 1 else []
    for less in drops + polls + shorter + halves:
        changed = (less.KR, less.POLL, less.KS) != (plan.KR, plan.POLL, plan.KS)
        if changed and less.layout["total"] <= arch.shared_bytes - 1024:
            return less
    return None
