"""The triton backend on a GPU: the rule of `checks`, repeats bit for bit, compilations, graphs, a user's own cell."""

import pytest
import torch
from checks import assert_tf32, run
from problems import CELLS, KERNEL_DTYPES, Case, build, grid
from rule import Rule
from test_own_cell import every_word

from flashrnn import flashrnn

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

HEAD_DIMS = (8, 16, 24, 48, 64, 96, 128, 192, 256)
SIZES = {"B": (1, 3, 16, 40, 128), "T": (1, 2, 63, 512), "N": (1, 3, 12)}
GRID = list(grid("triton", HEAD_DIMS, SIZES, 2**22))
TF32 = [
    Case(name, B=3, T=63, D=D, dtype="float32", states="float32")
    for name, D in (("gru", 24), ("lstm", 64), ("lstm", 128), ("slstm", 128), ("elman", 192))
]
REPEATED = [
    Case(name, B=40, T=63, N=3, D=D, dtype="bfloat16", states="float32", resets=True)
    for name in CELLS
    for D in (64, 160)
]
OWN = [
    Case(every_word, B=18, T=9, D=D, dtype=dtype, states="float32", resets=True)
    for D in (24, 160)
    for dtype in KERNEL_DTYPES
]


class TestNumbers(Rule):
    backend = "triton"
    repeats = 3

    def test_tf32(self, case):
        """Not the gradient of sLSTM: Triton cuts operands to tf32, where others round, and an error three times as
        large turns a maximum of sLSTM the other way now and then, where its gradient jumps.
        """
        assert_tf32(case, self.backend, "cuda", gradients=case.cell != "slstm")


def test_new_B_and_T_compile_nothing(monkeypatch):
    import triton

    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *_, **k: compiled.append(k["repr"]))
    for D in (24, 200):
        run(build(Case("lstm", B=3, T=7, D=D, dtype="bfloat16", states=None), "cuda"), "triton")
        assert compiled, "the hook sees no compilation"
        compiled.clear()
        for B, T in ((1, 1), (1, 16), (16, 1), (16, 32), (17, 33), (64, 2), (2100, 2)):  # the last in larger tiles
            run(build(Case("lstm", B=B, T=T, D=D, dtype="bfloat16", states=None), "cuda"), "triton")
        assert not compiled


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compiles_fully_and_once(compiler):
    """torch.compile(fullgraph=True), forward and backward: one graph for all B and T, but for guards of inductor's."""
    torch.compiler.reset()
    R, b = (x.cuda().requires_grad_() for x in (torch.randn(4, 2, 32, 32) / 6, torch.randn(4, 2, 32)))

    def loss(Wx, R, b):
        states, last = flashrnn(Wx, R, b, backend="triton")
        return states[0].square().mean() + last.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=compiler)
    once = "fail_on_recompile" if compiler == "aot_eager" else "default"
    for B, T in ((3, 5), (7, 9), (6, 12)):  # none equal to another size, which torch would then take for the same
        Wx = torch.randn(B, T, 4, 2, 32, device="cuda", requires_grad=True)
        want = torch.autograd.grad(loss(Wx, R, b), (Wx, R, b))
        with torch.compiler.set_stance("default" if T == 5 else once):
            got = torch.autograd.grad(compiled(Wx, R, b), (Wx, R, b))
        for one, other in zip(want, got, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("D", [64, 160])
def test_cuda_graph(D):
    """Captured forward and backward replay on new values."""
    inputs = build(Case("slstm", B=5, T=9, D=D, dtype="bfloat16", states="float32", lengths=True), "cuda")
    run(inputs, "triton")  # compiles
    leaves = [inputs.tensors[name].requires_grad_() for name in ("Wx", "R", "b", "states")]
    lengths = inputs.tensors["lengths"]

    def step():
        out = flashrnn(*leaves, "slstm", backend="triton", lengths=lengths)
        return *out, *torch.autograd.grad(out, leaves, (inputs.dstates, inputs.dlast_states))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
        lengths.copy_(torch.randint_like(lengths, 0, 10))
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        assert torch.equal(one, other)


def test_larger_D_raises_and_names_what_runs():
    inputs = build(Case("lstm", D=300, dtype="bfloat16", states=None), "cuda")
    with pytest.raises(NotImplementedError, match="cuda_fused"):
        run(inputs, "triton")
