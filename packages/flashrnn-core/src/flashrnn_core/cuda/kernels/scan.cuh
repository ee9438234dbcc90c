// The persistent scan, forward and backward. One launch; R stays in registers and shared memory.
//
// Both directions are one loop:  gather a vector -> multiply by the R of this block -> cell -> publish a new vector.
//   forward:  vector h(t-1), rows Gr gates of a unit, publishes h(t)
//   backward: vector dpre(t+1) of the recurrent gates, rows units of the previous h, publishes dpre(t)
// Owners. Item: a head and a batch tile of NT * 8. Group: C blocks (a cluster, or blocks that meet in L2) work on an
//   item; a block owns U units. Warp (tile, ks): SUB * 8 units, the ks-th slice of k. Lane = 4 g + q: unit g of a
//   block of 8, batch columns 2q and 2q + 1 of a tile of 8. Rows are ordered so that a thread holds all gates of its
//   unit: the cell runs on accumulators in place (KS == 1) or on sums over the KS partials in shared memory.
// A job is a block of 8 units and a batch tile of 8: one warp does its cell, and loads and stores its tensors.
// Vector in fragment order: [unit block][batch tile][gate sent][word][lane], so that what a job publishes is contiguous.
// Exchange. BLOCK: shared memory and __syncthreads. CLUSTER: a warp stages its words and sends one bulk copy to each
//   member, completing on that member's mbarrier; two buffers are enough: a vector v + 1 comes only from blocks that
//   have read all of v. GLOBAL: words travel through L2 with no flag; readers poll the data itself until it is there,
//   that is, no longer ABSENT. Four buffers, see `retire`.
// Ring: the tensors of the next STAGES - 1 steps are on their way into shared memory (cp.async), by the warp that reads
//   them. No aliasing among arguments; outputs are written once and never read.

extern __shared__ __align__(128) unsigned char shared[];

struct Lane { int warp, lane, g, q, tile, ks; };

struct Item { int head, batch; };  // batch: first batch row of the tile

DEVICE i64 argument(const Args& a, int i) { return a.v[i]; }

// ---- R -------------------------------------------------------------------------------------------------------------

// A word of R for row block `rows` (8 rows: unit g of a block of 8, of gate `rows % ROW_BLOCKS`) and k-step kk. The
// argument R is [Gr N row k], k contiguous: as it is given, forward; with D and P exchanged, backward.
DEVICE u32 r_word(const Args& a, const Item& item, const Lane& l, int rank, int rows, int kk, int half) {
    const int own = rank * U + (l.tile * SUB + rows / ROW_BLOCKS) * 8 + l.g;
    const int step = kk / SENT, gate = BACKWARD ? kk % SENT : rows % ROW_BLOCKS;
    const int k = WIDE ? step * 8 + half * 4 + l.q : step * 16 + half * 8 + 2 * l.q;
    if (own >= D || k >= D || kk >= K_STEPS) return 0u;
    const char* R = (const char*)argument(a, A_R) +
                    (item.head * argument(a, A_R_N) + gate * argument(a, A_R_G) + own * argument(a, A_R_D) + k) * ELEMENT_BYTES;
    if (WIDE) return wide_word(*(const float*)R);
    if (D % 2 == 0) return *(const u32*)R;
    return ((const unsigned short*)R)[0] | (k + 1 < D ? (u32)((const unsigned short*)R)[1] << 16 : 0u);
}

DEVICE void load_r(const Args& a, const Item& item, const Lane& l, int rank, u32 (&kept)[KR > 0 ? KR : 1][MT][4]) {
    uint4* rest = (uint4*)(shared + SHARED_R) + (size_t)l.warp * (KW - KR) * MT * 32 + l.lane;
#pragma unroll
    for (int k = 0; k < KR; k++)
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                kept[k][m][i] = r_word(a, item, l, rank, m * 2 + (i & 1), l.ks * KW + k, i >> 1);
    for (int k = KR; k < KW; k++)
        for (int m = 0; m < MT; m++) {
            u32 w[4];
            for (int i = 0; i < 4; i++) w[i] = r_word(a, item, l, rank, m * 2 + (i & 1), l.ks * KW + k, i >> 1);
            rest[((k - KR) * MT + m) * 32] = make_uint4(w[0], w[1], w[2], w[3]);
        }
}

// ---- the vector ----------------------------------------------------------------------------------------------------

