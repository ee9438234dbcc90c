"""The speed of `triton` beside PyPI flashrnn 1.0.8's `triton_fused`, in turns in one process, in about a minute.

    pip install --no-deps --target SITE flashrnn==1.0.8
    python prepare_peer.py SITE/flashrnn PEER
    python triton_speed.py --out results/triton_h100.json [--peer PEER]
    python report.py results/triton_h100.json --page ../../../docs/triton.md

What is measured, and the gate that comes before, are those of speed.py; torch.nn is left out. This backend of the
peer's is Python alone, it needs einops and no nvcc. Both are compiled ahead, one process a case.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import peer as peers
import speed
import torch
from cases import Case
from report import table

CASES = (
    *(f"{cell}-N{N}D{D}B{B}" for B in (16, 128) for N, D in ((24, 32), (12, 64)) for cell in ("lstm", "slstm")),
    *("gru-N12D64B16", "elman-N12D64B16"),
    # what the peer cannot run
    *(f"{cell}-N{N}D{D}B16" for N, D in ((6, 128), (3, 256)) for cell in ("lstm", "slstm")),
    *("lstm-N6D128B128", "lstm-N3D256B128"),
)


def compile_ours(case: Case) -> None:
    """Leaves the kernels of the case in Triton's cache on disk; none depends on T."""
    short = replace(case, T=8)
    for forward, step in speed.calls(short, ["triton"], None, {}, short.leaves(), short.dstates(), False).values():
        with torch.no_grad():
            forward()
        step()
    torch.cuda.synchronize()


def ready(folder: Path) -> str | None:
    """None, or what is missing to run the peer."""
    if not (folder / "peer_flashrnn").is_dir():
        return f"--peer: {folder} has no package peer_flashrnn; prepare_peer.py makes it"
    if importlib.util.find_spec("einops") is None:
        return "--peer: flashrnn 1.0.8 needs the package einops (pip install einops)"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=CASES, help="like lstm-N12D64B16")
    parser.add_argument("--peer", type=Path, help="folder made by prepare_peer.py")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--commit", help="where the checkout is not a git repository")
    options = parser.parse_args()
    missing = ready(options.peer) if options.peer else None
    if missing:
        parser.error(missing)
    start = time.perf_counter()
    cases = [Case.parse(text, 1024, "bfloat16") for text in options.cases]
    peer, built = None, {}
    workers = min(len(cases), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        compiled = [pool.submit(compile_ours, case) for case in cases]
        if options.peer:
            peer = peers.load(options.peer)
            keys = [(case, "triton_fused") for case in cases if "triton_fused" in peers.backends(case)]
            built = peers.build(keys, options.peer, Path(tempfile.mkdtemp()), seconds=60)
        for one in compiled:
            one.result()
    print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
    result = {"environment": speed.environment(options.commit), "cases": []}
    for case in cases:
        result["cases"].append(speed.measured(case, ["triton"], peer, built, options.repeats, cudnn=False))
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        gc.collect()
        torch.cuda.empty_cache()
    print(table(result), f"in {time.perf_counter() - start:.0f} s", sep="\n")
    if any(row["failed"] for row in result["cases"]):
        sys.exit("not all was timed")


if __name__ == "__main__":
    main()
