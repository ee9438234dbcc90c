// The persistent scan, forward and backward. One launch; R stays in registers and shared memory. The rooms before it:
// ptx, element, frame, matmul, exchange, ring, serve.
//
// Both directions are one loop:  gather a vector -> multiply by the R of this block -> cell -> publish a new vector.
//   forward:  vector h(t-1), rows Gr gates of a unit, publishes h(t)
//   backward: vector dpre(t+1) of the recurrent gates, rows units of the previous h, publishes dpre(t)
// Owners. Item: a head and a batch tile of NT * 8. Group: C blocks (a cluster, or blocks that meet in L2) work on an
//   item; a block owns U units. Warp (tile, ks): SUB * 8 units, the ks-th slice of k. Lane = 4 g + q: unit g of a
//   block of 8, batch columns 2q and 2q + 1 of a tile of 8. Rows are ordered so that a thread holds all gates of its
//   unit: the cell runs on accumulators in place (KS == 1) or on sums over the KS partials in shared memory.
// Teams (GLOBAL): TEAMS * WARPS warps of a block share its R, each team on an item of its own, with its own vectors,
//   rings and barrier, so that one multiplies while another waits. All are of one head, and change items together.
// A job is a block of 8 units and a batch tile of 8: one warp does its cell, and loads and stores its tensors.
// Vector in fragment order: [unit block][batch tile][gate sent][word][lane], so that what a job publishes is contiguous;
//   GLOBAL, where words go one by one: [k-step][batch tile][lane][word], so that what a lane polls is.
// Exchange. BLOCK: shared memory and __syncthreads. CLUSTER: a warp stages its words and sends them to each member, in
//   one bulk copy or 16 bytes a message, completing on that member's mbarrier; two buffers are enough: a vector v + 1
//   comes only from blocks that have read all of v. GLOBAL: words travel through L2 with no flag; readers poll the data
//   itself until it is there, that is, no longer ABSENT. Four buffers, see `retire`.
// Ring: the tensors of the next STAGES - 1 steps are on their way into shared memory (cp.async), by the warp that reads
//   them. No aliasing among arguments; outputs are written once and never read.

#if !STREAM
typedef u32 Kept[KR > 0 ? KR : 1][MT][4];
#endif

#if !BACKWARD
DEVICE void store_outputs(const Args& a, const Item& item, const Lane& l, int rank, int s) {
    const int t = time_of((int)argument(a, A_T), s);
#pragma unroll
    for (int i = 0; i < JOBS; i++) {
        if (!job_exists(l, i)) break;
        const int unit = rank * U + job_block(l, i) * 8, tile = job_tile(l, i);
        const i64 at = t * argument(a, A_OUT_T) + item.head * (i64)D;
        char* to = (char*)argument(a, A_OUT) + at * kind_bytes(STATE);
        store_rows<SHOWN>(a, item, l, behind_of(l, s, i), to, argument(a, A_OUT_S), argument(a, A_OUT_B), unit, tile, STATE);
        to = (char*)argument(a, A_SAVED) + at * 4;
        store_rows<SAVED>(a, item, l, behind_of(l, s, i) + SHOWN * 64 * kind_bytes(STATE), to, argument(a, A_OUT_S), argument(a, A_OUT_B), unit, tile, F32);
    }
}

DEVICE void scan_item(const Args& a, const Item& item, Lane l, int rank, int group, int& v,
                      Kept& kept, const Chunk (&chunks)[JOBS][CHUNKS_A_LANE]) {
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
            load_state(a, item, l, A_STATES, A_STATES_S, s, unit, tile, state[i][s], STATE);
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (reset_at(a, 0, batch + e, length[i][e])) state[i][s][e] = 0.f;
        }
