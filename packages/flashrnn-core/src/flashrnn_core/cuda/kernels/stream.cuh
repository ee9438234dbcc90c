// R of any size (STREAM): packed once a call in fragment order, then a warp keeps KR k-steps in registers, KM in shared
// memory, and streams the other KW - KR - KM from L2 or device memory at every step, through a ring of its own.
//
// Teams share what is in shared memory; registers and rings are each warp's.
//
// The ring has SLOTS slots of a round (POLL k-steps). A lane copies just the 16 bytes that it will itself multiply, so
// a wait for its own copies is all the synchronisation; R does not depend on the vector, so the ring is filled ahead
// across the end of a step, while blocks wait for each other.

#if STREAM
constexpr int ROUND = POLL * MT * 32;  // of 16 bytes

// `next`: number of the round that the ring takes next; `slot`: where it goes, which is also what is consumed next.
#if !STAGED
struct Kept { u32 r[KR > 0 ? KR : 1][MT][4]; const uint4* from; int next, slot; };
#endif

// Element of R for this block of rows (8 rows: unit g of a block of 8, of gate `rows % ROW_BLOCKS`), 0 beyond R.
// The argument R is [Gr N row k], as it is given, forward; with D and P exchanged, backward. Any strides.
DEVICE const char* r_element(const Args& a, int head, int own, int gate, int k) {
    return (const char*)argument(a, A_R) + (head * argument(a, A_R_N) + gate * argument(a, A_R_G) + own * argument(a, A_R_D) + k * argument(a, A_R_P)) * ELEMENT_BYTES;
}
DEVICE u32 packed_word(const Args& a, int head, int rank, const Lane& l, int rows, int kk, int half) {
    const int own = (rank - rank % SPLIT) * U + (l.tile * SUB + rows / ROW_BLOCKS) * 8 + l.g;
    const int step = kk / SENT, gate = BACKWARD ? kk % SENT : rows % ROW_BLOCKS;
    const int k = WIDE ? step * 8 + half * 4 + l.q : step * 16 + half * 8 + 2 * l.q;
    if (own >= D || k >= D || kk >= K_STEPS) return 0u;
    if (WIDE) return wide_word(*(const float*)r_element(a, head, own, gate, k));
    const u32 second = k + 1 < D ? (u32) * (const unsigned short*)r_element(a, head, own, gate, k + 1) << 16 : 0u;
    return *(const unsigned short*)r_element(a, head, own, gate, k) | second;
}

// [N C WARPS KW MT 32] of 16 bytes: the words of lane, m16 tile, k-step, warp, block, head. And the scan's vectors, which
// begin as ABSENT. Less than 64 GiB.
extern "C" __global__ void pack(const __grid_constant__ Args a) {
    const u32 count = (u32)argument(a, A_N) * C * WARPS * KW * MT * 32, words = (u32)argument(a, A_VECTOR_WORDS);
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < count || i < words; i += gridDim.x * blockDim.x) {
        if (i < words) ((u32*)argument(a, A_VECTORS))[i] = ABSENT;
        if (i >= count) continue;
        Lane l;
        l.lane = i % 32, l.g = l.lane / 4, l.q = l.lane % 4;
        const u32 fragment = i / 32, step = fragment / MT, part = step / KW;
        const int m = fragment % MT, k = step % KW, rank = part / WARPS % C, head = part / WARPS / C;
        l.warp = part % WARPS, l.tile = l.warp / KS, l.ks = slice_of(rank, l.warp);
        u32 w[4];
        for (int j = 0; j < 4; j++) w[j] = packed_word(a, head, rank, l, m * 2 + (j & 1), l.ks * KW + k, j >> 1);
        ((uint4*)argument(a, A_PACKED))[i] = make_uint4(w[0], w[1], w[2], w[3]);
    }
}

#if !STAGED
DEVICE uint4* ring_slot(const Lane& l, int slot) {
    return (uint4*)(shared + SHARED_STREAM) + ((size_t)(l.team * WARPS + l.warp) * SLOTS + slot) * ROUND + l.lane;
}

// The next round is on its way into the slot just consumed. Rounds below HELD are asked to stay in L2, the others not.
DEVICE void refill(const Lane& l, Kept& kept) {
    const u32 to = shared_address(ring_slot(l, kept.slot));
    const uint4* from = kept.from + (size_t)kept.next * ROUND;
    const u64 policy = kept.next < HELD ? keep_policy() : pass_policy();
#pragma unroll
    for (int i = 0; i < POLL * MT; i++) copy16_hinted(to + i * 512, from + i * 32, policy);
    copy_commit();
    kept.next = kept.next + 1 == NX ? 0 : kept.next + 1;
    kept.slot = kept.slot + 1 == SLOTS ? 0 : kept.slot + 1;
}

