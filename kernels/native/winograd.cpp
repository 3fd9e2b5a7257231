// The 3x3 convolution by Winograd's algorithm: between a fourth and half of a direct one's multiply-adds, in float32.
// Tensors are [images, height, width, channels]. A convolution's tiles go in blocks through three steps: each tile of
// inputs becomes (M + 2)^2 values a channel, of which each is a matrix product of its own, and back to outputs.
#include <algorithm>
#include <vector>

#include "parallel.hpp"
#include "winograd_tiles.hpp"

namespace {

using T = DTYPE;

// accumulators of a product: ROWS rows of two vectors, as many as registers hold beside the operands
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 12;
#else
constexpr int ROWS = 6;
#endif
constexpr int COLUMNS = 2 * LANES;
// channels whose tiles lie beside each other where sums are over tiles: a multiple of ROWS and of LANES
constexpr int PANEL = 3 * LANES;
static_assert(PANEL % ROWS == 0);

// floats between rows: an odd number of cache lines, or rows a power of two apart would share a few of the cache's sets
constexpr int64_t apart(int64_t n) { return ((n + 15) / 16 | 1) * 16; }

// rows of out, `stride` apart, (+)= sum over k of a(row, k) * b(k, 0..COLUMNS-1)
template <int R, bool ADD>
inline __attribute__((always_inline)) void product(const float* a, int64_t a_row, int64_t a_step, const float* b,
                                                   int64_t b_step, float* out, int64_t stride, int64_t count) {
    Floats sums[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < 2; v++) sums[r][v] = ADD ? load(out + r * stride + v * LANES, All{}) : Floats{};
    }
    for (int64_t k = 0; k < count; k++) {
        Floats left = load(b + k * b_step, All{}), right = load(b + k * b_step + LANES, All{});
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            float value = a[r * a_row + k * a_step];
            sums[r][0] += value * left;
            sums[r][1] += value * right;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < 2; v++) store(out + r * stride + v * LANES, sums[r][v], All{});
    }
}

// the same for any number of rows
template <bool ADD, int R = ROWS>
void products(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, float* out,
              int64_t stride, int64_t count) {
    for (; rows >= R; rows -= R, a += R * a_row, out += R * stride) {
        product<R, ADD>(a, a_row, a_step, b, b_step, out, stride, count);
    }
    if constexpr (R > 1) {
        if (rows) products<ADD, R - 1>(rows, a, a_row, a_step, b, b_step, out, stride, count);
    }
}

// where the tiles of M x M outputs lie
template <int M>
struct Tiles {
    int64_t images, height, width;
    int64_t down = (height + M - 1) / M, across = (width + M - 1) / M;

    int64_t count() const { return images * down * across; }

    // row, column of the tile's first output, and the image's first value
    template <class P>
    P* place(P* images_, int64_t tile, int64_t channels, int64_t& row, int64_t& column) const {
        row = tile / across % down * M;
        column = tile % across * M;
        return images_ + tile / (down * across) * height * width * channels;
    }

    // pointers to a SIZE x SIZE window that begins at (row, column) of an image, `outside` where that is no pixel
    template <int SIZE, class P>
    void window(P* image, int64_t row, int64_t column, int64_t channels, P* outside, P** pointers) const {
        for (int i = 0; i < SIZE; i++) {
            for (int j = 0; j < SIZE; j++) {
                int64_t r = row + i, c = column + j;
                bool inside = r >= 0 && r < height && c >= 0 && c < width;
                pointers[i * SIZE + j] = inside ? image + (r * width + c) * channels : outside;
            }
        }
    }
};

// where channel c of tile t's values lies: beside the tile's others, or, as sums over tiles read them, the tiles of
// `panel` channels beside each other
struct ByTile {
    int64_t row;
    int64_t at(int64_t t, int64_t c) const { return t * row + c; }
};
struct ByPanel {
    int64_t panel, tiles;
    int64_t size(int64_t channels) const { return apart((channels + panel - 1) / panel * panel * tiles); }
    int64_t at(int64_t t, int64_t c) const { return (c / panel * tiles + t) * panel + c % panel; }
};

