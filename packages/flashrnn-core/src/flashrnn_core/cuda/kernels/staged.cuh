// Where a cluster shares k (SPLIT) and rows are many (STAGED): a block has its slice of the vector copied to shared
// memory once, in bulk, and wgmma reads it from there, for all warps of a warpgroup together. R: KR k-steps in registers,
// the others in shared memory, none streamed. Each warp has 16 units of the cluster's, over all k of the block (KS == 1),
// so that sums go from accumulators straight to the members that own the units.
//
// Vector: [k-step][batch tile][half of the k-step][lane], each 32 words a core matrix of wgmma (8 columns of 16 bytes).
// R: [k-step][warpgroup][half][8 rows of blocks of 8 units][lane], likewise.
//
// Of the step, the chain that other blocks wait for is: slice copied, multiplied, sums sent, cell finished, published,
// counted. Beside it: `look_ahead` (all of the cell that needs no cotangent) while the next vector is on its way, fields
// of the next step on theirs meanwhile, where the vector was; the last warp has no jobs, but copies and counts.
//
// No word is ABSENT: blocks count themselves (`signal`) when they have published, and nobody takes a part of vector v
// before all C of the group have. So what belongs to vector v may be written over as soon as v + 1 is published by all:
//   a block's part of the vector: a block publishes v + 2 behind sums of v + 1 that members sent after all had published
//     v + 1, each of them behind sums of v from its whole cluster, whose slices of v had been copied by then;
//   sums received: they come for v + 1 from members that have seen this block published v + 1, behind reading those of v.
// What is published is written by the generic proxy and read by the async one, of other blocks: writer's fences
// (`release_fence`), barrier, count; seen by an acquire, then the bulk copy, by the same thread or behind a barrier.

#if STAGED
constexpr int THREADS = WARPS * 32, ROUNDS = KW / POLL, ROUND_BYTES = POLL * NT * 256;
static_assert((WARPS - 1) * JOBS >= UB * NT && KW % POLL == 0 && KW * SLICES == K_STEPS && KS == 1 && SUB == 2 && MT == 1 && WARPS % 4 == 0 && UB % 2 == 0 && TEAMS == 1, "");

constexpr int HELPER = WARPS - 1, JOB_WARPS = (UB * NT + JOBS - 1) / JOBS;  // a warp without jobs; those with

struct Kept { u32 r[KR > 0 ? KR : 1][4]; };

DEVICE void load_r(const Args& a, const Item& item, const Lane& l, int rank, Kept& kept) {
    const uint4* packed = (const uint4*)argument(a, A_PACKED) + (((i64)item.head * C + rank) * WARPS + l.warp) * KW * 32 + l.lane;
#pragma unroll
    for (int k = 0; k < KR; k++) {
        const uint4 w = packed[k * 32];
        kept.r[k][0] = w.x, kept.r[k][1] = w.y, kept.r[k][2] = w.z, kept.r[k][3] = w.w;
    }
    u32* rest = (u32*)(shared + SHARED_R) + l.warp / 4 * 512 + l.warp % 4 * 64 + l.lane;
    for (int k = KR; k < KW; k++) {
        const uint4 w = packed[k * 32];
        u32* to = rest + (k - KR) * WARPS * 128;
        to[0] = w.x, to[32] = w.y, to[256] = w.z, to[288] = w.w;
    }
    async_proxy_fence();
}

// Blocks of the group that have published, of all vectors together, from -1.
DEVICE u32* published(const Args& a, int group) {
    return (u32*)argument(a, A_VECTORS) + (size_t)(gridDim.x / C) * 4 * VECTOR + group * 32;
}
DEVICE u32 round_barrier(int r) { return shared_address(shared + SHARED_BARRIERS) + (2 + r) * 8; }

