// Who a thread is and which jobs it has: see the owners in scan.cuh. Tested through the kernels.

extern __shared__ __align__(128) unsigned char shared[];

constexpr int SLICES = KS * SPLIT;  // of k

struct Lane { int team, warp, lane, g, q, tile, ks; };  // warp: number in the team

struct Item { int head, batch; };  // batch: first batch row of the tile

// The slice of k of a warp: those of the members of a cluster follow one another.
DEVICE int slice_of(int rank, int warp) { return rank % SPLIT * KS + warp % KS; }

DEVICE i64 argument(const Args& a, int i) { return a.v[i]; }

// Job i of a warp: unit block within this block, and batch tile. A warp's jobs are neighbours in the vector; with
// SLICES == 1 they are its own accumulators.
DEVICE int job_block(const Lane& l, int i) { return SLICES == 1 ? l.tile * SUB + i / NT : (l.warp * JOBS + i) / NT; }
DEVICE int job_tile(const Lane& l, int i) { return SLICES == 1 ? i % NT : (l.warp * JOBS + i) % NT; }
DEVICE bool job_exists(const Lane& l, int i) {
    if (STAGED && UB * NT % JOBS == 0) i = 0;  // all of a warp's or none
    return JOBS * WARPS == UB * NT || l.warp * JOBS + i < UB * NT;
}

// CLUSTER, SPLIT: what tells the team that what its cluster sends for vector v has come.
DEVICE u32 team_barrier(const Lane& l, int v) { return shared_address(shared + SHARED_BARRIERS) + (l.team * 2 + (v & 1)) * 8; }

// All warps of the team have come here.
DEVICE void team_sync(const Lane& l) {
    if (TEAMS == 1) __syncthreads();
    else barrier_sync(1 + l.team, WARPS * 32);
}
