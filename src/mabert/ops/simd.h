// Vectors of floats as wide as the instruction set, and the functions the kernels need on them.
//
// Every kernel source is compiled once per instruction set with MABERT_ISA naming the namespace; native.cpp picks one at
// run time. Nothing here may come from a header with non-inline templates, or the linker could hand AVX-512 code to an
// older processor.
#pragma once
#include <stdint.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#ifndef MABERT_ISA
#error "compile kernels with -DMABERT_ISA=<namespace>"
#endif

namespace mabert::MABERT_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

struct bf16 {
    uint16_t bits;
};

#define INLINE static inline __attribute__((always_inline))

INLINE vf splat(float a) { return a - vf{}; }

INLINE vf load(const float* p) {
    vf v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

INLINE vf load(const bf16* p) {
    vh v;
    __builtin_memcpy(&v, p, sizeof v);
    return (vf)(__builtin_convertvector(v, vu) << 16);
}

INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

INLINE void store(bf16* p, vf v) {
    const vu bits = (vu)v;
    const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    const vu nan = (bits >> 16) | 0x40;
    const vh half = __builtin_convertvector((v == v) ? rounded : nan, vh);
    __builtin_memcpy(p, &half, sizeof half);
}

INLINE float scalar(const float* p) { return *p; }

INLINE float scalar(const bf16* p) {
    const uint32_t bits = (uint32_t)p->bits << 16;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
}

// The first `count` lanes, the others zero.
template <class T>
INLINE vf load(const T* p, int count) {
    if (count == LANES) return load(p);
    float lanes[LANES] = {};
    for (int i = 0; i < count; i++) lanes[i] = scalar(p + i);
    return load(lanes);
}

template <class T>
INLINE void store(T* p, vf v, int count) {
    if (count == LANES) return store(p, v);
    T lanes[LANES];
    store(lanes, v);
    for (int i = 0; i < count; i++) p[i] = lanes[i];
}

INLINE float sum(vf v) {
    float lanes[LANES];
    store(lanes, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

// e^x: exp(0) is 1 exactly; within 1 ulp and unbiased for |x| <= 0.1, so that long products of decays stay true;
// relative error below 2.5e-7 elsewhere. Below -87 it stays at e^-87, above 88 at e^88.
INLINE vf exp(vf x) {
    x = x < -87.0f ? splat(-87.0f) : x;
    x = x > 88.0f ? splat(88.0f) : x;
    const vf shifted = x * 1.44269504f + 12582912.0f;  // 1.5·2^23 leaves round(x / ln 2) in the low bits
    const vf n = shifted - 12582912.0f;
    const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    // minimax for (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2, relative error of e^r 3.1e-9
    vf p = r * 0.00138145615f + 0.00836870959f;
    p = p * r + 0.0416683909f;
    p = p * r + 0.166665211f;
    p = p * r + 0.499999933f;
    const vf e = 1.0f + (p * (r * r) + r);
    return (vf)((vi)e + (vi)((vu)shifted << 23));
}

// log(1 + u) for u in [0, 1], through 2 atanh(u / (2 + u)); relative error below 1e-7 however small u is.
INLINE vf log1p_unit(vf u) {
    const vf s = u / (2.0f + u), v = s * s;
    vf q = v * 0.140059962f + 0.140009016f;
    q = q * v + 0.200107634f;
    q = q * v + 0.333332077f;
    return 2.0f * (s * (v * q) + s);
}

INLINE vf softplus(vf v) {
    const vf magnitude = v < 0.0f ? -v : v;
    const vf positive = v < 0.0f ? vf{} : v;
    return positive + log1p_unit(exp(-magnitude));
}

INLINE vf sigmoid(vf v) {
    const vf e = exp(v < 0.0f ? v : -v);
    return (v < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

// Flushes denormals to zero while it lives: a state that decays to nothing would otherwise slow the scan down.
struct FlushDenormals {
#if defined(__x86_64__)
    unsigned saved = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(saved | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved); }
#endif
};

}  // namespace mabert::MABERT_ISA
