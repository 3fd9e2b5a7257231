// Updates of lists of float32 tensors, each value read once and written once; tensors are flat memory of any layout.
#include <cmath>

#include "parallel.hpp"
#include "simd.hpp"

namespace {

using T = DTYPE;

constexpr int64_t PIECE = 16384;

int64_t pieces_of(int64_t size) { return (size + PIECE - 1) / PIECE; }

// work(tensor, first value, values) for pieces of all tensors
template <class Work>
void by_pieces(int64_t tensors, const int64_t* sizes, int threads, Work&& work) {
    int64_t count = 0;
    for (int64_t i = 0; i < tensors; i++) count += pieces_of(sizes[i]);
    parallel(threads, count, [&](int64_t piece) {
        int64_t i = 0;
        while (piece >= pieces_of(sizes[i])) piece -= pieces_of(sizes[i++]);
        work(i, piece * PIECE, std::min(PIECE, sizes[i] - piece * PIECE));
    });
}

double sum_of_squares(const float* values, int64_t size, int threads) {
    int64_t pieces = pieces_of(size);
    auto partials = buffer<double>(pieces);
    by_pieces(1, &size, threads, [&](int64_t, int64_t first, int64_t count) {
        double total = 0;
        // float32 sums of few values, float64 sums of those
        for (int64_t from = first; from < first + count; from += 16 * LANES) {
            Floats sum = {};
            by_channels(std::min<int64_t>(16 * LANES, first + count - from), [&](int64_t k, auto lanes) {
                Floats v = load(values + from + k, lanes);
                sum += v * v;
            });
            for (int k = 0; k < LANES; k++) total += sum[k];
        }
        partials[first / PIECE] = total;
    });
    double total = 0;
    for (int64_t i = 0; i < pieces; i++) total += partials[i];
    return total;
}

}  // namespace

// g = grad + decay p, buf = momentum buf + g, p -= rate (g + momentum buf), or rate buf
extern "C" void sgd_step(float* const* params, const float* const* grads, float* const* buffers, const int64_t* sizes,
                         const float* rates, int64_t tensors, double momentum, double decay, int nesterov,
                         int threads) {
    float m = float(momentum), d = float(decay);
    by_pieces(tensors, sizes, threads, [&](int64_t i, int64_t first, int64_t count) {
        float *p = params[i] + first, *b = buffers[i] + first;
        const float* given = grads[i] + first;
        float rate = rates[i];
        by_channels(count, [&](int64_t k, auto lanes) {
            Floats weight = load(p + k, lanes), g = load(given + k, lanes) + d * weight;
            Floats velocity = m * load(b + k, lanes) + g;
            store(b + k, velocity, lanes);
            store(p + k, weight - rate * (nesterov ? g + m * velocity : velocity), lanes);
        });
    });
}

// buf = momentum buf + share grad, g = share grad + momentum buf or buf; x = g / (|g| + eps)
extern "C" void muon_momentum(const float* grad, float* buf, float* g, T* x, int64_t size, double momentum,
                              double share, double eps, int nesterov, int threads) {
    float m = float(momentum), s = float(share);
    by_pieces(1, &size, threads, [&](int64_t, int64_t first, int64_t count) {
        by_channels(count, [&](int64_t k, auto lanes) {
            Floats own = s * load(grad + first + k, lanes), velocity = m * load(buf + first + k, lanes) + own;
            store(buf + first + k, velocity, lanes);
            store(g + first + k, nesterov ? own + m * velocity : velocity, lanes);
        });
    });
    float scale = float(1 / (std::sqrt(sum_of_squares(g, size, threads)) + eps));
    by_pieces(1, &size, threads, [&](int64_t, int64_t first, int64_t count) {
        by_channels(count, [&](int64_t k, auto lanes) {
            store(x + first + k, load(g + first + k, lanes) * scale, lanes);
        });
    });
}

// p = p scale - rate update; the scale is `keep`, after p was brought to `norm` if that is not 0; zeros stay zeros
extern "C" void muon_update(float* p, const T* update, int64_t size, double norm, double keep, double rate,
                            int threads) {
    double square = norm ? sum_of_squares(p, size, threads) : 0;
    float scale = float(square ? keep * norm / std::sqrt(square) : keep), r = float(rate);
    by_pieces(1, &size, threads, [&](int64_t, int64_t first, int64_t count) {
        by_channels(count, [&](int64_t k, auto lanes) {
            store(p + first + k, load(p + first + k, lanes) * scale - r * load(update + first + k, lanes), lanes);
        });
    });
}
