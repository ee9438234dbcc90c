// What stands before and behind a job's step: a look ahead at what needs no vector (the fields, and of the backward all
// of the cell that needs no cotangent), and the rows of the outputs. A step is as long as the longest stream of
// instructions of a warp, so where a plan has warps without a job (SERVED), these do both for the warps that have one:
// ahead of step s before the barrier of step s, rows of step s - 2 behind it, each through two buffers in shared memory.

// The jobs whose rows and fields a warp looks after: its own, or those of the warp that mirrors it.
DEVICE Lane served_by(const Lane& l) {
    Lane other = l;
    if (SERVED) other.warp = WARPS - 1 - l.warp;
    return other;
}

struct Ahead {
#if BACKWARD
    Prepared prepared[2];
    float dout[S][2];
    bool fresh[2];
#else
    float x[G][2];
#endif
};

#if BACKWARD
DEVICE void look_ahead(const Args& a, const Item& item, const Lane& l, int rank, int s, int i, const bool (&fresh)[2], Ahead& ahead) {
    float f[FIELDS16 + FIELDS32][2];
    read_fields(a, item, l, rank, s, i, f);
#pragma unroll
    for (int e = 0; e < 2; e++) {
        float pre[G], old[S];
#pragma unroll
        for (int g = 0; g < G; g++)
            pre[g] = bias_of(g, job_block(l, i), l) + (INPUT_MASK >> g & 1 ? f[FIELD_WX + part_of(INPUT_MASK, g)][e] : 0.f)
                     + (RECURRENT_MASK >> g & 1 ? f[FIELD_REC + part_of(RECURRENT_MASK, g)][e] : 0.f);
#pragma unroll
        for (int k = 0; k < S; k++) {
            old[k] = OLD_MASK >> k & 1 && !fresh[e] ? f[old_field(k)][e] : 0.f;
            if (OLD_MASK >> (S + k) & 1 && !fresh[e]) old[k] += f[old_field(S + k)][e];  // what rounding took
            ahead.dout[k][e] = f[FIELD_DOUT + k][e];
        }
        cell_prepare(pre, old, ahead.prepared[e]);
        ahead.fresh[e] = fresh[e];
    }
}
#else
DEVICE void look_ahead(const Args& a, const Item& item, const Lane& l, int rank, int s, int i, Ahead& ahead) {
    float f[FIELDS16 + FIELDS32][2];
    read_fields(a, item, l, rank, s, i, f);
#pragma unroll
    for (int g = 0; g < G; g++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            ahead.x[g][e] = bias_of(g, job_block(l, i), l) + (INPUT_MASK >> g & 1 ? f[FIELD_WX + part_of(INPUT_MASK, g)][e] : 0.f);
            pin(ahead.x[g][e]);
        }
}
#endif

// SERVED: what was seen ahead, from the warp that looks to the warp of the job.
DEVICE float2* ahead_of(const Lane& l, int s, int i) {
    return (float2*)(shared + SHARED_AHEAD) + ((s & 1) * UB * NT + l.warp * JOBS + i) * AHEAD * 32 + l.lane;
}
DEVICE void put_ahead(const Lane& l, int s, int i, const Ahead& ahead) {
    float2* to = ahead_of(l, s, i);
#if BACKWARD
    put_prepared(to, ahead.prepared);
#pragma unroll
    for (int k = 0; k < S; k++) to[(PREPARED + k) * 32] = make_float2(ahead.dout[k][0], ahead.dout[k][1]);
    if (RESETS) to[(PREPARED + S) * 32] = make_float2(ahead.fresh[0], ahead.fresh[1]);
#else
#pragma unroll
    for (int g = 0; g < G; g++) to[g * 32] = make_float2(ahead.x[g][0], ahead.x[g][1]);
#endif
}
DEVICE void get_ahead(const Lane& l, int s, int i, Ahead& ahead) {
    const float2* from = ahead_of(l, s, i);
#if BACKWARD
    get_prepared(from, ahead.prepared);
#pragma unroll
    for (int k = 0; k < S; k++) ahead.dout[k][0] = from[(PREPARED + k) * 32].x, ahead.dout[k][1] = from[(PREPARED + k) * 32].y;
#pragma unroll
    for (int e = 0; e < 2; e++) ahead.fresh[e] = RESETS && (e ? from[(PREPARED + S) * 32].y : from[(PREPARED + S) * 32].x) != 0.f;
#else
#pragma unroll
    for (int g = 0; g < G; g++) ahead.x[g][0] = from[g * 32].x, ahead.x[g][1] = from[g * 32].y;
#endif
}

// The outputs of a step: `rows` tensors of `kind`, one tensor's stride apart, then what is saved besides.
// SERVED: as rows of 8 units in shared memory, [tensor][batch][unit].
DEVICE unsigned char* behind_of(const Lane& l, int s, int i) {
    return shared + SHARED_BEHIND + ((s & 1) * UB * NT + l.warp * JOBS + i) * BEHIND;
}
DEVICE void put_rows(unsigned char* to, const Lane& l, float v0, float v1, int kind) {
    if (kind_bytes(kind) == 2) {
        ((u32*)to)[l.lane] = transpose8x8(pack(v0, v1, kind));
    } else {
        ((float*)to)[2 * l.q * 8 + l.g] = v0;
        ((float*)to)[2 * l.q * 8 + 8 + l.g] = v1;
    }
}
template <int ROWS>
DEVICE void store_rows(const Args& a, const Item& item, const Lane& l, const unsigned char* from, char* to, i64 stride,
                       i64 batch_stride, int unit, int tile, int kind) {
    constexpr int WHOLE = 16;
    const int bytes = kind_bytes(kind), B = (int)argument(a, A_B), first = item.batch + tile * 8;
    if (D % 8 == 0) {  // 16 bytes a lane
        const int pieces = 8 * bytes / WHOLE;
#pragma unroll
        for (int c = l.lane; c < ROWS * 8 * pieces; c += 32) {
            const int row = c / pieces % 8, u = unit + c % pieces * 4;
            if (u < D && first + row < B)
                *(uint4*)(to + (c / (8 * pieces) * stride + (first + row) * batch_stride + u) * bytes) = ((const uint4*)from)[c];
        }
    } else {
        for (int c = l.lane; c < ROWS * 64; c += 32) {
            const int row = c % 64 / 8, u = unit + c % 8;
            char* p = to + (c / 64 * stride + (first + row) * batch_stride + u) * bytes;
            if (u >= D || first + row >= B) continue;
            if (bytes == 2) *(unsigned short*)p = ((const unsigned short*)from)[c];
            else *(u32*)p = ((const u32*)from)[c];
        }
    }
}
