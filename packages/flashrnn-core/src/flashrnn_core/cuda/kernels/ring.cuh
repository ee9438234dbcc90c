// What a step takes from memory and leaves there: the ring of fields on their way into shared memory, and the stores.
// Fields are read before the wait for the vector, or behind it (LATE), where registers are dear; without a ring
// (STAGES == 0) straight from memory. A ring of one stage is
// filled again as soon as its fields are read (LATE).

constexpr int SLOTS_OF_FIELDS = STAGES > 0 ? STAGES : 1;
constexpr bool ONE_STAGE = STAGES == 1;
static_assert(!ONE_STAGE || (LATE && !SERVED), "");

// Place of a gate among those of a mask.
DEVICE int part_of(int mask, int gate) { return __popc(mask & ((1 << gate) - 1)); }
DEVICE float bias_of(int gate, int block, const Lane& l) {
    return ((const float*)(shared + SHARED_BIAS))[gate * U + block * 8 + l.g];
}

// Which step of the tensors the s-th step of this launch is.
DEVICE int time_of(int T, int s) { return BACKWARD != REVERSE ? T - 1 - s : s; }

struct Chunk { const char* p; i64 stride; };  // 16 bytes of a field, at time 0; nullptr: zeros

// Chunk c of a job's tile: fields of 16 bits (8 rows of 16 bytes each), then fields of 32 bits (8 rows of 32).
DEVICE int chunk_field(int c) { return c < FIELDS16 * 8 ? c / 8 : FIELDS16 + (c - FIELDS16 * 8) / 16; }
DEVICE int chunk_row(int c) { return c < FIELDS16 * 8 ? c % 8 : (c - FIELDS16 * 8) % 16 / 2; }
DEVICE Chunk chunk(const Args& a, const Item& item, const Field& f, int unit, int tile, int c) {
    const bool wide = c >= FIELDS16 * 8;
    const int batch = item.batch + tile * 8 + chunk_row(c), bytes = wide ? 4 : 2;
    const int u = unit + (wide ? (c - FIELDS16 * 8) % 2 * 4 : 0);
    if (c >= CHUNKS || u >= D || batch >= (int)argument(a, A_B) || !f.p) return {nullptr, 0};
    return {f.p + (item.head * f.n + batch * f.b + u) * bytes, f.t * bytes};
}
DEVICE Chunk chunk_of(const Args& a, const Item& item, const Lane& l, int rank, int i, int c) {
    return chunk(a, item, field(a, chunk_field(c)), rank * U + job_block(l, i) * 8, job_tile(l, i), c);
}
DEVICE int length_of(const Args& a, int batch) {
    if (!LENGTHS || batch >= (int)argument(a, A_B)) return (int)argument(a, A_T);
    const char* p = (const char*)argument(a, A_LENGTHS);
    const i64 length = argument(a, A_LENGTHS_BYTES) == 8 ? ((const i64*)p)[batch] : ((const int*)p)[batch];
    return (int)(length < argument(a, A_T) ? length : argument(a, A_T));
}
// The old state of step t, of a row, is an initial state.
DEVICE bool is_first(const Args& a, int t, int batch) {
    const int T = (int)argument(a, A_T);
    if (!REVERSE) return t == 0;
    const int length = length_of(a, batch);
    return t + 1 >= (length < T ? length : T);
}

