"""What all backends share of the backward: the states each step consumed, and dWx, dR, db from dpre."""

from __future__ import annotations

import torch

from flashrnn_core.contract import Problem


def previous(problem: Problem, out, states, resets, lengths) -> torch.Tensor:
    """[S' B T N D]: the first S' states that each step consumed, from the outputs `out` [S' B T N D]."""
    S, B, T, N, D = out.shape
    first = out.new_zeros(S, B, 1, N, D) if states is None else states[:S].to(out.dtype)
    if problem.reverse:
        before = torch.cat([out[:, :, 1:], first], 2)[:, :, :T]
        if lengths is not None:  # a sequence starts at its own end, where the next output is a zero of the padding
            start = torch.arange(1, T + 1, device=out.device) >= lengths[:, None]
            before = torch.where(start[..., None, None], first, before)
    else:
        before = torch.cat([first, out[:, :, : max(T - 1, 0)]], 2)[:, :, :T]
    if resets is not None:
        before = before.masked_fill(resets[..., None, None], 0.0)
    return before


def recurrent_part(R: torch.Tensor, h_before: torch.Tensor) -> torch.Tensor:
    """R h of all steps in one matmul: [B T Gr N D] in float32 (float64), a view of [N, B T, Gr D]."""
    B, T, N, D = h_before.shape
    h = h_before.to(R.dtype).reshape(B * T, N, D).transpose(0, 1)
    Rt = R.permute(1, 3, 0, 2).reshape(N, D, -1)  # N P (Gr D)
    if R.dtype in (torch.float32, torch.float64):
        rec = torch.bmm(h, Rt)
    elif R.is_cuda:
        rec = torch.bmm(h, Rt, out_dtype=torch.float32)
    else:
        rec = torch.bmm(h.float(), Rt.float())
    return rec.view(N, B, T, -1, D).permute(1, 2, 3, 0, 4)


def input_gradient(problem: Problem, dpre: torch.Tensor) -> torch.Tensor:
    """dWx [B T Gw N D] from dpre [B T G N D]."""
    gates = problem.cell.input_gates
    return dpre if len(gates) == dpre.shape[2] else _gates(dpre, gates)


def recurrent_gradient(problem: Problem, dpre: torch.Tensor, h_before: torch.Tensor) -> torch.Tensor:
    """dR [Gr N D P] = sum over B and T of dpre and the h [B T N P] that met R, in the dtype of dpre."""
    gates = problem.cell.recurrent_gates
    B, T, G, N, D = dpre.shape
    if len(gates) != G:
        dpre = _gates(dpre, gates)
    h = h_before.to(getattr(torch, problem.dtype)).to(dpre.dtype)
    rows = dpre.permute(3, 0, 1, 2, 4).reshape(N, B * T, len(gates) * D)  # a copy for N > 1, D stays contiguous
    dR = torch.matmul(rows.transpose(1, 2), h.reshape(B * T, N, D).transpose(0, 1))
    return dR.view(N, len(gates), D, D).transpose(0, 1)


def _gates(dpre: torch.Tensor, gates: tuple[int, ...]) -> torch.Tensor:
    """A view where the gates follow one another, else a copy."""
    if gates == tuple(range(gates[0], gates[-1] + 1)):
        return dpre[:, :, gates[0] : gates[-1] + 1]
    return dpre[:, :, list(gates)]


def bias_gradient(dpre: torch.Tensor) -> torch.Tensor:
    """db [G N D] in float32 (float64)."""
    dtype = torch.float64 if dpre.dtype == torch.float64 else torch.float32
    return dpre.sum((0, 1), dtype=dtype)
