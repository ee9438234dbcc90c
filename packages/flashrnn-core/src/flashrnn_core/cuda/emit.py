"""A cell as CUDA C++: its traced graphs, node by node, with #line back to the cell's file."""

from __future__ import annotations

import functools
import json

import numpy as np

from flashrnn_core.cells import Cell
from flashrnn_core.cells.derive import cotangent_name
from flashrnn_core.cells.vocabulary import Graph

# Words in float32. {0}, {1}, {2}: the arguments.
WORDS = {
    "add": "{0} + {1}",
    "subtract": "{0} - {1}",
    "multiply": "{0} * {1}",
    "divide": "__fdividef({0}, {1})",
    "negative": "-{0}",
    "exp": "exp2_fast(1.442695040888963f * {0})",
    "log_sigmoid": "fminf({0}, 0.f)"
    " - 0.693147180559945f * log2_fast(1.f + exp2_fast(-1.442695040888963f * fabsf({0})))",
    "maximum": "max_nan({0}, {1})",
    "relu": "max_nan({0}, 0.f)",
    "sigmoid": "reciprocal(1.f + exp2_fast(-1.442695040888963f * {0}))",
    "tanh": "1.f - 2.f * reciprocal(1.f + exp2_fast(2.885390081777927f * {0}))",
    "where": "{0} ? {1} : {2}",
    "equal": "{0} == {1}",
    "less": "{0} < {1}",
    "less_equal": "{0} <= {1}",
}
# To the last bit or two, for float32 as exact as PyTorch's.
EXACT_WORDS = WORDS | {
    "divide": "{0} / {1}",
    "exp": "expf({0})",
    "log_sigmoid": "fminf({0}, 0.f) - log1pf(expf(-fabsf({0})))",
    "sigmoid": "1.f / (1.f + expf(-{0}))",
    "tanh": "tanhf({0})",
}
CHEAP = ("add", "subtract", "multiply", "negative")
CONDITIONS = ("equal", "less", "less_equal")


def forward(cell: Cell, words: dict[str, str]) -> str:
    """`cell_forward(pre, old, result)`: new states of one unit."""
    graph = cell.forward
    names = _input_names(cell)
    lines = [_statement(graph, i, names, words) for i in range(len(graph.nodes))]
    outputs = [f"    result[{k}] = {_value(graph, o, names)};" for k, o in enumerate(graph.outputs)]
    head = "DEVICE void cell_forward(const float (&pre)[G], const float (&old)[S], float (&result)[S]) {"
    return "\n".join([head, *filter(None, lines), *outputs, "}"])


def backward(cell: Cell, words: dict[str, str], few: bool = False) -> str:
    """`cell_prepare(pre, old, prepared)`, all that needs no cotangent, and `cell_finish(prepared, dnew, ...)`. `few`:
    cheap nodes stand in the second, as long as fewer values are prepared.
    """
    graph = cell.backward
    names = _input_names(cell)
    early, kept, late = _split(cell, few)

    def type_of(i: int) -> str:
        return "bool" if graph.nodes[i].op in CONDITIONS else "float"

    fields = " ".join(f"{type_of(i)} v{i};" for i in kept) or "char nothing;"
    text = [f"struct Prepared {{ {fields} }};"]
    text += ["DEVICE void cell_prepare(const float (&pre)[G], const float (&old)[S], Prepared& prepared) {"]
    text += filter(None, [_statement(graph, i, names, words) for i in early])
    text += [f"    prepared.v{i} = {_value(graph, i, names)};" for i in kept]
    text += [f"    pin(prepared.v{i});" for i in kept if type_of(i) == "float"]
    text += ["}", "DEVICE void cell_finish(const Prepared& prepared, const float (&dnew)[S],"]
    text += ["                        float (&dgate)[G], float (&dold)[S]) {"]
    prepared = names | {i: f"prepared.v{i}" for i in kept}
    text += filter(None, [_statement(graph, i, prepared, words) for i in late])
    targets = [f"dgate[{g}]" for g in range(len(cell.gates))] + [f"dold[{s}]" for s in range(len(cell.states))]
    text += [f"    {t} = {_value(graph, o, prepared)};" for t, o in zip(targets, graph.outputs, strict=True)]
    return "\n".join([*text, "}"])


