// R as a warp keeps it, and its product with a gathered vector: words of R in registers and shared memory, the layout of
// the vector, polling, mma.

// k-step k of slice ks takes the units from step `first_step + step_of` on, and in the backward of gate `sent_of`.
constexpr bool WHOLE = KW % SENT == 0;  // a slice starts with the first gate of a step
DEVICE int first_step(int ks) { return WHOLE ? ks * (KW / SENT) : 0; }
DEVICE int step_of(int ks, int k) { return WHOLE ? k / SENT : (ks * KW + k) / SENT; }
DEVICE int sent_of(int ks, int k) { return WHOLE ? k % SENT : (ks * KW + k) % SENT; }
constexpr int STEP_UNITS = WIDE ? 8 : 16;

// This lane's row of row block `rows` (8 rows: unit g of a block of 8, of gate `rows % ROW_BLOCKS`) in the argument R,
// [Gr N row k], k contiguous: as it is given, forward; with D and P exchanged, backward. `left`: columns from p to D.
struct Row { const char* p; int left; };
DEVICE Row r_row(const Args& a, const Item& item, const Lane& l, int rank, int rows) {
    const int own = rank * U + (l.tile * SUB + rows / ROW_BLOCKS) * 8 + l.g;
    const int k = first_step(l.ks) * STEP_UNITS + (WIDE ? l.q : 2 * l.q);
    const i64 gate = BACKWARD ? 0 : rows % ROW_BLOCKS * argument(a, A_R_G);
    const char* p = (const char*)argument(a, A_R) +
                    (item.head * argument(a, A_R_N) + gate + own * argument(a, A_R_D) + k) * ELEMENT_BYTES;
    asm volatile("" : "+l"(p));  // one pointer a row, not one a word: those of a row differ by a constant
    return {p, own < D ? D - k : 0};
}
DEVICE u32 r_word(const Args& a, const Lane& l, const Row& row, int k, int half) {
    const int column = step_of(l.ks, k) * STEP_UNITS + half * STEP_UNITS / 2;
    if ((C * U != D || K_STEPS % SLICES) && column >= row.left) return 0u;
    const char* p = row.p + ((BACKWARD ? sent_of(l.ks, k) * argument(a, A_R_G) : 0) + column) * ELEMENT_BYTES;
    if (WIDE) return wide_word(*(const float*)p);
    if (D % 2 == 0) return *(const u32*)p;
    return ((const unsigned short*)p)[0] | (column + 1 < row.left ? (u32)((const unsigned short*)p)[1] << 16 : 0u);
}

DEVICE void load_r(const Args& a, const Item& item, const Lane& l, int rank, u32 (&kept)[KR > 0 ? KR : 1][MT][4]) {
    Row row[MT * 2];
    for (int rows = 0; rows < MT * 2; rows++) row[rows] = r_row(a, item, l, rank, rows);
#pragma unroll
    for (int k = 0; k < KR; k++)
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) kept[k][m][i] = r_word(a, l, row[m * 2 + (i & 1)], k, i >> 1);
    uint4* rest = (uint4*)(shared + SHARED_R) + (size_t)l.warp * (KW - KR) * MT * 32 + l.lane;
#pragma unroll 4
    for (int k = KR; k < KW; k++)
        for (int m = 0; m < MT; m++) {
            u32 w[4];
            for (int i = 0; i < 4; i++) w[i] = r_word(a, l, row[m * 2 + (i & 1)], k, i >> 1);
            rest[((k - KR) * MT + m) * 32] = make_uint4(w[0], w[1], w[2], w[3]);
        }
}

// BLOCK, CLUSTER: word offset of k-step k of slice ks, batch tile nt; the second word of the step is SECOND further.
constexpr int SECOND = WIDE ? 32 : NT * SENT * 32;
DEVICE int vector_offset(int ks, int k, int nt) {
    const int step = first_step(ks) + step_of(ks, k), sent = sent_of(ks, k);
    return (((WIDE ? step : 2 * step) * NT + nt) * SENT + sent) * WORDS * 32;
}

