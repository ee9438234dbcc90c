"""Elman network: Elman, Finding structure in time, 1990."""

from flashrnn_core.cells import Gate, cell
from flashrnn_core.cells.vocabulary import tanh


@cell(gates=(Gate("a"),), states=("h",))
def elman(a, h):
    """h' = tanh(a)."""
    return tanh(a)
