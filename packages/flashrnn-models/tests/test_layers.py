"""The layers' numbers against NumPy loops written out here, and the block against the package xlstm."""

import numpy as np
import pytest
import torch

from flashrnn_models import SLSTM, RecurrentLayer, SLSTMBlock
from flashrnn_models.initialization import powerlaw_forget_bias_

B, T, N, D, F = 3, 9, 2, 4, 6
CELLS = ["slstm", "lstm", "gru", "elman"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def step(name, wx, rh, b, old):
    """One step of a cell in NumPy: wx, rh, b have the gates first."""
    if name == "gru":  # Wx: r z n, R: n r z, b: n_r r z n_w
        r, z = sigmoid(wx[0] + rh[1] + b[1]), sigmoid(wx[1] + rh[2] + b[2])
        n = np.tanh(wx[2] + b[3] + r * (rh[0] + b[0]))
        return [(1 - z) * n + z * old[0]]
    g = [w + r + bias for w, r, bias in zip(wx, rh, b, strict=True)]
    if name == "elman":
        return [np.tanh(g[0])]
    i, f, z, o = g
    if name == "lstm":
        c = sigmoid(f) * old[1] + sigmoid(i) * np.tanh(z)
        return [sigmoid(o) * np.tanh(c), c]
    # sLSTM without the stabiliser m: the plain sums it stands for (fine for small gates)
    c = sigmoid(f) * old[1] + np.exp(i) * np.tanh(z)
    n = sigmoid(f) * old[2] + np.exp(i)
    return [sigmoid(o) * c / n, c, n]


def numpy_layer(name, layer, x):
    W, R, b = (p.detach().numpy() for p in (layer.W, layer.R, layer.b))
    states = [np.zeros((B, N, D)) for _ in range(3)]
    hs = []
    for t in range(T):
        wx, rh = np.zeros((len(W), B, N, D)), np.zeros((len(R), B, N, D))
        for n in range(N):
            u = x[:, t, n * F // N : (n + 1) * F // N] if layer.block_diagonal else x[:, t]
            for g in range(len(W)):
                wx[g, :, n] = u @ W[g, n].T
            for g in range(len(R)):
                rh[g, :, n] = states[0][:, n] @ R[g, n].T
        states = step(name, wx, rh, b, states)
        hs.append(states[0].reshape(B, N * D))
    return np.stack(hs, 1)


@pytest.mark.parametrize("block_diagonal", [False, True], ids=["full", "block_diagonal"])
@pytest.mark.parametrize("name", CELLS)
def test_layer_equals_numpy(name, block_diagonal):
    torch.manual_seed(0)
    layer = RecurrentLayer(F, N * D, N, name, block_diagonal).double()
    x = torch.randn(B, T, F, dtype=torch.float64)
    np.testing.assert_allclose(layer(x)[0].detach().numpy(), numpy_layer(name, layer, x.numpy()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CELLS)
def test_layer_in_chunks_equals_whole(name):
    torch.manual_seed(0)
    layer = RecurrentLayer(F, N * D, N, name)
    x = torch.randn(B, T, F)
    whole, last = layer(x)
    first, states = layer(x[:, :4])
    second, states = layer(x[:, 4:], states)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(states, last, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CELLS)
def test_every_parameter_has_the_numerical_gradient(name):
    torch.manual_seed(0)
    layer = RecurrentLayer(4, 4, 2, name, block_diagonal=True).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in layer.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_states_stay_float32_under_autocast():
    layer = SLSTM(N * D, N)
    with torch.autocast("cpu", torch.bfloat16):
        h, states = layer(torch.randn(B, T, N * D))
    assert states.dtype == torch.float32
    assert h.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CELLS)
def test_parameters_in_16_bits(name, dtype):
    """Layers and blocks follow one another in the dtype of x; the states between calls stay in float32."""
    x = torch.randn(B, T, N * D)
    for layer in (RecurrentLayer(N * D, N * D, N, function=name), SLSTMBlock(N * D, N, function=name)):
        expected = layer(layer(x)[0])[0]
        layer.to(dtype)
        middle, state = layer(x.to(dtype))
        y, _ = layer(middle, state)
        assert (middle.dtype, y.dtype) == (dtype, dtype)
        assert (state if isinstance(state, torch.Tensor) else state.cell).dtype == torch.float32
        y, _ = layer(middle)
        torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
        y.float().sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_powerlaw_forget_bias():
    layer = SLSTM(hidden_size=10, num_heads=2, block=1, num_blocks=3)
    expected = [5 - 12 * (d / 4) ** (0.3 + 1.3 / 2) for d in range(5)]
    np.testing.assert_allclose(layer.b[1].detach(), np.array([expected] * 2), rtol=1e-5)
    assert not layer.b[[0, 2, 3]].any()
    assert not layer.R.any()
    assert powerlaw_forget_bias_(torch.empty(1)).item() == 5  # one dim has no ramp


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RecurrentLayer(6, 8, 3), "hidden_size 8 .* 3 heads"),
        (lambda: RecurrentLayer(5, 8, 2, block_diagonal=True), "input_size 5 .* 2 heads"),
        (lambda: RecurrentLayer(6, 8)(torch.zeros(2, 3, 7)), r"x: expected \[B, T, 6\], got \[2, 3, 7\]"),
        (lambda: RecurrentLayer(6, 8)(torch.zeros(2, 6)), r"x: expected \[B, T, 6\], got \[2, 6\]"),
        (lambda: RecurrentLayer(6, 8, function="nought"), "nought"),
        (lambda: SLSTMBlock(8, 8), "8 of 8 features leave a head dim of 1"),
    ],
    ids=["heads", "block_diagonal", "features", "rank", "cell", "head dim"],
)
def test_wrong_use_is_a_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", CELLS)
def test_block_is_causal_and_carries_its_state(name):
    torch.manual_seed(0)
    block = SLSTMBlock(8, 2, function=name).double()
    torch.nn.init.normal_(block.slstm.R, std=0.3)
    x = torch.randn(B, T, 8, dtype=torch.float64)
    whole, end = block(x)
    changed = x.clone()
    changed[:, 5:] += 1
    y, _ = block(changed)
    torch.testing.assert_close(y[:, :5], whole[:, :5], rtol=0, atol=0)
    assert (y[:, 5:] != whole[:, 5:]).any(-1).all()

    parts, state = [], None
    for chunk in x.split([1, 1, 5, 2], dim=1):  # shorter and longer than the convolution
        y, state = block(chunk, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(tuple(state), tuple(end), rtol=0, atol=1e-12)


def test_block_equals_xlstm():
    """With its weights mapped, the block is the sLSTM block of the xLSTM authors' package."""
    pytest.importorskip("xlstm", reason="the package xlstm is the peer of this test")
    from xlstm.blocks.slstm.block import sLSTMBlock, sLSTMBlockConfig
    from xlstm.blocks.slstm.layer import sLSTMLayerConfig
    from xlstm.components.feedforward import FeedForwardConfig

    torch.manual_seed(0)
    F, K = 16, 4
    config = sLSTMBlockConfig(
        slstm=sLSTMLayerConfig(embedding_dim=F, num_heads=N, conv1d_kernel_size=K, backend="vanilla"),
        feedforward=FeedForwardConfig(proj_factor=1.3, embedding_dim=F),
        _num_blocks=2,
        _block_idx=1,
    )
    peer = sLSTMBlock(config)
    block = SLSTMBlock(F, N, block=1, num_blocks=2, conv_size=K)
    cell = peer.xlstm.slstm_cell
    R = cell._recurrent_kernel_int2ext(cell._recurrent_kernel)  # N P G D, a view
    b = cell._bias_int2ext(cell._bias)  # N G D, a view
    torch.testing.assert_close(b.transpose(0, 1), block.slstm.b)  # the same initial bias

    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs, layer = peer.xlstm, block.slstm
    with torch.no_grad():
        block.norm.weight.copy_(1 + peer.xlstm_norm.weight)
        block.feedforward_norm.weight.copy_(1 + peer.ffn_norm.weight)
        block.head_norm.weight.copy_(1 + theirs.group_norm.weight.view(N, -1))
        block.conv.conv.load_state_dict(theirs.conv1d.conv.state_dict())
        # its layer passes "fgate" where the cell expects i, and "igate" where it expects f
        gates = (theirs.fgate, theirs.igate, theirs.zgate, theirs.ogate)
        layer.W.copy_(torch.stack([gate.weight for gate in gates]))
        layer.R.copy_(R.permute(2, 0, 3, 1))
        layer.b.copy_(b.transpose(0, 1))
        block.feedforward.up.weight.copy_(peer.ffn.proj_up.weight)
        block.feedforward.down.weight.copy_(peer.ffn.proj_down.weight)
    x = torch.randn(B, T, F)
    torch.testing.assert_close(block(x)[0], peer(x), rtol=0, atol=2e-5)
