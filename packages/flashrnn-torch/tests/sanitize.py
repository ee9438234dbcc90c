"""A training step of each kind of CUDA kernel, for NVIDIA's compute-sanitizer on an H100:

    compute-sanitizer --tool memcheck python sanitize.py
    compute-sanitizer --tool synccheck python sanitize.py
    compute-sanitizer --tool racecheck python sanitize.py --library cpu 0 1 2     # slow: some cases at a time

They are to report nothing. `--library cpu`: matmuls that a library would do on the GPU are done on the CPU, for
racecheck reports hazards within cuBLAS's own kernels. `test_grids.py` says what is among the cases.
"""

import argparse

import torch
from checks import run
from problems import Case, build

from flashrnn import gradients

MASKS = {"resets": True, "lengths": True}
CASES = [
    ("cuda_fused", Case("lstm", B=16, T=9, N=12, D=64, dtype="bfloat16", states=None, **MASKS)),
    ("cuda_fused", Case("gru", B=5, T=7, N=3, D=256, dtype="float16", states="float16", **MASKS)),
    ("cuda_fused", Case("elman", B=40, T=6, N=1, D=512, dtype="bfloat16", states=None)),
    ("cuda_fused", Case("slstm", B=9, T=6, N=1, D=640, dtype="bfloat16", states="float32", reverse=True, **MASKS)),
    ("cuda_fused", Case("lstm", B=16, T=6, N=1, D=768, dtype="bfloat16", states="bfloat16", **MASKS)),
    ("cuda_fused", Case("lstm", B=3, T=6, N=2, D=128, dtype="float32", states="float32")),
    ("cuda_fused", Case("lstm", B=5, T=6, N=3, D=13, dtype="float32", states="float32", clip=0.1, **MASKS)),
    ("cuda_fused", Case("lstm", B=16, T=5, N=1, D=2048, dtype="bfloat16", states=None)),
    ("cuda", Case("gru", B=16, T=5, N=1, D=1024, dtype="bfloat16", states=None, **MASKS)),
    ("cuda", Case("lstm", B=64, T=4, N=1, D=1024, dtype="bfloat16", states=None, **MASKS)),
    ("cuda", Case("slstm", B=16, T=4, N=1, D=1536, dtype="bfloat16", states=None, **MASKS)),
    ("cuda", Case("lstm", B=64, T=140, N=1, D=768, dtype="bfloat16", states=None)),
    ("cuda", Case("gru", B=100, T=5, N=1, D=512, dtype="bfloat16", states=None)),
    ("cuda", Case("lstm", B=256, T=4, N=1, D=768, dtype="bfloat16", states=None)),
    ("cuda", Case("lstm", B=3, T=3, N=1, D=3072, dtype="bfloat16", states=None)),
    ("cuda_fused", Case("lstm", B=3, T=6, N=1, D=200, dtype="float32", states="float32")),
]


def multiply_on_the_cpu(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """In the place of `gradients.multiply`."""
    product = torch.bmm(x.float().cpu(), y.float().cpu()).to(x.device)
    return product if out is None else out.copy_(product)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("cases", nargs="*", type=int, help=f"0 to {len(CASES) - 1}; default: all")
    options = parser.parse_args()
    if options.library == "cpu":
        gradients.multiply = multiply_on_the_cpu
    for number in options.cases or range(len(CASES)):
        backend, case = CASES[number]
        result = run(build(case, "cuda"), backend)
        torch.cuda.synchronize()
        print(number, backend, case, {name: x.float().norm().item() for name, x in result.items()}, flush=True)


if __name__ == "__main__":
    main()