// This thread has published; once all with jobs have, one says so.
DEVICE void signal(const Args& a, const Lane& l, int group) {
    if (l.warp >= JOB_WARPS) return;
    release_fence();
    barrier_sync(1, JOB_WARPS * 32);
    if (threadIdx.x == 0) add_release(published(a, group), 1);
}
// All of vector v is there.
DEVICE void await_published(const Args& a, const Lane& l, int group, int v) {
    const int all = (v + 1) * C;
    if (threadIdx.x == HELPER * 32) {
        while ((int)(load_acquire(published(a, group)) + 1) - all < 0) {}
        global_proxy_fence();
    }
    __syncwarp();
}
// Its slice is on its way to shared memory, where nobody reads any more.
DEVICE void ask(const Args& a, const Lane& l, int group, int v) {
    if (threadIdx.x == HELPER * 32) {
        const u32* slice = global_vector(a, group, v) + l.ks * (ROUNDS * ROUND_BYTES / 4);
        for (int r = 0; r < ROUNDS; r++) {
            barrier_expect(round_barrier(r), ROUND_BYTES);
            copy_from_global(shared_address(shared + SHARED_VECTOR) + r * ROUND_BYTES, slice + r * (ROUND_BYTES / 4), ROUND_BYTES, round_barrier(r));
        }
    }
    __syncwarp();
}

// Adds this warp's units times the slice, which `ask` has asked for.
DEVICE void matmul(const Args& a, const Lane& l, int group, int v, Kept& kept, Sums& s) {
    const u64 vector = core_matrices(shared_address(shared + SHARED_VECTOR), 128, 256);
    const u64 rest = core_matrices(shared_address(shared + SHARED_R) + l.warp / 4 * 2048, 1024, 128);
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        barrier_wait(round_barrier(r), v & 1);
        __syncwarp();
        wgmma_begin();
#pragma unroll
        for (int k = r * POLL; k < (r + 1) * POLL; k++) {
            const u64 b = vector + k * (NT * 256 >> 4);
            if (k < KR) multiply_kept(s.c[0][0], kept.r[k < KR ? k : 0], b);
            else multiply_rest(s.c[0][0], rest + (k - KR) * (WARPS * 512 >> 4), b);
        }
        wgmma_commit();
    }
    wgmma_wait<0>();
}

// What a member receives: [member][pair of its unit blocks][batch tile][lane] of four values, as accumulators have them.
constexpr int MEMBER_SUMS = UB * NT * 256;  // bytes

DEVICE void share_partials(const Lane& l, int rank, int v, const Sums& s) {
    const u32 owner = l.warp / (UB / 2), barrier = peer_address(team_barrier(l, v), owner);
    const u32 to = peer_address(shared_address(shared + SHARED_RECEIVED) + rank % SPLIT * MEMBER_SUMS + l.warp % (UB / 2) * NT * 512, owner) + l.lane * 16;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const float (&c)[4] = s.c[0][0][n];
        store_to_peer(to + n * 512, make_uint4(__float_as_uint(c[0]), __float_as_uint(c[1]), __float_as_uint(c[2]), __float_as_uint(c[3])), barrier);
    }
    if (threadIdx.x == 0) barrier_expect(team_barrier(l, v), SPLIT * MEMBER_SUMS);
}
DEVICE void await_partials(const Lane& l, int v) { barrier_wait(team_barrier(l, v), v >> 1 & 1); }

template <int ROWS>
DEVICE void job_sums(const Lane& l, int v, int i, const Sums& s, float (&sum)[ROWS][2]) {
    const int block = job_block(l, i);
    const unsigned char* from = shared + SHARED_RECEIVED + (block / 2 * NT + job_tile(l, i)) * 512 + l.lane * 16 + block % 2 * 8;
#pragma unroll
    for (int member = 0; member < SPLIT; member++) {
        const float2 p = *(const float2*)(from + member * MEMBER_SUMS);
        sum[0][0] += p.x, sum[0][1] += p.y;
    }
}

// Job i's words of dpre: its part of vector v. A block of 8 units is all there or not (D % 8).
DEVICE void publish_words(const Args& a, const Lane& l, int rank, int group, int v, int i, const u32 (&words)[G]) {
    const int block = rank * UB + job_block(l, i);
    u32* to = global_vector(a, group, v) + (block / 2 * SENT * NT + job_tile(l, i)) * 64 + block % 2 * 32 + l.lane;
#pragma unroll
    for (int g = 0; g < G; g++)
        if (RECURRENT_MASK >> g & 1) to[part_of(RECURRENT_MASK, g) * NT * 64] = C * U == D || block * 8 < D ? words[g] : 0u;
}

