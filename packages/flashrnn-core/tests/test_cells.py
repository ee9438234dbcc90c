"""Cells: their files, what tracing refuses, and the derived gradient against finite differences."""

import copy
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

import flashrnn_core
from flashrnn_core import Gate, cell, get_cell
from flashrnn_core.cells import CELLS, vocabulary
from flashrnn_core.cells.vocabulary import OPS, exp, log_sigmoid, maximum, relu, sigmoid, tanh, where
from flashrnn_core.reference import NUMPY


def test_the_cells_of_the_contract_are_there():
    """Gates in order (w: input part, r: recurrent part) and states, as the contract's table has them."""
    table = {
        name: (
            " ".join(g.name + ":" + "w" * g.input + "r" * g.recurrent for g in c.gates),
            " ".join(c.states),
        )
        for name, c in CELLS.items()
    }
    assert table == {
        "elman": ("a:wr", "h"),
        "gru": ("n_r:r r:wr z:wr n_w:w", "h"),
        "lstm": ("i:wr f:wr z:wr o:wr", "h c"),
        "slstm": ("i:wr f:wr z:wr o:wr", "h c n m"),
    }
    assert CELLS["gru"].input_gates == (1, 2, 3)
    assert CELLS["gru"].recurrent_gates == (0, 1, 2)


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_is_one_short_file(name):
    """At most 40 lines, docstring and citation included; found under its name and under its key."""
    with open(CELLS[name].function.__code__.co_filename, encoding="utf-8") as file:
        lines = file.readlines()
    assert len(lines) <= 40
    assert lines[0].startswith('"""')
    assert CELLS[name].function.__doc__
    assert get_cell(name) is get_cell(CELLS[name]) is get_cell(CELLS[name].key) is CELLS[name]


def one_of_each(a, g, h, s):
    """Every word and every operator, with constants on either side."""
    x = sigmoid(a) * h + tanh(g) / (2 + s * s) - exp(-relu(a - 0.1)) * 0.5
    y = where(a <= g, log_sigmoid(x) - 1, maximum(x, 0.25) / 3) + where(h > 0.2, 1 / (3 + x * x), h)
    return where(s == 5, g, y) * maximum(-h, s), where(a >= g, s, x) + where(h < a, 0.0, 1.0) * y


EVERY_WORD = cell(gates=(Gate("a"), Gate("g")), states=("h", "s"))(one_of_each)


@pytest.mark.parametrize("made", [*CELLS.values(), EVERY_WORD], ids=lambda c: c.name)
def test_derived_gradient_equals_finite_differences(made):
    """Central differences of the forward, in every gate and state, with random cotangents."""
    rng = np.random.default_rng(0)
    names = made.forward.inputs
    x = rng.standard_normal((len(names), 400))
    if "n" in made.states:
        x[names.index("n")] = np.abs(x[names.index("n")]) + 0.2
    dnew = rng.standard_normal((len(made.states), 400))

    def loss(x):
        return sum(d * np.broadcast_to(y, d.shape) for d, y in zip(dnew, made.forward.evaluate(NUMPY, x), strict=True))

    gradients = made.backward.evaluate(NUMPY, [*x, *dnew])
    step = 1e-6
    for k, name in enumerate(names):
        shift = np.zeros_like(x)
        shift[k] = step
        left, middle, right = loss(x - shift), loss(x), loss(x + shift)
        smooth = np.abs(left + right - 2 * middle) < 1e-8  # the others lie on a kink or a jump
        assert smooth.mean() > 0.98
        error = np.abs(gradients[k] - (right - left) / (2 * step))
        assert error[smooth].max() < 1e-7, name


def test_every_word_was_differentiated():
    assert {n.op for n in EVERY_WORD.forward.nodes} - {"input", "constant"} == set(OPS) == set(NUMPY)


def test_ties_take_half_each():
    """As PyTorch's maximum; relu has derivative 0 at 0."""

    @cell(gates=(Gate("a"),), states=("h", "s"))
    def ties(a, h, s):
        return maximum(a, h), relu(s)

    one, zero = np.ones(1), np.zeros(1)
    assert [float(np.squeeze(g)) for g in ties.backward.evaluate(NUMPY, [one, one, zero, one, one])] == [0.5, 0.5, 0.0]