// FROM x FROM values at `pointers` -> TO x TO ones, `stride` apart, of every channel of tile t
template <int FROM, int TO, auto STEP, class P>
void transform(P* const* pointers, float* to, int64_t stride, auto layout, int64_t t, int64_t channels) {
    by_channels(channels, [&](int64_t c, auto lanes) {
        float* first = to + layout.at(t, c);
        in_both<FROM, TO, STEP>([&](int k) { return load(pointers[k] + c, lanes); },
                                [&](int k, Floats v) { store(first + k * stride, v, All{}); });
    });
}

// filters [3, 3, C, O] -> [(M + 2)^2, O / COLUMNS, C, COLUMNS], zeros where O ends
template <int M>
void transform_filters(const float* filters, float* out, int64_t in, int64_t outs, int threads) {
    constexpr int SIZE = M + 2;
    int64_t panels = (outs + COLUMNS - 1) / COLUMNS;
    parallel(threads, in, [&](int64_t c) {
        for (int64_t o = 0; o < panels * COLUMNS; o += LANES) {
            First lanes{int(std::clamp<int64_t>(outs - o, 0, LANES))};
            float* to = out + (o / COLUMNS * in + c) * COLUMNS + o % COLUMNS;
            in_both<3, SIZE, Tile<M>::filter>(
                [&](int k) { return load(filters + (k * in + c) * outs + o, lanes); },
                [&](int k, Floats u) { store(to + k * panels * in * COLUMNS, u, All{}); });
        }
    });
}

// tiles of a block: as many as keep what is made of them near a core, but enough to pay for reading all filters or sums
template <int M>
int64_t block_of(int64_t in, int64_t outs, int64_t least) {
    constexpr int64_t BYTES = 1 << 20;
    int64_t tiles = BYTES / ((M + 2) * (M + 2) * (in + outs) * int64_t(sizeof(float)));
    return std::max<int64_t>(tiles / ROWS * ROWS, least);
}

template <int M>
void convolve(const T* x, const float* filters, T* y, const Tiles<M>& tiles, int64_t in, int64_t outs, int threads) {
    constexpr int SIZE = M + 2, VALUES = SIZE * SIZE;
    int64_t panels = (outs + COLUMNS - 1) / COLUMNS, row = apart(in), wide = apart(panels * COLUMNS);
    int64_t block = block_of<M>(in, outs, 8 * ROWS), count = tiles.count(), blocks = (count + block - 1) / block;
    int64_t step = apart(block * row), result_step = apart(block * wide);
    auto matrices = buffer<float>(VALUES * in * panels * COLUMNS);
    transform_filters<M>(filters, matrices.get(), in, outs, threads);
    parallel(threads, std::min<int64_t>(threads, blocks), [&](int64_t worker) {
        int64_t workers = std::min<int64_t>(threads, blocks);
        auto values = buffer<float>(VALUES * step), results = buffer<float>(VALUES * result_step);
        std::vector<T> zero(in), unread(outs);
        const T* inputs[VALUES];
        T* outputs[M * M];
        for (int64_t b = worker * blocks / workers; b < (worker + 1) * blocks / workers; b++) {
            int64_t first = b * block, here = std::min(block, count - first), r, c;
            for (int64_t t = 0; t < here; t++) {
                const T* image = tiles.place(x, first + t, in, r, c);
                tiles.template window<SIZE>(image, r - 1, c - 1, in, (const T*)zero.data(), inputs);
                transform<SIZE, SIZE, Tile<M>::input>(inputs, values.get(), step, ByTile{row}, t, in);
            }
            for (int64_t p = 0; p < VALUES * panels; p++) {
                int64_t k = p / panels, column = p % panels * COLUMNS;
                products<false>(here, values.get() + k * step, row, 1, matrices.get() + p * in * COLUMNS, COLUMNS,
                                results.get() + k * result_step + column, wide, in);
            }
            for (int64_t t = 0; t < here; t++) {
                T* image = tiles.place(y, first + t, outs, r, c);
                tiles.template window<M>(image, r, c, outs, unread.data(), outputs);
                by_channels(outs, [&](int64_t o, auto lanes) {
                    in_both<SIZE, M, Tile<M>::output>(
                        [&](int k) { return load(results.get() + k * result_step + t * wide + o, All{}); },
                        [&](int k, Floats v) { store(outputs[k] + o, v, lanes); });
                });
            }
        }
    });
}

