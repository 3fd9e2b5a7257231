// As many float32 lanes as a register of this processor holds, in the vector extensions of GCC and Clang; bfloat16 is
// widened by its bits and rounded to nearest even.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

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
    Words w = Words(_mm512_cvtepu16_epi32(__m256i(h))) << 16;
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
    __m256bh rounded = _mm512_cvtneps_pbh(__m512(v));
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
    // bytes by an instruction or by a loop: GCC 12 converts vectors of them one by one
#ifdef __AVX512F__
    __m128i bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return Ints(_mm512_cvtepu8_epi32(bytes));
#else
    int32_t values[LANES];
    for (int i = 0; i < LANES; i++) values[i] = from[i];
    Ints v;
    std::memcpy(&v, values, sizeof v);
    return v;
#endif
}

inline Ints load_index(const uint8_t* from, First lanes) {
    uint8_t values[LANES] = {};
    std::memcpy(values, from, lanes.count);
    return load_index(values, All{});
}

inline void store_index(uint8_t* to, Ints v, All) {
#ifdef __AVX512F__
    __m128i bytes = _mm512_cvtepi32_epi8(__m512i(v));
    std::memcpy(to, &bytes, sizeof bytes);
#else
    int32_t values[LANES];
    std::memcpy(values, &v, sizeof v);
    for (int i = 0; i < LANES; i++) to[i] = uint8_t(values[i]);
#endif
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

inline Floats magnitude(Floats v) {
#ifdef __AVX512F__
    return Floats(_mm512_abs_ps(__m512(v)));
#else
    return v < 0.f ? -v : v;
#endif
}

// 1 / v to float32's rounding, for v >= 1
inline Floats reciprocal(Floats v) {
#ifdef __AVX512F__
    // a Newton step from an estimate of 14 bits takes half of a division's time; of infinity its product is a NaN
    __m512 estimate = _mm512_rcp14_ps(__m512(v));
    __m512 error = _mm512_fnmadd_ps(__m512(v), estimate, _mm512_set1_ps(1.f));
    __mmask16 infinite = _mm512_cmp_ps_mask(estimate, _mm512_setzero_ps(), _CMP_EQ_OQ);
    error = _mm512_mask_mov_ps(error, infinite, _mm512_setzero_ps());
    return Floats(_mm512_fmadd_ps(estimate, error, estimate));
#else
    return 1.f / v;
#endif
}

// 2^x for x <= 0: a polynomial on [-1/2, 1/2] to float32's rounding
inline Floats exp2_of_negative(Floats x) {
#ifdef __AVX512F__
    Floats whole = Floats(_mm512_roundscale_ps(__m512(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    const float shift = 12582912.f;  // 1.5 * 2^23: added, the integer nearest to x stands in the lowest bits
    Floats shifted = x + shift, whole = shifted - shift;
#endif
    Floats f = x - whole;
    Floats p = 0.0013333558f + f * 0.00015403530f;
    p = 0.0096181291f + f * p;
    p = 0.055504109f + f * p;
    p = 0.24022651f + f * p;
    p = 0.69314718f + f * p;
    p = 1.f + f * p;
#ifdef __AVX512F__
    // of minus infinity f is a NaN, and the result 0
    Floats result = Floats(_mm512_scalef_ps(__m512(p), __m512(whole)));
#else
    Ints exponent, bits;
    std::memcpy(&exponent, &shifted, sizeof shifted);
    std::memcpy(&bits, &p, sizeof p);
    bits += exponent << 23;
    Floats result;
    std::memcpy(&result, &bits, sizeof bits);
#endif
    return x < -126.f ? Floats{} : result;
}

}  // namespace
