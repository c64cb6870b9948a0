// 3×3 convolutions of many channels in fp32, by minimal filtering; filters.py beside it calls them.
//
// Tiles of M×M results are computed from P×P pixels by the minimal filtering F(4×4, 3×3) of Lavin and Gray 2015 (arXiv
// 1509.09308): 36 products ("taps") of a tile with weights, in place of 9 · 16. Its points are 0, ±5/8, ±3/2 and ∞, whose
// error is less than half of that of 0, ±1, ±2 and ∞. Tiles are turned a chunk at a time, weights a panel of outputs and DEEP
// channels at a time, which stay in the cache while they are multiplied. Sums over DEEP channels begin at zero, and are
// then added up: that makes the error smaller.
//
// C channels (a multiple of LANES), N outputs (a multiple of PANEL); weights: [panel][C][3][3][PANEL]
#include <algorithm>
#include <cstdint>
#include <memory>

#include "vectors.h"

static const int M = 4, P = 6, TAPS = P * P;
static const float A = .625f, B = 1.5f, A2 = A * A, B2 = B * B;  // points
static const int PANEL = 16, V = PANEL / LANES, ROWS = V == 1 ? 12 : 6;  // ROWS × V sums stay in registers
static const int DEEP = 64, CHUNK = 96, PAD = 16;  // PAD keeps taps, and so their places in the cache, apart
static const int64_t TURNED = 2 << 20;  // numbers of turned tiles, unless a chunk has more

struct Filters {
    const float *x, *weight, *bias, *other;  // bias and other: null, or what is added; other lies as `out`
    float* out;
    int64_t images, height, width, C, N;  // height, width: of out
    int64_t doubled;  // 1: x has half of both, and is read with each pixel doubled; else 0
    int64_t threads;
};

// Of the three transformations of a row or a column the first number is given, and `s` and `t`, the steps to the next.
//
// P pixels, in place
static inline void turn(vec* d, int s) {
    vec one = d[4 * s] - B2 * d[2 * s], two = A * (d[3 * s] - B2 * d[s]);
    vec three = d[4 * s] - A2 * d[2 * s], four = B * (d[3 * s] - A2 * d[s]);
    vec first = d[4 * s] - (A2 + B2) * d[2 * s] + A2 * B2 * d[0];
    vec last = d[5 * s] - (A2 + B2) * d[3 * s] + A2 * B2 * d[s];
    d[0] = first, d[s] = one + two, d[2 * s] = one - two;
    d[3 * s] = three + four, d[4 * s] = three - four, d[5 * s] = last;
}

// P weights of 3
static inline void weigh(const vec* g, int s, vec* u, int t) {
    const float zero = 1 / (A2 * B2), a = 1 / (2 * A2 * (A2 - B2)), b = 1 / (2 * B2 * (B2 - A2));
    vec ea = (g[0] + A2 * g[2 * s]) * a, oa = g[s] * (A * a), eb = (g[0] + B2 * g[2 * s]) * b, ob = g[s] * (B * b);
    u[0] = g[0] * zero, u[t] = ea + oa, u[2 * t] = ea - oa;
    u[3 * t] = eb + ob, u[4 * t] = eb - ob, u[5 * t] = g[2 * s];
}

// M results of P sums
static inline void turn_back(const vec* m, int s, vec* y, int t) {
    vec a = m[s] + m[2 * s], b = m[s] - m[2 * s], c = m[3 * s] + m[4 * s], d = m[3 * s] - m[4 * s];
    y[0] = m[0] + a + c;
    y[t] = A * b + B * d;
    y[2 * t] = A2 * a + B2 * c;
    y[3 * t] = A * A2 * b + B * B2 * d + m[5 * s];
}

struct FilterRun {
    static const int64_t UP = DEEP * PANEL + PAD;  // numbers of a tap's weights
    const Filters& a;
    int64_t high, wide, tiles, blocks, chunks, chunk;  // tiles of an image's height and width; blocks of DEEP channels
    int64_t XP, SP;  // numbers of a tap's turned tiles, of its sums

    FilterRun(const Filters& a) : a(a) {
        high = (a.height + M - 1) / M, wide = (a.width + M - 1) / M;
        tiles = a.images * high * wide, blocks = (a.C + DEEP - 1) / DEEP;
        chunks = (tiles + CHUNK - 1) / CHUNK;
        chunk = ((tiles + chunks - 1) / chunks + ROWS - 1) / ROWS * ROWS;
        XP = chunk * DEEP + PAD, SP = chunk * PANEL + PAD;
    }

    void place(int64_t tile, int64_t& image, int64_t& top, int64_t& left) const {
        image = tile / (high * wide), top = tile / wide % high * M, left = tile % wide * M;
    }

    // a chunk's turned tiles: [block of channels][tap][tile][DEEP]
    void turn(float* to, int64_t tile) const {
        int64_t image, top, left, h = a.height >> a.doubled, w = a.width >> a.doubled;
        place(tile, image, top, left);
        const float* from[P][P];
        for (int i = 0; i < P; i++)
            for (int j = 0; j < P; j++) {
                int64_t y = top + i - 1, x = left + j - 1;
                bool inside = y >= 0 && y < a.height && x >= 0 && x < a.width;
                from[i][j] = inside ? a.x + ((image * h + (y >> a.doubled)) * w + (x >> a.doubled)) * a.C : nullptr;
            }
        for (int64_t c = 0; c < a.C; c += LANES) {
            vec d[P][P];
            for (int i = 0; i < P; i++)
                for (int j = 0; j < P; j++) d[i][j] = from[i][j] ? load(from[i][j] + c) : (vec){};
#pragma GCC unroll 6
            for (int j = 0; j < P; j++) ::turn(&d[0][j], P);
#pragma GCC unroll 6
            for (int i = 0; i < P; i++) ::turn(&d[i][0], 1);
            float* at = to + c / DEEP * TAPS * XP + c % DEEP;
            for (int i = 0; i < TAPS; i++) store(at + i * XP, d[i / P][i % P]);
        }
    }