// dfilters [3, 3, C, O]. Every sum is over the tiles in order, on any number of threads.
template <int M>
void filter_gradient(const T* x, const T* dy, float* dfilters, const Tiles<M>& tiles, int64_t in, int64_t outs,
                     int threads) {
    constexpr int SIZE = M + 2, VALUES = SIZE * SIZE;
    int64_t panels = (outs + COLUMNS - 1) / COLUMNS, wide = panels * COLUMNS;
    int64_t block = block_of<M>(in, outs, 16 * ROWS), count = tiles.count();
    ByPanel of_values{PANEL, block}, of_grads{COLUMNS, block};
    int64_t step = of_values.size(in), grad_step = of_grads.size(outs);
    auto values = buffer<float>(VALUES * step), grads = zeros<float>(VALUES * grad_step);
    auto sums = zeros<float>(VALUES * in * wide);
    std::vector<T> zero(std::max(in, outs));
    for (int64_t first = 0; first < count; first += block) {
        int64_t here = std::min(block, count - first);
        parallel(threads, here, [&](int64_t t) {
            const T *inputs[VALUES], *outputs[M * M];
            int64_t r, c;
            const T* image = tiles.place(x, first + t, in, r, c);
            tiles.template window<SIZE>(image, r - 1, c - 1, in, (const T*)zero.data(), inputs);
            transform<SIZE, SIZE, Tile<M>::input>(inputs, values.get(), step, of_values, t, in);
            image = tiles.place(dy, first + t, outs, r, c);
            tiles.template window<M>(image, r, c, outs, (const T*)zero.data(), outputs);
            transform<M, SIZE, Tile<M>::output_adjoint>(outputs, grads.get(), grad_step, of_grads, t, outs);
        });
        parallel(threads, VALUES * panels, [&](int64_t p) {
            int64_t k = p / panels, column = p % panels * COLUMNS;
            for (int64_t c = 0; c < in; c += PANEL) {
                products<true>(std::min<int64_t>(PANEL, in - c), values.get() + k * step + of_values.at(0, c), 1, PANEL,
                               grads.get() + k * grad_step + of_grads.at(0, column), COLUMNS,
                               sums.get() + (k * in + c) * wide + column, wide, here);
            }
        });
    }
    parallel(threads, in, [&](int64_t c) {
        by_channels(outs, [&](int64_t o, auto lanes) {
            in_both<SIZE, 3, Tile<M>::filter_adjoint>(
                [&](int k) { return load(sums.get() + (k * in + c) * wide + o, All{}); },
                [&](int k, Floats v) { store(dfilters + (k * in + c) * outs + o, v, lanes); });
        });
    });
}

// the size of the tiles that needs the fewest products
int best_tile(int64_t height, int64_t width) {
    int best = 4;
    int64_t least = INT64_MAX;
    for (int m = 4; m >= 2; m--) {
        int64_t products = ((height + m - 1) / m) * ((width + m - 1) / m) * (m + 2) * (m + 2);
        if (products < least) least = products, best = m;
    }
    return best;
}

void with_tiles(int64_t images, int64_t height, int64_t width, auto&& work) {
    switch (best_tile(height, width)) {
        case 2: return work(Tiles<2>{images, height, width});
        case 3: return work(Tiles<3>{images, height, width});
        default: return work(Tiles<4>{images, height, width});
    }
}

}  // namespace

// filters [3, 3, in, outs]
extern "C" void winograd_convolve(const T* x, const float* filters, T* y, int64_t images, int64_t height,
                                  int64_t width, int64_t in, int64_t outs, int threads) {
    with_tiles(images, height, width, [&](auto tiles) { convolve(x, filters, y, tiles, in, outs, threads); });
}

extern "C" void winograd_filter_gradient(const T* x, const T* dy, float* dfilters, int64_t images, int64_t height,
                                         int64_t width, int64_t in, int64_t outs, int threads) {
    with_tiles(images, height, width, [&](auto tiles) { filter_gradient(x, dy, dfilters, tiles, in, outs, threads); });
}