// What stands in the vector's place while there is none: fields of the next step, as in the ring, and behind them dpre of
// this one, [job][gate][batch][unit].
constexpr int LEFT = SHARED_RING + UB * NT * TILE_BYTES, LEFT_BYTES = G * 128;
DEVICE void leave_words(const Lane& l, int i, const u32 (&words)[G]) {
    u32* to = (u32*)(shared + LEFT + (l.warp * JOBS + i) * LEFT_BYTES + job_block(l, i) * 32) + l.lane;
#pragma unroll
    for (int g = 0; g < G; g++) to[g * 32] = words[g];
}
// dpre of step s to memory, from where all warps with jobs left it, by these together.
DEVICE void store_left(const Args& a, const Item& item, const Lane& l, int rank, int s) {
    if (l.warp == HELPER) return;
    int thread = threadIdx.x, batch = item.batch, head = item.head;
    hide(thread), hide(batch), hide(head);  // addresses are made again: registers are dear
#pragma unroll 1
    for (int i = thread; i < ROWS * UB; i += HELPER * 32) {
        const int row = i / UB, block = i % UB, unit = rank * U + block * 8;
        if (unit >= D || batch + row >= (int)argument(a, A_B)) continue;
        const unsigned char* from = shared + LEFT + (block * NT + row / 8) * LEFT_BYTES + block * 32 + row % 8 * 16;
        char* to = (char*)argument(a, A_DPRE) + (time_of((int)argument(a, A_T), s) * argument(a, A_DPRE_T) + (batch + row) * argument(a, A_DPRE_B) + head * (i64)D + unit) * 2;
#pragma unroll
        for (int g = 0; g < G; g++) *(uint4*)(to + g * argument(a, A_DPRE_G) * 2) = *(const uint4*)(from + g * 128);
    }
}

// Where the rows of fields start for this block at a step, and behind them those of initial states, in two buffers: the
// helper finds them a step ahead. `pitch`: from row to row, in 16 bytes.
struct Place { const char* p; u32 pitch, valid; };
DEVICE constexpr int initial_place(int f) {
    int n = FIELDS;
    for (int i = 0; i < f; i++) n += is_old(i);
    return n;
}
constexpr int ALL_PLACES = initial_place(FIELDS);
DEVICE Place* places_of(int s) { return (Place*)(shared + SHARED_PLACES) + (s & 1) * ALL_PLACES; }
DEVICE void put_places(const Args& a, const Item& item, const Lane& l, int rank, int s) {
    if (!ALIGNED || l.warp != HELPER) return;
    const int t = time_of((int)argument(a, A_T), s);
    int batch = item.batch, head = item.head;
    hide(batch), hide(head);  // made again at every step: registers are dear
    auto put = [&](int to, const Field& from, int bytes, i64 time) {
        const char* p = from.p + (head * from.n + batch * from.b + time * from.t + rank * U) * bytes;
        if (l.lane == 0) places_of(s)[to] = {p, (u32)(from.b * bytes / 16), from.p != nullptr};
    };
#pragma unroll
    for (int f = 0; f < FIELDS; f++) {
        const int bytes = f < FIELDS16 ? 2 : 4;
        put(f, field(a, f), bytes, !is_old(f) ? t : REVERSE ? t + 1 : t - 1);
        if (is_old(f)) put(initial_place(f), initial_field(a, f), bytes, 0);
    }
}

