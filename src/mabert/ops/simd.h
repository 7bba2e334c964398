// Vectors of floats as wide as the instruction set, and the functions the kernels need on them.
//
// Every kernel source is compiled once per instruction set with MABERT_ISA naming the namespace; native.cpp picks one at
// run time. Nothing here may come from a header with non-inline templates, or the linker could hand AVX-512 code to an
// older processor.
#pragma once
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
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

template <int... I>
struct LaneList {};
#if defined(__AVX512F__)
typedef LaneList<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15> AllLanes;
#elif defined(__AVX2__)
typedef LaneList<0, 1, 2, 3, 4, 5, 6, 7> AllLanes;
#else
typedef LaneList<0, 1, 2, 3> AllLanes;
#endif

// Adds the two blocks of WIDTH lanes in each pair of blocks; sums from a and from b alternate in the result.
template <int WIDTH, int... I>
INLINE vf fold(vf a, vf b, LaneList<I...>) {
#define FROM(i) ((i) / WIDTH / 2 * 2 * WIDTH + (i) % WIDTH + (i) / WIDTH % 2 * LANES)
    return __builtin_shufflevector(a, b, FROM(I)...) + __builtin_shufflevector(a, b, (FROM(I) + WIDTH)...);
#undef FROM
}

// LANES sums at once: lane i of the result is the sum over the lanes of v[i]. Overwrites v.
template <int WIDTH = LANES / 2>
INLINE vf sums(vf* v) {
    for (int i = 0; i < WIDTH; i++) v[i] = fold<WIDTH>(v[i], v[i + WIDTH], AllLanes());
    if constexpr (WIDTH > 1)
        return sums<WIDTH / 2>(v);
    else
        return v[0];
}

// max(x, bound), NaN where x is NaN.
INLINE vf at_least(vf x, float bound) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)splat(bound), (__m512)x);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)splat(bound), (__m256)x);
#else
    return x < bound ? splat(bound) : x;
#endif
}

// min(x, bound), NaN where x is NaN.
INLINE vf at_most(vf x, float bound) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (vf)_mm256_min_ps((__m256)splat(bound), (__m256)x);
#else
    return x > bound ? splat(bound) : x;
#endif
}

// A number split as n + f, n the nearest integer. `bits` holds n where there is no instruction that multiplies by 2^n.
struct Split {
    vf n, f;
#if !defined(__AVX512F__)
    vu bits;
#endif
};

INLINE Split split(vf t) {
    Split s;
#if defined(__AVX512F__)
    s.n = (vf)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const vf shifted = t + 12582912.0f;  // 1.5·2^23 leaves the integer in the low bits
    s.bits = (vu)shifted;
    s.n = shifted - 12582912.0f;
#endif
    s.f = t - s.n;
    return s;
}

// 2^(n + f): minimax for (2^f - 1 - f ln 2) / f^2 on |f| <= 1/2, relative error of 2^f 2.9e-9; 1 exactly at 0.
INLINE vf power_of_two(const Split& s) {
    vf p = s.f * 0.00015324315f + 0.0013390959f;
    p = p * s.f + 0.009618518f;
    p = p * s.f + 0.055503596f;
    p = p * s.f + 0.24022648f;
    p = p * s.f + 0.693147182f;
    p = p * s.f + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)s.n);
#else
    return (vf)((vi)p + (vi)(s.bits << 23));
#endif
}

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147182f;

// 2^t for finite t, the decay of the scan with t = Δ·(A log2 e): 1 exactly at 0; within 1 ulp and unbiased for
// |t| <= 0.14, so that long products of decays stay true. Below -126 it stays there or goes to zero, from 128 on it is
// infinite.
INLINE vf exp2(vf t) {
#if !defined(__AVX512F__)
    t = at_most(at_least(t, -126.0f), 128.0f);
#endif
    return power_of_two(split(t));
}

// e^x for x <= 88: exp(0) is 1 exactly; relative error below 2.5e-7, within 1 ulp for |x| <= 0.1. Below -87 it stays.
INLINE vf exp(vf x) {
    x = at_least(x, -87.0f);
    Split s = split(x * LOG2_E);
    s.f = ((x - s.n * 0.693359375f) + s.n * 2.12194440e-4f) * LOG2_E;  // ln 2 in two parts, the first one short
    return power_of_two(s);
}

// log(1 + u) for u in [0, 1], through 2 atanh(u / (2 + u)); relative error below 1e-7 however small u is.
INLINE vf log1p_unit(vf u) {
    const vf s = u / (2.0f + u), v = s * s;
    vf q = v * 0.140059962f + 0.140009016f;
    q = q * v + 0.200107634f;
    q = q * v + 0.333332077f;
    return 2.0f * (s * (v * q) + s);
}

INLINE vf sigmoid(vf v) {
    const vf e = exp(v < 0.0f ? v : -v);
    return (v < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

// log(1 + e^v) and its slope, the sigmoid.
INLINE vf softplus(vf v, vf& slope) {
    const vf e = exp(v < 0.0f ? v : -v);
    slope = (v < 0.0f ? e : splat(1.0f)) / (1.0f + e);
    return (v < 0.0f ? vf{} : v) + log1p_unit(e);
}

INLINE vf softplus(vf v) {
    vf unused;
    return softplus(v, unused);
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
