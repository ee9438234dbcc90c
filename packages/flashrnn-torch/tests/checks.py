"""The rule by which every backend is judged, over outputs, last states and all gradients.

    assert_backend(case, backend, device)

runs the backend, the oracle in float64, and the yardstick: `vanilla` in the same compute dtype with float32 states.
The backend's error against the oracle is at most twice the yardstick's plus a small floor. The oracle of a small
problem is NumPy's (`flashrnn_core.reference`), that of a large one `vanilla` in float64 on the device, which the
tests prove equal to 1e-12. Nothing here is for one backend or device.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from problems import GRADIENTS, Case, Inputs, build

from flashrnn import flashrnn, gradients
from flashrnn_core import get_cell, reference

FACTOR = 2.0
LARGE, LARGE_R = 200_000, 2_000_000  # elements of Wx and of R from which the oracle runs in torch
Result = dict[str, torch.Tensor]  # states, last_states, and d<tensor> of each input that has a gradient


def assert_pieces_agree(inputs, backend, more_than):
    """Pieces of time, more than so many, change the order in which matmuls add, and nothing else."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gradients, "LEAST_STEPS", 2)
        assert len(gradients.pieces(inputs.case.problem)) > more_than
        by_pieces = run(inputs, backend)
        patched.setattr(gradients, "LEAST_STEPS", 100)
        at_once = run(inputs, backend)
    for name, want in at_once.items():
        torch.testing.assert_close(by_pieces[name], want, rtol=1e-2, atol=1e-2 * want.abs().max().item())


def assert_backend(
    case: Case, backend: str, device: str = "cpu", b_dtype: str | None = None, *, gradients: bool = True
) -> dict[str, float]:
    """The rule, for one case. Returns the largest error over the allowed one, by tensor."""
    return assert_within(*judged(case, backend, device, b_dtype, gradients=gradients), case.dtype)


def judged(
    case: Case, backend: str, device: str = "cpu", b_dtype: str | None = None, *, gradients: bool = True
) -> tuple[Result, Result, Result]:
    """What the rule compares: the backend's result, the yardstick, the oracle."""
    inputs = build(case, device, b_dtype)
    expected = oracle(inputs, gradients=gradients)
    states = "float64" if case.dtype == "float64" else "float32"
    yardstick = run(inputs, "vanilla", gradients=gradients, state_dtype=states)
    return run(inputs, backend, gradients=gradients), yardstick, expected


def in_another_order(inputs: Inputs, seed: int) -> Result:
    """`vanilla` with float32 states on the same problem, its units in a random order: other sums, as right as it."""
    D = inputs.case.D
    order = torch.randperm(D, generator=torch.Generator().manual_seed(seed)).to(inputs.dstates.device)
    tensors = {
        name: x if name in ("resets", "lengths") else _ordered(name, x, order) for name, x in inputs.tensors.items()
    }
    cotangents = (x[..., order].contiguous() for x in (inputs.dstates, inputs.dlast_states))
    result = run(Inputs(inputs.case, tensors, *cotangents), "vanilla", state_dtype="float32")
    return {name: _ordered(name, x, order.argsort()) for name, x in result.items()}


def _ordered(name: str, x: torch.Tensor | None, order: torch.Tensor) -> torch.Tensor | None:
    if x is None:
        return None
    x = x[..., order]
    return (x[..., order, :] if name in ("R", "dR") else x).contiguous()


def errors(result: Result, yardstick: Result, expected: Result, dtype: str) -> Iterator[tuple[str, str, float, float]]:
    """(tensor, norm, error of the result, error allowed by the rule). Each tensor of `result` errs from `expected` at
    most `FACTOR` times as much as `yardstick`, plus a floor.

    Errors are the largest and the root mean square, relative to the same norm of the tensor expected. The yardstick is
    first rounded to the dtype in which the result is returned.
    """
    assert result.keys() == expected.keys() == yardstick.keys()
    floor = 8 * torch.finfo(torch.float64 if dtype == "float64" else torch.float32).eps
    for name, want in expected.items():
        got = result[name]
        assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
        assert bool(got.isfinite().all()), f"{name}: {int((~got.isfinite()).sum())} of {got.numel()} are not finite"
        measured = yardstick[name].to(got.dtype)
        for norm in (_largest, _mean):
            size = norm(want) or 1.0
            error, yard = (norm(x.to(want) - want) / size for x in (got, measured))
            yield name, str(norm.__doc__), error, FACTOR * yard + floor


def assert_within(result: Result, yardstick: Result, expected: Result, dtype: str) -> dict[str, float]:
    """The rule, see `errors`. Returns error / allowed by tensor."""
    ratios: dict[str, float] = {}
    for name, norm, error, allowed in errors(result, yardstick, expected, dtype):
        ratios[name] = max(ratios.get(name, 0.0), error / allowed)
        assert error <= allowed, f"{name}: {norm} error {error:.3g}, allowed {allowed:.3g}"
    return ratios


def assert_rounded_states(case: Case, backend: str, device: str = "cpu") -> None:
    """States returned in a 16-bit compute dtype, which the backward reads again: twice the rule, and their rounding."""
    inputs = build(case, device)
    yardstick = run(inputs, "vanilla", state_dtype="float32")
    result = run(inputs, backend)
    for name, want in oracle(inputs).items():
        error, yard = (_relative(x[name], want) for x in (result, yardstick))
        rounding = torch.finfo(result[name].dtype).eps
        assert error <= 2 * FACTOR * yard + rounding, f"{name}: error {error:.3g}, vanilla {yard:.3g}"


