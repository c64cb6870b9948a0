// Convolutions and linear layers with few outputs, as products of pixels and weights; products.py beside it calls them.
//
// Images lie channels last. A product is computed CHUNK pixels and a panel of WIDE vectors of outputs at a time; sums of
// ROWS pixels stay in registers while the channels under some taps of the convolution are gone through. A linear layer is
// a convolution with one tap. A 3×3 convolution in fp32 is computed by the minimal filtering F(2×2, 3×3) of Lavin and
// Gray 2015 (arXiv 1509.09308): 16 products of a quarter of the pixels, in place of 9 of all.
//
// C channels (a multiple of PER), N outputs; weights: [panel][tap][C / PER][vectors of the panel][LANES][PER], outputs
// padded with zeros to whole vectors
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.h"

static const int ROWS = 6, CHUNK = 48, DEPTH = 384;  // DEPTH: numbers of a pixel, under some taps, gone through at a time

struct Product {
    const void *x, *weight, *bias, *other;  // bias and other: null, or what is added; other lies as `out`
    void* out;
    int64_t images, height, width, C;  // of x
    int64_t high, wide;  // the pixels of an image that are computed
    int64_t down, across, stride, top, left;  // taps; padding
    int64_t spread, row, column;  // pixel (y, x) of those computed is pixel (spread y + row, spread x + column) of out
    int64_t N, threads;
};

// Where in x the pixels of a chunk begin, and their places in out.
template <class T>
struct Pixels {
    const Product& a;
    const T* zeros;
    int count;
    int64_t image[CHUNK], out[CHUNK];
    int y[CHUNK], x[CHUNK];

    Pixels(const Product& a, const T* zeros, int64_t first) : a(a), zeros(zeros) {
        count = std::min<int64_t>(CHUNK, a.images * a.high * a.wide - first);
        for (int i = 0; i < CHUNK; i++) {
            int64_t pixel = first + std::min(i, count - 1), from = pixel / (a.high * a.wide);
            int row = pixel / a.wide % a.high, column = pixel % a.wide;
            image[i] = from * a.height * a.width;
            out[i] = (from * a.high * a.spread + row * a.spread + a.row) * a.wide * a.spread + column * a.spread + a.column;
            y[i] = row * a.stride - a.top;
            x[i] = column * a.stride - a.left;
        }
    }

    // what lies under a tap for pixel number i
    const T* under(int i, int down, int across) const {
        int row = y[i] + down, column = x[i] + across;
        bool inside = (unsigned)row < (unsigned)a.height && (unsigned)column < (unsigned)a.width;
        return inside ? (const T*)a.x + (image[i] + (int64_t)row * a.width + column) * a.C : zeros;
    }
};

// sums[ROWS][V vectors] += products of channels `begin` to `end` under taps `first` to `last` with weights
template <class U, int V>
static inline void tile(const Pixels<typename U::T>& pixels, int pixel, int first, int last, int begin, int end,
                        const typename U::T* weight, float* sums) {
    vec total[ROWS][V];
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < V; j++) total[r][j] = load(sums + (r * V + j) * LANES);
    for (int tap = first; tap < last; tap++) {
        const typename U::T* x[ROWS];
        for (int r = 0; r < ROWS; r++)
            x[r] = pixels.under(pixel + r, tap / pixels.a.across, tap % pixels.a.across);
        for (int c = begin; c < end; c += U::PER, weight += V * LANES * U::PER) {
            vec w[V];
#pragma GCC unroll 4
            for (int j = 0; j < V; j++) w[j] = U::read(weight + j * LANES * U::PER);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                vec value = U::every(x[r] + c);
#pragma GCC unroll 4
                for (int j = 0; j < V; j++) total[r][j] = U::more(total[r][j], value, w[j]);
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < V; j++) store(sums + (r * V + j) * LANES, total[r][j]);
}

