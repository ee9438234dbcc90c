"""The numbers of cuda on a GPU, by the rule of `checks`: every head dim, from one that fits a corner of the chip to one
that no chip holds; repeats bit for bit, the code of sm80 on newer GPUs, cells of the user's own.
"""

import math
from dataclasses import replace

import pytest
import torch
from checks import assert_backend, assert_pieces_agree, run
from problems import Case, build, grid
from rule import CudaRule
from test_own_cell import every_word, mgu, odd

from flashrnn.backends import choose, cuda, cuda_fused
from flashrnn_core.archs import ARCHS
from flashrnn_core.cuda import streamed

pytestmark = pytest.mark.gpu

HEAD_DIMS = (1, 7, 24, 64, 200, 768, 1000, 2048, 4096)
LARGEST_HEAD_DIM = 8192
SIZES = {"B": (1, 3, 16, 256), "T": (1, 2, 9, 33), "N": (1, 3)}


def in_range(case):
    """The case, its sequence cut short where dR would pass the largest number of float16."""
    large = case.cell == "slstm" and case.dtype == "float16" and case.D >= 1000
    return case.but(T=min(case.T, 2)) if large else case


GRID = list(map(in_range, grid("cuda", HEAD_DIMS, SIZES, 2**21)))
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


class TestNumbers(CudaRule):
    backend = "cuda"
    repeats = 20


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward_of_the_largest(case):
    assert_backend(case, "cuda", "cuda", gradients=False)


def test_what_it_cannot_run_raises_and_names_what_can():
    device = torch.device("cuda", 0)
    case = Case("lstm", D=8, dtype="bfloat16", states=None)
    for changes in ({"dtype": "float64"}, {"states": "float64"}):
        with pytest.raises(NotImplementedError, match=r"'cuda' cannot run this call: .*'vanilla'"):
            choose("cuda", case.but(**changes).problem, device)
    assert cuda.supports(case.but(D=16384).problem, device) is None


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("D", [1024, 1536])
def test_fields_are_waited_for_in_a_ring_of_one_stage(D, T):
    """At the first step too, whose copies no round of R follows. A problem of NaN leaves them in shared memory."""
    case = Case("lstm", B=256, T=T, N=1, D=D, dtype="bfloat16", states=None)
    plan = cuda_fused._plan(case.problem, True, True, "bfloat16", 0, streamed.make_plan)
    assert (plan.STAGES, plan.NX > 0) == (1, True)
    poisoned = build(case, "cuda")
    poisoned.tensors["Wx"].fill_(math.nan)
    run(poisoned, "cuda")
    assert_backend(case, "cuda", "cuda")


STAGED = [
    Case("lstm", B=256, T=9, N=1, D=768, dtype="bfloat16", states=None),
    Case("lstm", B=128, T=9, N=1, D=744, dtype="bfloat16", states="float32", clip=0.05, reverse=True),
    Case("lstm", B=128, T=9, N=1, D=768, dtype="float16", states="float16", resets=True, lengths=True),
    Case("lstm", B=72, T=5, N=3, D=512, dtype="bfloat16", states=None, layout="spaced"),
    Case("gru", B=256, T=9, N=1, D=768, dtype="bfloat16", states="float32", lengths=True, reverse=True),
    Case("gru", B=256, T=9, N=1, D=768, dtype="float16", states=None),
    Case("slstm", B=128, T=9, N=1, D=768, dtype="bfloat16", states="bfloat16"),
    Case("slstm", B=100, T=9, N=1, D=768, dtype="bfloat16", states="float32", resets=True),
]


@pytest.mark.parametrize("case", STAGED, ids=str)
def test_a_vector_that_is_copied_in_bulk(case):
    """Matmuls of warpgroups (kernels/staged.cuh), against the oracle; the same bits again; in pieces of time."""
    problem = replace(case.problem, T=1)
    plan = streamed.make_plan(problem, True, next(a for a in ARCHS if a.wgmma), 132, case.dtype, ())
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma runs on sm_90 alone")
    assert plan.STAGED
    assert_backend(case, "cuda", "cuda")
    inputs = build(case, "cuda")
    first = run(inputs, "cuda")
    for _ in range(5):
        assert all(torch.equal(x, first[name]) for name, x in run(inputs, "cuda").items())
    assert_pieces_agree(inputs, "cuda", more_than=2)