DEVICE void load_r(const Args& a, const Item& item, const Lane& l, int rank, Kept& kept) {
    const uint4* packed = (const uint4*)argument(a, A_PACKED) + (((i64)item.head * C + rank) * WARPS + l.warp) * KW * MT * 32 + l.lane;
#pragma unroll
    for (int k = 0; k < KR; k++)
#pragma unroll
        for (int m = 0; m < MT; m++) {
            const uint4 w = packed[(k * MT + m) * 32];
            kept.r[k][m][0] = w.x, kept.r[k][m][1] = w.y, kept.r[k][m][2] = w.z, kept.r[k][m][3] = w.w;
        }
    uint4* rest = (uint4*)(shared + SHARED_R) + (size_t)l.warp * KM * MT * 32 + l.lane;
#pragma unroll 4
    for (int i = l.team; i < KM * MT; i += TEAMS) rest[i * 32] = packed[(KR * MT + i) * 32];
    copy_wait<0>();  // of the item before, into the same ring
    kept.from = packed + (KR + KM) * MT * 32;
    kept.next = kept.slot = 0;
    if (NX > 0)
        for (int i = 0; i < SLOTS; i++) refill(l, kept);
}

struct Polled { u32 w[2][POLL][NT][2]; };  // a round is polled while the one before is multiplied

// k-steps of the slices are neighbours in the vector: [k-step][batch tile][lane][word].
DEVICE bool expected(const Lane& l, int k) { return SLICES * KW == K_STEPS || l.ks * KW + k < K_STEPS; }
DEVICE void poll(const u32* slice, const Lane& l, int k0, u32 (&x)[POLL][NT][2]) {
#pragma unroll
    for (int k = 0; k < POLL; k++)
#pragma unroll
        for (int n = 0; n < NT; n++)
            if (expected(l, k0 + k)) load_words(slice + ((k0 + k) * NT + n) * 64, x[k][n][0], x[k][n][1]);
            else x[k][n][0] = x[k][n][1] = 0u;
}
// The words of round k0 are there, those of the next are asked for.
template <int NOW>
DEVICE void gather(const u32* slice, const Lane& l, int k0, Polled& p) {
    if (k0 + POLL < KW) poll(slice, l, k0 + POLL, p.w[NOW ^ 1]);
    while (true) {
        bool all = true;
#pragma unroll
        for (int k = 0; k < POLL; k++)
#pragma unroll
            for (int n = 0; n < NT; n++) all = all && p.w[NOW][k][n][0] != ABSENT && p.w[NOW][k][n][1] != ABSENT;
        if (all) break;
        poll(slice, l, k0, p.w[NOW]);
    }
}
// A round whose R is in shared memory at `r`.
DEVICE void multiply_round(Sums& s, const uint4* r, int v, const u32 (&b)[POLL][NT][2]) {
    products<POLL>(v, [&](int k) { multiply_step(s, k % CHAINS, r + k * MT * 32, b[k]); });
}
template <int NOW>
DEVICE void kept_round(const u32* slice, const Lane& l, int i, int v, Polled& p, Sums& s) {
    gather<NOW>(slice, l, KR + i * POLL, p);
    multiply_round(s, (const uint4*)(shared + SHARED_R) + (size_t)l.warp * KM * MT * 32 + l.lane + i * ROUND, v, p.w[NOW]);
}
template <int NOW>
DEVICE void streamed_round(const u32* slice, const Lane& l, int i, int v, Kept& kept, Polled& p, Sums& s) {
    gather<NOW>(slice, l, KR + KM + i * POLL, p);
    copy_wait<SLOTS - 1>();  // other copies, of the fields, may be among the last: then it waits for a round too many
    multiply_round(s, ring_slot(l, kept.slot), v, p.w[NOW]);
    refill(l, kept);
}

// Adds this warp's slice of k of R times vector number v. KR, KM and KW are whole rounds.
DEVICE void matmul(const Args& a, const Lane& l, int group, int v, Kept& kept, Sums& s) {
    const u32* slice = global_vector(a, group, v) + (size_t)l.ks * KW * NT * 64 + l.lane * 2;
    Polled p;
    poll(slice, l, 0, p.w[0]);
#pragma unroll
    for (int k0 = 0; k0 < KR; k0 += POLL) {
        if (k0 / POLL & 1) gather<1>(slice, l, k0, p);
        else gather<0>(slice, l, k0, p);
        products<POLL>(v, [&](int k) { multiply_step(s, k % CHAINS, kept.r[k0 + k < KR ? k0 + k : 0], p.w[k0 / POLL & 1][k]); });
    }
    constexpr int FIRST = KR / POLL & 1, NM = KM / POLL, THEN = FIRST ^ NM & 1;
#pragma unroll 1
    for (int i = 0; i + 1 < NM; i += 2) {
        kept_round<FIRST>(slice, l, i, v, p, s);
        kept_round<FIRST ^ 1>(slice, l, i + 1, v, p, s);
    }
    if constexpr (NM % 2) kept_round<FIRST>(slice, l, NM - 1, v, p, s);
    if constexpr (NX > 0) {
#pragma unroll 1
        for (int i = 0; i + 1 < NX; i += 2) {
            streamed_round<THEN>(slice, l, i, v, kept, p, s);
            streamed_round<THEN ^ 1>(slice, l, i + 1, v, kept, p, s);
        }
        if constexpr (NX % 2) streamed_round<THEN>(slice, l, NX - 1, v, kept, p, s);
    }
    add_chains(s);
}
#endif
#else
typedef u32 Kept[KR > 0 ? KR : 1][MT][4];
#endif