def prepared_transfer(cell: Cell, few: bool = False) -> str:
    """`put_prepared`, `get_prepared`: of two units, to and from shared memory, values 32 float2 apart."""
    kept = list(enumerate(_split(cell, few)[1]))
    text = [f"constexpr int PREPARED = {len(kept)};", "DEVICE void put_prepared(float2* to, const Prepared (&x)[2]) {"]
    text += [f"    to[{32 * n}] = make_float2(x[0].v{i}, x[1].v{i});" for n, i in kept]
    text += ["}", "DEVICE void get_prepared(const float2* from, Prepared (&x)[2]) {"]
    text += [f"    x[0].v{i} = from[{32 * n}].x, x[1].v{i} = from[{32 * n}].y;" for n, i in kept]
    return "\n".join([*text, "}"])


@functools.cache
def old_states_used(cell: Cell) -> tuple[int, ...]:
    """The old states whose values the backward of the cell reads."""
    inputs = {node.value for node in cell.backward.nodes if node.op == "input"}
    return tuple(k for k, name in enumerate(cell.states) if name in inputs)


@functools.cache
def prepared_values(cell: Cell, few: bool = False) -> int:
    """How many values a unit keeps from `cell_prepare` to `cell_finish`."""
    return len(_split(cell, few)[1])


def _input_names(cell: Cell) -> dict[int | str, str]:
    names: dict[int | str, str] = {gate.name: f"pre[{g}]" for g, gate in enumerate(cell.gates)}
    names |= {state: f"old[{k}]" for k, state in enumerate(cell.states)}
    return names | {cotangent_name(state): f"dnew[{k}]" for k, state in enumerate(cell.states)}


def _split(cell: Cell, few: bool = False) -> tuple[list[int], list[int], list[int]]:
    """Nodes of the backward that need no cotangent, those of them that the others need, and the others."""
    graph = cell.backward
    late: set[int] = set()
    for i, node in enumerate(graph.nodes):
        is_cotangent = node.op == "input" and graph.inputs.index(str(node.value)) >= len(cell.forward.inputs)
        if is_cotangent or late.intersection(node.args):
            late.add(i)
    early = [i for i in range(len(graph.nodes)) if i not in late and graph.nodes[i].op != "constant"]

    def kept() -> list[int]:
        used = {a for i in late for a in graph.nodes[i].args} | set(graph.outputs)
        return [i for i in early if i in used]

    for i in reversed(early) if few else ():
        if graph.nodes[i].op in CHEAP and not any(i in graph.nodes[j].args for j in early):
            before = len(kept())
            late.add(i)
            early.remove(i)
            if len(kept()) > before:
                late.remove(i)
                early = sorted([*early, i])
    return early, kept(), sorted(late)


def _value(graph: Graph, i: int, names: dict[int | str, str]) -> str:
    node = graph.nodes[i]
    if node.op == "constant":
        with np.errstate(over="ignore"):
            value = float(np.float32(node.value or 0))
        return (
            f"({value!r}f)" if np.isfinite(value) else f"__int_as_float({0xFF800000 if value < 0 else 0x7F800000:#x})"
        )
    return names.get(i) or (names[str(node.value)] if node.op == "input" else f"v{i}")


def _statement(graph: Graph, i: int, names: dict[int | str, str], words: dict[str, str]) -> str:
    node = graph.nodes[i]
    if node.op in ("input", "constant"):
        return ""
    expression = words[node.op].format(*(_value(graph, a, names) for a in node.args))
    type_name = "bool" if node.op in CONDITIONS else "float"
    return f"#line {max(node.line, 1)} {json.dumps(graph.file)}\n    const {type_name} v{i} = {expression};"
