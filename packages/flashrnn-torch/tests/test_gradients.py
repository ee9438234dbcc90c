"""What the backends share of the backward: the states that steps consumed, and the matmuls over all steps."""

import math
from dataclasses import replace

import pytest
import torch
from checks import assert_pieces_agree
from problems import CELLS, Case, build
from test_own_cell import odd
from torch.utils._python_dispatch import TorchDispatchMode

from flashrnn import gradients
from flashrnn.backends import cuda_fused
from flashrnn.precision import to_tf32
from flashrnn_core import get_cell
from flashrnn_core.cuda.streamed import make_plan

OPTIONS = [{}, {"resets": True}, {"lengths": True}, {"resets": True, "lengths": True}]
NAMES = pytest.mark.parametrize("name", ["elman", "gru", "lstm", odd], ids=["elman", "gru", "lstm", "odd"])
options = pytest.mark.parametrize("options", OPTIONS, ids=str)
reverse = pytest.mark.parametrize("reverse", [False, True])


def consumed(inputs, out):
    """The states that each step consumed, step by step; zeros where a sequence has ended."""
    states, resets, lengths = (inputs.tensors[name] for name in ("states", "resets", "lengths"))
    before = torch.zeros_like(out)
    S, B, T, N, D = out.shape
    for b in range(B):
        length = T if lengths is None else int(lengths[b])
        state = states[:, b, 0]
        for t in range(length)[:: -1 if inputs.case.reverse else 1]:
            if resets is not None and resets[b, t]:
                state = torch.zeros_like(state)
            before[:, b, t] = state
            state = out[:, b, t]
    return before


def outputs(inputs):
    """Random, zeros in the padding."""
    out = torch.randn(inputs.case.problem.output_shape("states"), dtype=torch.float64)
    lengths = inputs.tensors["lengths"]
    if lengths is not None:
        out *= (torch.arange(inputs.case.T) < lengths[:, None])[..., None, None]
    return out


@reverse
@options
def test_previous_is_the_state_that_each_step_consumed(options, reverse):
    inputs = build(Case("lstm", B=5, T=9, N=2, D=3, dtype="float64", states="float64", reverse=reverse, **options))
    out = outputs(inputs)
    states, resets, lengths = (inputs.tensors[name] for name in ("states", "resets", "lengths"))
    expected = consumed(inputs, out)
    inside = torch.ones(5, 9, dtype=torch.bool) if lengths is None else torch.arange(9) < lengths[:, None]
    for start in range(9):
        for stop in range(start + 1, 10):
            piece = gradients.previous(inputs.case.problem, out, states, resets, lengths, start, stop)
            assert torch.equal(piece[:, inside[:, start:stop]], expected[:, :, start:stop][:, inside[:, start:stop]])
    rounded = gradients.previous(inputs.case.problem, out, states, resets, lengths, dtype=torch.bfloat16)
    assert torch.equal(rounded[:, inside], expected.bfloat16()[:, inside])


class Copied(TorchDispatchMode):
    """The dtypes of what is copied inside."""

    def __init__(self):
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@reverse
@pytest.mark.parametrize(("D", "first", "row"), [(8, 0, 8), (16, 0, 24), (8, 0, 9), (8, 1, 8), (12, 0, 12)])
def test_previous_copies_every_bit(D, first, row, reverse):
    """Rows of 16 bytes or not, and at places that are multiples of it or not: NaN of all kinds, subnormals, -0."""
    case = Case("elman", B=3, T=5, N=2, D=D, dtype="bfloat16", states="bfloat16", reverse=reverse)
    room = torch.randint(-(2**15), 2**15, (first + 3 * 5 * 2 * row,), dtype=torch.int16)
    out = room[first:].view(1, 3, 5, 2, row)[..., :D].view(torch.bfloat16)
    with Copied() as copied:
        piece = gradients.previous(case.problem, out, None, None, None, 1, 4).view(torch.int16)
    assert (torch.complex128 in copied.dtypes) is (first == 0 and D % 8 == row % 8 == 0)
    assert torch.equal(piece, out[:, :, 2:5].view(torch.int16) if reverse else out[:, :, 0:3].view(torch.int16))


