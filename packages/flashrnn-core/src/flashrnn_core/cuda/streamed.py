"""Plans of `cuda`, with no limit on D: what registers and shared memory cannot keep of R is streamed at every step.

Always through L2 (GLOBAL), one head and NT batch tiles an item, as many groups as the chip holds at once. Among the
ways to lay a problem out, the one that a model of the time of a step says is fastest: see `model.scan`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from flashrnn_core.archs import Arch
from flashrnn_core.contract import Problem
from flashrnn_core.cuda import fused
from flashrnn_core.cuda.emit import prepared_values
from flashrnn_core.cuda.model import HELD_BYTES, scan
from flashrnn_core.cuda.plan import GLOBAL, Plan, offsets, resident_blocks
from flashrnn_core.cuda.registers import REGISTERS, groups_alone, spare


@dataclass(frozen=True)
class Streamed(Plan):
    """A plan whose warps keep KR k-steps in registers, KM in shared memory, and stream the rest (kernels/stream.cuh).
    KR, KM and KW are whole rounds, of POLL k-steps.
    """

    SUB: int = 1  # blocks of 8 units of a warp
    KM: int = 0
    SLOTS: int = 0  # of a warp's ring, a round each
    HELD: int = 0  # rounds of a warp that L2 is asked to keep
    LATE: int = 1  # fields are read behind the wait for the vector
    TEAMS: int = 1  # of WARPS warps, each on an item of its own
    SPLIT: int = 1  # 2: pairs of blocks, of which each takes half of k for the units of both (kernels/reduce.cuh)
    STAGED: int = 0  # clusters of 4 instead, of which each block copies its slice of the vector (kernels/staged.cuh)
    RECOMPUTE: int = 0  # addresses are made again at every step, where registers are dear

    STREAM = 1

    @functools.cached_property
    def KW(self) -> int:
        steps = -(-self.K_STEPS // self.SLICES)
        return -(-steps // self.POLL) * self.POLL

    @property
    def NX(self) -> int:
        return (self.KW - self.KR - self.KM) // self.POLL

    @functools.cached_property
    def layout(self) -> dict[str, int]:
        """Offset in bytes of each part of shared memory; "total" is its size."""
        sizes = dict.fromkeys(("VECTOR", "STAGE", "AHEAD", "BEHIND", "RECEIVED", "BARRIERS"), 0) | {
            "RING": self.TEAMS * self.STAGES * self.UB * self.NT * self.TILE_BYTES,
            "PARTIALS": self.TEAMS * self.PARTS * self.KS * self.TILES * self.MT * 2 * self.NT * 256
            if self.SLICES > 1
            else 0,
            "R": self.WARPS * self.KM * self.MT * 512,
            "STREAM": self.TEAMS * self.WARPS * self.SLOTS * self.POLL * self.MT * 512,
            "BIAS": len(self.problem.cell.gates) * self.U * 4,
        }
        if self.STAGED:
            left = 128 * len(self.problem.cell.gates)  # of a job, what fields have beside them where the vector was
            beside = self.UB * self.NT * (self.TILE_BYTES + left) + self.UB * 32
            sizes["VECTOR"] = max(self.VECTOR // self.SPLIT * 4, beside)
            sizes["RECEIVED"] = self.SPLIT * self.UB * self.NT * 256
            sizes["BARRIERS"] = 8 * self.BARRIERS
            prepared = prepared_values(self.problem.cell, few=True)
            dout = 256 if self.problem.state_dtype == "float32" else 128
            sizes["AHEAD"] = self.UB * self.NT * (prepared * 256 + len(self.problem.cell.states) * dout)
            sizes["RING"] = sizes["PARTIALS"] = 0
            sizes["PLACES"] = 2 * (len(self.fields) + len(self.old)) * 16
        elif self.SPLIT > 1:
            sizes["RECEIVED"] = self.TEAMS * 2 * self.SPLIT * self.UB * self.NT * self.row_blocks * 256
            sizes["BARRIERS"] = 16 * self.TEAMS
        starts = offsets(sizes)
        return starts | {"RING": starts["VECTOR"]} if self.STAGED else starts

    @property
    def packed_bytes(self) -> int:
        return self.C * self.WARPS * self.KW * self.MT * 512

    @property
    def streamed_bytes(self) -> int:
        """What a group streams at every step."""
        return self.C * self.WARPS * self.NX * self.POLL * self.MT * 512


RING_BYTES = 65536  # of a block's rings, about: what device memory brings while blocks wait for each other
Sizes = tuple[tuple[int, int], ...]  # (STAGES, PARTS)
WITH_RING: Sizes = ((3, 2), (3, 1), (2, 1), (1, 1))
OF_A_PAIR: Sizes = ((2, 2), (2, 1), (1, 1))  # a third stage gains nothing, and the compiler spills
SHORTER = 0.9, 0.7  # of a time, what rounds that leave less over may save; where a k-step is dear
WITHOUT_RING: Sizes = ((0, 1),)  # where no plan has one: each job waits for device memory, 3 to 8 us of a step


def make_plan(problem: Problem, backward: bool, arch: Arch, multiprocessors: int, element: str, saved) -> Plan | str:
    """The plan of a problem. A cut backward exchanges nothing and needs no R: that is the fused kernels' one."""
    if backward and problem.cut:
        return fused.make_plan(problem, backward, arch, multiprocessors, element, saved)
    smallest = Streamed.smallest(problem, backward, element, saved)
    candidates = list(_candidates(smallest, problem, arch, multiprocessors))
    plan = _fastest(candidates, problem, arch, multiprocessors)
    plan = plan or _fastest(candidates, problem, arch, multiprocessors, ring=False)
    plan = _or_staged(plan, smallest, problem, arch, multiprocessors)
    if plan is None:
        units = -(-problem.D // multiprocessors)
        return f"a multiprocessor of {arch.name} has no room for {units} units of {problem.cell.name}; D is too large"
    share = plan.streamed_bytes / max(plan.NX, 1) * min(problem.N, multiprocessors // plan.C)
    return plan.but(HELD=min(plan.NX, round(HELD_BYTES / share)) if share else 0)


def resident_plan(
    problem: Problem, backward: bool, arch: Arch, multiprocessors: int, element: str, saved
) -> Plan | str:
    """The plan of `cuda_fused`, whose R stays on the chip: the fused kernels' one; or where they have none, or its
    groups meet in L2 or are large and share multiprocessors, one of this module that streams nothing, if it is faster.
    """
    plan = fused.make_plan(problem, backward, arch, multiprocessors, element, saved)
    if backward and problem.cut:
        return plan
    if isinstance(plan, Plan) and plan.exchange != GLOBAL:
        items = plan.items(problem)
        if plan.C <= 8 or items <= groups_alone(plan.C, multiprocessors):
            return plan
    smallest = Streamed.smallest(problem, backward, element, saved)
    known = plan if isinstance(plan, Plan) else None
    candidates = _candidates(smallest, problem, arch, multiprocessors)
    fastest = _fastest(candidates, problem, arch, multiprocessors, known, streams=False)
    return _or_staged(fastest, smallest, problem, arch, multiprocessors) or plan


def _fastest(
    candidates: Iterable[Streamed],
    problem: Problem,
    arch: Arch,
    multiprocessors: int,
    known: Plan | None = None,
    streams: bool = True,
    ring: bool = True,
) -> Any:
    """By the model, of the candidates that fit, with a ring of fields or without, and of the plan known; or None.
    `streams`: some of R may be streamed.
    """

    def least(polled: Streamed) -> float:  # what it would take with nothing but R on the chip, all of that in registers
        bytes_of_r = 4 * REGISTERS + arch.shared_bytes
        kept = bytes_of_r // (polled.MT * 512 * polled.WARPS) // polled.POLL * polled.POLL
        return scan(polled.but(KR=min(polled.KW, kept)), problem, multiprocessors)

    best, time = known, scan(known, problem, multiprocessors) if known else math.inf
    bounds = [(least(c.but(POLL=_lengths(c)[0])), number, c) for number, c in enumerate(candidates)]
    for bound, _, candidate in sorted(bounds):
        if bound * SHORTER[candidate.wide] >= time:
            break
        sizes = WITHOUT_RING if not ring else WITH_RING if candidate.SPLIT == 1 else OF_A_PAIR
        lengths = 0  # of rounds that fit
        for polled in _polled(candidate):
            if lengths == 3:
                break
            registers = spare(polled)
            if registers < 0 or least(polled) >= time:
                continue
            fits = [fit for fit in _fit(polled, registers, arch.shared_bytes, sizes) if streams or fit.NX == 0]
            lengths += bool(fits)
            for fitted in fits:
                if (takes := scan(fitted, problem, multiprocessors)) < time:
                    best, time = fitted, takes
    return best


def _candidates(base: Streamed, problem: Problem, arch: Arch, multiprocessors: int) -> Iterator[Streamed]:
    """Ways to share out units, batch tiles and k, what a block keeps not yet decided."""
    tiles = -(-problem.B // 8)
    accumulators = 16 if base.element == "float32" else 32  # m16n8 tiles of a warp, at most
    jobs = 4 if base.backward or base.element == "float32" else 8  # of a warp, at most
    least = -(-problem.D // (8 * multiprocessors))  # blocks of 8 units that a block must own
    widths = sorted({least * n for n in (1, 2, 3, 4, 6, 8)} | {least + 1, least + 2})
    for UB, SPLIT in itertools.product(widths, (1, 2) if arch.cluster > 1 else (1,)):
        C = -(-problem.D // (8 * UB))
        if C == 1 and problem.D <= (UB - 2) * 8:
            continue
        if not base.wide and C * UB % 2:  # a k-step takes two blocks of 8 units
            C += 1
        C = -(-C // SPLIT) * SPLIT
        if resident_blocks(SPLIT, multiprocessors) < C:
            continue
        for NT in (1, 2, 4, 8):
            if 2 * tiles <= NT > 1:
                continue
            # A warp of a cluster takes the rows of all of it: two would read the same of the vector.
            divisors = [n for n in range(1, UB + 1) if UB % n == 0] if SPLIT == 1 else [UB * SPLIT]
            for SUB in (n for n in divisors if n * base.row_blocks % 2 == 0):
                shape = base.but(C=C, U=UB * 8, NT=NT, SUB=SUB, SPLIT=SPLIT)
                if accumulators < shape.MT * NT:
                    continue
                for KS, TEAMS in itertools.product((1, 2, 4, 8, 16)[SPLIT - 1 :], (1, 2, 3, 4)):
                    warps = shape.TILES * KS * TEAMS
                    few = warps < 8 and shape.K_STEPS >= 2 * KS
                    if few or warps > 16 or KS * SPLIT > shape.K_STEPS or (TEAMS > 1 and tiles < TEAMS * NT):
                        continue
                    plan = shape.but(KS=KS, TEAMS=TEAMS)
                    if jobs >= plan.JOBS:
                        yield plan


def _or_staged(plan: Any, base: Streamed, problem: Problem, arch: Arch, multiprocessors: int) -> Any:
    """The plan, or the fastest of those of kernels/staged.cuh. These keep all of R: of a backward in 16 bits, of heads
    and batches that are worth it, where there is wgmma.
    """
    tiles, UB, SPLIT = -(-problem.B // 8), 4, 4  # 8 warps, each with 16 of the cluster's units
    C = -(-problem.D // (8 * UB * SPLIT)) * SPLIT
    runs = arch.wgmma and base.backward and not base.wide and resident_blocks(SPLIT, multiprocessors) >= C
    if not (runs and problem.D % 8 == 0 and problem.D >= 256 and tiles >= 8):
        return plan
    plans = [] if plan is None else [plan]
    for NT in range(2, 9):
        shape = base.but(C=C, U=UB * 8, NT=NT, SUB=2, KS=1, SPLIT=SPLIT, STAGED=1, STAGES=1, PARTS=1, RECOMPUTE=1)
        whole = [n for n in (8, 6, 4) if shape.K_STEPS % (SPLIT * n) == 0]  # k-steps copied together
        if whole:
            polled = shape.but(POLL=whole[0])
            free = arch.shared_bytes - 1024 - polled.layout["total"]
            KM = min(polled.KW, free // (polled.WARPS * 512))
            fitted = polled.but(KR=polled.KW - KM, KM=KM)
            if KM >= 0 and spare(fitted) >= fitted.KR * 4 and fitted.JOBS <= 5:
                plans.append(fitted)
    return min(plans, key=lambda plan: scan(plan, problem, multiprocessors), default=None)


def _lengths(plan: Streamed) -> list[int]:
    """Of a round, in k-steps, the longest first."""
    return [n for n in (8, 4, 2, 1) if n * plan.NT <= 16 and n <= max(1, -(-plan.K_STEPS // plan.SLICES))]


def _polled(plan: Streamed) -> Iterator[Streamed]:
    """With each length of a round, the longest first."""
    dear = plan.TEAMS * plan.WARPS > 8 or plan.JOBS > 2 or plan.wide or plan.SPLIT > 1
    for n in _lengths(plan):
        yield plan.but(POLL=n, RECOMPUTE=int(dear or (plan.backward and n * plan.NT >= 16)))


def _fit(polled: Streamed, registers: int, shared_bytes: int, sizes: Sizes) -> Iterator[Streamed]:
    """With registers and shared memory given to R: the plan that keeps all of R, beside the longest ring that leaves
    room for it; and where a longer ring has room beside R's own, one that streams. `sizes`: of the ring of fields and
    of the partial sums, the longest first.
    """
    step = polled.MT * 512 * polled.WARPS  # bytes of a k-step of all warps of a team
    KR = min(polled.KW, registers // (polled.MT * 4)) // polled.POLL * polled.POLL
    rest = polled.KW - KR
    streams = False
    for STAGES, PARTS in sizes:
        fitted = polled.but(KR=KR, STAGES=STAGES, PARTS=PARTS)
        free = shared_bytes - 1024 - fitted.layout["total"]
        if free >= rest * step:
            yield fitted.but(KM=rest)
            break
        slots = max(2, min(RING_BYTES, free // 2) // (step * polled.POLL * polled.TEAMS))
        KM = (free // step // polled.POLL - slots * polled.TEAMS) * polled.POLL
        if KM >= 0 and not streams:
            streams = True
            yield fitted.but(KM=KM, SLOTS=slots)
        if streams and rest * step > shared_bytes:  # no ring is short enough
            break


def fewer_registers(plan: Streamed, arch: Arch) -> Streamed | None:
    """The plan with less in registers, for a compiler that spilled: first no addresses; then less of R, which goes to
    shared memory; then fewer words polled at once, or where it streams anyway, more of R streamed; with a shorter ring
    where there is no room for that. None where there is no such plan. R's packed form takes no more room.
    """
    if not plan.RECOMPUTE:
        return plan.but(RECOMPUTE=1)
    if plan.STAGED:
        less = plan.but(KR=plan.KR - 1, KM=plan.KM + 1)
        return less if plan.KR > 0 and less.layout["total"] <= arch.shared_bytes - 1024 else None
    KR = max(0, plan.KR - max(1, plan.KR // plan.POLL // 4) * plan.POLL)
    fewer: list[dict[str, Any]] = [{"KR": KR, "KM": plan.KM + plan.KR - KR}]
    streams: dict[str, Any] = {"KR": KR, "SLOTS": plan.SLOTS or 2}
    streamed = [streams, streams | {"KM": max(0, plan.KM - 2 * plan.TEAMS * plan.POLL)}]
    shorter: list[dict[str, Any]] = []
    if plan.POLL > 1:
        half = plan.but(POLL=plan.POLL // 2)
        KR = min(plan.KR, half.KW)
        shorter = [{"POLL": half.POLL, "SLOTS": 2 * plan.SLOTS, "KR": KR, "KM": min(plan.KM, half.KW - KR)}]
    fewer += streamed + shorter if plan.NX else shorter + streamed
    rings = [(plan.STAGES, plan.PARTS), *(ring for ring in WITH_RING if ring < (plan.STAGES, plan.PARTS))]
    for (STAGES, PARTS), changes in itertools.product(rings, fewer):
        less = plan.but(STAGES=STAGES, PARTS=PARTS, **changes)
        if (less.KR, less.POLL) != (plan.KR, plan.POLL) and less.layout["total"] <= arch.shared_bytes - 1024:
            return less
    return None
