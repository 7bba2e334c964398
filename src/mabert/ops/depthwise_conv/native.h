// What the depthwise convolution's kernel is given and how its work is divided.
#pragma once
#include <stdint.h>

#include "../selective_scan/native.h"

namespace mabert {

constexpr int MAX_WIDTH = 16;  // taps

struct ConvArgs {
    int64_t batch, length, inner, units;
    int width, left;
    const int32_t* cu;    // (units + 1) boundaries in one row, or null
    const uint8_t* mask;  // (B, L), or null
    bool bf16, silu;
    Rows x, y, dy, dx;
    const float *weight, *bias;       // (W, E), (E) or null
    float *dweight_part, *dbias_part;  // (unit groups, W, E), (unit groups, E)
    int64_t units_per_group;
};

#define MABERT_CONV_KERNELS(isa)                                          \
    namespace isa {                                                       \
    void conv_forward(const ConvArgs&, int64_t unit, int64_t channel);    \
    void conv_backward(const ConvArgs&, int64_t group, int64_t channel);  \
    }
MABERT_CONV_KERNELS(avx512)
MABERT_CONV_KERNELS(avx2)
MABERT_CONV_KERNELS(baseline)

}  // namespace mabert
