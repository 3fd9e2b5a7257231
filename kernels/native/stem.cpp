// The whitening stem from uint8 pixels: an image of the data set is moved, mirrored, cut and normalized into a buffer,
// and every row of the convolution, of a few kilobytes, is finished while it is in the cache.
#include "activations.hpp"
#include "statistics.hpp"

namespace {

using Act = ACTIVATION;
using T = DTYPE;

// What the batch takes of the data set, as kernels/gather.py says; null pointers for steps left out.
struct Source {
    const uint8_t* images;  // [N, H, W, C]
    const int64_t *index, *translation, *cutout;
    const uint8_t* flip;
    const float* jitter;
    int64_t cutout_size, height, width, channels;
    const float *mean, *std;

    int64_t size() const { return height * width * channels; }

    // (u / 255 - mean) / std of every pixel value and channel, for one image's contrast and brightness
    void table(int64_t image, float* values) const {
        for (int64_t c = 0; c < channels; c++) {
            for (int u = 0; u < 256; u++) {
                float v = u / 255.f;
                if (jitter) v = jitter[2 * image] * v + jitter[2 * image + 1];
                values[c * 256 + u] = (v - mean[c]) / std[c];
            }
        }
    }

    // image of the batch as [H, W, C] normalized pixels; values: its table
    void gather(int64_t image, const float* values, float* out) const {
        const uint8_t* from = images + (index ? index[image] : image) * size();
        int64_t dy = translation ? translation[2 * image] : 0, dx = translation ? translation[2 * image + 1] : 0;
        for (int64_t y = 0; y < height; y++) {
            const uint8_t* row = from + reflected(y + dy, height) * width * channels;
            for (int64_t x = 0; x < width; x++) {
                int64_t source = reflected((flip && flip[image] ? width - 1 - x : x) + dx, width);
                bool cut = cutout && inside(y, cutout[2 * image]) && inside(x, cutout[2 * image + 1]);
                for (int64_t c = 0; c < channels; c++) {
                    uint8_t u = cut ? fill(c) : row[source * channels + c];
                    *out++ = values[c * 256 + u];
                }
            }
        }
    }

    // reflect padding; what lies beyond its reach is clamped
    static int64_t reflected(int64_t i, int64_t size) {
        i = i < 0 ? -i : i;
        i = i >= size ? 2 * (size - 1) - i : i;
        return std::clamp<int64_t>(i, 0, size - 1);
    }
    bool inside(int64_t i, int64_t start) const { return i >= start && i < start + cutout_size; }
    // exact in float64, so that every implementation rounds alike
    uint8_t fill(int64_t c) const {
        return uint8_t(std::clamp(std::floor(double(mean[c]) * 255 + 0.5), 0., 255.));
    }
};

// The convolution's filters, [k * k * C, O padded], so that all outputs of a pixel are summed at once; its geometry.
struct Filters {
    int64_t kernel, channels, outputs, padded, features;
    Buffer<float> weight, shift;

    // weight [O, C, k, k]; shift [O] or null
    Filters(const float* given, const float* bias, int64_t outputs_, int64_t channels_, int64_t kernel_)
        : kernel(kernel_), channels(channels_), outputs(outputs_), padded((outputs + LANES - 1) / LANES * LANES),
          features(kernel * kernel * channels), weight(zeros<float>(features * padded)), shift(zeros<float>(padded)) {
        for (int64_t o = 0; o < outputs; o++) {
            for (int64_t c = 0; c < channels; c++) {
                for (int64_t p = 0; p < kernel * kernel; p++) {
                    weight[(p * channels + c) * padded + o] = given[(o * channels + c) * kernel * kernel + p];
                }
            }
            shift[o] = bias ? bias[o] : 0.f;
        }
    }

    int64_t row_size(int64_t columns) const { return columns * outputs + LANES; }

