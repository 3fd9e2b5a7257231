// Batch normalization with what stands around it: pooling or a gate before it, an activation and a residual behind it.
// Tensors are [images, rows, channels]: channels_last memory, a row being the channels of a pixel.
#include <utility>

#include "activations.hpp"
#include "statistics.hpp"

namespace {

using Act = ACTIVATION;
using T = DTYPE;

Floats gated(const T* x, const float* gate, int64_t c, auto lanes) {
    Floats v = load(x + c, lanes);
    return gate ? v * load(gate + c, lanes) : v;
}

// near each channel's mean over `rows` rows: the mean of a few of them, of which value(row, c, lanes) is one
Buffer<float> near_mean(int64_t rows, int64_t channels, auto&& value) {
    constexpr int SAMPLES = 16;
    auto shift = zeros<float>((channels + LANES - 1) / LANES * LANES);
    by_channels(channels, [&](int64_t c, auto lanes) {
        Floats sum = {};
        for (int64_t k = 0; k < SAMPLES; k++) sum += value(k * rows / SAMPLES, c, lanes);
        store(shift.get() + c, sum / float(SAMPLES), All{});
    });
    return shift;
}

void batch_statistics(const T* x, const float* gate, int64_t images, int64_t rows, int64_t channels, double momentum,
                      float* mean, float* var, float* running_mean, float* running_var, int threads) {
    int64_t chunks = chunks_of(images, rows);
    Moments moments(chunks, channels);
    parallel(threads, chunks, [&](int64_t chunk) {
        int64_t begin = chunk * images / chunks, end = (chunk + 1) * images / chunks;
        Sums sums(channels);
        auto shift = near_mean((end - begin) * rows, channels, [&](int64_t r, int64_t c, auto lanes) {
            const float* g = gate ? gate + (begin + r / rows) * channels : nullptr;
            return gated(x + (begin * rows + r) * channels, g, c, lanes);
        });
        for (int64_t i = begin; i < end; i++) {
            const float* g = gate ? gate + i * channels : nullptr;
            for (int64_t r = 0; r < rows; r++) {
                const T* from = x + (i * rows + r) * channels;
                by_channels(channels, [&](int64_t c, auto lanes) {
                    sums.add_moments(c, shift.get(), gated(from, g, c, lanes));
                });
                sums.count_row();
            }
        }
        moments.set(chunk, double(end - begin) * rows, shift.get(), sums.total());
    });
    moments.merge(chunks, momentum, mean, var, running_mean, running_var);
}

void normalize(const T* x, const float* gate, const T* residual, const Norm& norm, T* y, float* squeeze,
               int64_t images, int64_t rows, int64_t channels, int threads) {
    parallel(threads, images, [&](int64_t i) {
        const float* g = gate ? gate + i * channels : nullptr;
        // of a few rows at a time in float32, all of them in float64: an image may be large
        std::unique_ptr<Sums> total(squeeze ? new Sums(channels) : nullptr);
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = (i * rows + r) * channels;
            by_channels(channels, [&](int64_t c, auto lanes) {
                Floats value = Act::value(norm.at(norm.centered(gated(x + at, g, c, lanes), c), c));
                if (residual) value += load(residual + at + c, lanes);
                if (squeeze) total->add(c, value);
                store(y + at + c, value, lanes);
            });
            if (squeeze) total->count_row();
        }
        if (squeeze) {
            const double* sums = total->total();
            for (int64_t c = 0; c < channels; c++) squeeze[i * channels + c] = float(sums[c] / rows);
        }
    });
}

// The gradients that come in: of y, of y again if it has two users, of its mean over an image [images, C] if wanted.
struct Upstream {
    const T* dy;
    const T* dy2;
    const float* dsqueeze;

    Floats at(int64_t place, int64_t image, int64_t channels, float share, int64_t c, auto lanes) const {
        Floats t = load(dy + place, lanes);
        if (dy2) t += load(dy2 + place, lanes);
        if (dsqueeze) t += load(dsqueeze + image * channels + c, lanes) * share;
        return t;
    }
};

// sums [2, C] of g = t act'(z) and of g xhat over all rows of v = x * gate
Buffer<double> reduce_gradients(Upstream upstream, const T* x, const float* gate, const Norm& norm,
                                           int64_t images, int64_t rows, int64_t channels, int threads) {
    int64_t chunks = chunks_of(images, rows);
    auto partials = buffer<double>(chunks * 2 * channels);
    parallel(threads, chunks, [&](int64_t chunk) {
        Sums sums(channels);
        for (int64_t i = chunk * images / chunks; i < (chunk + 1) * images / chunks; i++) {
            const float* gates = gate ? gate + i * channels : nullptr;
            for (int64_t r = 0; r < rows; r++) {
                int64_t at = (i * rows + r) * channels;
                by_channels(channels, [&](int64_t c, auto lanes) {
                    Floats centered = norm.centered(gated(x + at, gates, c, lanes), c);
                    Floats t = upstream.at(at + c, i, channels, 1.f / rows, c, lanes);
                    Floats g = Act::backward(t, norm.at(centered, c));
                    sums.add(c, g, g * centered);
                });
                sums.count_row();
            }
        }
        std::copy_n(sums.total(), 2 * channels, partials.get() + chunk * 2 * channels);
    });
    auto total = zeros<double>(2 * channels);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        for (int64_t c = 0; c < 2 * channels; c++) total[c] += partials[chunk * 2 * channels + c];
    }
    for (int64_t c = 0; c < channels; c++) total[channels + c] *= norm.rstd[c];
    return total;
}

