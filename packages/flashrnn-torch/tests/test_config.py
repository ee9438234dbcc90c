"""`FlashRNNConfig`: users of PyPI flashrnn 1.0.8 switch without touching their code."""

import itertools
import random

import pytest
import torch
from problems import GRADIENTS, Case, build

from flashrnn import FlashRNNConfig, flashrnn

FULL = {"input_shape": "BTGHD", "recurrent_shape": "GHDP", "bias_shape": "GHD", "output_shape": "SBTHD"}
HALF = {"backend": "vanilla", "dtype": "float32"}


def orders(name):
    """Some orders of the dims of a shape option: the contract's, 1.0.8's time-major ones, and others by chance."""
    every = ["".join(order) for order in itertools.permutations(FULL[name])]
    return [FULL[name], *random.Random(name).sample(every, min(len(every), 8))]


def permuted(x, source, target):
    return x.permute([source.index(dim) for dim in target]).contiguous()


@pytest.mark.parametrize(("option", "order"), [(name, order) for name in FULL for order in orders(name)])
def test_each_order_of_dims(option, order):
    """Tensors in that order give what those of the contract's order give, in that order, gradients too."""
    inputs = build(Case("lstm", dtype="float32", states="float32"))
    plain = [inputs.tensors[name].requires_grad_() for name in GRADIENTS]
    expected = flashrnn(*plain, backend="vanilla")
    cotangents = (inputs.dstates, inputs.dlast_states)
    gradients = torch.autograd.grad(expected, plain, cotangents)
    shapes = [order if name == option else FULL[name] for name in FULL]
    leaves = [
        permuted(x.detach(), full, shape).requires_grad_()
        for x, full, shape in zip(plain, FULL.values(), shapes, strict=True)
    ]
    got = flashrnn(*leaves, config=FlashRNNConfig(**HALF, **{option: order}))
    for have, want in zip(got, expected, strict=True):
        assert torch.equal(have, permuted(want, FULL["output_shape"], shapes[3]))
    back = torch.autograd.grad(got, leaves, [permuted(d, FULL["output_shape"], shapes[3]) for d in cotangents])
    for have, want, shape, full in zip(back, gradients, shapes, FULL.values(), strict=True):
        torch.testing.assert_close(have, permuted(want, full, shape))


def test_config_decides_function_backend_and_dtype():
    """As in 1.0.8, whatever the arguments say; its own defaults, bfloat16 and cuda_fused, stand."""
    inputs = build(Case("gru", dtype="float32", states=None))
    tensors = [inputs.tensors[name] for name in GRADIENTS[:3]]
    config = FlashRNNConfig(function="gru", backend="vanilla")
    out, _ = flashrnn(*tensors, function="lstm", backend="cuda", dtype="float64", config=config)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, flashrnn(*tensors, function="gru", dtype="bfloat16", backend="vanilla")[0])
    with pytest.raises(NotImplementedError, match="backend 'cuda_fused' cannot run this call"):
        flashrnn(*tensors, config=FlashRNNConfig(function="gru"))


def test_config_passes_cut_and_clip():
    inputs = build(Case("lstm", dtype="float32", states="float32", T=9))
    leaves = [inputs.tensors[name].requires_grad_() for name in GRADIENTS]
    for options in ({"gradient_recurrent_cut": True}, {"gradient_recurrent_clipval": 0.01}):
        outputs = [flashrnn(*leaves, config=FlashRNNConfig(**HALF, **options)), flashrnn(*leaves, **options)]
        by_config, by_argument = (torch.autograd.grad(o[0].sum(), leaves) for o in outputs)
        free = torch.autograd.grad(flashrnn(*leaves)[0].sum(), leaves)
        assert all(torch.equal(x, y) for x, y in zip(by_config, by_argument, strict=True))
        assert not torch.equal(by_config[0], free[0])


REFUSED = {
    "forward_clipval": 1.0,
    "constants": {"a": 1.0},
    "dtype_acc": "bfloat16",
    "dtype_r": "float32",
    "dtype_w": "float32",
    "dtype_g": "float32",
    "trainable_r": False,
    "trainable_b": [True, False, True, True],
    "initial_val": [0.0, 1.0],
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_would_change_the_result_raise(name):
    with pytest.raises(ValueError, match=rf"FlashRNNConfig.{name}=.* is not supported; \w+"):
        FlashRNNConfig(**{name: REFUSED[name]})


def test_flags_are_flags():
    with pytest.raises(TypeError, match=r"FlashRNNConfig\.gradient_recurrent_cut: expected True or False, got 'no'"):
        FlashRNNConfig(gradient_recurrent_cut="no")
    for frozen in (0, (True, False), [0, 1]):
        with pytest.raises(ValueError, match=r"FlashRNNConfig\.trainable_r=.*; pass R\.detach\(\)"):
            FlashRNNConfig(trainable_r=frozen)


@pytest.mark.parametrize("name", FULL)
def test_shapes_that_are_none_raise(name):
    for value in ("BTGH", FULL[name] + "X", FULL[name].replace("H", "N")):
        with pytest.raises(ValueError, match=f"FlashRNNConfig.{name}: expected an order of {FULL[name]}, got"):
            FlashRNNConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("num_heads", 3), ("head_dim", 4), ("hidden_dim", 11)])
def test_sizes_are_checked(name, value):
    tensors = [build(Case("lstm", N=2, D=5, dtype="float32")).tensors[key] for key in GRADIENTS[:3]]
    right = {"num_heads": 2, "head_dim": 5, "hidden_dim": 10, "batch_size": 99}
    flashrnn(*tensors, config=FlashRNNConfig(**HALF, **right))
    with pytest.raises(ValueError, match=rf"Wx: expected {name} {value}, as the config says, got {right[name]}"):
        flashrnn(*tensors, config=FlashRNNConfig(**HALF, **{name: value}))


@pytest.mark.parametrize(("spelling", "here"), [("vanilla_fwbw", "vanilla"), ("triton_fused", "triton")])
def test_backends_of_1_0_8(spelling, here):
    tensors = [build(Case("lstm", dtype="float32")).tensors[key] for key in GRADIENTS[:3]]
    if here == "vanilla":
        assert torch.equal(flashrnn(*tensors, backend=spelling)[0], flashrnn(*tensors, backend=here)[0])
    else:  # named, so it runs or says why it does not: on the CPU it does not
        with pytest.raises(NotImplementedError, match=f"backend '{spelling}' cannot run this call: .*vanilla"):
            flashrnn(*tensors, backend=spelling)


def test_dtype_as_a_word_or_torchs():
    tensors = [build(Case("lstm", dtype="float32")).tensors[key] for key in GRADIENTS[:3]]
    for dtype in ("bfloat16", torch.bfloat16):
        assert flashrnn(*tensors, dtype=dtype)[0].dtype == torch.bfloat16
