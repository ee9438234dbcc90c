"""The words a cell may use: `exp log_sigmoid maximum relu sigmoid tanh where`, `+ - * /`, and comparisons.

A cell's function is called once, on `Value`s; what it does to them is recorded as a `Graph`, a straight line of
operations. Each word stands beside its derivative (`OPS`), so a graph's gradient is a graph of the same words
(`derive.py`) and a backend needs one line a word: NumPy in `reference.py`, PyTorch, CUDA and Triton in theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, NamedTuple

_COMPARISONS = ("equal", "less", "less_equal")


class Node(NamedTuple):
    """One operation: `op` on the nodes numbered `args`; `value` for a constant; `line` of the cell's file."""

    op: str
    args: tuple[int, ...]
    value: float | str | None
    line: int


@dataclass(frozen=True)
class Graph:
    """A traced function. `nodes` in the order of evaluation, inputs first; `outputs` are node numbers."""

    name: str
    file: str
    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]

    def evaluate(self, table: dict[str, Callable[..., Any]], inputs: Sequence[Any]) -> list[Any]:
        """Run the graph with `table[op]` for each word; constants are passed as Python floats."""
        values: list[Any] = []
        for node in self.nodes:
            if node.op == "input":
                values.append(inputs[self.inputs.index(str(node.value))])
            elif node.op == "constant":
                values.append(node.value)
            else:
                values.append(table[node.op](*[values[i] for i in node.args]))
        return [values[i] for i in self.outputs]


class Trace:
    """Records nodes; equal nodes are recorded once, so `sigmoid(z)` written twice is computed once."""

    def __init__(self, code: CodeType | None = None, line: int = 0):
        self.nodes: list[Node] = []
        self.line = line  # of the nodes to come, where no frame of `code` is on the stack
        self._code = code
        self._known: dict[tuple, int] = {}

    def add(self, op: str, *args: Value, value: float | str | None = None) -> Value:
        indices = tuple(a.index for a in args)
        key = (op, indices, repr(value))  # which tells 0.0 from -0.0
        if key not in self._known:
            self._known[key] = len(self.nodes)
            self.nodes.append(Node(op, indices, value, self._line()))
        return Value(self, self._known[key])

    def constant(self, value: float) -> Value:
        return self.add("constant", value=float(value))

    def graph(self, name: str, file: str, inputs: tuple[str, ...], outputs: Sequence[Value]) -> Graph:
        """The graph of `outputs`, without what they do not need."""
        needed = {v.index for v in outputs}
        for i in reversed(range(len(self.nodes))):
            if i in needed:
                needed.update(self.nodes[i].args)
        kept = [i for i in range(len(self.nodes)) if i in needed]
        new = {old: i for i, old in enumerate(kept)}
        nodes = tuple(self.nodes[i]._replace(args=tuple(new[a] for a in self.nodes[i].args)) for i in kept)
        return Graph(name, file, inputs, nodes, tuple(new[v.index] for v in outputs))

    def _line(self) -> int:
        frame = sys._getframe()
        while frame and self._code and frame.f_code is not self._code:
            frame = frame.f_back  # type: ignore[assignment]
        return frame.f_lineno if frame and self._code else self.line


class Value:
    """What a cell's function sees: a number to be known later."""

    __slots__ = ("index", "trace")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, trace: Trace, index: int):
        self.trace, self.index = trace, index

    @property
    def node(self) -> Node:
        return self.trace.nodes[self.index]

    def is_constant(self, value: float) -> bool:
        return self.node.op == "constant" and self.node.value == value

    def __add__(self, other):
        other = _lift(self.trace, other)
        return self if other.is_constant(0) else other if self.is_constant(0) else _word("add", self, other)

    def __sub__(self, other):
        return _word("subtract", self, other)

    def __mul__(self, other):
        other = _lift(self.trace, other)
        return self if other.is_constant(1) else other if self.is_constant(1) else _word("multiply", self, other)

    def __truediv__(self, other):
        return _word("divide", self, other)

    def __radd__(self, other):
        return _lift(self.trace, other) + self

    def __rsub__(self, other):
        return _word("subtract", other, self)

    def __rmul__(self, other):
        return _lift(self.trace, other) * self

    def __rtruediv__(self, other):
        return _word("divide", other, self)

    def __neg__(self):
        return _word("negative", self)

    def __eq__(self, other):
        return _word("equal", self, other)

    def __ne__(self, other):
        raise TypeError("a cell compares with ==, <, <=, >, >=; for != exchange the two branches of where")

    def __lt__(self, other):
        return _word("less", self, other)

    def __le__(self, other):
        return _word("less_equal", self, other)

    def __gt__(self, other):
        return _word("less", other, self)

    def __ge__(self, other):
        return _word("less_equal", other, self)

    def __bool__(self):
        raise TypeError("a cell is a straight line: instead of if, and, or, min, max use where and maximum")


def exp(x):
    return _word("exp", x)


def log_sigmoid(x):
    return _word("log_sigmoid", x)


def maximum(x, y):
    return _word("maximum", x, y)


def relu(x):
    return _word("relu", x)


def sigmoid(x):
    return _word("sigmoid", x)


def tanh(x):
    return _word("tanh", x)


def where(condition, x, y):
    """x where condition (a comparison) holds, else y; no gradient flows through the condition."""
    return _word("where", condition, x, y)


def _lift(trace: Trace, x) -> Value:
    if isinstance(x, Value):
        return x
    if isinstance(x, int | float) and not isinstance(x, bool):
        return trace.constant(x)
    raise TypeError(f"a cell computes with its gates, its states and numbers, not with {type(x).__name__}")


def _word(op: str, *args) -> Value:
    trace = next((a.trace for a in args if isinstance(a, Value)), None)
    if trace is None:
        raise TypeError(f"{op}: no argument is a gate or a state; write the number itself")
    values = [_lift(trace, a) for a in args]
    for position, value in enumerate(values):
        wants_condition = op == "where" and position == 0
        if (value.node.op in _COMPARISONS) != wants_condition:
            raise TypeError(f"{op}: argument {position} must be {'a comparison' if wants_condition else 'a number'}")
    return trace.add(op, *values)


# Each word's derivative: (dy, y, *arguments) -> cotangent of each argument, None where there is none.
# Where two arguments of maximum are equal each takes half, as in PyTorch.
OPS: dict[str, Callable[..., tuple[Value | None, ...]]] = {
    "add": lambda dy, y, a, b: (dy, dy),
    "subtract": lambda dy, y, a, b: (dy, -dy),
    "multiply": lambda dy, y, a, b: (dy * b, dy * a),
    "divide": lambda dy, y, a, b: (dy / b, -(dy / b * y)),
    "negative": lambda dy, y, a: (-dy,),
    "exp": lambda dy, y, a: (dy * y,),
    "log_sigmoid": lambda dy, y, a: (dy * sigmoid(-a),),
    "maximum": lambda dy, y, a, b: (dy * _share(a, b), dy * _share(b, a)),
    "relu": lambda dy, y, a: (where(a > 0, dy, 0),),
    "sigmoid": lambda dy, y, a: (dy * (y * (1 - y)),),
    "tanh": lambda dy, y, a: (dy * (1 - y * y),),
    "where": lambda dy, y, c, a, b: (None, where(c, dy, 0), where(c, 0, dy)),
    "equal": lambda dy, y, a, b: (None, None),
    "less": lambda dy, y, a, b: (None, None),
    "less_equal": lambda dy, y, a, b: (None, None),
}


def _share(a: Value, b: Value) -> Value:
    return where(b < a, 1.0, where(a == b, 0.5, 0.0))
