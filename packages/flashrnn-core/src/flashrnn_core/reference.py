"""The oracle: a scan in NumPy float64, forward and backward. Every backend is tested against it. Slow and plain.

Takes and returns arrays in the shapes of `contract.py`, all float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flashrnn_core.cells import Cell

NUMPY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "negative": np.negative,
    "exp": np.exp,
    "log_sigmoid": lambda x: -np.logaddexp(0, -x),
    "maximum": np.maximum,
    "relu": lambda x: np.maximum(x, 0.0),
    "sigmoid": lambda x: np.exp(-np.logaddexp(0, -x)),
    "tanh": np.tanh,
    "where": np.where,
    "equal": np.equal,
    "less": np.less,
    "less_equal": np.less_equal,
}


def forward(
    cell: Cell,
    Wx,  # B T Gw N D
    R,  # Gr N D P
    b,  # G N D
    states=None,  # S B 1 N D
    *,
    resets=None,  # B T
    lengths=None,  # B
    reverse: bool = False,
):
    """(states [S B T N D], last_states [S B 1 N D]) of the scan."""
    return _scan(cell, Wx, R, b, states, resets, lengths, reverse)[:2]


def backward(
    cell: Cell,
    Wx,
    R,
    b,
    states=None,
    *,
    dstates,  # S B T N D, cotangent of the outputs
    dlast_states,  # S B 1 N D
    resets=None,
    lengths=None,
    reverse: bool = False,
    cut: bool = False,
    clip: float | None = None,
):
    """Gradients of the scan: {"Wx", "R", "b", "states"}, each in the shape of its tensor."""
    _, _, steps = _scan(cell, Wx, R, b, states, resets, lengths, reverse)
    G, S = len(cell.gates), len(cell.states)
    Wx, R = (np.asarray(x, np.float64) for x in (Wx, R))
    dWx, dR = np.zeros(Wx.shape), np.zeros(R.shape)
    db = np.zeros(np.shape(b))
    carry = np.array(dlast_states, np.float64)[:, :, 0]  # S B N D
    for t, active, fresh, old, pre in reversed(steps):
        dnew = carry + np.asarray(dstates, np.float64)[:, :, t]
        grads = cell.backward.evaluate(NUMPY, [*pre, *old, *dnew])
        grads = [np.where(active, np.broadcast_to(g, old[0].shape), 0.0) for g in grads]
        dpre, dold = grads[:G], np.stack(grads[G:])  # dold: S B N D
        for k, g in enumerate(cell.input_gates):
            dWx[:, t, k] = dpre[g]
        for k, g in enumerate(cell.recurrent_gates):
            dR[k] += np.einsum("bnd,bnp->ndp", dpre[g], old[0])
            if not cut:
                dold[0] += np.einsum("ndp,bnd->bnp", R[k], dpre[g])
        for g in range(G):
            db[g] += dpre[g].sum(0)
        if clip is not None:
            dold[0] = np.clip(dold[0], -clip, clip)
        carry = np.where(active, np.where(fresh, 0.0, dold), carry)
    return {"Wx": dWx, "R": dR, "b": db, "states": carry.reshape(S, carry.shape[1], 1, *carry.shape[2:])}


def _scan(cell, Wx, R, b, states, resets, lengths, reverse):
    Wx, R, b = (np.asarray(x, np.float64) for x in (Wx, R, b))
    B, T, _, N, D = Wx.shape
    S = len(cell.states)
    state = np.zeros((S, B, N, D)) if states is None else np.array(states, np.float64)[:, :, 0]
    out, steps = np.zeros((S, B, T, N, D)), []
    for t in range(T)[:: -1 if reverse else 1]:
        active = np.ones((B, 1, 1), bool) if lengths is None else (t < np.asarray(lengths))[:, None, None]
        fresh = np.zeros((B, 1, 1), bool) if resets is None else np.asarray(resets)[:, t, None, None]
        old = np.where(fresh, 0.0, state)
        pre = [np.broadcast_to(b[g], (B, N, D)).copy() for g in range(len(cell.gates))]
        for k, g in enumerate(cell.input_gates):
            pre[g] += Wx[:, t, k]
        for k, g in enumerate(cell.recurrent_gates):
            pre[g] += np.einsum("ndp,bnp->bnd", R[k], old[0])
        new = np.stack(np.broadcast_arrays(*cell.forward.evaluate(NUMPY, [*pre, *old])))
        state = np.where(active, new, state)
        out[:, :, t] = np.where(active, new, 0.0)
        steps.append((t, active, fresh, old, pre))
    return out, state[:, :, None], steps
