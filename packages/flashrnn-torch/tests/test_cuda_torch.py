"""cuda_fused and cuda among torch's machinery on a GPU: compile, graphs, streams, autocast, memory, gradients."""

import itertools

import pytest
import torch
from checks import run
from problems import GRADIENTS, Case, build

from flashrnn import flashrnn, gradients
from flashrnn_core import get_cell

pytestmark = pytest.mark.gpu

# One case for each way in which blocks exchange their vector on sm90 (one block, a cluster, L2): no two tests need
# other kernels than these where they can do with them.
BLOCK = Case("gru", B=5, T=9, N=3, D=24, dtype="bfloat16", states="float32")
CLUSTER = Case("lstm", B=5, T=9, N=3, D=64, dtype="bfloat16", states="float32")
GLOBAL = Case("slstm", B=5, T=9, N=1, D=640, dtype="bfloat16", states="float32")
# And for cuda one whose R is streamed, and one with several teams of warps in a block.
STREAMED = Case("gru", B=5, T=9, N=1, D=3072, dtype="bfloat16", states="float32")
TEAMS = Case("lstm", B=256, T=9, N=3, D=64, dtype="bfloat16", states="float32")
RUNS = [*itertools.product(["cuda_fused"], [BLOCK, CLUSTER, GLOBAL]), ("cuda", STREAMED), ("cuda", TEAMS)]
CASES = pytest.mark.parametrize(("backend", "case"), RUNS, ids=str)
BACKENDS = pytest.mark.parametrize("backend", ["cuda_fused", "cuda"])


@pytest.fixture
def pieces(monkeypatch):
    """Inside, a backward takes several pieces of time, on two streams."""
    monkeypatch.setattr(gradients, "LEAST_STEPS", 3)
    monkeypatch.setattr(gradients, "BESIDE", 0)
    assert all(len(gradients.pieces(case.problem)) == 3 for _, case in RUNS)


def leaves_of(inputs):
    return [inputs.tensors[name].requires_grad_() for name in GRADIENTS]


def step(inputs, leaves, backend, **options):
    """Outputs and gradients of one call."""
    masks = {name: inputs.tensors[name] for name in ("resets", "lengths")}
    out = flashrnn(*leaves, inputs.case.cell, backend=backend, **masks, **options)
    wanted = [x for x in leaves if x.requires_grad]
    return *out, *torch.autograd.grad(out, wanted, (inputs.dstates, inputs.dlast_states))


def assert_same(result, expected):
    for number, (one, other) in enumerate(zip(result, expected, strict=True)):
        assert torch.equal(one, other), f"tensor {number}: {(one - other).abs().max()}"


@BACKENDS
def test_compiles_fully_with_dynamic_time(backend):
    """torch.compile(fullgraph=True), forward and backward, no graph for each T."""
    torch.compiler.reset()

    def loss(Wx, R, b, states):
        out, last = flashrnn(Wx, R, b, states, backend=backend)
        return out[0].float().square().mean() + last.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for T in (6, 9, 12):
        leaves = leaves_of(build(CLUSTER.but(T=T), "cuda"))
        want = torch.autograd.grad(loss(*leaves), leaves)
        with torch.compiler.set_stance("default" if T == 6 else "fail_on_recompile"):
            got = torch.autograd.grad(compiled(*leaves), leaves)
        for one, other in zip(got, want, strict=True):
            assert (one - other).norm() <= 1e-2 * other.norm()


@CASES
def test_cuda_graph(backend, case, pieces):
    """Captured forward and backward replay, many times, on new values: bit for bit what an eager call gives."""
    inputs = build(case.but(lengths=True, resets=True), "cuda")
    leaves = leaves_of(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(inputs, leaves, backend)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs, leaves, backend)
    for _ in range(5):
        with torch.no_grad():
            leaves[0].copy_(torch.randn_like(leaves[0]))
            leaves[3].copy_(torch.rand_like(leaves[3]))
            inputs.tensors["lengths"].random_(0, case.T + 1)
            inputs.tensors["resets"].copy_(torch.rand(case.B, case.T, device="cuda") < 0.3)
        graph.replay()
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert_same(replayed, step(inputs, leaves, backend))


@CASES
def test_runs_on_the_callers_stream(backend, case, pieces):
    """In order with what is before and after it on that stream, though the default stream is idle."""
    inputs = build(case, "cuda")
    expected = step(inputs, leaves_of(inputs), backend)
    empty = build(case.but(seed=1), "cuda")
    leaves = leaves_of(empty)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # cycles; the right values come after it
        with torch.no_grad():
            for x, name in zip(leaves, GRADIENTS, strict=True):
                x.copy_(inputs.tensors[name])
        empty.dstates.copy_(inputs.dstates)
        empty.dlast_states.copy_(inputs.dlast_states)
        result = [x.clone() for x in step(empty, leaves, backend)]
    side.synchronize()
    assert_same(result, expected)


def test_streams_at_once(pieces):
    """Kernels that wait for their own blocks do not wait for ever where others take the chip."""
    many = [(build(case.but(seed=seed), "cuda"), backend) for seed in range(3) for backend, case in RUNS]
    expected = [step(inputs, leaves_of(inputs), backend) for inputs, backend in many]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(6)]
    for _ in range(10):
        results = []
        for (inputs, backend), stream in zip(many, itertools.cycle(streams), strict=False):
            with torch.cuda.stream(stream):
                results.append(step(inputs, leaves_of(inputs), backend))
        torch.cuda.synchronize()
        for result, want in zip(results, expected, strict=True):
            assert_same(result, want)


