"""The scan in Triton: the words of the vocabulary, kernel sources generic over the cell, plans and launches.

Needs triton, which the rest of `flashrnn_core` does not; takes any framework's tensors that Triton takes.
"""
