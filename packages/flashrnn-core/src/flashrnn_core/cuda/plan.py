"""The plan of a scan: how a problem is laid over an architecture, or why it cannot be.

Blocks of a group own U units each; the recurrent matrix stays in registers (KR k-steps a warp) and shared memory (the
rest). What a block holds, bytes by bytes, is stated here once: the kernel gets every number as a constant.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from flashrnn_core.archs import Arch
from flashrnn_core.contract import Problem
from flashrnn_core.cuda.emit import old_states_used

BLOCK, CLUSTER, PACKET = range(3)  # how a group exchanges its vector, see kernels/scan.cuh
ELEMENTS = {"bfloat16": 0, "float16": 1, "tf32": 2, "float32": 3}
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
        blocks = self.C * self.UB
        return (blocks if self.wide else blocks // 2) * self.SENT

    @property
    def KW(self) -> int:
        return -(-self.K_STEPS // self.KS)

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
    def TILE_BYTES(self) -> int:
        return sum(64 * size for *_, size in self.fields)

    @functools.cached_property
    def layout(self) -> dict[str, int]:
        """Offset in bytes of each part of shared memory; "total" is its size."""
        sizes = {
            "RING": self.STAGES * self.WARPS * self.JOBS * self.TILE_BYTES,
            "VECTOR": 0 if self.exchange == PACKET or self.idle else 2 * self.VECTOR * 4,
            "STAGE": 2 * self.WARPS * self.JOBS * self.SENT * (2 if self.wide else 1) * 128
            if self.exchange == CLUSTER
            else 0,
            "PARTIALS": self.PARTS * self.KS * self.TILES * self.MT * 2 * self.NT * 256 if self.KS > 1 else 0,
            "R": self.WARPS * (self.KW - self.KR) * self.MT * 512,
            "BIAS": len(self.problem.cell.gates) * self.U * 4,
            "BARRIERS": 16,
        }
        offsets, total = {}, 0
        for name, size in sizes.items():
            offsets[name] = total
            total += -(-size // 128) * 128
        return offsets | {"total": total}

    @property
    def idle(self) -> bool:
        """No vector is exchanged: the gradient through R is cut."""
        return self.backward and self.problem.cut

    @property
    def items(self) -> int:
        return self.problem.N * -(-self.problem.B // (8 * self.NT))


def _registers(plan: Plan) -> Plan:
    """The plan with as many k-steps in registers as fit beside what the loop needs."""
    cell = plan.problem.cell
    allowed = min(255, REGISTERS // (plan.WARPS * 32) // 8 * 8)
    gates, states = len(cell.gates), len(cell.states)
    chains = 1 if plan.MT * plan.NT >= 4 else 2
    chunks = -(-sum(8 if size == 2 else 16 for *_, size in plan.fields) // 32)
    working = 40 + chains * plan.MT * plan.NT * 4 + plan.JOBS * (2 * states + 4 * chunks)
    if plan.backward:
        working += 20 + plan.JOBS * (2 * states + 2 * (3 * gates + 2 * states)) + 2 * gates
    else:
        working += plan.JOBS * 2 * gates + 2 * (gates + states)
    if plan.exchange == PACKET:
        working += plan.POLL * plan.NT * 2 * 2
    if plan.element == "float32":
        working += 12
    return replace(plan, KR=max(0, min(plan.KW, (allowed - working) // (plan.MT * 4))))


def _fit(plan: Plan, shared_bytes: int) -> Plan | None:
    """The plan with registers given out and the ring and partial sums as large as fit, or None."""
    if plan.WARPS > 32 or plan.WARPS < 1:
        return None
    for stages, parts in ((4, 2), (3, 2), (3, 1), (2, 1)):
        fitted = _registers(replace(plan, STAGES=stages, PARTS=parts))
        if fitted.layout["total"] <= shared_bytes - 1024:
            return fitted
    return None


def make_plan(problem: Problem, backward: bool, arch: Arch, multiprocessors: int, element: str, saved) -> Plan | str:
    """The plan, or the reason why there is none."""
    base = Plan(problem, backward, element, tuple(saved), BLOCK, 1, 8, 1, 1)
    unit = 8 * base.SUB if element in ("tf32", "float32") else 16 if base.SUB == 2 else 8
    tiles = -(-problem.B // 8)
    for exchange, C, U, KS, NT in _candidates(base, arch, multiprocessors, unit, tiles):
        if C * U // 8 % 2 and element not in ("tf32", "float32"):
            continue
        plan = _fit(replace(base, exchange=exchange, C=C, U=U, KS=KS, NT=NT), arch.shared_bytes)
        if plan is not None:
            return plan
    return (
        f"the recurrent matrix of one head ({problem.cell.name}, D={problem.D}, {problem.dtype}) does not fit the "
        f"registers and shared memory of {arch.name} with {multiprocessors} multiprocessors; "
        "backend='vanilla' has no limit on D"
    )


def _candidates(base: Plan, arch: Arch, multiprocessors: int, unit: int, tiles: int):
    """(exchange, C, U, KS, NT) in the order of preference."""
    D = base.problem.D
    NT = 1 if tiles == 1 else 2
    if base.idle:  # elementwise: any block will do
        yield BLOCK, 1, -(-D // 16) * 16, 1, 1
    slices = (4, 2, 1, 8) if base.backward else (1, 2, 4)

    def units(C: int) -> int:
        return -(-D // (C * unit)) * unit

    if D <= 32 or arch.cluster == 1:
        for KS in slices:
            U = -(-D // 16) * 16
            if (64 if base.backward else 128) >= U:
                yield BLOCK, 1, U, KS, NT
    for C in range(1, arch.cluster + 1):
        U = units(C)
        if U <= 32 and C * U >= D and C * U < D + U * 2 and (C == 1 or units(C - 1) > 32):
            for KS in slices:
                yield (CLUSTER if C > 1 else BLOCK), C, U + (U * C // 8 % 2) * 8, KS, NT
    for U in range(unit, 129, unit):
        C = -(-D // U)
        if C * U // 8 % 2:
            C += 1
        if multiprocessors >= C:
            for KS in (8, 16, 4):
                yield PACKET, C, U, KS, NT
