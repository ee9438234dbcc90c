"""FlashRNN for PyTorch: `from flashrnn import flashrnn`."""

from flashrnn.api import flashrnn
from flashrnn.config import FlashRNNConfig
from flashrnn_core.cells import Cell, Gate, cell

__all__ = ["Cell", "FlashRNNConfig", "Gate", "cell", "flashrnn"]
__version__ = "2.0.0.dev0"
