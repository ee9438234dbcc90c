"""The numbers of cuda_fused on a GPU, by the rule of `checks`: a grid over cells, dtypes, head dims and sizes, what is
unusual in inputs, plans that need several waves, the code of sm80 on newer GPUs, repeats bit for bit, a soak.
"""

import os
import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from checks import errors, in_another_order, judged, run
from problems import CELLS, KERNEL_DTYPES, Case, build
from rule import CudaRule
from test_own_cell import mgu, odd

from flashrnn.backends import BACKENDS, choose, cuda_fused
from flashrnn_core import get_cell

pytestmark = pytest.mark.gpu

HEAD_DIMS = (1, 7, 8, 24, 32, 64, 96, 100, 128, 192, 256, 384, 512, 640, 768, 1024, 2048)
SIZES = {"B": (1, 3, 16, 40, 128), "T": (1, 2, 63, 512), "N": (1, 3, 12)}
LARGEST = 2**22  # elements of h, of one case
SOAK_SECONDS = float(os.environ.get("FLASHRNN_SOAK_SECONDS", "20"))


def grid(seed):
    """A case for every cell, dtype and head dim, with sizes and options drawn at random."""
    draw = random.Random(f"cuda_fused{seed}")
    for name in CELLS:
        for D in HEAD_DIMS:
            for dtype in KERNEL_DTYPES:
                while True:
                    sizes = {dim: draw.choice(values) for dim, values in SIZES.items()}
                    case = Case(name, **sizes, D=D, dtype=dtype, states="float32", seed=seed)
                    if case.fits(LARGEST):
                        break
                options = {option: draw.random() < 0.35 for option in ("resets", "lengths", "reverse")}
                options["cut"] = draw.random() < 0.1
                options["clip"] = draw.choice((None, None, 0.05))
                layout = draw.choice(("contiguous", "contiguous", "time_major", "expanded", "spaced"))
                yield case.but(**options, layout=layout)


GRID = list(grid(0))
ROUNDS = [  # more heads x batch tiles than a chip holds at once
    Case("gru", B=128, T=9, N=50, D=64, dtype="bfloat16", states="float32"),
    Case("elman", B=500, T=9, N=48, D=24, dtype="float16", states="float32", resets=True),
    Case("lstm", B=256, T=9, N=12, D=128, dtype="bfloat16", states="float32", lengths=True),
    Case("slstm", B=200, T=9, N=12, D=256, dtype="bfloat16", states="float32", reverse=True),
    Case("lstm", B=128, T=9, N=12, D=512, dtype="bfloat16", states="float32", resets=True),
    Case("gru", B=130, T=9, N=9, D=768, dtype="float16", states="float32"),
    Case("elman", B=128, T=9, N=11, D=1024, dtype="bfloat16", states="float32", lengths=True, reverse=True),
    Case("lstm", B=72, T=9, N=7, D=384, dtype="float32", states="float32"),
]
SM80 = [
    Case(
        name, B=B, T=63, N=N, D=D, dtype=KERNEL_DTYPES[(i + j) % 3], states="float32", resets=D == 64, lengths=D == 512
    )
    for i, name in enumerate(CELLS)
    for j, (B, N, D) in enumerate(((40, 3, 64), (3, 3, 192), (16, 1, 512)))
]
OWN = [
    Case(own, B=18, T=9, N=2, D=D, dtype=dtype, states="float32", lengths=True)
    for own, D, dtype in (
        (mgu, 24, "bfloat16"),
        (mgu, 256, "float32"),
        (mgu, 520, "float16"),
        (odd, 24, "float16"),
        (odd, 256, "bfloat16"),
        (odd, 520, "float32"),
    )
]
TF32 = [
    Case(name, B=3, T=63, D=D, dtype="float32", states="float32")
    for name, D in (("gru", 24), ("lstm", 64), ("slstm", 128), ("elman", 512))
]
REPEATED = [
    Case(name, B=40, T=33, N=3, D=D, dtype="bfloat16", states="float32", resets=True)
    for name in CELLS
    for D in (32, 256, 640)
]
SHIFTED = [
    Case("slstm", B=5, T=13, D=64, dtype="bfloat16", states="bfloat16", resets=True),
    Case("lstm", B=5, T=13, D=9, dtype="float16", states="float32", reverse=True),
    Case("gru", B=5, T=13, D=520, dtype="bfloat16", states="float32"),
    Case("lstm", B=5, T=13, D=256, dtype="float32", states="bfloat16"),
]


