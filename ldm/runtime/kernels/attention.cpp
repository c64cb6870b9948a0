// softmax(q kᵀ · scale) v with sums in fp32; attention.py beside it calls it.
//
// Queries are taken ROWS at a time, keys KEYS at a time, and the softmax is the running one of Milakov and Gimelshein
// 2018 (arXiv 1805.02867): scores never leave the cache. Where the processor multiplies bf16, two neighbouring numbers
// of a row are one operand: keys are packed pair by pair over channels, and values pair by pair over keys.
//
// N queries, M keys, D channels of a head; width: D rounded up to whole vectors; U: the operand of a product (vectors.h);
// T: float or bf16, what lies in memory
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "vectors.h"

static const int ROWS = 6, KEYS = 256, UNIT = 96;  // UNIT: queries of a unit of work

static inline void copy(const float* from, float* to, int count) { std::memcpy(to, from, count * sizeof(float)); }
static inline void copy(const bf16* from, bf16* to, int count) { std::memcpy(to, from, count * sizeof(bf16)); }
static inline void copy(const bf16* from, float* to, int count) {
    for (int i = 0; i < count; i++) to[i] = number(from[i]);
}

// keys to [key / LANES][D / PER][LANES][PER]; values to [key / PER][width][PER]; what is padded is zero
template <class U, class T>
static void pack(const T* k, const T* v, int64_t ks, int64_t vs, int M, int D, int width, typename U::T* kp,
                 typename U::T* vp) {
    const int PER = U::PER;
    int padded = (M + LANES - 1) / LANES * LANES;
    std::vector<typename U::T> row(std::max(D, width));
    for (int key = 0; key < padded; key++) {
        if (key < M)
            copy(k + key * ks, row.data(), D);
        else
            std::fill(row.begin(), row.end(), 0);
        typename U::T* to = kp + (int64_t)(key / LANES) * D * LANES + key % LANES * PER;
        for (int d = 0; d < D; d += PER)
            for (int i = 0; i < PER; i++) to[d * LANES + i] = row[d + i];
    }
    for (int key = 0; key < padded; key++) {
        std::fill(row.begin(), row.end(), 0);
        if (key < M) copy(v + key * vs, row.data(), D);
        typename U::T* to = vp + (int64_t)(key / PER) * width * PER + key % PER;
        for (int d = 0; d < width; d++) to[d * PER] = row[d];
    }
}