    // z [columns, O] of one row of patches, which begin at `pixels` in an image `width` wide
    void row(const float* pixels, int64_t width, int64_t columns, float* z) const {
        constexpr int TOGETHER = 4;
        for (int64_t x = 0; x < columns; x += TOGETHER) {
            int64_t count = std::min<int64_t>(TOGETHER, columns - x);
            // from the last vector of outputs down: what one writes beyond a pixel's outputs the next one overwrites
            for (int64_t o = padded - LANES; o >= 0; o -= LANES) {
                Floats sums[TOGETHER];
                for (auto& sum : sums) sum = load(shift.get() + o, All{});
                const float* w = weight.get() + o;
                for (int64_t ky = 0; ky < kernel; ky++) {
                    const float* at = pixels + (ky * width + x) * channels;
                    if (count == TOGETHER) {
                        for (int64_t f = 0; f < kernel * channels; f++, w += padded) {
                            Floats filters = load(w, All{});
                            for (int j = 0; j < TOGETHER; j++) sums[j] += filters * at[j * channels + f];
                        }
                    } else {
                        for (int64_t f = 0; f < kernel * channels; f++, w += padded) {
                            for (int j = 0; j < count; j++) sums[j] += load(w, All{}) * at[j * channels + f];
                        }
                    }
                }
                for (int j = 0; j < count; j++) store(z + (x + j) * outputs + o, sums[j], All{});
            }
        }
    }
};

// body(scratch for the images of a thread: its normalized pixels, their rows) for chunks of images
template <class Body>
void by_images(const Source& source, int64_t batch, int64_t chunks, int threads, Body&& body) {
    auto common = buffer<float>(source.channels * 256);
    if (!source.jitter) source.table(0, common.get());
    parallel(threads, chunks, [&](int64_t chunk) {
        auto pixels = buffer<float>(source.size());
        auto own = buffer<float>(source.jitter ? source.channels * 256 : 0);
        body(chunk, chunk * batch / chunks, (chunk + 1) * batch / chunks, [&](int64_t image) {
            if (source.jitter) source.table(image, own.get());
            source.gather(image, source.jitter ? own.get() : common.get(), pixels.get());
            return pixels.get();
        });
    });
}

// a vector for every channel, repeated for each column of a row
Buffer<float> repeated(const float* values, int64_t channels, int64_t columns) {
    auto row = zeros<float>(columns * channels + LANES);
    for (int64_t x = 0; x < columns; x++) std::copy_n(values, channels, row.get() + x * channels);
    return row;
}

}  // namespace

// y = act(conv(images, weight) + bias), [batch, H - k + 1, W - k + 1, O]
extern "C" void whiten_forward(const uint8_t* images, const int64_t* index, const int64_t* translation,
                               const int64_t* cutout, const uint8_t* flip, const float* jitter, const float* mean,
                               const float* std, const float* weight, const float* bias, T* y, int64_t batch,
                               int64_t height, int64_t width, int64_t channels, int64_t outputs, int64_t kernel,
                               int64_t cutout_size, int threads) {
    Source source{images, index, translation, cutout, flip, jitter, cutout_size, height, width, channels, mean, std};
    Filters filters(weight, bias, outputs, channels, kernel);
    int64_t rows = height - kernel + 1, columns = width - kernel + 1, size = columns * outputs;
    int64_t chunks = std::min<int64_t>(batch, 256);
    by_images(source, batch, chunks, threads, [&](int64_t, int64_t begin, int64_t end, auto&& image) {
        auto z = buffer<float>(filters.row_size(columns));
        for (int64_t i = begin; i < end; i++) {
            const float* pixels = image(i);
            for (int64_t r = 0; r < rows; r++) {
                filters.row(pixels + r * width * channels, width, columns, z.get());
                T* to = y + (i * rows + r) * size;
                by_channels(size, [&](int64_t k, auto lanes) {
                    store(to + k, Act::value(load(z.get() + k, All{})), lanes);
                });
            }
        }
    });
}

