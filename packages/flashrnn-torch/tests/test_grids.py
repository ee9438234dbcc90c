"""What the grids of the GPU tests go over. Needs no GPU: a value that no case has would be missed by nobody."""

import itertools

import pytest
import test_cuda_fused
import test_triton
from problems import CELLS


@pytest.mark.parametrize("module", [test_cuda_fused, test_triton], ids=lambda m: m.__name__)
def test_every_size_with_every_cell(module):
    for name in CELLS:
        cases = [case for case in module.GRID if case.cell == name]
        for dim, values in module.SIZES.items():
            assert {getattr(case, dim) for case in cases} == set(values), (name, dim)
        expected = set(itertools.product(module.HEAD_DIMS, module.DTYPES))
        assert {(case.D, case.dtype) for case in cases} == expected, name


@pytest.mark.parametrize("option", ["resets", "lengths", "reverse", "cut", "clip", "hidden_only"])
def test_every_option_on_and_off_with_every_cell_and_dtype(option):
    for name, dtype in itertools.product(CELLS, test_triton.DTYPES):
        cases = [case for case in test_triton.GRID if (case.cell, case.dtype) == (name, dtype)]
        assert {bool(getattr(case, option)) for case in cases} == {False, True}, (name, dtype)