#pragma unroll
        for (int e = 0; e < 2; e++) fresh[i][e] = reset_at(a, 1, batch + e, length[i][e]);
        publish(a, l, rank, group, v, i, {{state[i][0][0], state[i][0][1]}});
    }
    send(l, rank, v);
    if (EXCHANGE == EXCHANGE_BLOCK) team_sync(l);

    for (int s = 0; s < T; s++) {
        if (RECOMPUTE) hide(l.warp), hide(l.tile);
        const int t = time_of(T, s);
        wait_for_fields(s);
        const Lane mine = served_by(l);
        Ahead ahead[JOBS];
        bool fresh_next[JOBS][2];
#pragma unroll
        for (int i = 0; i < JOBS; i++)
            if (job_exists(mine, i)) {
                if (!LATE) look_ahead(a, item, mine, rank, s, i, ahead[i]);
                if (SERVED) put_ahead(mine, s, i, ahead[i]);
            }
#pragma unroll
        for (int i = 0; i < JOBS; i++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                fresh_next[i][e] = job_exists(l, i) && reset_at(a, s + 2, item.batch + job_tile(l, i) * 8 + 2 * l.q + e, length[i][e]);
        __syncwarp();
        fetch(a, item, mine, rank, s + STAGES - 1, chunks);
        if (SERVED && s > 1) store_outputs(a, item, mine, rank, s - 2);

        Sums sums;
        clear(sums);
#pragma unroll
        for (int i = 0; i < JOBS && !LATE; i++)
#pragma unroll
            for (int g = 0; g < G; g++)
                if (RECURRENT_MASK >> g & 1) start_from(sums, i, part_of(RECURRENT_MASK, g), ahead[i].x[g]);
        matmul(a, l, group, v, kept, sums);
        if (KS > 1) share_partials(l, v, sums);
        else if (EXCHANGE == EXCHANGE_GLOBAL) team_sync(l);
        retire(a, l, rank, group, v - 1);
        float out[JOBS][S][2];
        auto store = [&](int i) {
            const int unit = rank * U + job_block(l, i) * 8, tile = job_tile(l, i);
            unsigned char* stage = behind_of(l, s, i);
#pragma unroll
            for (int k = 0; k < SHOWN; k++) {
                if (SERVED) {
                    put_rows(stage + k * 64 * kind_bytes(STATE), l, out[i][k][0], out[i][k][1], STATE);
                    continue;
                }
                char* to = (char*)argument(a, A_OUT) + (k * argument(a, A_OUT_S) + t * argument(a, A_OUT_T) + item.head * (i64)D) * kind_bytes(STATE);
                store_pair(a, item, l, to, argument(a, A_OUT_B), unit, tile, out[i][k][0], out[i][k][1], STATE);
            }
#pragma unroll
            for (int k = 0; k < S; k++)
                if (SAVED_MASK >> k & 1) {
                    if (SERVED) {
                        put_rows(stage + SHOWN * 64 * kind_bytes(STATE) + part_of(SAVED_MASK, k) * 256, l, out[i][k][0], out[i][k][1], F32);
                        continue;
                    }
                    char* to = (char*)argument(a, A_SAVED) + (part_of(SAVED_MASK, k) * argument(a, A_OUT_S) + t * argument(a, A_OUT_T) + item.head * (i64)D) * 4;
                    store_pair(a, item, l, to, argument(a, A_OUT_B), unit, tile, out[i][k][0], out[i][k][1], F32);
                }
        };
#pragma unroll
        for (int i = 0; i < JOBS; i++) {
            if (!job_exists(l, i)) break;
            if (SERVED) get_ahead(l, s, i, ahead[i]);
            if (LATE) look_ahead(a, item, l, rank, s, i, ahead[i]);
            const float (&x)[G][2] = ahead[i].x;
            float rec[GR][2];
#pragma unroll
            for (int g = 0; g < G; g++)
                if (RECURRENT_MASK >> g & 1) rec[part_of(RECURRENT_MASK, g)][0] = x[g][0], rec[part_of(RECURRENT_MASK, g)][1] = x[g][1];
            job_sums(l, v, i, sums, rec);
#pragma unroll
            for (int g = 0; KS == 1 && LATE && g < G; g++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (RECURRENT_MASK >> g & 1) rec[part_of(RECURRENT_MASK, g)][e] += x[g][e];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float pre[G], old[S], result[S];
#pragma unroll
                for (int g = 0; g < G; g++)
                    pre[g] = RECURRENT_MASK >> g & 1 ? rec[part_of(RECURRENT_MASK, g)][e] : x[g][e];
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
            if (LATE) store(i);
        }
        if (s + 1 < T) send(l, rank, v + 1);
#pragma unroll
        for (int i = 0; i < JOBS && !LATE; i++)
            if (job_exists(l, i)) store(i);
        v++;
        if (EXCHANGE == EXCHANGE_BLOCK || (KS > 1 && PARTS == 1)) team_sync(l);
    }
    if (SERVED) {
        team_sync(l);
        for (int s = T > 1 ? T - 2 : 0; s < T; s++) store_outputs(a, item, served_by(l), rank, s);
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
// The cotangents that a cell gives back are linear in those it is given, of which the exchange is waited for by dh
// alone: what they are without it, and for each dh, is found before (where a warp looks ahead for itself).
constexpr bool LINEAR = !SERVED && !LATE;

struct Linear { float gate[2][G], old[2][S]; };

DEVICE Linear linear_in_h(const Prepared& prepared, float (&dnew)[S]) {
    Linear x;
    dnew[0] = 0.f;
    cell_finish(prepared, dnew, x.gate[0], x.old[0]);
#pragma unroll
    for (int k = 0; k < S; k++) dnew[k] = k == 0 ? 1.f : 0.f;
    cell_finish(prepared, dnew, x.gate[1], x.old[1]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int g = 0; g < G; g++) pin(x.gate[i][g]);
#pragma unroll
        for (int k = 0; k < S; k++) pin(x.old[i][k]);
    }
    return x;
}
DEVICE void at_h(const Linear& x, float dh, float (&dgate)[G], float (&dold)[S]) {
#pragma unroll
    for (int g = 0; g < G; g++) dgate[g] = fmaf(x.gate[1][g], dh, x.gate[0][g]);
#pragma unroll
    for (int k = 0; k < S; k++) dold[k] = fmaf(x.old[1][k], dh, x.old[0][k]);
}

DEVICE void store_outputs(const Args& a, const Item& item, const Lane& l, int rank, int s) {
    const int t = time_of((int)argument(a, A_T), s);
#pragma unroll
    for (int i = 0; i < JOBS; i++) {
        if (!job_exists(l, i)) break;
        char* to = (char*)argument(a, A_DPRE) + (t * argument(a, A_DPRE_T) + item.head * (i64)D) * ELEMENT_BYTES;
        store_rows<G>(a, item, l, behind_of(l, s, i), to, argument(a, A_DPRE_G), argument(a, A_DPRE_B), rank * U + job_block(l, i) * 8, job_tile(l, i), ELEMENT);
    }
}

DEVICE void scan_item(const Args& a, const Item& item, Lane l, int rank, int group, int& v,
                      Kept& kept, const Chunk (&chunks)[JOBS][CHUNKS_A_LANE]) {
    const int T = (int)argument(a, A_T);
    const float bound = __int_as_float((int)argument(a, A_CLIP));
    float carry[JOBS][S][2];  // cotangents of the states, h without its part through R
    const Lane mine = served_by(l);
    int length[JOBS][2], length_ahead[JOBS][2];
    bool fresh[JOBS][2], was_fresh[JOBS][2], was_active[JOBS][2];  // fresh: of the jobs looked after
#pragma unroll
    for (int i = 0; i < JOBS; i++) {
#pragma unroll
        for (int k = 0; k < S; k++)
            if (job_exists(l, i)) load_state(a, item, l, A_DLAST, A_DLAST_S, k, rank * U + job_block(l, i) * 8, job_tile(l, i), carry[i][k], F32);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            length[i][e] = length_of(a, item.batch + job_tile(l, i) * 8 + 2 * l.q + e);
            const int batch = item.batch + job_tile(mine, i) * 8 + 2 * l.q + e;
            length_ahead[i][e] = length_of(a, batch);
            fresh[i][e] = job_exists(mine, i) && reset_at(a, 0, batch, length_ahead[i][e]);
            was_fresh[i][e] = was_active[i][e] = false;
        }
    }
    for (int s = 0; s <= T; s++) {
        if (RECOMPUTE) hide(l.warp), hide(l.tile);
        const Lane mine = served_by(l);
        const int t = time_of(T, s);
        Ahead ahead[JOBS];
        Linear linear[JOBS][2];
        if (s < T) {
            wait_for_fields(s);
#pragma unroll
            for (int i = 0; i < JOBS; i++) {
                if (!job_exists(mine, i)) break;
                if (!LATE) look_ahead(a, item, mine, rank, s, i, fresh[i], ahead[i]);
                if (SERVED) put_ahead(mine, s, i, ahead[i]);
                if (LINEAR)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float dnew[S];
#pragma unroll
                        for (int k = 1; k < S; k++)
                            dnew[k] = (RESETS && was_active[i][e] && was_fresh[i][e] ? 0.f : carry[i][k][e]) + ahead[i].dout[k][e];
                        linear[i][e] = linear_in_h(ahead[i].prepared[e], dnew);
                    }
#pragma unroll
                for (int e = 0; e < 2 && !LATE; e++)
                    fresh[i][e] = reset_at(a, s + 1, item.batch + job_tile(mine, i) * 8 + 2 * l.q + e, length_ahead[i][e]);
            }
            __syncwarp();
            fetch(a, item, mine, rank, s + STAGES - 1, chunks);
        }
        if (SERVED && s > 1) store_outputs(a, item, mine, rank, s - 2);
        Sums sums;
        const bool through_r = !CUT && s > 0;
        if (through_r) {
            clear(sums);
            matmul(a, l, group, v - 1, kept, sums);
            if (KS > 1) share_partials(l, v, sums);
            else if (EXCHANGE == EXCHANGE_GLOBAL) team_sync(l);
            retire(a, l, rank, group, v - 2);
        }
        if (SERVED && !through_r) team_sync(l);
        float dpre[JOBS][G][2];
        auto store = [&](int i) {
            const int unit = rank * U + job_block(l, i) * 8, tile = job_tile(l, i);
#pragma unroll
            for (int g = 0; g < G; g++) {
                if (SERVED) {
                    put_rows(behind_of(l, s, i) + g * 64 * ELEMENT_BYTES, l, dpre[i][g][0], dpre[i][g][1], ELEMENT);
                    continue;
                }
                char* to = (char*)argument(a, A_DPRE) + (g * argument(a, A_DPRE_G) + t * argument(a, A_DPRE_T) + item.head * (i64)D) * ELEMENT_BYTES;
                store_pair(a, item, l, to, argument(a, A_DPRE_B), unit, tile, dpre[i][g][0], dpre[i][g][1], ELEMENT);
            }
        };
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
            if (SERVED) get_ahead(l, s, i, ahead[i]);
            if (LATE) {
                look_ahead(a, item, l, rank, s, i, fresh[i], ahead[i]);
#pragma unroll
                for (int e = 0; e < 2; e++)
                    fresh[i][e] = reset_at(a, s + 1, item.batch + job_tile(l, i) * 8 + 2 * l.q + e, length[i][e]);
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float dnew[S], dgate[G], dold[S];
#pragma unroll
                for (int k = 0; k < (LINEAR ? 1 : S); k++) dnew[k] = carry[i][k][e] + ahead[i].dout[k][e];
                if (LINEAR) at_h(linear[i][e], dnew[0], dgate, dold);
                else cell_finish(ahead[i].prepared[e], dnew, dgate, dold);
                const bool active = !LENGTHS || t < length[i][e];
#pragma unroll
                for (int g = 0; g < G; g++) dpre[i][g][e] = active ? dgate[g] : 0.f;
#pragma unroll
                for (int k = 0; k < S; k++) carry[i][k][e] = active ? dold[k] : carry[i][k][e];
                was_active[i][e] = active;
                was_fresh[i][e] = ahead[i].fresh[e];
            }
            if (!CUT) {
                float sent[SENT][2];
#pragma unroll
                for (int g = 0; g < G; g++)
                    if (RECURRENT_MASK >> g & 1) sent[part_of(RECURRENT_MASK, g)][0] = dpre[i][g][0], sent[part_of(RECURRENT_MASK, g)][1] = dpre[i][g][1];
                publish(a, l, rank, group, v, i, sent);
            }
            if (LATE) store(i);
        }
        if (s < T && !CUT) send(l, rank, v);
#pragma unroll
        for (int i = 0; i < JOBS && !LATE; i++)
            if (s < T && job_exists(l, i)) store(i);
        if (s < T) v++;
        if (EXCHANGE == EXCHANGE_BLOCK || (KS > 1 && PARTS == 1)) team_sync(l);
    }
    if (SERVED) {
        team_sync(l);
        store_outputs(a, item, served_by(l), rank, T - 1);
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

extern "C" __global__ void __launch_bounds__(TEAMS * WARPS * 32, 1) scan(const __grid_constant__ Args a) {
    Lane l;
    l.team = TEAMS == 1 ? 0 : threadIdx.x / (WARPS * 32);
    l.warp = threadIdx.x / 32 - l.team * WARPS, l.lane = threadIdx.x % 32, l.g = l.lane / 4, l.q = l.lane % 4;
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
    const Lane mine = served_by(l);
    const int group = blockIdx.x / C, groups = gridDim.x / C, team = group * TEAMS + l.team;
    const int heads = (int)argument(a, A_N), items = heads * (int)argument(a, A_TILES);
    int v = 0;  // number of the next vector
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
        for (int s = 0; s < STAGES - 1; s++) fetch(a, item, mine, rank, s, chunks);
        __syncthreads();
        if (TEAMS == 1 || item.batch < (int)argument(a, A_B)) scan_item(a, item, l, rank, team, v, kept, chunks);
    }
    if (NX > 0) copy_wait<0>();
#if EXCHANGE == EXCHANGE_CLUSTER
    cluster_sync();
#endif
}
