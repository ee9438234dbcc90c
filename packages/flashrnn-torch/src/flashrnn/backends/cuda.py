"""`cuda`: not in this release; it raises and says so."""

from __future__ import annotations

import torch

from flashrnn_core.contract import Problem


def supports(problem: Problem, device: torch.device) -> str | None:
    """None, or the reason why not."""
    return "it is not in this release; backend='vanilla' runs every call on every device"
