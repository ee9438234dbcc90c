"""The numbers of cuda on a GPU, by the rule of `checks`: every head dim, from one that fits a corner of the chip to one
that no chip holds; repeats bit for bit, the code of sm80 on newer GPUs, cells of the user's own.
"""

import os

import pytest
import torch
from ahead import chosen, compile_ahead, use_arch
from checks import assert_backend, assert_rounded_states, assert_tf32, run
from problems import CELLS, ROUNDED, Case, build, grid
from test_own_cell import every_word, mgu, odd

from flashrnn.backends import choose, cuda
from flashrnn_core import get_cell

pytestmark = pytest.mark.gpu

DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (1, 7, 24, 64, 200, 768, 1000, 2048, 4096)
LARGEST_HEAD_DIM = 8192
SIZES = {"B": (1, 3, 16, 256), "T": (1, 2, 9, 33), "N": (1, 3)}
LARGEST, LARGEST_R = 2**21, 2**26  # elements of h and of R, for the yardstick, which takes each step by itself


def fits(B, T, N, D, name):
    return B * T * N * D <= LARGEST and len(get_cell(name).recurrent_gates) * N * D**2 <= LARGEST_R


def in_range(case):
    """The case, its sequence cut short where dR would pass the largest number of float16."""
    large = case.cell == "slstm" and case.dtype == "float16" and case.D >= 1000
    return case.but(T=min(case.T, 2)) if large else case


GRID = list(map(in_range, grid("cuda", HEAD_DIMS, SIZES, fits)))
FORWARD = [
    Case(name, B=B, T=3, N=1, D=LARGEST_HEAD_DIM, dtype=dtype, states="float32", resets=B == 3, hidden_only=B == 16)
    for name, B, dtype in (
        ("elman", 3, "float32"),
        ("elman", 256, "bfloat16"),
        ("gru", 16, "bfloat16"),
        ("lstm", 3, "float16"),
        ("slstm", 16, "bfloat16"),
    )
]
ROUNDS = [  # more items than there are groups and teams, and a team without one
    Case("lstm", B=250, T=9, N=5, D=64, dtype="bfloat16", states="float32", resets=True),
    Case("gru", B=130, T=9, N=2, D=520, dtype="float16", states="float32", lengths=True),
    Case("elman", B=256, T=9, N=3, D=1024, dtype="bfloat16", states="float32", reverse=True),
    Case("slstm", B=248, T=5, N=1, D=768, dtype="bfloat16", states="float32", lengths=True, resets=True),
    Case("lstm", B=72, T=5, N=7, D=384, dtype="float32", states="float32", clip=0.05),
]
TF32 = [
    Case(name, B=3, T=33, D=D, dtype="float32", states="float32")
    for name, D in (("gru", 24), ("lstm", 200), ("slstm", 768), ("elman", 2048))
]
REPEATED = [
    Case("gru", B=256, T=17, N=3, D=64, dtype="bfloat16", states="float32", resets=True),
    Case("slstm", B=40, T=17, N=1, D=768, dtype="bfloat16", states="float32", resets=True),
    Case("lstm", B=256, T=17, N=1, D=1024, dtype="float16", states="float32", lengths=True),
    Case("elman", B=16, T=17, N=1, D=4096, dtype="bfloat16", states="float32"),
]
SM80 = [
    Case(name, B=B, T=17, N=N, D=D, dtype=dtype, states="float32", resets=D == 24, lengths=D == 768)
    for name, B, N, D, dtype in (
        ("lstm", 256, 3, 24, "bfloat16"),
        ("gru", 16, 1, 768, "float16"),
        ("slstm", 3, 1, 1000, "bfloat16"),
        ("elman", 16, 1, 4096, "bfloat16"),
    )
]
OWN = [
    Case(own, B=18, T=9, N=2, D=D, dtype=dtype, states="float32", lengths=True)
    for own, D, dtype in (
        (mgu, 24, "bfloat16"),
        (odd, 520, "float16"),
        (every_word, 200, "float32"),
        (every_word, 2048, "bfloat16"),
    )
]


@pytest.fixture(scope="module", autouse=True)
def compiled_ahead(request):
    """The kernels of the tests chosen, by all cores at once."""
    compile_ahead(chosen(request, without="sm80"), "cuda")


@pytest.mark.parametrize("case", GRID, ids=str)
def test_error_is_at_most_twice_vanillas(case):
    assert_backend(case, "cuda", "cuda")


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward_of_the_largest(case):
    assert_backend(case, "cuda", "cuda", gradients=False)


@pytest.mark.parametrize("case", ROUNDS, ids=str)
def test_more_than_the_chip_holds_at_once(case):
    assert_backend(case, "cuda", "cuda")


@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_states_of_the_compute_dtype(case):
    assert_rounded_states(case, "cuda", "cuda")


@pytest.mark.parametrize("case", TF32, ids=str)
def test_tf32(case):
    assert_tf32(case, "cuda", "cuda")


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_repeats_are_bit_identical(case):
    inputs = build(case, "cuda")
    first = run(inputs, "cuda")
    for _ in range(20):
        again = run(inputs, "cuda")
        assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("case", OWN, ids=str)
def test_cell_of_the_users_own(case):
    assert_backend(case, "cuda", "cuda")


@pytest.fixture(scope="module")
def sm80():
    """Inside, plans and code are sm80's, through PTX on a newer GPU."""
    before = os.environ.get("FLASHRNN_ARCH")
    compile_ahead(SM80, "cuda", "sm80")
    use_arch("sm80")
    yield
    os.environ.pop("FLASHRNN_ARCH")
    use_arch(before)


@pytest.mark.parametrize("case", SM80, ids=str)
def test_code_of_sm80(case, sm80):
    assert_backend(case, "cuda", "cuda")


@pytest.mark.parametrize("name", CELLS)
def test_empty(name):
    for sizes in ({"T": 0}, {"B": 0}):
        inputs = build(Case(name, D=24, dtype="float32", states="float32", **sizes), "cuda")
        expected, result = run(inputs, "vanilla"), run(inputs, "cuda")
        for key, want in expected.items():
            assert torch.equal(result[key], want), key


def test_what_it_cannot_run_raises_and_names_what_can():
    device = torch.device("cuda", 0)
    case = Case("lstm", D=8, dtype="bfloat16", states=None)
    for changes in ({"dtype": "float64"}, {"states": "float64"}):
        with pytest.raises(NotImplementedError, match=r"'cuda' cannot run this call: .*'vanilla'"):
            choose("cuda", case.but(**changes).problem, device)
    assert cuda.supports(case.but(D=16384).problem, device) is None
