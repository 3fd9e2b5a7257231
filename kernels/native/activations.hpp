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
    // Phi(z) and exp(-z^2 / 2), with one exponential and one division: the fit of kernels/activations.py
    static Floats cdf(Floats z, Floats& e) {
        Floats t = reciprocal(1.f + magnitude(z) * 0.38890872965260115f);
        e = exp2_of_negative(z * -0.7213475204444817f * z);
        Floats p = -0.2572172153111593f + t * 0.05319669032864347f;
        p = -0.01862555922152061f + t * (0.3770982000405573f + t * p);
        Floats h = e * (t * (0.15090677604015446f + t * (0.19464109117593972f + t * p)));
        return z >= 0.f ? 1.f - h : h;
    }
    static Floats value(Floats z) {
        Floats e;
        return z * cdf(z, e);
    }
    static Floats backward(Floats dy, Floats z) {
        Floats e, phi = cdf(z, e);
        return dy * (phi + 0.3989422804014327f * (z * e));
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
