"""The operators among torch's machinery: opcheck, compile, fake tensors, autocast, gradients of gradients."""

import contextlib
import types

import pytest
import torch
from problems import CELLS, DTYPES, GRADIENTS, Case, build
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flashrnn import Gate, cell, flashrnn, ops
from flashrnn.backends import BACKENDS, vanilla
from flashrnn_core import get_cell
from flashrnn_core.cells.vocabulary import tanh


def operands(case, record=True):
    """Arguments of torch.ops.flashrnn.forward, positional."""
    inputs = build(case)
    tensors = [None if x is None else x.detach() for x in inputs.tensors.values()]
    options = [get_cell(case.cell).key, "vanilla", case.reverse, case.cut, case.clip]
    return inputs, tensors, options, [case.hidden_only, record]


OPCHECK = {
    "plain": Case("lstm", T=3),
    "gru": Case("gru", T=3, resets=True),
    "slstm-masks": Case("slstm", T=3, resets=True, lengths=True, reverse=True),
    "zeros": Case("slstm", T=3, states=None),
    "bf16": Case("lstm", T=3, dtype="bfloat16", states="float32", clip=0.1),
    "bf16-states": Case("slstm", T=3, dtype="bfloat16", states="bfloat16", cut=True),
    "T0": Case("elman", T=0),
    "B0": Case("elman", B=0),
    "T1": Case("elman", B=1, T=1, N=1, D=1),
}


@pytest.mark.parametrize("case", OPCHECK.values(), ids=OPCHECK)
def test_opcheck_forward(case):
    """Schema, aliasing, fakes, autograd registration and compiled gradients, as torch checks them."""
    _, tensors, options, flags = operands(case)
    for x in tensors[:4]:
        if x is not None:
            x.requires_grad_()
    torch.library.opcheck(torch.ops.flashrnn.forward.default, (*tensors, *options, *flags), rtol=1e-2, atol=1e-2)


def test_opcheck_forward_without_gradients():
    for case in (Case("slstm", T=3, hidden_only=True), Case("lstm", T=3, dtype="float16", states=None)):
        _, tensors, options, flags = operands(case, record=False)
        torch.library.opcheck(torch.ops.flashrnn.forward.default, (*tensors, *options, *flags))


@pytest.mark.parametrize("needs", [(True, True, True, True), (False, True, False, True)], ids=str)
@pytest.mark.parametrize("case", OPCHECK.values(), ids=OPCHECK)
def test_opcheck_backward(case, needs):
    inputs, tensors, options, flags = operands(case)
    out, last, saved = torch.ops.flashrnn.forward(*tensors, *options, *flags)
    needs = [needed and x is not None for needed, x in zip(needs, tensors[:4], strict=True)]
    cotangents = [inputs.dstates.to(out.dtype), inputs.dlast_states.to(last.dtype)]
    arguments = (*tensors, out, saved, *cotangents, *options, needs)
    torch.library.opcheck(torch.ops.flashrnn.backward.default, arguments)


COMPILED = {
    "slstm": {"resets": True, "lengths": True, "reverse": True},
    "gru": {"hidden_only": True},
    "lstm": {"clip": 0.1},
}


@pytest.mark.parametrize("name", COMPILED)
def test_compile_with_dynamic_time(name):
    """fullgraph, forward and backward, one graph for all T: the numbers of the eager call."""
    torch.compiler.reset()

    def loss(Wx, R, b, states, resets, lengths):
        out, last = flashrnn(Wx, R, b, states, resets=resets, lengths=lengths, **inputs.options)
        return out.square().sum() + last.square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (6, 9, 12):  # none equal to another size, which torch would then take for the same
        inputs = build(Case(name, T=T, dtype="float32", states="float32", **COMPILED[name]))
        tensors = {
            k: x if x is None or not x.is_floating_point() else x.requires_grad_() for k, x in inputs.tensors.items()
        }
        leaves = [tensors[k] for k in GRADIENTS]
        expected = torch.autograd.grad(loss(**tensors), leaves)
        with torch.compiler.set_stance("default" if T == 6 else "fail_on_recompile"):
            got = torch.autograd.grad(compiled(**tensors), leaves)
        for have, want in zip(got, expected, strict=True):
            torch.testing.assert_close(have, want)


