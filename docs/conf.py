"""Sphinx configuration. What the code states once (dims, tensors, cells, docstrings) is read from it at build time."""

import ast
import importlib
import inspect

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from flashrnn_core import __version__, contract
from flashrnn_core.archs import ARCHS
from flashrnn_core.cells import CELLS
from flashrnn_core.cuda.streamed import resident_plan

project = "FlashRNN"
author = "the FlashRNN authors"
copyright = "the FlashRNN authors"  # noqa: A001 (Sphinx names it so)
version = release = __version__

extensions = ["myst_parser"]
myst_heading_anchors = 3
smartquotes = False  # a prime is no quotation mark
html_theme = "furo"
html_title = f"FlashRNN {release}"
exclude_patterns = ["_build"]


def dims():
    return _table(("dim", "meaning"), [(f"`{name}`", what) for name, what in contract.DIMS.items()])


def tensors():
    return _table(("tensor", "dims", "notes"), _described(contract.TENSORS))


def outputs():
    return _table(("tensor", "dims", "notes"), _described(contract.OUTPUTS))


def cell_sections():
    """One section a cell: citation, equations, gates in order, and the order inside each tensor."""
    text = []
    for name, cell in CELLS.items():
        rows = [(f"`{gate.name}`", "yes" * gate.input, "yes" * gate.recurrent) for gate in cell.gates]
        orders = {
            "Wx": [cell.gates[i].name for i in cell.input_gates],
            "R": [cell.gates[i].name for i in cell.recurrent_gates],
            "b": [gate.name for gate in cell.gates],
            "states": list(cell.states),
        }
        text += [f"## `{name}`", "", inspect.getdoc(inspect.getmodule(cell.function)), ""]
        text += [inspect.getdoc(cell.function), ""]
        text += [_table(("gate", "input part", "recurrent part"), rows), ""]
        text += [f"- order in `{tensor}`: {', '.join(f'`{n}`' for n in names)}" for tensor, names in orders.items()]
        text += ["", "```python", inspect.getsource(cell.function).rstrip(), "```", ""]
    return "\n".join(text)


def limits():
    """For each GPU and dtype the largest D of each cell for which `cuda_fused` has a plan."""
    rows = []
    for name, gpu, multiprocessors in (("sm90", "H100", 132), ("sm80", "A100", 108), ("sm89", "RTX 4090", 128)):
        arch = next(a for a in ARCHS if a.name == name)
        for dtype in ("bfloat16", "float32"):
            found = [str(_largest(cell, dtype, arch, multiprocessors)) for cell in CELLS.values()]
            rows.append((f"{name}, {multiprocessors} multiprocessors ({gpu})", dtype, *found))
    return _table(("GPU", "dtype", *(f"`{name}`" for name in CELLS)), rows)


def _largest(cell, dtype, arch, multiprocessors):
    saved = tuple(cell.states.index(name) for name in cell.float32_states) if dtype != "float32" else ()
    D = 0
    while True:
        problem = contract.Problem(cell, B=16, T=1, N=1, D=D + 128, dtype=dtype, state_dtype=dtype)
        plans = (resident_plan(problem, backward, arch, multiprocessors, dtype, saved) for backward in (False, True))
        if any(isinstance(plan, str) for plan in plans):
            return D
        D += 128


def _described(table):
    return [(f"`{name}`", f"`{dims}`", what) for name, (dims, what) in table.items()]


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


GENERATORS = {"dims": dims, "tensors": tensors, "outputs": outputs, "cells": cell_sections, "limits": limits}


class Generated(SphinxDirective):
    """`{generated} NAME`: Markdown that a function of this file makes from the code."""

    required_arguments = 1

    def run(self):
        return self.parse_text_to_nodes(GENERATORS[self.arguments[0]](), allow_section_headings=True)


class Docstring(SphinxDirective):
    """`{docstring} MODULE.NAME`: a function's head and docstring as they stand in the code."""

    required_arguments = 1

    def run(self):
        module, name = self.arguments[0].rsplit(".", 1)
        source = inspect.getsource(getattr(importlib.import_module(module), name))
        end = ast.parse(source).body[0].body[0].end_lineno  # of the docstring, the first statement
        text = "\n".join(source.splitlines()[:end])
        block = nodes.literal_block(text, text)
        block["language"] = "python"
        return [block]


def setup(app):
    app.add_directive("generated", Generated)
    app.add_directive("docstring", Docstring)
    return {"parallel_read_safe": True}
