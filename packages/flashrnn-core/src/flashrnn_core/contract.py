"""The contract: dims, tensors, dtypes and options, stated once. Validation, allocation, fakes and tests read them here.

Shapes are tuples and dtypes are names, so that any framework can ask.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import NamedTuple

from flashrnn_core.cells import Cell

DIMS = {
    "B": "batch",
    "T": "time",
    "N": "heads",
    "D": "head dim (output unit)",
    "P": "head dim of the previous hidden state (P == D)",
    "G": "gates",
    "Gw": "gates with an input part",
    "Gr": "gates with a recurrent part",
    "S": "states",
    "1": "one step",
}

# name: dims, what it is. The last dim is contiguous, every other stride is free.
TENSORS = {
    "Wx": ("B T Gw N D", "input pre-activations, the linear layer already applied"),
    "R": ("Gr N D P", "recurrent matrix; pre[g,n,d] = sum_p R[g,n,d,p] h[n,p]"),
    "b": ("G N D", "bias of every gate"),
    "states": ("S B 1 N D", "initial states; None: the cell's initial values, zeros"),
    "resets": ("B T", "bool: before step t the state goes back to zeros; no gradient crosses"),
    "lengths": ("B", "integers in [0, T]: from step lengths[b] on the state is frozen and outputs are zero"),
}
OUTPUTS = {
    "states": ("S B T N D", "all states; state 0 is the hidden state h; h alone with hidden_only"),
    "last_states": ("S B 1 N D", "the state at the end; feeds the next call's states"),
}
OPTIONAL = ("states", "resets", "lengths")
DTYPES = ("bfloat16", "float16", "float32", "float64")
INDEX_DTYPES = ("int32", "int64")


class Info(NamedTuple):
    """What validation looks at in a tensor. `dtype` is a name as in `DTYPES`; `device` compares as text."""

    shape: Sequence[int]
    dtype: str
    device: str


@dataclass(frozen=True)
class Problem:
    """One call: sizes, dtypes and options. What a backend is asked whether it supports, and a plan is made for.

    `dtype`: compute dtype, of Wx, R and of h where it meets R. `state_dtype`: of all states in and out. `cut`: no
    gradient through R; `clip`: bound of what flows back to the previous h; `hidden_only`: only h is returned.
    """

    cell: Cell
    B: int
    T: int
    N: int
    D: int
    dtype: str
    state_dtype: str
    resets: bool = False
    lengths: bool = False
    reverse: bool = False
    cut: bool = False
    clip: float | None = None
    hidden_only: bool = False

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:  # once: every call looks for what was made for its problem
        return hash(tuple([getattr(self, field.name) for field in fields(self)]))

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of an input tensor of `TENSORS`."""
        return tuple(self.size(dim) for dim in TENSORS[tensor][0].split())

    def output_shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of an output tensor of `OUTPUTS`."""
        return self._output_shapes[tensor]

    @functools.cached_property
    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {name: tuple(self.size(dim) for dim in dims.split()) for name, (dims, _) in OUTPUTS.items()}
        if self.hidden_only:
            shapes["states"] = (1, *shapes["states"][1:])
        return shapes

    def size(self, dim: str) -> int:
        """Length of a dim of `DIMS`."""
        if dim in ("B", "T", "N", "D"):
            return getattr(self, dim)
        cell = self.cell
        return {
            "P": self.D,
            "G": len(cell.gates),
            "Gw": len(cell.input_gates),
            "Gr": len(cell.recurrent_gates),
            "S": len(cell.states),
            "1": 1,
        }[dim]


def check(cell: Cell, tensors: Mapping[str, Info | None]) -> None:
    """Raise ValueError or TypeError, naming the tensor, what was expected and what came, unless all fit together."""
    sizes: dict[str, tuple[int, str]] = {"1": (1, "the contract")}
    for dim, count, part in (
        ("Gw", len(cell.input_gates), "gates with an input part"),
        ("Gr", len(cell.recurrent_gates), "gates with a recurrent part"),
        ("G", len(cell.gates), "gates"),
        ("S", len(cell.states), "states"),
    ):
        sizes[dim] = (count, f"the {part} of cell {cell.name}")

    device = None
    for name, info in tensors.items():
        if info is None:
            if name not in OPTIONAL:
                raise TypeError(f"{name}: expected a tensor [{TENSORS[name][0]}], got None")
            continue
        dims = TENSORS[name][0].split()
        if len(info.shape) != len(dims):
            raise ValueError(
                f"{name}: expected {len(dims)} dims [{' '.join(dims)}], got {len(info.shape)}: {list(info.shape)}"
            )
        for dim, size in zip(dims, info.shape, strict=True):
            expected, source = sizes.setdefault("D" if dim == "P" else dim, (size, f"{dim} of {name}"))
            if size != expected:
                wanted = f"{dim} = {expected}, as {source}" if dim != "1" else f"1 in dim {dims.index('1')} (one step)"
                raise ValueError(f"{name} [{' '.join(dims)}]: expected {wanted}, got {list(info.shape)}")
        allowed = {"resets": ("bool",), "lengths": INDEX_DTYPES}.get(name, DTYPES)
        if info.dtype not in allowed:
            raise TypeError(f"{name}: expected dtype {' or '.join(allowed)}, got {info.dtype}")
        device = device or (name, info.device)
        if info.device != device[1]:
            raise ValueError(f"{name}: expected device {device[1]}, as {device[0]}, got {info.device}")
    for dim in ("N", "D"):
        if sizes[dim][0] < 1:
            raise ValueError(f"{sizes[dim][1]}: expected {dim} ({DIMS[dim]}) of at least 1, got 0")


def check_options(clip: float | None) -> None:
    """Raise TypeError or ValueError unless `clip` (`gradient_recurrent_clipval`) is None or a bound above zero."""
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, Real)):
        raise TypeError(f"gradient_recurrent_clipval: expected None or a number above 0, got {clip!r}")
    try:
        above = clip is None or float(clip) > 0
    except OverflowError as error:
        raise ValueError("gradient_recurrent_clipval: too large for a float; None bounds nothing") from error
    if not above:
        raise ValueError(f"gradient_recurrent_clipval: expected None or a number above 0, got {clip!r}")