@pytest.mark.parametrize("record", [False, True])
def test_compile_of_layers_of_several_widths(record):
    """One step of one sequence, B = T = 1, where only N and D become symbols."""
    torch.compiler.reset()
    compiled = torch.compile(lambda *tensors: flashrnn(*tensors)[0], fullgraph=True, backend="aot_eager")
    for D in (8, 16, 24):
        tensors = list(build(Case("lstm", B=1, T=1, N=2, D=D, dtype="float32")).tensors.values())[:3]
        tensors[1].requires_grad_(record)
        got, want = compiled(*tensors), flashrnn(*tensors)[0]
        torch.testing.assert_close(got, want)
        if record:
            got, want = (torch.autograd.grad(x.square().sum(), tensors[1])[0] for x in (got, want))
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("record", [False, True])
def test_a_compiled_call_refuses_as_an_eager_one(record):
    """A backend that is named and cannot run it: with the reason, from the operator itself."""
    torch.compiler.reset()
    leaves = list(build(Case("lstm", dtype="float32")).tensors.values())[:3]
    leaves[1].requires_grad_(record)
    compiled = torch.compile(lambda *tensors: flashrnn(*tensors, backend="cuda_fused")[0], backend="aot_eager")
    for call in (compiled, lambda *tensors: flashrnn(*tensors, backend="cuda_fused")):
        with pytest.raises(NotImplementedError, match=r"'cuda_fused' cannot run this call.*backend='vanilla'"):
            call(*leaves)
    assert torch.equal(flashrnn(*leaves)[0], flashrnn(*leaves, backend="vanilla")[0])


