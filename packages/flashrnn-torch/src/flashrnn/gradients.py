"""What all backends share of the backward: the h that met R, R h of all steps at once, and dWx, dR, db from dpre."""

from __future__ import annotations

import torch

from flashrnn_core.contract import Problem


def first(out, states) -> torch.Tensor:
    """[S' B 1 N D]: the first S' initial states, in the dtype of the outputs [S' B T N D]."""
    S, B, _, N, D = out.shape
    return out.new_zeros(S, B, 1, N, D) if states is None else states[:S].to(out.dtype)


def previous(problem: Problem, out, states, resets, lengths, dtype: torch.dtype | None = None) -> torch.Tensor:
    """[S' B T N D]: the first S' states that each step consumed, from the outputs [S' B T N D]; in `dtype`, if given."""
    before = torch.empty_like(out, dtype=dtype, memory_format=torch.contiguous_format)
    if out.shape[2] == 0:
        return before
    begin = first(out, states)
    if problem.reverse:
        before[:, :, :-1] = out[:, :, 1:]
        before[:, :, -1:] = begin
        if lengths is not None:  # a sequence starts at its own end, where the next output is of the padding
            last = (lengths - 1).clamp(0, problem.T - 1).long()[None, :, None, None, None]
            before.scatter_(2, last.expand(begin.shape), begin.to(before.dtype))
    else:
        before[:, :, 1:] = out[:, :, :-1]
        before[:, :, :1] = begin
    if resets is not None:
        before.masked_fill_(resets[:, :, None, None], 0.0)
    return before


def recurrent_part(problem: Problem, R, met, dpre) -> None:
    """R h of all steps, from the h that met R [B T N P], into the places of the recurrent gates of dpre [B T G N D],
    rounded to its dtype: a backward reads it there before it writes dpre.
    """
    B, T, N, D = met.shape
    gates = problem.cell.recurrent_gates
    met = met.reshape(B * T, N, D).transpose(0, 1)
    if N == 1 and gates == tuple(range(len(gates))):
        places = dpre.view(1, B * T, -1)[:, :, : len(gates) * D]
        torch.bmm(met, R.reshape(1, -1, D).transpose(1, 2), out=places)
        return
    for k, gate in enumerate(gates):
        places = dpre.view(B * T, -1, N, D)[:, gate].transpose(0, 1)
        torch.bmm(met, R[k].transpose(1, 2), out=places)


def input_gradient(problem: Problem, dpre: torch.Tensor) -> torch.Tensor:
    """dWx [B T Gw N D] from dpre [B T G N D]."""
    gates = problem.cell.input_gates
    return dpre if len(gates) == dpre.shape[2] else _gates(dpre, gates)


def recurrent_gradient(problem: Problem, dpre: torch.Tensor, met: torch.Tensor) -> torch.Tensor:
    """dR [Gr N D P] = sum over B and T of dpre and the h that met R [B T N P]; accumulated in float32 (float64)."""
    gates = problem.cell.recurrent_gates
    N, D = met.shape[2:]
    rows = dpre if len(gates) == dpre.shape[2] else _gates(dpre, gates)
    rows = rows.permute(3, 0, 1, 2, 4).reshape(N, -1, len(gates) * D).transpose(1, 2)  # a copy for N > 1
    h = met.to(dpre.dtype).reshape(-1, N, D).transpose(0, 1)
    return multiply(rows, h).view(N, len(gates), D, D).transpose(0, 1)


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
