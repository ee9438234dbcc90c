"""What `import flashrnn` costs and needs: each question in a process of its own."""

import statistics
import subprocess
import sys

CLOCK = """
import time, torch
begin = time.perf_counter()
import flashrnn
print(time.perf_counter() - begin)
"""

NO_GPU = """
import os, sys
os.environ["PATH"] = ""  # no compiler
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch, flashrnn
assert not torch.cuda.is_initialized()
Wx, R, b = torch.zeros(1, 2, 4, 1, 4), torch.zeros(4, 1, 4, 4), torch.zeros(4, 1, 4)
print(flashrnn.flashrnn(Wx, R, b)[0].shape, torch.cuda.is_initialized())
"""


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_takes_less_than_a_third_of_a_second_on_top_of_torch():
    """Median of three."""
    assert statistics.median(float(python(CLOCK)) for _ in range(3)) < 0.3


def test_import_needs_no_gpu_driver_or_compiler():
    """Nor does a call on the CPU, which does not wake CUDA."""
    assert python(NO_GPU) == "torch.Size([2, 1, 2, 1, 4]) False"


def test_import_brings_no_compiler():
    """What the GPU backends need is imported by those who call them."""
    loaded = python(
        "import torch, sys\nbefore = set(sys.modules)\nimport flashrnn\nprint(*(set(sys.modules) - before))"
    )
    assert not {name.split(".")[0] for name in loaded.split()} & {"triton", "cuda", "cupy"}