@pytest.mark.parametrize("D", [3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_contiguous_is_a_copy_of_gates_that_are_not(D, dtype):
    dpre = torch.randn(2, 3, 4, 2, D).to(dtype)
    for gates in (dpre, dpre[:, :, :3], dpre[:, :, 1:], dpre[..., 1:], dpre[:0, :, 1:]):
        found = gradients.contiguous(gates)
        assert found.is_contiguous()
        assert torch.equal(found, gates)
        assert (found is gates) is gates.is_contiguous()


@pytest.mark.parametrize("N", [1, 3])
@NAMES
def test_recurrent_part(name, N):
    problem = Case(name, B=3, T=4, N=N, D=5).problem
    R = torch.randn(problem.shape("R"), dtype=torch.float64)
    met = torch.randn(3, 4, N, 5, dtype=torch.float64)
    found = gradients.recurrent_part(gradients.transposed(R), met)
    torch.testing.assert_close(found, torch.einsum("gndp,btnp->btgnd", R, met), rtol=1e-12, atol=1e-12)


def dpre_of(inputs):
    """Random, zeros in the padding."""
    problem = inputs.case.problem
    dpre = torch.randn(*problem.shape("Wx")[:2], problem.size("G"), problem.N, problem.D, dtype=torch.float64)
    lengths = inputs.tensors["lengths"]
    return dpre if lengths is None else dpre * (torch.arange(problem.T) < lengths[:, None])[..., None, None, None]


@pytest.mark.parametrize("states", ["float64", None])
@pytest.mark.parametrize("N", [1, 3])
@reverse
@options
@NAMES
def test_parameter_gradients_are_sums_over_batch_and_time(name, options, reverse, N, states):
    case = Case(name, B=5, T=4, N=N, D=3, states="float64", reverse=reverse, **options)
    inputs = build(case)
    if states is None:
        inputs.tensors["states"].zero_()
    out, dpre = outputs(inputs), dpre_of(inputs)
    before, kept = consumed(inputs, out)[0], dpre.clone()
    given = None if states is None else inputs.tensors["states"]
    masks = inputs.tensors["resets"], inputs.tensors["lengths"]
    gates = list(get_cell(name).recurrent_gates)
    dR, db = gradients.parameter_gradients(case.problem, dpre, out[0], given, *masks, True, True)
    torch.testing.assert_close(dR, torch.einsum("btgnd,btnp->gndp", dpre[:, :, gates], before), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(db, dpre.sum((0, 1)), rtol=1e-12, atol=1e-12)
    assert torch.equal(dpre, kept)
    assert gradients.parameter_gradients(case.problem, dpre, out[0], given, *masks, False, False) == (None, None)


def test_tf32_has_ten_bits():
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -1 - 2**-11, 3e38, torch.inf, 0.0])
    want = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-10, 1.0, -1 - 2**-10, 3e38, torch.inf, 0.0])
    torch.testing.assert_close(to_tf32(x), want, rtol=2**-11, atol=0.0)
    assert torch.equal(to_tf32(x)[:5], want[:5])
    assert torch.equal(to_tf32(to_tf32(x)), to_tf32(x))
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)  # the first is a GPU's
    assert to_tf32(nan).isnan().all()


def test_dR_is_of_the_rounded_h():
    """`vanilla` keeps h and dpre in float32; h was rounded where it met R, initial states too."""
    problem = Case("lstm", B=3, T=4, N=1, D=5, dtype="bfloat16", states="float32").problem
    dpre, h = torch.randn(3, 4, 4, 1, 5), torch.randn(3, 4, 1, 5)
    states = torch.randn(problem.shape("states"))
    met = torch.cat([states[0], h[:, :-1]], 1).bfloat16().float()
    dR, _ = gradients.parameter_gradients(problem, dpre, h, states, None, None, True, False)
    torch.testing.assert_close(dR, torch.einsum("btgnd,btnp->gndp", dpre, met), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "B", "T", "N", "D"),
    [
        ("lstm", 16, 100, 12, 64),
        ("gru", 3, 1, 2, 8),
        ("gru", 40, 33, 3, 200),
        ("elman", 1, 1000, 5, 24),
        ("slstm", 7, 63, 2, 520),
    ],
)
def test_parameter_gradients_in_one_pass(name, B, T, N, D, dtype):
    """The kernel for several heads against float64, and the same bits each time."""
    problem = Case(name, B=B, T=T, N=N, D=D, dtype=dtype, states="float32").problem
    torch.manual_seed(0)
    dpre = torch.randn(B, T, len(problem.cell.gates), N, D, device="cuda").to(getattr(torch, dtype))
    h = torch.randn(B, T, N, D, device="cuda").to(dpre.dtype)
    dR, db = gradients.parameter_gradients(problem, dpre, h, None, None, None, True, True)
    gates = list(problem.cell.recurrent_gates)
    want = torch.einsum("btgnd,btnp->gndp", dpre[:, 1:, gates].double(), h[:, :-1].double())
    assert (dR - want).norm() <= 1e-5 * want.norm()
    want = dpre.double().sum((0, 1))
    assert (db - want).norm() <= 1e-5 * want.norm()
    again = gradients.parameter_gradients(problem, dpre, h, None, None, None, True, True)
    assert all(torch.equal(one, other) for one, other in zip(again, (dR, db), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "T", "D"), [(16, 1024, 512), (16, 1000, 2048), (200, 300, 768)])
