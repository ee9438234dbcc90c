"""Lets the tests, run from anywhere, import their shared modules `problems`, `checks` and `equations`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
