"""Seconds that the first calls take in a new process: python first_call.py BACKEND DTYPE CASE...

Torch, its matmuls and its autograd have run before; the first case pays for what else is imported. Prints JSON, by
case: {"forward", "forward_backward"}, each a first call of its kernels, synchronized. `seconds` runs it twice on
empty disk caches, that of NVRTC (the driver's) among them: kernels compiled, then read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

import torch
from cases import Case

FIRST = "elman-N1D32B8"
CACHES = ("FLASHRNN_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")


def seconds(backend: str, cases: list[Case]) -> dict[str, dict[str, dict[str, float]]]:
    """{"compiled": {case: {"forward", "forward_backward"}}, "from_disk": the same}."""
    command = [sys.executable, __file__, backend, cases[0].dtype, FIRST, *map(str, cases)]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | dict.fromkeys(CACHES, cache)
        return {
            name: json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
            for name in ("compiled", "from_disk")
        }


def main(backend: str, dtype: str, names: list[str]) -> dict[str, dict[str, float]]:
    """Times the first calls in this process."""
    from flashrnn import flashrnn

    x = torch.ones(2, 64, 64, device="cuda", dtype=getattr(torch, dtype), requires_grad=True)
    torch.autograd.grad(torch.bmm(x, x), x, x.detach())  # torch itself imports for seconds where it is given gradients
    torch.cuda.synchronize()
    result = {}
    for name in names:
        case = Case.parse(name, 64, dtype)
        leaves, dstates = case.leaves(), case.dstates()
        torch.cuda.synchronize()
        times = [time.perf_counter()]
        with torch.no_grad():
            flashrnn(*leaves, function=case.cell, backend=backend, hidden_only=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter())
        torch.autograd.grad(flashrnn(*leaves, function=case.cell, backend=backend)[0], leaves, dstates)
        torch.cuda.synchronize()
        times.append(time.perf_counter())
        result[name] = {"forward": times[1] - times[0], "forward_backward": times[2] - times[1]}
    return result


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.argv[3:])))
