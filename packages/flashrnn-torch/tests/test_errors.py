"""Each bad call gives one clear error, which names the tensor or option, what was expected and what came."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrnn import FlashRNNConfig, flashrnn

B, T, N, D = 3, 4, 2, 5
TENSORS = ("Wx", "R", "b", "states", "resets", "lengths")


def good(**changes):
    """Arguments of a call that runs, every tensor given, with changes."""
    return {
        "Wx": torch.zeros(B, T, 4, N, D),
        "R": torch.zeros(4, N, D, D),
        "b": torch.zeros(4, N, D),
        "states": torch.zeros(2, B, 1, N, D),
        "resets": torch.zeros(B, T, dtype=torch.bool),
        "lengths": torch.full((B,), T),
        "function": "lstm",
        "backend": "vanilla",
    } | changes


BAD = {
    "rank-Wx": (
        {"Wx": torch.zeros(B, T, 4, N * D)},
        ValueError,
        r"Wx: expected 5 dims \[B T Gw N D\], got 4: \[3, 4, 4, 10\]",
    ),
    "rank-lengths": ({"lengths": torch.tensor(3)}, ValueError, r"lengths: expected 1 dims \[B\], got 0: \[\]"),
    "gates-Wx": (
        {"Wx": torch.zeros(B, T, 3, N, D)},
        ValueError,
        r"Wx .*expected Gw = 4, as the gates .* of cell lstm, got",
    ),
    "gates-gru": (
        {"function": "gru"},
        ValueError,
        r"Wx .*expected Gw = 3, as the gates with an input part of cell gru",
    ),
    "D-R": ({"R": torch.zeros(4, N, 6, 6)}, ValueError, r"R .*expected D = 5, as D of Wx, got \[4, 2, 6, 6\]"),
    "P-R": ({"R": torch.zeros(4, N, D, 6)}, ValueError, r"R .*expected P = 5, as D of Wx, got \[4, 2, 5, 6\]"),
    "N-b": ({"b": torch.zeros(4, 1, D)}, ValueError, r"b \[G N D\]: expected N = 2, as N of Wx, got \[4, 1, 5\]"),
    "S-states": (
        {"states": torch.zeros(4, B, 1, N, D)},
        ValueError,
        "states .*expected S = 2, as the states of cell lstm",
    ),
    "B-states": ({"states": torch.zeros(2, 1, 1, N, D)}, ValueError, r"states .*expected B = 3, as B of Wx, got"),
    "1-states": ({"states": torch.zeros(2, B, T, N, D)}, ValueError, r"states .*expected 1 in dim 2 \(one step\), got"),
    "T-resets": (
        {"resets": torch.zeros(B, 5, dtype=torch.bool)},
        ValueError,
        r"resets .*expected T = 4, as T of Wx, got",
    ),
    "B-lengths": ({"lengths": torch.full((2,), T)}, ValueError, r"lengths .*expected B = 3, as B of Wx, got \[2\]"),
    "dtype-Wx": ({"Wx": torch.zeros(B, T, 4, N, D, dtype=torch.int64)}, TypeError, "Wx: expected dtype .*, got int64"),
    "dtype-R": (
        {"R": torch.zeros(4, N, D, D, dtype=torch.complex64)},
        TypeError,
        "R: expected dtype .*, got complex64",
    ),
    "dtype-resets": ({"resets": torch.zeros(B, T)}, TypeError, "resets: expected dtype bool, got float32"),
    "dtype-lengths": (
        {"lengths": torch.full((B,), 4.0)},
        TypeError,
        "lengths: expected dtype int32 or int64, got float32",
    ),
    "device-b": ({"b": torch.zeros(4, N, D, device="meta")}, ValueError, "b: expected device cpu, as Wx, got meta"),
    "sparse": (
        {"Wx": torch.zeros(B, T, 4, N, D).to_sparse()},
        TypeError,
        "Wx: expected a dense tensor, got .*sparse_coo",
    ),
    "no-tensor": ({"Wx": np.zeros((B, T, 4, N, D))}, TypeError, "Wx: expected a torch.Tensor, got ndarray"),
    "None": ({"R": None}, TypeError, r"R: expected a tensor \[Gr N D P\], got None"),
    "lengths-above": ({"lengths": torch.tensor([0, 5, 2])}, ValueError, r"lengths: expected .*\[0, 4\], got 0 to 5"),
    "lengths-below": ({"lengths": torch.tensor([0, -1, 2])}, ValueError, r"lengths: expected .*\[0, 4\], got -1 to 2"),
    "cell": (
        {"function": "lstmm"},
        ValueError,
        "unknown cell 'lstmm'; known are elman, gru, lstm, slstm, or pass a Cell",
    ),
    "cell-type": ({"function": 3}, TypeError, "function: expected a cell's name or a Cell, got int"),
    "backend": (
        {"backend": "cudnn"},
        ValueError,
        "backend: expected auto, cuda_fused, cuda, triton, vanilla, got 'cudnn'",
    ),
    "backend-type": ({"backend": ["cuda"]}, TypeError, r"backend: expected a name, got \['cuda'\]"),
    "backend-cpu": (
        {"backend": "cuda_fused"},
        NotImplementedError,
        "backend 'cuda_fused' cannot run this call: .*vanilla",
    ),
    "dtype": ({"dtype": "int8"}, TypeError, "dtype: expected bfloat16, float16, float32, float64 or None, got 'int8'"),
    "dtype-numpy": ({"dtype": np.dtype("float32")}, TypeError, "dtype: expected bfloat16, .* got dtype"),
    "config": ({"config": "lstm"}, TypeError, "config: expected a FlashRNNConfig or None, got str"),
    "clip": (
        {"gradient_recurrent_clipval": 0.0},
        ValueError,
        "gradient_recurrent_clipval: expected None or a number above 0",
    ),
    "clip-large": (
        {"gradient_recurrent_clipval": 10**400},
        ValueError,
        "gradient_recurrent_clipval: too large for a float; None bounds nothing",
    ),
    "clip-type": (
        {"gradient_recurrent_clipval": "1"},
        TypeError,
        "gradient_recurrent_clipval: expected None or .*, got '1'",
    ),
    "flag": ({"reverse": "no"}, TypeError, "reverse: expected True or False, got 'no'"),
    "flag-cut": ({"gradient_recurrent_cut": 1.0}, TypeError, "gradient_recurrent_cut: expected True or False, got 1.0"),
    "flag-hidden": ({"hidden_only": None}, TypeError, "hidden_only: expected True or False, got None"),
    "config-rank": (
        {"config": FlashRNNConfig(backend="vanilla"), "Wx": torch.zeros(D)},
        ValueError,
        r"Wx: expected 5 dims BTGHD, got 1: \[5\]",
    ),
    "config-None": ({"config": FlashRNNConfig(backend="vanilla"), "Wx": None}, TypeError, "Wx, R, b: expected tensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_call(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        flashrnn(**good(**changes))


@pytest.mark.parametrize("dim", ["N", "D"])
def test_no_heads_or_no_units(dim):
    sizes = {"N": N, "D": D} | {dim: 0}
    n, d = sizes["N"], sizes["D"]
    with pytest.raises(ValueError, match=rf"{dim} of Wx: expected {dim} \(.*\) of at least 1, got 0"):
        flashrnn(torch.zeros(B, T, 4, n, d), torch.zeros(4, n, d, d), torch.zeros(4, n, d))


def test_meta_tensors_are_no_error():
    tensors = {name: x.to("meta") for name, x in good().items() if name in TENSORS}
    assert flashrnn(**tensors)[0].shape == (2, B, T, N, D)


def wrong_tensor(draw, name, x):
    """The tensor `name`, spoilt in one way."""
    kinds = ["drop", "add", "size", "dtype", "device", "type", "sparse"] + ["values"] * (name == "lengths")
    kind = draw(st.sampled_from(kinds))
    if kind == "drop":
        return x[0]
    if kind == "add":
        return x[None]
    if kind == "size":  # every dim is known from elsewhere too
        dim = draw(st.integers(0, x.ndim - 1))
        sizes = list(x.shape)
        sizes[dim] = draw(st.integers(0, 9).filter(lambda size: size != sizes[dim]))
        return torch.zeros(sizes, dtype=x.dtype)
    if kind == "dtype":
        allowed = {"resets": [torch.bool], "lengths": [torch.int32, torch.int64]}
        floats = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
        others = [torch.bool, torch.int8, torch.int32, torch.int64, torch.complex64, torch.float8_e4m3fn, *floats]
        return x.to(draw(st.sampled_from([d for d in others if d not in allowed.get(name, floats)])))
    if kind == "device":
        return x.to("meta")
    if kind == "sparse":
        return x.to_sparse()
    if kind == "values":
        lengths = x.clone()
        lengths[draw(st.integers(0, B - 1))] = draw(st.one_of(st.integers(-(2**40), -1), st.integers(T + 1, 2**40)))
        return lengths
    return draw(st.sampled_from([x.numpy(), x.tolist(), "Wx", 1.0, object(), (x, x)]))


WRONG_OPTIONS = {
    "function": st.one_of(
        st.text(max_size=8).filter(lambda s: s not in ("elman", "gru", "lstm", "slstm")), st.integers()
    ),
    "backend": st.one_of(
        st.text(max_size=8), st.integers(), st.none(), st.just("cuda"), st.just("triton_fused"), st.just([])
    ),
    "dtype": st.one_of(
        st.text(max_size=8), st.integers(), st.sampled_from([torch.int8, torch.complex64, np.float32, float])
    ),
    "config": st.sampled_from(["lstm", {}, 3, FlashRNNConfig]),
    "gradient_recurrent_clipval": st.one_of(
        st.floats(max_value=0), st.just(float("nan")), st.text(max_size=3), st.booleans(), st.just([1.0])
    ),
    "reverse": st.sampled_from(["no", 0, 1, None, 1.0, []]),
    "gradient_recurrent_cut": st.sampled_from(["no", 0, 1, None, 1.0, []]),
    "hidden_only": st.sampled_from(["no", 0, 1, None, 1.0, []]),
}


@st.composite
def bad_calls(draw):
    """(arguments, names): the arguments of a call with one thing wrong, and what its error may name."""
    name = draw(st.sampled_from([*TENSORS, *WRONG_OPTIONS]))
    arguments = good()
    if name in TENSORS:
        return arguments | {name: wrong_tensor(draw, name, arguments[name])}, TENSORS
    return arguments | {name: draw(WRONG_OPTIONS[name])}, (name,)


EXPECTED = flashrnn(**good())[0]


@settings(max_examples=500, deadline=None, derandomize=True)
@given(bad_calls())
def test_500_bad_calls(call):
    """Each raises an error that names a tensor or the option, and leaves the next good call as it was."""
    arguments, names = call
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as caught:
        flashrnn(**arguments)
    assert re.match(rf"({'|'.join(names)})\b", str(caught.value)) or " of Wx:" in str(caught.value), str(caught.value)
    assert torch.equal(flashrnn(**good())[0], EXPECTED)