// dbias [O] = sum of dy act'(z)
extern "C" void whiten_backward(const T* dy, const uint8_t* images, const int64_t* index, const int64_t* translation,
                                const int64_t* cutout, const uint8_t* flip, const float* jitter, const float* mean,
                                const float* std, const float* weight, const float* bias, float* dbias, int64_t batch,
                                int64_t height, int64_t width, int64_t channels, int64_t outputs, int64_t kernel,
                                int64_t cutout_size, int threads) {
    Source source{images, index, translation, cutout, flip, jitter, cutout_size, height, width, channels, mean, std};
    Filters filters(weight, bias, outputs, channels, kernel);
    int64_t rows = height - kernel + 1, columns = width - kernel + 1, size = columns * outputs;
    int64_t chunks = std::min<int64_t>(batch, 256);
    auto partials = zeros<double>(chunks * outputs);
    by_images(source, batch, chunks, threads, [&](int64_t chunk, int64_t begin, int64_t end, auto&& image) {
        auto z = buffer<float>(filters.row_size(columns)), sums = buffer<float>(filters.row_size(columns));
        for (int64_t i = begin; i < end; i++) {
            const float* pixels = image(i);
            // of a column over an image's rows in float32, everything else in float64
            std::fill_n(sums.get(), filters.row_size(columns), 0.f);
            for (int64_t r = 0; r < rows; r++) {
                filters.row(pixels + r * width * channels, width, columns, z.get());
                const T* from = dy + (i * rows + r) * size;
                by_channels(size, [&](int64_t k, auto lanes) {
                    Floats g = Act::backward(load(from + k, lanes), load(z.get() + k, All{}));
                    store(sums.get() + k, load(sums.get() + k, lanes) + g, lanes);
                });
            }
            for (int64_t x = 0; x < columns; x++) {
                for (int64_t o = 0; o < outputs; o++) partials[chunk * outputs + o] += sums[x * outputs + o];
            }
        }
    });
    for (int64_t o = 0; o < outputs; o++) {
        double total = 0;
        for (int64_t chunk = 0; chunk < chunks; chunk++) total += partials[chunk * outputs + o];
        dbias[o] = float(total);
    }
}

