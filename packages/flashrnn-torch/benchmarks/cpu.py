"""CPU time of a forward call of ours, h alone in inference mode, T=8, beside a loop of plain Python.

    python cpu.py --out results/cpu_h100.json [--seconds 75]

A core that others share runs everything slower, for seconds at a time. So the calls of all cases and backends take
turns with the loop for a minute: the least is what a call takes, and the median of its ratios to the loop in the same
turn, times the loop's least, is that again, of typical turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import measure
import speed
import torch
from cases import DEFAULT, Case

BACKENDS = ("cuda_fused", "cuda")


def loop() -> int:
    """The yardstick."""
    x = 0
    for i in range(500):
        x += i * i
    return x


def calls(cases: list[Case]) -> measure.Functions:
    """By case and backend."""
    found: measure.Functions = {}
    for case in cases:
        able = [name for name in BACKENDS if speed.unable(case, name) is None]
        ours = speed.calls(case, able, None, {}, case.leaves(), None, cudnn=False)
        found |= {f"{case} {name.removeprefix('ours ')}": forward for name, (forward, _) in ours.items()}
    return found


def turns(functions: measure.Functions, seconds: float) -> dict[str, list[tuple[float, float]]]:
    """By name, of each turn: µs of a call, and of the loop."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, function in functions.items():
            call = measure.cpu_microseconds(function)
            times[name].append((call, measure.cpu_microseconds(loop, calls=1)))
    return times


def summary(times: dict[str, list[tuple[float, float]]]) -> dict:
    """{"loop_us": least, median and most, "calls_us": by name the least, the median, and that of typical turns}."""
    loops = [of_loop for turn in times.values() for _, of_loop in turn]
    found = {"turns": min(len(turn) for turn in times.values())}
    found["loop_us"] = {"least": min(loops), "median": statistics.median(loops), "most": max(loops)}
    found["calls_us"] = {
        name: {
            "least": min(call for call, _ in turn),
            "median": statistics.median(call for call, _ in turn),
            "by_the_loop": statistics.median(call / of_loop for call, of_loop in turn) * min(loops),
        }
        for name, turn in times.items()
    }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=DEFAULT, help="like lstm-N12D64B16; default: cases.py")
    parser.add_argument("--seconds", type=float, default=75)
    parser.add_argument("--commit", help="where the checkout is not a git repository")
    options = parser.parse_args()
    functions = calls([Case.parse(text, 8, "bfloat16") for text in options.cases])
    with torch.inference_mode():
        times = turns(functions, options.seconds)
    result = {"environment": speed.environment(options.commit), **summary(times)}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
