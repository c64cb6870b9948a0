// Layers of a U-Net that read and write memory once, with sums in fp32; layers.py beside it calls them.
//
// Images lie channels last: C channels of a pixel side by side, P pixels of an image, B images. T: float or bf16.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"

static const int64_t BLOCK = 64;  // pixels summed in fp32 before the sum is added to that in fp64

// e^-x, without overflow
static inline vec decay(vec x) {
    x = x < all(-80.f) ? all(-80.f) : x;
    return power(x * -1.4426950409f);
}

// 1 / x, to about 2^-23 of it, for x that are not extreme
static inline vec inverse(vec x) {
#ifdef __AVX512F__
    vec y = (vec)_mm512_rcp14_ps((__m512)x);
    return y * (2.f - x * y);
#else
    return 1.f / x;
#endif
}

static inline vec silu(vec x) { return x * inverse(1.f + decay(x)); }

// Φ(x), the normal distribution; Abramowitz and Stegun 1964, 7.1.26, to 1.5e-7
static inline vec normal(vec x) {
    vec z = (x < (vec){} ? -x : x) * 0.70710678f;
    vec t = inverse(1.f + 0.3275911f * z);
    vec y = 1.061405429f * t - 1.453152027f;
    y = y * t + 1.421413741f;
    y = y * t - 0.284496736f;
    y = y * t + 0.254829592f;
    vec tail = y * t * 0.5f * decay(z * z);  // the smaller tail
    return x < (vec){} ? tail : 1.f - tail;
}

// For each channel, the sums of x - x0 and of its square over some pixels; x0 is the image's first pixel.
template <class T>
static void moments(const T* first, const T* x, int64_t pixels, int64_t C, double* sums) {
    for (int64_t begin = 0; begin < pixels; begin += BLOCK) {
        int64_t end = std::min(pixels, begin + BLOCK);
        for (int64_t c = 0; c < C; c += 2 * LANES) {
            int64_t left[2] = {C - c, C - c - LANES};
            vec sum[2] = {}, square[2] = {}, x0[2];
            for (int j = 0; j < 2; j++) x0[j] = load(first + c + LANES * j, left[j]);
            if (left[1] >= LANES)
                for (int64_t p = begin; p < end; p++)
                    for (int j = 0; j < 2; j++) {
                        vec d = load(x + p * C + c + LANES * j) - x0[j];
                        sum[j] += d;
                        square[j] += d * d;
                    }
            else
                for (int64_t p = begin; p < end; p++)
                    for (int j = 0; j < 2; j++) {
                        vec d = load(x + p * C + c + LANES * j, left[j]) - x0[j];
                        sum[j] += d;
                        square[j] += d * d;
                    }
            for (int64_t i = 0; i < std::min<int64_t>(2 * LANES, C - c); i++) {
                sums[c + i] += sum[i / LANES][i % LANES];
                sums[C + c + i] += square[i / LANES][i % LANES];
            }
        }
    }
}

// What each channel is multiplied by, and what is added: scale[C], then shift[C]. `offset` is part of what is normalised.
template <class T>
static void scales(const double* sums, const T* first, const T* offset, const T* weight, const T* bias, int64_t P,
                   int64_t C, int64_t groups, double eps, float* out) {
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

template <class T>
static void scaled(const T* from, T* to, const float* factors, int64_t pixels, int64_t C, bool activate) {
    for (int64_t p = 0; p < pixels; p++)
        for (int64_t c = 0; c < C; c += LANES) {
            int64_t left = C - c;
            vec y = load(from + p * C + c, left) * load(factors + c, left) + load(factors + C + c, left);
            store(to + p * C + c, activate ? silu(y) : y, left);
        }
}

struct GroupNorm {  // silu(group norm(x + offset)), x and out (B, P, C), offset (B, C) or null
    const void *x, *offset, *weight, *bias;
    void* out;
    int64_t B, P, C, groups;
    double eps;
    int64_t activate, threads;  // without `activate`, the norm alone
};

template <class T>
static void group_norm(const GroupNorm& a) {
    int64_t P = a.P, C = a.C;
    std::vector<double> sums(a.threads * 2 * C);
    std::vector<float> factors(2 * C);
    for (int64_t b = 0; b < a.B; b++) {
        const T* from = (const T*)a.x + b * P * C;
        T* to = (T*)a.out + b * P * C;
        std::fill(sums.begin(), sums.end(), 0.0);
#pragma omp parallel num_threads(a.threads)
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
                const T* offset = a.offset ? (const T*)a.offset + b * C : nullptr;
                scales(sums.data(), from, offset, (const T*)a.weight, (const T*)a.bias, P, C, a.groups, a.eps,
                       factors.data());
            }
            scaled(from + begin * C, to + begin * C, factors.data(), end - begin, C, a.activate);
        }
    }
}