@BACKENDS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast(dtype, backend):
    """The compute dtype is autocast's, an explicit dtype goes before it, gradients come in the leaves' dtypes."""
    inputs = build(CLUSTER.but(dtype="float32"), "cuda")
    leaves = leaves_of(inputs)
    expected, exact = step(inputs, leaves, backend, dtype=dtype), step(inputs, leaves, backend)
    with torch.autocast("cuda", dtype=getattr(torch, dtype)):
        assert_same(step(inputs, leaves, backend), expected)
        assert_same(step(inputs, leaves, backend, dtype="float32"), exact)
        assert flashrnn(*leaves[:3], backend=backend)[0].dtype == getattr(torch, dtype)
    assert {x.dtype for x in expected} == {torch.float32}
    assert not torch.equal(exact[0], expected[0])


@CASES
def test_inference_and_hidden_only(backend, case):
    """The same bits whether or not a gradient is to come, and whether or not all states are returned."""
    inputs = build(case.but(lengths=True), "cuda")
    expected = run(inputs, backend)
    tensors, options = inputs.tensors, {"function": case.cell, "backend": backend}
    with torch.inference_mode():
        states, last = flashrnn(**tensors, **options)
        h, last_too = flashrnn(**tensors, **options, hidden_only=True)
    full, final = expected["states"], expected["last_states"]
    assert_same((states, last, h, last_too), (full, final, full[:1], final))


@BACKENDS
def test_gradient_of_some(backend):
    """Only what is asked for, and as it is among all."""
    inputs = build(CLUSTER, "cuda")
    expected = run(inputs, backend)
    for names in (("R",), ("b", "states"), ("Wx", "b")):
        leaves = [inputs.tensors[k].detach().requires_grad_(k in names) for k in GRADIENTS]
        asked = [k for k in GRADIENTS if k in names]
        assert_same(step(inputs, leaves, backend)[2:], [expected[f"d{k}"] for k in asked])


@BACKENDS
def test_second_gradient_raises_and_names_vanilla(backend):
    leaves = leaves_of(build(CLUSTER, "cuda"))
    loss = flashrnn(*leaves, backend=backend)[0].square().sum()
    with pytest.raises(RuntimeError, match=f"ran on '{backend}'.*backend='vanilla'"):
        torch.autograd.grad(loss, leaves, create_graph=True)


def allocated():
    """Bytes in use now, and the most since the last call."""
    torch.cuda.synchronize()
    now, most = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return now, most


@pytest.mark.parametrize(("backend", "case"), [RUNS[1], RUNS[2], ("cuda", GLOBAL), ("cuda", STREAMED)], ids=str)
def test_memory(backend, case):
    """For the backward nothing is kept but what is returned (and of m of sLSTM 16 bits more). In it,
    besides gradients: a piece of h, two of R h in float32, R transposed, and sums of dR. At inference: nothing. A
    plan of `cuda` has a copy of R at each call.
    """
    case = case.but(B=64, T=256, states=None)
    small = 2**20
    inputs = build(case, "cuda")
    run(inputs, backend)
    leaves = [inputs.tensors[name].requires_grad_() for name in GRADIENTS[:3]]
    size = {name: x.numel() * x.element_size() for name, x in zip(GRADIENTS, leaves, strict=False)}
    h = case.B * case.T * case.N * case.D  # elements
    in_cluster = (backend, case.D) == ("cuda_fused", CLUSTER.D)  # else a copy of R, whole fragments, and words in L2
    packed = 0 if in_cluster else 3 * size["R"] // 2
    del inputs
    with torch.inference_mode():
        before, _ = allocated()
        states, last = flashrnn(*leaves, function=case.cell, backend=backend, hidden_only=True)
        _, most = allocated()
        assert most - before <= 2 * h + packed + small
        del states, last
    before, _ = allocated()
    states, last = flashrnn(*leaves, function=case.cell, backend=backend)
    kept, most = allocated()
    cell = get_cell(case.cell)
    returned = 2 * (len(cell.states) + len(cell.float32_states)) * h
    assert kept - before <= returned + small
    assert most - before <= returned + packed + small
    dstates, dlast = torch.ones_like(states), torch.ones_like(last)
    before, _ = allocated()
    gradients = torch.autograd.grad((states, last), leaves, (dstates, dlast))
    after, most = allocated()
    assert after - before <= sum(size.values()) + small
    two_pieces = (2 + 2 * 4 * len(cell.recurrent_gates)) * h * 64 // 256 + 2 * size["R"]  # at least 64 steps each
    sums = 132 * 2**16 if case.N > 1 else 2 * size["R"]  # a tile a multiprocessor; or dR in float32
    if len(cell.input_gates) < len(cell.gates):
        sums += 2 * len(cell.gates) * h  # dpre, of which dWx is a part
    assert (
        most - before
        <= sum(size.values()) + max(two_pieces, sums) + 5 * 4 * len(cell.states) * h // 256 + packed + small
    )
    assert len(gradients) == 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@CASES
def test_second_device(backend, case):
    """The tensors' device, whatever the current one."""
    expected = run(build(case, "cpu"), "vanilla")
    inputs = build(case, "cpu")
    inputs.tensors = {k: None if x is None else x.to("cuda:1") for k, x in inputs.tensors.items()}
    inputs.dstates, inputs.dlast_states = inputs.dstates.to("cuda:1"), inputs.dlast_states.to("cuda:1")
    result = run(inputs, backend)
    for key, want in expected.items():
        assert result[key].device == torch.device("cuda", 1)
        assert (result[key].cpu() - want).norm() <= 2e-2 * want.norm(), key
