"""The contract's table: shapes of a problem, and the message of each misfit."""

import pytest

from flashrnn_core.cells import CELLS
from flashrnn_core.contract import Info, Problem, check, check_options

B, T, N, D = 3, 7, 2, 5


def tensors(name="gru", **changes):
    """Infos of a call that fits, with changes."""
    problem = Problem(CELLS[name], B, T, N, D, "float32", "float32")
    dtypes = {"resets": "bool", "lengths": "int64"}
    names = ("Wx", "R", "b", "states", "resets", "lengths")
    return {key: Info(problem.shape(key), dtypes.get(key, "float32"), "cpu") for key in names} | changes


def test_shapes_of_gru():
    """Three of its four gates have an input part, three a recurrent one."""
    problem = Problem(CELLS["gru"], B, T, N, D, "float32", "float32")
    shapes = {key: problem.shape(key) for key in ("Wx", "R", "b", "states", "resets", "lengths")}
    assert shapes == {
        "Wx": (B, T, 3, N, D),
        "R": (3, N, D, D),
        "b": (4, N, D),
        "states": (1, B, 1, N, D),
        "resets": (B, T),
        "lengths": (B,),
    }


def test_shapes_of_outputs():
    problem = Problem(CELLS["slstm"], B, T, N, D, "float32", "float32", hidden_only=True)
    assert problem.output_shape("states") == (1, B, T, N, D)
    assert problem.output_shape("last_states") == (4, B, 1, N, D)


@pytest.mark.parametrize("name", CELLS)
def test_fitting_tensors_pass(name):
    check(CELLS[name], tensors(name))
    check(CELLS[name], tensors(name, states=None, resets=None, lengths=None))


F32 = "float32"
MISFITS = {
    "no_Wx": ({"Wx": None}, TypeError, r"Wx: expected a tensor \[B T Gw N D\], got None"),
    "rank": ({"R": Info((3, N, D), F32, "cpu")}, ValueError, r"R: expected 4 dims \[Gr N D P\], got 3: \[3, 2, 5\]"),
    "gates": ({"Wx": Info((B, T, 4, N, D), F32, "cpu")}, ValueError, "Wx .*Gw = 3, as the gates with an input part"),
    "N": ({"b": Info((4, 9, D), F32, "cpu")}, ValueError, r"b \[G N D\]: expected N = 2, as N of Wx, got \[4, 9, 5\]"),
    "P": ({"R": Info((3, N, D, 6), F32, "cpu")}, ValueError, "R .*expected P = 5, as D of Wx"),
    "D": ({"R": Info((3, N, 6, 6), F32, "cpu")}, ValueError, "R .*expected D = 5, as D of Wx"),
    "states_B": ({"states": Info((1, 4, 1, N, D), F32, "cpu")}, ValueError, "states .*expected B = 3, as B of Wx"),
    "states_S": (
        {"states": Info((2, B, 1, N, D), F32, "cpu")},
        ValueError,
        "states .*S = 1, as the states of cell",
    ),
    "dtype": ({"R": Info((3, N, D, D), "int64", "cpu")}, TypeError, "R: expected dtype bfloat16 or .*, got int64"),
    "resets_dtype": ({"resets": Info((B, T), "uint8", "cpu")}, TypeError, "resets: expected dtype bool, got uint8"),
    "lengths_dtype": ({"lengths": Info((B,), F32, "cpu")}, TypeError, "lengths: expected dtype int32 or int64"),
    "device": ({"b": Info((4, N, D), F32, "cuda:0")}, ValueError, "b: expected device cpu, as Wx, got cuda:0"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_named(name):
    changes, error, message = MISFITS[name]
    with pytest.raises(error, match=message):
        check(CELLS["gru"], tensors(**changes))


def test_no_heads():
    shapes = {"Wx": (B, T, 3, 0, D), "R": (3, 0, D, D), "b": (4, 0, D)}
    with pytest.raises(ValueError, match=r"N of Wx: expected N \(heads\) of at least 1, got 0"):
        check(CELLS["gru"], {key: Info(shape, F32, "cpu") for key, shape in shapes.items()})


@pytest.mark.parametrize("bound", [0, -1.0, float("nan")])
def test_clip_bounds(bound):
    with pytest.raises(ValueError, match="gradient_recurrent_clipval: expected None or a number above 0"):
        check_options(bound)