def assert_tf32(case: Case, backend: str, device: str, *, gradients: bool = True) -> None:
    """Where torch is told that float32 products may be tf32, what meets R has 10 bits: an error of 2e-3, or twice what
    `vanilla` makes of it, whose matmuls are tf32 then too. Of sLSTM in most of five problems: so coarse a rounding
    turns a maximum here and there, for one of the two, and the gradient takes another way.
    """
    seeds = range(5) if get_cell(case.cell).name == "slstm" else range(1)
    within: dict[str, list[bool]] = {}
    for seed in seeds:
        inputs = build(case.but(seed=seed), device)
        expected = oracle(inputs, gradients=gradients)
        with tf32():
            result, yardstick = (run(inputs, name, gradients=gradients) for name in (backend, "vanilla"))
        for name, want in expected.items():
            error, yard = (_relative(x[name], want) for x in (result, yardstick))
            within.setdefault(name, []).append(error < max(2e-3, FACTOR * yard))
    assert all(sum(found) > len(seeds) // 2 for found in within.values()), within


@contextlib.contextmanager
def tf32():
    """Inside, torch is told that float32 products may be tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def assert_close(result: Result, expected: Result, tolerance: float) -> None:
    """Largest difference, relative to the largest value expected where that is above one, within `tolerance`."""
    assert result.keys() == expected.keys()
    for name, want in expected.items():
        got = result[name]
        assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
        error = _largest(got.to(want) - want) / max(1.0, _largest(want))
        assert error <= tolerance, f"{name}: error {error:.3g}, allowed {tolerance:g}"


def run(inputs: Inputs, backend: str, *, gradients: bool = True, state_dtype: str | None = None) -> Result:
    """`flashrnn` on the backend, with `torch.empty` NaN-poisoned. `state_dtype`: of the states, if not the case's."""
    leaves = {name: None if inputs.tensors[name] is None else inputs.tensors[name].detach() for name in GRADIENTS}
    if state_dtype is not None:  # zeros are what no initial states mean
        zeros = torch.zeros(inputs.case.problem.shape("states"), device=leaves["Wx"].device)
        leaves["states"] = (zeros if leaves["states"] is None else leaves["states"]).to(getattr(torch, state_dtype))
    given = inputs.tensors["states"] is not None
    with poisoned_memory():
        for name, x in leaves.items():
            if gradients and x is not None and (name != "states" or given):
                x.requires_grad_()
        masks = {name: inputs.tensors[name] for name in ("resets", "lengths")}
        states, last_states = flashrnn(**leaves, **masks, **inputs.options, backend=backend)
        result = {"states": states.detach(), "last_states": last_states.detach()}
        if gradients:
            wanted = {f"d{name}": x for name, x in leaves.items() if x is not None and x.requires_grad}
            cotangents = (inputs.dstates.to(states.dtype), inputs.dlast_states.to(last_states.dtype))
            result.update(
                zip(wanted, torch.autograd.grad((states, last_states), tuple(wanted.values()), cotangents), strict=True)
            )
    return result


def oracle(inputs: Inputs, *, gradients: bool = True) -> Result:
    """What is right, in float64: by NumPy, or for a large problem by `vanilla` on the device."""
    Wx, R = inputs.tensors["Wx"], inputs.tensors["R"]
    large = Wx is not None and (Wx.numel() > LARGE or R.numel() > LARGE_R)
    return (oracle_on_device if large else oracle_in_numpy)(inputs, gradients=gradients)


def oracle_in_numpy(inputs: Inputs, *, gradients: bool = True) -> Result:
    """`flashrnn_core.reference` on the values of the inputs."""
    case, device = inputs.case, inputs.dstates.device
    cell = get_cell(case.cell)
    arrays = {name: None if x is None else _array(x) for name, x in inputs.tensors.items()}
    main = [arrays[name] for name in GRADIENTS]
    order = {"resets": arrays["resets"], "lengths": arrays["lengths"], "reverse": case.reverse}
    states, last_states = reference.forward(cell, *main, **order)
    shown = states[:1] if case.hidden_only else states
    result = {"states": shown, "last_states": last_states}
    if gradients:
        dstates = np.zeros(states.shape)
        dstates[: len(shown)] = _array(inputs.dstates)
        cotangents = {"dstates": dstates, "dlast_states": _array(inputs.dlast_states)}
        found = reference.backward(cell, *main, **cotangents, **order, cut=case.cut, clip=case.clip)
        result.update({f"d{name}": found[name] for name in GRADIENTS if arrays[name] is not None})
    return {name: torch.from_numpy(np.ascontiguousarray(x)).to(device) for name, x in result.items()}


def oracle_on_device(inputs: Inputs, *, gradients: bool = True) -> Result:
    """`vanilla` in float64, on the device of the inputs: fast for large problems on a GPU."""
    tensors = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in inputs.tensors.items()}
    states = None if inputs.case.states is None else "float64"
    case = inputs.case.but(dtype="float64", states=states)
    wide = Inputs(case, tensors, inputs.dstates.double(), inputs.dlast_states.double())
    return run(wide, "vanilla", gradients=gradients)


@contextlib.contextmanager
def poisoned_memory():
    """Inside, `torch.empty` and its kin hold NaN (integers: the largest), so that what was never written is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _array(x: torch.Tensor) -> np.ndarray:
    x = x.detach().cpu()
    return (x.double() if x.is_floating_point() else x).numpy()


def _relative(x: torch.Tensor, want: torch.Tensor) -> float:
    return ((x.to(want) - want).norm() / want.norm()).item()


def _largest(x: torch.Tensor) -> float:
    """largest"""
    return x.abs().max().item() if x.numel() else 0.0


def _mean(x: torch.Tensor) -> float:
    """root mean square"""
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0
