// Values of the activations, and gradients times their derivatives: for infinite and NaN arguments what PyTorch gives.
// Which one a library is compiled for, ACTIVATION says, and for which values, DTYPE.
#pragma once
#include "simd.hpp"

namespace {

struct Identity {
    static Floats value(Floats z) { return z; }
    static Floats backward(Floats dy, Floats) { return dy; }
};

struct Relu {
    static Floats value(Floats z) { return z < 0.f ? Floats{} : z; }
    // a choice, not a product: an infinite dy times 0 would be NaN; a NaN z lets dy through
    static Floats backward(Floats dy, Floats z) { return z <= 0.f ? Floats{} : dy; }
};

struct Silu {
    // 1 / (1 + e^-z) by the exponential of -|z|, which cannot overflow
    static Floats sigmoid(Floats z) {
        Floats e = exp2_of_negative(magnitude(z) * -1.44269504f);
        return (z < 0.f ? e : 1.f + Floats{}) * reciprocal(1.f + e);
    }
    static Floats value(Floats z) { return z * sigmoid(z); }
    static Floats backward(Floats dy, Floats z) {
        Floats s = sigmoid(z);
        return dy * (s * (1.f + z * (1.f - s)));
    }
};

struct Gelu {
    // Phi(-m) for m >= 0: the fit of kernels/activations.py, and both formulas with it
    static Floats tail(Floats m) {
        Floats p = 3.296825525467284e-05f + m * -2.2758897557650926e-06f;
        p = -0.00020247547945473343f + m * (-0.00015728003927506506f + m * p);
        p = -0.0525464303791523f + m * (0.007142776623368263f + m * p);
        p = -1.1511069536209106f + m * (-0.45919305086135864f + m * p);
        return exp2_of_negative(-0.9999999403953552f + m * p);
    }
    static Floats value(Floats z) {
        // an infinite z has no product with a tail of 0; a NaN z is larger than nothing and stays
        Floats m = magnitude(z > 16.f ? 16.f + Floats{} : z);
        return (z < 0.f ? Floats{} : z) - m * tail(m);
    }
    static Floats backward(Floats dy, Floats z) {
        Floats m = magnitude(z), e = exp2_of_negative(z * -0.7213475204444817f * z);
        Floats q = tail(m) - 0.3989422804014327f * m * e;
        return dy * (z < 0.f ? q : 1.f - q);
    }
};

struct Hardswish {
    static Floats value(Floats z) {
        Floats gate = z <= -3.f ? Floats{} : (z >= 3.f ? 1.f + Floats{} : (z + 3.f) * 0.16666666666666666f);
        return z * gate;
    }
    static Floats backward(Floats dy, Floats z) {
        Floats inner = z < 3.f ? z * 0.3333333333333333f + 0.5f : 1.f + Floats{};
        return z <= -3.f ? Floats{} : dy * inner;
    }
};

}  // namespace
