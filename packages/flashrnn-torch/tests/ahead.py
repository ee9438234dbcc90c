"""Compiles what GPU tests are about to need, in processes: NVRTC would do with threads, Triton and Python not."""

import contextlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, wait

import torch
from checks import run
from problems import build

from flashrnn.backends import BACKENDS, cuda_fused
from flashrnn_core.cuda import launch


def chosen(request, without: str = "") -> list:
    """The cases of the module's tests that are to run, each once; not of those that use the fixture `without`."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    cases = [item.callspec.params.get("case") for item in items if without not in item.fixturenames]
    return [case for case in dict.fromkeys(cases) if case is not None]


def compile_ahead(cases, backend: str, arch: str | None = None) -> None:
    """Fills the disk caches with the kernels of the cases. What fails here fails again in the test that needs it."""
    workers = min(os.cpu_count() or 1, 16, len(cases) // 4)
    if workers < 2 or "PYTEST_XDIST_WORKER" in os.environ:
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), use_arch, (arch,)) as pool:
        wait([pool.submit(first_call, case, backend) for case in cases])


def first_call(case, backend: str) -> None:
    """The case for one step: no kernel depends on T."""
    if BACKENDS[backend].supports(case.problem, torch.device("cuda", 0)) is None:
        run(build(case.but(T=1), "cuda"), backend)


def use_arch(arch: str | None) -> None:
    """From here on this process plans and compiles for the architecture; None: for the environment's, or the GPU's."""
    torch.cuda.synchronize()
    if arch is not None:
        os.environ["FLASHRNN_ARCH"] = arch
    for cached in (cuda_fused._plan, cuda_fused._call, launch.plan_for, launch.kernel_for, launch.begin):
        cached.cache_clear()


@contextlib.contextmanager
def on_arch(arch: str):
    """Inside, `use_arch`; then the environment's again."""
    before = os.environ.get("FLASHRNN_ARCH")
    use_arch(arch)
    try:
        yield
    finally:
        os.environ.pop("FLASHRNN_ARCH")
        use_arch(before)