// GLOBAL: [k-step][batch tile][lane][word], k-steps of the slices one after another.
#if EXCHANGE == EXCHANGE_GLOBAL
constexpr u32 ABSENT = 0xffffffffu;  // two NaN that no rounding makes: rounding makes 0x7fff, arithmetic 0x7fffffff
DEVICE u32* global_vector(const Args& a, int group, int v) {
    return (u32*)argument(a, A_VECTORS) + ((size_t)group * 4 + (v & 3)) * VECTOR;
}
#endif

constexpr int CHAINS = MT * NT >= 4 ? 1 : MT * NT == 1 && KW >= 8 ? 4 : 2;  // independent accumulators, so that mma does not wait for mma
struct Sums { float c[CHAINS][MT][NT][4]; };
DEVICE void add_chains(Sums& s) {
#pragma unroll
    for (int j = 1; j < CHAINS; j++)
#pragma unroll
        for (int i = 0; i < MT * NT * 4; i++) (&s.c[0][0][0][0])[i] += (&s.c[j][0][0][0])[i];
}

DEVICE void multiply_step(Sums& s, int chain, const u32 (&r)[MT][4], const u32 (&b)[NT][2]) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++) multiply(s.c[chain][m][n], r[m], b[n][0], b[n][1]);
}
// The same with R from shared memory.
DEVICE void multiply_step(Sums& s, int chain, const uint4* r, const u32 (&b)[NT][2]) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
        const uint4 v = r[m * 32];
        const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int n = 0; n < NT; n++) multiply(s.c[chain][m][n], w, b[n][0], b[n][1]);
    }
}

// Where R in shared memory makes many products, they go two groups of k-steps a turn of a loop: unrolled, they are long
// to compile and crowd the registers. GLOBAL: a group is a round, polled together; the last round, or two, stay outside
// the loop: the last may be short, and no other is polled behind it.
constexpr int GROUP = EXCHANGE == EXCHANGE_GLOBAL ? POLL : 2;
constexpr int FIRST_GROUP = (KR + GROUP - 1) / GROUP;
constexpr int LOOP_GROUPS = (EXCHANGE == EXCHANGE_GLOBAL ? (KW + GROUP - 1) / GROUP - 1 : KW / GROUP) - FIRST_GROUP;
constexpr bool LOOPS = (KW - KR) * MT * NT * (ELEMENT == F32 ? 8 : 1) >= 128 && LOOP_GROUPS >= 4;
constexpr int LOOP = LOOPS ? FIRST_GROUP * GROUP : KW, TURNS = LOOPS ? LOOP_GROUPS / 2 : 0;
constexpr int REST = LOOP + TURNS * 2 * GROUP;  // LOOP, REST: the k-steps where the loop starts and where it has ended

// float32: the compiler splits words of R for as many products ahead as it sees, until registers spill. A branch that
// is always taken, which it cannot know, ends what it sees: FENCE k-steps. A wait for words ends it too.
constexpr bool FENCED = ELEMENT == F32 && (KR * MT > 12 || MT * NT >= 4);
constexpr int FENCE = MT * NT >= 4 ? 1 : 4 / (MT * NT);

// one(j) for j of [0, COUNT). v: not negative.
template <int COUNT, class One>
DEVICE void products(int v, const One& one) {
    constexpr int LENGTH = FENCED && FENCE < COUNT ? FENCE : COUNT;
#pragma unroll
    for (int j0 = 0; j0 < COUNT; j0 += LENGTH) {
        int sign = 0;
        if (LENGTH < COUNT) asm volatile("shr.s32 %0, %1, 31;" : "=r"(sign) : "r"(v));
        if (sign == 0)
#pragma unroll
            for (int j = 0; j < LENGTH; j++)
                if (j0 + j < COUNT) one(j0 + j);
    }
}

