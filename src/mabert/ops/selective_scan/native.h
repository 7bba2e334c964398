// What the selective scan's kernel is given and how its work is divided.
#pragma once
#include <stdint.h>

namespace mabert {

// A tensor (B, L, F) whose last dimension is contiguous; strides in elements. Null when absent.
struct Rows {
    void* data;
    int64_t batch_stride, time_stride;
};

struct ScanArgs {
    int64_t batch, length, inner, state;
    int64_t units;            // sequences: rows of the batch, or stretches of one row
    const int32_t* cu;        // (units + 1) boundaries in one row, or null
    const uint8_t* mask;      // (B, L), or null
    const int64_t* kept_row;  // (units) first row of `kept` of each unit
    bool bf16, softplus, reverse, keep;
    Rows x, delta, B, C, z, y;
    const float *A, *D, *bias, *initial;  // (E, N), (E), (E), (units, E, N)
    float *final_state, *kept;            // (units, E, N); (rows, E, N), the state before each tile, by 16 channels

    // Backward only.
    Rows dy, dx, ddelta, dz;
    const float* dfinal;                 // (units, E, N)
    float* dinitial;                     // (units, E, N), or null
    float *dB_part, *dC_part;            // (groups, B·L, N), summed over groups afterwards
    float *dA_part, *dD_part, *dbias_part;  // (unit groups, E, N), (unit groups, E), (unit groups, E)
    int64_t units_per_group;
};

constexpr int TILE = 32;            // steps between two kept states
constexpr int CHANNELS = 128;       // channels of one task
constexpr int64_t UNIT_GROUPS = 16;  // at most so many partial sums over units

// Bytes of scratch that one task needs, for the widest vectors (64 bytes).
inline int64_t scan_scratch_bytes(int64_t state) {
    const int64_t per_state = 3 * 4 * CHANNELS + 4 * 4 * TILE + 64 * (2 * TILE + 1);
    return per_state * state + 2 * 4 * CHANNELS + 64 * 5 * TILE + 64 * 16;
}

#define MABERT_SCAN_KERNELS(isa)                                                         \
    namespace isa {                                                                      \
    void scan_forward(const ScanArgs&, int64_t unit, int64_t channel, void* scratch);    \
    void scan_backward(const ScanArgs&, int64_t group, int64_t channel, void* scratch);  \
    void vector_function(int which, const float* in, float* out, int64_t n);             \
    }
MABERT_SCAN_KERNELS(avx512)
MABERT_SCAN_KERNELS(avx2)
MABERT_SCAN_KERNELS(baseline)

}  // namespace mabert
