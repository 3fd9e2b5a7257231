// F(M x M, 3 x 3) for tiles of M x M outputs: y = A^T [(G g G^T) * (B^T d B)] A, one dimension at a time.
// The matrices are of Toom and Cook's algorithm (Lavin and Gray, 2015) at the points 0, 1, -1, then 2, then -2, and
// infinity. Gradients are by the adjoints: of the outputs A y A^T, of the filters G^T u G.
#pragma once
#include "simd.hpp"

namespace {

template <int M>
struct Tile;

template <>
struct Tile<2> {
    static void input(const Floats* d, Floats* v) {
        v[0] = d[0] - d[2];
        v[1] = d[1] + d[2];
        v[2] = d[2] - d[1];
        v[3] = d[1] - d[3];
    }
    static void output(const Floats* m, Floats* y) {
        y[0] = m[0] + (m[1] + m[2]);
        y[1] = (m[1] - m[2]) - m[3];
    }
    static void output_adjoint(const Floats* y, Floats* z) {
        z[0] = y[0];
        z[1] = y[0] + y[1];
        z[2] = y[0] - y[1];
        z[3] = -y[1];
    }
    static void filter(const Floats* g, Floats* u) {
        Floats even = (g[0] + g[2]) * 0.5f, odd = g[1] * 0.5f;
        u[0] = g[0];
        u[1] = even + odd;
        u[2] = even - odd;
        u[3] = g[2];
    }
    static void filter_adjoint(const Floats* u, Floats* g) {
        Floats even = (u[1] + u[2]) * 0.5f;
        g[0] = u[0] + even;
        g[1] = (u[1] - u[2]) * 0.5f;
        g[2] = even + u[3];
    }
};

template <>
struct Tile<3> {
    static void input(const Floats* d, Floats* v) {
        Floats rest = d[3] - d[1];
        v[0] = (d[0] - d[2]) * 2.f + rest;
        v[1] = d[3] - d[1] * 2.f - d[2];
        v[2] = d[3] + d[1] * 2.f - d[2] * 3.f;
        v[3] = rest;
        v[4] = d[4] - d[2] - rest * 2.f;
    }
    static void output(const Floats* m, Floats* y) {
        Floats sum = m[1] + m[2];
        y[0] = m[0] + sum + m[3];
        y[1] = m[1] - m[2] + m[3] * 2.f;
        y[2] = sum + m[3] * 4.f + m[4];
    }
    static void output_adjoint(const Floats* y, Floats* z) {
        Floats even = y[0] + y[2];
        z[0] = y[0];
        z[1] = even + y[1];
        z[2] = even - y[1];
        z[3] = y[0] + y[1] * 2.f + y[2] * 4.f;
        z[4] = y[2];
    }
    static void filter(const Floats* g, Floats* u) {
        Floats even = g[0] + g[2];
        u[0] = g[0] * 0.5f;
        u[1] = (even + g[1]) * -0.5f;
        u[2] = (even - g[1]) * (-1.f / 6);
        u[3] = (g[0] + g[1] * 2.f + g[2] * 4.f) * (1.f / 6);
        u[4] = g[2];
    }
    static void filter_adjoint(const Floats* u, Floats* g) {
        Floats one = u[1] * -0.5f, minus = u[2] * (-1.f / 6), two = u[3] * (1.f / 6);
        g[0] = u[0] * 0.5f + (one + minus) + two;
        g[1] = one - minus + two * 2.f;
        g[2] = (one + minus) + two * 4.f + u[4];
    }
};

template <>
struct Tile<4> {
    static void input(const Floats* d, Floats* v) {
        Floats even = d[4] - d[2] * 4.f, odd = d[3] - d[1] * 4.f;
        Floats even2 = d[4] - d[2], odd2 = (d[3] - d[1]) * 2.f;
        v[0] = d[0] * 4.f - d[2] * 5.f + d[4];
        v[1] = even + odd;
        v[2] = even - odd;
        v[3] = even2 + odd2;
        v[4] = even2 - odd2;
        v[5] = d[1] * 4.f - d[3] * 5.f + d[5];
    }
    static void output(const Floats* m, Floats* y) {
        Floats sum = m[1] + m[2], difference = m[1] - m[2], sum2 = m[3] + m[4], difference2 = m[3] - m[4];
        y[0] = m[0] + sum + sum2;
        y[1] = difference + difference2 * 2.f;
        y[2] = sum + sum2 * 4.f;
        y[3] = difference + difference2 * 8.f + m[5];
    }
    static void output_adjoint(const Floats* y, Floats* z) {
        Floats even = y[0] + y[2], odd = y[1] + y[3];
        Floats even2 = y[0] + y[2] * 4.f, odd2 = (y[1] + y[3] * 4.f) * 2.f;
        z[0] = y[0];
        z[1] = even + odd;
        z[2] = even - odd;
        z[3] = even2 + odd2;
        z[4] = even2 - odd2;
        z[5] = y[3];
    }
    static void filter(const Floats* g, Floats* u) {
        Floats even = (g[0] + g[2]) * (-1.f / 6), odd = g[1] * (-1.f / 6);
        Floats even2 = g[0] * (1.f / 24) + g[2] * (1.f / 6), odd2 = g[1] * (1.f / 12);
        u[0] = g[0] * 0.25f;
        u[1] = even + odd;
        u[2] = even - odd;
        u[3] = even2 + odd2;
        u[4] = even2 - odd2;
        u[5] = g[2];
    }
    static void filter_adjoint(const Floats* u, Floats* g) {
        Floats sum = (u[1] + u[2]) * (-1.f / 6), sum2 = u[3] + u[4];
        g[0] = u[0] * 0.25f + sum + sum2 * (1.f / 24);
        g[1] = (u[1] - u[2]) * (-1.f / 6) + (u[3] - u[4]) * (1.f / 12);
        g[2] = sum + sum2 * (1.f / 6) + u[5];
    }
};

// step along columns, then along rows: FROM x FROM values, each from get(k), to TO x TO ones, each to put(k, value)
template <int FROM, int TO, auto STEP>
inline __attribute__((always_inline)) void in_both(auto&& get, auto&& put) {
    Floats half[TO][FROM], values[FROM], results[TO];
#pragma GCC unroll 8
    for (int j = 0; j < FROM; j++) {
#pragma GCC unroll 8
        for (int i = 0; i < FROM; i++) values[i] = get(i * FROM + j);
        STEP(values, results);
#pragma GCC unroll 8
        for (int i = 0; i < TO; i++) half[i][j] = results[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < TO; i++) {
        STEP(half[i], results);
#pragma GCC unroll 8
        for (int j = 0; j < TO; j++) put(i * TO + j, results[j]);
    }
}

}  // namespace
