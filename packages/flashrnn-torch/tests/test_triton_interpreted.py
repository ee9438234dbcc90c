"""The triton backend in Triton's interpreter: no GPU. Runs where TRITON_INTERPRET=1 (`nox -s triton-interpreter`).

bfloat16 is left out: the interpreter gets it wrong without a word. All programs and steps run one after another, so
what this cannot find is a missing barrier.
"""

import itertools
import os

import pytest
import torch
from checks import assert_backend, run
from problems import CELLS, Case, build
from test_own_cell import every_word

from flashrnn import Gate, cell
from flashrnn.backends import triton as backend
from flashrnn_core.cells.vocabulary import tanh
from flashrnn_core.triton.plan import Gpu

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1: nox -s triton-interpreter"
)

SIZES = [  # B T N D
    (3, 4, 1, 5),
    (1, 1, 3, 16),
    (18, 3, 1, 24),
    (2, 7, 2, 1),
    (3, 2, 1, 70),
]
OPTIONS = [
    {"resets": resets, "lengths": lengths, "reverse": reverse, "clip": clip, "cut": cut}
    for (resets, lengths, reverse), (clip, cut) in itertools.product(
        itertools.product((False, True), repeat=3), ((None, False), (0.05, False), (None, True))
    )
]
LAYOUTS = ("contiguous", "time_major", "expanded", "spaced")


def grid(name, dtype):
    """Every option set, with sizes and layouts taken in turn."""
    start = CELLS.index(name) + (dtype == "float32")
    for place, options in enumerate(OPTIONS, start):
        B, T, N, D = SIZES[place % len(SIZES)]
        states = None if dtype == "float32" and place % 3 == 0 else "float32"
        yield Case(name, B, T, N, D, dtype, states, **options, layout=LAYOUTS[place % 4], seed=place)


@pytest.mark.parametrize("case", [c for n in CELLS for d in ("float32", "float16") for c in grid(n, d)], ids=str)
def test_error_is_at_most_twice_vanillas(case, monkeypatch):
    """In float32 the kernels of `streamed.py`, in float16 those of `scan.py`."""
    if case.dtype == "float32":
        monkeypatch.setattr(backend, "_gpu", lambda _: Gpu(shared_bytes=0, processors=1))
    elif case.seed % 2:
        monkeypatch.setattr(backend, "_gpu", lambda _: Gpu(227 * 1024, processors=1000))  # TILE = 8
    assert_backend(case, "triton")


@pytest.mark.parametrize("name", CELLS)
def test_float32_with_R_in_registers(name):
    for D in (5, 64):
        assert_backend(Case(name, T=3, D=D, dtype="float32", states="float32", resets=True), "triton")


@pytest.mark.parametrize("name", CELLS)
def test_float16_with_R_streamed(name):
    assert_backend(Case(name, B=2, T=3, N=1, D=200, dtype="float16", states="float32", lengths=True), "triton")


def test_states_coarser_than_the_compute_dtype():
    """Then all states are kept in float32 for the backward."""
    assert_backend(Case("gru", T=4, dtype="float32", states="float16"), "triton")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cell_of_the_users_own(dtype):
    assert_backend(Case(every_word, T=5, D=9, dtype=dtype, states="float32", resets=True), "triton")


def test_hidden_only():
    for dtype in ("float32", "float16"):
        assert_backend(Case("slstm", T=4, dtype=dtype, states="float32", hidden_only=True), "triton")


def test_strided_masks():
    """Every second element of what holds them."""
    inputs = build(Case("gru", T=4, dtype="float32", states="float32", resets=True, lengths=True))
    expected = run(inputs, "triton")
    for name in ("resets", "lengths"):
        x = inputs.tensors[name]
        inputs.tensors[name] = torch.stack([x, x.logical_not().to(x.dtype)], -1)[..., 0]
    got = run(inputs, "triton")
    assert all(torch.equal(expected[key], got[key]) for key in expected)


@cell(gates=(Gate("a"), Gate("g")), states=("h",))
def ratio(a, g, h):
    return tanh(a) / g


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("streamed", [False, True])
def test_units_that_pad_D_may_be_nan(dtype, streamed, monkeypatch):
    """0 / 0 there; a dot over all units must not see it."""
    if streamed:
        monkeypatch.setattr(backend, "_gpu", lambda _: Gpu(shared_bytes=0, processors=1))
    inputs = build(Case(ratio, B=2, T=3, N=1, D=5, dtype=dtype, states=None))
    inputs.tensors["b"][1] += 8
    expected, result = run(inputs, "vanilla"), run(inputs, "triton")
    for name, want in expected.items():
        assert want.isfinite().all(), name
        torch.testing.assert_close(result[name], want, rtol=2e-2, atol=2e-3)