// Word offset of k-step k of slice ks, batch tile nt; the second word of the step is SECOND further. GLOBAL: the two
// words of a lane are neighbours.
constexpr int SECOND = EXCHANGE == EXCHANGE_GLOBAL ? 1 : WIDE ? 32 : NT * SENT * 32;
DEVICE int vector_offset(int ks, int k, int nt) {
    const int step = KW % SENT == 0 ? ks * (KW / SENT) + k / SENT : (ks * KW + k) / SENT;
    const int sent = KW % SENT == 0 ? k % SENT : (ks * KW + k) % SENT;
    if (EXCHANGE == EXCHANGE_GLOBAL) return ((step * NT + nt) * SENT + sent) * 64;
    return (((WIDE ? step : 2 * step) * NT + nt) * SENT + sent) * WORDS * 32;
}

#if EXCHANGE == EXCHANGE_GLOBAL
constexpr u32 ABSENT = 0xffffffffu;  // two NaN that no rounding makes: rounding makes 0x7fff, arithmetic 0x7fffffff
DEVICE u32* global_vector(const Args& a, int group, int v) {
    return (u32*)argument(a, A_VECTORS) + ((size_t)group * 4 + (v & 3)) * VECTOR;
}
#endif

constexpr int CHAINS = MT * NT >= 4 ? 1 : 2;  // independent accumulators, so that mma does not wait for mma
struct Sums { float c[CHAINS][MT][NT][4]; };

DEVICE void multiply_step(Sums& s, const u32 (&kept)[KR > 0 ? KR : 1][MT][4], const uint4* rest, int k,
                          const u32 (&b)[NT][2]) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
        u32 w[4];
        if (k < KR) {
#pragma unroll
            for (int i = 0; i < 4; i++) w[i] = kept[k < KR ? k : 0][m][i];
        } else {
            const uint4 v = rest[((k - KR) * MT + m) * 32];
            w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
        }
#pragma unroll
        for (int n = 0; n < NT; n++) multiply(s.c[k % CHAINS][m][n], w, b[n][0], b[n][1]);
    }
}

// Adds this warp's slice of k of R times vector number v.
DEVICE void matmul(const Args& a, const Lane& l, int group, int v, const u32 (&kept)[KR > 0 ? KR : 1][MT][4], Sums& s) {
    const uint4* rest = (const uint4*)(shared + SHARED_R) + (size_t)l.warp * (KW - KR) * MT * 32 + l.lane;
#if EXCHANGE == EXCHANGE_GLOBAL
    const u32* vector = global_vector(a, group, v) + l.lane * 2;
    u32 p[2][POLL][NT][2];  // a round of POLL k-steps is polled while the one before is multiplied
    auto expected = [&](int k) { return k < KW && (K_STEPS % KS == 0 || l.ks * KW + k < K_STEPS); };
    auto poll = [&](int k0, u32 (&x)[POLL][NT][2]) {
#pragma unroll
        for (int k = 0; k < POLL; k++)
#pragma unroll
            for (int n = 0; n < NT; n++)
                if (expected(k0 + k)) load_words(vector + vector_offset(l.ks, k0 + k, n), x[k][n][0], x[k][n][1]);
                else x[k][n][0] = x[k][n][1] = 0u;
    };
    auto arrived = [&](const u32 (&x)[POLL][NT][2]) {
        bool all = true;
#pragma unroll
        for (int k = 0; k < POLL; k++)
#pragma unroll
            for (int n = 0; n < NT; n++) all = all && x[k][n][0] != ABSENT && x[k][n][1] != ABSENT;
        return all;
    };
    poll(0, p[0]);
#pragma unroll
    for (int k0 = 0; k0 < KW; k0 += POLL) {
        const int now = k0 / POLL & 1;
        if (k0 + POLL < KW) poll(k0 + POLL, p[now ^ 1]);
        while (!arrived(p[now])) poll(k0, p[now]);
#pragma unroll
        for (int k = 0; k < POLL; k++)
            if (k0 + k < KW) multiply_step(s, kept, rest, k0 + k, p[now][k]);
    }
#else
#if EXCHANGE == EXCHANGE_CLUSTER
    barrier_wait(shared_address(shared + SHARED_BARRIERS) + (v & 1) * 8, (v >> 1) & 1);
#endif
    const u32* vector = (const u32*)(shared + SHARED_VECTOR) + (v & 1) * VECTOR + l.lane;
#pragma unroll
    for (int k = 0; k < KW; k++) {
        if (K_STEPS % KS && l.ks * KW + k >= K_STEPS) break;
        u32 b[NT][2];
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) b[n][i] = vector[vector_offset(l.ks, k, n) + i * SECOND];
        multiply_step(s, kept, rest, k, b);
    }
