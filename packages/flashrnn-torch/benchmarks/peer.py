"""PyPI flashrnn 1.0.8 as package `peer_flashrnn` (see prepare_peer.py): built ahead in parallel, then called.

Its CUDA backends are compiled by nvcc for each configuration, batch size included. `build` does that in one process
a configuration, which then also runs the whole problem forward and backward: one that fails, crashes or hangs is
known before the timing process has touched it. That process loads the modules built, without its solver or ninja.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from cases import Case

Key = tuple[Case, str]  # and the peer's backend
ATTEMPTS = 3  # at a build that ends by a signal: of ten at once, its solver of tile sizes aborts in one or more


def backends(case: Case) -> tuple[str, ...]:
    """The peer's backends that exist for the case, the likely best first: its Triton needs powers of two up to 64."""
    if case.cell == "gru":
        return ("cuda",)
    if case.cell != "elman" and case.D in (16, 32, 64):
        return "triton_fused", "cuda_fused", "cuda"
    return ("cuda", "cuda_fused") if case.D >= 2048 else ("cuda_fused", "cuda")


def load(folder: Path):
    """The peer's module that holds its function `flashrnn`."""
    sys.path.append(str(folder))
    return importlib.import_module("peer_flashrnn.flashrnn.flashrnn")


def build(keys: list[Key], folder: Path, work: Path, seconds: float) -> dict[Key, dict]:
    """What each configuration became: {"seconds", "module", "file"} or {"reason"}. Keys are in order of priority. What
    `work` holds of an earlier call is taken as it is.

    The seconds are no first call of the peer's: builds share the cores, and its solver may find its cache filled.
    """
    end = time.monotonic() + seconds
    record = work / "built.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    cores = os.cpu_count() or 1
    environment = {
        "TORCH_EXTENSIONS_DIR": str(work / "extensions"),
        "CONSTRINT_CACHE_DIR": str(work / "constrint"),  # of the peer's solver of tile sizes: up to a minute each
        "MAX_JOBS": "3",  # as many of its files take long
        **_wheels(work),
    }

    def one(key: Key) -> dict:
        case, backend = key
        words = folder, case.cell, case.N, case.D, case.B, case.T, case.dtype, backend
        for _ in range(ATTEMPTS):
            left = end - time.monotonic()
            if left <= 0:
                return {"reason": f"not built: the {seconds:.0f} s for building were spent"}
            process = subprocess.Popen(
                [sys.executable, __file__, *map(str, words)],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            try:
                output = process.communicate(timeout=left)[0]
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return {"reason": f"building or its first run did not end within {left:.0f} s"}
            lines = output.strip().splitlines()
            if process.returncode == 0:
                return json.loads(next(x for x in reversed(lines) if x.startswith('{"seconds"')))
            (work / f"{case}-{backend}.log").write_text(output)
            if process.returncode > 0:
                break
        errors = [x for x in lines if "error:" in x] or lines[-1:]  # a compiler's, else Python's
        return {"reason": f"exit status {process.returncode}: {''.join(errors[:1])[:300]}"}

    missing = [key for key in keys if _name(key) not in known]
    with ThreadPoolExecutor(cores) as pool:
        known |= dict(zip(map(_name, missing), pool.map(one, missing), strict=True))
    record.write_text(json.dumps(known))
    return {key: known[_name(key)] for key in keys}


def _name(key: Key) -> str:
    case, backend = key
    return f"{backend} {case} T{case.T} {case.dtype}"


def _wheels(work: Path) -> dict[str, str]:
    """Headers and libcublas of torch's nvidia wheels, for a CUDA toolkit that came without them."""
    roots = [Path(x) for x in importlib.import_module("nvidia").__path__]
    headers = [str(x) for root in roots for x in root.glob("*/include")]
    libraries = work / "lib"
    libraries.mkdir(parents=True, exist_ok=True)
    for library in (x for root in roots for x in root.glob("*/lib/libcublas.so.*")):
        (libraries / "libcublas.so").unlink(missing_ok=True)
        (libraries / "libcublas.so").symlink_to(library)
    return {"CPLUS_INCLUDE_PATH": ":".join(headers), "LIBRARY_PATH": str(libraries)}


def install(peer, key: Key, built: dict) -> None:
    """Puts a module that `build` made where the peer keeps those that it has compiled."""
    case, backend = key
    if backend == "triton_fused":
        return
    spec = importlib.util.spec_from_file_location(built["module"], built["file"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = peer.FlashRNNConfig(
        **{"head_dim": case.D, "num_heads": case.N, "batch_size": case.B, "function": case.cell, "backend": backend},
        **dict.fromkeys(("dtype", "dtype_w", "dtype_r", "dtype_b"), case.dtype),
    )
    arguments = True, case.B, config.hidden_dim, case.N
    device = torch.cuda.current_device()
    if backend == "cuda_fused":
        peer._FlashRNNCUDAFused.mod[f"{config!r}_device{device}"] = module.FlashRNNFuncFused(*arguments)
    else:
        peer._FlashRNNCUDA.mod[f"{config!r}_{device}"] = module.FlashRNNFunc(*arguments)


def _build_one(folder: Path, case: Case, backend: str) -> dict:
    peer = load(folder)
    parametric = importlib.import_module("peer_flashrnn.flashrnn.cuda_init_parametric")
    loaded = []
    compile_and_load = peer.load

    def remember(**arguments):
        loaded.append(compile_and_load(**arguments))
        return loaded[-1]

    peer.load = parametric.load = remember
    start = time.perf_counter()
    for T in (8, case.T):  # each has kernels of its own in the peer's Triton
        problem = replace(case, T=T)
        leaves = problem.leaves()
        states, _ = peer.flashrnn(*leaves, function=case.cell, backend=backend, dtype=case.dtype)
        torch.autograd.grad(states, leaves, problem.dstates())
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    module = loaded[-1] if loaded else None
    return {"seconds": seconds, "module": module and module.__name__, "file": module and module.__file__}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Builds one configuration; the last line printed is JSON.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("cell")
    for dim in "NDBT":
        parser.add_argument(dim, type=int)
    parser.add_argument("dtype")
    parser.add_argument("backend")
    given = parser.parse_args()
    wanted = Case(given.cell, given.N, given.D, given.B, given.T, given.dtype)
    print(json.dumps(_build_one(given.folder, wanted, given.backend)), flush=True)
