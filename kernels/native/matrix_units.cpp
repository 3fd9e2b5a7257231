// The gradient of a 3x3 convolution's filters, of bfloat16 tensors [images, height, width, channels], by matrix units.
// It is a matrix product, of dy transposed and x, for each of the nine shifts. So that a shift is one of memory, a chunk
// of pixels lies in one line: a zero behind each row, which is also the next row's left neighbour, and a row of zeros
// between images. The products run along that line.
#include <algorithm>
#include <vector>

#include "matrix_tiles.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace {

using T = BFloat16;

constexpr int64_t BLOCK = ROWS_OF_TILE, STEP = DEPTH_OF_TILE, SUMS = BLOCK * BLOCK;
// positions of a line at most: its operands of 32 channels each stay in the first cache beside each other
constexpr int64_t LINE = 256;
// bytes of sums that stay in the second cache
constexpr int64_t CACHED = 5 << 18;
// parts of the work, a number of the shapes only, and lines that pay for a part's own sums
constexpr int64_t PARTS = 16, LEAST_LINES = 8;

constexpr int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

typedef uint32_t Pairs __attribute__((vector_size(64)));

// 16 values of a pixel, as the lower halves of words
inline Pairs sixteen(const T* from, int64_t count) {
    uint16_t values[BLOCK] = {};
    std::memcpy(values, from, std::min(count, BLOCK) * sizeof(T));
    Pairs words;
    for (int i = 0; i < BLOCK; i++) words[i] = values[i];
    return words;
}
inline Pairs sixteen(const T* from) {
    typedef uint16_t Values __attribute__((vector_size(32)));
    Values values;
    std::memcpy(&values, from, sizeof values);
#ifdef __AVX512F__
    return Pairs(_mm512_cvtepu16_epi32(__m256i(values)));
#else
    return __builtin_convertvector(values, Pairs);
#endif
}

#if __has_builtin(__builtin_shufflevector)
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC before 12
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, Pairs{__VA_ARGS__})
#endif