// y = act((z - mean) rstd + bias) of z = conv(images, weight), weight [O, C, k, k] folded of whitening and projection
extern "C" void whiten_norm_act_forward(
    const uint8_t* images, const int64_t* index, const int64_t* translation, const int64_t* cutout, const uint8_t* flip,
    const float* jitter, const float* mean, const float* std, const float* weight, const float* bias,
    const float* fixed_mean, const float* fixed_var, float* running_mean, float* running_var, float* batch_mean,
    float* batch_var, T* y, int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t outputs,
    int64_t kernel, int64_t cutout_size, double momentum, double eps, int threads) {
    Source source{images, index, translation, cutout, flip, jitter, cutout_size, height, width, channels, mean, std};
    Filters filters(weight, nullptr, outputs, channels, kernel);
    int64_t rows = height - kernel + 1, columns = width - kernel + 1, size = columns * outputs;
    int64_t chunks = chunks_of(batch, rows * columns);
    if (!fixed_mean) {
        Moments moments(chunks, outputs);
        by_images(source, batch, chunks, threads, [&](int64_t chunk, int64_t begin, int64_t end, auto&& image) {
            auto z = buffer<float>(filters.row_size(columns));
            auto shift = zeros<float>(filters.padded);
            Sums sums(outputs);
            // near the mean: that of the first image's middle row
            filters.row(image(begin) + rows / 2 * width * channels, width, columns, z.get());
            for (int64_t o = 0; o < outputs; o++) {
                double sum = 0;
                for (int64_t x = 0; x < columns; x++) sum += z[x * outputs + o];
                shift[o] = float(sum / columns);
            }
            for (int64_t i = begin; i < end; i++) {
                const float* pixels = image(i);
                for (int64_t r = 0; r < rows; r++) {
                    filters.row(pixels + r * width * channels, width, columns, z.get());
                    for (int64_t x = 0; x < columns; x++) {
                        const float* from = z.get() + x * outputs;
                        by_channels(outputs, [&](int64_t o, auto) {
                            // lanes beyond the last output hold others' values, into sums that nobody reads
                            sums.add_moments(o, shift.get(), load(from + o, All{}));
                        });
                        sums.count_row();
                    }
                }
            }
            moments.set(chunk, double(end - begin) * rows * columns, shift.get(), sums.total());
        });
        moments.merge(chunks, momentum, batch_mean, batch_var, running_mean, running_var);
    }
    Norm norm(outputs, fixed_mean ? fixed_mean : batch_mean, fixed_var ? fixed_var : batch_var, bias, nullptr, eps);
    auto means = repeated(norm.mean, outputs, columns), slopes = repeated(norm.slope, outputs, columns);
    auto biases = repeated(norm.bias, outputs, columns);
    by_images(source, batch, chunks, threads, [&](int64_t, int64_t begin, int64_t end, auto&& image) {
        auto z = buffer<float>(filters.row_size(columns));
        for (int64_t i = begin; i < end; i++) {
            const float* pixels = image(i);
            for (int64_t r = 0; r < rows; r++) {
                filters.row(pixels + r * width * channels, width, columns, z.get());
                T* to = y + (i * rows + r) * size;
                by_channels(size, [&](int64_t k, auto lanes) {
                    Floats centered = load(z.get() + k, All{}) - load(means.get() + k, All{});
                    Floats given = centered * load(slopes.get() + k, All{}) + load(biases.get() + k, All{});
                    store(to + k, Act::value(given), lanes);
                });
            }
        }
    });
}

