"""The plan of a scan: how a problem is laid over an architecture, or why it cannot be.

Blocks of a group own U units each; the recurrent matrix stays in registers (KR k-steps a warp) and shared memory (the
rest). What a block holds, bytes by bytes, is stated here once: the kernel gets every number as a constant.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from flashrnn_core.archs import Arch
from flashrnn_core.contract import Problem
from flashrnn_core.cuda.emit import old_states_used, prepared_values

BLOCK, CLUSTER, GLOBAL = range(3)  # how a group exchanges its vector, see kernels/scan.cuh
ELEMENTS = {"bfloat16": 0, "float16": 1, "tf32": 2, "float32": 3}
CLUSTER_BYTES = 32768  # of a vector, up to which a cluster exchanges it faster than L2
SMALL_BYTES = 16384  # of a vector, up to which messages of 16 bytes beat bulk copies
REGISTERS = 65536  # of a multiprocessor, 32 bits each


@dataclass(frozen=True)
class Plan:
    """Numbers of the kernel. Upper case: the constant of that name in kernels/scan.cuh."""

    problem: Problem
    backward: bool
    element: str  # a key of ELEMENTS
    saved: tuple[int, ...]  # states kept in float32 besides the outputs
    exchange: int
    C: int  # blocks of a group
    U: int  # units of a block
    NT: int  # batch tiles of 8 of an item
    KS: int  # slices of k, one a warp
    KR: int = 0  # k-steps a warp keeps in registers
    STAGES: int = 4  # of the ring
    PARTS: int = 2  # buffers of the partial sums
    POLL: int = 4  # k-steps polled together
    SERVED: int = 0  # warps without a job look ahead for those with one, see kernels/serve.cuh
    SMALL: int = 0  # CLUSTER: the vector goes in messages of 16 bytes, not in bulk copies

    STREAM = SLOTS = HELD = LATE = RECOMPUTE = 0  # see `streamed.Streamed`
    TEAMS = 1

    def but(self, **changes) -> Self:
        """A copy with changes, in a fifth of the time of `dataclasses.replace`: planning makes thousands."""
        copy, known = object.__new__(type(self)), self.__dict__
        copy.__dict__.update({name: known[name] for name in self.__dataclass_fields__}, **changes)
        return copy

    @property
    def item_rows(self) -> int:
        """Batch rows that a group works on at once: an item for each of its teams."""
        return self.TEAMS * self.NT * 8

    @property
    def NX(self) -> int:
        """Rounds that a warp streams at every step."""
        return 0

    @property
    def packed_bytes(self) -> int:
        """Of R of one head in fragment order, in a workspace; 0: R is read as it is given."""
        return 0

    @property
    def wide(self) -> bool:
        return self.element in ("tf32", "float32")

    @functools.cached_property
    def row_blocks(self) -> int:
        return 1 if self.backward else len(self.problem.cell.recurrent_gates)

    @property
    def SUB(self) -> int:
        return 2 if self.row_blocks % 2 else 1

    @property
    def MT(self) -> int:
        return self.row_blocks * self.SUB // 2

    @property
    def SENT(self) -> int:
        return len(self.problem.cell.recurrent_gates) if self.backward else 1

    @property
    def UB(self) -> int:
        return self.U // 8

    @property
    def TILES(self) -> int:
        return self.UB // self.SUB

    @property
    def WARPS(self) -> int:
        return self.TILES * self.KS

    @property
    def JOBS(self) -> int:
        return self.SUB * self.NT if self.KS == 1 else -(-self.UB * self.NT // self.WARPS)

    @property
    def K_STEPS(self) -> int:
        if self.idle:
            return 0
        blocks = self.C * self.UB
        return (blocks if self.wide else blocks // 2) * self.SENT

    @property
    def KW(self) -> int:
        return -(-self.K_STEPS // self.KS)

    @property
    def KM(self) -> int:
        """k-steps a warp keeps in shared memory."""
        return self.KW - self.KR

    @property
    def VECTOR(self) -> int:
        return self.C * self.UB * self.NT * self.SENT * (2 if self.wide else 1) * 32

    @functools.cached_property
    def fields(self) -> tuple[tuple[str, int, int], ...]:
        """What the ring brings for a unit and a step: (kind, number, bytes); 16-bit fields first."""
        cell, problem = self.problem.cell, self.problem
        element, state = (4 if self.wide else 2), (4 if problem.state_dtype == "float32" else 2)
        fields = [("wx", k, element) for k in range(len(cell.input_gates))]
        if self.backward:
            fields += [("rec", k, 4) for k in range(len(cell.recurrent_gates))]
            fields += [("old", k, 4 if k in self.saved else state) for k in old_states_used(cell)]
            fields += [("dout", k, state) for k in range(len(cell.states))]
        return tuple(sorted(fields, key=lambda f: f[2]))

    @property
    def CHUNKS(self) -> int:
        """Copies of 16 bytes that bring a job's tile: 8 rows of 16 bytes a 16-bit field, of 32 bytes a 32-bit one."""
        return self.TILE_BYTES // 16

    @property
    def CHUNKS_A_LANE(self) -> int:
        return -(-self.CHUNKS // 32)

    @property
    def TILE_BYTES(self) -> int:
        return sum(64 * size for *_, size in self.fields)

    @property
    def stores(self) -> int:
        """States that a forward returns."""
        return 1 if self.problem.hidden_only else len(self.problem.cell.states)

    @property
    def long(self) -> bool:
        """A step has many instructions beside the matmul: it gains where warps without a job serve those with one."""
        return self.backward or self.SUB == 2 or self.stores > 2

    @property
    def may_serve(self) -> bool:
        """There is a warp without a job for each with one, and time to gain: not behind the long way through L2."""
        spare = self.KS > 1 and self.WARPS >= 2 * -(-self.UB * self.NT // self.JOBS)
        return spare and self.long and self.exchange != GLOBAL

    @property
    def AHEAD(self) -> int:
        """Values that a unit's step takes from before the exchange."""
        cell = self.problem.cell
        if not self.backward:
            return len(cell.gates)
        return prepared_values(cell) + len(cell.states) + self.problem.resets

    @property
    def BEHIND(self) -> int:
        """Bytes of a job's output rows."""
        cell, state = self.problem.cell, (4 if self.problem.state_dtype == "float32" else 2)
        if self.backward:
            return 64 * len(cell.gates) * (4 if self.wide else 2)
        return 64 * ((1 if self.problem.hidden_only else len(cell.states)) * state + 4 * len(self.saved))

    @functools.cached_property
    def layout(self) -> dict[str, int]:
        """Offset in bytes of each part of shared memory; "total" is its size."""
        sizes = {
            "RING": self.STAGES * self.UB * self.NT * self.TILE_BYTES,
            "VECTOR": 0 if self.exchange == GLOBAL or self.idle else 2 * self.VECTOR * 4,
            "STAGE": 2 * self.VECTOR // self.C * 4 if self.exchange == CLUSTER else 0,
            "PARTIALS": self.PARTS * self.KS * self.TILES * self.MT * 2 * self.NT * 256 if self.KS > 1 else 0,
            "AHEAD": 2 * self.UB * self.NT * self.AHEAD * 256 if self.SERVED else 0,
            "BEHIND": 2 * self.UB * self.NT * self.BEHIND if self.SERVED else 0,
            "R": self.WARPS * (self.KW - self.KR) * self.MT * 512,
            "BIAS": len(self.problem.cell.gates) * self.U * 4,
            "BARRIERS": 16,
        }
        return offsets(sizes)

    @property
    def idle(self) -> bool:
        """No vector is exchanged: the gradient through R is cut."""
        return self.backward and self.problem.cut


def offsets(sizes: dict[str, int]) -> dict[str, int]:
    """Where each part of shared memory starts, in bytes; "total": what all take."""
    starts, total = {}, 0
    for name, size in sizes.items():
        starts[name] = total
        total += -(-size // 128) * 128
    return starts | {"total": total}


def _registers(plan: Plan) -> Plan:
    """The plan with as many k-steps in registers as fit beside what the loop needs."""
    return plan.but(KR=max(0, min(plan.KW, _spare(plan) // (plan.MT * 4))))


def _spare(plan: Plan) -> int:
    """Registers of a thread left for R, about; much below 0, the loop alone would spill."""
    return min(247, REGISTERS // (plan.WARPS * 32) // 8 * 8) - _working(plan)


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
    fitted = _registers(plan)
    return max(1, REGISTERS // (fitted.WARPS * 32 * (_working(fitted) + fitted.KR * fitted.MT * 4)))


def _working(plan: Plan) -> int:
    """Registers of a thread beside R, about."""
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
        polled = _registers(plan.but(POLL=poll))
        if _spare(polled) <= (-8 if plan.NT == 1 and not plan.backward else -1):
            continue
        for stages, parts, served in sizes:
            fitted = polled.but(STAGES=stages, PARTS=parts, SERVED=served)
            if fitted.layout["total"] <= shared_bytes - 1024:
                return fitted
    return None


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


def make_plan(problem: Problem, backward: bool, arch: Arch, multiprocessors: int, element: str, saved) -> Plan | str:
    """The plan, or the reason why there is none. Problems that differ in B, T, N or the clip's value share a kernel:
    the plan's own problem has 1 in their place.
    """
    clip = 1.0 if backward and problem.clip is not None else None
    kernel = replace(problem, B=1, T=1, N=1, clip=clip, cut=backward and problem.cut)
    base = Plan(kernel, backward, element, tuple(saved), BLOCK, 1, 8, 1, 1)
    for candidate in _candidates(base, problem, arch, multiprocessors):
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


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`, where it is not much less; else `most`."""
    best = max(d for d in range(1, most + 1) if n % d == 0)
    return best if best * 2 >= min(n, most) else most
