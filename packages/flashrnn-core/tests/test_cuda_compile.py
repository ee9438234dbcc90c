"""The CUDA kernels of a matrix of problems, compiled for each architecture without a GPU: no spill, shared memory fits.

`FLASHRNN_ARCH` (nox -s tests-sm80 ...) compiles the whole matrix of that architecture, else a small part for each.
"""

import io
import itertools
import os
import random
import re

import pytest

from flashrnn_core import Problem, get_cell
from flashrnn_core.archs import ARCHS
from flashrnn_core.cells import CELLS

pytest.importorskip("cuda.core")

from flashrnn_core.cuda import launch, product, source, streamed
from flashrnn_core.cuda.compile import compile_text
from flashrnn_core.cuda.plan import ELEMENTS
from flashrnn_core.cuda.registers import REGISTERS
from flashrnn_core.cuda.streamed import resident_plan

MULTIPROCESSORS = {"sm80": 108, "sm86": 84, "sm89": 128, "sm90": 132, "sm100": 148, "sm120": 170}
HEAD_DIMS = (8, 24, 64, 128, 256, 512, 768, 1024, 2048)
OPTIONS = (
    {},
    {},
    {"resets": True, "lengths": True, "reverse": True, "clip": 1.0},
    {"hidden_only": True},
    {"cut": True},
)
MADE = {"cuda_fused": (resident_plan, HEAD_DIMS), "cuda": (streamed.make_plan, (24, 200, 1024, 4096))}
DRAWS = 2  # problems of each cell, element, head dim and direction


def matrix(arch, name, element, make=resident_plan, head_dims=HEAD_DIMS):
    """(problem, backward, plan) for all head dims that have a plan; batch, heads, options, dtype of states drawn."""
    draw = random.Random(f"{name}{element}")
    dtype = "float32" if element == "tf32" else element
    seen = set()
    for D in head_dims:
        for backward in (False, True) * DRAWS:
            problem = Problem(
                get_cell(name),
                *(draw.choice((8, 16, 64, 128)), 1, draw.choice((1, 12)), D),
                dtype=dtype,
                state_dtype=draw.choice(("float32", dtype)),
                **draw.choice(OPTIONS),
            )
            saved = (
                ()
                if problem.state_dtype == "float32"
                else tuple(map(problem.cell.states.index, problem.cell.float32_states))
            )
            plan = make(problem, backward, arch, MULTIPROCESSORS[arch.name], element, saved)
            if not isinstance(plan, str) and plan not in seen:
                seen.add(plan)
                yield problem, backward, plan


def compile_plan(plan, arch, aligned):
    """(bytes of stack and spills, registers, as ptxas tells; bytes of the binary)."""
    target, code = launch.code_for(arch, arch.capability)
    log = io.StringIO()
    binary = compile_text(source.text(plan, aligned), target, code, log)
    assert binary[:4] == b"\x7fELF"
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    registers = re.findall(r"Used (\d+) registers", log.getvalue())
    return sum(int(n) for kernel in found for n in kernel), max(map(int, registers)), len(binary)


def check(problem, plan, arch):
    """The plan compiles without a spill, with fewer registers given to R if need be, as `launch.Kernel` does. Returns
    how often that was needed.
    """
    tries = 0
    while True:
        assert 0 < plan.layout["total"] <= arch.shared_bytes - 1024
        spilled, registers, _ = compile_plan(plan, arch, aligned=problem.D % 8 == 0)
        less = launch.less_in_registers(plan, arch)
        if spilled == 0 or less is None:
            break
        plan, tries = less, tries + 1
    assert spilled == 0, f"{problem}: {spilled} bytes in local memory, {registers} registers of a thread; {plan}"
    assert registers * 32 * plan.WARPS * plan.TEAMS <= REGISTERS
    return tries


def pytest_generate_tests(metafunc):
    if "part" in metafunc.fixturenames:
        parts = [
            pytest.param((name, element, *made), id=f"{name}-{element}-{backend}")
            for backend, made in MADE.items()
            for name in CELLS
            for element in ELEMENTS
            if "FLASHRNN_ARCH" in os.environ
        ]
        metafunc.parametrize("part", parts)


