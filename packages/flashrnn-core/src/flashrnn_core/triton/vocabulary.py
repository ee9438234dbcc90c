"""The words of a cell in Triton, in float32.

Everything is made of `tl.exp` and `tl.log`, the hardware's approximate functions (2 ulp), and arithmetic. `EXACT` has,
for float32 compute, the words that are also right to the last few bits near zero; in 16 bits h is rounded anyway.
"""

import triton
import triton.language as tl

OPERATORS = {  # word: how it is written
    "add": "{} + {}",
    "subtract": "{} - {}",
    "multiply": "{} * {}",
    "divide": "{} / {}",
    "negative": "-{}",
    "equal": "{} == {}",
    "less": "{} < {}",
    "less_equal": "{} <= {}",
}


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2_E)


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log2(1.0 + tl.exp2(tl.abs(x) * -LOG2_E)) * (1.0 / LOG2_E)


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sigmoid(x):
    """σ(x) = 1 / (1 + exp(−x)); the square of rsqrt is a third of the instructions of a division."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2_E))
    return root * root


@triton.jit
def tanh(x):
    root = tl.rsqrt(1.0 + tl.exp2(x * (2.0 * LOG2_E)))
    return 1.0 - 2.0 * (root * root)


@triton.jit
def where(condition, x, y):
    return tl.where(condition, x, y)


@triton.jit
def exp_exact(x):
    return tl.exp(x)


@triton.jit
def sigmoid_exact(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh_exact(x):
    """tanh(x) to 3 ulp: below 0.625 the polynomial of Cephes (Moshier, 1989), since 1 - 2 / (1 + e) cancels there."""
    z = x * x
    p = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    small = (p - 3.33332819422e-1) * z * x + x
    large = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def log_sigmoid_exact(x):
    """log σ(x) = min(x, 0) − log1p(e), e = exp(−|x|); log1p(e) = log(u) e / (u − 1), u = 1 + e rounded (Kahan)."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    return tl.minimum(x, 0.0) - tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


FAST = {f.__name__: f for f in (exp, log_sigmoid, maximum, relu, sigmoid, tanh, where)}
EXACT = {**FAST, "exp": exp_exact, "log_sigmoid": log_sigmoid_exact, "sigmoid": sigmoid_exact, "tanh": tanh_exact}
