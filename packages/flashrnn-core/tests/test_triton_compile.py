"""The Triton kernels compiled ahead of time for GPUs that are not here: they fit, and spill no more than is known."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from flashrnn_core import Problem, get_cell

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

from flashrnn_core.triton.emit import kernels  # noqa: E402
from flashrnn_core.triton.plan import TILES, Gpu, plan, reason_against, saved_states  # noqa: E402

ARCHS = ("sm80", "sm90", "sm100", "sm120")
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
CASES = [  # cell, B, compute dtype, precision, state dtype, D; bytes spilled at most: forward, backward
    ("lstm", 16, "bfloat16", "bf16x6", "bfloat16", 64, 0, 0),
    ("slstm", 512, "bfloat16", "bf16x6", "float32", 64, 0, 0),
    ("gru", 16, "float16", "bf16x6", "float32", 96, 0, 0),
    ("elman", 16, "bfloat16", "bf16x6", "bfloat16", 24, 0, 0),
    ("elman", 512, "float16", "bf16x6", "float16", 256, 0, 0),
    ("lstm", 512, "float32", "tf32", "float32", 32, 0, 0),
    ("lstm", 16, "bfloat16", "bf16x6", "bfloat16", 128, 0, 64),
    ("slstm", 512, "bfloat16", "bf16x6", "bfloat16", 128, 128, 384),
    ("slstm", 16, "float32", "bf16x6", "float32", 48, 0, 160),
    ("slstm", 16, "float16", "bf16x6", "float16", 256, 64, 0),
    ("gru", 16, "float32", "tf32", "float32", 256, 64, 0),
]
OLDER = {  # the same, of Triton before 3.9 (seen with 3.6), which spills more of these
    ("slstm", 512, "bfloat16", "bf16x6", "bfloat16", 128): (256, 768),
    ("slstm", 16, "float16", "bf16x6", "float16", 256): (64, 16),
}
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
    CASES = [(*case[:6], *OLDER.get(case[:6], case[6:])) for case in CASES]


def resources(kernel, problem, plan, precision, capability):
    """(registers, bytes of stack, bytes of shared memory) of the kernel, compiled for the compute capability."""
    saved = saved_states(problem)
    compute, state = f"*{TYPES[problem.dtype]}", f"*{TYPES[problem.state_dtype]}"
    pointers = {"Wx": compute, "R": compute, "b": "*fp32", "dpre": compute, "dstates": "*fp32"}
    pointers |= dict.fromkeys(("states", "out", "last", "dout", "dlast"), state)
    pointers |= {"rec": None if plan.recompute else "*fp32", "saved": "*fp32" if saved else None}
    pointers |= {"memory": "*fp32", "resets": "*u8", "lengths": "*i64"}
    constants = plan.constants | {
        "D": problem.D,
        "PRECISION": precision,
        "ALIGN": 8,
        "REVERSE": False,
        "HIDDEN_ONLY": False,
        "GATES": problem.size("G"),
        "GR": problem.size("Gr"),
        "CUT": False,
        "CLIP": True,
    }
    constants |= {name: None for name, kind in pointers.items() if kind is None}
    if not (problem.resets or problem.lengths):
        constants |= {"resets": None, "lengths": None}
    names = [p.name for p in kernel.params]
    types = {"B": "i64", "T": "i32", "N": "i64", "clip": "fp32"}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name) or types.get(name, "i64") for name in names
    }
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"}
    source = triton.compiler.ASTSource(
        kernel, signature, {(names.index(n),): v for n, v in constants.items() if n in names}, attributes
    )
    target = triton.backends.compiler.GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    options = {"num_warps": plan.num_warps, "num_stages": 1, "maxnreg": 255, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=target, options=options)
    return *_usage(compiled.asm["cubin"]), compiled.metadata.shared


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack (spilled registers and more), as the toolkit in the wheel reads them."""
    tool = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"
    path = Path(os.environ["PYTEST_CUBIN"])
    path.write_bytes(cubin)
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_fits_every_architecture(case, arch, tmp_path, monkeypatch):
    if arch.name not in ARCHS:
        pytest.skip("the code of a neighbour; sm120 has the least shared memory, as sm86 and sm89 have")
    monkeypatch.setenv("PYTEST_CUBIN", str(tmp_path / "kernel.cubin"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name, B, dtype, precision, state_dtype, D, *allowed = case
    cell = get_cell(name)
    problem = Problem(cell, B, 64, 3, D, dtype, state_dtype)
    for backward in (False, True):
        made = plan(problem, precision, Gpu(arch.shared_bytes, processors=100), backward)
        pair = kernels(cell, dtype == "float32", saved_states(problem), made.stream)
        registers, spilled, shared = resources(pair[backward], problem, made, precision, arch.capability)
        assert registers > 0
        direction = pair._fields[backward]
        assert spilled <= allowed[backward], f"{direction}: {spilled} bytes spilled, {registers} registers, {made}"
        assert shared <= arch.shared_bytes, f"{direction}: {shared} bytes of shared memory, {made}"


def test_plan_depends_on_B_and_T_in_TILE_alone():
    for backward in (False, True):
        one, other = (
            plan(
                Problem(get_cell("lstm"), B, T, 3, 64, "bfloat16", "bfloat16"),
                "bf16x6",
                Gpu(10**5, 100),
                backward,
            )
            for B, T in ((1, 1), (512, 4096))
        )
        assert (one.constants.pop("TILE"), other.constants.pop("TILE")) == TILES
        assert one == other


def test_larger_D_names_what_would_run():
    problem = Problem(get_cell("lstm"), 1, 1, 1, 512, "bfloat16", "bfloat16")
    assert "cuda_fused" in reason_against(problem)
    assert "vanilla" in reason_against(Problem(get_cell("lstm"), 1, 1, 1, 8, "float64", "float64"))