// rows and columns changed: four rounds of exchanging the off-diagonal quarters of ever larger squares
inline void transpose(Pairs* m) {
    Pairs t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        t[i] = SHUFFLED(m[i], m[i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        t[i + 1] = SHUFFLED(m[i], m[i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        if (i & 2) continue;
        m[i] = SHUFFLED(t[i], t[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        m[i + 2] = SHUFFLED(t[i], t[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        if (i & 4) continue;
        t[i] = SHUFFLED(m[i], m[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        t[i + 4] = SHUFFLED(m[i], m[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        m[i] = SHUFFLED(t[i], t[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        m[i + 8] = SHUFFLED(t[i], t[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
}

// how images are laid out in lines: some rows of one, or several whole ones
struct Lines {
    int64_t images, height, width;
    int64_t pitch = width + 1;
    int64_t rows, together, each, steps, count;

    Lines(int64_t images_, int64_t height_, int64_t width_) : images(images_), height(height_), width(width_) {
        // of all that fit, the layout of the fewest steps, where loading and storing a line's sums takes as long as two
        int64_t least = INT64_MAX;
        auto offer = [&](int64_t rows_, int64_t together_) {
            int64_t line = together_ * (rows_ + 1) * pitch - pitch, lines = blocks_of(height, rows_);
            int64_t steps_ = blocks_of(line, STEP), count_ = lines * blocks_of(images, together_);
            int64_t cost = (steps_ + 2) * count_;
            if ((line > LINE && rows_ * together_ > 1) || cost >= least) return;
            least = cost, rows = rows_, together = together_, each = lines, steps = steps_, count = count_;
        };
        for (int64_t r = 1; r <= height; r++) offer(r, 1);
        for (int64_t n = 2; n <= std::min(images, LINE); n++) offer(height, n);
    }

    // the first pixel of a line
    int64_t pixel(int64_t line) const {
        if (line >= count) return images * height * width;
        return (line / each * together * height + line % each * rows) * width;
    }

    int64_t positions() const { return steps * STEP; }
    // a shift reaches one row and one pixel back and ahead
    int64_t reach() const { return pitch + 1; }

    // where the channels of the line's positions from..to-1 lie, `zero` where there is no pixel; own: of its rows only
    void sources(const T* tensor, int64_t channels, int64_t line, int64_t from, int64_t to, bool own, const T* zero,
                 const T** out) const {
        int64_t image = line / each * together, first = line % each * rows;
        int64_t last = own ? std::min(first + rows, height) : height;
        int64_t stride = together > 1 ? height + 1 : INT64_MAX / 2;
        int64_t down = from < 0 ? -blocks_of(-from, pitch) : from / pitch, column = from - down * pitch;
        int64_t n = image, row = first + down;
        if (row >= stride) n += row / stride, row %= stride;
        for (int64_t p = from; p < to; p++) {
            bool inside = row >= 0 && row < last && column < width && n < std::min(images, image + together);
            *out++ = inside ? tensor + ((n * height + row) * width + column) * channels : zero;
            if (++column == pitch) {
                column = 0;
                if (++row == stride) row = 0, n++;
            }
        }
    }
};

// dy of a line as left operands: for each 16 channels and each step, 16 rows of 32 positions
void pack_left(const T* const* sources, int64_t channels, int64_t steps, T* to) {
    // along a pixel's channels first, as they lie in memory
    for (int64_t k = 0; k < steps; k++, sources += STEP) {
        for (int64_t c = 0; c < channels; c += BLOCK) {
            bool whole = c + BLOCK <= channels;
            Pairs rows[16];
            for (int i = 0; i < 16; i++) {
                const T *even = sources[2 * i] + c, *odd = sources[2 * i + 1] + c;
                rows[i] = whole ? sixteen(even) | sixteen(odd) << 16
                                : sixteen(even, channels - c) | sixteen(odd, channels - c) << 16;
            }
            transpose(rows);
            std::memcpy(to + (c / BLOCK * steps + k) * VALUES_OF_TILE, rows, sizeof rows);
        }
    }
}

// x of a line as right operands: for each 16 channels pairs of positions, those that begin at even ones, then at odd ones
void pack_right(const T* const* sources, int64_t first, int64_t channels, int64_t all, int64_t pairs, T* to) {
    constexpr int64_t TOGETHER = 16;
    for (int64_t j = 0; j < pairs; j += TOGETHER) {
        for (int64_t c = 0; c < channels; c += BLOCK) {
            bool whole = first + c + BLOCK <= all;
            auto at = [&](int64_t p) {
                const T* from = sources[p] + first + c;
                return whole ? sixteen(from) : sixteen(from, all - first - c);
            };
            T* own = to + 4 * BLOCK * pairs * (c / BLOCK);
            Pairs before = at(2 * j);
            for (int64_t i = j; i < std::min(j + TOGETHER, pairs); i++) {
                Pairs middle = at(2 * i + 1), after = at(2 * i + 2);
                Pairs even = before | middle << 16, odd = middle | after << 16;
                std::memcpy(own + 2 * BLOCK * i, &even, sizeof even);
                std::memcpy(own + 2 * BLOCK * (pairs + i), &odd, sizeof odd);
                before = after;
            }
        }
    }
}

// memory that is needed next, asked for a little at a time
struct Ahead {
    const char *at, *end;
    int64_t lines;  // of the cache, at a time

    Ahead(const T* from, const T* to, int64_t times)
        : at(reinterpret_cast<const char*>(from)), end(reinterpret_cast<const char*>(to)),
          lines(blocks_of(end - at, 64 * times)) {}

    void some() {
        for (int64_t i = 0; i < lines && at < end; i++, at += 64) __builtin_prefetch(at);
    }
};

// sums += left times right, for M x N tiles
template <int M, int N>
void products(Tiles& tiles, const T* left, int64_t left_stride, const T* right, int64_t right_stride, float* sums,
              int64_t row, int64_t column, int64_t steps) {
    tiles.load<0>(sums);
    if constexpr (N > 1) tiles.load<1>(sums + column);
    if constexpr (M > 1) tiles.load<2>(sums + row);
    if constexpr (M > 1 && N > 1) tiles.load<3>(sums + row + column);
    for (int64_t k = 0; k < steps; k++, left += VALUES_OF_TILE, right += VALUES_OF_TILE) {
        tiles.load<4>(left);
        tiles.load<6>(right);
        tiles.multiply<0, 4, 6>();
        if constexpr (N > 1) tiles.load<7>(right + right_stride), tiles.multiply<1, 4, 7>();
        if constexpr (M > 1) tiles.load<5>(left + left_stride), tiles.multiply<2, 5, 6>();
        if constexpr (M > 1 && N > 1) tiles.multiply<3, 5, 7>();
    }
    tiles.store<0>(sums);
    if constexpr (N > 1) tiles.store<1>(sums + column);
    if constexpr (M > 1) tiles.store<2>(sums + row);
    if constexpr (M > 1 && N > 1) tiles.store<3>(sums + row + column);
}

}  // namespace

extern "C" void matrix_units_permitted(int32_t* out) { *out = tiles_permitted(); }

// dfilters [outs, 3, 3, in]. Every sum is in an order of the shapes only.
extern "C" void matrix_units_filter_gradient(const T* x, const T* dy, float* dfilters, int64_t images, int64_t height,
                                             int64_t width, int64_t in, int64_t outs, int threads) {
    tiles_permitted();
    Lines lines(images, height, width);
    int64_t in_blocks = blocks_of(in, BLOCK), out_blocks = blocks_of(outs, BLOCK);
    // groups of x's channels, of two blocks at least, and parts of the lines, each with sums of its own
    int64_t fit = std::max<int64_t>(2, CACHED / (9 * SUMS * int64_t(sizeof(float)) * out_blocks) / 2 * 2);
    int64_t groups = blocks_of(in_blocks, fit);
    int64_t parts = std::min(blocks_of(lines.count, LEAST_LINES), blocks_of(PARTS, groups));
    int64_t size = in_blocks * out_blocks * 9 * SUMS;
    auto sums = zeros<float>(parts * size);
    int64_t reach = lines.reach(), positions = lines.positions(), pairs = blocks_of(positions + 2 * reach + 1, 2);
    std::vector<T> zero(std::max(in, outs));
    parallel(threads, groups * parts, [&](int64_t unit) {
        int64_t group = unit / parts, part = unit % parts, begin = group * fit, end = std::min(begin + fit, in_blocks);
        auto left = buffer<T>(out_blocks * lines.steps * VALUES_OF_TILE);
        auto right = buffer<T>((end - begin) * pairs * 4 * BLOCK);
        std::vector<const T*> sources(2 * pairs + 1);
        int64_t left_stride = lines.steps * VALUES_OF_TILE, right_stride = 4 * BLOCK * pairs;
        Tiles tiles;
        for (int64_t line = part * lines.count / parts; line < (part + 1) * lines.count / parts; line++) {
            lines.sources(dy, outs, line, 0, positions, true, zero.data(), sources.data());
            pack_left(sources.data(), outs, lines.steps, left.get());
            lines.sources(x, in, line, -reach, 2 * pairs + 1 - reach, false, zero.data(), sources.data());
            pack_right(sources.data(), begin * BLOCK, (end - begin) * BLOCK, in, pairs, right.get());
            int64_t times = blocks_of(end - begin, 2) * blocks_of(out_blocks, 2) * 9;
            int64_t next = lines.pixel(line + 1), last = lines.pixel(line + 2);
            Ahead ahead_x(x + next * in, x + last * in, times), ahead_dy(dy + next * outs, dy + last * outs, times);
            for (int64_t i = begin; i < end; i += 2) {
                for (int64_t o = 0; o < out_blocks; o += 2) {
                    float* own = sums.get() + part * size + (i * out_blocks + o) * 9 * SUMS;
                    bool wide = i + 1 < end, high = o + 1 < out_blocks;
                    auto multiply = high ? wide ? products<2, 2> : products<2, 1> : wide ? products<1, 2> : products<1, 1>;
                    for (int64_t shift = 0; shift < 9; shift++) {
                        ahead_x.some(), ahead_dy.some();
                        // of dy's position p the input's is p + start
                        int64_t start = shift / 3 * lines.pitch + shift % 3;
                        const T* from = right.get() + (i - begin) * right_stride;
                        from += (start / 2 + start % 2 * pairs) * 2 * BLOCK;
                        multiply(tiles, left.get() + o * left_stride, left_stride, from, right_stride,
                                 own + shift * SUMS, 9 * SUMS, out_blocks * 9 * SUMS, lines.steps);
                    }
                }
            }
        }
    });
    parallel(threads, outs, [&](int64_t o) {
        for (int64_t shift = 0; shift < 9; shift++) {
            for (int64_t i = 0; i < in_blocks; i++) {
                const float* from = sums.get() + ((i * out_blocks + o / BLOCK) * 9 + shift) * SUMS + o % BLOCK * BLOCK;
                float total[BLOCK] = {};
                for (int64_t part = 0; part < parts; part++) {
                    for (int j = 0; j < BLOCK; j++) total[j] += from[part * size + j];
                }
                std::memcpy(dfilters + (o * 9 + shift) * in + i * BLOCK, total,
                            std::min(BLOCK, in - i * BLOCK) * sizeof(float));
            }
        }
    });
}
