"""What all backends share of the backward: pieces of time, the h that met R, R h of many steps at once, and
dWx, dR, db from dpre."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable

import torch

from flashrnn.precision import exact_dtype
from flashrnn_core.contract import Problem

SHARES = 0.45, 0.53  # what a backward holds of one piece of time, or of two, about, in bytes of Wx
MOST = 0.56, 0.61  # of it and of what the forward has saved together
LEAST_STEPS = 64  # of a piece
BESIDE = (
    4e10  # operations of R h, over all steps, from which two pieces are held, one made beside the scan of the other
)


def pieces(problem: Problem, saved: int = 0) -> list[tuple[int, int]]:
    """The time in pieces (start, stop). Of a piece the h that met R is held for a while, and R h, in float32 (float64),
    of one or of two. `saved`: bytes that a forward has saved, of a head dim and a step.
    """
    element = {"float64": 8, "float32": 4}.get(problem.dtype, 2)
    beside = _beside(problem)
    held = element + (1 + beside) * max(element, 4) * problem.size("Gr")
    Wx = element * problem.size("Gw")
    count = round(held / min(SHARES[beside] * Wx, max(MOST[beside] * Wx - saved, Wx / 4)))
    steps = max(LEAST_STEPS, -(-problem.T // max(count, 1)))
    return [(start, min(start + steps, problem.T)) for start in range(0, problem.T, steps)]


def _beside(problem: Problem) -> bool:
    """A tenth of a millisecond of matmul on an H100: below, more launches cost more than what they hide."""
    return 2 * problem.B * problem.T * problem.N * problem.D**2 * problem.size("Gr") >= BESIDE


def first(out, states) -> torch.Tensor:
    """[S' B 1 N D]: the first S' initial states, in the dtype of the outputs [S' B T N D]."""
    S, B, _, N, D = out.shape
    return out.new_zeros(S, B, 1, N, D) if states is None else states[:S].to(out.dtype)


def is_first(problem: Problem, start: int, stop: int) -> bool:
    """Whether the steps from start to stop are those that come first, after the initial states."""
    return stop == problem.T if problem.reverse else start == 0


def step_before(problem: Problem, start: int, stop: int) -> int:
    """That which comes before the steps from start to stop, which are not the first."""
    return stop if problem.reverse else start - 1


def edge(problem: Problem, out, states, lengths, start: int, stop: int) -> torch.Tensor:
    """[S' B 1 N D]: the state with which the steps from start to stop begin, before any reset."""
    if is_first(problem, start, stop):
        return first(out, states)
    step = step_before(problem, start, stop)
    before = out[:, :, step : step + 1]
    if not problem.reverse or lengths is None:
        return before
    # A sequence starts at its own end, where the next output is of the padding.
    return torch.where((lengths > stop)[:, None, None, None], before, first(out, states))


def previous(
    problem: Problem, out, states, resets, lengths, start: int = 0, stop: int | None = None, dtype=None
) -> torch.Tensor:
    """[S' B T' N D]: the first S' states that each step from start to stop consumed, from the outputs [S' B T N D]."""
    S, B, T, N, D = out.shape
    stop = T if stop is None else stop
    before = out.new_empty(S, B, stop - start, N, D, dtype=dtype)
    if stop == start:
        return before
    if problem.reverse:
        _copy(out[:, :, start + 1 : stop], before[:, :, :-1])
    else:
        _copy(out[:, :, start : stop - 1], before[:, :, 1:])
    begin = before[:, :, -1:] if problem.reverse else before[:, :, :1]
    if states is None and is_first(problem, start, stop):
        begin.zero_()
    else:
        begin.copy_(edge(problem, out, states, lengths, start, stop))
    if problem.reverse and lengths is not None:
        begins = torch.arange(start + 1, stop + 1, device=out.device) >= lengths[:, None]
        before = torch.where(begins[..., None, None], first(out, states).to(before.dtype), before)
    if resets is not None:
        before.masked_fill_(resets[:, start:stop, None, None], 0.0)
    return before


def contiguous(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it that is."""
    if x.is_contiguous():
        return x
    to = torch.empty_like(x, memory_format=torch.contiguous_format)
    _copy(x, to)
    return to


def _copy(x: torch.Tensor, to: torch.Tensor) -> None:
    """In elements of 16 bytes where both are of such: faster, and an eighth of the blocks, for which a scan waits.
    Not every device knows complex numbers.
    """
    if x.device.type in ("cpu", "cuda") and x.dtype == to.dtype and not any(_unit(t) % 16 for t in (x, to)):
        x, to = x.view(torch.complex128), to.view(torch.complex128)
    to.copy_(x)


def _unit(x: torch.Tensor) -> int:
    """A number of bytes of which x's addresses and the length of its rows are multiples."""
    if x.stride(-1) != 1:
        return x.element_size()
    counts = x.storage_offset(), x.shape[-1], *x.stride()[:-1]
    return math.gcd(x.data_ptr(), *(count * x.element_size() for count in counts))


def transposed(R: torch.Tensor) -> torch.Tensor:
    """[N P (Gr D)] of R [Gr N D P], as `recurrent_part` takes it; a view for N = 1."""
    return R.permute(1, 3, 0, 2).reshape(R.shape[1], R.shape[3], -1)


def recurrent_part(Rt: torch.Tensor, met: torch.Tensor, room: torch.Tensor | None = None) -> torch.Tensor:
    """R h of all steps of the h that met R [B T N P] in one matmul: [B T Gr N D], a view of [N, B T, Gr D], which is
    in `room`, the memory given, or new.
    """
    B, T, N, D = met.shape
    if room is not None:
        room = room[: N * B * T * Rt.shape[2]].view(N, B * T, -1)
    return multiply(met.reshape(B * T, N, D).transpose(0, 1), Rt, room).view(N, B, T, -1, D).permute(1, 2, 3, 0, 4)


def by_pieces(
    problem: Problem,
    Rt: torch.Tensor,
    met: Callable[[int, int], torch.Tensor],
    scan: Callable[[int, int, torch.Tensor], None],
    saved: int = 0,
) -> None:
    """Calls scan(start, stop, R h of these steps) for each of `pieces(problem, saved)`, in the order of the backward.
    `met(start, stop)`: the h that met R [B T' N P].

    On a GPU the scans of a large problem run on a stream of their own, and the next piece's R h beside them: a scan
    waits most of its time, and leaves multiprocessors free. The stream has priority, else a matmul takes the
    multiprocessors first and the scan waits for it.
    """
    order = pieces(problem, saved) if problem.reverse else pieces(problem, saved)[::-1]
    steps = max(stop - start for start, stop in order)
    size = problem.B * steps * Rt.shape[0] * Rt.shape[2]
    beside = Rt.is_cuda and len(order) > 1 and _beside(problem)
    rooms = [Rt.new_empty(size, dtype=exact_dtype(Rt)) for _ in range(2 if beside else 1)]

    def compute(number: int) -> torch.Tensor:
        return recurrent_part(Rt, met(*order[number]), rooms[number % len(rooms)])

    if not beside:
        for number, (start, stop) in enumerate(order):
            scan(start, stop, compute(number))
        return
    here = torch.cuda.current_stream(Rt.device)
    first = _stream_beside(here)
    first.wait_stream(here)
    scanned: list[torch.cuda.Event] = []
    try:
        for number, (start, stop) in enumerate(order):
            if number > 1:
                here.wait_event(scanned[number - 2])  # which is done with the room
            rec = compute(number)
            first.wait_event(here.record_event())
            with torch.cuda.stream(first):
                scan(start, stop, rec)
            scanned.append(first.record_event())
    finally:
        here.wait_stream(first)


@functools.lru_cache(maxsize=32)
def _stream_beside(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """One for each of the first 32, as many as PyTorch has, so that nothing else is captured with it into a graph."""
    return torch.cuda.Stream(stream.device, priority=-1)  # before the default, 0


def input_gradient(problem: Problem, dpre: torch.Tensor) -> torch.Tensor:
    """dWx [B T Gw N D] from dpre [B T G N D]."""
    gates = problem.cell.input_gates
    return dpre if len(gates) == dpre.shape[2] else _gates(dpre, gates)


def parameter_gradients(problem: Problem, dpre, h, states, resets, lengths, needs_R: bool, needs_b: bool):
    """(dR [Gr N D P], db [G N D]) from dpre [B T G N D] and the outputs h [B T N D], in float32 (float64); None for one
    that is not needed. dR[g,n,d,p] = sum over b, t of dpre[b,t,g,n,d] h[b,t-1,n,p], db = sum over b, t of dpre.

    A step's h stands one row before it, so the outputs serve as they are, save at the first step of each sequence,
    whose product with the initial states is added. Where h was not all that met R (resets), or was rounded before it
    did, it is copied.
    """
    compute = getattr(torch, problem.dtype)
    if not needs_R or dpre.numel() == 0:
        dR = dpre.new_zeros(problem.shape("R"), dtype=exact_dtype(dpre)) if needs_R else None
        return dR, _sum(dpre) if needs_b else None
    as_it_is = h.dtype == dpre.dtype == compute and dpre.is_contiguous() and h.is_contiguous()
    if resets is None and as_it_is:
        dR, db = _products(problem, dpre, h, 1 if problem.reverse else -1, needs_b)
        if states is not None:
            begins = dpre[:, -1 if problem.reverse else 0]
            if problem.reverse and lengths is not None:
                last = (lengths - 1).clamp(0, problem.T - 1).long()
                begins = dpre[torch.arange(problem.B, device=dpre.device), last]
            dR += _multiplied(problem, begins, states[0, :, 0].to(dpre.dtype))
    else:
        met = previous(problem, h[None], states, resets, lengths, dtype=compute)[0]
        dR, db = _products(problem, dpre, met.to(dpre.dtype), 0, needs_b)
    return dR, db


def _products(problem: Problem, dpre, h, shift: int, needs_b: bool):
    """(dR, db) of dpre [B T G N D] and h [B T N P], of which a step met that of `shift` steps on, if there is one."""
    if dpre.is_cuda and dpre.element_size() == 2 and dpre.is_contiguous() and one_pass(problem):
        dR, db = _product(problem, dpre, h, shift)
        return dR, db if needs_b else None
    rows = dpre.flatten(0, 1), h.flatten(0, 1)
    if shift == 0:
        with _summed(problem, dpre, needs_b) as db:
            return _multiplied(problem, *rows), db
    first, earlier, later = 0 if shift < 0 else -1, slice(None, -1), slice(1, None)
    begins = dpre[:, first].clone()
    dpre[:, first] = 0.0  # for the while: the row before is of another sequence
    with _summed(problem, dpre, needs_b) as db:
        dR = _multiplied(problem, rows[0][earlier if shift > 0 else later], rows[1][later if shift > 0 else earlier])
        rest = begins.sum(0, dtype=dR.dtype) if needs_b else None
    dpre[:, first] = begins
    return dR, None if db is None else db.add_(rest)


@contextlib.contextmanager
def _summed(problem: Problem, dpre, needed: bool):
    """db, or None. Of a large problem on a GPU it is made beside what the block does: a sum waits for memory, a matmul
    for arithmetic.
    """
    if not (needed and dpre.is_cuda and _beside(problem)):
        yield _sum(dpre) if needed else None
        return
    here = torch.cuda.current_stream(dpre.device)
    other, db = _stream_beside(here), dpre.new_empty(problem.shape("b"), dtype=exact_dtype(dpre))
    other.wait_stream(here)
    try:
        with torch.cuda.stream(other):
            db.copy_(_sum(dpre))
        yield db
    finally:
        here.wait_stream(other)


def _multiplied(problem: Problem, dpre, met):
    """dR of rows of dpre [rows G N D] and of the h that met R [rows N P]."""
    gates = problem.cell.recurrent_gates
    N, D = met.shape[1:]
    rows = _gates(dpre, gates).permute(2, 0, 1, 3).reshape(N, -1, len(gates) * D).transpose(1, 2)  # a copy for N > 1
    return multiply(rows, met.transpose(0, 1)).view(N, len(gates), D, D).transpose(0, 1)


def one_pass(problem: Problem) -> bool:
    """Whether dR and db come from our kernel, of a dpre in 16 bits on a GPU: of several heads a library would want it
    in another order; of one it is faster than our kernel.
    """
    return problem.dtype in ("bfloat16", "float16") and problem.N > 1 and problem.D % 8 == 0


def _product(problem: Problem, dpre, h, shift: int):
    from flashrnn_core.cuda.product import call_for

    call = call_for(problem.dtype, dpre.device.index, tuple(dpre.shape), problem.cell.recurrent_gates, shift)
    memory = dpre.new_empty(call.floats, dtype=torch.float32)
    dR = dpre.new_empty(problem.shape("R"), dtype=torch.float32)
    db = dpre.new_empty(problem.shape("b"), dtype=torch.float32)
    tensors = dpre, h.contiguous(), memory, dR, db
    with torch.cuda.device(dpre.device):
        call.launch([x.data_ptr() for x in tensors], torch.cuda.current_stream().cuda_stream)
    return dR, db


def multiply(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x y for each head, accumulated and returned in float32 (float64)."""
    if x.dtype in (torch.float32, torch.float64):
        return torch.bmm(x, y, out=out)
    if x.is_cuda:
        return torch.bmm(x, y, out_dtype=torch.float32, out=out)
    return torch.bmm(x.float(), y.float(), out=out)


def _gates(dpre: torch.Tensor, gates: tuple[int, ...]) -> torch.Tensor:
    """Of dpre [… G N D]: a view where the gates follow one another, else a copy."""
    if gates == tuple(range(gates[0], gates[-1] + 1)):
        return dpre[..., gates[0] : gates[-1] + 1, :, :]
    return dpre[..., list(gates), :, :]


def _sum(dpre: torch.Tensor) -> torch.Tensor:
    """db [G N D] of dpre [B T G N D], in float32 (float64). By 64 rows and 64 of their sums: where PyTorch (2.11) cuts
    a sum into parts for many blocks, these take as much memory as dpre itself.
    """
    rows, wide = dpre.flatten(0, 1), exact_dtype(dpre)
    while len(rows) > 64:
        whole = len(rows) // 64 * 64
        sums = rows[:whole].unflatten(0, (-1, 64)).sum(1, dtype=wide)
        rest = rows[whole:].sum(0, keepdim=True, dtype=wide)
        rows = torch.cat([sums, rest]) if whole < len(rows) else sums
    return rows.sum(0, dtype=wide)
