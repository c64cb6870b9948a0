// What the kernels share: vectors as wide as the processor's (AVX-512, AVX2, NEON), by the compiler's extensions; numbers
// in fp32 and bf16; 2^x; and how threads share work.
#pragma once
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif

typedef uint16_t bf16;
static const int LANES = BYTES / 4;
static const int WIDE = BYTES == 32 ? 2 : 4;  // vectors of a row of sums: 6 such rows fit into 16 or 32 registers
typedef float vec __attribute__((vector_size(BYTES)));
typedef int32_t ivec __attribute__((vector_size(BYTES)));
typedef uint16_t half __attribute__((vector_size(BYTES / 2)));

static inline vec all(float x) { return x - (vec){}; }

static inline float number(float x) { return x; }

static inline float number(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline vec load(const float* x) {
    vec value;
    std::memcpy(&value, x, sizeof value);
    return value;
}

static inline vec load(const bf16* x) {
    half bits;
    std::memcpy(&bits, x, sizeof bits);
    return (vec)(__builtin_convertvector(bits, ivec) << 16);
}

static inline void store(float* x, vec value) { std::memcpy(x, &value, sizeof value); }

// rounded to the nearest, ties to even
static inline void store(bf16* x, vec value) {
#ifdef __AVX512BF16__
    __m256bh bits = _mm512_cvtneps_pbh((__m512)value);
#else
    ivec from = (ivec)value;
    ivec rounded = ((from + 0x7fff + ((from >> 16) & 1)) >> 16) & 0xffff;
    half bits = __builtin_convertvector(value == value ? rounded : (ivec){} + 0x7fc0, half);
#endif
    std::memcpy(x, &bits, sizeof bits);
}

// the first `count` numbers, then zeros
template <class T>
static inline vec load(const T* x, int64_t count) {
    if (count >= LANES) return load(x);
    T part[LANES] = {};
    if (count > 0) std::memcpy(part, x, count * sizeof(T));
    return load(part);
}

template <class T>
static inline void store(T* x, vec value, int64_t count) {
    if (count >= LANES) return store(x, value);
    T part[LANES];
    store(part, value);
    if (count > 0) std::memcpy(x, part, count * sizeof(T));
}

static inline vec larger(vec a, vec b) { return a > b ? a : b; }

static inline float sum(vec x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
#endif
}

static inline float largest(vec x) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#else
    float found = x[0];
    for (int i = 1; i < LANES; i++) found = x[i] > found ? x[i] : found;
    return found;
#endif
}

// 2^x for x up to 127, at least 2^-126, to about 1e-7 of it; the polynomial is that of Cephes' exp2f (Moshier)
static inline vec power(vec x) {
    x = x < all(-126.f) ? all(-126.f) : x;
    const vec magic = all(12582912.f);  // 1.5 · 2^23: adding it rounds to whole numbers
    vec n = (x + magic) - magic, f = x - n;
    vec r = 1.535336188319500e-4f * f + 1.339887440266574e-3f;
    r = r * f + 9.618437357674640e-3f;
    r = r * f + 5.550332471162809e-2f;
    r = r * f + 2.402264791363012e-1f;
    r = r * f + 6.931472028550421e-1f;
    r = r * f + 1.0f;
    return r * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
}

// One operand of a product: a number in fp32, or two neighbouring numbers in bf16 where the processor multiplies them.
struct Single {
    typedef float T;
    static const int PER = 1;
    static inline vec every(const T* x) { return all(*x); }
    static inline vec read(const T* x) { return load(x); }
    static inline vec more(vec total, vec a, vec b) { return total + a * b; }
};

#ifdef __AVX512BF16__
struct Double {
    typedef bf16 T;
    static const int PER = 2;
    static inline vec every(const T* x) {
        int32_t bits;
        std::memcpy(&bits, x, 4);
        return (vec)_mm512_set1_epi32(bits);
    }
    static inline vec read(const T* x) { return (vec)_mm512_loadu_si512(x); }
    static inline vec more(vec total, vec a, vec b) {
        return (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
    }
};
#endif

// This thread's number within a parallel region, and the number of its threads.
static inline void share(int64_t& thread, int64_t& count) {
    thread = omp_get_thread_num();
    count = omp_get_num_threads();
}
