// softmax(q kᵀ · scale) v in bf16 with sums in fp32, for processors with AVX-512 BF16; attention.py beside it calls it.
//
// Queries are taken ROWS at a time, keys KEYS at a time, and the softmax is the running one of Milakov and Gimelshein
// 2018 (arXiv 1805.02867): scores never leave the cache. Two neighbouring numbers of a row are one operand of the
// processor's dot product, so keys are packed pair by pair over channels, and values pair by pair over keys.
//
// N queries, M keys, D channels of a head (even); width: D rounded up to 16
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "avx512.h"

static const int ROWS = 6, KEYS = 256, UNIT = 96;  // UNIT: queries of a unit of work

static inline __m512bh pairs(__m512i x) { return (__m512bh)x; }

// keys to [key / 16][D / 2][16][2]; values to [key / 2][width][2]; what is padded is zero
static void pack(const bf16* k, const bf16* v, int64_t ks, int64_t vs, int M, int D, int width, bf16* kp, bf16* vp) {
    int blocks = (M + 15) / 16;
    for (int b = 0; b < blocks; b++)
        for (int i = 0; i < 16; i++) {
            int key = b * 16 + i;
            uint32_t* to = (uint32_t*)(kp) + (int64_t)b * (D / 2) * 16 + i;
            if (key < M) {
                const uint32_t* from = (const uint32_t*)(k + key * ks);
                for (int p = 0; p < D / 2; p++) to[p * 16] = from[p];
            } else
                for (int p = 0; p < D / 2; p++) to[p * 16] = 0;
        }
    for (int p = 0; p < blocks * 8; p++) {
        bf16* to = vp + (int64_t)p * width * 2;
        for (int side = 0; side < 2; side++) {
            int key = 2 * p + side;
            if (key < M) {
                const bf16* from = v + key * vs;
                for (int d = 0; d < D; d++) to[2 * d + side] = from[d];
                for (int d = D; d < width; d++) to[2 * d + side] = 0;
            } else
                for (int d = 0; d < width; d++) to[2 * d + side] = 0;
        }
    }
}

// scores of R queries with some keys: s[R][KEYS]
template <int R>
static inline void scores(const bf16* q, int64_t qs, const bf16* kp, int D, int keys, float* s) {
    for (int first = 0; first < keys; first += 64) {
        int vectors = std::min(4, (keys - first + 15) / 16);
        const uint32_t* base = (const uint32_t*)kp + (int64_t)(first / 16) * (D / 2) * 16;
        int64_t step = (int64_t)(D / 2) * 16;
        __m512 acc[R][4];
        for (int r = 0; r < R; r++)
            for (int j = 0; j < 4; j++) acc[r][j] = _mm512_setzero_ps();
        if (vectors == 4) {
            for (int p = 0; p < D / 2; p++) {
                __m512i k0 = _mm512_loadu_si512(base + p * 16), k1 = _mm512_loadu_si512(base + step + p * 16);
                __m512i k2 = _mm512_loadu_si512(base + 2 * step + p * 16), k3 = _mm512_loadu_si512(base + 3 * step + p * 16);
#pragma GCC unroll 6
                for (int r = 0; r < R; r++) {
                    __m512i x = _mm512_set1_epi32(((const int32_t*)(q + r * qs))[p]);
                    acc[r][0] = _mm512_dpbf16_ps(acc[r][0], pairs(x), pairs(k0));
                    acc[r][1] = _mm512_dpbf16_ps(acc[r][1], pairs(x), pairs(k1));
                    acc[r][2] = _mm512_dpbf16_ps(acc[r][2], pairs(x), pairs(k2));
                    acc[r][3] = _mm512_dpbf16_ps(acc[r][3], pairs(x), pairs(k3));
                }
            }
        } else {
            for (int j = 0; j < vectors; j++)
                for (int p = 0; p < D / 2; p++) {
                    __m512i kk = _mm512_loadu_si512(base + j * step + p * 16);
#pragma GCC unroll 6
                    for (int r = 0; r < R; r++)
                        acc[r][j] = _mm512_dpbf16_ps(acc[r][j], pairs(_mm512_set1_epi32(((const int32_t*)(q + r * qs))[p])), pairs(kk));
                }
        }
        for (int r = 0; r < R; r++)
            for (int j = 0; j < vectors; j++) _mm512_storeu_ps(s + r * KEYS + first + 16 * j, acc[r][j]);
    }
}

// o[R][16 W columns] += weights p[R][KEYS] times values
template <int R, int W>
static inline void weigh(const bf16* p, const bf16* vp, int width, int keys2, int column, float* o) {
    __m512 acc[R][W];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < W; j++) acc[r][j] = _mm512_loadu_ps(o + r * width + column + 16 * j);
    for (int k = 0; k < keys2; k++) {
        const bf16* row = vp + ((int64_t)k * width + column) * 2;
        __m512i v[W];
#pragma GCC unroll 4
        for (int j = 0; j < W; j++) v[j] = _mm512_loadu_si512(row + 32 * j);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            __m512i x = _mm512_set1_epi32(((const int32_t*)(p + r * KEYS))[k]);
#pragma GCC unroll 4
            for (int j = 0; j < W; j++) acc[r][j] = _mm512_dpbf16_ps(acc[r][j], pairs(x), pairs(v[j]));
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < W; j++) _mm512_storeu_ps(o + r * width + column + 16 * j, acc[r][j]);
}