class TestNumbers(CudaRule):
    backend = "cuda_fused"
    repeats = 100

    def check(self, case):
        """The rule; where the backend cannot run the case, that it says so, and that R is indeed large."""
        device = torch.device("cuda", 0)
        if cuda_fused.supports(case.problem, device) is None:
            super().check(case)
            return
        with pytest.raises(NotImplementedError, match=r"does not fit .* backend='cuda'"):
            choose("cuda_fused", case.problem, device)
        bytes_of_r = len(get_cell(case.cell).recurrent_gates) * case.D**2 * (4 if case.dtype == "float32" else 2)
        chip = torch.cuda.get_device_properties(0).multi_processor_count * (256 + 163) * 1024
        assert bytes_of_r > chip / 4, f"R has {bytes_of_r} bytes, the chip {chip}"


def shifted(x):
    """x, one element into a storage of its own: aligned to nothing but its elements."""
    y = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
    return y.copy_(x)


@pytest.mark.parametrize("case", SHIFTED, ids=str)
def test_alignment_changes_no_bit(case):
    inputs = build(case, "cuda")
    moved = {key: None if x is None else shifted(x) for key, x in inputs.tensors.items()}
    other = replace(inputs, tensors=moved, dstates=shifted(inputs.dstates), dlast_states=shifted(inputs.dlast_states))
    expected, result = run(inputs, "cuda_fused"), run(other, "cuda_fused")
    for key, want in expected.items():
        assert torch.equal(result[key], want), key


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("D", [24, 256])
def test_strides_change_no_bit(D, dtype):
    """R, states, masks and cotangents as others lay them out."""
    inputs = build(Case("lstm", B=5, T=13, N=3, D=D, dtype=dtype, states=dtype, resets=True, lengths=True), "cuda")

    def laid(x, *order):
        inverse = [order.index(i) for i in range(x.ndim)]
        return x.permute(order).contiguous().permute(inverse)

    tensors = dict(inputs.tensors)
    tensors["R"] = laid(tensors["R"], 1, 3, 0, 2)
    tensors["b"] = laid(tensors["b"], 1, 2, 0)
    tensors["states"] = laid(tensors["states"], 1, 3, 2, 4, 0)
    tensors["resets"] = laid(tensors["resets"], 1, 0)
    tensors["lengths"] = torch.stack([tensors["lengths"], tensors["lengths"]], 1).int()[:, 0]
    other = replace(
        inputs,
        tensors=tensors,
        dstates=laid(inputs.dstates, 2, 1, 3, 4, 0),
        dlast_states=laid(inputs.dlast_states, 4, 1, 2, 3, 0),
    )
    expected, result = run(inputs, "cuda_fused"), run(other, "cuda_fused")
    for key, want in expected.items():
        assert torch.equal(result[key], want), key


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("D", [64, 520])
def test_lengths_out_of_range_and_padding_full_of_nan(D, reverse):
    """On a GPU a length above T acts as T, below 0 as 0; what stands in the padding reaches nothing."""
    inputs = build(Case("lstm", B=5, T=7, D=D, dtype="bfloat16", states="float32", reverse=reverse), "cuda")
    lengths = torch.tensor([9, 7, 3, 0, -2], device="cuda")
    inputs.tensors["lengths"] = lengths.clamp(0, 7)
    expected = run(inputs, "cuda_fused")
    padding = torch.arange(7, device="cuda") >= lengths[:, None]
    inputs.tensors["Wx"] = inputs.tensors["Wx"].masked_fill(padding[:, :, None, None, None], torch.nan)
    inputs.tensors["lengths"] = lengths
    result = run(inputs, "cuda_fused")
    for key, want in expected.items():
        assert torch.equal(result[key], want), key


