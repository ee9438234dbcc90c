"""Times the triton backend, and beside it, in the same run, PyPI flashrnn 1.0.8's `triton_fused`.

    python triton_speed.py --out results/triton_h100.json [--peer FOLDER]

FOLDER holds a package `peer_flashrnn`: the files of that release's `flashrnn/flashrnn/triton_fused`, with tanh taken
in float32 (`x = x.to(tl.float32)` in `triton_tanh`), without which Triton 3.6 does not compile it. Forward without
gradients, and forward + backward from dense cotangents of all states; the two take turns, L2 is flushed before each
run, times are medians in ms of CUDA events. Before a case is timed, its outputs are compared with the peer's.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import triton

from flashrnn import flashrnn

SEQUENCE = 1024
WITH_PEER = [(cell, N, D, B) for B in (16, 128) for N, D in ((24, 32), (12, 64)) for cell in ("lstm", "slstm")]
ALONE = [(cell, N, D, 16) for N, D in ((24, 32), (12, 64)) for cell in ("gru", "elman")]
ALONE += [(cell, N, D, 16) for N, D in ((6, 128), (3, 256)) for cell in ("lstm", "slstm", "gru", "elman")]
GATES = {"elman": (1, 1, 1, 1), "gru": (3, 3, 4, 1), "lstm": (4, 4, 4, 2), "slstm": (4, 4, 4, 4)}  # Gw Gr G S


def ours(cell, Wx, R, b):
    return flashrnn(Wx, R, b, function=cell, backend="triton")[0]  # S B T N D


def peer(cell, Wx, R, b):
    from peer_flashrnn import fwbw

    B, _, _, N, D = Wx.shape
    states = Wx.new_zeros(GATES[cell][3], B, N, D)
    run = fwbw.lstm_tr_fwbw if cell == "lstm" else fwbw.slstm_tr_fwbw
    return run(states, Wx, R, b, autocast_kernel_dtype="bfloat16")[0]  # T S B N D


def timed(functions, repeats):
    """Median ms of each function; they take turns, and the host runs ahead, as it does in training."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    events = {name: [] for name in functions}
    for turn in range(repeats + 3):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            function()
            end.record()
            if turn >= 3:
                events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def measure(cell, N, D, B, implementations, repeats):
    Gw, Gr, G, S = GATES[cell]
    new = {"device": "cuda", "dtype": torch.bfloat16}
    torch.manual_seed(0)
    Wx = torch.randn(B, SEQUENCE, Gw, N, D, **new)
    R, b = torch.randn(Gr, N, D, D, **new) / D**0.5, torch.randn(G, N, D, **new)
    leaves = [x.requires_grad_() for x in (Wx, R, b)]
    row = {"cell": cell, "N": N, "D": D, "B": B, "T": SEQUENCE, "dtype": "bfloat16"}
    forward, both = {}, {}
    for name, function in implementations.items():
        out = function(cell, *leaves)
        if name == "peer":
            with torch.no_grad():
                h, h_peer = ours(cell, *leaves)[0].float(), out[:, 0].transpose(0, 1).float()
                row["difference"] = ((h - h_peer).norm() / h.norm()).item()
        cotangent = torch.randn_like(out)

        def fw(function=function):
            with torch.no_grad():
                function(cell, *leaves)

        def fwbw(function=function, cotangent=cotangent):
            torch.autograd.grad(function(cell, *leaves), leaves, cotangent)

        forward[name], both[name] = fw, fwbw
    row["forward_ms"] = timed(forward, repeats)
    row["forward_backward_ms"] = timed(both, repeats)
    return row


def environment():
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    commit = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    answers = [subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in (driver, commit)]
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": answers[0],
        "commit": answers[1],
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer", type=Path, help="folder of the package peer_flashrnn")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--commit", help="where the checkout is not a git repository")
    options = parser.parse_args()
    if options.peer:
        sys.path.insert(0, str(options.peer))
    rows = []
    for case in WITH_PEER + ALONE:
        compared = {"peer": peer} if options.peer and case in WITH_PEER else {}
        rows.append(measure(*case, {"triton": ours, **compared}, options.repeats))
        row = rows[-1]
        text = f"{row['cell']:6} N{row['N']} D{row['D']} B{row['B']}: "
        for key in ("forward_ms", "forward_backward_ms"):
            times = row[key]
            text += f" {key} {times['triton']:.3f}"
            if "peer" in times:
                text += f" (peer {times['peer']:.3f}: {times['peer'] / times['triton']:.2f}x)"
        print(text, f"difference {row['difference']:.1e}" if "difference" in row else "", flush=True)
    about = environment()
    if options.commit:
        about["commit"] = options.commit
    options.out.write_text(json.dumps({"environment": about, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