def test_equal_expressions_are_computed_once():
    assert sum(node.op == "sigmoid" for node in CELLS["gru"].forward.nodes) == 2
    assert sum(node.op == "sigmoid" for node in CELLS["gru"].backward.nodes) == 2


def test_lines_of_the_graph_are_those_of_the_file():
    """So that generated code can point back to the cell."""
    made = CELLS["lstm"]
    first = made.function.__code__.co_firstlineno
    with open(made.forward.file, encoding="utf-8") as file:
        lines = file.readlines()
    for node in made.forward.nodes:
        if node.op in ("sigmoid", "tanh"):
            assert node.line > first
            assert node.op in lines[node.line - 1]


@cell(gates=(Gate("a"),), states=("h",))
def written_here(a, h):
    return tanh(a) + h


def test_pickles_by_reference():
    """As a function does: what stands in a module is found there again, what does not is refused."""
    for made in (*CELLS.values(), written_here):
        assert pickle.loads(pickle.dumps(made)) is made
        assert copy.deepcopy(made) is made
    with pytest.raises(pickle.PicklingError, match="one_of_each"):
        pickle.dumps(EVERY_WORD)


def test_pickled_cell_is_found_by_another_process():
    read = "import pickle, sys; print(pickle.load(sys.stdin.buffer).key)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for made in CELLS.values():
        found = subprocess.run(
            [sys.executable, "-c", read], input=pickle.dumps(made), capture_output=True, check=True, env=environment
        )
        assert found.stdout.decode().strip() == made.key


GATES = (Gate("a"),)
REFUSED = {
    "branch": (lambda a, h: a if a > h else h, TypeError, "straight line.*where"),
    "not_equal": (lambda a, h: where(a != h, a, h), TypeError, "exchange the two branches"),
    "numpy": (lambda a, h: a + np.ones(3), TypeError, "ndarray"),
    "comparison_as_number": (lambda a, h: (a < h) + 1, TypeError, "add: argument 0 must be a number"),
    "number_as_condition": (lambda a, h: where(a, a, h), TypeError, "where: argument 0 must be a comparison"),
    "constant_alone": (lambda a, h: a + exp(1.0), TypeError, "exp: no argument is a gate"),
    "too_many_states": (lambda a, h: (a, h), TypeError, "must return its 1 new states"),
    "no_value": (lambda a, h: 0.0, TypeError, "must return its 1 new states"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tracing_refuses(name):
    function, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        cell(gates=GATES, states=("h",))(function)


def test_declaration_refuses():
    with pytest.raises(TypeError, match=r"parameters must be \('a', 'h'\)"):
        cell(gates=GATES, states=("h",))(lambda h, a: a)
    with pytest.raises(ValueError, match="needs a state"):
        cell(gates=(Gate("a", recurrent=False),), states=("h",))(lambda a, h: a)
    with pytest.raises(TypeError, match=r"\['dh_new'\] are the names of cotangents"):
        cell(gates=(Gate("a"), Gate("dh_new")), states=("h",))(lambda a, dh_new, h: a + dh_new)
    with pytest.raises(ValueError, match=r"float32_states \('c',\) are not all among its states"):
        cell(gates=GATES, states=("h",), float32_states=("c",))(lambda a, h: a)
    with pytest.raises(ValueError, match="unknown cell 'lstmm'; known are elman, gru, lstm, slstm"):
        get_cell("lstmm")
    with pytest.raises(TypeError, match="function: expected a cell's name or a Cell, got int"):
        get_cell(3)


def test_zeros_of_both_signs_are_two_constants():
    """1 / 0.0 is not 1 / -0.0."""
    made = cell(gates=GATES, states=("h",))(lambda a, h: vocabulary.where(a > 0.0, 1 / (a * -0.0), h))
    zeros = [str(node.value) for node in made.forward.nodes if node.op == "constant" and node.value == 0]
    assert zeros == ["0.0", "-0.0"]


def test_what_the_vocabulary_names_is_in_it():
    assert all(hasattr(vocabulary, word) for word in OPS if word in vocabulary.__doc__)
    assert flashrnn_core.get_cell is get_cell