// sums over all positions, float64, q being a patch of F features in the order [k, k, C]: [2 + 2 F, O] of g, g xhat,
// g q and xhat q, then [F] of q. Training: q less a constant, which cancels where the gradient has no mean, so that
// nothing is lost where pixels are all alike.
extern "C" void whiten_norm_act_backward(
    const T* dy, const uint8_t* images, const int64_t* index, const int64_t* translation, const int64_t* cutout,
    const uint8_t* flip, const float* jitter, const float* mean, const float* std, const float* weight,
    const float* bias, const float* batch_mean, const float* batch_var, double* sums, int64_t batch, int64_t height,
    int64_t width, int64_t channels, int64_t outputs, int64_t kernel, int64_t cutout_size, int training, double eps,
    int threads) {
    Source source{images, index, translation, cutout, flip, jitter, cutout_size, height, width, channels, mean, std};
    Filters filters(weight, nullptr, outputs, channels, kernel);
    Norm norm(outputs, batch_mean, batch_var, bias, nullptr, eps);
    int64_t rows = height - kernel + 1, columns = width - kernel + 1, size = columns * outputs;
    int64_t chunks = std::min<int64_t>(chunks_of(batch, rows * columns), 64), features = filters.features;
    int64_t rest = outputs * (2 + 2 * features), entries = rest + features, padded = filters.padded;
    auto means = repeated(norm.mean, outputs, columns), slopes = repeated(norm.slope, outputs, columns);
    auto biases = repeated(norm.bias, outputs, columns);
    auto partials = zeros<double>(chunks * entries);
    auto offset = zeros<float>(channels);
    if (training) {
        by_images(source, batch, 1, 1, [&](int64_t, int64_t, int64_t, auto&& image) {
            auto total = zeros<double>(channels);
            const float* pixels = image(0);
            for (int64_t k = 0; k < source.size(); k++) total[k % channels] += pixels[k];
            for (int64_t c = 0; c < channels; c++) offset[c] = float(total[c] / (height * width));
        });
    }
    by_images(source, batch, chunks, threads, [&](int64_t chunk, int64_t begin, int64_t end, auto&& image) {
        auto moved = buffer<float>(source.size()), of_row = buffer<float>(features);
        int64_t row_size = filters.row_size(columns);
        auto z = zeros<float>(row_size), g = zeros<float>(row_size), along = buffer<float>(2 * (1 + features) * padded);
        double* own = partials.get() + chunk * entries;
        for (int64_t i = begin; i < end; i++) {
            const float* pixels = image(i);
            for (int64_t p = 0; p < height * width; p++) {
                for (int64_t c = 0; c < channels; c++) moved[p * channels + c] = pixels[p * channels + c] - offset[c];
            }
            for (int64_t r = 0; r < rows; r++) {
                const float* patches = moved.get() + r * width * channels;
                filters.row(pixels + r * width * channels, width, columns, z.get());
                const T* from = dy + (i * rows + r) * size;
                by_channels(size, [&](int64_t k, auto lanes) {
                    Floats centered = load(z.get() + k, All{}) - load(means.get() + k, All{});
                    Floats xhat = centered * load(slopes.get() + k, All{});
                    Floats own_g = Act::backward(load(from + k, lanes), xhat + load(biases.get() + k, All{}));
                    store(g.get() + k, own_g, lanes);
                    store(z.get() + k, xhat, lanes);
                });
                // of a row in float32, rows in float64
                for (int64_t o = 0; o < outputs; o += LANES) {
                    float* to = along.get() + o;
                    Floats sum = {}, both = {};
                    for (int64_t x = 0; x < columns; x++) {
                        Floats value = load(g.get() + x * outputs + o, All{});
                        sum += value;
                        both += value * load(z.get() + x * outputs + o, All{});
                    }
                    store(to, sum, All{});
                    store(to + padded, both, All{});
                    // a few features at a time, whose sums do not wait for each other
                    constexpr int TOGETHER = 4;
                    for (int64_t first = 0; first < features; first += TOGETHER) {
                        const float* q[TOGETHER];
                        Floats with_g[TOGETHER] = {}, with_x[TOGETHER] = {};
                        for (int j = 0; j < TOGETHER; j++) {
                            int64_t f = std::min(first + j, features - 1), row = kernel * channels;
                            q[j] = patches + f / row * width * channels + f % row;
                        }
                        for (int64_t x = 0; x < columns; x++) {
                            Floats value = load(g.get() + x * outputs + o, All{});
                            Floats xhat = load(z.get() + x * outputs + o, All{});
                            for (int j = 0; j < TOGETHER; j++) {
                                with_g[j] += value * q[j][x * channels];
                                with_x[j] += xhat * q[j][x * channels];
                            }
                        }
                        for (int j = 0; j < TOGETHER && first + j < features; j++) {
                            store(to + (2 + first + j) * padded, with_g[j], All{});
                            store(to + (2 + features + first + j) * padded, with_x[j], All{});
                        }
                    }
                }
                std::fill_n(of_row.get(), features, 0.f);
                for (int64_t x = 0; x < columns; x++) {
                    for (int64_t ky = 0, length = kernel * channels; ky < kernel; ky++) {
                        const float* q = patches + (ky * width + x) * channels;
                        for (int64_t f = 0; f < length; f++) of_row[ky * length + f] += q[f];
                    }
                }
                for (int64_t f = 0; f < features; f++) own[rest + f] += of_row[f];
                for (int64_t e = 0; e < 2 + 2 * features; e++) {
                    for (int64_t o = 0; o < outputs; o++) own[e * outputs + o] += along[e * padded + o];
                }
            }
        }
    });
    for (int64_t e = 0; e < entries; e++) {
        sums[e] = 0;
        for (int64_t chunk = 0; chunk < chunks; chunk++) sums[e] += partials[chunk * entries + e];
    }
}