def test_db_takes_little_memory(B, T, D):
    """Sums of 64 rows, in twice the bytes of an element: a thirty-second of dpre, and their sums."""
    problem = Case("lstm", B=B, T=T, N=1, D=D, dtype="bfloat16", states="float32").problem
    dpre = torch.randn(B, T, 4, 1, D, device="cuda").bfloat16()
    h = torch.randn(B, T, 1, D, device="cuda").bfloat16()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, db = gradients.parameter_gradients(problem, dpre, h, None, None, None, False, True)
    assert torch.cuda.max_memory_allocated() - before <= dpre.numel() * 2 / 16 + 2**20
    want = dpre.double().sum((0, 1))
    assert (db - want).norm() <= 1e-5 * want.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"resets": True, "lengths": True}], ids=str)
@reverse
@pytest.mark.parametrize("D", [24, 640])
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("beside", [False, True])
def test_fused_gradients_by_pieces(name, D, reverse, options, beside, monkeypatch):
    """Pieces of time change the order in which matmuls add, and nothing else; on two streams or on one."""
    monkeypatch.setattr(gradients, "BESIDE", 0 if beside else math.inf)
    case = Case(name, B=3, T=9, D=D, dtype="bfloat16", states="float32", reverse=reverse, clip=0.1, **options)
    assert_pieces_agree(build(case, "cuda"), "cuda_fused", more_than=3)


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [-1, 1, 0])
def test_db_beside_dR_is_what_it_is_alone(shift, monkeypatch):
    """The rows that are zero for the while of the matmul are in it, and dpre is as it was."""
    problem = Case("lstm", B=3, T=200, N=1, D=256, dtype="bfloat16", states=None).problem
    problem = replace(problem, reverse=shift > 0, resets=shift == 0)
    torch.manual_seed(0)
    dpre = torch.randn(3, 200, 4, 1, 256, device="cuda").bfloat16()
    h, given = torch.randn(3, 200, 1, 256, device="cuda").bfloat16(), dpre.clone()
    resets = None if shift else torch.zeros(3, 200, dtype=torch.bool, device="cuda")
    found = []
    for beside in (0, math.inf):
        monkeypatch.setattr(gradients, "BESIDE", beside)
        found.append(gradients.parameter_gradients(problem, dpre, h, None, resets, None, True, True))
    (dR, db), (dR_alone, _) = found
    want = given.double().sum((0, 1))
    assert (db - want).norm() <= 1e-5 * want.norm()
    assert torch.equal(dR, dR_alone)
    assert torch.equal(dpre, given)
    assert gradients.parameter_gradients(problem, dpre, h, None, resets, None, True, False)[1] is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [  # groups in three rounds; two teams, one without an item at last
        Case("gru", B=1, T=9, N=3, D=2048, dtype="bfloat16", states="float32", clip=0.1),
        Case("lstm", B=40, T=9, N=1, D=1024, dtype="bfloat16", states="float32", resets=True, lengths=True),
    ],
    ids=str,
)
def test_pairs_go_on_with_the_vectors_of_the_piece_before(case):
    plan = cuda_fused._plan(case.problem, True, True, "bfloat16", 0, make_plan)
    assert plan.SPLIT == 2
    assert_pieces_agree(build(case, "cuda"), "cuda", more_than=3)
