"""LSTM: Hochreiter & Schmidhuber, Long short-term memory, 1997; with the forget gate of Gers et al., 2000."""

from flashrnn_core.cells import Gate, cell
from flashrnn_core.cells.vocabulary import sigmoid, tanh


@cell(gates=(Gate("i"), Gate("f"), Gate("z"), Gate("o")), states=("h", "c"))
def lstm(i, f, z, o, h, c):
    """c' = σ(f) c + σ(i) tanh(z); h' = σ(o) tanh(c'). Gates in torch's order i, f, g, o."""
    c_new = sigmoid(f) * c + sigmoid(i) * tanh(z)
    return sigmoid(o) * tanh(c_new), c_new
