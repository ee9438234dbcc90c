"""What all backends share of the backward: the states each step consumed, and dWx, dR, db from dpre."""

from __future__ import annotations

import torch

from flashrnn_core.contract import Problem

CHUNK_STEPS, CHUNK_BYTES = 256, 256 * 2**20  # what a backward computes at once: these steps, or more up to these bytes


def chunks(problem: Problem) -> list[tuple[int, int]]:
    """The time in pieces (start, stop), so that what a step of the backward needs for a while stays small."""
    step = 4 * problem.B * problem.size("Gr") * problem.N * problem.D
    steps = max(CHUNK_STEPS, CHUNK_BYTES // max(step, 1))
    return [(start, min(start + steps, problem.T)) for start in range(0, problem.T, steps)]


def edge(problem: Problem, out, states, lengths, start: int, stop: int) -> torch.Tensor:
    """[S' B 1 N D]: the state with which the steps from start to stop begin, before any reset."""
    first = _first(out, states)
    if not problem.reverse:
        return out[:, :, start - 1 : start] if start > 0 else first
    if stop == out.shape[2]:
        return first
    before = out[:, :, stop : stop + 1]  # a sequence starts at its own end, where the next output is of the padding
    return before if lengths is None else torch.where((lengths > stop)[:, None, None, None], before, first)


def previous(problem: Problem, out, states, resets, lengths, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """[S' B T' N D]: the first S' states that each step from start to stop consumed, from the outputs [S' B T N D]."""
    T = out.shape[2]
    stop = T if stop is None else stop
    if T == 0:
        return out
    begin = edge(problem, out, states, lengths, start, stop)
    if problem.reverse:
        before = torch.cat([out[:, :, start + 1 : stop], begin], 2)
        if lengths is not None:
            begins = torch.arange(start + 1, stop + 1, device=out.device) >= lengths[:, None]
            before = torch.where(begins[..., None, None], _first(out, states), before)
    else:
        before = torch.cat([begin, out[:, :, start : stop - 1]], 2)
    if resets is not None:
        before = before.masked_fill(resets[:, start:stop, None, None], 0.0)
    return before


def _first(out, states) -> torch.Tensor:
    """[S' B 1 N D]: the first S' initial states, in the dtype of the outputs [S' B T N D]."""
    S, B, _, N, D = out.shape
    return out.new_zeros(S, B, 1, N, D) if states is None else states[:S].to(out.dtype)


def transposed(R: torch.Tensor) -> torch.Tensor:
    """[N P (Gr D)] of R [Gr N D P], as `recurrent_part` takes it."""
    return R.permute(1, 3, 0, 2).reshape(R.shape[1], R.shape[3], -1)


def recurrent_part(Rt: torch.Tensor, h_before: torch.Tensor) -> torch.Tensor:
    """R h of all steps of h_before [B T N P] in one matmul: [B T Gr N D], a view of [N, B T, Gr D]."""
    B, T, N, D = h_before.shape
    h = h_before.to(Rt.dtype).reshape(B * T, N, D).transpose(0, 1)
    return multiply(h, Rt).view(N, B, T, -1, D).permute(1, 2, 3, 0, 4)


def input_gradient(problem: Problem, dpre: torch.Tensor) -> torch.Tensor:
    """dWx [B T Gw N D] from dpre [B T G N D]."""
    gates = problem.cell.input_gates
    return dpre if len(gates) == dpre.shape[2] else _gates(dpre, gates)


def recurrent_gradient(problem: Problem, dpre: torch.Tensor, h_before) -> torch.Tensor:
    """dR [Gr N D P] = sum over B and T of dpre and the h that met R, `h_before(start, stop)` [B T' N P]; accumulated
    in float32 (float64).
    """
    gates = problem.cell.recurrent_gates
    B, T, G, N, D = dpre.shape
    wide = torch.float64 if dpre.dtype == torch.float64 else torch.float32
    dR = dpre.new_zeros(N, len(gates) * D, D, dtype=wide)
    for start, stop in chunks(problem):
        rows = dpre[:, start:stop] if len(gates) == G else _gates(dpre[:, start:stop], gates)
        rows = rows.permute(3, 0, 1, 2, 4).reshape(N, -1, len(gates) * D).transpose(1, 2)  # a copy for N > 1
        h = h_before(start, stop).to(getattr(torch, problem.dtype)).to(dpre.dtype).reshape(-1, N, D).transpose(0, 1)
        dR += multiply(rows, h)
    return dR.view(N, len(gates), D, D).transpose(0, 1)


def multiply(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x y for each head, accumulated and returned in float32 (float64)."""
    if x.dtype in (torch.float32, torch.float64):
        return torch.bmm(x, y)
    return torch.bmm(x, y, out_dtype=torch.float32) if x.is_cuda else torch.bmm(x.float(), y.float())


def _gates(dpre: torch.Tensor, gates: tuple[int, ...]) -> torch.Tensor:
    """A view where the gates follow one another, else a copy."""
    if gates == tuple(range(gates[0], gates[-1] + 1)):
        return dpre[:, :, gates[0] : gates[-1] + 1]
    return dpre[:, :, list(gates)]


def bias_gradient(dpre: torch.Tensor) -> torch.Tensor:
    """db [G N D] in float32 (float64)."""
    dtype = torch.float64 if dpre.dtype == torch.float64 else torch.float32
    return dpre.sum((0, 1), dtype=dtype)