#endif
#pragma unroll
    for (int i = 0; CHAINS == 2 && i < MT * NT * 4; i++) (&s.c[0][0][0][0])[i] += (&s.c[CHAINS - 1][0][0][0])[i];
}

// Job i of a warp: unit block within this block, and batch tile. A warp's jobs are neighbours in the vector; with
// KS == 1 they are its own accumulators.
DEVICE int job_block(const Lane& l, int i) { return KS == 1 ? l.tile * SUB + i / NT : (l.warp * JOBS + i) / NT; }
DEVICE int job_tile(const Lane& l, int i) { return KS == 1 ? i % NT : (l.warp * JOBS + i) % NT; }
DEVICE bool job_exists(const Lane& l, int i) { return JOBS * WARPS == UB * NT || l.warp * JOBS + i < UB * NT; }

// KS > 1: partial sums to shared memory, for the jobs' warps to add.
DEVICE void share_partials(const Lane& l, int v, const Sums& s) {
    float2* part = (float2*)(shared + SHARED_PARTIALS) + l.lane +
                   (((PARTS == 2 ? v & 1 : 0) * KS + l.ks) * TILES + l.tile) * MT * 2 * NT * 32;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int n = 0; n < NT; n++)
                part[((m * 2 + h) * NT + n) * 32] = make_float2(s.c[0][m][n][h * 2], s.c[0][m][n][h * 2 + 1]);
    __syncthreads();
}
DEVICE void clear(Sums& s) {
#pragma unroll
    for (int i = 0; i < CHAINS * MT * NT * 4; i++) (&s.c[0][0][0][0])[i] = 0.f;
}
// `sum` += what the job's rows came to. With KS == 1 the accumulators started from `sum`, see `start_from`.
DEVICE void start_from(Sums& s, int i, int row, const float (&x)[2]) {
    const int rows = i / NT * ROW_BLOCKS + row;
    if (KS == 1) s.c[0][rows >> 1][i % NT][(rows & 1) * 2] = x[0], s.c[0][rows >> 1][i % NT][(rows & 1) * 2 + 1] = x[1];
}
template <int ROWS>
DEVICE void job_sums(const Lane& l, int v, int i, const Sums& s, float (&sum)[ROWS][2]) {
    if constexpr (KS == 1) {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int rows = i / NT * ROW_BLOCKS + r;
                sum[r][e] = s.c[0][rows >> 1][i % NT][(rows & 1) * 2 + e];
            }
    } else {
        const int block = job_block(l, i), rows = block % SUB * ROW_BLOCKS;
        const float2* part = (const float2*)(shared + SHARED_PARTIALS) + l.lane + (PARTS == 2 ? v & 1 : 0) * KS * TILES * MT * 2 * NT * 32;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int k = 0; k < KS; k++) {
                const float2 p = part[(((k * TILES + block / SUB) * MT * 2 + rows + r) * NT + job_tile(l, i)) * 32];
                sum[r][0] += p.x, sum[r][1] += p.y;
            }
        }
    }
}

// The words of one gate of a job, from its two values a thread, at `to` (BLOCK, CLUSTER).
DEVICE void write_words(u32* to, const Lane& l, float v0, float v1) {
    if constexpr (WIDE) {
        to[l.g / 4 * 32 + 8 * l.q + (l.g & 3)] = wide_word(v0);
        to[l.g / 4 * 32 + 8 * l.q + 4 + (l.g & 3)] = wide_word(v1);
    } else {
        to[l.lane] = transpose8x8(pack(v0, v1, ELEMENT));
    }
}

#if EXCHANGE == EXCHANGE_GLOBAL
// Stores x's words of job i, or ABSENT, to a vector in L2.
template <bool RETIRE>
DEVICE void write_global(u32* vector, const Lane& l, int rank, int i, const float (&x)[SENT][2]) {
    const int block = rank * UB + job_block(l, i), step = WIDE ? block : block / 2;
#pragma unroll
    for (int r = 0; r < SENT; r++) {
        u32* to = vector + ((step * NT + job_tile(l, i)) * SENT + r) * 64;
        if constexpr (WIDE) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const u32 word = wide_word(x[r][e]);  // an initial state may be a NaN of any bits
                store_word(to + (8 * l.q + 4 * e + (l.g & 3)) * 2 + l.g / 4, RETIRE ? ABSENT : word == ABSENT ? 0x7fffffffu : word);
            }
        } else {
            const u32 word = RETIRE ? ABSENT : transpose8x8(pack(x[r][0], x[r][1], ELEMENT));
            store_word(to + l.lane * 2 + (block & 1), word);
        }
    }
}
#endif

