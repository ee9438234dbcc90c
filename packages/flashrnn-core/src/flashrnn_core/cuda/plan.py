"""A plan: the numbers of a kernel, and what follows from them.

Blocks of a group own U units each; the recurrent matrix stays in registers (KR k-steps a warp) and shared memory (the
rest). What a block holds, bytes by bytes, is stated once, in `layout`: the kernel gets every number as a constant.
`fused` and `streamed` make plans, by what `registers` says of a thread.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

from flashrnn_core.contract import Problem
from flashrnn_core.cuda.emit import old_states_used, prepared_values

BLOCK, CLUSTER, GLOBAL = range(3)  # how a group exchanges its vector, see kernels/scan.cuh
FOUND = "KW", "layout"  # properties of a plan that are found once, and hang on its numbers
OF_THE_KERNEL = "fields", "row_blocks", "old", "unit_bytes"  # and those that hang on these alone:
KERNEL = {"problem", "backward", "element", "saved"}
ELEMENTS = {"bfloat16": 0, "float16": 1, "tf32": 2, "float32": 3}


@dataclass(frozen=True)
class Plan:
    """Numbers of the kernel. Upper case: the constant of that name in kernels/."""

    problem: Problem
    backward: bool
    element: str  # a key of ELEMENTS
    saved: tuple[int, ...]  # states of which a forward saves what rounding takes, besides the outputs
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

    STREAM = SLOTS = HELD = LATE = RECOMPUTE = STAGED = 0  # see `streamed.Streamed`
    TEAMS = SPLIT = 1

    @classmethod
    def smallest(cls, problem: Problem, backward: bool, element: str, saved: Iterable[int]) -> Self:
        """One block of 8 units, of which candidates are changes. Problems that differ in B, T, N or the clip's value
        share a kernel: the plan's own problem has 1 in their place.
        """
        clip = 1.0 if backward and problem.clip is not None else None
        kernel = replace(problem, B=1, T=1, N=1, clip=clip, cut=backward and problem.cut)
        plan = cls(kernel, backward, element, tuple(saved), GLOBAL, C=1, U=8, NT=1, KS=1)
        for name in OF_THE_KERNEL:  # found once, for all of its changes
            getattr(plan, name)
        return plan

    def but(self, **changes) -> Self:
        """A copy with changes, in a fifth of the time of `dataclasses.replace`: planning makes thousands. What was
        found once and hangs on none of them goes with it.
        """
        kept = self.__dict__ | changes
        for name in FOUND if KERNEL.isdisjoint(changes) else (*FOUND, *OF_THE_KERNEL):
            kept.pop(name, None)
        copy = object.__new__(type(self))
        object.__setattr__(copy, "__dict__", kept)
        return copy

    @property
    def item_rows(self) -> int:
        """Batch rows that a group works on at once: an item for each of its teams."""
        return self.TEAMS * self.NT * 8

    def tiles(self, problem: Problem) -> int:
        """Batch tiles of a head."""
        return -(-max(problem.B, 1) // self.item_rows)

    def items(self, problem: Problem) -> int:
        """Heads x batch tiles of all of the problem."""
        return problem.N * self.tiles(problem)

    def groups(self, items: int, multiprocessors: int) -> int:
        """Groups of blocks launched: all items at once, but no more than can be resident where they wait in L2."""
        return min(items, resident_blocks(self.SPLIT, multiprocessors) // self.C) if self.exchange == GLOBAL else items

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
        return self.UB * self.SPLIT // self.SUB

    @property
    def WARPS(self) -> int:
        return self.TILES * self.KS

    @property
    def JOBS(self) -> int:
        if self.SLICES == 1:
            return self.SUB * self.NT
        return -(-self.UB * self.NT // (self.WARPS - (1 if self.STAGED else 0)))

    @property
    def K_STEPS(self) -> int:
        if self.idle:
            return 0
        blocks = self.C * self.UB
        return (blocks if self.wide else blocks // 2) * self.SENT

    @property
    def SLICES(self) -> int:
        """Of k, those of all blocks that share it."""
        return self.KS * self.SPLIT

    @property
    def KW(self) -> int:
        return -(-self.K_STEPS // self.SLICES)

    @property
    def KM(self) -> int:
        """k-steps a warp keeps in shared memory."""
        return self.KW - self.KR

    @property
    def VECTOR(self) -> int:
        return self.C * self.UB * self.NT * self.SENT * (2 if self.wide else 1) * 32

    @functools.cached_property
    def old(self) -> tuple[int, ...]:
        """Numbers of what a backward's step reads of the states that it consumed; behind those of all states, of what
        rounding took of those that were saved.
        """
        used, states = old_states_used(self.problem.cell), len(self.problem.cell.states)
        return (*used, *(states + k for k in used if k in self.saved))

    @functools.cached_property
    def fields(self) -> tuple[tuple[str, int, int], ...]:
        """What the ring brings for a unit and a step: (kind, number, bytes); 16-bit fields first."""
        cell, problem = self.problem.cell, self.problem
        element, state = (4 if self.wide else 2), (4 if problem.state_dtype == "float32" else 2)
        fields = [("wx", k, element) for k in range(len(cell.input_gates))]
        if self.backward:
            fields += [("rec", k, 4) for k in range(len(cell.recurrent_gates))]
            fields += [("old", k, state) for k in self.old]
            fields += [("dout", k, state) for k in range(len(cell.states))]
        return tuple(sorted(fields, key=lambda f: f[2]))

    @functools.cached_property
    def unit_bytes(self) -> int:
        """What a unit's step reads and writes of tensors that have time."""
        cell, state = self.problem.cell, 4 if self.problem.state_dtype == "float32" else 2
        element = 4 if self.wide else 2
        written = element * len(cell.gates) if self.backward else state * (self.stores + len(self.saved))
        return sum(size for *_, size in self.fields) + written

    @property
    def BARRIERS(self) -> int:
        """mbarriers of a block."""
        return 2 * self.TEAMS + (self.KW // self.POLL if self.STAGED else 0)

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
        return 64 * ((1 if self.problem.hidden_only else len(cell.states)) + len(self.saved)) * state

    @functools.cached_property
    def layout(self) -> dict[str, int]:
        """Offset in bytes of each part of shared memory; "total" is its size."""
        sizes = {
            "RING": self.STAGES * self.UB * self.NT * self.TILE_BYTES,
            "VECTOR": 0 if self.exchange == GLOBAL or self.idle else 2 * self.VECTOR * 4,
            "STAGE": 2 * self.VECTOR // self.C * 4 if self.exchange == CLUSTER else 0,
            "PARTIALS": self.PARTS * self.KS * self.TILES * self.MT * 2 * self.NT * 256 if self.SLICES > 1 else 0,
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


def resident_blocks(cluster: int, multiprocessors: int) -> int:
    """Blocks that are resident at once in clusters of so many, each with a multiprocessor to itself. A cluster lies in
    one part of the chip (GPC), of an even number of multiprocessors: of 4 blocks, it leaves two of some parts unused;
    an H100 holds 30. `launch.Kernel` asks the driver, which knows.
    """
    return (multiprocessors - 12) // 4 * 4 if cluster == 4 else multiprocessors // cluster * cluster


def offsets(sizes: dict[str, int]) -> dict[str, int]:
    """Where each part of shared memory starts, in bytes; "total": what all take."""
    starts, total = {}, 0
    for name, size in sizes.items():
        starts[name] = total
        total += -(-size // 128) * 128
    return starts | {"total": total}