// sums[CHUNK][V vectors] of a chunk of pixels with a panel of weights
template <class U, int V>
static void panel(const Pixels<typename U::T>& pixels, const typename U::T* weight, float* sums) {
    const int C = pixels.a.C, taps = pixels.a.down * pixels.a.across;
    const int many = std::max(1, DEPTH / C), deep = C > DEPTH ? DEPTH : C;
    std::memset(sums, 0, sizeof(float) * CHUNK * V * LANES);
    for (int tap = 0; tap < taps; tap += many)
        for (int c = 0; c < C; c += deep) {
            int last = std::min(taps, tap + many), end = std::min(C, c + deep);
            for (int i = 0; i < pixels.count; i += ROWS)
                tile<U, V>(pixels, i, tap, last, c, end, weight, sums + i * V * LANES);
            weight += (int64_t)(last - tap) * (end - c) * V * LANES;
        }
}

template <class U>
static void panel(int vectors, const Pixels<typename U::T>& pixels, const typename U::T* weight, float* sums) {
    if (vectors == 1) panel<U, 1>(pixels, weight, sums);
    if (vectors == 2) panel<U, 2>(pixels, weight, sums);
    if (WIDE > 2 && vectors == 3) panel<U, WIDE - 1>(pixels, weight, sums);
    if (WIDE > 2 && vectors == 4) panel<U, WIDE>(pixels, weight, sums);
}

template <class T>
static void finish(const Product& a, const Pixels<T>& pixels, int output, int vectors, const float* sums) {
    for (int i = 0; i < pixels.count; i++)
        for (int j = 0; j < vectors; j++) {
            int64_t n = output + j * LANES, left = a.N - n, place = pixels.out[i] * a.N + n;
            vec value = load(sums + (i * vectors + j) * LANES);
            if (a.bias) value += load((const T*)a.bias + n, left);
            if (a.other) value += load((const T*)a.other + place, left);
            store((T*)a.out + place, value, left);
        }
}

template <class U>
static void product(const Product& a) {
    typedef typename U::T T;
    int64_t chunks = (a.images * a.high * a.wide + CHUNK - 1) / CHUNK, vectors = (a.N + LANES - 1) / LANES;
    int64_t units = chunks * ((vectors + WIDE - 1) / WIDE);
    std::vector<T> zeros(a.C);
#pragma omp parallel num_threads(std::min(a.threads, units))
    {
        float sums[CHUNK * WIDE * LANES];
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < units; unit++) {
            int64_t first = unit / chunks * WIDE, count = std::min<int64_t>(WIDE, vectors - first);
            Pixels<T> pixels(a, zeros.data(), unit % chunks * CHUNK);
            const T* weight = (const T*)a.weight + first * LANES * a.down * a.across * a.C;
            panel<U>(count, pixels, weight, sums);
            finish<T>(a, pixels, first * LANES, count, sums);
        }
    }
}

extern "C" void product_float32(const Product* a) { product<Single>(*a); }
#ifdef __AVX512BF16__
extern "C" void product_bfloat16(const Product* a) { product<Double>(*a); }
#endif

// --- 3×3 convolutions by minimal filtering ---------------------------------------------------------------------------

struct Filtering {  // weights: 16 matrices, each as those of a product with one tap
    const float *x, *weight, *bias, *other;
    float *out, *turned, *sums;  // turned: [16][tiles][C]; sums: [16][tiles][N padded]
    int64_t images, height, width, C, N, threads;
};

// Bᵀ d B of 4×4 pixels
static inline void turn(vec d[4][4]) {
    for (int i = 0; i < 4; i++) {
        vec a = d[0][i] - d[2][i], b = d[1][i] + d[2][i], c = d[2][i] - d[1][i], e = d[1][i] - d[3][i];
        d[0][i] = a, d[1][i] = b, d[2][i] = c, d[3][i] = e;
    }
    for (int i = 0; i < 4; i++) {
        vec a = d[i][0] - d[i][2], b = d[i][1] + d[i][2], c = d[i][2] - d[i][1], e = d[i][1] - d[i][3];
        d[i][0] = a, d[i][1] = b, d[i][2] = c, d[i][3] = e;
    }
}

