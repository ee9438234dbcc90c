"""The oracle itself: against torch's published equations written in NumPy, and against finite differences."""

import numpy as np
import pytest

from flashrnn_core import reference
from flashrnn_core.cells import CELLS

B, T, N, D = 3, 4, 2, 3


def problem(name, seed=0):
    """(cell, tensors by name, masks by name): lengths are 4, 0, 2."""
    cell, rng = CELLS[name], np.random.default_rng(seed)
    S, G, Gw, Gr = len(cell.states), len(cell.gates), len(cell.input_gates), len(cell.recurrent_gates)
    shapes = {"Wx": (B, T, Gw, N, D), "R": (Gr, N, D, D), "b": (G, N, D), "states": (S, B, 1, N, D)}
    tensors = {key: rng.standard_normal(shape) for key, shape in shapes.items()}
    if "n" in cell.states:
        tensors["states"][cell.states.index("n")] = rng.uniform(0.5, 2, (B, 1, N, D))
    masks = {"resets": rng.random((B, T)) < 0.3, "lengths": np.array([4, 0, 2])}
    return cell, tensors, masks


def sigma(x):
    return 1 / (1 + np.exp(-x))


def elman(wx, r, b, h):
    return [np.tanh(wx[0] + r[0] + b[0])]


def lstm(wx, r, b, h, c):
    i, f, z, o = wx + r + b
    c_new = sigma(f) * c + sigma(i) * np.tanh(z)
    return [sigma(o) * np.tanh(c_new), c_new]


def gru(wx, r, b, h):
    reset, z = sigma(wx[0] + r[1] + b[1]), sigma(wx[1] + r[2] + b[2])
    n = np.tanh(wx[2] + b[3] + reset * (r[0] + b[0]))
    return [z * h + (1 - z) * n]


def slstm(wx, r, b, h, c, n, m):
    i, f, z, o = wx + r + b
    l = np.log(sigma(f)) + m  # noqa: E741
    m_new = i if n == 0 else max(i, l)
    i_new, f_new = np.exp(i - m_new), np.exp(l - m_new)
    c_new, n_new = f_new * c + i_new * np.tanh(z), max(f_new * n + i_new, 1)
    return [sigma(o) * c_new / n_new, c_new, n_new, m_new]


STEPS = {"elman": elman, "lstm": lstm, "gru": gru, "slstm": slstm}


def one_number_at_a_time(step, Wx, R, b, states, resets, lengths, reverse):
    """The contract in loops over single numbers: no masks, no broadcasting."""
    S = len(states)
    out, last = np.zeros((S, B, T, N, D)), states.copy()
    for k in range(B):
        for n in range(N):
            state = states[:, k, 0, n].copy()  # S D
            for t in range(T if lengths is None else lengths[k])[:: -1 if reverse else 1]:
                if resets is not None and resets[k, t]:
                    state[:] = 0
                h = state[0].copy()
                for d in range(D):
                    r = np.array([R[g, n, d] @ h for g in range(R.shape[0])])
                    state[:, d] = step(Wx[k, t, :, n, d], r, b[:, n, d], *state[:, d])
                out[:, k, t, n] = state
            last[:, k, 0, n] = state
    return out, last


OPTIONS = {
    "plain": (),
    "resets": ("resets",),
    "lengths": ("lengths",),
    "reverse": ("reverse",),
    "all": ("resets", "lengths", "reverse"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", CELLS)
def test_forward_equals_the_contract_in_loops(name, options):
    cell, tensors, masks = problem(name)
    if name == "slstm":  # per element: one fresh among others
        tensors["states"][2, 0, 0, 0, 0] = 0
    given = {key: masks[key] if key in options else None for key in masks} | {"reverse": "reverse" in options}
    got = reference.forward(cell, **tensors, **given)
    expected = one_number_at_a_time(STEPS[name], **tensors, **given)
    for have, want in zip(got, expected, strict=True):
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", CELLS)
def test_backward_equals_finite_differences(name, options):
    """Directional central differences in every tensor, with random cotangents on all states at all times."""
    cell, tensors, masks = problem(name, seed=1)
    given = {key: masks[key] for key in masks if key in options} | {"reverse": "reverse" in options}
    rng = np.random.default_rng(2)
    S = len(cell.states)
    dstates, dlast = rng.standard_normal((S, B, T, N, D)), rng.standard_normal((S, B, 1, N, D))
    gradients = reference.backward(cell, **tensors, **given, dstates=dstates, dlast_states=dlast)

    def loss(changed):
        out, last = reference.forward(cell, **changed, **given)
        return (out * dstates).sum() + (last * dlast).sum()

    step = 1e-6
    for key, value in tensors.items():
        for _ in range(4):
            direction = rng.standard_normal(value.shape)
            right, left = (loss(tensors | {key: value + sign * step * direction}) for sign in (1, -1))
            slope = (gradients[key] * direction).sum()
            assert abs(slope - (right - left) / (2 * step)) < 1e-6 * max(1, abs(slope)), key


@pytest.mark.parametrize("name", CELLS)
def test_cut_and_clip(name):
    """Cut: what R hands back is missing, and nothing else. Clip: a bound above all is none; a small one bounds."""
    cell, tensors, _ = problem(name)
    S = len(cell.states)
    dstates, dlast = np.zeros((S, B, T, N, D)), np.ones((S, B, 1, N, D))
    cotangents = {"dstates": dstates, "dlast_states": dlast}
    whole = reference.backward(cell, **tensors, **cotangents)
    loose = reference.backward(cell, **tensors, **cotangents, clip=1e9)
    for key in whole:
        np.testing.assert_array_equal(whole[key], loose[key])
    bound = 1e-3
    tight = reference.backward(cell, **tensors, **cotangents, clip=bound)
    assert 0 < np.abs(tight["states"][0]).max() <= bound
    assert np.abs(whole["states"][0]).max() > bound
    np.testing.assert_array_equal(tight["Wx"][:, -1], whole["Wx"][:, -1])  # the last step's own part is not bounded

    severed = reference.backward(cell, **tensors, **cotangents, cut=True)
    np.testing.assert_array_equal(severed["Wx"][:, -1], whole["Wx"][:, -1])
    assert np.abs(severed["R"]).max() > 0
    assert np.abs(severed["states"] - whole["states"]).max() > 0
    if name == "elman":  # whose h goes nowhere but through R
        assert np.abs(severed["states"]).max() == 0
