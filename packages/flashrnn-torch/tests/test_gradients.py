"""What the backends share of the backward: the states that steps consumed, and the matmuls over all steps."""

import pytest
import torch
from problems import Case, build
from test_own_cell import odd

from flashrnn import gradients
from flashrnn_core import get_cell

OPTIONS = [{}, {"resets": True}, {"lengths": True}, {"resets": True, "lengths": True}]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_previous_is_the_state_that_each_step_consumed(options, reverse):
    case = Case("lstm", B=5, T=9, N=2, D=3, dtype="float64", states="float64", reverse=reverse, **options)
    given = build(case).tensors
    states, resets, lengths = given["states"], given["resets"], given["lengths"]
    out = torch.randn(2, 5, 9, 2, 3, dtype=torch.float64)
    before = gradients.previous(case.problem, out, states, resets, lengths)
    for b in range(5):
        length = 9 if lengths is None else int(lengths[b])
        times = range(length)[:: -1 if reverse else 1]
        state = states[:, b, 0]
        for t in times:
            if resets is not None and resets[b, t]:
                state = torch.zeros_like(state)
            assert torch.equal(before[:, b, t], state)
            state = out[:, b, t]


def test_previous_in_another_dtype():
    case = Case("elman", dtype="float32", states=None)
    out = torch.randn(case.problem.output_shape("states"))
    before = gradients.previous(case.problem, out, None, None, None, torch.bfloat16)
    assert torch.equal(before[:, :, 1:], out[:, :, :-1].bfloat16())
    assert torch.equal(before[:, :, 0], torch.zeros_like(before[:, :, 0]))


@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("name", ["elman", "gru", "lstm", odd], ids=["elman", "gru", "lstm", "odd"])
def test_matmuls_over_all_steps(name, N):
    """R h at the places of the recurrent gates, the others untouched; dR and db as sums over batch and time."""
    cell = get_cell(name)
    problem = Case(name, B=3, T=4, N=N, D=5).problem
    R = torch.randn(problem.shape("R"), dtype=torch.float64)
    h = torch.randn(3, 4, N, 5, dtype=torch.float64)
    dpre = torch.full((3, 4, len(cell.gates), N, 5), torch.nan, dtype=torch.float64)
    gradients.recurrent_part(problem, R, h, dpre)
    expected = torch.einsum("gndp,btnp->btgnd", R, h)
    gates = list(cell.recurrent_gates)
    torch.testing.assert_close(dpre[:, :, gates], expected, rtol=1e-12, atol=1e-12)
    assert int(dpre.isnan().sum()) == dpre.numel() - expected.numel()
    dpre = torch.randn_like(dpre)
    dR = gradients.recurrent_gradient(problem, dpre, h)
    torch.testing.assert_close(dR, torch.einsum("btgnd,btnp->gndp", dpre[:, :, gates], h), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients.bias_gradient(dpre), dpre.sum((0, 1)), rtol=1e-12, atol=1e-12)
