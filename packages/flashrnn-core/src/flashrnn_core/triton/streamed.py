"""The scan of `scan.py` where R is too large for the registers: R is read through L2 each step.

A program owns one head and TILE sequences, for all steps. A step goes over the D units UNITS at a time, and for each
of them over the units contracted in chunks of CHUNK, which Triton's software pipeline fetches ahead. The states, or
their gradients, pass from step to step through device memory that is the program's own, in two turns: what is read in
a step is not written in it, so that one barrier a step is enough (backward: one more, for dpre).
"""

# Names that a template leaves open are filled in by `emit.py`.
# ruff: noqa: F821, F841, SIM102
# mypy: ignore-errors

import triton.language as tl

from flashrnn_core.triton.scan import first_state, hold, hold_gradient, place, weights

__all__ = ["backward", "first_state", "forward", "hold", "hold_gradient", "place", "weights"]


def forward(
    *scan,
    memory,  # programs 2 S TILE DP float32: the states, old and new, for the program alone
    STATES: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    n, r, head, step, state = place(B, N, D, TILE)
    row = tl.arange(0, TILE)[:, None]  # in the tile
    Wx += (n * Wx_n + r * Wx_b) * ALIGN
    R += head * D
    b += head
    out += r * T * step + head
    first = r * step + head  # in states and last
    if saved is not None:
        saved += r * T * step + head
    memory += (n * tl.num_programs(1) + tl.program_id(1)) * (2 * STATES * TILE * DP) + row * DP
    if lengths is not None:
        length = tl.load(lengths + r, mask=r < B, other=0)

    for u in range(0, DP, UNITS):
        d = u + tl.arange(0, UNITS)[None, :]
        here = (d < D) & (r < B)
        state_S = first_state(states, S * state + first + d, here).to(tl.float32)  # each S
        tl.store(memory + S * (TILE * DP) + d, state_S)  # each S

    for s in range(0, T):
        t = T - 1 - s if REVERSE else s
        old = memory + (s % 2) * (STATES * TILE * DP)
        new = memory + ((s + 1) % 2) * (STATES * TILE * DP)
        active = None if lengths is None else t < length
        if resets is not None:
            fresh = tl.load(resets + r * T + t, mask=r < B, other=0) != 0
        tl.debug_barrier()
        for u in range(0, D, UNITS):
            units = u + tl.arange(0, UNITS)
            d = units[None, :]
            here = (d < D) & (r < B)
            x_W = tl.load(Wx + (W * Wx_g + t * Wx_t) * ALIGN + d, mask=here, other=0.0)  # each W
            state_S = tl.load(old + S * (TILE * DP) + d)  # each S
            dot_K = tl.zeros(here.shape, tl.float32)  # each K
            for k in tl.range(0, D, CHUNK, num_stages=STAGES):
                i = k + tl.arange(0, CHUNK)
                h = tl.load(old + i[None, :], mask=i[None, :] < D, other=0.0).to(R.dtype.element_ty)  # see `unpadded`
                R_K = weights(R + K * step * D, i, units, D, False)  # each K
                dot_K = tl.dot(h, R_K, dot_K, input_precision=PRECISION)  # each K
            old_S = state_S  # each S
            if resets is not None:
                old_S = tl.where(fresh, 0.0, old_S)  # each S
                dot_K = tl.where(fresh, 0.0, dot_K)  # each K
            pre_G = tl.load(b + G * step + d, mask=d < D, other=0.0).to(tl.float32)  # each G
            pre_G = tl.broadcast_to(pre_G, here.shape)  # each G
            pre_G += x_W.to(tl.float32)  # each W
            pre_G += dot_K  # each K
            all_new = cell_forward(all_pre, all_old)
            state_S, new_S = hold(new_S, state_S, active)  # each S
            tl.store(new + S * (TILE * DP) + d, state_S)  # each S
            for_out = out + t * step + d
            tl.store(for_out, new_0, mask=here)
            if not HIDDEN_ONLY:
                if S > 0:  # each S
                    tl.store(for_out + S * T * state, new_S, mask=here)
            if saved is not None:
                tl.store(saved + F * T * state + t * step + d, new_S, mask=here)  # each F

    tl.debug_barrier()
    memory += (T % 2) * (STATES * TILE * DP)
    for u in range(0, D, UNITS):
        d = u + tl.arange(0, UNITS)[None, :]
        state_S = tl.load(memory + S * (TILE * DP) + d)  # each S
        tl.store(last + S * state + first + d, state_S, mask=(d < D) & (r < B))  # each S


def backward(
    *scan,
    memory,  # programs (2 S + 1) TILE DP float32, for the program alone: carried gradients, old and new; partial dh
    STATES: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    n, r, head, step, state = place(B, N, D, TILE)
    row = tl.arange(0, TILE)[:, None]  # in the tile
    Wx += (n * Wx_n + r * Wx_b) * ALIGN
    R += head * D
    b += head
    out += r * T * step + head
    dout += (n * dout_n + r * dout_b) * ALIGN
    dpre += r * T * (GATES * step) + head
    first = r * step + head  # in states, dlast and dstates
    if saved is not None:
        saved += r * T * step + head
    memory += (n * tl.num_programs(1) + tl.program_id(1)) * ((2 * STATES + 1) * TILE * DP) + row * DP
    partial = memory + 2 * STATES * TILE * DP
    if lengths is not None:
        length = tl.load(lengths + r, mask=r < B, other=0)

    for u in range(0, DP, UNITS):
        d = u + tl.arange(0, UNITS)[None, :]
        carry_S = tl.load(dlast + S * state + first + d, mask=(d < D) & (r < B), other=0.0)  # each S
        tl.store(memory + S * (TILE * DP) + d, carry_S.to(tl.float32))  # each S

    for s in range(0, T):
        t = s if REVERSE else T - 1 - s
        before = t + 1 if REVERSE else t - 1
        follows = s + 1 + tl.zeros([1, 1], tl.int32) < T  # a step, not the initial states
        active = None if lengths is None else t < length
        if lengths is not None and REVERSE:
            follows = follows & (before < length)
        fresh = None
        if resets is not None:
            fresh = tl.load(resets + r * T + t, mask=r < B, other=0) != 0
        old = memory + (s % 2) * (STATES * TILE * DP)
        new = memory + ((s + 1) % 2) * (STATES * TILE * DP)
        here_dpre = dpre + t * (GATES * step)
        tl.debug_barrier()
        for u in range(0, D, UNITS):
            d = u + tl.arange(0, UNITS)[None, :]
            here = (d < D) & (r < B)
            pre_G = tl.load(b + G * step + d, mask=d < D, other=0.0).to(tl.float32)  # each G
            pre_G = tl.broadcast_to(pre_G, here.shape)  # each G
            x_W = tl.load(Wx + (W * Wx_g + t * Wx_t) * ALIGN + d, mask=here, other=0.0)  # each W
            pre_G += x_W.to(tl.float32)  # each W
            pre_G += tl.load(rec + ((n * B + r) * T + t) * (GR * D) + K * D + d, mask=here, other=0.0)  # each K
            old_S = tl.load(out + S * T * state + before * step + d, mask=here & follows, other=0.0)  # each S
            if saved is not None:
                old_S = tl.load(saved + F * T * state + before * step + d, mask=here & follows, other=0.0)  # each F
            old_S = old_S.to(tl.float32)  # each S
            if states is not None:
                initial_S = tl.load(states + S * state + first + d, mask=here, other=0.0).to(tl.float32)  # each S
                old_S = tl.where(follows, old_S, initial_S)  # each S
            if resets is not None:
                old_S = tl.where(fresh, 0.0, old_S)  # each S
            dout_S = tl.load(dout + (S * dout_s + t * dout_t) * ALIGN + d, mask=here, other=0.0)  # each S
            carry_S = tl.load(old + S * (TILE * DP) + d)  # each S
            dnew_S = carry_S + dout_S.to(tl.float32)  # each S
            all_dpre, all_dold = cell_backward(all_pre, all_old, all_dnew)
            if lengths is not None:
                dpre_G = tl.where(active, dpre_G, 0.0)  # each G
            tl.store(here_dpre + G * step + d, dpre_G, mask=here)  # each G
            tl.store(partial + d, dold_0)
            carry_S = hold_gradient(dold_S, carry_S, fresh, active)  # each S
            if S > 0:  # each S
                tl.store(new + S * (TILE * DP) + d, carry_S)
        tl.debug_barrier()
        for u in range(0, D, UNITS):
            units = u + tl.arange(0, UNITS)
            d = units[None, :]
            dold_0 = tl.load(partial + d)
            if not CUT:
                for k in tl.range(0, D, CHUNK, num_stages=STAGES):
                    i = k + tl.arange(0, CHUNK)
                    inside = (i[None, :] < D) & (r < B)
                    dgate_K = tl.load(here_dpre + G * step + i[None, :], mask=inside, other=0.0)  # each K
                    R_K = weights(R + K * step * D, i, units, D, True)  # each K
                    dold_0 = tl.dot(dgate_K, R_K, dold_0, input_precision=PRECISION)  # each K
            if CLIP:
                dold_0 = tl.clamp(dold_0, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
            tl.store(new + d, hold_gradient(dold_0, tl.load(old + d), fresh, active))

    tl.debug_barrier()
    memory += (T % 2) * (STATES * TILE * DP)
    for u in range(0, D, UNITS):
        d = u + tl.arange(0, UNITS)[None, :]
        carry_S = tl.load(memory + S * (TILE * DP) + d)  # each S
        tl.store(dstates + S * state + first + d, carry_S, mask=(d < D) & (r < B))  # each S
