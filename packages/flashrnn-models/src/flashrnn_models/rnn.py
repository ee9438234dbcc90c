"""A recurrent layer of any cell: a linear projection of the input, then `flashrnn`."""

import math

import torch
from torch import Tensor, nn

from flashrnn import Cell, flashrnn
from flashrnn_core.cells import get_cell


class RecurrentLayer(nn.Module):
    """h[t], s[t] = cell(W x[t], R h[t-1], b, s[t-1]), with N heads that do not see each other's h.

    Args:
        input_size: F, features of the input.
        hidden_size: H = N * D, features of the output.
        num_heads: N, the blocks of the recurrent matrix.
        function: the name of a cell ("slstm", "lstm", "gru", "elman") or a `flashrnn.Cell`.
        block_diagonal: each head sees only its own F / N input features.
        backend: the backend of `flashrnn`.

    Parameters (Gw, Gr, G: gates with an input part, with a recurrent part, all):
        W: [Gw, N, D, F], or [Gw, N, D, F / N] if `block_diagonal`.
        R: [Gr, N, D, P], P = D.
        b: [G, N, D].

    Shapes:
        x: [B, T, F].
        states: [S, B, 1, N, D], what an earlier call returned, or None for the cell's initial values.
        returns: h [B, T, H] and the states after the last step [S, B, 1, N, D].

    States made here are at least float32 whatever the dtype of `x`, so a sequence fed in chunks
    gives what the whole sequence gives.

    Raises ValueError if the heads do not divide `hidden_size` (or, block-diagonal, `input_size`),
    or if the last dim of `x` is not `input_size`.

    >>> import torch
    >>> from flashrnn_models import RecurrentLayer
    >>> layer = RecurrentLayer(input_size=6, hidden_size=8, num_heads=2, function="gru")
    >>> x = torch.randn(3, 5, 6)  # B T F
    >>> h, states = layer(x)
    >>> h.shape, states.shape
    (torch.Size([3, 5, 8]), torch.Size([1, 3, 1, 2, 4]))
    >>> h_next, states = layer(x, states)  # goes on where the first call ended
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_heads: int = 1,
        function: str | Cell = "slstm",
        block_diagonal: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} does not split into {num_heads} heads")
        if block_diagonal and input_size % num_heads:
            raise ValueError(f"block_diagonal: input_size {input_size} does not split into {num_heads} heads")
        self.cell = get_cell(function)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_heads = N = num_heads
        self.block_diagonal = block_diagonal
        self.backend = backend
        D = hidden_size // N
        F = input_size // N if block_diagonal else input_size
        self.W = nn.Parameter(torch.empty(len(self.cell.input_gates), N, D, F))
        self.R = nn.Parameter(torch.empty(len(self.cell.recurrent_gates), N, D, D))
        self.b = nn.Parameter(torch.empty(len(self.cell.gates), N, D))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W, R, b ~ Uniform(-1/√D, 1/√D), as torch.nn.LSTM does for one head."""
        bound = 1 / math.sqrt(self.R.shape[-1])
        for parameter in (self.W, self.R, self.b):
            nn.init.uniform_(parameter, -bound, bound)

    def project(self, x: Tensor, gates: slice = slice(None)) -> Tensor:
        """Wx = W x for a range of the gates that have an input part: [B, T, F] -> [B, T, Gw, N, D]."""
        if x.dim() != 3 or x.shape[-1] != self.input_size:
            raise ValueError(f"x: expected [B, T, {self.input_size}], got {list(x.shape)}")
        W = self.W[gates]
        if not self.block_diagonal:
            return nn.functional.linear(x, W.flatten(0, 2)).unflatten(-1, W.shape[:3])
        x = x.unflatten(-1, (self.num_heads, -1))  # B T N F
        return torch.einsum("btnf,gndf->btgnd", x, W)

    def recur(self, Wx: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The recurrence on projected input: Wx [B, T, Gw, N, D] -> h [B, T, H], states [S, B, 1, N, D]."""
        if states is None:
            B, _, _, N, D = Wx.shape
            dtype = torch.promote_types(Wx.dtype, torch.float32)
            states = Wx.new_zeros(len(self.cell.states), B, 1, N, D, dtype=dtype)
        # Only h is used here; the other states leave as last_states.
        h, last_states = flashrnn(Wx, self.R, self.b, states, self.cell, backend=self.backend, hidden_only=True)
        return h[0].flatten(2), last_states

    def forward(self, x: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h, last_states = self.recur(self.project(x), states)
        return h if torch.is_autocast_enabled(x.device.type) else h.to(x.dtype), last_states

    def extra_repr(self) -> str:
        kind = ", block_diagonal" if self.block_diagonal else ""
        return f"{self.input_size}, {self.hidden_size}, num_heads={self.num_heads}, {self.cell.name}{kind}"
