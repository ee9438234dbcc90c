"""Random problems: what every backend is tested on. `Case` names one, `build` makes its tensors on any device."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from flashrnn_core import Cell, Problem, get_cell

CELLS = ("elman", "gru", "lstm", "slstm")
DTYPES = ("float64", "float32", "bfloat16", "float16")
KERNEL_DTYPES = ("bfloat16", "float16", "float32")  # that kernels compute in
GRADIENTS = ("Wx", "R", "b", "states")
LARGEST_R = 2**26  # elements of R, of a case that fits
SHORT = {"float64": "f64", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True)
class Case:
    """One problem. `dtype`: compute dtype; `states`: dtype of the initial states, None: none are given.

    `layout` of Wx: `contiguous`; `time_major`, a [T, B, …] tensor passed transposed; `expanded`, one sequence seen B
    times; `spaced`, every second step of a longer sequence, in a tensor with more gates.
    """

    cell: str | Cell = "lstm"
    B: int = 3
    T: int = 7
    N: int = 2
    D: int = 5
    dtype: str = "float64"
    states: str | None = "float64"
    resets: bool = False
    lengths: bool = False
    reverse: bool = False
    cut: bool = False
    clip: float | None = None
    hidden_only: bool = False
    layout: str = "contiguous"
    seed: int = 0

    @property
    def problem(self) -> Problem:
        """The contract's view of the case: sizes and shapes."""
        names = ("B", "T", "N", "D", "dtype", "resets", "lengths", "reverse", "cut", "clip", "hidden_only")
        options = {name: getattr(self, name) for name in names}
        return Problem(get_cell(self.cell), state_dtype=self.states or self.dtype, **options)

    def __str__(self) -> str:
        words = [get_cell(self.cell).name, SHORT[self.dtype], f"B{self.B}T{self.T}N{self.N}D{self.D}"]
        words += [name for name in ("resets", "lengths", "reverse", "cut", "hidden_only") if getattr(self, name)]
        if self.clip is not None:
            words.append(f"clip{self.clip:g}")
        if self.states != self.dtype:
            words.append("zeros" if self.states is None else f"states_{SHORT[self.states]}")
        if self.layout != "contiguous":
            words.append(self.layout)
        if self.seed:
            words.append(f"seed{self.seed}")
        return "-".join(words)

    def but(self, **changes) -> Case:
        """The case with changes."""
        return replace(self, **changes)

    def fits(self, largest: int) -> bool:
        """Small enough for the yardstick, which takes each step by itself: h has at most `largest` elements."""
        h = self.B * self.T * self.N * self.D
        R = len(get_cell(self.cell).recurrent_gates) * self.N * self.D**2
        return h <= largest and R <= LARGEST_R


ROUNDED = [  # the default: no initial states, and all states in the compute dtype
    Case(name, B=5, T=63, N=2, D=40, dtype=dtype, states=None) for name in CELLS for dtype in DTYPES[1:]
]


# Options of the cases of a grid, one for each of nine head dims: all sets of the three, and one again; others; layouts.
MASKS = [*itertools.product((False, True), repeat=3), (True, True, False)]  # resets, lengths, reverse
OTHERS = [{}, {}, {}, {"clip": 0.05}, {"clip": 0.05}, {"clip": 0.05, "hidden_only": True}, {"hidden_only": True}]
OTHERS += [{"cut": True}, {"cut": True, "clip": 0.05}]
LAYOUTS = [*["contiguous"] * 4, *["time_major", "spaced"] * 2, "expanded"]


def grid(seed: str, head_dims, sizes: dict[str, tuple[int, ...]], largest: int) -> Iterator[Case]:
    """A case for every cell, dtype that kernels compute in, and head dim: with each cell and dtype every option, with
    sizes of B, T, N drawn at random from those with which it `fits(largest)`.
    """
    draw = random.Random(f"{seed}0")
    for name, dtype in itertools.product(CELLS, KERNEL_DTYPES):
        drawn = (draw.sample(values, len(head_dims)) for values in (MASKS, OTHERS, LAYOUTS))
        for D, masks, others, layout in zip(head_dims, *drawn, strict=True):
            options = dict(zip(("resets", "lengths", "reverse"), masks, strict=True)) | others
            possible = [x for x in itertools.product(*sizes.values()) if Case(name, *x, D).fits(largest)]
            yield Case(name, *draw.choice(possible), D, dtype, "float32", **options, layout=layout)


@dataclass
class Inputs:
    """The tensors of a case: `tensors` by their names in the contract (None: absent), and the outputs' cotangents."""

    case: Case
    tensors: dict[str, torch.Tensor | None]
    dstates: torch.Tensor  # S B T N D, in the dtype of the returned states; S = 1 with hidden_only
    dlast_states: torch.Tensor  # S B 1 N D

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of `flashrnn`, tensors apart."""
        case = self.case
        return {
            "function": case.cell,
            "dtype": case.dtype,
            "reverse": case.reverse,
            "gradient_recurrent_cut": case.cut,
            "gradient_recurrent_clipval": case.clip,
            "hidden_only": case.hidden_only,
        }


def build(case: Case, device: str = "cpu", b_dtype: str | None = None) -> Inputs:
    """Random tensors of the case on the device, rounded to the dtypes in which they are passed.

    Resets fall on a fifth of the steps; lengths hold 0, 1 and T where B allows. `b_dtype`: None, the compute dtype.
    """
    problem = case.problem
    generator = torch.Generator(device).manual_seed(case.seed)
    dtype, state_dtype = getattr(torch, case.dtype), getattr(torch, problem.state_dtype)
    wide = torch.float64 if case.dtype == "float64" else torch.float32

    def normal(shape, to, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=wide, device=device)).to(to)

    states = None
    if case.states is not None:
        states = normal(problem.shape("states"), wide)
        if "n" in problem.cell.states:  # a normalizer: positive, on both sides of the clamp, and zero here and there
            n = states[problem.cell.states.index("n")]
            n.copy_((n.abs() + 0.3).masked_fill(n > 1.5, 0.0))
        states = states.to(state_dtype)
    resets = lengths = None
    if case.resets:
        resets = torch.rand(problem.shape("resets"), generator=generator, device=device) < 0.2
    if case.lengths:
        lengths = torch.randint(0, case.T + 1, (case.B,), generator=generator, device=device)
        for place, value in enumerate((case.T, 1, 0)[: max(case.B - 1, min(case.B, 1))]):
            lengths[place] = min(value, case.T)
    tensors = {
        "Wx": _pre_activations(case, normal, dtype),
        "R": normal(problem.shape("R"), dtype, case.D**-0.5),
        "b": normal(problem.shape("b"), getattr(torch, b_dtype or case.dtype), 0.5),
        "states": states,
        "resets": resets,
        "lengths": lengths,
    }
    dstates = normal(problem.output_shape("states"), state_dtype)
    return Inputs(case, tensors, dstates, normal(problem.output_shape("last_states"), state_dtype))


def _pre_activations(case: Case, normal, dtype) -> torch.Tensor:
    B, T, Gw, N, D = case.problem.shape("Wx")
    if case.layout == "time_major":
        return normal((T, B, Gw, N, D), dtype).transpose(0, 1)
    if case.layout == "expanded":
        return normal((1, T, Gw, N, D), dtype).expand(B, T, Gw, N, D)
    if case.layout == "spaced":
        return normal((B, 2 * T, Gw + 1, N, D), dtype)[:, ::2, 1:]
    return normal((B, T, Gw, N, D), dtype)