    // weights of `count` channels: [tap][channel][PANEL]
    static void weigh(const float* weight, float* u, int count) {
        for (int k = 0; k < count; k++)
            for (int v = 0; v < V; v++) {
                vec g[3][3], h[P][3], r[P][P];
                for (int i = 0; i < 9; i++) g[i / 3][i % 3] = load(weight + (k * 9 + i) * PANEL + v * LANES);
#pragma GCC unroll 3
                for (int j = 0; j < 3; j++) ::weigh(&g[0][j], 3, &h[0][j], 3);
#pragma GCC unroll 6
                for (int i = 0; i < P; i++) ::weigh(&h[i][0], 1, &r[i][0], 1);
                for (int i = 0; i < TAPS; i++) store(u + i * UP + k * PANEL + v * LANES, r[i / P][i % P]);
            }
    }

    // sums of ROWS tiles += (or =, if first) products of `count` channels with weights
    static inline void multiply(const float* x, const float* u, float* sums, int count, bool first) {
        vec total[ROWS][V];
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < V; j++) total[r][j] = (vec){};
#pragma GCC unroll 2
        for (int k = 0; k < count; k++) {
            vec w[V];
#pragma GCC unroll 4
            for (int j = 0; j < V; j++) w[j] = load(u + k * PANEL + j * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                vec value = all(x[r * DEEP + k]);
#pragma GCC unroll 4
                for (int j = 0; j < V; j++) total[r][j] += value * w[j];
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < V; j++) {
                float* at = sums + r * PANEL + j * LANES;
                store(at, first ? total[r][j] : load(at) + total[r][j]);
            }
    }

    // a tile's sums [tap][PANEL] as outputs n to n + PANEL of its pixels
    void turn_back(const float* sums, int64_t tile, int64_t n) const {
        int64_t image, top, left;
        place(tile, image, top, left);
        for (int v = 0; v < V; v++) {
            vec m[P][P], h[M][P], y[M][M], bias = a.bias ? load(a.bias + n + v * LANES) : (vec){};
            for (int i = 0; i < TAPS; i++) m[i / P][i % P] = load(sums + i * SP + v * LANES);
#pragma GCC unroll 6
            for (int j = 0; j < P; j++) ::turn_back(&m[0][j], P, &h[0][j], P);
#pragma GCC unroll 4
            for (int i = 0; i < M; i++) ::turn_back(&h[i][0], 1, &y[i][0], 1);
            for (int i = 0; i < M; i++)
                for (int j = 0; j < M; j++) {
                    if (top + i >= a.height || left + j >= a.width) continue;
                    int64_t at = ((image * a.height + top + i) * a.width + left + j) * a.N + n + v * LANES;
                    vec value = y[i][j] + bias;
                    if (a.other) value += load(a.other + at);
                    store(a.out + at, value);
                }
        }
    }

    // the outputs of a panel for a chunk of tiles; u and sums are room. Of the last ROWS tiles some may be none: what is
    // computed of them is not read
    void unit(const float* turned, int64_t first, int64_t panel, float* u, float* sums) const {
        int count = std::min(chunk, tiles - first);
        const float* weight = a.weight + panel * a.C * 9 * PANEL;
        for (int64_t block = 0; block < blocks; block++) {
            int deep = std::min<int64_t>(DEEP, a.C - block * DEEP);
            weigh(weight + block * DEEP * 9 * PANEL, u, deep);
            const float* x = turned + block * TAPS * XP;
            for (int tap = 0; tap < TAPS; tap++)
                for (int row = 0; row < count; row += ROWS)
                    multiply(x + tap * XP + row * DEEP, u + tap * UP, sums + tap * SP + row * PANEL, deep, !block);
        }
        for (int i = 0; i < count; i++) turn_back(sums + i * PANEL, first + i, panel * PANEL);
    }

    void run() const {
        int64_t size = blocks * TAPS * XP, panels = a.N / PANEL;
        int64_t most = std::min(chunks, std::max<int64_t>(1, TURNED / size));  // chunks at a time
        std::unique_ptr<float[]> turned(new float[most * size]);
#pragma omp parallel num_threads(a.threads)
        {
            std::unique_ptr<float[]> u(new float[TAPS * UP]), sums(new float[TAPS * SP]);
            for (int64_t begin = 0; begin < chunks; begin += most) {
                int64_t here = std::min(most, chunks - begin), from = begin * chunk;
#pragma omp for schedule(static)
                for (int64_t tile = from; tile < std::min(tiles, from + here * chunk); tile++)
                    turn(turned.get() + (tile - from) / chunk * size + tile % chunk * DEEP, tile);
#pragma omp for schedule(dynamic)
                for (int64_t one = 0; one < here * panels; one++)
                    unit(turned.get() + one % here * size, from + one % here * chunk, one / here, u.get(), sums.get());
            }
        }
    }
};

extern "C" void filter_many_float32(const Filters* a) { FilterRun(*a).run(); }
extern "C" int64_t panel() { return PANEL; }
