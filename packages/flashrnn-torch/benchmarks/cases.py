"""The problems that are timed, and their tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from flashrnn_core import get_cell
from flashrnn_core.contract import Problem


@dataclass(frozen=True)
class Case:
    """One problem, written `lstm-N12D64B16`."""

    cell: str
    N: int
    D: int
    B: int
    T: int = 1024
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.cell}-N{self.N}D{self.D}B{self.B}"

    @classmethod
    def parse(cls, text: str, T: int, dtype: str) -> Case:
        """The case of that name; raises ValueError for what is none."""
        match = re.fullmatch(r"(\w+)-N(\d+)D(\d+)B(\d+)", text)
        if match is None:
            raise ValueError(f"case: expected one like lstm-N12D64B16, got {text!r}")
        return cls(match[1], *(int(x) for x in match.groups()[1:]), T, dtype)

    def problem(self) -> Problem:
        """The contract's view: shapes."""
        return Problem(get_cell(self.cell), self.B, self.T, self.N, self.D, dtype=self.dtype, state_dtype=self.dtype)

    def leaves(self) -> list[torch.Tensor]:
        """Wx, R, b in the case's dtype, random, requiring gradients."""
        torch.manual_seed(0)
        new = {"device": "cuda", "dtype": getattr(torch, self.dtype)}
        shapes = self.problem()
        Wx, R, b = (torch.randn(shapes.shape(name), **new) for name in ("Wx", "R", "b"))
        return [x.requires_grad_() for x in (Wx, R.mul_(self.D**-0.5), b)]

    def dstates(self) -> torch.Tensor:
        """A dense cotangent of all states, [S, B, T, N, D]."""
        shape = self.problem().output_shape("states")
        return torch.randn(shape, device="cuda", dtype=getattr(torch, self.dtype))


DEFAULT = (
    *(f"lstm-N{N}D{D}B16" for N, D in ((12, 64), (6, 128), (3, 256), (1, 512), (1, 768), (1, 1024), (1, 2048))),
    *("slstm-N12D64B16", "slstm-N1D768B16", "elman-N1D768B16", "gru-N12D64B16", "gru-N1D768B16"),
    *("lstm-N12D64B128", "lstm-N1D768B64", "lstm-N1D768B256"),
)