// GLOBAL, once the block has gathered all of vector v + 1: nobody reads vector v any more, so the block's part of it
// becomes ABSENT again. Vector v + 4 takes its place; its readers have seen a word of v + 3, which this block publishes
// behind this fence and the next __syncthreads. The warps of the last jobs do it, as those of the first are busy.
DEVICE void retire(const Args& a, const Lane& l, int rank, int group, int v) {
#if EXCHANGE == EXCHANGE_GLOBAL
    Lane other = l;
    other.warp = WARPS - 1 - l.warp;
    if (v < 0 || !job_exists(other, 0)) return;
#pragma unroll
    for (int i = 0; i < JOBS; i++)
        if (job_exists(other, i)) write_global<true>(global_vector(a, group, v), other, rank, i, {});
    __threadfence();
#endif
}

// Job i's part of vector number v: to the group's vector (BLOCK, GLOBAL), or staged for `send` (CLUSTER).
DEVICE void publish(const Args& a, const Lane& l, int rank, int group, int v, int i, const float (&given)[SENT][2]) {
    const bool real = C * U == D || rank * U + job_block(l, i) * 8 + l.g < D;  // R is 0 for the others, which may be NaN
    float x[SENT][2];
#pragma unroll
    for (int r = 0; r < SENT; r++) x[r][0] = real ? given[r][0] : 0.f, x[r][1] = real ? given[r][1] : 0.f;
#if EXCHANGE == EXCHANGE_GLOBAL
    write_global<false>(global_vector(a, group, v), l, rank, i, x);
#else
#if EXCHANGE == EXCHANGE_CLUSTER
    u32* to = (u32*)(shared + SHARED_STAGE) + ((v & 1) * UB * NT + l.warp * JOBS + i) * SENT * WORDS * 32;
#else
    u32* to = (u32*)(shared + SHARED_VECTOR) + (v & 1) * VECTOR +
              ((rank * UB + job_block(l, i)) * NT + job_tile(l, i)) * SENT * WORDS * 32;
#endif
#pragma unroll
    for (int r = 0; r < SENT; r++) write_words(to + r * WORDS * 32, l, x[r][0], x[r][1]);
#endif
}

// CLUSTER: what this warp staged of vector number v goes to every member: 16 bytes a lane where that is a few
// messages (each updates the member's mbarrier, about 1.4 ns), else in one bulk copy each (longer on its way).
DEVICE void send(const Lane& l, int rank, int v) {
#if EXCHANGE == EXCHANGE_CLUSTER
    constexpr int JOB_BYTES = SENT * WORDS * 128;
    const u32 barrier = shared_address(shared + SHARED_BARRIERS) + (v & 1) * 8;
    const int left = UB * NT - l.warp * JOBS, jobs = left < JOBS ? left : JOBS;
    const u32 to = shared_address(shared + SHARED_VECTOR) + (v & 1) * VECTOR * 4 + (rank * UB * NT + l.warp * JOBS) * JOB_BYTES;
    unsigned char* from = shared + SHARED_STAGE + ((v & 1) * UB * NT + l.warp * JOBS) * JOB_BYTES;
    if (SMALL) {
        __syncwarp();
#pragma unroll
        for (int i = l.lane; i < C * JOBS * JOB_BYTES / 16; i += 32) {
            const int peer = i / (JOBS * JOB_BYTES / 16), piece = i % (JOBS * JOB_BYTES / 16);
            if (piece < jobs * JOB_BYTES / 16)
                store_to_peer(peer_address(to, peer) + piece * 16, ((const uint4*)from)[piece], peer_address(barrier, peer));
        }
    } else {
        async_proxy_fence();
        __syncwarp();
        if (l.lane < C && jobs > 0)
            copy_to_peer(peer_address(to, l.lane), shared_address(from), jobs * JOB_BYTES, peer_address(barrier, l.lane));
    }
    if (threadIdx.x == 0) barrier_expect(barrier, VECTOR * 4);
#endif
}

