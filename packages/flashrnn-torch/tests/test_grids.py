"""What the grids of the GPU tests go over. Needs no GPU: a value that no case has would be missed by nobody."""

import itertools

import pytest
import test_cuda
import test_cuda_fused
import test_triton
from problems import CELLS, KERNEL_DTYPES
from sanitize import CASES

from flashrnn.backends import cuda_fused
from flashrnn_core.archs import ARCHS
from flashrnn_core.cuda.plan import BLOCK, CLUSTER, GLOBAL
from flashrnn_core.cuda.streamed import Streamed, make_plan, resident_plan


@pytest.mark.parametrize("module", [test_cuda, test_cuda_fused, test_triton], ids=lambda m: m.__name__)
def test_every_size_with_every_cell(module):
    for name in CELLS:
        cases = [case for case in module.GRID if case.cell == name]
        for dim, values in module.SIZES.items():
            assert {getattr(case, dim) for case in cases} == set(values), (name, dim)
        expected = set(itertools.product(module.HEAD_DIMS, KERNEL_DTYPES))
        assert {(case.D, case.dtype) for case in cases} == expected, name


@pytest.mark.parametrize("module", [test_cuda, test_triton], ids=lambda m: m.__name__)
@pytest.mark.parametrize("option", ["resets", "lengths", "reverse", "cut", "clip", "hidden_only"])
def test_every_option_on_and_off_with_every_cell_and_dtype(option, module):
    for name, dtype in itertools.product(CELLS, KERNEL_DTYPES):
        cases = [case for case in module.GRID if (case.cell, case.dtype) == (name, dtype)]
        assert {bool(getattr(case, option)) for case in cases} == {False, True}, (name, dtype)


def test_every_way_of_keeping_R_is_among_the_cases_of_cuda():
    """On an H100: R kept and streamed, one team of warps and several."""
    sm90 = next(arch for arch in ARCHS if arch.name == "sm90")
    cases = itertools.product(test_cuda.GRID, (False, True))
    plans = [make_plan(case.problem, backward, sm90, 132, case.dtype, ()) for case, backward in cases]
    plans = [plan for plan in plans if isinstance(plan, Streamed)]
    assert {plan.NX > 0 for plan in plans} == {plan.TEAMS > 1 for plan in plans} == {False, True}


def test_every_kind_of_kernel_is_among_the_cases_of_the_sanitizer():
    """On an H100."""
    sm90 = next(arch for arch in ARCHS if arch.name == "sm90")
    plans = []
    for (backend, case), backward in itertools.product(CASES, (False, True)):
        make = {"cuda": make_plan, "cuda_fused": resident_plan}[backend]
        plans.append(make(case.problem, backward, sm90, 132, case.dtype, cuda_fused.saved_states(case.problem)))
    assert {plan.exchange for plan in plans} == {BLOCK, CLUSTER, GLOBAL}
    assert {(plan.SPLIT, plan.STAGED) for plan in plans} == {(1, 0), (2, 0), (4, 1)}
    kinds = {name: {bool(getattr(plan, name)) for plan in plans} for name in ("wide", "SERVED", "NX", "packed_bytes")}
    assert kinds == {name: {False, True} for name in kinds}
    assert {plan.TEAMS > 1 for plan in plans} == {plan.STAGES == 1 for plan in plans} == {False, True}
    assert {plan.SMALL for plan in plans if plan.exchange == CLUSTER} == {0, 1}
    assert {case.cell for _, case in CASES} == set(CELLS)
    assert {case.dtype for _, case in CASES} == set(KERNEL_DTYPES)
