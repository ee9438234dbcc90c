// The element that meets R: bf16, f16, tf32, or f32 as four tf32 products. One word is 32 bits of a fragment.
//
// A k-step of mma takes, a thread, 4 words of R (A operand, 16 rows) and 2 words of the vector (B operand, 8 columns):
//   16-bit: m16n8k16, a word is two neighbours in k; units 0-7 of the step are word 0 of B, units 8-15 word 1
//   32-bit: m16n8k8,  a word is one element;         units 0-3 of the step are word 0 of B, units 4-7  word 1
// With lane = 4 g + q: A words are rows g, g + 8, g, g + 8 of k 2q (16-bit) or q, then the second half of k; B words
// are column g; C is row g, columns 2q and 2q + 1, then row g + 8.

constexpr bool WIDE = ELEMENT == TF32 || ELEMENT == F32;
constexpr int ELEMENT_BYTES = WIDE ? 4 : 2;

DEVICE float from_bits(unsigned short v, int kind) {
    if (kind == BF16) return __uint_as_float((u32)v << 16);
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
}
// One 16-bit or 32-bit element of memory as float, and back.
DEVICE float load_element(const char* p, int kind) {
    return kind == F32 || kind == TF32 ? *(const float*)p : from_bits(*(const unsigned short*)p, kind);
}
DEVICE float low_half(u32 v, int kind) { return from_bits((unsigned short)(v & 0xffff), kind); }
DEVICE float high_half(u32 v, int kind) {
    return kind == BF16 ? __uint_as_float(v & 0xffff0000u) : from_bits((unsigned short)(v >> 16), kind);
}
DEVICE u32 pack(float low, float high, int kind) {
    u32 d;
    if (kind == BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
// What rounding to 16 bits takes of a value.
DEVICE float rest_of(float v, int kind) { return v - low_half(pack(v, 0.f, kind), kind); }

DEVICE u32 to_tf32(float x) { u32 d; asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(d) : "f"(x)); return d; }

#define MMA(SHAPE)                                                                                                  \
    asm volatile("mma.sync.aligned." SHAPE " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                  \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

DEVICE void mma_words(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (ELEMENT == BF16) MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
    else if constexpr (ELEMENT == F16) MMA("m16n8k16.row.col.f32.f16.f16.f32");
    else MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}

// c += R-words * vector-words. f32: a = a_high + a_low in tf32, likewise b, four products.
DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (ELEMENT != F32) {
        mma_words(c, a, b0, b1);
    } else {
        u32 high[4], low[4];
        for (int i = 0; i < 4; i++) {
            high[i] = to_tf32(__uint_as_float(a[i]));
            low[i] = to_tf32(__uint_as_float(a[i]) - __uint_as_float(high[i]));
        }
        const u32 h0 = to_tf32(__uint_as_float(b0)), h1 = to_tf32(__uint_as_float(b1));
        const u32 l0 = to_tf32(__uint_as_float(b0) - __uint_as_float(h0));
        const u32 l1 = to_tf32(__uint_as_float(b1) - __uint_as_float(h1));
        float sum[4] = {0.f, 0.f, 0.f, 0.f};  // tensor cores cut off when they add, so they add this step alone
        mma_words(sum, low, l0, l1);
        mma_words(sum, low, h0, h1);
        mma_words(sum, high, l0, l1);
        mma_words(sum, high, h0, h1);
        for (int i = 0; i < 4; i++) c[i] += sum[i];
    }
}
// A word as it is kept: tf32 is rounded once, here.
DEVICE u32 wide_word(float x) { return ELEMENT == TF32 ? to_tf32(x) : __float_as_uint(x); }