// What the gradient through the batch's own statistics subtracts: mean g and, of xhat = centered rstd, mean g xhat.
struct Means {
    Means(const double* sums, const Norm& norm, int64_t channels, int64_t count, bool training_)
        : training(training_), values(zeros<float>(2 * norm.padded)), g(values.get()), along(g + norm.padded) {
        for (int64_t c = 0; training && c < channels; c++) {
            g[c] = float(sums[c] / count);
            along[c] = float(sums[channels + c] / count * norm.rstd[c]);
        }
    }

    Floats through(Floats own, Floats centered, const Norm& norm, int64_t c) const {
        // an infinite value times nothing would be NaN
        if (training) own = own - load(g + c, All{}) - centered * load(along + c, All{});
        return own * load(norm.slope + c, All{});
    }

    bool training;
    Buffer<float> values;
    float *g, *along;
};

void normalize_backward(Upstream upstream, const T* x, const float* gate, const Norm& norm, const Means& means,
                        T* dx, float* dgate, int64_t images, int64_t rows, int64_t channels, int threads) {
    parallel(threads, images, [&](int64_t i) {
        const float* gates = gate ? gate + i * channels : nullptr;
        std::unique_ptr<Sums> total(gate ? new Sums(channels) : nullptr);
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = (i * rows + r) * channels;
            by_channels(channels, [&](int64_t c, auto lanes) {
                Floats v = load(x + at + c, lanes);
                Floats factor = gates ? load(gates + c, lanes) : Floats{};
                Floats centered = norm.centered(gates ? v * factor : v, c);
                Floats g = Act::backward(upstream.at(at + c, i, channels, 1.f / rows, c, lanes), norm.at(centered, c));
                Floats d = means.through(g, centered, norm, c);
                if (gates) {
                    total->add(c, d * v);
                    d *= factor;
                }
                store(dx + at + c, d, lanes);
            });
            if (gates) total->count_row();
        }
        if (gates) {
            const double* sums = total->total();
            for (int64_t c = 0; c < channels; c++) dgate[i * channels + c] = float(sums[c]);
        }
    });
}

// The largest of a window's four pixels, and which it is: the first of equal ones, and a NaN over everything.
inline __attribute__((always_inline)) std::pair<Floats, Ints> winner(const T* corner, int64_t width, int64_t channels,
                                                                     auto lanes) {
    Floats best = load(corner, lanes);
    Ints which = {};
    for (int k = 1; k < 4; k++) {
        Floats v = load(corner + (k / 2 * width + k % 2) * channels, lanes);
        Ints wins = (v > best) | (v != v);
        best = wins ? v : best;
        which = wins ? Ints{} + k : which;
    }
    return {best, which};
}

// Max-pooling 2x2 of [height, width, C] images, the winner being PyTorch's.
// index: which of a window's four pixels won, a byte each. Statistics of what it wrote, if mean is given.
void pool(const T* x, T* pooled, uint8_t* index, int64_t images, int64_t height, int64_t width, int64_t channels,
          double momentum, float* mean, float* var, float* running_mean, float* running_var, int threads) {
    int64_t out_h = height / 2, out_w = width / 2, rows = out_h * out_w, chunks = chunks_of(images, rows);
    Moments moments(mean ? chunks : 0, channels);
    parallel(threads, chunks, [&](int64_t chunk) {
        int64_t begin = chunk * images / chunks, end = (chunk + 1) * images / chunks;
        Sums sums(channels);
        auto shift = near_mean((end - begin) * rows, channels, [&](int64_t r, int64_t c, auto lanes) {
            int64_t i = begin + r / rows, y = r % rows / out_w, w = r % out_w;
            return winner(x + ((i * height + 2 * y) * width + 2 * w) * channels + c, width, channels, lanes).first;
        });
        for (int64_t i = begin; i < end; i++) {
            for (int64_t y = 0; y < out_h; y++) {
                const T* from = x + (i * height + 2 * y) * width * channels;
                int64_t to = (i * rows + y * out_w) * channels;
                for (int64_t w = 0; w < out_w; w++) {
                    by_channels(channels, [&](int64_t c, auto lanes) {
                        int64_t place = to + w * channels + c;
                        const T* corner = from + 2 * w * channels + c;
                        // what processors prefetch themselves is not enough: the pass takes twice as long without
                        for (int k = 0; k < 4; k++) {
                            __builtin_prefetch(corner + ((k / 2 + 2) * width + k % 2) * channels);
                        }
                        auto [best, which] = winner(corner, width, channels, lanes);
                        store(pooled + place, best, lanes);
                        if (index) store_index(index + place, which, lanes);
                        if (mean) sums.add_moments(c, shift.get(), best);
                    });
                    sums.count_row();
                }
            }
        }
        if (mean) moments.set(chunk, double(end - begin) * rows, shift.get(), sums.total());
    });
    if (mean) moments.merge(chunks, momentum, mean, var, running_mean, running_var);
}

