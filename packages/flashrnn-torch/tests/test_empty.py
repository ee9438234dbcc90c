"""No batch or no time is a defined, empty result, with gradients."""

import pytest
import torch
from checks import run
from problems import CELLS, Case, build


@pytest.mark.parametrize("options", [{}, {"resets": True, "lengths": True}, {"reverse": True}], ids=str)
@pytest.mark.parametrize("size", [{"B": 0}, {"T": 0}, {"B": 0, "T": 0}], ids=lambda s: "".join(f"{k}0" for k in s))
@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell, size, options):
    """Outputs are empty, the last states are the first, their cotangent comes back, the parameters' is zero."""
    inputs = build(Case(cell, **size, **options))
    result = run(inputs, "vanilla")
    assert result["states"].shape == inputs.case.problem.output_shape("states")
    assert torch.equal(result["last_states"], inputs.tensors["states"])
    assert torch.equal(result["dstates"], inputs.dlast_states)
    assert result["dWx"].shape == inputs.tensors["Wx"].shape
    for name in ("R", "b"):
        assert torch.equal(result[f"d{name}"], torch.zeros_like(inputs.tensors[name]))


def test_empty_without_states():
    assert not run(build(Case("slstm", T=0, states=None)), "vanilla")["last_states"].any()
