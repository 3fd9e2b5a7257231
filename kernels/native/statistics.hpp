// Batch statistics and sums of a gradient, of what chunks of images contribute, merged in the chunks' order.
#pragma once
#include <cmath>

#include "parallel.hpp"
#include "simd.hpp"

namespace {

// rows that float32 sums run over before they are added to float64 ones
constexpr int64_t ROWS = 16;

// What a chunk's rows sum to, for every channel: two sums in float32, moved to float64 from time to time.
class Sums {
  public:
    explicit Sums(int64_t channels)
        : channels_(channels), padded_((channels + LANES - 1) / LANES * LANES), narrow_(zeros<float>(2 * padded_)),
          wide_(zeros<double>(2 * channels)) {}

    // to the sums of a vector of channels
    inline __attribute__((always_inline)) void add(int64_t c, Floats to_first) { add_to(narrow_.get() + c, to_first); }
    inline __attribute__((always_inline)) void add(int64_t c, Floats to_first, Floats to_second) {
        add_to(narrow_.get() + c, to_first);
        add_to(narrow_.get() + padded_ + c, to_second);
    }
    // of v - shift, and of its square
    inline __attribute__((always_inline)) void add_moments(int64_t c, const float* shift, Floats v) {
        Floats d = v - load(shift + c, All{});
        add(c, d, d * d);
    }

    // after every row
    void count_row() {
        if (++rows_ == ROWS) flush();
    }

    // [2, channels]
    const double* total() {
        flush();
        return wide_.get();
    }

  private:
    static void add_to(float* sum, Floats v) { store(sum, load(sum, All{}) + v, All{}); }

    void flush() {
        for (int64_t i = 0; i < channels_; i++) {
            wide_[i] += narrow_[i];
            wide_[channels_ + i] += narrow_[padded_ + i];
        }
        std::fill_n(narrow_.get(), 2 * padded_, 0.f);
        rows_ = 0;
    }

    int64_t channels_, padded_, rows_ = 0;
    Buffer<float> narrow_;
    Buffer<double> wide_;
};

// Mean and squared deviations of a chunk, from sums of differences from a value near its mean.
struct Moments {
    Moments(int64_t chunks, int64_t channels)
        : channels(channels), mean(buffer<double>(chunks * channels)), m2(buffer<double>(chunks * channels)),
          counts(buffer<double>(chunks)) {}

    void set(int64_t chunk, double count, const float* shift, const double* sums) {
        counts[chunk] = count;
        for (int64_t c = 0; c < channels; c++) {
            double sum = sums[c], squares = sums[channels + c];
            mean[chunk * channels + c] = shift[c] + sum / count;
            m2[chunk * channels + c] = std::max(0., squares - sum * sum / count);
            if (squares != squares) m2[chunk * channels + c] = squares;
        }
    }

    // of all chunks (Chan et al. 1979): mean and biased variance [C]; running ones, if given, move as PyTorch's do
    void merge(int64_t chunks, double momentum, float* out_mean, float* out_var, float* running_mean,
               float* running_var) const {
        for (int64_t c = 0; c < channels; c++) {
            double n = counts[0], m = mean[c], d = m2[c];
            for (int64_t i = 1; i < chunks; i++) {
                double delta = mean[i * channels + c] - m, all = n + counts[i];
                m += delta * counts[i] / all;
                d += m2[i * channels + c] + delta * delta * n * counts[i] / all;
                n = all;
            }
            out_mean[c] = float(m);
            out_var[c] = float(d / n);
            if (running_mean) {
                running_mean[c] = float((1 - momentum) * running_mean[c] + momentum * m);
                running_var[c] = float((1 - momentum) * running_var[c] + momentum * d / (n - 1));
            }
        }
    }

    int64_t channels;
    Buffer<double> mean, m2, counts;
};

// What normalizes: z = (v - mean) * slope + bias, [C] each, padded to whole vectors.
struct Norm {
    Norm(int64_t channels, const float* mean_, const float* var, const float* bias_, const float* weight, double eps)
        : padded((channels + LANES - 1) / LANES * LANES), values(zeros<float>(4 * padded)), mean(values.get()),
          rstd(mean + padded), slope(rstd + padded), bias(slope + padded) {
        for (int64_t c = 0; c < channels; c++) {
            mean[c] = mean_[c];
            rstd[c] = float(1 / std::sqrt(double(var[c]) + eps));
            slope[c] = weight ? rstd[c] * weight[c] : rstd[c];
            bias[c] = bias_[c];
        }
    }

    Floats centered(Floats v, int64_t c) const { return v - load(mean + c, All{}); }
    Floats at(Floats centered, int64_t c) const {
        return centered * load(slope + c, All{}) + load(bias + c, All{});
    }

    int64_t padded;
    Buffer<float> values;
    float *mean, *rstd, *slope, *bias;
};

}  // namespace
