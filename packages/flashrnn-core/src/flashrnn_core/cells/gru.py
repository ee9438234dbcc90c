"""GRU: Cho et al., Learning phrase representations using RNN encoder-decoder, 2014; reset after the matmul (cuDNN)."""

from flashrnn_core.cells import Gate, cell
from flashrnn_core.cells.vocabulary import sigmoid, tanh


@cell(gates=(Gate("n_r", input=False), Gate("r"), Gate("z"), Gate("n_w", recurrent=False)), states=("h",))
def gru(n_r, r, z, n_w, h):
    """n = tanh(n_w + σ(r) n_r); h' = σ(z) h + (1 − σ(z)) n. n_r is the recurrent part of n, n_w its input part."""
    n = tanh(n_w + sigmoid(r) * n_r)
    return sigmoid(z) * h + (1 - sigmoid(z)) * n
