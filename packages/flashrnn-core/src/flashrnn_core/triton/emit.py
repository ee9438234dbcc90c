"""A cell becomes Triton source: its forward and its derived backward as functions, the scan's templates unrolled.

In a template (`scan.py`, `streamed.py`) a statement marked `# each S` is written once for each state, S and the suffix
_S becoming its number. Likewise `each G`: the gates; `each W`: the input parts of Wx, G being the gate of each;
`each K`: the recurrent parts of R, G being the gate; `each F`: the saved states, S being the state. `all_pre` and
`all_dpre` list a name for each gate, any other `all_…` for each state. `*scan` among the parameters of a template are
all those of its namesake in `scan.py`.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import linecache
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashrnn_core.cells import Cell
from flashrnn_core.cells.vocabulary import Graph
from flashrnn_core.triton import scan, streamed, vocabulary


class Kernels(NamedTuple):
    """A pair of kernels of a cell, `triton.jit`-decorated."""

    forward: Any
    backward: Any


@functools.cache
def kernels(cell: Cell, exact: bool, saved: tuple[int, ...] = (), stream: bool = False) -> Kernels:
    """The kernels of `cell`. `exact`: float32 compute; `saved`: numbers of the states kept in float32; `stream`: those
    of `streamed.py`, not of `scan.py`.
    """
    templates = streamed if stream else scan
    namespace = {**vars(templates), **(vocabulary.EXACT if exact else vocabulary.FAST)}
    for name, graph in (("cell_forward", cell.forward), ("cell_backward", cell.backward)):
        namespace[name] = _jit(name, function(name, graph), namespace)
    made = [_jit(f.__name__, unroll(f, cell, saved), namespace) for f in (templates.forward, templates.backward)]
    return Kernels(*made)


def function(name: str, graph: Graph) -> str:
    """Source of a Triton function that computes `graph`, one line a node."""
    lines = [f"def {name}({', '.join(f'{x}_' for x in graph.inputs)}):"]  # x_, since a gate may be named like a word
    names: list[str] = []
    like = f"{graph.inputs[0]}_"  # has the shape of all

    def full(value) -> str:
        return f"tl.full({like}.shape, {_literal(value)}, tl.float32)"

    for index, node in enumerate(graph.nodes):
        if node.op == "input":
            names.append(f"{node.value}_")
            continue
        if node.op == "constant":
            names.append(_literal(node.value))
            continue
        args = [names[a] for a in node.args]
        if all(graph.nodes[a].op == "constant" for a in node.args):
            args[0] = full(graph.nodes[node.args[0]].value)
        form = vocabulary.OPERATORS.get(node.op)
        text = form.format(*args) if form else f"{node.op}({', '.join(args)})"
        names.append(f"_{index}")
        lines.append(f"    _{index} = {text}")
    outputs = [full(graph.nodes[o].value) if graph.nodes[o].op == "constant" else names[o] for o in graph.outputs]
    lines.append(f"    return {', '.join(outputs)}")
    return "\n".join(lines) + "\n"


def unroll(template: Callable, cell: Cell, saved: tuple[int, ...] = ()) -> str:
    """Source of `template` for `cell`."""
    gates, states = range(len(cell.gates)), range(len(cell.states))
    each = {
        "G": [{"G": g} for g in gates],
        "S": [{"S": s} for s in states],
        "W": [{"W": i, "G": g} for i, g in enumerate(cell.input_gates)],
        "K": [{"K": i, "G": g} for i, g in enumerate(cell.recurrent_gates)],
        "F": [{"F": i, "S": s} for i, s in enumerate(saved)],
    }
    text = inspect.getsource(template)
    if "    *scan,\n" in text:
        namesake = inspect.getsource(getattr(scan, template.__name__))
        text = text.replace("    *scan,\n", namesake[namesake.index("(\n") + 2 : namesake.index("):\n")])
    lines = text.splitlines()
    marked = {i: m[1] for i, line in enumerate(lines, 1) if (m := re.search(r"# each (\w)$", line))}
    statements = {n.lineno: n.end_lineno for n in ast.walk(ast.parse(text)) if isinstance(n, ast.stmt)}

    def write(start: int, end: int, numbers: dict[str, int]) -> list[str]:
        written, i = [], start
        while i <= end:
            if i in marked and i in statements and not (i == start and numbers):
                last = statements[i] or i
                copies = [line for some in each[marked[i]] for line in write(i, last, some)]
                written += copies or [re.sub(r"\S.*", "pass", lines[i - 1])]  # an empty block is none
                i = last + 1
                continue
            line = re.sub(r"\b(\w+_)?([GSWKF])\b", lambda m: _number(m, numbers), lines[i - 1])
            written.append(re.sub(r"\ball_(\w+)", lambda m: _all(m[1], gates, states), line))
            i += 1
        return written

    return "\n".join(write(1, len(lines), {})) + "\n"


def _literal(value: Any) -> str:
    return repr(value) if math.isfinite(value) else f"float('{value}')"


def _number(match: re.Match, numbers: dict[str, int]) -> str:
    return f"{match[1] or ''}{numbers[match[2]]}" if match[2] in numbers else match[0]


def _all(name: str, gates: range, states: range) -> str:
    return ", ".join(f"{name}_{i}" for i in (gates if name in ("pre", "dpre") else states))


def _jit(name: str, source: str, namespace: dict[str, Any]) -> Any:
    """The function of `source`, compiled by Triton at its first call; `linecache` shows Triton the source."""
    file = f"<flashrnn {name} {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec", dont_inherit=True), namespace)
    made = namespace[name]
    numbers = [key for key, kind in made.__annotations__.items() if kind is not tl.constexpr]
    return triton.jit(made, do_not_specialize=numbers)  # a stride of 1, say, is no reason to compile anew
