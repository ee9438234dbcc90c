"""What the backends share of the backward: states by pieces of time, and gradients that do not depend on the pieces."""

import pytest
import torch
from checks import GRADIENTS, run
from problems import CELLS, Case, build

from flashrnn import gradients


@pytest.fixture(params=[1, 4, 5], ids="pieces_of_{}".format)
def small_pieces(request, monkeypatch):
    monkeypatch.setattr(gradients, "CHUNK_STEPS", request.param)
    monkeypatch.setattr(gradients, "CHUNK_BYTES", 0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"resets": True}, {"lengths": True}, {"resets": True, "lengths": True}], ids=str
)
def test_a_piece_of_previous_is_that_of_the_whole(options, reverse):
    case = Case("lstm", B=5, T=9, N=2, D=3, dtype="float64", states="float64", reverse=reverse, **options)
    given = build(case).tensors
    states, resets, lengths = given["states"], given["resets"], given["lengths"]
    out = torch.randn(2, 5, 9, 2, 3, dtype=torch.float64)
    whole = gradients.previous(case.problem, out, states, resets, lengths)
    for start in range(9):
        for stop in range(start + 1, 10):
            piece = gradients.previous(case.problem, out, states, resets, lengths, start, stop)
            assert torch.equal(piece, whole[:, :, start:stop])


def test_gradients_by_pieces(small_pieces):
    inputs = build(Case("gru", B=3, T=13, D=6, dtype="float64", states="float64", resets=True, lengths=True))
    by_pieces = run(inputs, "vanilla")
    with pytest.MonkeyPatch.context() as whole:
        whole.setattr(gradients, "CHUNK_STEPS", 100)
        at_once = run(inputs, "vanilla")
    for name in GRADIENTS:
        torch.testing.assert_close(by_pieces[f"d{name}"], at_once[f"d{name}"], rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"resets": True, "lengths": True}], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("D", [24, 640])
@pytest.mark.parametrize("name", CELLS)
def test_fused_gradients_by_pieces(name, D, reverse, options, small_pieces):
    """Pieces of time change the order in which matmuls add, and nothing else."""
    case = Case(name, B=3, T=9, D=D, dtype="bfloat16", states="float32", reverse=reverse, clip=0.1, **options)
    inputs = build(case, "cuda")
    by_pieces = run(inputs, "cuda_fused")
    with pytest.MonkeyPatch.context() as whole:
        whole.setattr(gradients, "CHUNK_STEPS", 100)
        at_once = run(inputs, "cuda_fused")
    for key, want in at_once.items():
        torch.testing.assert_close(by_pieces[key], want, rtol=1e-2, atol=1e-2 * want.abs().max().item())
