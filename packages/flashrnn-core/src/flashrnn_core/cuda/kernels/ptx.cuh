// PTX in C++ clothes: one instruction a function, for sm_80 and up; cluster instructions for sm_90 and up.
// May change here: nothing but the wrapping. Tested through the kernels.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE static __device__ __forceinline__

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Transpose of an 8 x 8 matrix of 16-bit elements held by a warp: thread (g, q) gives [g][2q, 2q+1], gets [2q, 2q+1][g].
DEVICE u32 transpose8x8(u32 a) {
    u32 d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

// 8 x 8 tile of 16-bit elements from shared memory, transposed: thread (g, q) gets [2q, 2q+1][g].
DEVICE u32 load_transposed(u32 tile, int lane) {
    u32 d;
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(d) : "r"(tile + (lane & 7) * 16) : "memory");
    return d;
}
// Four such tiles; lanes 8 i to 8 i + 7 name the rows of tile i.
DEVICE void load_transposed_from(u32* d, u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(row) : "memory");
}
DEVICE void load_transposed4(u32* d, u32 tiles, int lane) { load_transposed_from(d, tiles + lane * 16); }

// Asynchronous copy of 16 bytes, global to shared; zeros where not valid.
DEVICE void copy16(u32 to, const char* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
// The same, of what is read again and again: `policy` says whether L2 keeps it or lets it pass.
DEVICE void copy16_hinted(u32 to, const void* from, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy) : "memory");
}
DEVICE u64 keep_policy() { u64 p; asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(p)); return p; }
DEVICE u64 pass_policy() { u64 p; asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p)); return p; }
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Words that other blocks poll, each one access.
DEVICE void store_word(u32* p, u32 x) { asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(x) : "memory"); }
DEVICE void load_words(const u32* p, u32& x, u32& y) {
    asm volatile("ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2];" : "=r"(x), "=r"(y) : "l"(p) : "memory");
}

// One of the block's 16 barriers, for `threads` of it; 0 is that of __syncthreads.
DEVICE void barrier_sync(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

DEVICE float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float log2_fast(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float reciprocal(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float max_nan(float x, float y) { float z; asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y)); return z; }

// x is computed here, not later: what can be done before a wait must not be done after it.
DEVICE void pin(float& x) { asm volatile("" : "+f"(x)); }
// x may have changed, for all the compiler knows: what is made from it before is not kept in registers for later.
DEVICE void hide(int& x) { asm volatile("" : "+r"(x)); }

#if EXCHANGE == EXCHANGE_CLUSTER || SPLIT > 1
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE u32 peer_address(u32 address, u32 rank) {
    u32 d;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(d) : "r"(address), "r"(rank));
    return d;
}
DEVICE void barrier_init(u32 barrier) { asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory"); }
DEVICE void barrier_arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 phase) {
    asm volatile(
        "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra.uni DONE;\nbra.uni WAIT;\nDONE:\n}" ::"r"(barrier), "r"(phase) : "memory");
}
DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Copy within the cluster; completes on the peer's barrier.
DEVICE void copy_to_peer(u32 to, u32 from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "r"(from), "r"(bytes), "r"(barrier) : "memory");
}
// 16 bytes to a peer's shared memory; completes on the peer's barrier.
DEVICE void store_to_peer(u32 to, uint4 x, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(barrier) : "memory");
}
#endif

#if STAGED
DEVICE void add_release(u32* p, u32 x) { asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory"); }
DEVICE u32 load_acquire(const u32* p) {
    u32 x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
// What this thread has written to global memory is there for other blocks' bulk copies too, behind a count or a flag.
DEVICE void release_fence() { asm volatile("fence.proxy.async.global;\nfence.acq_rel.gpu;" ::: "memory"); }
DEVICE void global_proxy_fence() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
DEVICE void copy_from_global(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
// wgmma: operands in shared memory, of core matrices (8 rows of 16 bytes); `along_k`, `along`: bytes from one to the next.
DEVICE u64 core_matrices(u32 address, int along_k, int along) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(along_k >> 4) << 16 | (u64)(along >> 4) << 32;
}
DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
#endif
