// dR and db of all steps at once, from dpre [rows G N D] and h [rows N D], rows = B T, 16-bit elements:
//   dR[g,n,d,p] = sum over rows of dpre[row,g,n,d] h[row + shift,n,p],   db[g,n,d] = sum over rows of dpre[row,g,n,d]
// where dR's sum leaves out the rows of the step `first` of a sequence, which met no output.
// No copy is made to bring a head's gates together, and dpre is read once: m = g D + d goes through a head's gates.
//
// `multiply`. Grid: (head, tile of 256 m, tile of 64 p) x slice of the rows. Block: 8 warps, a quarter of m and a half of
//   p each; 32 rows a stage on their way into shared memory (cp.async), in chunks of 16 bytes that change places by row
//   (c ^ row % 8), so that ldmatrix.trans meets no bank twice. db: products with ones. Sums of a slice to `partial`.
// `add`. Sums over the slices, in one order: no float atomics, the same bits each time.
// D is a multiple of 8 and both tensors are contiguous. All sizes are arguments: one binary an element and architecture.

struct Sizes { i64 rows; int G, N, D, slices, T, first, shift; u32 recurrent; };  // recurrent: mask of the gates of R

constexpr int M_TILE = 256, P_TILE = 64, ROWS = 32, DEPTH = 4, A_BYTES = ROWS * M_TILE * 2, B_BYTES = ROWS * P_TILE * 2;
constexpr u32 ONES = ELEMENT == BF16 ? 0x3f803f80u : 0x3c003c00u;

extern __shared__ __align__(128) unsigned char shared[];

extern "C" __global__ void __launch_bounds__(256, 1)
multiply(const char* dpre, const char* met, float* partial, float* bias, const __grid_constant__ Sizes s) {
    const int M = s.G * s.D, m_tiles = (M + M_TILE - 1) / M_TILE, p_tiles = (s.D + P_TILE - 1) / P_TILE;
    const int n = blockIdx.x / (m_tiles * p_tiles), m0 = blockIdx.x / p_tiles % m_tiles * M_TILE, p0 = blockIdx.x % p_tiles * P_TILE;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const i64 length = ((s.rows + s.slices - 1) / s.slices + ROWS - 1) / ROWS * ROWS;
    const i64 begin = blockIdx.y * length, end = begin + length < s.rows ? begin + length : s.rows;

    // copies: a thread brings chunk `ca` of rows `ra` + 8 i of dpre, and chunk `cb` of row `rb` of h
    const int ca = threadIdx.x % 32, ra = threadIdx.x / 32, cb = threadIdx.x % 8, rb = threadIdx.x / 8;
    const int m = m0 + ca * 8, p = p0 + cb * 8;
    const i64 a_row = (i64)s.G * s.N * s.D * 2, b_row = (i64)s.N * s.D * 2;
    const char* a_from = dpre + (((i64)(m / s.D) * s.N + n) * s.D + m % s.D) * 2;
    const char* b_from = met + ((i64)n * s.D + p) * 2;
    const u32 base = shared_address(shared);
    auto fetch = [&](i64 first, int stage) {
        const u32 to = base + stage * (A_BYTES + B_BYTES);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = ra + 8 * i;
            const bool valid = m < M && first + r < end;
            copy16(to + r * M_TILE * 2 + ((ca ^ (r & 7)) * 16), valid ? a_from + (first + r) * a_row : dpre, valid);
        }
        const bool valid = p < s.D && first + rb < end && (int)((u32)(first + rb) % (u32)s.T) != s.first;
        copy16(to + A_BYTES + rb * P_TILE * 2 + ((cb ^ (rb & 7)) * 16), valid ? b_from + (first + rb + s.shift) * b_row : met, valid);
        copy_commit();
    };

    const int wm = warp % 4 * 64, wp = warp / 4 * 32, matrix = lane / 8, r8 = lane % 8;
    const bool sums_bias = p0 == 0 && wp == 0;
    float c[4][4][4] = {}, d[4][4] = {};
    for (int i = 0; i < DEPTH - 1; i++) fetch(begin + i * ROWS, i);
    int stage = 0;
    for (i64 first = begin; first < end; first += ROWS) {
        copy_wait<DEPTH - 2>();
        __syncthreads();
        fetch(first + (DEPTH - 1) * ROWS, (stage + DEPTH - 1) % DEPTH);
        const u32 from = base + stage * (A_BYTES + B_BYTES);
#pragma unroll
        for (int k0 = 0; k0 < ROWS; k0 += 16) {
            u32 a[4][4], b[2][4];
            const int ka = k0 + matrix / 2 * 8 + r8, kb = k0 + matrix % 2 * 8 + r8;
#pragma unroll
            for (int i = 0; i < 4; i++)
                load_transposed_from(a[i], from + ka * M_TILE * 2 + ((((wm + i * 16) / 8 + matrix % 2) ^ (ka & 7)) * 16));
#pragma unroll
            for (int j = 0; j < 2; j++)
                load_transposed_from(b[j], from + A_BYTES + kb * P_TILE * 2 + (((wp / 8 + j * 2 + matrix / 2) ^ (kb & 7)) * 16));
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) mma_words(c[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
                if (sums_bias) mma_words(d[i], a[i], ONES, ONES);
            }
        }
        stage = (stage + 1) % DEPTH;
    }

    const i64 head = (i64)blockIdx.y * s.N + n;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = m0 + wm + i * 16 + half * 8 + g;
            if (row >= M) continue;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int column = p0 + wp + j * 8 + 2 * q;
                if (column < s.D)
                    *(float2*)(partial + (head * M + row) * s.D + column) = make_float2(c[i][j][half * 2], c[i][j][half * 2 + 1]);
            }
            if (sums_bias && q == 0) bias[head * M + row] = d[i][half * 2];
        }
}

extern "C" __global__ void __launch_bounds__(256, 1)
add(const float* partial, const float* bias, float* dR, float* db, const __grid_constant__ Sizes s) {
    const i64 M = (i64)s.G * s.D, count = s.N * M * s.D, i = blockIdx.x * 256ll + threadIdx.x;
    if (i < count) {
        const int gate = (int)(i / s.D % M / s.D);
        const i64 n = i / s.D / M, d = i / s.D % s.D, k = __popc(s.recurrent & ((1u << gate) - 1));
        float sum = 0.f;
        for (int slice = 0; slice < s.slices; slice++) sum += partial[slice * count + i];
        if (s.recurrent >> gate & 1) dR[((k * s.N + n) * s.D + d) * s.D + i % s.D] = sum;
    }
    if (i < s.N * M) {
        float sum = 0.f;
        for (int slice = 0; slice < s.slices; slice++) sum += bias[slice * s.N * M + i];
        db[(i % M / s.D * s.N + i / M) * s.D + i % s.D] = sum;
    }
}