ALL_BITS_SET = """
import torch
from flashrnn import flashrnn
for D in (64, 520):
    Wx, R, b = torch.zeros(2, 3, 1, 1, D).cuda(), torch.eye(D).view(1, 1, D, D).cuda(), torch.zeros(1, 1, D).cuda()
    states = torch.zeros(1, 2, 1, 1, D, dtype=torch.int32).cuda()
    states[0, 1] = -1  # as a float: NaN
    out, last = flashrnn(Wx, R, b, states.view(torch.float32), "elman", backend="cuda_fused")
    assert (out[0, 0] == 0).all() and out[0, 1].isnan().all() and last[0, 1].isnan().all(), D
"""


def test_nan_of_any_bits_passes_through():
    """Words in L2 say by a bit pattern that they are absent: a state of that pattern must not be waited for."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", ALL_BITS_SET], check=True, timeout=60, env=environment)


@pytest.mark.parametrize(
    ("changes", "chosen", "named"),
    [
        ({"dtype": "float64"}, "vanilla", "vanilla"),
        ({"states": "float64"}, "triton", "vanilla"),
        ({"D": 16384}, "cuda", "cuda"),
    ],
)
def test_what_it_cannot_run_raises_and_names_what_can(changes, chosen, named):
    device = torch.device("cuda", 0)
    problem = Case("lstm", D=8, dtype="bfloat16", states=None).but(**changes).problem
    assert choose("auto", problem, device) == chosen
    with pytest.raises(NotImplementedError, match=f"'cuda_fused' cannot run this call: .*'{named}'"):
        choose("cuda_fused", problem, device)


def bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def test_soak():
    """Random problems for a while (`FLASHRNN_SOAK_SECONDS`): no hang, no error, the same bits when run again, right
    numbers. The steps of a problem may make one rounding grow: `vanilla`'s own error changes by up to 27 with the order
    of the units. Where ours passes the rule, for one problem in fifty, the largest of five orders is the yardstick. And
    a rounding may turn a maximum of sLSTM, whose gradient then goes another way: here it is to be finite, not near.
    """
    draw = random.Random(time.time_ns())
    end = time.monotonic() + SOAK_SECONDS
    count, grown = 0, []
    while time.monotonic() < end:
        case = draw.choice(GRID).but(T=draw.randint(1, 150), seed=draw.randrange(2**31))
        if draw.random() < 0.2:  # most likely another plan, which takes its time to compile
            case = case.but(B=draw.randint(1, 150), N=draw.randint(1, 13), D=draw.randint(1, 800))
        backend = draw.choice(("cuda_fused", "cuda"))
        if not case.fits(LARGEST) or BACKENDS[backend].supports(case.problem, torch.device("cuda", 0)) is not None:
            continue
        print(case, backend, flush=True)  # the last one printed is the one that failed
        result, yardstick, expected = judged(case, backend, "cuda")
        again = run(build(case, "cuda"), backend)
        assert all(torch.equal(bits(x), bits(again[name])) for name, x in result.items())
        held = [k for k, x in result.items() if expected[k].abs().max() < torch.finfo(x.dtype).max / 2]  # by float16
        assert all(result[name].isfinite().all() for name in held)
        count += 1
        near = [name for name in held if case.cell != "slstm" or name in ("states", "last_states")]
        result, yardstick, expected = ({name: x[name] for name in near} for x in (result, yardstick, expected))
        if any(error > allowed for *_, error, allowed in errors(result, yardstick, expected, case.dtype)):
            grown.append((str(case), backend))
            orders = [yardstick, *(in_another_order(build(case, "cuda"), seed) for seed in range(4))]
            orders = [{name: x[name] for name in near} for x in orders]
            for found in zip(*(errors(result, x, expected, case.dtype) for x in orders), strict=True):
                name, norm, error, _ = found[0]
                allowed = 2 * max(one[-1] for one in found)
                assert error <= allowed, (
                    f"{name}: {norm} error {error:.3g}, allowed {allowed:.3g} after {count} problems"
                )
    print(f"{count} problems; beyond the rule of one order: {grown}")
    assert count > 0
    assert len(grown) <= 1 + count // 50, grown