// R queries with all keys
template <int R>
static void rows(const bf16* q, int64_t qs, const bf16* kp, const bf16* vp, int M, int D, int width, float scale,
                 bf16* out, int64_t os, float* s, bf16* p, float* o) {
    float top[R], sum[R];
    for (int r = 0; r < R; r++) top[r] = -INFINITY, sum[r] = 0;
    std::memset(o, 0, sizeof(float) * R * width);
    for (int first = 0; first < M; first += KEYS) {
        int keys = std::min(KEYS, M - first), padded = (keys + 15) / 16 * 16;
        scores<R>(q, qs, kp + (int64_t)first * D, D, padded, s);
        for (int r = 0; r < R; r++) {
            float* row = s + r * KEYS;
            for (int i = keys; i < padded; i++) row[i] = -INFINITY;
            __m512 m = _mm512_set1_ps(-INFINITY);
            for (int i = 0; i < padded; i += 16) m = _mm512_max_ps(m, _mm512_loadu_ps(row + i));
            float best = std::max(top[r], _mm512_reduce_max_ps(m) * scale);
            __m512 b = _mm512_set1_ps(best), sc = _mm512_set1_ps(scale), total = _mm512_setzero_ps();
            bf16* w = p + r * KEYS;
            for (int i = 0; i < padded; i += 16) {
                __m512 x = _mm512_loadu_ps(row + i);
                __mmask16 here = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-INFINITY), _CMP_NEQ_OQ);
                __m512 e = _mm512_maskz_mov_ps(here, power(_mm512_fmsub_ps(x, sc, b)));
                total = _mm512_add_ps(total, e);
                _mm256_storeu_si256((__m256i*)(w + i), (__m256i)_mm512_cvtneps_pbh(e));
            }
            float shrink = std::exp2(top[r] - best);
            sum[r] = sum[r] * shrink + _mm512_reduce_add_ps(total);
            if (best > top[r] && first) {
                __m512 f = _mm512_set1_ps(shrink);
                for (int i = 0; i < width; i += 16) _mm512_storeu_ps(o + r * width + i, _mm512_mul_ps(f, _mm512_loadu_ps(o + r * width + i)));
            }
            top[r] = best;
        }
        const bf16* values = vp + (int64_t)first * width;
        int column = 0;
        for (; column + 64 <= width; column += 64) weigh<R, 4>(p, values, width, padded / 2, column, o);
        int left = (width - column) / 16;
        if (left == 3) weigh<R, 3>(p, values, width, padded / 2, column, o);
        if (left == 2) weigh<R, 2>(p, values, width, padded / 2, column, o);
        if (left == 1) weigh<R, 1>(p, values, width, padded / 2, column, o);
    }
    for (int r = 0; r < R; r++) {
        __m512 inverse = _mm512_set1_ps(1.f / sum[r]);
        for (int i = 0; i < width; i += 16) {
            __m256i x = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(inverse, _mm512_loadu_ps(o + r * width + i)));
            int count = std::min(16, D - i);
            if (count > 0) _mm256_mask_storeu_epi16(out + r * os + i, (__mmask16)((1u << count) - 1), x);
        }
    }
}

// Units of work number `begin` to `end`, of batch × heads × blocks of UNIT queries.
static void units(const bf16* q, const bf16* k, const bf16* v, bf16* out, const int64_t* strides, int64_t heads,
                  int64_t N, int64_t M, int64_t D, float scale, int64_t begin, int64_t end) {
    int64_t per = (N + UNIT - 1) / UNIT, packed = -1;
    int width = (D + 15) / 16 * 16, keys = (M + 15) / 16 * 16;
    std::vector<bf16> kp((int64_t)keys * D), vp((int64_t)keys * width), p(ROWS * KEYS);
    std::vector<float> s(ROWS * KEYS), o(ROWS * width);
    scale *= 1.4426950409f;
    const int64_t *qs = strides, *ks = strides + 3, *vs = strides + 6, *os = strides + 9;
    for (int64_t unit = begin; unit < end; unit++) {
        int64_t pair = unit / per, b = pair / heads, h = pair % heads, first = unit % per * UNIT;
        if (pair != packed) {
            pack(k + b * ks[0] + h * ks[1], v + b * vs[0] + h * vs[1], ks[2], vs[2], M, D, width, kp.data(), vp.data());
            packed = pair;
        }
        int64_t last = std::min(N, first + UNIT), row = first;
        const bf16* from = q + b * qs[0] + h * qs[1];
        bf16* to = out + b * os[0] + h * os[1];
        for (; row + ROWS <= last; row += ROWS)
            rows<ROWS>(from + row * qs[2], qs[2], kp.data(), vp.data(), M, D, width, scale, to + row * os[2], os[2], s.data(), p.data(), o.data());
        for (; row < last; row++)
            rows<1>(from + row * qs[2], qs[2], kp.data(), vp.data(), M, D, width, scale, to + row * os[2], os[2], s.data(), p.data(), o.data());
    }
}

// `strides`: those of batch, head and token, in elements, of q, k, v and out; channels lie side by side.
extern "C" void attend(const bf16* q, const bf16* k, const bf16* v, bf16* out, const int64_t* strides, int64_t batch,
                       int64_t heads, int64_t N, int64_t M, int64_t D, float scale, int64_t threads) {
    int64_t all = batch * heads * ((N + UNIT - 1) / UNIT);
#pragma omp parallel num_threads(std::min(threads, all))
    {
        int64_t thread, count;
        share(thread, count);
        units(q, k, v, out, strides, heads, N, M, D, scale, all * thread / count, all * (thread + 1) / count);
    }
}
