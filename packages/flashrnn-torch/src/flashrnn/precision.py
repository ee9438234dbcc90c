"""What torch is told of float32 products: as exact as float32, or tf32 on tensor cores. Read here alone."""

import torch


def tf32_allowed() -> bool:
    """Whether float32 matmuls may be tf32, by either of torch's two settings."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch refuses to mix: the newer setting is in use
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def exact_dtype(x: torch.Tensor) -> torch.dtype:
    """That of cell math and of sums where x has the compute dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 x rounded to the 10 bits of tf32, ties away from zero, as the kernels round what meets R."""
    rounded = ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(x.isnan(), x, rounded)  # of a NaN the addition may make a number
