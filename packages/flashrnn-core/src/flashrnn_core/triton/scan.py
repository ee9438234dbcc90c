"""The scan as Triton kernels, one forward and one backward; templates, which `emit.py` unrolls for a cell.

A program owns one head and TILE sequences of the batch, for all steps; programs do not talk to each other. The states
and R, in the compute dtype, stay in registers: a state is a float32 tile [TILE, DP], DP being D padded with masked
units, in the layout of a dot's result, so that the cell runs on the results in place. Only h (backward: dpre) passes
through shared memory, on its way to the next dot. Loads of a step depend on nothing computed, so Triton's software
pipeline fetches them STAGES - 1 steps ahead. Where R is too large for this, see `streamed.py`.
All tensors are contiguous but Wx and dout, whose last dim is.
"""

# Names that a template leaves open are filled in by `emit.py`.
# ruff: noqa: F821, F841, SIM102
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def place(B, N, D: tl.constexpr, TILE: tl.constexpr):
    """A program's head n and sequences r [TILE, 1]; how many elements stand before a head, in a step, in a state."""
    n = tl.program_id(0).to(tl.int64)
    r = (tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]).to(tl.int64)
    return n, r, n * D, N * D, B * N * D


@triton.jit
def weights(R, i, o, D: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[i, o] of R^T for one gate and head, R being [D, P]: what h meets; of R, if TRANSPOSED: what dpre meets."""
    i, o = i[:, None], o[None, :]
    return tl.load(R + (i * D + o if TRANSPOSED else o * D + i), mask=(i < D) & (o < D), other=0.0)


@triton.jit
def resident(R, i, o, D: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The same, to stay in registers: Triton re-reads an operand in every step, unless it comes from an operation."""
    return tl.where((i[:, None] < D) & (o[None, :] < D), weights(R, i, o, D, TRANSPOSED), 0.0)


@triton.jit
def fill(x):
    """[TILE, DP] as [16, DP], the least that a tensor core takes: of 8 rows each twice."""
    return tl.reshape(tl.broadcast_to(x[None], (16 // x.shape[0], x.shape[0], x.shape[1])), (16, x.shape[1]))


@triton.jit
def unpadded(x, D: tl.constexpr):
    """x, with zeros in the units that pad D: a cell may make anything of zeros, and a dot goes over all units."""
    return x if x.shape[1] == D else tl.where(tl.arange(0, x.shape[1])[None, :] < D, x, 0.0)


@triton.jit
def take(x, TILE: tl.constexpr):
    """The first TILE rows."""
    if TILE == 8:
        first, _ = tl.split(tl.permute(tl.reshape(x, (2, 8, x.shape[1])), (1, 2, 0)))
    else:
        first = x
    return first


@triton.jit
def first_state(states, offset, here):
    """An initial state at the offset, or zeros, in float32."""
    return tl.zeros(here.shape, tl.float32) if states is None else tl.load(states + offset, mask=here, other=0.0)


@triton.jit
def hold(new, old, active):
    """(the state after a step, its output): of a step behind its sequence's end the old state, and zero."""
    if active is None:
        state, shown = new, new
    else:
        state, shown = tl.where(active, new, old), tl.where(active, new, 0.0)
    return state, shown


@triton.jit
def hold_gradient(dold, dnew, fresh, active):
    """What flows on to the step before: none through a reset; of a step behind its sequence's end all that came."""
    if fresh is not None:
        dold = tl.where(fresh, 0.0, dold)
    if active is not None:
        dold = tl.where(active, dold, dnew)
    return dold


def forward(
    Wx,  # B T Gw N D
    R,  # Gr N D P
    b,  # G N D
    states,  # S B 1 N D, or None
    resets,  # B T, one byte each, or None
    lengths,  # B, or None
    out,  # S B T N D, written; with HIDDEN_ONLY 1 B T N D
    last,  # S B 1 N D, written
    saved,  # F B T N D float32, written: states in float32 for the backward; or None
    Wx_b: tl.int64,
    Wx_t: tl.int64,
    Wx_g: tl.int64,
    Wx_n: tl.int64,
    B: tl.int64,
    T: tl.int32,
    N: tl.int64,
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,  # strides of Wx are in units of ALIGN elements
    REVERSE: tl.constexpr,
    HIDDEN_ONLY: tl.constexpr,
):
    n, r, head, step, state = place(B, N, D, TILE)
    units = tl.arange(0, DP)
    d = units[None, :]
    here = (d < D) & (r < B)
    Wx += (n * Wx_n + r * Wx_b) * ALIGN + d
    out += r * T * step + head + d
    first = r * step + head + d  # in states and last
    if saved is not None:
        saved += r * T * step + head + d

    R += head * D
    R_K = resident(R + K * step * D, units, units, D, False)  # each K
    b_G = tl.load(b + G * step + head + d, mask=d < D, other=0.0).to(tl.float32)  # each G
    b_G = tl.broadcast_to(b_G, (16, DP))  # each G
    state_S = first_state(states, S * state + first, here).to(tl.float32)  # each S
    if lengths is not None:
        length = tl.load(lengths + r, mask=r < B, other=0)
    if resets is not None:  # fetched a step ahead
        next_fresh = tl.load(resets + r * T + (T - 1 if REVERSE else 0), mask=r < B, other=0)

    # part: b + R h of the step to come, started as soon as h is known
    h = fill(state_0.to(R.dtype.element_ty))
    part_G = b_G  # each G
    part_G = tl.dot(h, R_K, b_G, input_precision=PRECISION)  # each K
    part_G = take(part_G, TILE)  # each G

    for s in tl.range(0, T, num_stages=STAGES):
        t = T - 1 - s if REVERSE else s
        x_W = tl.load(Wx + (W * Wx_g + t * Wx_t) * ALIGN, mask=here, other=0.0)  # each W
        old_S = state_S  # each S
        if resets is not None:
            fresh = next_fresh != 0
            after = t - 1 if REVERSE else t + 1
            follows = s + 1 + tl.zeros([1, 1], tl.int32) < T
            next_fresh = tl.load(resets + r * T + after, mask=(r < B) & follows, other=0)
            old_S = tl.where(fresh, 0.0, old_S)  # each S
        pre_G = part_G  # each G
        if resets is not None:
            pre_G = tl.where(fresh, take(b_G, TILE), pre_G)  # each G
        pre_G += x_W.to(tl.float32)  # each W
        all_new = cell_forward(all_pre, all_old)
        active = None if lengths is None else t < length
        state_S, new_S = hold(new_S, state_S, active)  # each S
        h = fill(unpadded(state_0, D).to(R.dtype.element_ty))
        part_G = b_G  # each G
        part_G = tl.dot(h, R_K, b_G, input_precision=PRECISION)  # each K
        part_G = take(part_G, TILE)  # each G
        for_out = out + t * step
        tl.store(for_out, new_0, mask=here)
        if not HIDDEN_ONLY:
            if S > 0:  # each S
                tl.store(for_out + S * T * state, new_S, mask=here)
        if saved is not None:
            tl.store(saved + F * T * state + t * step, new_S, mask=here)  # each F
    tl.store(last + S * state + first, state_S, mask=here)  # each S


def backward(
    Wx,  # B T Gw N D
    R,  # Gr N D P
    b,  # G N D
    rec,  # N B T Gr D float32: the recurrent part R h of all pre-activations; None: computed here
    states,  # S B 1 N D, or None
    resets,  # B T, one byte each, or None
    lengths,  # B, or None
    out,  # S B T N D
    saved,  # F B T N D float32, or None
    dout,  # S B T N D, any strides
    dlast,  # S B 1 N D
    dpre,  # B T G N D in the dtype of R, written
    dstates,  # S B 1 N D float32, written
    Wx_b: tl.int64,
    Wx_t: tl.int64,
    Wx_g: tl.int64,
    Wx_n: tl.int64,
    dout_s: tl.int64,
    dout_b: tl.int64,
    dout_t: tl.int64,
    dout_n: tl.int64,
    clip: tl.float32,
    B: tl.int64,
    T: tl.int32,
    N: tl.int64,
    GATES: tl.constexpr,
    GR: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,  # strides of Wx and dout are in units of ALIGN elements
    REVERSE: tl.constexpr,
    CUT: tl.constexpr,
    CLIP: tl.constexpr,
):
    n, r, head, step, state = place(B, N, D, TILE)
    units = tl.arange(0, DP)
    d = units[None, :]
    here = (d < D) & (r < B)
    Wx += (n * Wx_n + r * Wx_b) * ALIGN + d
    dout += (n * dout_n + r * dout_b) * ALIGN + d
    dpre += r * T * (GATES * step) + head
    out += r * T * step + head + d
    first = r * step + head + d  # in states, dlast and dstates
    if saved is not None:
        saved += r * T * step + head + d

    R += head * D
    if not CUT:
        negative_K = -resident(R + K * step * D, units, units, D, True)  # each K
    if rec is None:
        R_K = resident(R + K * step * D, units, units, D, False)  # each K
    else:
        rec += d
    b_G = tl.load(b + G * step + head + d, mask=d < D, other=0.0).to(tl.float32)  # each G
    b_G = tl.broadcast_to(b_G, (16, DP))  # each G
    if states is not None:
        initial_S = tl.load(states + S * state + first, mask=here, other=0.0).to(tl.float32)  # each S
    carry_S = tl.load(dlast + S * state + first, mask=here, other=0.0).to(tl.float32)  # each S
    if not CUT:
        # Of an operand of two dots, one of them outside the loop, Triton keeps a copy in registers (3.6 to 3.9).
        nothing, unused = fill(carry_0.to(R.dtype.element_ty)), tl.zeros((16, DP), tl.float32)
        unused = tl.dot(nothing, negative_K, unused, input_precision=PRECISION)  # each K
        if rec is None:
            unused = tl.dot(nothing, R_K, unused, input_precision=PRECISION)  # each K
        carry_0 = tl.where(T < 0, take(unused, TILE), carry_0)
    if lengths is not None:
        length = tl.load(lengths + r, mask=r < B, other=0)
    if resets is not None:  # fetched a step ahead
        next_fresh = tl.load(resets + r * T + (0 if REVERSE else T - 1), mask=r < B, other=0)

    for s in tl.range(0, T, num_stages=STAGES):
        t = s if REVERSE else T - 1 - s
        before = t + 1 if REVERSE else t - 1
        x_W = tl.load(Wx + (W * Wx_g + t * Wx_t) * ALIGN, mask=here, other=0.0)  # each W
        follows = s + 1 + tl.zeros([1, 1], tl.int32) < T  # a step, not the initial states
        if lengths is not None and REVERSE:
            follows = follows & (before < length)
        old_S = tl.load(out + S * T * state + before * step, mask=here & follows, other=0.0)  # each S
        if saved is not None:
            old_S = tl.load(saved + F * T * state + before * step, mask=here & follows, other=0.0)  # each F
        dout_S = tl.load(dout + (S * dout_s + t * dout_t) * ALIGN, mask=here, other=0.0)  # each S
        old_S = old_S.to(tl.float32)  # each S
        if states is not None:
            old_S = tl.where(follows, old_S, initial_S)  # each S
        fresh = None
        if resets is not None:
            fresh = next_fresh != 0
            next_fresh = tl.load(resets + r * T + before, mask=(r < B) & follows, other=0)
            old_S = tl.where(fresh, 0.0, old_S)  # each S
        pre_G = b_G  # each G
        if rec is None:
            h = fill(old_0.to(R.dtype.element_ty))
            pre_G = tl.dot(h, R_K, b_G, input_precision=PRECISION)  # each K
        pre_G = take(pre_G, TILE)  # each G
        pre_G += x_W.to(tl.float32)  # each W
        if rec is not None:
            pre_G += tl.load(rec + ((n * B + r) * T + t) * (GR * D) + K * D, mask=here, other=0.0)  # each K
        dnew_S = carry_S + dout_S.to(tl.float32)  # each S
        all_dpre, all_dold = cell_backward(all_pre, all_old, all_dnew)
        active = None if lengths is None else t < length
        if lengths is not None:
            dpre_G = tl.where(active, dpre_G, 0.0)  # each G
        dgate_G = unpadded(dpre_G, D).to(R.dtype.element_ty)  # each G
        here_dpre = dpre + t * (GATES * step)
        if not CUT:  # Triton makes one chain of dependent dots of a sum, but not of a difference
            full_G = fill(dgate_G)  # each K
            dold_0 -= take(tl.dot(full_G, negative_K, input_precision=PRECISION), TILE)  # each K
        tl.store(here_dpre + G * step + d, dgate_G, mask=here)  # each G
        if CLIP:
            dold_0 = tl.clamp(dold_0, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
        carry_S = hold_gradient(dold_S, carry_S, fresh, active)  # each S
    tl.store(dstates + S * state + first, carry_S, mask=here)  # each S
