"""Every speed figure: ours, torch.nn (cuDNN) and PyPI flashrnn 1.0.8, taking turns in one process.

    python speed.py --out results/h100.json [--peer FOLDER] [--cases lstm-N12D64B16 ...] [--backends cuda_fused triton]

FOLDER is what prepare_peer.py made; building the peer needs nvcc and g++, ours does not. For each case, on the GPU:
- the gate: outputs and gradients of ours on a short sequence against `vanilla` in float32; red: not timed;
- forward without gradients (ours: h alone), forward + backward from a dense cotangent of everything returned;
- peak memory of that training step beyond its inputs and what it returns;
- CPU time of an asynchronous call at T=8, forward in inference mode, and forward + backward, the least of many short
  batches of calls in turns some seconds apart;
and in new processes the first call of each of our specialisations, compiled and from the disk cache.

torch.nn has one head: it runs with input size = hidden size = D, so N=1 is the comparison that counts; its time has
the GEMM of the inputs in it, ours and the peer's have not. Medians of CUDA events, L2 flushed before each run.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import first_call
import measure
import peer as peers
import torch
from cases import DEFAULT, Case
from report import table

from flashrnn import flashrnn
from flashrnn.backends import BACKENDS

TURNS = 12  # of measuring CPU time
RNN = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "elman": torch.nn.RNN}


def gate(case: Case, backend: str) -> dict[str, float]:
    """Error of `backend` over that of `vanilla` in the same dtype, both against `vanilla` in float32; T = 24."""
    short = replace(case, T=24)
    inputs, dstates = short.leaves(), short.dstates()
    S, B, _, N, D = dstates.shape

    def run(name, leaves, states=None):
        leaves = [x.detach().requires_grad_() for x in leaves]
        out, _ = flashrnn(*leaves, states, function=case.cell, backend=name)
        return [out.detach(), *torch.autograd.grad(out, leaves, dstates.to(out.dtype))]

    expected = run("vanilla", [x.float() for x in inputs])
    yardstick = run("vanilla", inputs, torch.zeros(S, B, 1, N, D, device="cuda"))
    ratios = {}
    names = ("states", "dWx", "dR", "db")
    for name, got, yard, want in zip(names, run(backend, inputs), yardstick, expected, strict=True):
        errors = [((x.to(got.dtype).float() - want).norm() / want.norm()).item() for x in (got, yard)]
        ratios[name] = errors[0] / (2 * errors[1] + 1e-6)
    return ratios


def unable(case: Case, backend: str) -> str | None:
    """Why our backend cannot run the case; None: it can."""
    return BACKENDS[backend].supports(case.problem(), torch.device("cuda", torch.cuda.current_device()))


def calls(case: Case, backends: list[str], peer, built: dict, leaves, dstates, cudnn: bool = True) -> dict[str, tuple]:
    """By name: (a forward that records nothing, a training step that returns its outputs and gradients).

    `cudnn`: torch.nn too, where it has the cell.
    """
    found = {}
    implementations = [(f"ours {name}", flashrnn, name, {"hidden_only": True}, {}) for name in backends]
    for (other, name), outcome in built.items():
        if other == case and "reason" not in outcome:
            implementations.append((f"peer {name}", peer.flashrnn, name, *[{"dtype": case.dtype}] * 2))
    for label, function, name, options, recorded in implementations:

        def forward(function=function, name=name, options=options):
            return function(*leaves, function=case.cell, backend=name, **options)

        def step(function=function, name=name, recorded=recorded):
            states, last = function(*leaves, function=case.cell, backend=name, **recorded)
            return (states, last, *torch.autograd.grad(states, leaves, dstates))

        found[label] = forward, step
    if cudnn and case.cell in RNN:
        for dtype in ("float16", "bfloat16") if case.dtype != "float32" else ("float32",):
            found[f"cudnn {dtype}"] = torch_nn(case, getattr(torch, dtype))
    return found


def torch_nn(case: Case, dtype: torch.dtype) -> tuple:
    """cuDNN's, with one head of dim D and the GEMM of the inputs."""
    new = {"device": "cuda", "dtype": dtype}
    rnn = RNN[case.cell](case.D, case.D, **new)
    inference = copy.deepcopy(rnn).eval()
    inference.flatten_parameters()
    x = torch.randn(case.T, case.B, case.D, **new, requires_grad=True)
    dy = torch.randn(case.T, case.B, case.D, **new)

    def step():
        y, _ = rnn(x)
        return (y, *torch.autograd.grad(y, (x, *rnn.parameters()), dy))

    return lambda: inference(x)[0], step


