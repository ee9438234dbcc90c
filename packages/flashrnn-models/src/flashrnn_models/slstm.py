"""The sLSTM layer: a `RecurrentLayer` with the projections and initial values of the xLSTM paper."""

from torch import nn

from flashrnn import Cell
from flashrnn_models.initialization import powerlaw_forget_bias_, small_init_
from flashrnn_models.rnn import RecurrentLayer


class SLSTM(RecurrentLayer):
    """h[t], c[t], n[t], m[t] = slstm(W x[t], R h[t-1], b, s[t-1]), W and R block-diagonal over heads.

    Arguments, shapes and parameters are those of `RecurrentLayer` with `block_diagonal=True` and
    `input_size == hidden_size`. `function` may name another cell: the initial values below then
    apply to the gates it has.

    Initial values: W ~ Normal(0, 2 / (5 H)), R = 0, b = 0, except for the bias of a gate named "f",
    `powerlaw_forget_bias_(b_f, block, num_blocks)`.

    Source: Beck, Pöppel et al., "xLSTM: Extended Long Short-Term Memory" (arXiv:2405.04517),
    section 2.2 and appendix A.

    >>> import torch
    >>> from flashrnn_models import SLSTM
    >>> layer = SLSTM(hidden_size=8, num_heads=2)
    >>> h, states = layer(torch.randn(3, 5, 8))
    >>> h.shape, states.shape
    (torch.Size([3, 5, 8]), torch.Size([4, 3, 1, 2, 4]))
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        block: int = 0,
        num_blocks: int = 1,
        function: str | Cell = "slstm",
        backend: str = "auto",
    ) -> None:
        self.block, self.num_blocks = block, num_blocks  # before reset_parameters, which super calls
        super().__init__(hidden_size, hidden_size, num_heads, function, block_diagonal=True, backend=backend)

    def reset_parameters(self) -> None:
        """Set the initial values named in the docstring of the class."""
        small_init_(self.W, self.input_size)
        nn.init.zeros_(self.R)
        nn.init.zeros_(self.b)
        for gate, bias in zip(self.cell.gates, self.b, strict=True):
            if gate.name == "f":
                powerlaw_forget_bias_(bias, self.block, self.num_blocks)
