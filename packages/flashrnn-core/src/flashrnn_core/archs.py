"""The GPU architectures FlashRNN is compiled and tested for: one line each. Imports nothing of ours.

One line here and one in CI's list; a kernel of its own is chosen by a field of the plan. Tests, nox sessions and the
plan read this table.
"""

from typing import NamedTuple


class Arch(NamedTuple):
    """What a plan must know of an architecture. `shared_bytes`: most shared memory of one block, in bytes."""

    name: str
    capability: tuple[int, int]
    shared_bytes: int
    cluster: int  # largest thread block cluster; 1: no clusters
    wgmma: bool = False  # matmuls of warpgroups (kernels/staged.cuh); code for them runs nowhere else


ARCHS = (
    Arch("sm80", (8, 0), 163 * 1024, 1),
    Arch("sm86", (8, 6), 99 * 1024, 1),
    Arch("sm89", (8, 9), 99 * 1024, 1),
    Arch("sm90", (9, 0), 227 * 1024, 16, wgmma=True),
    Arch("sm100", (10, 0), 227 * 1024, 16),
    Arch("sm120", (12, 0), 99 * 1024, 8),
)
