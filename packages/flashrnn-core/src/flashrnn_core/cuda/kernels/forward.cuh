// The forward of an item, all its steps: the loop of scan.cuh with the states of a thread's jobs in its registers. Of a
// step, what needs no h(t-1) stands before the wait for it (but for LATE), and stores behind the publishing of h(t).

// SERVED: what step s has left in shared memory.
DEVICE void store_outputs(const Args& a, const Item& item, const Lane& l, int rank, int s) {
    const int t = time_of((int)argument(a, A_T), s);
#pragma unroll
    for (int i = 0; i < JOBS; i++) {
        if (!job_exists(l, i)) break;
        const int unit = rank * U + job_block(l, i) * 8, tile = job_tile(l, i);
        const i64 at = t * argument(a, A_OUT_T) + item.head * (i64)D;
        char* to = (char*)argument(a, A_OUT) + at * kind_bytes(STATE);
        store_rows<SHOWN>(a, item, l, behind_of(l, s, i), to, argument(a, A_OUT_S), argument(a, A_OUT_B), unit, tile, STATE);
        to = (char*)argument(a, A_SAVED) + at * kind_bytes(STATE);
        store_rows<SAVED>(a, item, l, behind_of(l, s, i) + SHOWN * 64 * kind_bytes(STATE), to, argument(a, A_OUT_S), argument(a, A_OUT_B), unit, tile, STATE);
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
        if (!ONE_STAGE) wait_for_fields(s);
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
        if (!ONE_STAGE) fetch<false>(a, item, mine, rank, s + STAGES - 1, chunks);
        if (SERVED && s > 1) store_outputs(a, item, mine, rank, s - 2);

        Sums sums;
        clear(sums);
#pragma unroll
        for (int i = 0; i < JOBS && !LATE; i++)
#pragma unroll
            for (int g = 0; g < G; g++)
                if (RECURRENT_MASK >> g & 1) start_from(sums, i, part_of(RECURRENT_MASK, g), ahead[i].x[g]);
        matmul(a, l, group, v, kept, sums);
        if (SLICES > 1) share_partials(l, rank, v, sums);
        else if (EXCHANGE == EXCHANGE_GLOBAL) team_sync(l);
        retire(a, l, rank, group, v - 1);
        if (ONE_STAGE) wait_for_fields(s);
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
                    const float rest[2] = {rest_of(out[i][k][0], STATE), rest_of(out[i][k][1], STATE)};
                    if (SERVED) {
                        put_rows(stage + (SHOWN + part_of(SAVED_MASK, k)) * 64 * kind_bytes(STATE), l, rest[0], rest[1], STATE);
                        continue;
                    }
                    char* to = (char*)argument(a, A_SAVED) + (part_of(SAVED_MASK, k) * argument(a, A_OUT_S) + t * argument(a, A_OUT_T) + item.head * (i64)D) * kind_bytes(STATE);
                    store_pair(a, item, l, to, argument(a, A_OUT_B), unit, tile, rest[0], rest[1], STATE);
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
            for (int g = 0; SLICES == 1 && LATE && g < G; g++)
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
        if (ONE_STAGE) fetch_again(a, item, l, rank, s + 1, chunks);
        v++;
        if (EXCHANGE == EXCHANGE_BLOCK || (SLICES > 1 && PARTS == 1)) team_sync(l);
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