def measured(case: Case, backends: list[str], peer, built: dict, repeats: int, cudnn: bool = True) -> dict:
    """The row of a case; what is timed is what `calls` gives."""
    reasons = {name: unable(case, name) for name in backends}
    backends = [name for name in backends if reasons[name] is None]
    failed = {f"ours {name}": reason for name, reason in reasons.items() if reason is not None}
    row = {**vars(case), "gate": {name: gate(case, name) for name in backends}, "failed": failed}
    for (other, name), outcome in built.items():
        if other == case:
            if "reason" in outcome:
                row["failed"][f"peer {name}"] = outcome["reason"]
            else:
                peers.install(peer, (case, name), outcome)
    if any(ratio > 1 for ratios in row["gate"].values() for ratio in ratios.values()):
        row["failed"] |= {f"ours {name}": "the gate is red, nothing was timed" for name in backends}
        return row
    leaves, dstates = case.leaves(), case.dstates()
    found = calls(case, backends, peer, built, leaves, dstates, cudnn)
    reference = None
    for name, (forward, step) in list(found.items()):
        try:
            with torch.no_grad():
                forward()
                out = forward()
            step()
            step()
            row.setdefault("extra_mib", {})[name] = measure.extra_mebibytes(step)
            if not name.startswith("cudnn"):
                h = out[0][0, :, :64].float()  # the first steps: rounding grows over a sequence
                reference = h if reference is None else reference
                row.setdefault("difference", {})[name] = ((h - reference).norm() / reference.norm()).item()
        except (RuntimeError, ValueError, AssertionError) as error:
            row["failed"][name] = f"{type(error).__name__}: {str(error)[:300]}"
            del found[name]

    def recordless(forward):
        def run():
            with torch.no_grad():
                forward()

        return run

    forwards = {name: recordless(forward) for name, (forward, _) in found.items()}
    steps = {name: step for name, (_, step) in found.items()}
    times = measure.milliseconds(forwards, repeats, seconds=4)
    row["forward_us_per_step"] = {name: ms * 1e3 / case.T for name, ms in times.items()}
    row["forward_backward_ms"] = measure.milliseconds(steps, repeats, seconds=6)
    return row


def cpu(case: Case, backends: list[str], peer, built: dict, names) -> dict[str, dict[str, float]]:
    """CPU time of a call, in µs, at T=8, of those named: {name: {"forward", "forward_backward"}}."""
    short = replace(case, T=8)
    leaves, dstates = short.leaves(), short.dstates()
    outcomes = {(short, name): outcome for (other, name), outcome in built.items() if other == case}
    result = {}
    backends = [name for name in backends if f"ours {name}" in names]
    for name, (forward, step) in calls(short, backends, peer, outcomes, leaves, dstates).items():
        if name not in names:
            continue
        with torch.inference_mode():
            forward()
            result[name] = {"forward": measure.cpu_microseconds(forward)}
        step()
        result[name]["forward_backward"] = measure.cpu_microseconds(step, calls=5, batches=4)
    return result


def least(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    return {name: min(a[name], b[name]) for name in a}


def environment(commit: str | None) -> dict[str, str]:
    """What the figures hold for."""
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    head = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    texts = [subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in (driver, head)]
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": texts[0],
        "commit": commit or texts[1],
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        **{name: importlib.metadata.version(name) for name in ("triton", "cuda-core")},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=DEFAULT, help="like lstm-N12D64B16; default: cases.py")
    parser.add_argument("--backends", nargs="+", default=["cuda_fused"], help="ours")
    parser.add_argument("--peer", type=Path, help="folder made by prepare_peer.py")
    parser.add_argument("--peer-backends", nargs="+", default=["triton_fused", "cuda_fused", "cuda"])
    parser.add_argument("--work", type=Path, help="folder of the peer's builds; default: a new one")
    parser.add_argument("--build-only", action="store_true", help="build the peer in the folder --work, time nothing")
    parser.add_argument("--budget", type=float, default=300, help="seconds for building the peer")
    parser.add_argument("--steps", type=int, default=1024, help="T")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--commit", help="where the checkout is not a git repository")
    options = parser.parse_args()
    cases = [Case.parse(text, options.steps, options.dtype) for text in options.cases]
    peer, built = None, {}
    if options.peer:
        peer = peers.load(options.peer)
        keys = [(case, name) for case in cases for name in peers.backends(case) if name in options.peer_backends]
        keys.sort(key=lambda key: (peers.backends(key[0]).index(key[1]), key[1] == "cuda"))  # the likely best first
        work = options.work or Path(tempfile.mkdtemp())
        built = peers.build(keys, options.peer, work, options.budget)
    for (case, name), outcome in built.items():
        print(f"peer {name} {case}: {outcome.get('reason') or format(outcome['seconds'], '.0f') + ' s'}", flush=True)
    if options.build_only:
        return
    result = {"environment": environment(options.commit), "cases": []}
    result["peer_builds"] = [{"case": str(case), "backend": name, **outcome} for (case, name), outcome in built.items()]
    for case in cases:
        row = measured(case, options.backends, peer, built, options.repeats)
        result["cases"].append(row)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        gc.collect()
        torch.cuda.empty_cache()
    for _ in range(TURNS):  # neighbours slow a CPU down for seconds
        for case, row in zip(cases, result["cases"], strict=True):
            again = cpu(case, options.backends, peer, built, row.get("extra_mib", ()))
            row["cpu_us"] = {
                name: least(times, row.get("cpu_us", {}).get(name, times)) for name, times in again.items()
            }
    result["first_call_s"] = {
        name: first_call.seconds(name, [case for case in cases if unable(case, name) is None])
        for name in options.backends
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    if any("the gate is red" in reason for row in result["cases"] for reason in row["failed"].values()):
        sys.exit("the gate is red")


if __name__ == "__main__":
    main()