// Adds this warp's slice of k of R times vector number v.
DEVICE void matmul(const Args& a, const Lane& l, int group, int v, const u32 (&kept)[KR > 0 ? KR : 1][MT][4], Sums& s) {
    const uint4* rest = (const uint4*)(shared + SHARED_R) + (size_t)l.warp * (KW - KR) * MT * 32 + l.lane;
    auto exists = [&](int k) { return K_STEPS % SLICES == 0 || l.ks * KW + k < K_STEPS; };
    auto step = [&](int k, const u32 (&b)[NT][2]) {  // k: a constant
        if (k < KR) multiply_step(s, k % CHAINS, kept[k < KR ? k : 0], b);
        else if (k < KW) multiply_step(s, k % CHAINS, rest + (k - KR) * MT * 32, b);
    };
#if EXCHANGE == EXCHANGE_GLOBAL
    const u32* vector = global_vector(a, group, v) + l.ks * KW * NT * 64 + l.lane * 2;
    u32 p[2][POLL][NT][2];  // a round is polled while the one before is multiplied
    auto poll = [&](int k0, u32 (&x)[POLL][NT][2]) {
#pragma unroll
        for (int k = 0; k < POLL; k++)
#pragma unroll
            for (int n = 0; n < NT; n++)
                if ((KW % POLL == 0 || k0 + k < KW) && exists(k0 + k))
                    load_words(vector + ((k0 + k) * NT + n) * 64, x[k][n][0], x[k][n][1]);
                else x[k][n][0] = x[k][n][1] = 0u;
    };
    auto arrived = [&](const u32 (&x)[POLL][NT][2]) {
        bool all = true;
#pragma unroll
        for (int k = 0; k < POLL; k++)
#pragma unroll
            for (int n = 0; n < NT; n++) all = all && x[k][n][0] != ABSENT && x[k][n][1] != ABSENT;
        return all;
    };
    auto round = [&](int k0) {  // k0: a constant
        const int now = k0 / POLL & 1;
        if (k0 + POLL < KW) poll(k0 + POLL, p[now ^ 1]);
        while (!arrived(p[now])) poll(k0, p[now]);
        products<POLL>(v, [&](int j) { step(k0 + j, p[now][j]); });
    };
    poll(0, p[0]);
#pragma unroll
    for (int k0 = 0; k0 < LOOP; k0 += POLL) round(k0);
#pragma unroll 1
    for (int i = 0; i < TURNS; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int now = (FIRST_GROUP + half) & 1, k0 = LOOP + (2 * i + half) * POLL;
            poll(k0 + POLL, p[now ^ 1]);
            while (!arrived(p[now])) poll(k0, p[now]);
            products<POLL>(v, [&](int j) {
                multiply_step(s, (LOOP + half * POLL + j) % CHAINS, rest + (k0 + j - KR) * MT * 32, p[now][j]);
            });
        }
#pragma unroll
    for (int k0 = REST; k0 < KW; k0 += POLL) round(k0);
#else
#if EXCHANGE == EXCHANGE_CLUSTER
    barrier_wait(team_barrier(l, v), v >> 1 & 1);
#endif
    const u32* vector = (const u32*)(shared + SHARED_VECTOR) + (v & 1) * VECTOR + l.lane;
    auto load = [&](int k, u32 (&b)[NT][2]) {
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) b[n][i] = vector[vector_offset(l.ks, k, n) + i * SECOND];
    };
    auto one = [&](int k) {  // k: a constant
        u32 b[NT][2];
        if (!exists(k)) return;
        load(k, b);
        step(k, b);
    };
    products<LOOP>(v, one);
#pragma unroll 1
    for (int i = 0; i < TURNS; i++)
        products<2 * GROUP>(v, [&](int j) {
            const int k = LOOP + i * 2 * GROUP + j;
            u32 b[NT][2];
            if (!exists(k)) return;
            load(k, b);
            multiply_step(s, (LOOP + j) % CHAINS, rest + (k - KR) * MT * 32, b);
        });
    products<KW - REST>(v, [&](int j) { one(REST + j); });
#endif
    add_chains(s);
}