static void turn_tile(const Filtering& a, int64_t tiles, int64_t tile, int64_t image, int64_t top, int64_t left) {
    for (int64_t c = 0; c < a.C; c += LANES) {
        vec d[4][4];
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) {
                int64_t y = top + i, x = left + j;
                bool inside = y >= 0 && y < a.height && x >= 0 && x < a.width;
                d[i][j] = inside ? load(a.x + ((image * a.height + y) * a.width + x) * a.C + c, a.C - c) : (vec){};
            }
        turn(d);
        for (int i = 0; i < 16; i++) store(a.turned + (i * tiles + tile) * a.C + c, d[i / 4][i % 4], a.C - c);
    }
}

// Aᵀ m A of the 16 sums of a tile, with what is added
static void turn_back(const Filtering& a, int64_t tiles, int64_t tile, int64_t image, int64_t top, int64_t left) {
    int64_t padded = (a.N + LANES - 1) / LANES * LANES;
    for (int64_t n = 0; n < a.N; n += LANES) {
        vec m[2][4], bias = a.bias ? load(a.bias + n, a.N - n) : (vec){};
        for (int j = 0; j < 4; j++) {
            vec d[4];
            for (int i = 0; i < 4; i++) d[i] = load(a.sums + ((i * 4 + j) * tiles + tile) * padded + n);
            m[0][j] = d[0] + d[1] + d[2];
            m[1][j] = d[1] - d[2] - d[3];
        }
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 2; j++) {
                int64_t y = top + i, x = left + j, place = ((image * a.height + y) * a.width + x) * a.N + n;
                if (y >= a.height || x >= a.width) continue;
                vec value = bias + (j ? m[i][1] - m[i][2] - m[i][3] : m[i][0] + m[i][1] + m[i][2]);
                if (a.other) value += load(a.other + place, a.N - n);
                store(a.out + place, value, a.N - n);
            }
    }
}

extern "C" void filter_float32(const Filtering* given) {
    const Filtering& a = *given;
    int64_t high = (a.height + 1) / 2, wide = (a.width + 1) / 2, tiles = a.images * high * wide;
    int64_t vectors = (a.N + LANES - 1) / LANES, panels = (vectors + WIDE - 1) / WIDE;
    int64_t chunks = (tiles + CHUNK - 1) / CHUNK;
    std::vector<float> zeros(a.C);
#pragma omp parallel num_threads(a.threads)
    {
        float sums[CHUNK * WIDE * LANES];
#pragma omp for
        for (int64_t tile = 0; tile < tiles; tile++)
            turn_tile(a, tiles, tile, tile / (high * wide), tile / wide % high * 2 - 1, tile % wide * 2 - 1);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < 16 * panels * chunks; unit++) {
            int64_t matrix = unit / (panels * chunks), first = unit / chunks % panels * WIDE;
            int64_t count = std::min<int64_t>(WIDE, vectors - first), begin = unit % chunks * CHUNK;
            Product p = {};
            p.x = a.turned + matrix * tiles * a.C;
            p.images = p.height = p.high = p.down = p.across = p.stride = p.spread = 1;
            p.width = p.wide = tiles;
            p.C = a.C;
            Pixels<float> pixels(p, zeros.data(), begin);
            panel<Single>(count, pixels, a.weight + (matrix * vectors + first) * LANES * a.C, sums);
            for (int i = 0; i < pixels.count; i++)
                std::memcpy(a.sums + ((matrix * tiles + begin + i) * vectors + first) * LANES,
                            sums + i * count * LANES, count * LANES * sizeof(float));
        }
#pragma omp for
        for (int64_t tile = 0; tile < tiles; tile++)
            turn_back(a, tiles, tile, tile / (high * wide), tile / wide % high * 2, tile % wide * 2);
    }
}
