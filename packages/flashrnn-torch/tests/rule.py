"""The tests that every backend of kernels passes on a GPU, stated once. Each backend's file subclasses `Rule`."""

import pytest
import torch
from ahead import chosen, compile_ahead, on_arch
from checks import assert_backend, assert_rounded_states, assert_tf32, run
from problems import CELLS, ROUNDED, Case, build

LISTS = {  # the list of cases, in the subclass's module, that a test takes `case` from
    "test_error_is_at_most_twice_vanillas": "GRID",
    "test_tf32": "TF32",
    "test_repeats_are_bit_identical": "REPEATED",
    "test_cell_of_the_users_own": "OWN",
    "test_more_than_the_chip_holds_at_once": "ROUNDS",
    "test_code_of_sm80": "SM80",
}


class Rule:
    """What every backend passes."""

    backend: str
    repeats: int

    def pytest_generate_tests(self, metafunc):
        if metafunc.function.__name__ in LISTS:
            cases = getattr(metafunc.module, LISTS[metafunc.function.__name__])
            metafunc.parametrize("case", cases, ids=str)

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def compiled_ahead(cls, request):
        """The kernels of the tests chosen, by all cores at once."""
        compile_ahead(chosen(request, without="sm80"), cls.backend)

    def check(self, case):
        """What becomes of a case of the grid."""
        assert_backend(case, self.backend, "cuda")

    def test_error_is_at_most_twice_vanillas(self, case):
        self.check(case)

    @pytest.mark.parametrize("case", ROUNDED, ids=str)
    def test_states_of_the_compute_dtype(self, case):
        assert_rounded_states(case, self.backend, "cuda")

    def test_tf32(self, case):
        assert_tf32(case, self.backend, "cuda")

    def test_repeats_are_bit_identical(self, case):
        inputs = build(case, "cuda")
        first = run(inputs, self.backend)
        for _ in range(self.repeats):
            again = run(inputs, self.backend)
            assert all(torch.equal(first[key], again[key]) for key in first)

    def test_cell_of_the_users_own(self, case):
        assert_backend(case, self.backend, "cuda")


class CudaRule(Rule):
    """What else the backends of CUDA C++ pass."""

    @pytest.fixture(scope="class")
    @classmethod
    def compiled_for_sm80(cls, request):
        compile_ahead(request.module.SM80, cls.backend, "sm80")

    @pytest.fixture
    def sm80(self, compiled_for_sm80):
        """Inside, plans and code are sm80's, through PTX on a newer GPU."""
        with on_arch("sm80"):
            yield

    def test_more_than_the_chip_holds_at_once(self, case):
        self.check(case)

    def test_code_of_sm80(self, case, sm80):
        assert_backend(case, self.backend, "cuda")

    @pytest.mark.parametrize("name", CELLS)
    def test_empty(self, name):
        for sizes in ({"T": 0}, {"B": 0}):
            inputs = build(Case(name, D=24, dtype="float32", states="float32", **sizes), "cuda")
            expected, result = run(inputs, "vanilla"), run(inputs, self.backend)
            for key, want in expected.items():
                assert torch.equal(result[key], want), key
