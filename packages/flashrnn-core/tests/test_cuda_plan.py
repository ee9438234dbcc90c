"""Plans of the CUDA kernels: every unit and every k-step has one owner, what is laid out fits, texts repeat."""

import hashlib
import math
import re
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrnn_core import Problem, get_cell
from flashrnn_core.archs import ARCHS
from flashrnn_core.cells import CELLS, Gate, cell
from flashrnn_core.cells.vocabulary import tanh
from flashrnn_core.cuda import emit, launch, source, streamed
from flashrnn_core.cuda.fused import make_plan
from flashrnn_core.cuda.model import scan
from flashrnn_core.cuda.plan import BLOCK, CLUSTER, ELEMENTS, GLOBAL, Plan
from flashrnn_core.cuda.registers import REGISTERS

MULTIPROCESSORS = 108


HEAD_DIMS = {  # that the tests draw, by who makes the plan
    make_plan: st.integers(1, 300),
    streamed.make_plan: st.one_of(st.integers(1, 300), st.integers(1, 2048).map(lambda n: 8 * n)),
}


@st.composite
def plans(draw, make=None):
    """(architecture, problem, plan); `make`: one of `HEAD_DIMS`, None: any."""
    make = make or draw(st.sampled_from(list(HEAD_DIMS)))
    arch, element, backward = draw(st.sampled_from(ARCHS)), draw(st.sampled_from(list(ELEMENTS))), draw(st.booleans())
    dtype = "float32" if element == "tf32" else element
    flags = {name: draw(st.booleans()) for name in ("resets", "lengths", "reverse", "hidden_only")}
    problem = Problem(
        get_cell(draw(st.sampled_from(list(CELLS)))),
        *(draw(st.integers(1, 300)), draw(st.integers(1, 99)), draw(st.integers(1, 13)), draw(HEAD_DIMS[make])),
        dtype=dtype,
        state_dtype=draw(st.sampled_from([dtype, "float32"])),
        cut=draw(st.integers(0, 4)) == 0,
        **flags,
    )
    return arch, problem, make(problem, backward, arch, MULTIPROCESSORS, element, ())


def jobs(plan):
    """(block of 8 units, batch tile) of each job, as `job_block` and `job_tile` of the kernel say."""
    for warp in range(plan.WARPS):
        for i in range(plan.JOBS):
            if plan.SLICES == 1:
                yield warp * plan.SUB + i // plan.NT, i % plan.NT
            elif warp * plan.JOBS + i < plan.UB * plan.NT:
                yield divmod(warp * plan.JOBS + i, plan.NT)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(plans())
def test_everything_has_one_owner_and_room(drawn):
    arch, problem, plan = drawn
    if isinstance(plan, str):
        assert problem.D > 128
        return
    assert plan.C * plan.U >= problem.D
    assert plan.U % 8 == plan.UB * plan.SPLIT % plan.SUB == plan.C % plan.SPLIT == 0
    assert sorted(jobs(plan)) == [(block, tile) for block in range(plan.UB) for tile in range(plan.NT)]
    assert plan.row_blocks * plan.SUB == plan.MT * 2  # m16 tiles are full
    if not plan.idle:
        assert plan.K_STEPS // plan.SENT * (8 if plan.wide else 16) >= problem.D
        assert plan.K_STEPS <= plan.SLICES * plan.KW < plan.K_STEPS + plan.SLICES * (plan.POLL if plan.STREAM else 1)
    assert 0 <= plan.KR <= plan.KW
    assert 1 <= plan.WARPS * plan.TEAMS <= 32
    assert plan.KR * plan.MT * 4 * plan.WARPS * plan.TEAMS * 32 < REGISTERS
    assert plan.STAGES in ((0, 1, 2, 3) if plan.STREAM else (2, 3, 4))
    limit = {BLOCK: plan.C if plan.idle else 1, CLUSTER: arch.cluster, GLOBAL: MULTIPROCESSORS}
    assert limit[plan.exchange] >= plan.C


