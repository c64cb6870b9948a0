// What the kernels share: bf16, 2^x, and how threads share work.
#pragma once
#include <immintrin.h>
#include <omp.h>

#include <cstdint>
#include <cstring>

typedef uint16_t bf16;

static inline float number(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// 2^x, at least 2^-126, to about 5e-5 of it: finer than bf16
static inline __m512 power(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.f));
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, n);
    __m512 r = _mm512_set1_ps(0.0096181291f);
    r = _mm512_fmadd_ps(r, f, _mm512_set1_ps(0.0555041087f));
    r = _mm512_fmadd_ps(r, f, _mm512_set1_ps(0.2402265070f));
    r = _mm512_fmadd_ps(r, f, _mm512_set1_ps(0.6931471806f));
    r = _mm512_fmadd_ps(r, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(r, n);
}

// This thread's number within a parallel region, and the number of its threads.
static inline void share(int64_t& thread, int64_t& count) {
    thread = omp_get_thread_num();
    count = omp_get_num_threads();
}
