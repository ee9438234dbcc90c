"""FlashRNN without a framework: the cells, the contract of shapes and options, the oracle, and the kernels' sources."""

from flashrnn_core.cells import Cell, Gate, cell, get_cell
from flashrnn_core.contract import Problem

__all__ = ["Cell", "Gate", "Problem", "cell", "get_cell"]
__version__ = "2.0.0.dev0"