// scores of R queries with V · LANES keys from `base`: s[R][KEYS]
template <class U, int R, int V>
static inline void score(const typename U::T* q, int64_t qs, const typename U::T* base, int D, float* s) {
    const int64_t step = (int64_t)D * LANES;
    vec total[R][V] = {};
    for (int d = 0; d < D; d += U::PER) {
        vec k[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) k[j] = U::read(base + j * step + d * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            vec x = U::every(q + r * qs + d);
#pragma GCC unroll 4
            for (int j = 0; j < V; j++) total[r][j] = U::more(total[r][j], x, k[j]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < V; j++) store(s + r * KEYS + j * LANES, total[r][j]);
}

// scores of R queries with some keys, a multiple of LANES: s[R][KEYS]
template <class U, int R>
static inline void scores(const typename U::T* q, int64_t qs, const typename U::T* kp, int D, int keys, float* s) {
    int first = 0;
    for (; first + WIDE * LANES <= keys; first += WIDE * LANES) score<U, R, WIDE>(q, qs, kp + first * D, D, s + first);
    for (; first < keys; first += LANES) score<U, R, 1>(q, qs, kp + first * D, D, s + first);
}

// o[R][W · LANES columns] += weights p[R][KEYS] times values
template <class U, int R, int W>
static inline void weigh(const typename U::T* p, const typename U::T* vp, int width, int keys, int column, float* o) {
    vec total[R][W];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < W; j++) total[r][j] = load(o + r * width + column + j * LANES);
    for (int key = 0; key < keys; key += U::PER) {
        const typename U::T* row = vp + (int64_t)key * width + column * U::PER;
        vec v[W];
#pragma GCC unroll 4
        for (int j = 0; j < W; j++) v[j] = U::read(row + j * LANES * U::PER);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            vec x = U::every(p + r * KEYS + key);
#pragma GCC unroll 4
            for (int j = 0; j < W; j++) total[r][j] = U::more(total[r][j], x, v[j]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < W; j++) store(o + r * width + column + j * LANES, total[r][j]);
}

// the weights p of one query from its scores, those from `keys` on being padding; its highest score and sum so far
template <class W>
static inline float weights(float* scores, int keys, int padded, float scale, float& top, float& total, W* p) {
    for (int i = keys; i < padded; i++) scores[i] = -INFINITY;
    vec most = all(-INFINITY), found = {};
    for (int i = 0; i < padded; i += LANES) most = larger(most, load(scores + i));
    float best = std::max(top, largest(most) * scale);
    for (int i = 0; i < padded; i += LANES) {
        vec x = load(scores + i);
        vec e = x == all(-INFINITY) ? (vec){} : power(x * scale - best);
        found += e;
        store(p + i, e);
    }
    float shrink = std::exp2(top - best);
    total = total * shrink + sum(found);
    top = best;
    return shrink;
}

// What a thread works with.
template <class U>
struct Room {
    std::vector<typename U::T> q, kp, vp, p;
    std::vector<float> s, o;

    Room(int keys, int D, int width)
        : q(ROWS * D), kp((int64_t)keys * D), vp((int64_t)keys * width), p(ROWS * KEYS), s(ROWS * KEYS), o(ROWS * width) {}
};

// R queries with all keys
template <class U, int R, class T>
static void rows(const T* from, int64_t qs, int M, int D, int width, float scale, T* out, int64_t os, Room<U>& room) {
    typename U::T *q = room.q.data(), *p = room.p.data();
    float *s = room.s.data(), *o = room.o.data(), top[R], total[R] = {};
    for (int r = 0; r < R; r++) {
        copy(from + r * qs, q + r * D, D);
        top[r] = -INFINITY;
    }
    std::memset(o, 0, sizeof(float) * R * width);
    for (int first = 0; first < M; first += KEYS) {
        int keys = std::min(KEYS, M - first), padded = (keys + LANES - 1) / LANES * LANES;
        scores<U, R>(q, D, room.kp.data() + (int64_t)first * D, D, padded, s);
        for (int r = 0; r < R; r++) {
            float shrink = weights(s + r * KEYS, keys, padded, scale, top[r], total[r], p + r * KEYS);
            if (first && shrink != 1)
                for (int i = 0; i < width; i += LANES) store(o + r * width + i, load(o + r * width + i) * shrink);
        }
        const typename U::T* values = room.vp.data() + (int64_t)first * width;
        int column = 0;
        for (; column + WIDE * LANES <= width; column += WIDE * LANES)
            weigh<U, R, WIDE>(p, values, width, padded, column, o);
        int left = (width - column) / LANES;
        if (left == 3) weigh<U, R, 3>(p, values, width, padded, column, o);
        if (left == 2) weigh<U, R, 2>(p, values, width, padded, column, o);
        if (left == 1) weigh<U, R, 1>(p, values, width, padded, column, o);
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < width; i += LANES)
            store(out + r * os + i, load(o + r * width + i) * (1 / total[r]), D - i);
}

struct Attention {  // strides: those of batch, head and token, in numbers, of q, k, v and out; channels lie side by side
    const void *q, *k, *v;
    void* out;
    int64_t qs[3], ks[3], vs[3], os[3];
    int64_t batch, heads, N, M, D;
    double scale;
    int64_t threads;
};

// Units of work number `begin` to `end`, of batch × heads × blocks of UNIT queries.
template <class U, class T>
static void units(const Attention& a, int64_t begin, int64_t end) {
    int64_t per = (a.N + UNIT - 1) / UNIT, packed = -1;
    int M = a.M, D = a.D, width = (D + LANES - 1) / LANES * LANES;
    Room<U> room((M + LANES - 1) / LANES * LANES, D, width);
    float scale = a.scale * 1.4426950408889634;
    for (int64_t unit = begin; unit < end; unit++) {
        int64_t pair = unit / per, b = pair / a.heads, h = pair % a.heads, first = unit % per * UNIT;
        if (pair != packed) {
            pack<U>((const T*)a.k + b * a.ks[0] + h * a.ks[1], (const T*)a.v + b * a.vs[0] + h * a.vs[1], a.ks[2],
                    a.vs[2], M, D, width, room.kp.data(), room.vp.data());
            packed = pair;
        }
        int64_t last = std::min(a.N, first + UNIT), row = first;
        const T* from = (const T*)a.q + b * a.qs[0] + h * a.qs[1];
        T* to = (T*)a.out + b * a.os[0] + h * a.os[1];
        for (; row + ROWS <= last; row += ROWS)
            rows<U, ROWS>(from + row * a.qs[2], a.qs[2], M, D, width, scale, to + row * a.os[2], a.os[2], room);
        for (; row < last; row++)
            rows<U, 1>(from + row * a.qs[2], a.qs[2], M, D, width, scale, to + row * a.os[2], a.os[2], room);
    }
}

template <class U, class T>
static void attend(const Attention& a) {
    int64_t all = a.batch * a.heads * ((a.N + UNIT - 1) / UNIT);
#pragma omp parallel num_threads(std::min(a.threads, all))
    {
        int64_t thread, count;
        share(thread, count);
        units<U, T>(a, all * thread / count, all * (thread + 1) / count);
    }
}

extern "C" void attend_float32(const Attention* a) { attend<Single, float>(*a); }
#ifdef __AVX512BF16__
extern "C" void attend_bfloat16(const Attention* a) { attend<Double, bf16>(*a); }
#else
extern "C" void attend_bfloat16(const Attention* a) { attend<Single, bf16>(*a); }
#endif
