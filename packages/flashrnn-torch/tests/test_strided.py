"""Strides are free: the same result, and Wx is not copied on the way."""

import pytest
import torch
from checks import assert_close, oracle_in_numpy, run
from problems import CELLS, Case, build
from torch.utils._python_dispatch import TorchDispatchMode

from flashrnn import flashrnn, ops

LAYOUTS = ("time_major", "expanded", "spaced")
INSIDE = {"flashrnn::forward": ops._forward, "flashrnn::backward": ops._backward}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_strided_Wx_gives_the_same(cell, layout):
    """Bit for bit what a contiguous copy gives, in outputs and gradients; and what the oracle says."""
    inputs = build(Case(cell, T=9, layout=layout, resets=True, lengths=True))
    Wx = inputs.tensors["Wx"]
    assert not Wx.is_contiguous()
    got = run(inputs, "vanilla")
    inputs.tensors["Wx"] = Wx.contiguous()
    expected = run(inputs, "vanilla")
    for name, want in expected.items():
        assert torch.equal(got[name], want), name
    assert_close(got, oracle_in_numpy(inputs), 1e-12)


def test_every_tensor_strided():
    """Every dim in another order, the last apart; cotangents expanded, as those of a sum are."""
    inputs = build(Case("slstm", T=5, resets=True, lengths=True))
    inputs.dstates = torch.ones((), dtype=torch.float64).expand(inputs.dstates.shape)
    expected = run(inputs, "vanilla")
    for name in ("Wx", "R", "b", "states"):
        x = inputs.tensors[name]
        order = [*reversed(range(x.ndim - 1)), x.ndim - 1]
        inputs.tensors[name] = x.permute(order).contiguous().permute(order)
        assert torch.equal(inputs.tensors[name], x)
    inputs.tensors["resets"] = inputs.tensors["resets"].t().contiguous().t()
    inputs.tensors["lengths"] = inputs.tensors["lengths"].repeat_interleave(2)[::2]
    for name, want in run(inputs, "vanilla").items():
        torch.testing.assert_close(want, expected[name], rtol=0, atol=1e-12)


def test_last_dim_not_contiguous():
    """Not in the contract, and still right."""
    inputs = build(Case("lstm"))
    expected = run(inputs, "vanilla")
    inputs.tensors["Wx"] = inputs.tensors["Wx"].transpose(-1, -2).contiguous().transpose(-1, -2)
    for name, want in run(inputs, "vanilla").items():
        assert torch.equal(want, expected[name]), name


class Copies(TorchDispatchMode):
    """Lists the operations that make, of something that is stored with `x`, a tensor of its size stored elsewhere.

    The library's operators are looked into: their own code runs under the mode too.
    """

    def __init__(self, x):
        self.x, self.found, self.seen = x, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in INSIDE:
            self.seen.append(name)
            assert args[0].stride() == self.x.stride()
            assert self.stored_with_x(args[0])
            with self:
                return INSIDE[name](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        reads = not name.startswith("aten::new_")  # new_empty asks x for its dtype and device alone
        if reads and any(self.stored_with_x(a) for a in tensors):
            for made in torch.utils._pytree.tree_leaves(result):
                if isinstance(made, torch.Tensor) and made.numel() >= self.x.numel() and not self.stored_with_x(made):
                    self.found.append(name)
        return result

    def stored_with_x(self, other):
        return other.untyped_storage().data_ptr() == self.x.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("cell", CELLS)
def test_Wx_is_not_copied(cell, layout, dtype):
    """Forward and backward: the only tensor of its size is its gradient, which is not made from it."""
    inputs = build(Case(cell, T=9, dtype=dtype, states=dtype, layout=layout, resets=True))
    tensors = {name: x.detach() for name, x in inputs.tensors.items() if x is not None}
    leaves = [tensors[name].requires_grad_() for name in ("Wx", "R", "b", "states")]
    with Copies(leaves[0].detach()) as copies:
        outputs = flashrnn(**tensors, **inputs.options)
        torch.autograd.grad(outputs, leaves, (inputs.dstates, inputs.dlast_states))
    assert copies.seen == ["flashrnn::forward", "flashrnn::backward"]
    assert copies.found == []


def test_the_check_for_copies_sees_one():
    x = torch.randn(2, 3).t()
    with Copies(x) as copies:
        x.contiguous()
        x[:1].clone()
    assert copies.found == ["aten::clone"]
