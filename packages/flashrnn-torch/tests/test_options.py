"""What the options promise: resets, lengths, hidden_only, dtypes of states, modes without gradients."""

import pytest
import torch
from checks import assert_close, oracle, run
from problems import CELLS, DTYPES, GRADIENTS, Case, build

from flashrnn import flashrnn


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_resets_stop_gradients_and_values(cell, reverse):
    """A loss on what comes after a reset depends on nothing before it, and not on the initial states."""
    inputs = build(Case(cell, T=6, reverse=reverse))
    Wx, R, b, states = (inputs.tensors[name].detach().requires_grad_() for name in GRADIENTS)
    resets = torch.zeros(3, 6, dtype=torch.bool)
    resets[:, 3] = True
    after, before = (slice(0, 4), slice(4, 6)) if reverse else (slice(3, 6), slice(0, 3))
    out, last = flashrnn(Wx, R, b, states, cell, resets=resets, reverse=reverse)
    dWx, dstates = torch.autograd.grad((out[:, :, after].square().sum() + last.square().sum()), (Wx, states))
    assert not dstates.any()
    assert not dWx[:, before].any()
    assert dWx[:, after].any()
    fresh, _ = flashrnn(Wx[:, after], R, b, None, cell, reverse=reverse)
    torch.testing.assert_close(out[:, :, after], fresh, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_equal_shorter_calls(cell, reverse):
    inputs = build(Case(cell, T=6, lengths=True, reverse=reverse))
    Wx, R, b, states = (inputs.tensors[name] for name in GRADIENTS)
    lengths = inputs.tensors["lengths"]
    assert lengths.tolist()[:2] == [6, 1]
    for index in (torch.int32, torch.int64):
        out, last = flashrnn(Wx, R, b, states, cell, lengths=lengths.to(index), reverse=reverse)
        for row, length in enumerate(lengths.tolist()):
            one = slice(row, row + 1)
            alone, end = flashrnn(Wx[one, :length], R, b, states[:, one], cell, reverse=reverse)
            torch.testing.assert_close(out[:, one, :length], alone, rtol=0, atol=1e-12)
            torch.testing.assert_close(last[:, one], end, rtol=0, atol=1e-12)
            assert not out[:, row, length:].any()


def padded(cell, reverse):
    """(clean, poisoned): leaves of one problem, the second with NaN in Wx wherever t >= length; and the lengths."""
    inputs = build(Case(cell, T=6, lengths=True, reverse=reverse))
    lengths = inputs.tensors["lengths"]
    padding = (torch.arange(6) >= lengths[:, None])[:, :, None, None, None]
    assert padding.any()
    tensors = [inputs.tensors[name].detach() for name in GRADIENTS]
    poisoned = [tensors[0].masked_fill(padding, float("nan")), *tensors[1:]]
    return [[x.clone().requires_grad_() for x in some] for some in (tensors, poisoned)], lengths


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_padding_does_not_leak(cell, reverse):
    """Bit for bit, NaN in the padding changes neither outputs nor gradients."""
    problems, lengths = padded(cell, reverse)
    results = []
    for leaves in problems:
        out, last = flashrnn(*leaves, cell, lengths=lengths, reverse=reverse)
        results.append([out, last, *torch.autograd.grad(out.square().sum() + last.square().sum(), leaves)])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("cell", CELLS)
def test_hidden_only(cell):
    """h as in the full call, with gradients and without; last_states stay complete."""
    for record in (True, False):
        case = Case(cell, resets=True, hidden_only=True)
        inputs, full = build(case), build(case.but(hidden_only=False))
        got, expected = (run(x, "vanilla", gradients=record) for x in (inputs, full))
        assert torch.equal(got["states"], expected["states"][:1])
        assert torch.equal(got["last_states"], expected["last_states"])
        assert_close(got, oracle(inputs, gradients=record), 1e-12)


@pytest.mark.parametrize("states", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_of_states_and_gradients(dtype, states):
    """States come back as they went in, else in the compute dtype; a gradient has the dtype of its tensor."""
    given = {
        "Wx": torch.randn(2, 3, 4, 1, 4),  # float32, whatever the compute dtype
        "R": torch.randn(4, 1, 4, 4, dtype=torch.float64),
        "b": torch.randn(4, 1, 4, dtype=torch.bfloat16),
    }
    if states:
        given["states"] = torch.randn(2, 2, 1, 1, 4).to(getattr(torch, states))
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    out, last = flashrnn(**leaves, dtype=dtype)
    assert out.dtype == last.dtype == getattr(torch, states or dtype)
    gradients = torch.autograd.grad(out.float().sum() + last.float().sum(), tuple(leaves.values()))
    for gradient, x in zip(gradients, leaves.values(), strict=True):
        assert (gradient.dtype, gradient.shape) == (x.dtype, x.shape)


@pytest.mark.parametrize("asked", GRADIENTS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_one_tensor_alone(cell, asked):
    """The same number as among all, whichever tensors want one."""
    inputs = build(Case(cell, resets=True, lengths=True, reverse=True))
    tensors = {name: inputs.tensors[name].detach() for name in GRADIENTS}
    tensors[asked].requires_grad_()
    masks = {name: inputs.tensors[name] for name in ("resets", "lengths")}
    outputs = flashrnn(**tensors, **masks, **inputs.options)
    (gradient,) = torch.autograd.grad(outputs, tensors[asked], (inputs.dstates, inputs.dlast_states))
    assert torch.equal(gradient, run(inputs, "vanilla")[f"d{asked}"])


def test_gradient_of_one_output_alone():
    """A loss on h at one step, or on the last states only."""
    inputs = build(Case("slstm"))
    leaves = [inputs.tensors[name].detach().requires_grad_() for name in GRADIENTS]
    for place in (0, 1):
        cotangents = [torch.zeros_like(inputs.dstates), torch.zeros_like(inputs.dlast_states)]
        cotangents[place] = (inputs.dstates, inputs.dlast_states)[place]
        outputs = flashrnn(*leaves, "slstm")
        alone = torch.autograd.grad(outputs[place], leaves, cotangents[place], retain_graph=True)
        both = torch.autograd.grad(outputs, leaves, cotangents)
        for x, y in zip(alone, both, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_modes_without_gradients(mode):
    """Same numbers, no graph, and no states kept for a backward."""
    inputs = build(Case("lstm", dtype="bfloat16", states="bfloat16"))
    leaves = [inputs.tensors[name].detach().requires_grad_() for name in GRADIENTS]
    expected = flashrnn(*leaves)
    with mode():
        got = flashrnn(*leaves)
    for have, want in zip(got, expected, strict=True):
        assert torch.equal(have, want)
        assert not have.requires_grad
        assert want.requires_grad


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_padding_does_not_leak_into_second_gradients(cell, reverse):
    problems, lengths = padded(cell, reverse)
    results = []
    for leaves in problems:
        out, last = flashrnn(*leaves, cell, lengths=lengths, reverse=reverse)
        first = torch.autograd.grad(out.square().sum() + last.square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


def test_a_bound_beyond_float32_bounds_nothing():
    inputs = build(Case("lstm", dtype="float32", states=None))
    leaves = [inputs.tensors[name].requires_grad_() for name in ("Wx", "R", "b")]
    free, bounded = (
        torch.autograd.grad(flashrnn(*leaves, gradient_recurrent_clipval=clip)[0].sum(), leaves)
        for clip in (None, 1e39)
    )
    assert all(torch.equal(x, y) for x, y in zip(free, bounded, strict=True))