// ---- the ring ------------------------------------------------------------------------------------------------------

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

DEVICE void fetch(const Args& a, const Item& item, const Lane& l, int rank, int s, const Chunk (&chunks)[JOBS][CHUNKS_A_LANE]) {
    const int T = (int)argument(a, A_T);
    if (s < T) {
        const int t = time_of(T, s);
        unsigned char* stage = shared + SHARED_RING + ((s % STAGES) * UB * NT + l.warp * JOBS) * TILE_BYTES;
#pragma unroll
        for (int i = 0; i < JOBS; i++) {
            if (!job_exists(l, i)) break;
            if constexpr (ALIGNED) {
#pragma unroll
                for (int k = 0; k < CHUNKS_A_LANE; k++) {
                    const int number = l.lane + k * 32;
                    const char* p = chunks[i][k].p ? chunks[i][k].p + t * chunks[i][k].stride : nullptr;
                    if (BACKWARD && p && is_old(chunk_field(number))) {
                        p += REVERSE ? chunks[i][k].stride : -chunks[i][k].stride;
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

// All fields of job i of step s: two values a thread, unit g, batch 2q and 2q + 1.
DEVICE void read_fields(const Lane& l, int s, int i, float (&x)[FIELDS16 + FIELDS32][2]) {
    unsigned char* tile = shared + SHARED_RING + ((s % STAGES) * UB * NT + l.warp * JOBS + i) * TILE_BYTES;
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

// ---- stores --------------------------------------------------------------------------------------------------------

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

// State s of job i from a [S B 1 N D] tensor of `kind`; zeros where there is none.
DEVICE void load_state(const Args& a, const Item& item, const Lane& l, int pointer, int s, int unit, int tile, float (&v)[2], int kind) {
    const char* p = (const char*)argument(a, pointer);
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int batch = item.batch + tile * 8 + 2 * l.q + e, u = unit + l.g;
        v[e] = 0.f;
        if (p && batch < (int)argument(a, A_B) && u < D)
            v[e] = load_element(p + (s * argument(a, pointer + 1) + batch * argument(a, pointer + 2) + item.head * argument(a, pointer + 3) + u) * kind_bytes(kind), kind);
    }
}

DEVICE bool reset_at(const Args& a, int s, int batch, int length) {
    const int T = (int)argument(a, A_T);
    if (!RESETS || s >= T || batch >= (int)argument(a, A_B)) return false;
    const int t = time_of(T, s);
    if (LENGTHS && t >= length) return false;
    return ((const unsigned char*)argument(a, A_RESETS))[batch * argument(a, A_RESETS_B) + t * argument(a, A_RESETS_T)];
}

// ---- the two directions --------------------------------------------------------------------------------------------

// Pre-activations of a job from its fields, its biases in shared memory and, forward, the recurrent sums.
// Place of a gate among those of a mask.
DEVICE int part_of(int mask, int gate) { return __popc(mask & ((1 << gate) - 1)); }
DEVICE float bias_of(int gate, int block, const Lane& l) {
    return ((const float*)(shared + SHARED_BIAS))[gate * U + block * 8 + l.g];
}

#if !BACKWARD
DEVICE void scan_item(const Args& a, const Item& item, const Lane& l, int rank, int group, int& v,
                      const u32 (&kept)[KR > 0 ? KR : 1][MT][4], const Chunk (&chunks)[JOBS][CHUNKS_A_LANE]) {
    const int T = (int)argument(a, A_T);
    float state[JOBS][S][2];
    int length[JOBS][2];
    bool fresh[JOBS][2];  // the next step starts from zeros
#pragma unroll
    for (int i = 0; i < JOBS; i++) {
        const int block = job_block(l, i), tile = job_tile(l, i), unit = rank * U + block * 8;
        const int batch = item.batch + tile * 8 + 2 * l.q;
        if (!job_exists(l, i)) break;
#pragma unroll
        for (int e = 0; e < 2; e++) length[i][e] = length_of(a, batch + e);
#pragma unroll
        for (int s = 0; s < S; s++) {
            load_state(a, item, l, A_STATES, s, unit, tile, state[i][s], STATE);
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (reset_at(a, 0, batch + e, length[i][e])) state[i][s][e] = 0.f;
        }
#pragma unroll
        for (int e = 0; e < 2; e++) fresh[i][e] = reset_at(a, 1, batch + e, length[i][e]);
        publish(a, l, rank, group, v, i, {{state[i][0][0], state[i][0][1]}});
    }
    send(l, rank, v);
    if (EXCHANGE == EXCHANGE_BLOCK) __syncthreads();

    for (int s = 0; s < T; s++) {
        const int t = time_of(T, s);
        copy_wait<STAGES - 2>();
        __syncwarp();
        float x[JOBS][G][2];
        bool fresh_next[JOBS][2];
#pragma unroll
        for (int i = 0; i < JOBS; i++) {
            if (!job_exists(l, i)) break;
            float f[FIELDS16 + FIELDS32][2];
            read_fields(l, s, i, f);
#pragma unroll
            for (int g = 0; g < G; g++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    x[i][g][e] = bias_of(g, job_block(l, i), l) + (INPUT_MASK >> g & 1 ? f[FIELD_WX + part_of(INPUT_MASK, g)][e] : 0.f);
                    pin(x[i][g][e]);
                }
#pragma unroll
            for (int e = 0; e < 2; e++)
                fresh_next[i][e] = reset_at(a, s + 2, item.batch + job_tile(l, i) * 8 + 2 * l.q + e, length[i][e]);
        }
        __syncwarp();
        fetch(a, item, l, rank, s + STAGES - 1, chunks);

        Sums sums;
        clear(sums);
#pragma unroll
        for (int i = 0; i < JOBS; i++)
#pragma unroll
            for (int g = 0; g < G; g++)
                if (RECURRENT_MASK >> g & 1) start_from(sums, i, part_of(RECURRENT_MASK, g), x[i][g]);
        matmul(a, l, group, v, kept, sums);
        if (KS > 1) share_partials(l, v, sums);
        retire(a, l, rank, group, v - 1);
        float out[JOBS][S][2];
#pragma unroll
        for (int i = 0; i < JOBS; i++) {
            if (!job_exists(l, i)) break;
            float rec[GR][2];
#pragma unroll
            for (int g = 0; g < G; g++)
                if (RECURRENT_MASK >> g & 1) rec[part_of(RECURRENT_MASK, g)][0] = x[i][g][0], rec[part_of(RECURRENT_MASK, g)][1] = x[i][g][1];
            job_sums(l, v, i, sums, rec);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float pre[G], old[S], result[S];
#pragma unroll
                for (int g = 0; g < G; g++)
                    pre[g] = RECURRENT_MASK >> g & 1 ? rec[part_of(RECURRENT_MASK, g)][e] : x[i][g][e];
#pragma unroll
                for (int k = 0; k < S; k++) old[k] = state[i][k][e];
                cell_forward(pre, old, result);
                const bool active = !LENGTHS || t < length[i][e];
#pragma unroll
                for (int k = 0; k < S; k++) {
                    out[i][k][e] = active ? result[k] : 0.f;
                    state[i][k][e] = RESETS && fresh[i][e] ? 0.f : active ? result[k] : old[k];
                }
                fresh[i][e] = fresh_next[i][e];
            }
            if (s + 1 < T) publish(a, l, rank, group, v + 1, i, {{state[i][0][0], state[i][0][1]}});
        }
        if (s + 1 < T) send(l, rank, v + 1);
#pragma unroll
        for (int i = 0; i < JOBS; i++) {
            if (!job_exists(l, i)) break;
            const int unit = rank * U + job_block(l, i) * 8, tile = job_tile(l, i);
#pragma unroll
            for (int k = 0; k < (HIDDEN_ONLY ? 1 : S); k++) {
                char* to = (char*)argument(a, A_OUT) + (k * argument(a, A_OUT_S) + t * argument(a, A_OUT_T) + item.head * (i64)D) * kind_bytes(STATE);
                store_pair(a, item, l, to, argument(a, A_OUT_B), unit, tile, out[i][k][0], out[i][k][1], STATE);
            }
#pragma unroll
            for (int k = 0; k < S; k++)
                if (SAVED_MASK >> k & 1) {
                    char* to = (char*)argument(a, A_SAVED) + (part_of(SAVED_MASK, k) * argument(a, A_OUT_S) + t * argument(a, A_OUT_T) + item.head * (i64)D) * 4;
                    store_pair(a, item, l, to, argument(a, A_OUT_B), unit, tile, out[i][k][0], out[i][k][1], F32);
                }
        }
        v++;
        if (EXCHANGE == EXCHANGE_BLOCK || (KS > 1 && PARTS == 1)) __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < JOBS; i++) {
        if (!job_exists(l, i)) break;
#pragma unroll
        for (int k = 0; k < S; k++) {
            char* to = (char*)argument(a, A_LAST) + (k * argument(a, A_LAST_S) + item.head * (i64)D) * kind_bytes(STATE);
            store_pair(a, item, l, to, argument(a, A_LAST_B), rank * U + job_block(l, i) * 8, job_tile(l, i), state[i][k][0], state[i][k][1], STATE);
        }
    }
}
#else
DEVICE void scan_item(const Args& a, const Item& item, const Lane& l, int rank, int group, int& v,
                      const u32 (&kept)[KR > 0 ? KR : 1][MT][4], const Chunk (&chunks)[JOBS][CHUNKS_A_LANE]) {
    const int T = (int)argument(a, A_T);
    const float bound = __int_as_float((int)argument(a, A_CLIP));
    float carry[JOBS][S][2];  // cotangents of the states, h without its part through R
    int length[JOBS][2];
    bool fresh[JOBS][2], was_fresh[JOBS][2], was_active[JOBS][2];
#pragma unroll
    for (int i = 0; i < JOBS; i++) {
        if (!job_exists(l, i)) break;
        const int batch = item.batch + job_tile(l, i) * 8 + 2 * l.q;
#pragma unroll
        for (int k = 0; k < S; k++) load_state(a, item, l, A_DLAST, k, rank * U + job_block(l, i) * 8, job_tile(l, i), carry[i][k], F32);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            length[i][e] = length_of(a, batch + e);
            fresh[i][e] = reset_at(a, 0, batch + e, length[i][e]);
            was_fresh[i][e] = was_active[i][e] = false;
        }
    }
    for (int s = 0; s <= T; s++) {
        const int t = time_of(T, s);
        Prepared prepared[JOBS][2];
        float dout[JOBS][S][2];
        bool fresh_next[JOBS][2];
        if (s < T) {
            copy_wait<STAGES - 2>();
            __syncwarp();
#pragma unroll
            for (int i = 0; i < JOBS; i++) {
                if (!job_exists(l, i)) break;
                float f[FIELDS16 + FIELDS32][2];
                read_fields(l, s, i, f);
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float pre[G], old[S];
#pragma unroll
                    for (int g = 0; g < G; g++)
                        pre[g] = bias_of(g, job_block(l, i), l) + (INPUT_MASK >> g & 1 ? f[FIELD_WX + part_of(INPUT_MASK, g)][e] : 0.f)
                                 + (RECURRENT_MASK >> g & 1 ? f[FIELD_REC + part_of(RECURRENT_MASK, g)][e] : 0.f);
#pragma unroll
                    for (int k = 0; k < S; k++) {
                        old[k] = OLD_MASK >> k & 1 && !fresh[i][e] ? f[old_field(k)][e] : 0.f;
                        dout[i][k][e] = f[FIELD_DOUT + k][e];
                    }
                    cell_prepare(pre, old, prepared[i][e]);
                    fresh_next[i][e] = reset_at(a, s + 1, item.batch + job_tile(l, i) * 8 + 2 * l.q + e, length[i][e]);
                }
            }
            __syncwarp();
            fetch(a, item, l, rank, s + STAGES - 1, chunks);
        }
        Sums sums;
        const bool through_r = !CUT && s > 0;
        if (through_r) {
            clear(sums);
            matmul(a, l, group, v - 1, kept, sums);
            if (KS > 1) share_partials(l, v, sums);
            retire(a, l, rank, group, v - 2);
        }
        float dpre[JOBS][G][2];
#pragma unroll
        for (int i = 0; i < JOBS; i++) {
            if (!job_exists(l, i)) break;
            float dh[1][2] = {{0.f, 0.f}};
            if (through_r) job_sums(l, v, i, sums, dh);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if (!was_active[i][e]) continue;
                float h = carry[i][0][e] + dh[0][e];
                if (CLIP) h = h > bound ? bound : h < -bound ? -bound : h;
                carry[i][0][e] = h;
                if (RESETS && was_fresh[i][e])
#pragma unroll
                    for (int k = 0; k < S; k++) carry[i][k][e] = 0.f;
            }
            if (s == T) continue;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float dnew[S], dgate[G], dold[S];
#pragma unroll
                for (int k = 0; k < S; k++) dnew[k] = carry[i][k][e] + dout[i][k][e];
                cell_finish(prepared[i][e], dnew, dgate, dold);
                const bool active = !LENGTHS || t < length[i][e];
#pragma unroll
                for (int g = 0; g < G; g++) dpre[i][g][e] = active ? dgate[g] : 0.f;
#pragma unroll
                for (int k = 0; k < S; k++) carry[i][k][e] = active ? dold[k] : carry[i][k][e];
                was_active[i][e] = active;
                was_fresh[i][e] = fresh[i][e];
                fresh[i][e] = fresh_next[i][e];
            }
            if (!CUT) {
                float sent[SENT][2];
#pragma unroll
                for (int g = 0; g < G; g++)
                    if (RECURRENT_MASK >> g & 1) sent[part_of(RECURRENT_MASK, g)][0] = dpre[i][g][0], sent[part_of(RECURRENT_MASK, g)][1] = dpre[i][g][1];
                publish(a, l, rank, group, v, i, sent);
            }
        }
        if (s < T && !CUT) send(l, rank, v);
#pragma unroll
        for (int i = 0; i < JOBS; i++) {
            if (s == T || !job_exists(l, i)) break;
            const int unit = rank * U + job_block(l, i) * 8, tile = job_tile(l, i);
#pragma unroll
            for (int g = 0; g < G; g++) {
                char* to = (char*)argument(a, A_DPRE) + (g * argument(a, A_DPRE_G) + t * argument(a, A_DPRE_T) + item.head * (i64)D) * ELEMENT_BYTES;
                store_pair(a, item, l, to, argument(a, A_DPRE_B), unit, tile, dpre[i][g][0], dpre[i][g][1], ELEMENT);
            }
        }
        if (s < T) v++;
        if (EXCHANGE == EXCHANGE_BLOCK || (KS > 1 && PARTS == 1)) __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < JOBS; i++) {
        if (!job_exists(l, i)) break;
#pragma unroll
        for (int k = 0; k < S; k++) {
            char* to = (char*)argument(a, A_DSTATES) + (k * argument(a, A_LAST_S) + item.head * (i64)D) * 4;
            store_pair(a, item, l, to, argument(a, A_LAST_B), rank * U + job_block(l, i) * 8, job_tile(l, i), carry[i][k][0], carry[i][k][1], F32);
        }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) scan(const __grid_constant__ Args a) {
    Lane l;
    l.warp = threadIdx.x / 32, l.lane = threadIdx.x % 32, l.g = l.lane / 4, l.q = l.lane % 4;
    l.tile = l.warp / KS, l.ks = l.warp % KS;
    const int rank = blockIdx.x % C;
#if EXCHANGE == EXCHANGE_CLUSTER
    if (threadIdx.x == 0) {
        barrier_init(shared_address(shared + SHARED_BARRIERS));
        barrier_init(shared_address(shared + SHARED_BARRIERS) + 8);
        barrier_init_fence();
    }
    __syncthreads();
    cluster_sync();
#endif
    const int group = blockIdx.x / C, groups = gridDim.x / C;
    const int heads = (int)argument(a, A_N), items = heads * (int)argument(a, A_TILES);
    int v = 0;  // number of the next vector
    for (int number = group; number < items; number += groups) {
        const Item item = {number % heads, number / heads * NT * 8};
        __syncthreads();
        for (int i = threadIdx.x; i < G * U; i += WARPS * 32) {
            const int unit = rank * U + i % U;
            ((float*)(shared + SHARED_BIAS))[i] = unit < D ? ((const float*)argument(a, A_BIAS))[((i64)(i / U) * heads + item.head) * D + unit] : 0.f;
        }
        u32 kept[KR > 0 ? KR : 1][MT][4];
        load_r(a, item, l, rank, kept);
        Chunk chunks[JOBS][CHUNKS_A_LANE];
        if (ALIGNED)
#pragma unroll
            for (int i = 0; i < JOBS; i++)
#pragma unroll
                for (int k = 0; k < CHUNKS_A_LANE; k++)
                    if (job_exists(l, i)) chunks[i][k] = chunk(a, item, field(a, chunk_field(l.lane + k * 32)), rank * U + job_block(l, i) * 8, job_tile(l, i), l.lane + k * 32);
        copy_wait<0>();
        for (int s = 0; s < STAGES - 1; s++) fetch(a, item, l, rank, s, chunks);
        __syncthreads();
        scan_item(a, item, l, rank, group, v, kept, chunks);
    }
#if EXCHANGE == EXCHANGE_CLUSTER
    cluster_sync();
#endif
}