extern "C" void group_norm_float32(const GroupNorm* a) { group_norm<float>(*a); }
extern "C" void group_norm_bfloat16(const GroupNorm* a) { group_norm<bf16>(*a); }

struct GEGLU {  // y[:, :C] · gelu(y[:, C:]), where y is x and a bias, rows of 2 C numbers
    const void *x, *bias;
    void* out;
    int64_t rows, C, threads;
};

template <class T>
static void geglu(const GEGLU& a) {
    int64_t C = a.C;
#pragma omp parallel for num_threads(a.threads)
    for (int64_t r = 0; r < a.rows; r++) {
        const T *value = (const T*)a.x + r * 2 * C, *gate = value + C, *bias = (const T*)a.bias;
        T* out = (T*)a.out + r * C;
        for (int64_t c = 0; c < C; c += LANES) {
            int64_t left = C - c;
            vec v = load(value + c, left) + load(bias + c, left);
            vec g = load(gate + c, left) + load(bias + C + c, left);
            store(out + c, v * (g * normal(g)), left);
        }
    }
}

extern "C" void geglu_float32(const GEGLU* a) { geglu<float>(*a); }
extern "C" void geglu_bfloat16(const GEGLU* a) { geglu<bf16>(*a); }

struct LayerNorm {  // each of the rows of C numbers
    const void *x, *weight, *bias;
    void* out;
    int64_t rows, C;
    double eps;
    int64_t threads;
};

template <class T>
static void layer_norm(const LayerNorm& a) {
    int64_t C = a.C;
#pragma omp parallel for num_threads(a.threads)
    for (int64_t r = 0; r < a.rows; r++) {
        const T *x = (const T*)a.x + r * C, *weight = (const T*)a.weight, *bias = (const T*)a.bias;
        T* out = (T*)a.out + r * C;
        vec total = {}, square = {};
        for (int64_t c = 0; c < C; c += LANES) total += load(x + c, C - c);
        float mean = sum(total) / C;
        for (int64_t c = 0; c < C; c += LANES) {
            vec d = load(x + c, C - c) - mean;
            if (C - c < LANES)
                for (int64_t i = C - c; i < LANES; i++) d[i] = 0;
            square += d * d;
        }
        float gain = 1 / std::sqrt(sum(square) / C + (float)a.eps);
        for (int64_t c = 0; c < C; c += LANES) {
            int64_t left = C - c;
            store(out + c, (load(x + c, left) - mean) * gain * load(weight + c, left) + load(bias + c, left), left);
        }
    }
}

extern "C" void layer_norm_float32(const LayerNorm* a) { layer_norm<float>(*a); }
extern "C" void layer_norm_bfloat16(const LayerNorm* a) { layer_norm<bf16>(*a); }

struct Sum {  // a + b
    const void *a, *b;
    void* out;
    int64_t count, threads;
};

template <class T>
static void add(const Sum& a) {
#pragma omp parallel for num_threads(a.threads)
    for (int64_t i = 0; i < a.count; i += LANES) {
        int64_t left = a.count - i;
        store((T*)a.out + i, load((const T*)a.a + i, left) + load((const T*)a.b + i, left), left);
    }
}

extern "C" void add_float32(const Sum* a) { add<float>(*a); }
extern "C" void add_bfloat16(const Sum* a) { add<bf16>(*a); }

struct SiLU {
    const void* x;
    void* out;
    int64_t count, threads;
};

template <class T>
static void activate(const SiLU& a) {
#pragma omp parallel for num_threads(a.threads)
    for (int64_t i = 0; i < a.count; i += LANES)
        store((T*)a.out + i, silu(load((const T*)a.x + i, a.count - i)), a.count - i);
}

extern "C" void silu_float32(const SiLU* a) { activate<float>(*a); }
extern "C" void silu_bfloat16(const SiLU* a) { activate<bf16>(*a); }

struct Joined {  // rows of a and of b side by side; lengths in bytes
    const char *a, *b;
    char* out;
    int64_t rows, first, second;
};

static void join(const Joined& a) {
    for (int64_t r = 0; r < a.rows; r++) {
        char* out = a.out + r * (a.first + a.second);
        std::memcpy(out, a.a + r * a.first, a.first);
        std::memcpy(out + a.first, a.b + r * a.second, a.second);
    }
}

extern "C" void join_float32(const Joined* a) { join(*a); }
extern "C" void join_bfloat16(const Joined* a) { join(*a); }