// FIRST: before the first step, where a loop is soon enough; unrolled, it is the most of what there is to compile.
template <bool FIRST>
DEVICE void fetch(const Args& a, const Item& item, const Lane& l, int rank, int s, const Chunk (&chunks)[JOBS][CHUNKS_A_LANE]) {
    const int T = (int)argument(a, A_T);
    if (STAGES == 0) return;
    if (s < T) {
        const int t = time_of(T, s);
        unsigned char* stage = shared + SHARED_RING + ((l.team * SLOTS_OF_FIELDS + s % SLOTS_OF_FIELDS) * UB * NT + l.warp * JOBS) * TILE_BYTES;
#pragma unroll (LATE ? 1 : JOBS)
        for (int i = 0; i < JOBS; i++) {
            if (!job_exists(l, i)) break;
            if constexpr (ALIGNED) {
#pragma unroll (FIRST && LATE ? 1 : CHUNKS_A_LANE)
                for (int k = 0; k < CHUNKS_A_LANE; k++) {
                    const int number = l.lane + k * 32;
                    const Chunk from = LATE ? chunk_of(a, item, l, rank, i, number) : chunks[i][k];
                    const char* p = from.p ? from.p + t * from.stride : nullptr;
                    if (BACKWARD && p && is_old(chunk_field(number))) {
                        p += REVERSE ? from.stride : -from.stride;
                        if (is_first(a, t, item.batch + job_tile(l, i) * 8 + chunk_row(number)))
                            p = chunk(a, item, initial_field(a, chunk_field(number)), rank * U + job_block(l, i) * 8, job_tile(l, i), number).p;
                    }
                    if (CHUNKS % 32 == 0 || number < CHUNKS)
                        copy16(shared_address(stage + i * TILE_BYTES) + number * 16, p ? p : (const char*)argument(a, A_WX), p != nullptr);
                }
            } else {
                const int unit = rank * U + job_block(l, i) * 8;
                for (int e = l.lane; e < (FIELDS16 + FIELDS32) * 64; e += 32) {
                    const int f = e / 64, row = e % 64 / 8, u = e % 8;
                    const int batch = item.batch + job_tile(l, i) * 8 + row, bytes = f < FIELDS16 ? 2 : 4;
                    Field from = field(a, f);
                    i64 at = t;
                    if (BACKWARD && is_old(f)) {
                        at += REVERSE ? 1 : -1;
                        if (is_first(a, t, batch)) from = initial_field(a, f), at = 0;
                    }
                    const bool valid = unit + u < D && batch < (int)argument(a, A_B) && from.p;
                    const char* p = from.p + (item.head * from.n + batch * from.b + at * from.t + unit + u) * bytes;
                    unsigned char* to = stage + i * TILE_BYTES + (f < FIELDS16 ? f * 128 : FIELDS16 * 128 + (f - FIELDS16) * 256) + (row * 8 + u) * bytes;
                    if (bytes == 2) *(unsigned short*)to = valid ? *(const unsigned short*)p : (unsigned short)0;
                    else *(u32*)to = valid ? *(const u32*)p : 0u;
                }
            }
        }
    }
    copy_commit();
}

// ONE_STAGE: this warp has read its fields, those of step s may come.
DEVICE void fetch_again(const Args& a, const Item& item, Lane& l, int rank, int s, const Chunk (&chunks)[JOBS][CHUNKS_A_LANE]) {
    __syncwarp();
    if (RECOMPUTE) hide(l.warp);
    fetch<false>(a, item, l, rank, s, chunks);
}

// The fields of step s have arrived. Copies of R may be on their way too (NX rounds a step): those issued after the
// fields' need not have.
DEVICE void wait_for_fields(int s) {
    constexpr int LATER = STAGES == 0 ? 0 : ONE_STAGE ? NX : NX == 0 ? STAGES - 2 : (STAGES - 1) * (NX + 1) - 1;
    if (STAGES > 0) {
        if (NX > 0 && s < STAGES) copy_wait<0>();
        else copy_wait<(LATER < 32 ? LATER : 32)>();
        __syncwarp();
    }
}

// Field f of a unit and a batch row at step s, from memory.
DEVICE float read_field(const Args& a, const Item& item, int s, int f, int unit, int batch) {
    const int T = (int)argument(a, A_T), t = time_of(T, s), bytes = f < FIELDS16 ? 2 : 4;
    Field from = field(a, f);
    i64 at = t;
    if (BACKWARD && is_old(f)) {
        at += REVERSE ? 1 : -1;
        if (is_first(a, t, batch)) from = initial_field(a, f), at = 0;
    }
    if (unit >= D || batch >= (int)argument(a, A_B) || !from.p) return 0.f;
    return load_element(from.p + (item.head * from.n + batch * from.b + at * from.t + unit) * bytes, bytes == 4 ? F32 : KIND16);
}