// Fields of step s from FIRST on, of BYTES bytes, by some threads together.
template <int FIRST, int COUNT, int BYTES>
DEVICE void fetch_fields(const Args& a, const Item& item, int rank, int s, int thread, int threads) {
    constexpr int A_ROW = U * BYTES / 16;
    const int rows = (int)argument(a, A_B) - item.batch, units = C * U == D ? U : D - rank * U, t = time_of((int)argument(a, A_T), s);
    const Place* places = places_of(s);
    Place from[COUNT > 0 ? COUNT : 1];
#pragma unroll
    for (int f = 0; f < COUNT; f++) from[f] = places[FIRST + f];
#pragma unroll 1
    for (int i = thread; i < ROWS * A_ROW; i += threads) {
        const int row = i / A_ROW, piece = i % A_ROW, u = piece * 16 / BYTES;
        const u32 to = shared_address(shared) + field_at(FIRST) + piece_at<BYTES>(row, piece);
        const bool inside = row < rows && u < units, first = is_first(a, t, item.batch + row);
        const u32 real = inside ? row : 0;  // of which there is memory
#pragma unroll
        for (int f = 0; f < COUNT; f++) {
            const char* p = from[f].p + (u64)(real * from[f].pitch + piece) * 16;
            bool valid = inside;
            if (is_old(FIRST + f) && first) {
                const Place x = places[initial_place(FIRST + f)];
                valid = inside && x.valid;
                p = x.valid ? x.p + (u64)(real * x.pitch + piece) * 16 : (const char*)argument(a, A_WX);
            }
            copy16(to + f * ROWS * U * BYTES, p, valid);
        }
    }
}
// Where rows are not of whole 16 bytes, all warps take part, value by value.
DEVICE void fetch_values(const Args& a, const Item& item, int rank, int s) {
    for (int i = threadIdx.x; i < FIELDS * ROWS * U; i += THREADS) {
        const int f = i / (ROWS * U), row = i / U % ROWS, u = i % U, batch = item.batch + row;
        const float x = read_field(a, item, s, f, rank * U + u, batch);
        if (f < FIELDS16) *(unsigned short*)(shared + field_at(f) + piece_at<2>(row, u / 8) + u % 8 * 2) = (unsigned short)pack(x, 0.f, KIND16);
        else *(float*)(shared + field_at(f) + piece_at<4>(row, u / 4) + u % 4 * 4) = x;
    }
}
// Who asks for more than memory brings is held up: the helper asks for most, the others have their jobs to do.
DEVICE void fetch_all(const Args& a, const Item& item, const Lane& l, int rank, int s) {
    if (s < (int)argument(a, A_T)) {
        if (!ALIGNED) fetch_values(a, item, rank, s);
        else if (l.warp == HELPER) fetch_fields<FIELDS16, FIELDS32, 4>(a, item, rank, s, l.lane, 32);
        else fetch_fields<0, FIELDS16, 2>(a, item, rank, s, threadIdx.x, HELPER * 32);
    }
    copy_commit();
}

// What `look_ahead` finds waits in shared memory: [job][value][lane] of two, then the cotangents given, as wide as states.
constexpr int DOUT_BYTES = STATE == F32 ? 256 : 128, AHEAD_BYTES = PREPARED * 256 + S * DOUT_BYTES;
DEVICE void put_ahead(const Lane& l, int i, const Ahead& ahead) {
    unsigned char* to = shared + SHARED_AHEAD + (l.warp * JOBS + i) * AHEAD_BYTES;
    put_prepared((float2*)to + l.lane, ahead.prepared);
#pragma unroll
    for (int k = 0; k < S; k++) {
        unsigned char* dout = to + PREPARED * 256 + k * DOUT_BYTES;
        if (STATE == F32) ((float2*)dout)[l.lane] = make_float2(ahead.dout[k][0], ahead.dout[k][1]);
        else ((u32*)dout)[l.lane] = pack(ahead.dout[k][0], ahead.dout[k][1], STATE);
    }
}
DEVICE void get_ahead(const Lane& l, int i, Ahead& ahead) {
    const unsigned char* from = shared + SHARED_AHEAD + (l.warp * JOBS + i) * AHEAD_BYTES;
    get_prepared((const float2*)from + l.lane, ahead.prepared);
#pragma unroll
    for (int k = 0; k < S; k++) {
        const unsigned char* dout = from + PREPARED * 256 + k * DOUT_BYTES;
        if (STATE == F32) {
            ahead.dout[k][0] = ((const float2*)dout)[l.lane].x, ahead.dout[k][1] = ((const float2*)dout)[l.lane].y;
        } else {
            const u32 w = ((const u32*)dout)[l.lane];
            ahead.dout[k][0] = low_half(w, STATE), ahead.dout[k][1] = high_half(w, STATE);
        }
    }
}