// dx of the pooling's input: the gradient of each pooled value at its window's winner, 0 everywhere else
void unpool_backward(Upstream upstream, const T* pooled, const uint8_t* index, const Norm& norm, const Means& means,
                     T* dx, int64_t images, int64_t height, int64_t width, int64_t channels, int threads) {
    int64_t out_h = height / 2, out_w = width / 2, rows = out_h * out_w;
    parallel(threads, images, [&](int64_t i) {
        for (int64_t y = 0; y < out_h; y++) {
            T* to = dx + (i * height + 2 * y) * width * channels;
            for (int64_t w = 0; w < out_w; w++) {
                int64_t at = (i * rows + y * out_w + w) * channels;
                by_channels(channels, [&](int64_t c, auto lanes) {
                    Floats centered = norm.centered(load(pooled + at + c, lanes), c);
                    Floats t = upstream.at(at + c, i, channels, 1.f / rows, c, lanes);
                    Floats d = means.through(Act::backward(t, norm.at(centered, c)), centered, norm, c);
                    Ints which = load_index(index + at + c, lanes);
                    T* corner = to + 2 * w * channels + c;
                    for (int k = 0; k < 4; k++) {
                        store(corner + (k / 2 * width + k % 2) * channels, which == k ? d : Floats{}, lanes);
                    }
                });
            }
            // an odd last column lies in no window
            for (int k = 0; k < 2 && width % 2; k++) std::fill_n(to + ((k + 1) * width - 1) * channels, channels, T{});
        }
        // nor does an odd last row
        if (height % 2) std::fill_n(dx + (i * height + height - 1) * width * channels, width * channels, T{});
    });
}

}  // namespace

extern "C" void norm_act_forward(const T* x, const float* gate, const T* residual, const float* bias,
                                 const float* weight, const float* fixed_mean, const float* fixed_var,
                                 float* running_mean, float* running_var, float* mean, float* var, T* y,
                                 int64_t images, int64_t rows, int64_t channels, double momentum, double eps,
                                 int threads) {
    if (!fixed_mean) {
        batch_statistics(x, gate, images, rows, channels, momentum, mean, var, running_mean, running_var, threads);
    }
    Norm norm(channels, fixed_mean ? fixed_mean : mean, fixed_var ? fixed_var : var, bias, weight, eps);
    normalize(x, gate, residual, norm, y, nullptr, images, rows, channels, threads);
}

extern "C" void pool_norm_act_forward(const T* x, const float* bias, const float* weight, const float* fixed_mean,
                                      const float* fixed_var, float* running_mean, float* running_var, float* mean,
                                      float* var, T* pooled, uint8_t* index, T* y, float* squeeze, int64_t images,
                                      int64_t height, int64_t width, int64_t channels, double momentum, double eps,
                                      int threads) {
    pool(x, pooled, index, images, height, width, channels, momentum, fixed_mean ? nullptr : mean, var, running_mean,
         running_var, threads);
    Norm norm(channels, fixed_mean ? fixed_mean : mean, fixed_var ? fixed_var : var, bias, weight, eps);
    int64_t rows = (height / 2) * (width / 2);
    normalize(pooled, nullptr, nullptr, norm, y, squeeze, images, rows, channels, threads);
}

// height 0: there was no pooling, and width is the number of rows. dsums [2, C] float32: dbias, dweight.
extern "C" void norm_act_backward(const T* dy, const T* dy2, const float* dsqueeze, const T* x, const uint8_t* index,
                                  const float* gate, const float* bias, const float* weight, const float* mean,
                                  const float* var, T* dx, float* dgate, float* dsums, int64_t images, int64_t height,
                                  int64_t width, int64_t channels, int training, double eps, int threads) {
    Norm norm(channels, mean, var, bias, weight, eps);
    Upstream upstream{dy, dy2, dsqueeze};
    int64_t rows = height ? (height / 2) * (width / 2) : width;
    auto sums = reduce_gradients(upstream, x, gate, norm, images, rows, channels, threads);
    for (int64_t c = 0; c < 2 * channels; c++) dsums[c] = float(sums[c]);
    if (!dx) return;
    Means means(sums.get(), norm, channels, images * rows, training);
    if (height) {
        unpool_backward(upstream, x, index, norm, means, dx, images, height, width, channels, threads);
    } else {
        normalize_backward(upstream, x, gate, norm, means, dx, dgate, images, rows, channels, threads);
    }
}
