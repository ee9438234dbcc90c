"""How near `auto` comes to the fastest backend: all that support a shape, timed in turns, on a grid of shapes.

    python choice.py --out results/choice_h100.json

Of each shape two calls: a forward of h alone, and forward + backward. Kernels are compiled ahead, by processes. For
each call the file has the µs a step of every backend, what the model behind the choice said of it, the backend chosen,
and its time over that of the fastest. `vanilla` launches a dozen kernels a step, 40 µs at least: it is timed where the
fastest of the others takes more than half of that.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import measure
import speed
import torch
from cases import Case

from flashrnn import flashrnn
from flashrnn.backends import BACKENDS, choose

CALLS = ("forward", "forward_backward")
WITHIN = 1.1  # times the fastest
VANILLA = 20.0  # µs a step, of the fastest of the others, below which it is not timed
SHAPES = ((24, 16), (24, 32), (12, 64), (6, 128), (3, 256), (1, 256), (4, 384), (1, 512), (4, 512), (1, 768), (3, 768))
SHAPES += ((1, 1024), (1, 1536), (1, 2048), (1, 3072), (1, 4096))
BATCHES = (1, 16, 64, 256)
OTHERS = tuple((cell, *shape) for cell in ("gru", "slstm", "elman") for shape in ((12, 64), (1, 768), (1, 2048)))


def grid(T: int, dtype: str) -> Iterator[Case]:
    """All shapes of lstm with all batch sizes, some of the other cells with two."""
    for B in BATCHES:
        yield from (Case("lstm", N, D, B, T, dtype) for N, D in SHAPES)
    for B in (16, 128):
        yield from (Case(cell, N, D, B, T, dtype) for cell, N, D in OTHERS)


def run(case: Case, backend: str, call: str, leaves, dstates):
    """One of `CALLS`."""
    if call == "forward":
        with torch.no_grad():
            return flashrnn(*leaves, function=case.cell, backend=backend, hidden_only=True)
    states, _ = flashrnn(*leaves, function=case.cell, backend=backend)
    return torch.autograd.grad(states, leaves, dstates)


def compile_ahead(case: Case, backend: str) -> None:
    """In a process of its own, for the disk cache: no kernel depends on T."""
    short = replace(case, T=1)
    leaves, dstates = short.leaves(), short.dstates()
    for call in CALLS:
        run(short, backend, call, leaves, dstates)


def problems(case: Case) -> dict:
    """The problem of each call, as `flashrnn` sees it."""
    return {call: replace(case.problem(), hidden_only=call == "forward") for call in CALLS}


def kernels_of(case: Case) -> list[str]:
    """The backends, `vanilla` apart, that support both calls."""
    device = torch.device("cuda", 0)
    both = problems(case).values()
    able = [name for name, b in BACKENDS.items() if all(b.supports(problem, device) is None for problem in both)]
    return [name for name in able if name != "vanilla"]


def timed(case: Case, call: str, names: list[str], tensors, repeats: int) -> dict[str, float]:
    """µs a step of the call on each backend, by name."""
    functions = {name: functools.partial(run, case, name, call, *tensors) for name in names}
    for function in functions.values():
        function()
    times = measure.milliseconds(functions, repeats, seconds=0.5)
    return {name: ms * 1e3 / case.T for name, ms in times.items()}


def measured(case: Case, repeats: int) -> Iterator[dict]:
    """A row for each call."""
    device = torch.device("cuda", 0)
    tensors = case.leaves(), case.dstates()
    for call, problem in problems(case).items():
        times = timed(case, call, kernels_of(case), tensors, repeats)
        skipped = {}
        if min(times.values()) > VANILLA:
            times |= timed(case, call, ["vanilla"], tensors, 1)
        else:
            skipped["vanilla"] = f"its launches alone take twice as long as {VANILLA} µs a step, the fastest takes less"
        chosen = choose("auto", problem, device)
        modelled = {n: BACKENDS[n].microseconds(problem, device) for n in times if hasattr(BACKENDS[n], "microseconds")}
        measures = {"us_per_step": times, "modelled": modelled, "skipped": skipped}
        yield {**vars(case), "call": call, **measures, "auto": chosen, "ratio": times[chosen] / min(times.values())}


def summary(rows: list[dict]) -> str:
    """How often `auto` was within 10 % of the fastest, and where it was not."""
    missed = sorted((row for row in rows if row["ratio"] > WITHIN), key=lambda row: -row["ratio"])
    lines = [f"auto is within {WITHIN - 1:.0%} of the fastest in {len(rows) - len(missed)} of {len(rows)} calls"]
    for row in missed:
        times = ", ".join(f"{name} {us:.2f}" for name, us in sorted(row["us_per_step"].items(), key=lambda x: x[1]))
        modelled = ", ".join(f"{name} {us:.2f}" for name, us in row["modelled"].items())
        shape = f"{row['cell']} N={row['N']} D={row['D']} B={row['B']} {row['call']}"
        lines.append(f"  {row['ratio']:.2f}x {shape}: {row['auto']} chosen; µs a step {times}; modelled {modelled}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", help="like lstm-N12D64B16; default: the grid")
    parser.add_argument("--steps", type=int, default=256, help="T")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--commit", help="where the checkout is not a git repository")
    options = parser.parse_args()
    cases = [Case.parse(text, options.steps, options.dtype) for text in options.cases or ()]
    cases = cases or list(grid(options.steps, options.dtype))
    start = time.perf_counter()
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), multiprocessing.get_context("spawn")) as pool:
        compiled = [pool.submit(compile_ahead, case, name) for case in cases for name in kernels_of(case)]
        for one in compiled:
            one.result()
    print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
    result = {"environment": speed.environment(options.commit), "rows": []}
    for case in cases:
        result["rows"] += measured(case, options.repeats)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        gc.collect()
        torch.cuda.empty_cache()
    print(summary(result["rows"]), f"in {time.perf_counter() - start:.0f} s", sep="\n")
    if any(row["ratio"] > WITHIN for row in result["rows"]):
        sys.exit("auto is not always near the fastest")


if __name__ == "__main__":
    main()
