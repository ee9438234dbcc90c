"""A cell of the user's own, defined here and nowhere else, runs like those of the library."""

import equations
import pytest
import torch
from checks import assert_backend, assert_close, oracle_in_numpy, run
from problems import GRADIENTS, Case, build

from flashrnn import Gate, cell, flashrnn
from flashrnn_core.cells.vocabulary import exp, log_sigmoid, maximum, relu, sigmoid, tanh, where


@cell(gates=(Gate("n_r", input=False), Gate("f"), Gate("n_w", recurrent=False)), states=("h",))
def mgu(n_r, f, n_w, h):
    """f' = σ(f); n = tanh(n_w + f' n_r); h' = (1 − f') h + f' n."""
    forget = sigmoid(f)
    return (1 - forget) * h + forget * tanh(n_w + forget * n_r)


@cell(gates=(Gate("a"), Gate("unused")), states=("h", "count", "old"))
def odd(a, unused, h, count, old):
    """All that is unusual: a gate and a state without effect, a state handed on, a constant state."""
    return where(count <= 2, relu(a) + h / 3, tanh(-a)), count + 1, h


@cell(gates=(Gate("f"), Gate("n_r", input=False), Gate("n_w", recurrent=False), Gate("tl")), states=("h", "c", "k"))
def every_word(f, n_r, n_w, tl, h, c, k):
    """All words and constants; a gate without effect, named like what the kernels use; a state that counts."""
    c_new = where(k <= 2, sigmoid(f) * c, log_sigmoid(f) * 0.1) + maximum(n_w, 0.25 * n_r) / 2
    return tanh(relu(c_new) - exp(-c_new * c_new)), c_new, k + 1


OPTIONS = {
    "plain": {},
    "resets-lengths": {"resets": True, "lengths": True},
    "reverse-lengths": {"reverse": True, "lengths": True},
    "cut": {"cut": True},
    "clip": {"clip": 0.05},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("own", [mgu, odd, every_word], ids=lambda c: c.name)
def test_runs_on_vanilla_and_the_oracle(own, options):
    inputs = build(Case(own, T=9, **options))
    assert_close(run(inputs, "vanilla"), oracle_in_numpy(inputs), 1e-12)
    assert_backend(Case(own, T=9, dtype="bfloat16", states="float32", **options), "vanilla")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_mgu_equals_its_equations_under_autograd(options):
    """Independent of the derived gradient."""
    inputs = build(Case(mgu, T=5, **options))
    leaves = [inputs.tensors[name].detach().requires_grad_() for name in GRADIENTS]
    masks = {name: inputs.tensors[name] for name in ("resets", "lengths")}
    plain = {name: value for name, value in options.items() if name not in masks}
    out = equations.scan(equations.mgu, *leaves, **masks, **plain)
    gradients = torch.autograd.grad(out, leaves, (inputs.dstates, inputs.dlast_states))
    expected = {"states": out[0].detach(), "last_states": out[1].detach()}
    expected |= {f"d{name}": g for name, g in zip(GRADIENTS, gradients, strict=True)}
    assert_close(run(inputs, "vanilla"), expected, 1e-12)
    assert_close(oracle_in_numpy(inputs), expected, 1e-12)


@pytest.mark.parametrize("own", [mgu, odd], ids=lambda c: c.name)
def test_gradcheck(own):
    inputs = build(Case(own, B=2, T=3, N=1, D=2))
    leaves = [inputs.tensors[name].detach().requires_grad_() for name in GRADIENTS]
    assert torch.autograd.gradcheck(lambda *x: flashrnn(*x, function=own), leaves)
    assert torch.autograd.gradgradcheck(lambda *x: flashrnn(*x, function=own), leaves)


def test_equal_cells_are_one_and_names_may_repeat():
    """Two cells of one name, with different equations, do not get into each other's way."""

    def make(scale):
        @cell(gates=(Gate("a"),), states=("h",))
        def mine(a, h):
            return tanh(scale * a)

        return mine

    one, two = make(1.0), make(2.0)
    assert one == make(1.0)
    assert one != two
    Wx, R, b = torch.randn(1, 1, 1, 1, 4), torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4)
    for own, scale in ((one, 1), (two, 2)):
        torch.testing.assert_close(flashrnn(Wx, R, b, function=own)[0].view(4), torch.tanh(scale * Wx).view(4))
