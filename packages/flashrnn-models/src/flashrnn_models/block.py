"""The pre-norm sLSTM block: convolution, recurrence, per-head norm and gated feed-forward."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from flashrnn import Cell
from flashrnn_models.initialization import small_init_, wang_init_
from flashrnn_models.slstm import SLSTM


class BlockState(NamedTuple):
    """What a block carries from one chunk of a sequence to the next."""

    conv: Tensor  # B K-1 F  the last inputs of the convolution
    cell: Tensor  # S B 1 N D  the states of the cell

    def detach(self) -> "BlockState":
        """The same values, cut from the graph that made them (truncated backpropagation)."""
        return BlockState(self.conv.detach(), self.cell.detach())


class CausalConv(nn.Module):
    """y[t] = bias + sum_k weight[k] * x[t - K + 1 + k]: each feature on its own, the past only.

    Shapes: x [B, T, F], tail [B, K-1, F] (the inputs before `x`, None for zeros) -> y [B, T, F] and
    the tail for the next call.

    >>> conv = CausalConv(8, kernel_size=4)
    >>> y, tail = conv(torch.randn(2, 5, 8))
    >>> y.shape, tail.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 3, 8]))
    """

    def __init__(self, features: int, kernel_size: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv1d(features, features, kernel_size, groups=features)

    def forward(self, x: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        B, T, F = x.shape
        if tail is None:
            tail = x.new_zeros(B, self.conv.kernel_size[0] - 1, F)
        x = torch.cat([tail.to(x.dtype), x], dim=1)
        return self.conv(x.mT).mT, x[:, T:].clone()  # not with the memory of all of x


class HeadNorm(nn.Module):
    """y[n] = weight[n] * (h[n] - mean h[n]) / √(var h[n] + 1e-5), every head on its own.

    Shapes: h [..., N * D] -> [..., N * D].

    >>> HeadNorm(8, num_heads=2)(torch.randn(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(self, features: int, num_heads: int) -> None:
        super().__init__()
        if features // num_heads < 2:
            raise ValueError(f"num_heads: {num_heads} of {features} features leave a head dim of 1, whose norm is zero")
        self.weight = nn.Parameter(torch.ones(num_heads, features // num_heads))

    def forward(self, h: Tensor) -> Tensor:
        N, D = self.weight.shape
        return (functional.layer_norm(h.unflatten(-1, (N, D)), (D,)) * self.weight).flatten(-2)


class GatedFeedForward(nn.Module):
    """y = W_down (gelu(W_gate x) * W_up x), the inner width 1.3 F rounded up to a multiple of 64.

    Shapes: x [..., F] -> [..., F].

    >>> GatedFeedForward(8)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, features: int, num_blocks: int = 1) -> None:
        super().__init__()
        inner = -(-13 * features // 640) * 64
        self.up = nn.Linear(features, 2 * inner, bias=False)  # gate and up in one
        self.down = nn.Linear(inner, features, bias=False)
        small_init_(self.up.weight, features)
        wang_init_(self.down.weight, features, num_blocks)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(functional.gelu(gate) * up)


class SLSTMBlock(nn.Module):
    """x = x + headnorm(slstm(norm x)); x = x + feedforward(norm x).

    The gates named i and f see silu(conv(norm x)), the others norm x; in a cell without them (gru,
    elman) every gate sees the convolved input.

    Args:
        features: F, width of the residual stream.
        num_heads: N, divides `features`.
        block, num_blocks: place in the stack and its depth, for the initial values.
        conv_size: K, steps the convolution sees.
        dropout: probability of zeroing what a branch adds to the residual stream, in training.
        function: the cell, see `RecurrentLayer`.
        backend: the backend of `flashrnn`.

    Shapes: x [B, T, F], `BlockState` or None -> y [B, T, F], `BlockState`. With T = 1 this is one
    step of generation.

    Source: Beck, Pöppel et al., "xLSTM: Extended Long Short-Term Memory" (arXiv:2405.04517),
    figure 10, the sLSTM block with post up-projection.

    >>> import torch
    >>> from flashrnn_models import SLSTMBlock
    >>> block = SLSTMBlock(features=8, num_heads=2)
    >>> y, state = block(torch.randn(3, 5, 8))
    >>> y.shape, state.conv.shape, state.cell.shape
    (torch.Size([3, 5, 8]), torch.Size([3, 3, 8]), torch.Size([4, 3, 1, 2, 4]))
    >>> y_next, state = block(torch.randn(3, 1, 8), state)
    """

    def __init__(
        self,
        features: int,
        num_heads: int = 4,
        block: int = 0,
        num_blocks: int = 1,
        conv_size: int = 4,
        dropout: float = 0.0,
        function: str | Cell = "slstm",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features, bias=False)
        self.conv = CausalConv(features, conv_size)
        self.slstm = SLSTM(features, num_heads, block, num_blocks, function, backend)
        self.head_norm = HeadNorm(features, num_heads)
        self.feedforward_norm = nn.LayerNorm(features, bias=False)
        self.feedforward = GatedFeedForward(features, num_blocks)
        self.dropout = nn.Dropout(dropout)
        cell = self.slstm.cell
        names = [cell.gates[g].name for g in cell.input_gates]
        self._convolved = 2 if names[:2] == ["i", "f"] else len(names)

    def forward(self, x: Tensor, state: BlockState | None = None) -> tuple[Tensor, BlockState]:
        conv, cell = state if state is not None else (None, None)
        u = self.norm(x)
        v, conv = self.conv(u, conv)
        split = self._convolved
        Wx = self.slstm.project(functional.silu(v), slice(0, split))
        if split < len(self.slstm.W):
            Wx = torch.cat([Wx, self.slstm.project(u, slice(split, None))], dim=2)  # B T Gw N D
        h, cell = self.slstm.recur(Wx, cell)
        x = x + self.dropout(self.head_norm(h).to(x.dtype))
        x = x + self.dropout(self.feedforward(self.feedforward_norm(x)))
        return x, BlockState(conv, cell)
