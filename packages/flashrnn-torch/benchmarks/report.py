"""Markdown tables from the JSON of speed.py or triton_speed.py.

    python report.py results/h100.json ...                         # to the screen
    python report.py results/h100.json ... --page ../../../docs/benchmarks.md

With `--page`, what stands between the page's lines `<!-- speed -->` and `<!-- /speed -->` is replaced. A ratio is the
other's time over ours; one below 1 is a loss, in bold.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

BEGIN, END = "<!-- speed -->", "<!-- /speed -->"
# Whose memory ours is compared with.
COUNTERPARTS = {"ours triton": "peer triton_fused", "ours cuda": "peer cuda", "ours cuda_fused": "peer cuda_fused"}


def table(result: dict) -> str:
    """The tables of one run."""
    about = result["environment"]
    rows = result["cases"]
    sample = rows[0]
    text = [", ".join(f"{name} {value}" for name, value in about.items()) + f"; {sample['dtype']}, T={sample['T']}."]
    text += [f"\n{note}" for note in result.get("notes", ())]
    text += ["", *_times(rows)]
    if any("extra_mib" in row for row in rows):
        text += ["", *_costs(rows)]
    if "first_call_s" in result:
        text += ["", *_first_calls(result["first_call_s"])]
    failed = [f"- {_case(row)}, {name}: {reason}" for row in rows for name, reason in row["failed"].items()]
    if failed:
        text += ["", "Not timed:", "", *failed]
    return "\n".join(text) + "\n"


def _times(rows: list[dict]) -> list[str]:
    head = ["case", "forward, µs a step", "flashrnn 1.0.8", "×", "torch.nn", "×"]
    head += ["forward + backward, ms", "flashrnn 1.0.8", "×", "torch.nn", "×"]
    body = []
    for row in rows:
        for name in _ours(row):
            line = [f"{_case(row)} {name.removeprefix('ours ')}"]
            for key in ("forward_us_per_step", "forward_backward_ms"):
                times = row[key]
                line.append(f"{times[name]:.2f}")
                for kind in ("peer", "cudnn"):
                    other = _best(times, kind)
                    line.append(f"{times[other]:.2f} {other.split()[1]}" if other else "–")
                    line.append(_ratio(times[other] / times[name]) if other else "–")
            body.append(line)
    return _markdown(head, body)


def _costs(rows: list[dict]) -> list[str]:
    head = ["case", "extra memory, MiB", "its counterpart of flashrnn 1.0.8", "ours / it", "torch.nn"]
    head += ["CPU of a forward, µs", "flashrnn 1.0.8", "torch.nn", "CPU of forward + backward, µs"]
    head += ["flashrnn 1.0.8", "torch.nn"]
    body = []
    for row in rows:
        for name in _ours(row):
            memory, cpu = row["extra_mib"], row.get("cpu_us", {})
            fused = memory.get(COUNTERPARTS[name])
            line = [f"{_case(row)} {name.removeprefix('ours ')}", f"{memory[name]:.1f}"]
            line += [f"{fused:.1f}", f"{memory[name] / fused:.2f}"] if fused else ["–", "–"]
            line.append(f"{memory['cudnn float16']:.1f}" if "cudnn float16" in memory else "–")
            for key in ("forward", "forward_backward"):
                times = {other: costs[key] for other, costs in cpu.items()}
                for best in (name, _best(times, "peer"), _best(times, "cudnn")):
                    line.append(f"{times[best]:.0f}" if best in times else "–")
            body.append(line)
    return _markdown(head, body)


def _first_calls(first: dict) -> list[str]:
    head = ["first call, s", "forward, compiled", "from disk", "forward + backward after it, compiled", "from disk"]
    body = []
    for backend, runs in first.items():
        for case in runs["compiled"]:
            line = [f"{case} {backend}"]
            for key in ("forward", "forward_backward"):
                line += [f"{runs[kind][case][key]:.3f}" for kind in ("compiled", "from_disk")]
            body.append(line)
        body[-len(runs["compiled"])][0] += " (with imports)"
    return _markdown(head, body)


def _ours(row: dict) -> list[str]:
    return [name for name in row.get("forward_us_per_step", {}) if name.startswith("ours")]


def _best(times: dict[str, float], kind: str) -> str | None:
    return min((name for name in times if name.startswith(kind)), key=times.get, default=None)


def _case(row: dict) -> str:
    return f"{row['cell']} N={row['N']} D={row['D']} B={row['B']}"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"**{value:.2f}**"


def _markdown(head: list[str], body: list[list[str]]) -> list[str]:
    """A table, without the columns in which nothing stands."""
    kept = [i for i in range(len(head)) if any(line[i] != "–" for line in body)]
    lines = [[line[i] for i in kept] for line in (head, ["---", *["---:"] * (len(head) - 1)], *body)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    text = "\n".join(table(json.loads(path.read_text())) for path in options.results)
    if options.page is None:
        print(text)
        return
    page, count = re.subn(
        f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{text}\n{END}", options.page.read_text(), flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{options.page}: expected one pair of lines {BEGIN} and {END}, found {count}")
    options.page.write_text(page)


if __name__ == "__main__":
    main()
