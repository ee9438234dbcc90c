// The sums over the slices of k, from the warps that multiplied to those that have jobs: in place where there is one
// slice, else through shared memory; and where a cluster shares the k of its units (SPLIT), on to the member that owns
// them. Layout of a part: [row of 8 units][batch tile][lane] of two values, a job's rows next to each other where it is sent.

// The team's buffer of partial sums for vector v.
DEVICE int partials_of(const Lane& l, int v) { return l.team * PARTS + (PARTS == 2 ? v & 1 : 0); }

DEVICE void clear(Sums& s) {
#pragma unroll
    for (int i = 0; i < CHAINS * MT * NT * 4; i++) (&s.c[0][0][0][0])[i] = 0.f;
}

#if !STAGED
// `sum` += what slices of this block came to, of a block of 8 units (of the cluster's) and a batch tile.
template <int ROWS>
DEVICE void add_partials(const Lane& l, int v, int block, int tile, float (&sum)[ROWS][2]) {
    const int row = (block / SUB * MT * 2 + block % SUB * ROW_BLOCKS) * NT + tile;
    const float2* part = (const float2*)(shared + SHARED_PARTIALS) + l.lane + (partials_of(l, v) * KS * TILES * MT * 2 * NT + row) * 32;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int k = 0; k < KS; k++) {
            const float2 p = part[(k * TILES * MT * 2 + r) * NT * 32];
            sum[r][0] += p.x, sum[r][1] += p.y;
        }
    }
}

#if SPLIT > 1
// What a member receives for vector v: [member][its job][row][lane] of two values, each from that member's slices. Two
// buffers are enough: sums of v + 2 come only from blocks that read a part of v + 2, which is published after all parts
// of v + 1 were, and these after what came for v was read.
constexpr int JOB_SUMS = ROW_BLOCKS * 256, MEMBER_SUMS = UB * NT * JOB_SUMS;  // bytes
DEVICE u32 received(const Lane& l, int v, int member, int job) {
    return SHARED_RECEIVED + ((l.team * 2 + (v & 1)) * SPLIT + member) * MEMBER_SUMS + job * JOB_SUMS;
}

DEVICE void send_sums(const Lane& l, int rank, int v) {
#pragma unroll
    for (int i = 0; i < (SPLIT * UB * NT + WARPS - 1) / WARPS; i++) {
        const int piece = l.warp + i * WARPS, block = piece / NT;
        if (SPLIT * UB * NT % WARPS && piece >= SPLIT * UB * NT) break;
        float sum[ROW_BLOCKS][2] = {};
        add_partials(l, v, block, piece % NT, sum);
        const u32 owner = block / UB, barrier = peer_address(team_barrier(l, v), owner);
        const u32 to = peer_address(shared_address(shared) + received(l, v, rank % SPLIT, block % UB * NT + piece % NT), owner) + l.lane * 8;
#pragma unroll
        for (int r = 0; r < ROW_BLOCKS; r++) {  // 16 bytes a message, of two lanes
            const float x = __shfl_down_sync(~0u, sum[r][0], 1), y = __shfl_down_sync(~0u, sum[r][1], 1);
            const uint4 both = {__float_as_uint(sum[r][0]), __float_as_uint(sum[r][1]), __float_as_uint(x), __float_as_uint(y)};
            if (l.lane % 2 == 0) store_to_peer(to + r * 256, both, barrier);
        }
    }
    const u32 mine = team_barrier(l, v);
    if (l.warp == 0 && l.lane == 0) barrier_expect(mine, SPLIT * MEMBER_SUMS);
    barrier_wait(mine, v >> 1 & 1);
}
#endif

// SLICES > 1: partial sums to where the jobs' warps add them.
DEVICE void share_partials(const Lane& l, int rank, int v, const Sums& s) {
    float2* part = (float2*)(shared + SHARED_PARTIALS) + l.lane +
                   ((partials_of(l, v) * KS + l.warp % KS) * TILES + l.tile) * MT * 2 * NT * 32;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int n = 0; n < NT; n++)
                part[((m * 2 + h) * NT + n) * 32] = make_float2(s.c[0][m][n][h * 2], s.c[0][m][n][h * 2 + 1]);
    team_sync(l);
#if SPLIT > 1
    send_sums(l, rank, v);
#endif
}

#endif

// SLICES == 1: the accumulators of a job's row start from x.
DEVICE void start_from(Sums& s, int i, int row, const float (&x)[2]) {
    const int rows = i / NT * ROW_BLOCKS + row;
    if (SLICES == 1) s.c[0][rows >> 1][i % NT][(rows & 1) * 2] = x[0], s.c[0][rows >> 1][i % NT][(rows & 1) * 2 + 1] = x[1];
}

#if !STAGED
// `sum` += what the rows of job i came to; with SLICES == 1 they started from it.
template <int ROWS>
DEVICE void job_sums(const Lane& l, int v, int i, const Sums& s, float (&sum)[ROWS][2]) {
    if constexpr (SLICES == 1) {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int rows = i / NT * ROW_BLOCKS + r;
                sum[r][e] = s.c[0][rows >> 1][i % NT][(rows & 1) * 2 + e];
            }
        return;
    }
#if SPLIT > 1
#pragma unroll
    for (int member = 0; member < SPLIT; member++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float2 p = ((const float2*)(shared + received(l, v, member, l.warp * JOBS + i) + r * 256))[l.lane];
            sum[r][0] += p.x, sum[r][1] += p.y;
        }
#else
    add_partials(l, v, job_block(l, i), job_tile(l, i), sum);
#endif
}
#endif