@settings(max_examples=150, deadline=None, derandomize=True)
@given(plans())
def test_parts_of_shared_memory_do_not_meet(drawn):
    """Neither in the plan nor in those that follow where the compiler spills."""
    arch, _, plan = drawn
    packed = None if isinstance(plan, str) else plan.packed_bytes
    while not isinstance(plan, str | None):
        parts = {name: at for name, at in plan.layout.items() if not (plan.STAGED and name == "RING")}
        starts = list(parts.values())
        assert starts == sorted(starts)
        assert all(offset % 128 == 0 for offset in starts)
        room = {name: after - at for (name, at), after in zip(parts.items(), starts[1:], strict=False)}
        tile = sum(8 * 8 * size for *_, size in plan.fields)
        if plan.STAGED:  # fields of a step are where the vector was
            assert plan.layout["RING"] == plan.layout["VECTOR"]
            assert room["VECTOR"] >= max(4 * plan.VECTOR // plan.SPLIT, plan.UB * plan.NT * tile)
            assert room["RECEIVED"] >= plan.SPLIT * plan.UB * plan.NT * 256
        else:
            assert room["RING"] >= plan.TEAMS * plan.STAGES * plan.UB * plan.NT * tile
        if plan.SPLIT == 2:  # sums of both members, of two vectors
            sums = plan.UB * plan.NT * plan.row_blocks * 8 * 8 * 4
            assert room["RECEIVED"] >= plan.TEAMS * 2 * plan.SPLIT * sums
            assert plan.layout["total"] - plan.layout["BARRIERS"] >= plan.TEAMS * 16
        assert room["R"] >= plan.WARPS * plan.KM * plan.MT * 32 * 4 * 4
        assert plan.KW == plan.KR + plan.KM + plan.NX * plan.POLL
        if plan.NX:
            assert plan.SLOTS >= 2
            assert room["STREAM"] >= plan.TEAMS * plan.WARPS * plan.SLOTS * plan.POLL * plan.MT * 512
        if plan.STREAM:
            assert plan.STAGED or plan.KR % plan.POLL == plan.KM % plan.POLL == 0  # whole rounds
            assert plan.packed_bytes <= packed  # a workspace made for the first does for all
        if plan.exchange != GLOBAL and not plan.idle:
            assert room["VECTOR"] >= 2 * 4 * plan.VECTOR
        assert plan.layout["total"] <= arch.shared_bytes - 1024
        plan = launch.less_in_registers(plan, arch)


@pytest.mark.parametrize(
    ("N", "D", "B", "dtype"), [(1, 768, 64, "bfloat16"), (4, 512, 64, "float16"), (1, 1024, 3, "float32")]
)
def test_a_resident_plan_streams_nothing_and_is_no_slower(N, D, B, dtype):
    problem = Problem(get_cell("lstm"), B, 1, N, D, dtype, dtype)
    plan = streamed.resident_plan(problem, True, ARCHS[3], 132, dtype, ())
    assert plan.NX == 0
    fused = make_plan(problem, True, ARCHS[3], 132, dtype, ())
    if not isinstance(fused, str):
        assert scan(plan, problem, 132) <= scan(fused, problem, 132)


@cell(gates=tuple(map(Gate, "abcdefgh")), states=tuple("stuv"))
def wide(a, b, c, d, e, f, g, h, s, t, u, v):
    """So many gates and states that their ring does not fit."""
    return tanh(a) + b * s, t + c * d, u + e * f, v + g * h


def test_a_cut_backward_has_a_plan_of_its_own_or_none():
    """One that goes through R would give a gradient that was to be cut."""
    for function in (wide, get_cell("lstm")):
        for D in (64, 256, 1024):
            problem = Problem(function, 16, 1, 1, D, "float32", "float32", cut=True)
            for make in (make_plan, streamed.make_plan, streamed.resident_plan):
                plan = make(problem, True, ARCHS[3], 132, "float32", ())
                assert isinstance(plan, str) or plan.idle


@settings(max_examples=60, deadline=None, derandomize=True)
@given(plans(streamed.make_plan))
def test_streamed_plans_know_no_largest_head_dim(drawn):
    _, problem, plan = drawn
    assert isinstance(plan, Plan)
    assert 0 < scan(plan, problem, MULTIPROCESSORS) < math.inf


@pytest.mark.parametrize("backward", [False, True])
def test_more_work_takes_longer(backward):
    def time(B, N, D):
        problem = Problem(get_cell("lstm"), B, 1, N, D, "bfloat16", "bfloat16")
        plan = streamed.make_plan(problem, backward, ARCHS[3], 132, "bfloat16", ())
        return scan(plan, problem, 132)

    for smaller, larger in (((16, 1, 768), (256, 1, 768)), ((16, 1, 1024), (16, 1, 4096)), ((64, 1, 64), (64, 99, 64))):
        assert time(*smaller) < time(*larger)


def test_a_ring_wherever_one_fits():
    """Without, each job waits for device memory at every step. One stage, where R takes the room of a second."""
    long = ((2048, 64, True), (2048, 64, False), (8192, 16, True))
    for D, B, backward in ((768, 256, True), (1024, 256, True), *long):
        problem = Problem(get_cell("lstm"), B, 1, 1, D, "bfloat16", "bfloat16")
        plan = streamed.make_plan(problem, backward, ARCHS[3], 132, "bfloat16", ())
        assert 1 + ((D, B, backward) in long) <= plan.STAGES


def plan_of(arch=ARCHS[3], backward=False, **changes):
    sizes = {"B": 16, "T": 1, "N": 3, "D": 256, "dtype": "bfloat16", "state_dtype": "bfloat16"}
    return make_plan(Problem(get_cell("slstm"), **sizes | changes), backward, arch, 132, "bfloat16", (3,))


def test_all_of_R_is_kept_where_a_shorter_ring_leaves_room_for_it():
    arch = next(a for a in ARCHS if a.name == "sm90")
    problem = Problem(get_cell("slstm"), 64, 1, 1, 1024, "bfloat16", "bfloat16")
    plan = streamed.make_plan(problem, True, arch, 132, "bfloat16", ())
    assert plan.NX == 0
    problem, polls = replace(problem, cell=get_cell("lstm")), arch._replace(wgmma=False)
    plan = streamed.make_plan(problem, True, polls, 132, "bfloat16", ())
    assert (plan.NX, plan.STAGES, plan.PARTS) == (0, 1, 1)


@pytest.mark.parametrize(
    ("known", "count", "name", "D"),
    [("sm90", 132, "lstm", 1280), ("sm90", 132, "gru", 1536), ("sm80", 108, "lstm", 1024), ("sm89", 128, "gru", 896)],
)
def test_short_rounds_are_tried_where_long_ones_leave_no_room(known, count, name, D):
    problem = Problem(get_cell(name), 16, 1, 1, D, "float32", "float32")
    arch = next(a for a in ARCHS if a.name == known)
    assert isinstance(streamed.resident_plan(problem, False, arch, count, "float32", ()), Plan)


def test_a_lstm_of_2048_goes_in_pairs():
    problem = Problem(get_cell("lstm"), 16, 1, 1, 2048, "bfloat16", "bfloat16")
    plan = streamed.resident_plan(problem, True, ARCHS[3], 132, "bfloat16", ())
    assert (plan.SPLIT, plan.NX, plan.POLL) == (2, 0, 8)
    assert streamed.resident_plan(problem, True, ARCHS[0], 132, "bfloat16", ()).SPLIT == 1  # no clusters there


@settings(max_examples=100, deadline=None, derandomize=True)
@given(plans())
def test_a_changed_plan_is_as_one_made_anew(drawn):
    """Of what was found once, nothing stale."""
    arch, _, plan = drawn
    while not isinstance(plan, str | None):
        anew = type(plan)(**{f.name: getattr(plan, f.name) for f in fields(plan)})
        assert plan == anew
        for name in ("KW", "KM", "NX", "layout", "old", "fields", "row_blocks", "VECTOR", "JOBS", "WARPS"):
            assert getattr(plan, name) == getattr(anew, name)
        plan = launch.less_in_registers(plan, arch)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(plans())
def test_the_table_of_fields_names_their_arguments(drawn):
    *_, plan = drawn
    if isinstance(plan, str):
        return
    names, text = source.arguments(plan.backward, plan.old, bool(plan.STREAM)), source.text(plan, True)
    table, initial = (
        [int(number, 0) for number in re.search(rf" {name}\[\] = {{(.*)}}", text)[1].replace("ull", "").split(", ")]
        for name in ("PLACES", "INITIAL_PLACES")
    )
    last = -(-plan.CHUNKS // 32) * 32 - 1  # chunk that a lane asks for, there or not
    narrow = sum(size == 2 for *_, size in plan.fields)
    assert len(table) > (last // 8 if last < narrow * 8 else narrow + (last - narrow * 8) // 16)
    for (kind, k, _), place, before in zip(plan.fields, table, initial, strict=False):
        found = [names[place >> 8 * i & 255] for i in range(5)]
        if kind == "old":
            assert found[:4] == [f"OLD{k}", f"OLD{k}_B", f"OLD{k}_T", f"OLD{k}_N"]
            assert [names[before >> 8 * i & 255] for i in (0, 1, 3)] == [f"INITIAL{k}{x}" for x in ("", "_B", "_N")]
            assert place >> 40 == before >> 40 == 0
        else:
            name, dim = kind.upper(), "S" if kind == "dout" else "G"
            assert (found, place >> 40) == ([name, *(f"{name}_{x}" for x in ("B", "T", "N", dim))], k)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(plans(streamed.make_plan))
def test_a_compiler_that_spills_is_left_no_R_in_registers_at_last(drawn):
    """Step by step less: it goes to shared memory, or is streamed."""
    arch, _, plan = drawn
    if isinstance(plan, str) or not plan.STREAM:
        return
    assert_no_R_is_left_in_registers(plan, arch)


def test_a_shorter_ring_makes_room_for_R():
    """Where shared memory has none left for what leaves the registers, nor for a ring of it."""
    arch = next(arch for arch in ARCHS if arch.name == "sm86")
    problem = Problem(get_cell("gru"), B=17, T=1, N=13, D=97, dtype="float32", state_dtype="float32")
    plan = streamed.make_plan(problem, True, arch, 82, "tf32", ())
    last = assert_no_R_is_left_in_registers(plan, arch)
    assert (last.STAGES, last.PARTS) < (plan.STAGES, plan.PARTS)


def assert_no_R_is_left_in_registers(plan, arch):
    """Of the last plan, which is returned."""
    while (less := streamed.fewer_registers(plan, arch)) is not None:
        assert (less.KR, less.POLL, less.RECOMPUTE) != (plan.KR, plan.POLL, plan.RECOMPUTE)
        assert less.layout["total"] <= arch.shared_bytes - 1024
        plan = less
    assert plan.KR == 0
    return plan


def test_problems_that_may_share_a_kernel_do():
    """What changes from call to call compiles nothing: T, the clip's value, B and N where the layout is the same."""
    for backward in (False, True):
        plan = plan_of(backward=backward, clip=0.1)
        assert plan == plan_of(backward=backward, T=77, clip=7.0)
        assert plan == plan_of(backward=backward, B=13, clip=0.1)
    assert plan_of() == plan_of(clip=1.0, cut=True)
    assert plan_of() != plan_of(resets=True)


TEXT = """
import hashlib
from flashrnn_core import Problem, get_cell
from flashrnn_core.archs import ARCHS
from flashrnn_core.cuda import fused, source
problem = Problem(get_cell("slstm"), 16, 1, 3, 256, "bfloat16", "bfloat16")
made = fused.make_plan(problem, True, ARCHS[3], 132, "bfloat16", (3,))
print(hashlib.sha256(source.text(made, True).encode()).hexdigest())
"""


def test_the_text_is_the_same_in_every_process():
    """Else the disk cache would never be hit."""
    digest = hashlib.sha256(source.text(plan_of(backward=True), True).encode()).hexdigest()
    for seed in ("1", "2"):
        environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", TEXT], capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.split() == [digest]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_the_text_stands_alone(name, backward):
    """No header, and no argument named twice."""
    plan = replace(plan_of(backward=backward), saved=())
    plan = replace(plan, problem=replace(plan.problem, cell=get_cell(name)))
    assert "#include" not in source.text(plan, True)
    names = source.arguments(backward, emit.old_states_used(get_cell(name)))
    assert len(set(names)) == len(names)
