"""`FlashRNNConfig`: the options of PyPI flashrnn 1.0.8, for those who switch. New code passes arguments instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# A letter of 1.0.8's shape strings is one dim; H are the heads.
_INPUT, _RECURRENT, _BIAS, _OUTPUT = "BTGHD", "GHDP", "GHD", "SBTHD"


@dataclass
class FlashRNNConfig:
    """Options of PyPI flashrnn 1.0.8 that mean something here; `flashrnn(..., config=...)`.

    As there, a config given decides function, backend and dtype. `input_shape`, `recurrent_shape`, `bias_shape` and
    `output_shape` name the order of the dims of Wx, R, b, and of states in and out. `hidden_dim`, `num_heads` and
    `head_dim`, if given, are checked against the tensors; `batch_size` is accepted and has no effect. Raises
    ValueError for an option that 1.0.8 had and this package does not (docs: switching).
    """

    backend: str = "cuda_fused"
    function: str = "lstm"
    gradient_recurrent_cut: bool = False
    gradient_recurrent_clipval: float | None = None
    forward_clipval: float | None = None
    constants: dict[str, float] | None = None
    hidden_dim: int = -1
    num_heads: int = -1
    head_dim: int = -1
    batch_size: int = 8
    input_shape: str = _INPUT
    output_shape: str = _OUTPUT
    recurrent_shape: str = _RECURRENT
    bias_shape: str = _BIAS
    dtype: str = "bfloat16"
    dtype_acc: str | None = "float32"
    dtype_b: str | None = None
    dtype_r: str | None = None
    dtype_w: str | None = None
    dtype_g: str | None = None
    dtype_s: str | None = None
    dtype_a: str | None = None
    enable_automatic_mixed_precision: bool = True
    trainable_r: bool | list[bool] = True
    trainable_b: bool | list[bool] = True
    initial_val: float | Sequence[float] = 0.0

    def __post_init__(self):
        if not isinstance(self.gradient_recurrent_cut, bool):
            raise TypeError(
                f"FlashRNNConfig.gradient_recurrent_cut: expected True or False, got {self.gradient_recurrent_cut!r}"
            )
        initial = [self.initial_val] if isinstance(self.initial_val, int | float) else self.initial_val
        self._refuse("forward_clipval", self.forward_clipval is not None, "clamp the states in a cell of your own")
        self._refuse("constants", bool(self.constants), "write the constants into a cell of your own")
        self._refuse("dtype_acc", self.dtype_acc not in (None, "float32"), "accumulation is in float32")
        self._refuse("initial_val", any(v != 0 for v in initial), "pass the initial values as states")
        for name, tensor in (("trainable_r", "R"), ("trainable_b", "b")):
            value = getattr(self, name)
            frozen = value in (False, 0) or (isinstance(value, list | tuple) and not all(value))
            self._refuse(name, frozen, f"pass {tensor}.detach()")
        for name in ("dtype_r", "dtype_w", "dtype_g"):
            self._refuse(name, getattr(self, name) not in (None, self.dtype), "Wx and R are cast to dtype")
        for name, dims in (("input", _INPUT), ("recurrent", _RECURRENT), ("bias", _BIAS), ("output", _OUTPUT)):
            value = getattr(self, f"{name}_shape")
            if sorted(value) != sorted(dims):
                raise ValueError(f"FlashRNNConfig.{name}_shape: expected an order of {dims}, got {value!r}")

    def _refuse(self, name: str, given: bool, instead: str) -> None:
        if given:
            raise ValueError(f"FlashRNNConfig.{name}={getattr(self, name)!r} is not supported; {instead}")

    def arrange(
        self, Wx: torch.Tensor, R: torch.Tensor, b: torch.Tensor, states: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, Callable[[torch.Tensor], torch.Tensor]]:
        """The tensors as views in the contract's order of dims, and the way back for the outputs."""
        Wx = _permute("Wx", Wx, self.input_shape, _INPUT)
        R = _permute("R", R, self.recurrent_shape, _RECURRENT)
        b = _permute("b", b, self.bias_shape, _BIAS)
        if states is not None:
            states = _permute("states", states, self.output_shape, _OUTPUT)
        N, D = Wx.shape[-2:]
        for name, expected, got in (
            ("num_heads", self.num_heads, N),
            ("head_dim", self.head_dim, D),
            ("hidden_dim", self.hidden_dim, N * D),
        ):
            if expected > 0 and expected != got:
                raise ValueError(f"Wx: expected {name} {expected}, as the config says, got {got}: {list(Wx.shape)}")
        return Wx, R, b, states, lambda x: _permute("output", x, _OUTPUT, self.output_shape)


def _permute(name: str, x: torch.Tensor, source: str, target: str) -> torch.Tensor:
    if x.ndim != len(source):
        raise ValueError(f"{name}: expected {len(source)} dims {source}, got {x.ndim}: {list(x.shape)}")
    return x if source == target else x.permute([source.index(d) for d in target])
