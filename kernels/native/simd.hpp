// Sixteen float32 lanes in the vector extensions of GCC and Clang, which any processor's instructions are made from;
// bfloat16 is widened by its bits and rounded to nearest even.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

struct BFloat16 {
    uint16_t bits;
};

// how many lanes of a vector are channels: all, said by a type so that it costs nothing, or the last few
struct All {};
struct First {
    int count;
};

inline Floats load(const float* from, All) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline Floats widened(Halves h) {
#ifdef __AVX512F__
    // one instruction, of which GCC 12 makes four
    __m512i wide = _mm512_cvtepu16_epi32((__m256i)h);
    Words w;
    std::memcpy(&w, &wide, sizeof w);
    w <<= 16;
#else
    Words w = __builtin_convertvector(h, Words) << 16;
#endif
    Floats v;
    std::memcpy(&v, &w, sizeof v);
    return v;
}

inline Floats load(const BFloat16* from, All) {
    Halves h;
    std::memcpy(&h, from, sizeof h);
    return widened(h);
}

template <class T>
inline Floats load(const T* from, First lanes) {
    T values[LANES] = {};
    std::memcpy(values, from, lanes.count * sizeof(T));
    return load(values, All{});
}

inline void store(float* to, Floats v, All) { std::memcpy(to, &v, sizeof v); }

inline void store(BFloat16* to, Floats v, All) {
#ifdef __AVX512BF16__
    __m512 given;
    std::memcpy(&given, &v, sizeof v);
    __m256bh rounded = _mm512_cvtneps_pbh(given);
    std::memcpy(to, &rounded, sizeof rounded);
#else
    Words w;
    std::memcpy(&w, &v, sizeof w);
    Words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    // rounding could carry a NaN into an infinity
    Words kept = v != v ? (w >> 16) | 0x40 : rounded;
    Halves h = __builtin_convertvector(kept, Halves);
    std::memcpy(to, &h, sizeof h);
#endif
}

template <class T>
inline void store(T* to, Floats v, First lanes) {
    T values[LANES];
    store(values, v, All{});
    std::memcpy(to, values, lanes.count * sizeof(T));
}

inline Ints load_index(const uint8_t* from, All) {
    Bytes b;
    std::memcpy(&b, from, sizeof b);
    return __builtin_convertvector(b, Ints);
}

inline Ints load_index(const uint8_t* from, First lanes) {
    uint8_t values[LANES] = {};
    std::memcpy(values, from, lanes.count);
    return load_index(values, All{});
}

inline void store_index(uint8_t* to, Ints v, All) {
    Bytes b = __builtin_convertvector(v, Bytes);
    std::memcpy(to, &b, sizeof b);
}

inline void store_index(uint8_t* to, Ints v, First lanes) {
    uint8_t values[LANES];
    store_index(values, v, All{});
    std::memcpy(to, values, lanes.count);
}

// body(first channel, lanes) for all channels
template <class Body>
inline __attribute__((always_inline)) void by_channels(int64_t channels, Body&& body) {
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) body(c, All{});
    if (c < channels) body(c, First{int(channels - c)});
}

// 2^x for x <= 0: a polynomial on [-1/2, 1/2] to float32's rounding, 0 where the result would be subnormal
inline Floats exp2_of_negative(Floats x) {
    const float shift = 12582912.f;  // 1.5 * 2^23: added, the integer nearest to x stands in the lowest bits
    Floats shifted = x + shift;
    Floats f = x - (shifted - shift);
    Floats p = 0.0013333558f + f * 0.00015403530f;
    p = 0.0096181291f + f * p;
    p = 0.055504109f + f * p;
    p = 0.24022651f + f * p;
    p = 0.69314718f + f * p;
    p = 1.f + f * p;
    Ints exponent, bits;
    std::memcpy(&exponent, &shifted, sizeof shifted);
    std::memcpy(&bits, &p, sizeof p);
    bits += exponent << 23;
    Floats result;
    std::memcpy(&result, &bits, sizeof bits);
    return x < -126.f ? Floats{} : result;
}

}  // namespace