// As in backward.cuh, in the order above.
DEVICE void scan_item(const Args& a, const Item& item, Lane l, int rank, int group, int& v,
                      Kept& kept, const Chunk (&chunks)[JOBS][CHUNKS_A_LANE]) {
    const int T = (int)argument(a, A_T);
    const float bound = __int_as_float((int)argument(a, A_CLIP));
    float carry[JOBS][S][2];  // cotangents of the states, h without its part through R
    int length[JOBS][2];
    bool fresh[JOBS][2], was_fresh[JOBS][2], was_active[JOBS][2];
#pragma unroll
    for (int i = 0; i < JOBS; i++) {
#pragma unroll
        for (int k = 0; k < S; k++)
            if (job_exists(l, i)) load_state(a, item, l, A_DLAST, A_DLAST_S, k, rank * U + job_block(l, i) * 8, job_tile(l, i), carry[i][k], F32);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            length[i][e] = length_of(a, item.batch + job_tile(l, i) * 8 + 2 * l.q + e);
            was_fresh[i][e] = was_active[i][e] = false;
        }
    }
    auto look = [&](int s) {
#pragma unroll (RESETS || LENGTHS || S > 2 ? JOBS : 1)
        for (int i = 0; i < JOBS; i++) {
            if (!job_exists(l, i)) break;
#pragma unroll
            for (int e = 0; e < 2; e++) fresh[i][e] = reset_at(a, s, item.batch + job_tile(l, i) * 8 + 2 * l.q + e, length[i][e]);
            Ahead ahead;
            look_ahead(a, item, l, rank, s, i, fresh[i], ahead);
            put_ahead(l, i, ahead);
        }
    };
    put_places(a, item, l, rank, 0);
    for (int s = -1; s <= T; s++) {  // at -1: what a step fetches and finds for the next
        hide(l.warp), hide(l.lane), l.g = l.lane / 4, l.q = l.lane % 4;  // registers are dear
        const int t = time_of(T, s);
        Sums sums;
        if (s > 0) {
            ask(a, l, group, v - 1);
            clear(sums);
            matmul(a, l, group, v - 1, kept, sums);
            share_partials(l, rank, v - 1, sums);
        }
        team_sync(l);  // the vector's place is free
        fetch_all(a, item, l, rank, s + 1);
        put_places(a, item, l, rank, s + 2);
        if (s > 0 && l.warp != HELPER) await_partials(l, v - 1);
#pragma unroll
        for (int i = 0; i < JOBS; i++) {
            if (s < 0 || !job_exists(l, i)) break;
            float dh[1][2] = {{0.f, 0.f}}, dpre[G][2];
            u32 words[G];  // dpre, as memory has it
            if (s > 0) job_sums(l, v - 1, i, sums, dh);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if (LENGTHS ? !was_active[i][e] : s == 0) continue;
                add_through_r(carry[i], e, dh[0][e], bound, was_fresh[i][e]);
            }
            if (s == T) continue;
            Ahead ahead;
            get_ahead(l, i, ahead);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float dnew[S], dgate[G], dold[S];
#pragma unroll
                for (int k = 0; k < S; k++) dnew[k] = carry[i][k][e] + ahead.dout[k][e];
                cell_finish(ahead.prepared[e], dnew, dgate, dold);
                const bool active = !LENGTHS || t < length[i][e];
                pass_on(active, e, dgate, dold, dpre, carry[i]);
                was_active[i][e] = active;
                was_fresh[i][e] = fresh[i][e];
            }
#pragma unroll
            for (int g = 0; g < G; g++) words[g] = transpose8x8(pack(dpre[g][0], dpre[g][1], ELEMENT));
            publish_words(a, l, rank, group, v, i, words);
            leave_words(l, i, words);
        }
        if (s == T) break;
        if (s >= 0) {
            signal(a, l, group);
            v++;
        }
        copy_wait<0>();
        team_sync(l);  // all fields are there
        if (s + 1 < T) look(s + 1);
        if (s >= 0) {
            store_left(a, item, l, rank, s);
            await_published(a, l, group, v - 1);
            async_proxy_fence();
        }
        team_sync(l);  // the next vector may come
        team_sync(l);  // and behind a second barrier compute-sanitizer's racecheck sees that it may
    }
    store_carry(a, item, l, rank, carry);
}
#endif
