"""`vanilla` against the oracle, and both against the equations written by hand."""

import itertools
import random

import equations
import pytest
import torch
from checks import assert_backend, assert_close, oracle_in_numpy, oracle_on_device, run
from problems import CELLS, DTYPES, GRADIENTS, Case, build

from flashrnn import flashrnn

SHAPES = [{"T": T, "D": D, "N": N} for T, D, N in itertools.product((1, 2, 3, 63), (1, 5, 16, 24), (1, 3))]
OPTIONS = [
    {"resets": resets, "lengths": lengths, "reverse": reverse, "clip": clip, "cut": cut}
    for resets, lengths, reverse, clip, cut in itertools.product(
        (False, True), (False, True), (False, True), (None, 0.05), (False, True)
    )
]


def grid(cell, rounds):
    """Every option set with `rounds` of the shapes; each round pairs all 32 option sets with all 32 shapes."""
    for seed in range(rounds):
        shapes = random.Random(f"{cell}{seed}").sample(SHAPES, len(SHAPES))
        for place, (shape, options) in enumerate(zip(shapes, OPTIONS, strict=True)):
            states = "float64" if (place + seed) % 4 else None
            yield Case(cell, B=(1, 3, 5)[(place + seed) % 3], **shape, **options, states=states, seed=seed)


@pytest.mark.parametrize("case", [case for cell in CELLS for case in grid(cell, rounds=3)], ids=str)
def test_float64_equals_the_oracle(case):
    """To 1e-12, all outputs and gradients. `oracle_on_device` is `vanilla` in float64: it is proved here."""
    inputs = build(case)
    assert_close(oracle_on_device(inputs), oracle_in_numpy(inputs), 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("T", [1, 63])
def test_error_of_each_dtype(cell, dtype, T):
    """The rule of `checks`, on `vanilla` itself: how it is used for a backend, and what its states' dtype may cost."""
    states = "float64" if dtype == "float64" else "float32"
    assert_backend(Case(cell, T=T, D=24, N=3, dtype=dtype, states=states, resets=True, lengths=True), "vanilla")
    assert_backend(Case(cell, T=T, D=5, N=1, dtype=dtype, states=dtype, reverse=True), "vanilla")
    assert_backend(Case(cell, T=T, D=5, N=1, dtype=dtype, states=None, clip=0.05), "vanilla", b_dtype="float32")


ALLOWED = {"float32": 2e-6, "float16": 2e-2, "bfloat16": 1e-1}


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("cell", CELLS)
def test_yardstick_is_near_the_oracle(cell, dtype):
    """A bound on the root mean square error of `vanilla`, by which all others are measured.

    Not on the largest: where a rounding turns slstm's maximum to its other side, the gradient of that element jumps.
    """
    inputs = build(Case(cell, T=63, D=16, dtype=dtype, states="float32"))
    got, expected = run(inputs, "vanilla"), oracle_in_numpy(inputs)
    for name, want in expected.items():
        error = (got[name].double() - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error < ALLOWED[dtype], name


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(k for k, v in o.items() if v) or "plain")
@pytest.mark.parametrize("cell", CELLS)
def test_equals_the_equations(cell, options):
    """The gradient through the steps is autograd's on the equations written by hand, first and second order."""
    inputs = build(Case(cell, B=3, T=4, N=2, D=3, seed=7, **options))
    leaves = [inputs.tensors[name].detach().requires_grad_() for name in GRADIENTS]
    masks = {name: inputs.tensors[name] for name in ("resets", "lengths")}
    plain = {name: options[name] for name in ("reverse", "cut", "clip")}
    expected = equations.scan(getattr(equations, cell), *leaves, **masks, **plain)
    got = flashrnn(*leaves, **masks, **inputs.options, backend="vanilla")
    cotangents = (inputs.dstates, inputs.dlast_states)
    twice = options["clip"] is None  # a hook is not differentiated
    how = {"create_graph": twice, "materialize_grads": True}  # elman's first state counts for nothing when cut
    first = [torch.autograd.grad(out, leaves, cotangents, **how) for out in (expected, got)]
    for want, have in zip((*expected, *first[0]), (*got, *first[1]), strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-11)
    if twice:
        weights = [torch.randn_like(x) for x in leaves]
        second = [
            torch.autograd.grad(
                sum((g * w).sum() for g, w in zip(gs, weights, strict=True)), leaves, materialize_grads=True
            )
            for gs in first
        ]
        for want, have in zip(*second, strict=True):
            torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)


GRADCHECK = {
    "plain": {},
    "resets": {"resets": True},
    "lengths": {"lengths": True},
    "reverse": {"reverse": True},
    "all": {"resets": True, "lengths": True, "reverse": True},
}


@pytest.mark.parametrize("options", GRADCHECK.values(), ids=GRADCHECK)
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_and_gradgradcheck(cell, options):
    inputs = build(Case(cell, B=3, T=3, N=1, D=2, **options))
    leaves = [inputs.tensors[name].detach().requires_grad_() for name in GRADIENTS]
    if cell == "slstm":  # away from n = 0, where the function jumps
        with torch.no_grad():
            leaves[3][2] += 0.1
    masks = {name: inputs.tensors[name] for name in ("resets", "lengths")}

    def call(*tensors):
        return flashrnn(*tensors, **masks, **inputs.options, backend="vanilla")

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_chunks_equal_the_whole_bit_for_bit(cell, dtype, reverse):
    """With exact states carried: float32, or float64 for float64."""
    exact = "float64" if dtype == "float64" else "float32"
    inputs = build(Case(cell, B=3, T=63, N=3, D=24, dtype=dtype, states=exact, resets=True, reverse=reverse))
    Wx, R, b, states = (inputs.tensors[name] for name in GRADIENTS)
    resets = inputs.tensors["resets"]
    whole, last = flashrnn(Wx, R, b, states, resets=resets, **inputs.options, backend="vanilla")
    pieces = [slice(0, 1), slice(1, 20), slice(20, 63)]
    outs = []
    for piece in reversed(pieces) if reverse else pieces:
        out, states = flashrnn(Wx[:, piece], R, b, states, resets=resets[:, piece], **inputs.options, backend="vanilla")
        outs.append(out)
    assert whole.dtype == states.dtype == getattr(torch, exact)
    assert torch.equal(torch.cat(outs[::-1] if reverse else outs, 2), whole)
    assert torch.equal(states, last)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("dtype", "states"), [("float32", "bfloat16"), ("float64", "float32"), ("float16", "bfloat16")]
)
def test_coarse_states_do_not_coarsen_gradients(cell, dtype, states):
    """R met the exact h, not the one rounded for the caller: dR is as good as with exact states."""
    assert_backend(Case(cell, T=20, dtype=dtype, states=states, resets=True), "vanilla")


def test_forward_mode_is_vanillas_alone():
    """In an eager call that records nothing; everything else raises, where it would lose the tangent."""
    Wx, R, b = (x.double() for x in list(build(Case("lstm", dtype="float32")).tensors.values())[:3])
    tangent = torch.randn_like(Wx)
    step = 1e-6
    want = (flashrnn(Wx + step * tangent, R, b)[0] - flashrnn(Wx - step * tangent, R, b)[0]) / (2 * step)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(Wx, tangent)
        got = torch.autograd.forward_ad.unpack_dual(flashrnn(dual, R, b)[0]).tangent
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
        R.requires_grad_()
        with pytest.raises(NotImplementedError, match=r"forward-mode.*reverse mode"):
            flashrnn(dual, R, b)
        assert flashrnn(Wx, R, b)[0].requires_grad