#if STAGED
// A block's fields of a step: [field][batch][unit], so that a copy of rows writes shared memory in a row too. Pieces of 16
// bytes change places within their row, so that 8 rows of a column lie in 8 banks.
constexpr int ROWS = NT * 8, FIELDS = FIELDS16 + FIELDS32, SWAPS = (UB & (UB - 1)) == 0;
DEVICE int field_at(int f) { return SHARED_RING + ROWS * U * (f < FIELDS16 ? f * 2 : FIELDS16 * 2 + (f - FIELDS16) * 4); }
template <int BYTES>
DEVICE int piece_at(int row, int piece) {
    const int with = !SWAPS ? 0 : BYTES == 2 ? row % 8 * UB / 8 % UB : row / 2 % UB * 2;
    return row * U * BYTES + (piece ^ with) * 16;
}
DEVICE void read_fields(const Args& a, const Item& item, const Lane& l, int rank, int s, int i, float (&x)[FIELDS16 + FIELDS32][2]) {
    const int block = job_block(l, i), first = job_tile(l, i) * 8;
    const u32 row = shared_address(shared) + piece_at<2>(first + l.lane % 8, block);
#pragma unroll
    for (int f = 0; f < FIELDS16; f += 4) {
        u32 w[4];
        load_transposed_from(w, row + field_at(min(f + l.lane / 8, FIELDS16 - 1)));
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (f + j < FIELDS16) x[f + j < FIELDS16 ? f + j : 0][0] = low_half(w[j], KIND16), x[f + j < FIELDS16 ? f + j : 0][1] = high_half(w[j], KIND16);
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const float* wide = (const float*)(shared + piece_at<4>(first + 2 * l.q + e, block * 2 + l.g / 4)) + l.g % 4;
#pragma unroll
        for (int f = FIELDS16; f < FIELDS; f++) x[f][e] = wide[field_at(f) / 4];
    }
}
#else
// All fields of job i of step s: two values a thread, unit g, batch 2q and 2q + 1.
DEVICE void read_fields(const Args& a, const Item& item, const Lane& l, int rank, int s, int i, float (&x)[FIELDS16 + FIELDS32][2]) {
    if constexpr (STAGES == 0) {
#pragma unroll
        for (int f = 0; f < FIELDS16 + FIELDS32; f++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                x[f][e] = read_field(a, item, s, f, rank * U + job_block(l, i) * 8 + l.g, item.batch + job_tile(l, i) * 8 + 2 * l.q + e);
        return;
    }
    unsigned char* tile = shared + SHARED_RING + ((l.team * SLOTS_OF_FIELDS + s % SLOTS_OF_FIELDS) * UB * NT + l.warp * JOBS + i) * TILE_BYTES;
    const u32 address = shared_address(tile);
#pragma unroll
    for (int f = 0; f + 4 <= FIELDS16; f += 4) {
        u32 w[4];
        load_transposed4(w, address + f * 128, l.lane);
#pragma unroll
        for (int j = 0; j < 4; j++) x[f + j][0] = low_half(w[j], KIND16), x[f + j][1] = high_half(w[j], KIND16);
    }
#pragma unroll
    for (int f = FIELDS16 / 4 * 4; f < FIELDS16; f++) {
        const u32 w = load_transposed(address + f * 128, l.lane);
        x[f][0] = low_half(w, KIND16), x[f][1] = high_half(w, KIND16);
    }
    const float* wide = (const float*)(tile + FIELDS16 * 128) + 2 * l.q * 8 + l.g;
#pragma unroll
    for (int f = 0; f < FIELDS32; f++) x[FIELDS16 + f][0] = wide[f * 64], x[FIELDS16 + f][1] = wide[f * 64 + 8];
}
#endif

// Two values a thread (unit g, batch 2q and 2q + 1) of a job's tile to memory of `kind`; `to` is at batch 0, unit 0.
DEVICE void store_pair(const Args& a, const Item& item, const Lane& l, char* to, i64 batch_stride, int unit, int tile,
                       float v0, float v1, int kind) {
    const int B = (int)argument(a, A_B), first = item.batch + tile * 8;
    if (kind != F32 && kind != TF32 && D % 2 == 0) {
        const u32 w = transpose8x8(pack(v0, v1, kind));
        const int batch = first + l.g, u = unit + 2 * l.q;
        if (batch < B && u < D) *(u32*)(to + (batch * batch_stride + u) * 2) = w;
        return;
    }
    const int u = unit + l.g;
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int batch = first + 2 * l.q + e;
        const float v = e ? v1 : v0;
        if (batch >= B || u >= D) continue;
        if (kind == F32 || kind == TF32) *(float*)(to + (batch * batch_stride + u) * 4) = v;
        else *(unsigned short*)(to + (batch * batch_stride + u) * 2) = (unsigned short)(pack(v, 0.f, kind) & 0xffff);
    }
}
DEVICE constexpr int kind_bytes(int kind) { return kind == F32 || kind == TF32 ? 4 : 2; }

// State s of job i from the [S B 1 N D] tensor of `kind` whose pointer is the argument `pointer`, and whose strides of S, B,
// N are the three from `strides` on; zeros where there is none.
DEVICE void load_state(const Args& a, const Item& item, const Lane& l, int pointer, int strides, int s, int unit, int tile, float (&v)[2], int kind) {
    const char* p = (const char*)argument(a, pointer);
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int batch = item.batch + tile * 8 + 2 * l.q + e, u = unit + l.g;
        v[e] = 0.f;
        if (p && batch < (int)argument(a, A_B) && u < D)
            v[e] = load_element(p + (s * argument(a, strides) + batch * argument(a, strides + 1) + item.head * argument(a, strides + 2) + u) * kind_bytes(kind), kind);
    }
}

DEVICE bool reset_at(const Args& a, int s, int batch, int length) {
    const int T = (int)argument(a, A_T);
    if (!RESETS || s >= T || batch >= (int)argument(a, A_B)) return false;
    const int t = time_of(T, s);
    if (LENGTHS && t >= length) return false;
    return ((const unsigned char*)argument(a, A_RESETS))[batch * argument(a, A_RESETS_B) + t * argument(a, A_RESETS_T)];
}
