// Layers of a U-Net in bf16 that read and write memory once, with sums in fp32, for processors with AVX-512; layers.py
// beside it calls them.
//
// Images lie channels last: C channels of a pixel side by side, P pixels of an image, B images.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "avx512.h"

static const int64_t BLOCK = 64;  // pixels summed in fp32 before the sum is added to that in fp64

static inline __m512 load(const bf16* x, __mmask16 here) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, x)), 16));
}

static inline void store(bf16* x, __mmask16 here, __m512 value) {
    _mm256_mask_storeu_epi16(x, here, (__m256i)_mm512_cvtneps_pbh(value));
}

static inline __mmask16 mask(int64_t left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }

// e^-x, without overflow
static inline __m512 decay(__m512 x) {
    x = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-80.f)), _mm512_set1_ps(-1.4426950409f));
    return power(x);
}

// 1 / x, to about 2^-24 of it, for x that are not extreme
static inline __m512 inverse(__m512 x) {
    __m512 y = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(y, _mm512_fnmadd_ps(x, y, _mm512_set1_ps(2.f)));
}

static inline __m512 silu(__m512 x) {
    return _mm512_mul_ps(x, inverse(_mm512_add_ps(_mm512_set1_ps(1.f), decay(x))));
}

// Φ(x), the normal distribution; Abramowitz and Stegun 1964, 7.1.26, to 1.5e-7
static inline __m512 normal(__m512 x) {
    __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
    __m512 t = inverse(_mm512_fmadd_ps(_mm512_set1_ps(0.3275911f), z, _mm512_set1_ps(1.f)));
    __m512 y = _mm512_set1_ps(1.061405429f);
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(-1.453152027f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(1.421413741f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(-0.284496736f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(0.254829592f));
    __m512 tail = _mm512_mul_ps(_mm512_mul_ps(y, t), _mm512_set1_ps(0.5f));  // times e^(-x²/2): the smaller tail
    tail = _mm512_mul_ps(tail, decay(_mm512_mul_ps(z, z)));
    __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(_mm512_sub_ps(_mm512_set1_ps(1.f), tail), below, tail);
}

// For each channel, the sums of x - x0 and of its square over some pixels; x0 is the image's first pixel.
static void moments(const bf16* first, const bf16* x, int64_t pixels, int64_t C, double* sums) {
    for (int64_t begin = 0; begin < pixels; begin += BLOCK) {
        int64_t end = std::min(pixels, begin + BLOCK);
        for (int64_t c = 0; c < C; c += 32) {  // a line of the cache
            __mmask16 here[2] = {mask(C - c), mask(std::max<int64_t>(C - c - 16, 0))};
            __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, square[2] = {sum[0], sum[0]};
            __m512 x0[2] = {load(first + c, here[0]), load(first + c + 16, here[1])};
            for (int64_t p = begin; p < end; p++)
                for (int j = 0; j < 2; j++) {
                    __m512 d = _mm512_sub_ps(load(x + p * C + c + 16 * j, here[j]), x0[j]);
                    sum[j] = _mm512_add_ps(sum[j], d);
                    square[j] = _mm512_fmadd_ps(d, d, square[j]);
                }
            float part[64];
            for (int j = 0; j < 2; j++) {
                _mm512_storeu_ps(part + 16 * j, sum[j]);
                _mm512_storeu_ps(part + 32 + 16 * j, square[j]);
            }
            for (int64_t i = 0; i < std::min<int64_t>(32, C - c); i++) {
                sums[c + i] += part[i];
                sums[C + c + i] += part[32 + i];
            }
        }
    }
}

// What each channel is multiplied by, and what is added: scale[C], then shift[C]. `offset` is part of what is normalised.
static void scales(const double* sums, const bf16* first, const bf16* offset, const bf16* weight, const bf16* bias,
                   int64_t P, int64_t C, int64_t groups, double eps, float* out) {
    int64_t per = C / groups;
    std::vector<double> means(C);
    for (int64_t c = 0; c < C; c++) means[c] = number(first[c]) + sums[c] / P + (offset ? number(offset[c]) : 0);
    for (int64_t g = 0; g < groups; g++) {
        double mean = 0, square = 0;
        for (int64_t c = g * per; c < (g + 1) * per; c++) mean += means[c] / per;
        for (int64_t c = g * per; c < (g + 1) * per; c++) {
            double m = sums[c] / P, away = means[c] - mean;
            square += std::max(0.0, sums[C + c] / P - m * m) + away * away;
        }
        double gain = 1 / std::sqrt(square / per + eps);
        for (int64_t c = g * per; c < (g + 1) * per; c++) {
            double scale = gain * number(weight[c]);
            out[c] = (float)scale;
            out[C + c] = (float)(number(bias[c]) + ((offset ? number(offset[c]) : 0) - mean) * scale);
        }
    }
}

// silu(group norm(x + offset)), x and out (B, P, C), offset (B, C) or null; without `activate`, the norm alone
extern "C" void group_norm(const bf16* x, const bf16* offset, const bf16* weight, const bf16* bias, bf16* out,
                           int64_t B, int64_t P, int64_t C, int64_t groups, double eps, int64_t activate,
                           int64_t threads) {
    std::vector<double> sums(threads * 2 * C);
    std::vector<float> factors(2 * C);
    for (int64_t b = 0; b < B; b++) {
        const bf16* from = x + b * P * C;
        bf16* to = out + b * P * C;
        std::fill(sums.begin(), sums.end(), 0.0);
#pragma omp parallel num_threads(threads)
        {
            int64_t thread, count;
            share(thread, count);
            int64_t begin = P * thread / count, end = P * (thread + 1) / count;
            moments(from, from + begin * C, end - begin, C, sums.data() + thread * 2 * C);
#pragma omp barrier
#pragma omp single
            {
                for (int64_t other = 1; other < count; other++)
                    for (int64_t i = 0; i < 2 * C; i++) sums[i] += sums[other * 2 * C + i];
                scales(sums.data(), from, offset ? offset + b * C : nullptr, weight, bias, P, C, groups, eps,
                       factors.data());
            }
            for (int64_t p = begin; p < end; p++)
                for (int64_t c = 0; c < C; c += 16) {
                    __mmask16 here = mask(C - c);
                    __m512 y = _mm512_fmadd_ps(load(from + p * C + c, here), _mm512_maskz_loadu_ps(here, &factors[c]),
                                               _mm512_maskz_loadu_ps(here, &factors[C + c]));
                    store(to + p * C + c, here, activate ? silu(y) : y);
                }
        }
    }
}

// y[:, :C] · gelu(y[:, C:]), where y is x and a bias, rows of 2 C numbers
extern "C" void geglu(const bf16* x, const bf16* bias, bf16* out, int64_t rows, int64_t C, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const bf16 *value = x + r * 2 * C, *gate = value + C;
        for (int64_t c = 0; c < C; c += 16) {
            __mmask16 here = mask(C - c);
            __m512 v = _mm512_add_ps(load(value + c, here), load(bias + c, here));
            __m512 g = _mm512_add_ps(load(gate + c, here), load(bias + C + c, here));
            store(out + r * C + c, here, _mm512_mul_ps(v, _mm512_mul_ps(g, normal(g))));
        }
    }
}
