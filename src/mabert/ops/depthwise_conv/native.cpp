// The depthwise convolution on a CPU, forward and backward, SiLU fused.
//
// A task owns 128 channels of one sequence (forward) or of a group of sequences (backward). Neighbours beyond a boundary
// or under the mask count as zero. The backward recomputes what stood before the SiLU.
#include "native.h"

#include "../simd.h"

namespace mabert::MABERT_ISA {
namespace {

struct Unit {
    int64_t row, start, length;
};

Unit unit_of(const ConvArgs& a, int64_t unit) {
    if (!a.cu) return {unit, 0, a.length};
    return {0, a.cu[unit], a.cu[unit + 1] - a.cu[unit]};
}

template <class T>
INLINE T* at(const Rows& rows, const Unit& u, int64_t step) {
    return (T*)rows.data + u.row * rows.batch_stride + (u.start + step) * rows.time_stride;
}

INLINE bool real(const ConvArgs& a, const Unit& u, int64_t step) {
    return step >= 0 && step < u.length && (!a.mask || a.mask[u.row * a.length + u.start + step]);
}

template <class T>
INLINE vf value(const ConvArgs& a, const Rows& rows, const Unit& u, int64_t step, int64_t channel, int lanes) {
    return real(a, u, step) ? load(at<T>(rows, u, step) + channel, lanes) : vf{};
}

// A window of the last W values slides along; values[w] is the neighbour that weight[w] multiplies.
template <class T, int WIDTH>
void forward_block(const ConvArgs& a, const Unit& u, int64_t channel, int lanes) {
    const int W = WIDTH ? WIDTH : a.width;
    vf weight[WIDTH ? WIDTH : MAX_WIDTH], window[WIDTH ? WIDTH : MAX_WIDTH];
    const vf bias = a.bias ? load(a.bias + channel, lanes) : vf{};
    for (int w = 0; w < W; w++) weight[w] = load(a.weight + w * a.inner + channel, lanes);
    for (int w = 1; w < W; w++) window[w] = value<T>(a, a.x, u, w - 1 - a.left, channel, lanes);
    for (int64_t t = 0; t < u.length; t++) {
        for (int w = 0; w + 1 < W; w++) window[w] = window[w + 1];
        window[W - 1] = value<T>(a, a.x, u, t + W - 1 - a.left, channel, lanes);
        vf s = bias;
        for (int w = 0; w < W; w++) s += weight[w] * window[w];
        if (a.silu) s *= sigmoid(s);
        store(at<T>(a.y, u, t) + channel, real(a, u, t) ? s : vf{}, lanes);
    }
}

// dx[t] = Σ_w weight[w] · ds[t - w + left], where ds is dy times the slope of the SiLU.
template <class T, int WIDTH>
void backward_block(const ConvArgs& a, const Unit& u, int64_t channel, int lanes, vf* dweight, vf* dbias) {
    const int W = WIDTH ? WIDTH : a.width;
    vf weight[WIDTH ? WIDTH : MAX_WIDTH], window[WIDTH ? WIDTH : MAX_WIDTH], ds[WIDTH ? WIDTH : MAX_WIDTH];
    vf sums[WIDTH ? WIDTH : MAX_WIDTH], bias_sum = {};
    const vf bias = a.bias ? load(a.bias + channel, lanes) : vf{};
    for (int w = 0; w < W; w++) {
        weight[w] = load(a.weight + w * a.inner + channel, lanes);
        ds[w] = sums[w] = vf{};
    }
    for (int w = 1; w < W; w++) window[w] = value<T>(a, a.x, u, w - 1 - a.left, channel, lanes);
    // step t makes ds[t], the last one that dx[t - left] needs
    for (int64_t t = 0; t < u.length + a.left; t++) {
        for (int w = 0; w + 1 < W; w++) {
            window[w] = window[w + 1];
            ds[w] = ds[w + 1];
        }
        window[W - 1] = value<T>(a, a.x, u, t + W - 1 - a.left, channel, lanes);
        vf d = value<T>(a, a.dy, u, t, channel, lanes);
        if (a.silu && t < u.length) {
            vf s = bias;
            for (int w = 0; w < W; w++) s += weight[w] * window[w];
            const vf g = sigmoid(s);
            d *= g + s * g * (1.0f - g);
        }
        ds[W - 1] = d;
        if (t < u.length) {
            for (int w = 0; w < W; w++) sums[w] += d * window[w];
            bias_sum += d;
        }
        const int64_t done = t - a.left;
        if (done < 0) continue;
        vf dx = {};
        for (int w = 0; w < W; w++) dx += weight[w] * ds[W - 1 - w];
        store(at<T>(a.dx, u, done) + channel, real(a, u, done) ? dx : vf{}, lanes);
    }
    for (int w = 0; w < W; w++) dweight[w] += sums[w];
    *dbias += bias_sum;
}

template <class T, int WIDTH>
void forward(const ConvArgs& a, int64_t unit, int64_t channel, int lanes) {
    forward_block<T, WIDTH>(a, unit_of(a, unit), channel, lanes);
}

template <class T, int WIDTH>
void backward(const ConvArgs& a, int64_t group, int64_t channel, int lanes) {
    const int64_t first = group * a.units_per_group;
    const int64_t last = first + a.units_per_group < a.units ? first + a.units_per_group : a.units;
    vf dweight[WIDTH ? WIDTH : MAX_WIDTH] = {}, dbias = {};
    for (int64_t unit = first; unit < last; unit++)
        backward_block<T, WIDTH>(a, unit_of(a, unit), channel, lanes, dweight, &dbias);
    for (int w = 0; w < a.width; w++)
        store(a.dweight_part + (group * a.width + w) * a.inner + channel, dweight[w], lanes);
    store(a.dbias_part + group * a.inner + channel, dbias, lanes);
}

template <class Run>
void for_blocks(const ConvArgs& a, int64_t first_channel, Run run) {
    const int64_t end = first_channel + CHANNELS < a.inner ? first_channel + CHANNELS : a.inner;
    for (int64_t c = first_channel; c < end; c += LANES) run(c, end - c < LANES ? (int)(end - c) : LANES);
}

}  // namespace

void conv_forward(const ConvArgs& a, int64_t unit, int64_t channel) {
    const FlushDenormals flush;
    for_blocks(a, channel, [&](int64_t c, int lanes) {
        if (a.bf16)
            a.width == 4 ? forward<bf16, 4>(a, unit, c, lanes) : forward<bf16, 0>(a, unit, c, lanes);
        else
            a.width == 4 ? forward<float, 4>(a, unit, c, lanes) : forward<float, 0>(a, unit, c, lanes);
    });
}

void conv_backward(const ConvArgs& a, int64_t group, int64_t channel) {
    const FlushDenormals flush;
    for_blocks(a, channel, [&](int64_t c, int lanes) {
        if (a.bf16)
            a.width == 4 ? backward<bf16, 4>(a, group, c, lanes) : backward<bf16, 0>(a, group, c, lanes);
        else
            a.width == 4 ? backward<float, 4>(a, group, c, lanes) : backward<float, 0>(a, group, c, lanes);
    });
}

}  // namespace mabert::MABERT_ISA
