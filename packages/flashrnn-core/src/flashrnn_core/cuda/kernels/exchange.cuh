// How a job's part of a new vector reaches the blocks of its group: BLOCK, CLUSTER, GLOBAL, see scan.cuh.

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
        u32* to = vector + ((step * SENT + r) * NT + job_tile(l, i)) * 64;
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

// GLOBAL, once the block, or its pair, has gathered all of vector v + 1: nobody reads vector v any more, so the block's
// part of it becomes ABSENT again. Vector v + 4 takes its place; its readers have seen the same words of v + 3, which
// this block publishes behind this fence and the next barrier of the team. The warps of the last jobs do it, as those of
// the first are busy.
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
// messages (each updates the member's mbarrier, about 1.4 ns), else in one bulk copy each (longer on its way). To the
// block itself it goes in messages always: for compute-sanitizer a bulk copy within a cluster leaves its block.
DEVICE void send(const Lane& l, int rank, int v) {
#if EXCHANGE == EXCHANGE_CLUSTER
    constexpr int JOB_BYTES = SENT * WORDS * 128;
    const u32 barrier = team_barrier(l, v);
    const int left = UB * NT - l.warp * JOBS, jobs = left < JOBS ? left : JOBS;
    const u32 to = shared_address(shared + SHARED_VECTOR) + (v & 1) * VECTOR * 4 + (rank * UB * NT + l.warp * JOBS) * JOB_BYTES;
    unsigned char* from = shared + SHARED_STAGE + ((v & 1) * UB * NT + l.warp * JOBS) * JOB_BYTES;
    constexpr int PIECES = JOBS * JOB_BYTES / 16;
    auto message = [&](int peer, int piece) {
        if (piece < jobs * JOB_BYTES / 16)
            store_to_peer(peer_address(to, peer) + piece * 16, ((const uint4*)from)[piece], peer_address(barrier, peer));
    };
    if (SMALL) {
        __syncwarp();
#pragma unroll
        for (int i = l.lane; i < C * PIECES; i += 32) message(i / PIECES, i % PIECES);
    } else {
        async_proxy_fence();
        __syncwarp();
        if (l.lane < C && l.lane != rank && jobs > 0)
            copy_to_peer(peer_address(to, l.lane), shared_address(from), jobs * JOB_BYTES, peer_address(barrier, l.lane));
#pragma unroll
        for (int i = l.lane; i < PIECES; i += 32) message(rank, i);
    }
    if (threadIdx.x == 0) barrier_expect(barrier, VECTOR * 4);
#endif
}
