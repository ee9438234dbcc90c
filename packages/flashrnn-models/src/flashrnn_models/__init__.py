"""Recurrent layers, sLSTM blocks and a language model on top of `flashrnn`."""

from flashrnn_models.block import BlockState, SLSTMBlock
from flashrnn_models.language_model import LanguageModel
from flashrnn_models.rnn import RecurrentLayer
from flashrnn_models.slstm import SLSTM

__version__ = "2.0.0.dev0"
__all__ = ["SLSTM", "BlockState", "LanguageModel", "RecurrentLayer", "SLSTMBlock"]
