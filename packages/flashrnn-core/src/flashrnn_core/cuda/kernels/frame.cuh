// Who a thread is and which jobs it has: see the owners in scan.cuh. Tested through the kernels.

extern __shared__ __align__(128) unsigned char shared[];

struct Lane { int warp, lane, g, q, tile, ks; };

struct Item { int head, batch; };  // batch: first batch row of the tile

DEVICE i64 argument(const Args& a, int i) { return a.v[i]; }

// Job i of a warp: unit block within this block, and batch tile. A warp's jobs are neighbours in the vector; with
// KS == 1 they are its own accumulators.
DEVICE int job_block(const Lane& l, int i) { return KS == 1 ? l.tile * SUB + i / NT : (l.warp * JOBS + i) / NT; }
DEVICE int job_tile(const Lane& l, int i) { return KS == 1 ? i % NT : (l.warp * JOBS + i) % NT; }
DEVICE bool job_exists(const Lane& l, int i) { return JOBS * WARPS == UB * NT || l.warp * JOBS + i < UB * NT; }
