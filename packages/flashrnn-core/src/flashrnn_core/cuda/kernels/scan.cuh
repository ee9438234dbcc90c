// The persistent scan: the kernel, and what both directions share. One launch for all steps, or for a piece of time.
// The rooms before it: ptx, element, frame, matmul, reduce, stream, exchange, ring, serve, and forward or backward.
//
// Both directions are one loop:  gather a vector -> multiply by the R of this block -> cell -> publish a new vector.
//   forward:  vector h(t-1), rows Gr gates of a unit, publishes h(t)
//   backward: vector dpre(t+1) of the recurrent gates, rows units of the previous h, publishes dpre(t)
// Owners. Item: a head and a batch tile of NT * 8. Group: C blocks (a cluster, or blocks that meet in L2) work on an
//   item; a block owns U units. Warp (tile, ks): SUB * 8 units, the ks-th of SLICES of k. Lane = 4 g + q: unit g of a
//   block of 8, batch columns 2q and 2q + 1 of a tile of 8. Rows are ordered so that a thread holds all gates of its
//   unit: the cell runs on accumulators in place (SLICES == 1) or on sums over the slices, see reduce.cuh.
// Teams (GLOBAL): TEAMS * WARPS warps of a block share its R, each team on an item of its own, with its own vectors,
//   rings and barrier, so that one multiplies while another waits. All are of one head, and change items together.
// Pairs (GLOBAL): SPLIT blocks of a group are a cluster; each takes a part of k for the units of both, see reduce.cuh.
// A job is a block of 8 units and a batch tile of 8: one warp does its cell, and loads and stores its tensors.
// Vector in fragment order: [unit block][batch tile][gate sent][word][lane], so that what a job publishes is contiguous;
//   GLOBAL, where words go one by one: [k-step][batch tile][lane][word], so that what a lane polls is.
// Exchange. BLOCK: shared memory and __syncthreads. CLUSTER: a warp stages its words and sends them to each member, see
//   `send`, completing on that member's mbarrier; two buffers are enough: a vector v + 1 comes only from blocks that
//   have read all of v. GLOBAL: words travel through L2 with no flag; readers poll the data itself until it is there,
//   that is, no longer ABSENT. Four buffers, see `retire`.
// Ring: the tensors of the next STAGES - 1 steps are on their way into shared memory (cp.async), by the warp that reads
//   them. No aliasing among arguments; outputs are written once and never read.

extern "C" __global__ void __launch_bounds__(TEAMS * WARPS * 32, 1) scan(const __grid_constant__ Args a) {
    Lane l;
    l.team = TEAMS == 1 ? 0 : threadIdx.x / (WARPS * 32);
    l.warp = threadIdx.x / 32 - l.team * WARPS, l.lane = threadIdx.x % 32, l.g = l.lane / 4, l.q = l.lane % 4;
    const int rank = blockIdx.x % C;
    l.tile = l.warp / KS, l.ks = slice_of(rank, l.warp);
    const Lane mine = served_by(l);
    const int group = blockIdx.x / C, groups = gridDim.x / C, team = group * TEAMS + l.team;
    const int heads = (int)argument(a, A_N), items = heads * (int)argument(a, A_TILES);
    int v = 0;  // number of the next vector; those of launches before this one, on the same memory, are left as they are
    if (EXCHANGE == EXCHANGE_GLOBAL)
        for (int number = group; number < items; number += groups)
            if (TEAMS == 1 || (number / heads * TEAMS + l.team) * NT * 8 < (int)argument(a, A_B)) v += (int)argument(a, A_DONE);
#if EXCHANGE == EXCHANGE_CLUSTER || SPLIT > 1
    if (l.warp == 0 && l.lane == 0) {
        for (int i = 0; i < 2; i++) {  // of the vectors with that last bit; the next bit is the phase waited for
            barrier_init(team_barrier(l, i));
            if (v + ((v ^ i) & 1) & 2) barrier_arrive(team_barrier(l, i));
        }
#if STAGED
        for (int r = 0; r < ROUNDS; r++) {  // of every vector
            barrier_init(round_barrier(r));
            if (v & 1) barrier_arrive(round_barrier(r));
        }
#endif
        barrier_init_fence();
    }
    __syncthreads();
    cluster_sync();
#endif
    for (int number = group; number < items; number += groups) {
        const Item item = {number % heads, (number / heads * TEAMS + l.team) * NT * 8};
        __syncthreads();
        const int kind = (int)argument(a, A_BIAS_KIND), bytes = kind == F32 ? 4 : 2;
        for (int i = threadIdx.x; i < G * U; i += TEAMS * WARPS * 32) {
            const int unit = rank * U + i % U;
            const char* p = (const char*)argument(a, A_BIAS) + (((i64)(i / U) * heads + item.head) * D + unit) * bytes;
            ((float*)(shared + SHARED_BIAS))[i] = unit < D ? load_element(p, kind) : 0.f;
        }
        Kept kept;
        load_r(a, item, l, rank, kept);
        Chunk chunks[JOBS][CHUNKS_A_LANE];
        if (ALIGNED && !LATE)
#pragma unroll
            for (int i = 0; i < JOBS; i++)
#pragma unroll
                for (int k = 0; k < CHUNKS_A_LANE; k++)
                    if (job_exists(mine, i)) chunks[i][k] = chunk_of(a, item, mine, rank, i, l.lane + k * 32);
        copy_wait<0>();
#pragma unroll 1
        for (int s = 0; s < STAGES - 1 + ONE_STAGE && !STAGED; s++) fetch<true>(a, item, mine, rank, s, chunks);
        __syncthreads();
        if (TEAMS == 1 || item.batch < (int)argument(a, A_B)) scan_item(a, item, l, rank, team, v, kept, chunks);
    }
    if (NX > 0) copy_wait<0>();
#if EXCHANGE == EXCHANGE_CLUSTER || SPLIT > 1
    cluster_sync();
#endif
}
