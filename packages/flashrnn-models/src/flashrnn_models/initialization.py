"""Initial values of recurrent layers and of the blocks around them."""

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def powerlaw_forget_bias_(bias: Tensor, block: int = 0, num_blocks: int = 1) -> Tensor:
    """b_f[n, d] = 5 - 12 (d / (D - 1))^(0.3 + 1.3 block / (num_blocks - 1)), in place.

    Every head gets time scales from hundreds of steps (sigmoid(5), the first dims) down to one
    step (sigmoid(-7), the last ones). Later blocks keep more of the long ones.

    Shapes: `bias` [..., D], the bias of the forget gate alone.

    Source: the code released with Beck, Pöppel et al., "xLSTM: Extended Long Short-Term Memory"
    (arXiv:2405.04517), where it is called `powerlaw_blockdependent`.

    >>> powerlaw_forget_bias_(torch.empty(1, 3)).round(decimals=2)
    tensor([[ 5.0000, -4.7500, -7.0000]])
    """
    D = bias.shape[-1]
    exponent = 0.3 + 1.3 * (block / (num_blocks - 1) if num_blocks > 1 else 0.0)
    ramp = torch.linspace(0, 1, D, dtype=bias.dtype, device=bias.device)
    return bias.copy_(5 - 12 * ramp**exponent)


def small_init_(weight: Tensor, fan_in: int) -> Tensor:
    """weight ~ Normal(0, 2 / (5 fan_in)), in place: for projections that read the residual stream.

    Source: Nguyen and Salazar, "Transformers without Tears" (arXiv:1910.05895).

    >>> weight = small_init_(torch.empty(1000, 100), fan_in=100)
    >>> bool((weight.var() * 250 - 1).abs() < 0.1)
    True
    """
    return nn.init.normal_(weight, std=math.sqrt(2 / (5 * fan_in)))


def wang_init_(weight: Tensor, fan_in: int, num_blocks: int) -> Tensor:
    """weight ~ Normal(0, 4 / (num_blocks² fan_in)), in place: for projections that write to the
    residual stream.

    `fan_in` is the width of the residual stream, as in the source: Wang and Komatsuzaki, "GPT-J-6B"
    (2021), whose rule GPT-NeoX and xLSTM use.

    >>> weight = wang_init_(torch.empty(1000, 100), fan_in=100, num_blocks=2)
    >>> bool((weight.var() * 100 - 1).abs() < 0.1)
    True
    """
    return nn.init.normal_(weight, std=2 / num_blocks / math.sqrt(fan_in))
