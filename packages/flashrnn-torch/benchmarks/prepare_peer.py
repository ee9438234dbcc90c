"""Makes a copy of an installed PyPI flashrnn 1.0.8 that runs on CUDA 13 and beside ours: package `peer_flashrnn`.

    pip install --no-deps --target SITE flashrnn==1.0.8
    python prepare_peer.py SITE/flashrnn DEST        # then: speed.py --peer DEST

What differs from the release is `EDITS`, each with its reason; none of them is in a kernel's loop. Raises ValueError
if an edit finds nothing to change: then SOURCE is another release.
"""

import argparse
import re
import shutil
from pathlib import Path

PROPERTIES = """\
properties = torch.cuda.get_device_properties(device_id)
    return {
        "maxThreadsPerBlock": 1024,
        "regsPerMultiprocessor": properties.regs_per_multiprocessor,
        "multiProcessorCount": properties.multi_processor_count,
        "sharedMemPerBlockOptin": properties.shared_memory_per_block_optin,
    }
"""
EDITS = (
    # CUDA 13 has no cudaDeviceProp.clockRate and others that gpu_info.cc names: the four fields read come from torch
    ("flashrnn/gpu_info/gpu_info.py", r"gpu_info_cuda = .*\Z", PROPERTIES),
    # Triton 3.6 has no exp of bfloat16
    ("flashrnn/triton_fused/*.py", r"(def triton_tanh\(x\):\n)", r"\1    x = x.to(tl.float32)\n"),
    # up to 10 s of sleep before each build, against races that speed.py does not have
    ("flashrnn/cuda_init.py", r"\n *time\.sleep\(random\.random\(\) \* 10\)", ""),
)


def prepare(source: Path, destination: Path) -> Path:
    """Copies and edits; returns the package's folder."""
    package = destination / "peer_flashrnn"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__", "speed_experiments"))
    for files, pattern, replacement in EDITS:
        count = 0
        for path in package.glob(files):
            text, changes = re.subn(pattern, replacement, path.read_text(), flags=re.DOTALL)
            path.write_text(text)
            count += changes
        if count == 0:
            raise ValueError(f"{files}: nothing matches {pattern!r}; {source} is not flashrnn 1.0.8")
    return package


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the folder flashrnn of site-packages")
    parser.add_argument("destination", type=Path, help="a folder; peer_flashrnn is made in it")
    options = parser.parse_args()
    print(prepare(options.source, options.destination))


if __name__ == "__main__":
    main()