def test_compile_with_inductor():
    """The default compiler, once."""
    torch.compiler.reset()
    inputs = build(Case("slstm", dtype="float32", states="float32"))
    leaves = [inputs.tensors[name].requires_grad_() for name in GRADIENTS]

    def loss(*leaves):
        return flashrnn(*leaves, "slstm")[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    expected, got = (torch.autograd.grad(f(*leaves), leaves) for f in (loss, compiled))
    for have, want in zip(got, expected, strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("name", CELLS)
def test_fake_tensors_have_the_shapes_of_real_ones(name):
    for case in (Case(name, dtype="bfloat16", resets=True), Case(name, hidden_only=True), Case(name, states=None, T=0)):
        inputs = build(case)
        real = flashrnn(**inputs.tensors, **inputs.options)
        with FakeTensorMode() as mode:
            fakes = {k: None if x is None else mode.from_tensor(x) for k, x in inputs.tensors.items()}
            fake = flashrnn(**fakes, **inputs.options)
        for x, y in zip(real, fake, strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast(dtype):
    """The compute dtype is autocast's, an explicit dtype goes before it, and gradients come in float32."""
    inputs = build(Case("lstm", dtype="float32", states="float32", T=20))
    leaves = [inputs.tensors[name].requires_grad_() for name in GRADIENTS]
    chosen = getattr(torch, dtype)

    def gradients(**options):
        outputs = flashrnn(*leaves, "lstm", **options)
        return outputs, torch.autograd.grad(outputs, leaves, (inputs.dstates, inputs.dlast_states))

    expected = gradients(dtype=dtype)
    exact = gradients()
    with torch.autocast("cpu", dtype=chosen):
        got = gradients()
        explicit = gradients(dtype="float32")
        out, _ = flashrnn(*leaves[:3])
    assert out.dtype == chosen
    for want, have in ((expected, got), (exact, explicit)):
        for x, y in zip((*want[0], *want[1]), (*have[0], *have[1]), strict=True):
            assert torch.equal(x, y)
            assert y.dtype == torch.float32
    assert not torch.equal(exact[0][0], expected[0][0])


@pytest.fixture
def backend_of_another_name(monkeypatch):
    """A backend that computes what `vanilla` does, and is not `vanilla`."""
    words = ("supports", "saved_states", "saved_dtype", "forward", "backward")
    monkeypatch.setitem(BACKENDS, "other", types.SimpleNamespace(**{word: getattr(vanilla, word) for word in words}))
    return "other"


def test_second_gradient_is_vanillas_alone(backend_of_another_name):
    inputs = build(Case("lstm"))
    leaves = [inputs.tensors[name].requires_grad_() for name in GRADIENTS]
    for backend in ("vanilla", backend_of_another_name):
        out, _ = flashrnn(*leaves, backend=backend)
        loss = out.square().sum()
        torch.autograd.grad(loss, leaves, retain_graph=True)
        if backend == "vanilla":
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            assert all(g.requires_grad for g in first)
        else:
            with pytest.raises(
                RuntimeError, match=r"exists on backend 'vanilla' alone.*ran on 'other'.*backend='vanilla'"
            ):
                torch.autograd.grad(loss, leaves, create_graph=True)


def test_a_gradient_compiles_on_any_backend(backend_of_another_name):
    """Tracing the backward asks for no gradient of it."""
    torch.compiler.reset()
    inputs = build(Case("lstm"))
    leaves = [inputs.tensors[name].requires_grad_() for name in GRADIENTS]

    def loss(*leaves):
        return flashrnn(*leaves, backend=backend_of_another_name)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, got = (torch.autograd.grad(f(*leaves), leaves) for f in (loss, compiled))
    for have, want in zip(got, expected, strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_gradient_in_each_dtype(dtype):
    """It exists, is finite, and in the dtype of the tensors."""
    inputs = build(Case("slstm", dtype=dtype, states=dtype))
    leaves = [inputs.tensors[name].requires_grad_() for name in GRADIENTS]
    out, last = flashrnn(*leaves, "slstm")
    first = torch.autograd.grad(out.float().square().mean() + last.float().mean(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.float().square().sum() for g in first), leaves)
    for x, g in zip(leaves, second, strict=True):
        assert g.dtype == x.dtype
        assert g.isfinite().all()


def test_compile_a_cell_never_called_before():
    """Nothing of a cell is left to be computed, under a lock, while dynamo looks on."""
    torch.compiler.reset()

    @cell(gates=(Gate("a"),), states=("h",))
    def newborn(a, h):
        return tanh(a) + h / 2

    Wx, R, b = torch.randn(2, 3, 1, 1, 4), torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4)

    def call(*tensors):
        return flashrnn(*tensors, function=newborn)[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(Wx, R, b), call(Wx, R, b))


def test_lengths_are_checked_wherever_they_have_values():
    """In a compiled call too; under fake tensors there is nothing to check."""
    torch.compiler.reset()
    Wx, R, b = torch.randn(3, 5, 4, 1, 4), torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4)

    def call(lengths):
        return flashrnn(Wx, R, b, lengths=lengths)[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(torch.tensor([0, 3, 5])), call(torch.tensor([0, 3, 5])))
    for run in (call, compiled):
        for values, message in (([0, 3, 6], "got 0 to 6"), ([-1, 3, 5], "got -1 to 5")):
            with pytest.raises(ValueError, match=rf"lengths: expected values in \[0, T\] = \[0, 5\], {message}"):
                run(torch.tensor(values))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (Wx, R, b, torch.tensor([0, 3, 5]))]
        assert flashrnn(*fakes[:3], lengths=fakes[3])[0].shape == (2, 3, 5, 1, 4)


@pytest.fixture
def direct(monkeypatch):
    """For each call of an operator's function, whether it passed the dispatcher by."""
    found, decide = [], ops._direct
    monkeypatch.setattr(ops, "_direct", lambda *given: (found.append(decide(*given)), found[-1])[1])
    return found


class Watched(torch.Tensor):
    """A subclass with torch's default handling."""


class DispatchLog(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


class FunctionLog(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


def gradients_of(leaves):
    out, last = flashrnn(*leaves, "slstm")
    return out, last, *torch.autograd.grad((out, last), leaves, (out.detach().sin(), last.detach().cos()))


def test_an_eager_call_passes_the_dispatcher_by(direct):
    """And has the same results as one that does not."""
    leaves = [build(Case("slstm")).tensors[name].requires_grad_() for name in GRADIENTS]
    results = []
    for mode in (contextlib.nullcontext(), DispatchLog()):
        with mode:
            with torch.no_grad():
                plain = flashrnn(*leaves, "slstm")
            with torch.inference_mode():
                frozen = flashrnn(*leaves, "slstm", hidden_only=True)
            results.append((*gradients_of(leaves), *plain, *frozen))
    assert direct == [True] * 4 + [False] * 4
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
        assert (x.requires_grad, x.is_inference()) == (y.requires_grad, y.is_inference())


def test_modes_see_the_operators():
    leaves = [build(Case("slstm")).tensors[name].requires_grad_() for name in GRADIENTS]
    with DispatchLog() as log:
        gradients_of(leaves)
    assert {"flashrnn.forward.default", "flashrnn.backward.default"} <= log.seen
    with FunctionLog() as log:
        gradients_of(leaves)
    assert any("flashrnn.forward" in name for name in log.seen)
    with torch.profiler.profile() as profile:
        gradients_of(leaves)
    assert {"flashrnn::forward", "flashrnn::backward"} <= {event.key for event in profile.key_averages()}


def test_a_subclass_comes_back_as_one(direct):
    Wx, R, b = torch.randn(2, 3, 4, 1, 4).as_subclass(Watched), torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4)
    out, _ = flashrnn(Wx, R, b)
    assert type(out) is Watched
    assert direct == [False]


def test_a_pending_negation_is_done_first(direct):
    """Which a tensor may carry as a flag on memory that has the other sign."""
    Wx, R, b = torch.randn(2, 3, 4, 1, 4), torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4)
    flagged = torch.complex(b, b).conj().imag
    assert flagged.is_neg()
    assert torch.equal(flashrnn(Wx, R, flagged)[0], flashrnn(Wx, R, -b)[0])
    assert direct == [False, True]


def test_tracers_see_one_operator():
    tensors = torch.randn(2, 3, 4, 1, 4), torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4)

    class Module(torch.nn.Module):
        def forward(self, Wx, R, b):
            return flashrnn(Wx, R, b)[0]

    graphs = [make_fx(Module())(*tensors), torch.export.export(Module(), tensors).module()]
    graphs += [make_fx(Module(), tracing_mode="fake")(*tensors)]
    for graph in graphs:
        called = [node.target for node in graph.graph.nodes if "flashrnn" in str(node.target)]
        assert called == [torch.ops.flashrnn.forward.default]
        assert torch.equal(graph(*tensors), flashrnn(*tensors)[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_see_the_operator(direct):
    """What functorch does with the operator it does with a call: vmap takes one example after another."""
    Wx, R, b = torch.randn(3, 2, 3, 4, 1, 4), torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4)
    expected = torch.stack([flashrnn(x, R, b)[0] for x in Wx])
    direct.clear()
    assert torch.equal(torch.vmap(lambda x: flashrnn(x, R, b)[0])(Wx), expected)
    assert torch.equal(torch.func.functionalize(lambda x: flashrnn(x, R, b)[0])(Wx[0]), expected[0])
    assert direct == [False, False]


def test_inside_another_operator_there_is_no_autograd():
    """Its own autograd is above it: what it calls records nothing, though gradients are asked for."""
    recorded = []

    @torch.library.custom_op("flashrnn_test::twice", mutates_args=())
    def twice(Wx: torch.Tensor, R: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out, _ = flashrnn(Wx, R, b)
        recorded.append(out.requires_grad)
        return 2 * out

    Wx, R, b = torch.randn(2, 3, 4, 1, 4, requires_grad=True), torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4)
    torch.testing.assert_close(twice(Wx, R, b), 2 * flashrnn(Wx, R, b)[0])
    assert recorded == [False]