@pytest.mark.skipif("FLASHRNN_ARCH" not in os.environ, reason="minutes: nox -s tests-sm80 and its like compile all")
def test_every_kernel_fits(arch, part):
    """All of a cell and an element; nearly always at the first try: each costs a user's first call a second."""
    kernels = list(matrix(arch, *part))
    assert {backward for _, backward, _ in kernels} == {False, True}
    tries = [check(problem, plan, arch) for problem, _, plan in kernels]
    assert sum(n > 0 for n in tries) <= max(2, len(tries) // 10), tries


SMALL = [("lstm", "bfloat16"), ("gru", "float32"), ("slstm", "float16"), ("elman", "tf32")]


@pytest.mark.parametrize("number", range(3))
def test_some_kernels_fit(arch, number):
    """Of what the whole matrix holds, another three for each architecture: a block, a cluster where there are, L2."""
    name, element = SMALL[(number + arch.capability[0]) % len(SMALL)]
    kernels = [(p, plan) for p, backward, plan in matrix(arch, name, element) if backward == (number == 1)]
    problem, plan = kernels[number * len(kernels) // 3]
    check(problem, plan, arch)


# Bytes of a binary that the compiler makes in about 0.7 s of a core, of one of kernels/staged.cuh in a second: its time
# goes with the code.
LARGEST = 64 * 1024, 96 * 1024


@pytest.mark.parametrize(("name", "D", "B"), [("lstm", 2048, 16), ("lstm", 768, 64), ("slstm", 768, 16)])
def test_a_first_call_is_short(name, D, B):
    """The largest of the benchmark's kernels, on an H100: little code, and right at the first try."""
    arch = next(a for a in ARCHS if a.name == "sm90")
    problem = Problem(get_cell(name), B, 1, 1, D, "bfloat16", "bfloat16")
    saved = tuple(map(problem.cell.states.index, problem.cell.float32_states))
    plan = resident_plan(problem, True, arch, MULTIPROCESSORS["sm90"], "bfloat16", saved)
    spilled, _, size = compile_plan(plan, arch, aligned=True)
    assert spilled == 0
    assert size <= LARGEST[plan.STAGED]


def test_a_streamed_kernel_fits(arch):
    """One that streams a part of R, forward and backward in turns."""
    backward = ARCHS.index(arch) % 2 == 1
    problem = Problem(get_cell("lstm"), 16, 1, 1, 3072, "bfloat16", "bfloat16")
    plan = streamed.make_plan(problem, backward, arch, MULTIPROCESSORS[arch.name], "bfloat16", ())
    assert plan.NX > 0
    check(problem, plan, arch)


@pytest.mark.parametrize("element", ["bfloat16", "float16"])
def test_product_over_all_steps_fits(arch, element):
    """dR and db: no spill, and the shared memory of a block."""
    target, code = launch.code_for(arch, arch.capability)
    log = io.StringIO()
    compile_text(product.text(element), target, code, log)
    assert re.findall(r"(\d+) bytes spill", log.getvalue()) == ["0"] * 4
    assert arch.shared_bytes - 1024 >= product.SHARED_BYTES


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("name", CELLS)
def test_head_dims_that_fit_the_chip_have_a_plan(name, element, arch):
    """Where the least that a block may own of R, 16 rows, takes a third of a multiprocessor's registers and shared
    memory, it runs in both directions.
    """
    count = MULTIPROCESSORS[arch.name]
    dtype = "float32" if element == "tf32" else element
    size = len(get_cell(name).recurrent_gates) * (4 if dtype == "float32" else 2)
    for D in (1, 7, *HEAD_DIMS):
        rows = 16 * -(-D // (16 * count))
        if rows * D * size > (REGISTERS * 4 + arch.shared_bytes) / 3:
            break
        for B, N, backward in ((1, 1, False), (1, 1, True), (16, 12, True), (128, 12, False)):
            problem = Problem(get_cell(name), B, 1, N, D, dtype, "float32")
            plan = resident_plan(problem, backward, arch, count, element, ())
            assert not isinstance(plan, str), f"{B=} {N=} {D=} {backward=}: {plan}"
    assert D >= 256


def test_an_h100_holds_an_lstm_of_2048():
    arch = next(a for a in ARCHS if a.name == "sm90")
    for B, state_dtype, backward in itertools.product((1, 16, 128), ("bfloat16", "float32"), (False, True)):
        problem = Problem(get_cell("lstm"), B, 1, 1, 2048, "bfloat16", state_dtype)
        plan = resident_plan(problem, backward, arch, MULTIPROCESSORS["sm90"], "bfloat16", ())
        assert plan.C * plan.U >= 2048


def test_what_does_not_fit_says_so(arch):
    problem = Problem(get_cell("lstm"), 1, 1, 1, 16384, "bfloat16", "bfloat16")
    reason = resident_plan(problem, False, arch, MULTIPROCESSORS[arch.name], "bfloat16", ())
    assert re.search(rf"D=16384, bfloat16\) does not fit .* of {arch.name} .*backend='cuda'", reason)
