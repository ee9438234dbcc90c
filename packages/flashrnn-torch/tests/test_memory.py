"""What a backward does not allocate."""

import torch
from problems import GRADIENTS, Case, build
from torch.utils._python_dispatch import TorchDispatchMode

from flashrnn import flashrnn
from flashrnn.backends import vanilla


class Made(TorchDispatchMode):
    """Lists (operation, shape, elements stored) of every tensor made inside."""

    def __init__(self):
        self.tensors = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                stored = x.untyped_storage().nbytes() // x.element_size()
                self.tensors.append((func._schema.name, tuple(x.shape), stored))
        return result


def test_R_is_not_repeated_for_each_step():
    """T times R would be many times all that is needed: a batch of one, wide heads, many steps."""
    inputs = build(Case("lstm", B=1, T=50, N=2, D=24))
    Wx, R, b, states = (inputs.tensors[name] for name in GRADIENTS)
    out, _ = flashrnn(Wx, R, b, states)
    cotangents = (inputs.dstates, inputs.dlast_states)
    with Made() as made:
        vanilla.backward(inputs.case.problem, Wx, R, b, states, None, None, out, Wx.new_empty(0), *cotangents, None)
    assert max(stored for _, _, stored in made.tensors) <= Wx.numel()


def test_no_gradient_is_made_of_what_has_none():
    """The states kept for the backward are an output of the operator: autograd makes no zeros of their size."""
    inputs = build(Case("lstm", dtype="bfloat16", states="bfloat16"))
    leaves = [inputs.tensors[name].requires_grad_() for name in GRADIENTS]
    out, _ = flashrnn(*leaves)
    with Made() as made:
        torch.autograd.grad(out, leaves, inputs.dstates)
    zeros = [shape for name, shape, _ in made.tensors if "zero" in name]
    assert zeros == [inputs.dlast_states.shape]  # which has no cotangent


def test_constants_of_a_cell_come_from_no_other_device():
    """A number in a cell is filled in where the states are: on a GPU a copy from the host would wait at each step."""
    inputs = build(Case("slstm", dtype="float32", states="float32"))
    Wx, R, b, states = (inputs.tensors[name] for name in GRADIENTS)
    with Made() as made:
        out, _, saved = vanilla.forward(inputs.case.problem, Wx, R, b, states, None, None, True)
        assert saved is None  # the outputs are as exact
        arguments = (out, out.new_empty(0), inputs.dstates, inputs.dlast_states)
        vanilla.backward(inputs.case.problem, Wx, R, b, states, None, None, *arguments, None)
    assert not {name for name, _, _ in made.tensors} & {"aten::lift_fresh", "aten::_to_copy", "aten::scalar_tensor"}
