"""A cell's CUDA C++: compiled for the host it computes what NumPy does; an error in it points at the cell's line."""

import ctypes
import inspect
import shutil
import subprocess

import numpy as np
import pytest

from flashrnn_core import Gate, Problem, cell, get_cell, reference
from flashrnn_core.archs import ARCHS
from flashrnn_core.cells import CELLS
from flashrnn_core.cells.vocabulary import exp, log_sigmoid, maximum, relu, sigmoid, tanh, where
from flashrnn_core.cuda import emit, source
from flashrnn_core.cuda.fused import make_plan


@cell(gates=(Gate("f"), Gate("n_r", input=False), Gate("n_w", recurrent=False), Gate("unused")), states=("h", "c", "k"))
def every_word(f, n_r, n_w, unused, h, c, k):
    """All words and comparisons; a gate without effect."""
    c_new = where(k <= 2, sigmoid(f) * c, log_sigmoid(f) * 0.1) + maximum(n_w, 0.25 * n_r) / 2
    return where(c < h, tanh(relu(c_new) - exp(-c_new * c_new)), -f), c_new, where(k == 0, 1, k + 1)


# What the words of `emit` call, on the host, exact where the GPU approximates.
HOST = """
#include <math.h>
#define DEVICE static inline
static float exp2_fast(float x) { return exp2f(x); }
static float log2_fast(float x) { return log2f(x); }
static float reciprocal(float x) { return 1.f / x; }
static float __fdividef(float x, float y) { return x / y; }
static float max_nan(float x, float y) { return x != x ? x : y != y ? y : fmaxf(x, y); }
static void pin(float&) {}
"""
LOOPS = """
extern "C" void run_forward(int count, const float (*pre)[G], const float (*old)[S], float (*result)[S]) {
    for (int i = 0; i < count; i++) cell_forward(pre[i], old[i], result[i]);
}
extern "C" void run_backward(int count, const float (*pre)[G], const float (*old)[S], const float (*dnew)[S],
                             float (*dgate)[G], float (*dold)[S]) {
    for (int i = 0; i < count; i++) {
        Prepared prepared;
        cell_prepare(pre[i], old[i], prepared);
        cell_finish(prepared, dnew[i], dgate[i], dold[i]);
    }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler for the host")
@pytest.mark.parametrize("words", [emit.WORDS, emit.EXACT_WORDS], ids=["plain", "exact"])
@pytest.mark.parametrize("one", [*CELLS.values(), every_word], ids=lambda c: c.name)
def test_computes_what_numpy_does(one, words, tmp_path):
    G, S, count = len(one.gates), len(one.states), 1000
    sizes = f"constexpr int G = {G}, S = {S};"
    text = "\n".join([HOST, sizes, emit.forward(one, words), emit.backward(one, words), LOOPS])
    (tmp_path / "cell.cpp").write_text(text)
    library = tmp_path / "cell.so"
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", tmp_path / "cell.cpp", "-o", library], check=True)
    compiled = ctypes.CDLL(str(library))

    rng = np.random.default_rng(0)
    pre, old, dnew = (rng.standard_normal((count, k)).astype(np.float32) * 3 for k in (G, S, S))
    old[:, -1] = np.where(rng.random(count) < 0.3, 0, old[:, -1])
    if "n" in one.states:
        n = one.states.index("n")
        old[:, n] = np.where(rng.random(count) < 0.3, 0, np.abs(old[:, n]))
    result, dgate, dold = (np.full((count, k), np.nan, np.float32) for k in (S, G, S))
    compiled.run_forward(count, *(x.ctypes.data_as(ctypes.c_void_p) for x in (pre, old, result)))
    compiled.run_backward(count, *(x.ctypes.data_as(ctypes.c_void_p) for x in (pre, old, dnew, dgate, dold)))

    with np.errstate(all="ignore"):  # the branch not taken may overflow
        inputs = [*pre.T.astype(float), *old.T.astype(float)]
        forward = one.forward.evaluate(reference.NUMPY, inputs)
        backward = one.backward.evaluate(reference.NUMPY, [*inputs, *dnew.T.astype(float)])
    for got, want in zip([*result.T, *dgate.T, *dold.T], [*forward, *backward], strict=True):
        want = np.broadcast_to(want, count)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * max(1, np.abs(want).max()))


def test_an_error_points_at_the_cells_line(monkeypatch):
    """Forward and backward; here the word itself is what the compiler cannot read."""
    core = pytest.importorskip("cuda.core")
    from flashrnn_core.cuda.compile import compile_text

    monkeypatch.setitem(emit.WORDS, "relu", "no_such_function({0})")
    lines, start = inspect.getsourcelines(every_word.function)
    line = start + next(i for i, text in enumerate(lines) if "relu" in text)
    for backward in (False, True):
        problem = Problem(every_word, 1, 1, 1, 16, "float16", "float32")
        plan = make_plan(problem, backward, ARCHS[0], 108, "float16", ())
        with pytest.raises(core._utils.cuda_utils.NVRTCError) as error:
            compile_text(source.text(plan, True), "cubin", "sm_80")
        assert f'{__file__}({line}): error: identifier "no_such_function" is undefined' in str(error.value)


def test_what_the_backward_reads_of_the_old_states():
    assert emit.old_states_used(get_cell("elman")) == ()
    assert emit.old_states_used(get_cell("lstm")) == (1,)
    assert emit.old_states_used(get_cell("gru")) == (0,)
    assert emit.old_states_used(get_cell("slstm")) == (1, 2, 3)
