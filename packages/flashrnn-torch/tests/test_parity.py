"""The cells against other people's: torch.nn and xlstm, with the weights mapped, forward and gradients."""

import pytest
import torch

from flashrnn import flashrnn

B, T, N, D, INPUT = 5, 17, 1, 24, 7
# Our gates' places among torch's rows: of weight_ih for Wx, of weight_hh for R.
# torch: LSTM i f g o; GRU r z n; RNN one.
ROWS = {"lstm": ((0, 1, 2, 3), (0, 1, 2, 3)), "gru": ((0, 1, 2), (2, 0, 1)), "elman": ((0,), (0,))}
TORCH = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "elman": torch.nn.RNN}


def bias(cell, ih, hh):
    """b [G 1 D] of torch's two biases [rows D]: they add up, except for the candidate of gru."""
    if cell == "gru":
        return torch.stack([hh[2], ih[0] + hh[0], ih[1] + hh[1], ih[2]])[:, None]
    return (ih + hh)[:, None]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("cell", TORCH)
def test_equals_torch_nn(cell, direction):
    """To 1e-5 in float32, with initial states: outputs, last states, gradients of the input and of every parameter."""
    torch.manual_seed(0)
    theirs = TORCH[cell](INPUT, D, batch_first=True, bidirectional=direction == "reverse")
    suffix = "_l0_reverse" if direction == "reverse" else "_l0"
    names = [f"{name}{suffix}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    parameters = [getattr(theirs, name) for name in names]
    S = 2 if cell == "lstm" else 1
    x = torch.randn(B, T, INPUT, requires_grad=True)
    states = torch.randn(S, B, 1, N, D, requires_grad=True)
    dout, dlast = torch.randn(B, T, D), torch.randn(S, B, 1, N, D)

    layers = 2 if direction == "reverse" else 1  # the backward direction's state is the second
    first = torch.cat([torch.zeros(S, layers - 1, B, D), states.view(S, 1, B, D)], 1)
    out, last = theirs(x, first.unbind() if cell == "lstm" else first[0])
    last = torch.stack(last if cell == "lstm" else (last,))[:, -1].view(S, B, 1, N, D)
    expected = [out[..., -D:], last]
    leaves = [x, states, *parameters]
    expected += torch.autograd.grad(expected, leaves, [dout, dlast])

    weight_ih, weight_hh, bias_ih, bias_hh = (p.view(-1, D, *p.shape[1:]) for p in parameters)
    into_Wx, into_R = (list(rows) for rows in ROWS[cell])
    Wx = torch.einsum("bti,gdi->btgd", x, weight_ih[into_Wx])[:, :, :, None]
    R = weight_hh[into_R][:, None]  # Gr 1 D P
    out, last = flashrnn(Wx, R, bias(cell, bias_ih, bias_hh), states, cell, reverse=direction == "reverse")
    got = [out[0, :, :, 0], last]
    got += torch.autograd.grad(got, leaves, [dout, dlast])
    for have, want in zip(got, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cotangents", ["h", "h c n m"])
def test_slstm_equals_xlstm(cotangents):
    """xlstm's own PyTorch function, from zero states, in float64: outputs, last states, gradients.

    From zero states its min(f', 1), min(i', 1) and our max(n', 1) are all inactive, so the gradients agree as well.
    """
    vanilla = pytest.importorskip("xlstm.blocks.slstm.src.vanilla", reason="needs the PyPI package xlstm==2.0.6")
    B, T, N, D = 3, 21, 3, 5
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    Wx, R, b = normal(B, T, 4, N, D), normal(4, N, D, D), normal(4, N, D)
    theirs, _, _ = vanilla.slstm_forward(
        Wx.transpose(0, 1).reshape(T, B, 4 * N * D),
        Wx.new_zeros(4, B, N * D),
        R.transpose(0, 1).reshape(N, 4 * D, D),
        b.reshape(4 * N * D),
        vanilla.slstm_pointwise_function_registry["slstm"],
    )
    theirs = theirs[:, 1:].transpose(1, 2).reshape(4, B, T, N, D)
    ours, last = flashrnn(Wx, R, b, function="slstm")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last[:, :, 0], theirs[:, :, -1], rtol=1e-12, atol=1e-12)
    dstates = normal(4, B, T, N, D).detach()
    if cotangents == "h":
        dstates[1:] = 0
    expected, got = (torch.autograd.grad(out, (Wx, R, b), dstates) for out in (theirs, ours))
    for have, want in zip(got, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)
