"""Time on the GPU, on the CPU, and memory, of functions that take no arguments."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

Functions = dict[str, Callable[[], object]]
AHEAD = 6_000_000  # clocks, about 3 ms: the GPU is kept busy while the CPU launches, so that the CPU is not timed


def milliseconds(functions: Functions, repeats: int, seconds: float) -> dict[str, float]:
    """Median time on the GPU of each function, in ms. They take turns, with L2 flushed before each.

    It ends after `repeats` turns, or after `seconds` and at least five.
    """
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in functions}
    begin = time.perf_counter()
    for turn in range(repeats):
        if turn >= 5 and time.perf_counter() - begin > seconds:
            break
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(AHEAD)
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def cpu_microseconds(function: Callable[[], object], calls: int = 10, batches: int = 15) -> float:
    """CPU time of one of many asynchronous calls, in µs: the least of the batches, short ones, as a core that others
    share is free for some only. Where none is, for seconds, they take up to twice as long: call it again later, and
    take the lesser.
    """
    times = []
    for _ in range(batches):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return min(times)


def extra_mebibytes(step: Callable[[], tuple[torch.Tensor, ...]]) -> float:
    """Peak memory of a training step that has run before, beyond its inputs and the tensors it returns, in MiB."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return (peak - sum(x.numel() * x.element_size() for x in returned)) / 2**20
