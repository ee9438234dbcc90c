// The backward of an item, from its last step to its first: the loop of scan.cuh with the cotangents of the states of a
// thread's jobs in its registers. A step adds to that of h what dpre(t+1) sends back through R, and publishes dpre(t);
// one step more than T adds what goes to the initial states.

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

// SERVED: what step s has left in shared memory.
DEVICE void store_outputs(const Args& a, const Item& item, const Lane& l, int rank, int s) {
    const int t = time_of((int)argument(a, A_T), s);
#pragma unroll
    for (int i = 0; i < JOBS; i++) {
        if (!job_exists(l, i)) break;
        char* to = (char*)argument(a, A_DPRE) + (t * argument(a, A_DPRE_T) + item.head * (i64)D) * ELEMENT_BYTES;
        store_rows<G>(a, item, l, behind_of(l, s, i), to, argument(a, A_DPRE_G), argument(a, A_DPRE_B), rank * U + job_block(l, i) * 8, job_tile(l, i), ELEMENT);
    }
}

// `carry`: cotangents of the states of a thread's jobs, or of one; that of h without its part through R.
// The step behind it sends dh through R; the bound is on the whole, and nothing passes a reset.
DEVICE void add_through_r(float (&carry)[S][2], int e, float dh, float bound, bool was_fresh) {
    float h = carry[0][e] + dh;
    if (CLIP) h = h > bound ? bound : h < -bound ? -bound : h;
    carry[0][e] = h;
    if (RESETS && was_fresh)
#pragma unroll
        for (int k = 0; k < S; k++) carry[k][e] = 0.f;
}
// What a step gives back; one in the padding gives nothing, and leaves the carry.
DEVICE void pass_on(bool active, int e, const float (&dgate)[G], const float (&dold)[S], float (&dpre)[G][2], float (&carry)[S][2]) {
#pragma unroll
    for (int g = 0; g < G; g++) dpre[g][e] = active ? dgate[g] : 0.f;
#pragma unroll
    for (int k = 0; k < S; k++) carry[k][e] = active ? dold[k] : carry[k][e];
}
DEVICE void store_carry(const Args& a, const Item& item, const Lane& l, int rank, const float (&carry)[JOBS][S][2]) {
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

#if !STAGED
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
            if (!ONE_STAGE) wait_for_fields(s);
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
            if (!ONE_STAGE) fetch<false>(a, item, mine, rank, s + STAGES - 1, chunks);
        }
        if (SERVED && s > 1) store_outputs(a, item, mine, rank, s - 2);
        Sums sums;
        const bool through_r = !CUT && s > 0;
        if (through_r) {
            clear(sums);
            matmul(a, l, group, v - 1, kept, sums);
            if (SLICES > 1) share_partials(l, rank, v - 1, sums);
            else if (EXCHANGE == EXCHANGE_GLOBAL) team_sync(l);
            retire(a, l, rank, group, v - 2);
        }
        if (SERVED && !through_r) team_sync(l);
        if (ONE_STAGE && s < T) wait_for_fields(s);
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
            if (through_r) job_sums(l, v - 1, i, sums, dh);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if (!was_active[i][e]) continue;
                add_through_r(carry[i], e, dh[0][e], bound, was_fresh[i][e]);
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
                pass_on(active, e, dgate, dold, dpre[i], carry[i]);
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
        if (ONE_STAGE && s < T) fetch_again(a, item, l, rank, s + 1, chunks);
        if (s < T) v++;
        if (EXCHANGE == EXCHANGE_BLOCK || (SLICES > 1 && PARTS == 1)) team_sync(l);
    }
    if (SERVED) {
        team_sync(l);
        store_outputs(a, item, served_by(l), rank, T - 1);
    }
    store_carry(a, item, l, rank, carry);
}
#endif
