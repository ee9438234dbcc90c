"""Cells: a cell is one short function in one file of this folder; everything else is made from it.

    @cell(gates=(Gate("i"), Gate("f"), Gate("z"), Gate("o")), states=("h", "c"))
    def lstm(i, f, z, o, h, c): ...

The function takes the aggregated pre-activations of the gates and the old states, in the order declared, and returns
the new states; state 0 is the hidden state h, which meets R. It may use the words of `vocabulary.py`. A file that is
put here is found by itself; a user's own cell, decorated anywhere, is passed to `flashrnn(..., function=my_cell)`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashrnn_core.cells.derive import cotangent_name, derive
from flashrnn_core.cells.vocabulary import Graph, Trace, Value


@dataclass(frozen=True)
class Gate:
    """A gate. `input`: it has a part in Wx; `recurrent`: it has a part in R. Every gate has a bias."""

    name: str
    input: bool = True
    recurrent: bool = True


@dataclass(frozen=True)
class Cell:
    """A cell, traced. Make one with `@cell(...)`.

    `function`: (gates…, states…) -> new states. `float32_states`: states that a backward must find more
    exactly than in 16 bits, whatever the dtype of the returned states (they stand in an exponent).
    """

    name: str
    gates: tuple[Gate, ...]
    states: tuple[str, ...]
    function: Callable[..., Any]
    float32_states: tuple[str, ...] = ()

    @functools.cached_property
    def input_gates(self) -> tuple[int, ...]:
        """Numbers of the gates that have a part in Wx, in the order they take there."""
        return tuple(i for i, gate in enumerate(self.gates) if gate.input)

    @functools.cached_property
    def recurrent_gates(self) -> tuple[int, ...]:
        """Numbers of the gates that have a part in R, in the order they take there."""
        return tuple(i for i, gate in enumerate(self.gates) if gate.recurrent)

    @functools.cached_property
    def forward(self) -> Graph:
        names = tuple(g.name for g in self.gates) + self.states
        code = self.function.__code__
        trace = Trace(code)
        result = self.function(*[trace.add("input", value=name) for name in names])
        outputs = result if isinstance(result, tuple) else (result,)
        if len(outputs) != len(self.states) or not all(isinstance(o, Value) for o in outputs):
            raise TypeError(f"cell {self.name}: must return its {len(self.states)} new states {self.states}")
        return trace.graph(self.name, code.co_filename, names, outputs)

    @functools.cached_property
    def backward(self) -> Graph:
        return derive(self.forward, self.states)

    @functools.cached_property
    def key(self) -> str:
        """Name and digest of what is computed: two cells with one key are the same cell."""
        nodes = [(n.op, n.args, n.value) for n in self.forward.nodes]
        text = repr((self.gates, self.states, self.float32_states, nodes, self.forward.outputs))
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def __reduce__(self) -> str:
        """Pickled by reference, as a function is: a cell must stand in its module under the name of its function."""
        return self.function.__qualname__

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and self.key == other.key


CELLS: dict[str, Cell] = {}  # the cells of this folder by name
_KNOWN: dict[str, Cell] = {}  # every cell of the process by key


def cell(gates: tuple[Gate, ...], states: tuple[str, ...], float32_states: tuple[str, ...] = ()):
    """Decorator: a function (gates…, states…) -> new states becomes a `Cell` of the function's name.

    Raises TypeError where the parameters are not the gates and states in order, one is named as the cotangent of a
    state is (`dh_new`), or the function is not a straight line over the vocabulary; ValueError for a cell without a
    state, an input or a recurrent gate, and for float32_states that are none.
    """

    def decorate(function: Callable[..., Any]) -> Cell:
        name = function.__name__
        names = tuple(g.name for g in gates) + tuple(states)
        parameters = tuple(inspect.signature(function).parameters)
        if parameters != names or len(set(names)) != len(names):
            raise TypeError(f"cell {name}: parameters must be {names} (gates, then states), not {parameters}")
        if not states or not any(g.input for g in gates) or not any(g.recurrent for g in gates):
            raise ValueError(f"cell {name}: needs a state, a gate with an input part and one with a recurrent part")
        taken = {cotangent_name(state) for state in states} & set(names)
        if taken:
            raise TypeError(
                f"cell {name}: {sorted(taken)} are the names of cotangents; give the gates and states others"
            )
        if not set(float32_states) <= set(states):
            raise ValueError(
                f"cell {name}: float32_states {tuple(float32_states)} are not all among its states {states}"
            )
        made = Cell(name, tuple(gates), tuple(states), function, tuple(float32_states))
        made.__dict__.update(__doc__=function.__doc__, __module__=function.__module__, __name__=name)
        _KNOWN[made.key] = made  # traced here, so that a cell that is none is an error where it stands
        _ = made.input_gates, made.recurrent_gates  # cached, as torch.compile cannot do the first look
        return made

    return decorate


def get_cell(function: str | Cell) -> Cell:
    """The cell of a name, of a `Cell.key`, or the cell itself. Raises ValueError (unknown) or TypeError."""
    if isinstance(function, Cell):
        return function
    if not isinstance(function, str):
        raise TypeError(f"function: expected a cell's name or a Cell, got {type(function).__name__}")
    found = CELLS.get(function) or _KNOWN.get(function)
    if found is None:
        raise ValueError(f"function: unknown cell {function!r}; known are {', '.join(CELLS)}, or pass a Cell")
    return found


for _file in sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in ("derive", "vocabulary")):
    CELLS[_file] = getattr(importlib.import_module(f"{__name__}.{_file}"), _file)
