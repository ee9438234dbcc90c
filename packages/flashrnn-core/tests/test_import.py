"""The core stands alone."""

import subprocess
import sys

LIST_FRAMEWORKS = """
import pkgutil, sys
import flashrnn_core, flashrnn_core.archs, flashrnn_core.cells, flashrnn_core.contract, flashrnn_core.reference
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "triton", "jax", "cupy", "cuda"}))
"""


def test_import_brings_no_framework():
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{LIST_FRAMEWORKS}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
