// The selective scan on a CPU, forward and backward.
//
// A task owns 128 channels of one sequence (forward) or of a group of sequences (backward). Time goes by in tiles of 32
// steps; within a tile the channels advance LANES at a time, their N states in registers. The forward keeps the state
// before each tile; the backward recomputes a tile's states and decays from it into scratch that stays in the L2 cache.
// Nothing of size B·L·E·N is ever stored.
#include "native.h"

#include "../simd.h"

namespace mabert::MABERT_ISA {
namespace {

struct Unit {
    int64_t row, start, length;
};

Unit unit_of(const ScanArgs& a, int64_t unit) {
    if (!a.cu) return {unit, 0, a.length};
    return {0, a.cu[unit], a.cu[unit + 1] - a.cu[unit]};
}

template <class T>
INLINE T* at(const Rows& rows, int64_t row, int64_t time) {
    return (T*)rows.data + row * rows.batch_stride + time * rows.time_stride;
}

// The tokens of one tile, in scan order.
struct Tile {
    int steps;
    int64_t row;
    int64_t time[TILE];
    bool real[TILE];

    Tile(const ScanArgs& a, const Unit& u, int64_t first) : row(u.row) {
        steps = u.length - first < TILE ? (int)(u.length - first) : TILE;
        for (int t = 0; t < steps; t++) {
            time[t] = u.start + (a.reverse ? u.length - 1 - first - t : first + t);
            real[t] = !a.mask || a.mask[row * a.length + time[t]];
        }
    }
};

// Brings a row of the next tile near: rows lie pages apart, and no processor guesses the next one by itself.
template <class T>
INLINE void fetch_ahead(const ScanArgs& a, const Rows& rows, const Tile& tile, int t, int64_t channel, bool backwards) {
    const int64_t time = tile.time[t] + (a.reverse == backwards ? TILE : -TILE);
    if (rows.data && time >= 0 && time < a.length) __builtin_prefetch(at<T>(rows, tile.row, time) + channel, 0, 2);
}

// (TILE, N) floats of B or C.
template <class T>
INLINE void gather_tile(const Tile& tile, const Rows& from, int64_t state, float* to) {
    for (int t = 0; t < tile.steps; t++)
        if (tile.real[t])
            for (int64_t n = 0; n < state; n++) to[t * state + n] = scalar(at<T>(from, tile.row, tile.time[t]) + n);
}

// (E, N) rows of `lanes` channels to N vectors, and back.
INLINE void transpose_in(const float* from, int64_t state, int lanes, vf* to, float factor = 1.0f) {
    for (int64_t n = 0; n < state; n++) {
        float v[LANES] = {};
        for (int i = 0; i < lanes; i++) v[i] = from[i * state + n] * factor;
        to[n] = load(v);
    }
}

INLINE void transpose_out(const vf* from, int64_t state, int lanes, float* to) {
    for (int64_t n = 0; n < state; n++) {
        float v[LANES];
        store(v, from[n]);
        for (int i = 0; i < lanes; i++) to[i * state + n] = v[i];
    }
}

// The states of one vector of channels before a tile: rows of 16 channels (fewer at the end), whatever LANES is.
struct Kept {
    float* states;
    int64_t stride;

    Kept(const ScanArgs& a, int64_t unit, int64_t first, int64_t channel) {
        const int64_t block = channel / 16 * 16;
        stride = a.inner - block < 16 ? a.inner - block : 16;
        states = a.kept + ((a.kept_row[unit] + first / TILE) * a.inner + block) * a.state + channel - block;
    }
};

// STATE is the number of states when it is known at compile time (they then stay in registers), else 0.
template <class T, int STATE>
void forward_block(const ScanArgs& a, const Tile& tile, int64_t channel, int lanes, const vf* A, const float* B,
                   const float* C, vf* state_vectors) {
    const int64_t N = STATE ? STATE : a.state;
    const vf D = a.D ? load(a.D + channel, lanes) : vf{};
    const vf bias = a.bias ? load(a.bias + channel, lanes) : vf{};
    // What does not wait for the state, for the whole tile: long chains of instructions that overlap here only.
    vf delta[TILE], gate[TILE];
    for (int t = 0; t < tile.steps; t++) {
        fetch_ahead<T>(a, a.x, tile, t, channel, false);
        fetch_ahead<T>(a, a.delta, tile, t, channel, false);
        fetch_ahead<T>(a, a.z, tile, t, channel, false);
        if (!tile.real[t]) continue;
        delta[t] = load(at<T>(a.delta, tile.row, tile.time[t]) + channel, lanes) + bias;
        if (a.softplus) delta[t] = softplus(delta[t]);
        if (a.z.data) {
            const vf z = load(at<T>(a.z, tile.row, tile.time[t]) + channel, lanes);
            gate[t] = z * sigmoid(z);
        }
    }

    vf registers[STATE ? STATE : 1];
    vf* h = STATE ? registers : state_vectors;
    if (STATE)
        for (int n = 0; n < N; n++) h[n] = state_vectors[n];
    for (int t = 0; t < tile.steps; t++) {
        T* y = at<T>(a.y, tile.row, tile.time[t]) + channel;
        if (!tile.real[t]) {
            store(y, vf{}, lanes);
            continue;
        }
        const vf x = load(at<T>(a.x, tile.row, tile.time[t]) + channel, lanes), input = delta[t] * x;
        const float *Bt = B + t * N, *Ct = C + t * N;
        vf s[2] = {D * x};  // two sums wait half as long for each other as one
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) {
            h[n] = exp2(delta[t] * A[n]) * h[n] + input * Bt[n];
            s[n % 2] += h[n] * Ct[n];
        }
        s[0] += s[1];
        store(y, a.z.data ? s[0] * gate[t] : s[0], lanes);
    }
    if (STATE)
        for (int n = 0; n < N; n++) state_vectors[n] = h[n];
}

// Cuts scratch into aligned arrays.
struct Arena {
    char* next;
    template <class V>
    V* take(int64_t count) {
        char* p = (char*)(((uintptr_t)next + 63) & ~(uintptr_t)63);
        next = p + count * sizeof(V);
        return (V*)p;
    }
};

constexpr int BLOCKS = CHANNELS / LANES;

template <class T, int STATE>
void forward(const ScanArgs& a, int64_t unit, int64_t first_channel, void* scratch) {
    const int64_t N = a.state;
    Arena arena{(char*)scratch};
    vf *A = arena.take<vf>(BLOCKS * N), *h = arena.take<vf>(BLOCKS * N);
    float *B = arena.take<float>(TILE * N), *C = arena.take<float>(TILE * N);
    const int channels = a.inner - first_channel < CHANNELS ? (int)(a.inner - first_channel) : CHANNELS;
    const Unit u = unit_of(a, unit);
    for (int c = 0, b = 0; c < channels; c += LANES, b++) {
        const int lanes = channels - c < LANES ? channels - c : LANES;
        transpose_in(a.A + (first_channel + c) * N, N, lanes, A + b * N, LOG2_E);
        for (int64_t n = 0; n < N; n++) h[b * N + n] = vf{};
        if (a.initial) transpose_in(a.initial + (unit * a.inner + first_channel + c) * N, N, lanes, h + b * N);
    }
    for (int64_t first = 0; first < u.length; first += TILE) {
        const Tile tile(a, u, first);
        gather_tile<T>(tile, a.B, N, B);
        gather_tile<T>(tile, a.C, N, C);
        for (int c = 0, b = 0; c < channels; c += LANES, b++) {
            const int lanes = channels - c < LANES ? channels - c : LANES;
            if (a.keep) {
                const Kept kept(a, unit, first, first_channel + c);
                for (int64_t n = 0; n < N; n++) store(kept.states + n * kept.stride, h[b * N + n], lanes);
            }
            forward_block<T, STATE>(a, tile, first_channel + c, lanes, A + b * N, B, C, h + b * N);
        }
    }
    for (int c = 0, b = 0; c < channels; c += LANES, b++) {
        const int lanes = channels - c < LANES ? channels - c : LANES;
        transpose_out(h + b * N, N, lanes, a.final_state + (unit * a.inner + first_channel + c) * N);
    }
}

INLINE void add(float* to, vf v, int count) { store(to, load(to, count) + v, count); }

// What the backward keeps of a tile while it works on one block of channels.
struct BlockScratch {
    vf *states, *decays;  // (TILE + 1, N) states, the first one before the tile; (TILE, N)
    vf *x, *delta, *slope, *ds, *dz;  // (TILE)
    float *dB, *dC;                   // (TILE, N), summed over the channels of the task
};

template <class T, int STATE>
void backward_block(const ScanArgs& a, const Tile& tile, int64_t channel, int lanes, const vf* A, const float* B,
                    const float* C, const BlockScratch& w, vf* dh_vectors, vf* dA_vectors, vf* dD, vf* dbias) {
    const int64_t N = STATE ? STATE : a.state;
    const vf D = a.D ? load(a.D + channel, lanes) : vf{};
    const vf bias = a.bias ? load(a.bias + channel, lanes) : vf{};

    // As in the forward: first what does not wait for the state.
    for (int t = 0; t < tile.steps; t++) {
        fetch_ahead<T>(a, a.x, tile, t, channel, true);
        fetch_ahead<T>(a, a.delta, tile, t, channel, true);
        fetch_ahead<T>(a, a.z, tile, t, channel, true);
        fetch_ahead<T>(a, a.dy, tile, t, channel, true);
        if (!tile.real[t]) continue;
        const int64_t time = tile.time[t];
        w.x[t] = load(at<T>(a.x, tile.row, time) + channel, lanes);
        w.delta[t] = load(at<T>(a.delta, tile.row, time) + channel, lanes) + bias;
        w.slope[t] = splat(1.0f);
        if (a.softplus) w.delta[t] = softplus(w.delta[t], w.slope[t]);
        const vf dy = load(at<T>(a.dy, tile.row, time) + channel, lanes);
        w.ds[t] = dy;
        if (a.z.data) {
            const vf z = load(at<T>(a.z, tile.row, time) + channel, lanes), gate = sigmoid(z);
            w.ds[t] = dy * (z * gate);
            w.dz[t] = dy * (gate + z * gate * (1.0f - gate));  // times the ungated output, which is not known yet
        }
    }

    for (int t = 0; t < tile.steps; t++) {
        vf *before = w.states + t * N, *after = before + N, *decay = w.decays + t * N;
        if (!tile.real[t]) {
            for (int n = 0; n < N; n++) after[n] = before[n];
            continue;
        }
        const vf delta = w.delta[t], x = w.x[t], ds = w.ds[t], input = delta * x;
        const float *Bt = B + t * N, *Ct = C + t * N;
        vf s[2] = {D * x};
        for (int first = 0; first < N; first += LANES) {
            vf dC[LANES] = {};
            const int states = N - first < LANES ? N - first : LANES;
#pragma GCC unroll 16
            for (int i = 0; i < states; i++) {
                const int n = first + i;
                decay[n] = exp2(delta * A[n]);
                const vf state = decay[n] * before[n] + input * Bt[n];
                after[n] = state;
                s[n % 2] += state * Ct[n];
                dC[i] = ds * state;
            }
            add(w.dC + t * N + first, sums(dC), states);
        }
        if (a.z.data) store(at<T>(a.dz, tile.row, tile.time[t]) + channel, w.dz[t] * (s[0] + s[1]), lanes);
    }

    vf dh_registers[STATE ? STATE : 1];
    vf* dh = STATE ? dh_registers : dh_vectors;
    if (STATE)
        for (int n = 0; n < N; n++) dh[n] = dh_vectors[n];
    vf dD_tile = {}, dbias_tile = {};
    for (int t = tile.steps - 1; t >= 0; t--) {
        const int64_t time = tile.time[t];
        if (!tile.real[t]) {
            store(at<T>(a.dx, tile.row, time) + channel, vf{}, lanes);
            store(at<T>(a.ddelta, tile.row, time) + channel, vf{}, lanes);
            if (a.z.data) store(at<T>(a.dz, tile.row, time) + channel, vf{}, lanes);
            continue;
        }
        const vf *before = w.states + t * N, *decay = w.decays + t * N;
        const vf x = w.x[t], delta = w.delta[t], ds = w.ds[t], input = delta * x;
        const float *Bt = B + t * N, *Ct = C + t * N;
        vf dinput[2] = {}, dexponents[2] = {};
        for (int first = 0; first < N; first += LANES) {
            vf dB[LANES] = {};
            const int states = N - first < LANES ? N - first : LANES;
#pragma GCC unroll 16
            for (int i = 0; i < states; i++) {
                const int n = first + i;
                const vf g = dh[n] + ds * Ct[n];
                dB[i] = g * input;
                dinput[n % 2] += g * Bt[n];
                const vf carried = g * decay[n], dexponent = carried * before[n];
                dexponents[n % 2] += dexponent * A[n];
                dA_vectors[n] += dexponent * delta;
                dh[n] = carried;
            }
            add(w.dB + t * N + first, sums(dB), states);
        }
        dinput[0] += dinput[1];
        const vf ddelta = ((dexponents[0] + dexponents[1]) * LN_2 + dinput[0] * x) * w.slope[t];
        dD_tile += ds * x;
        dbias_tile += ddelta;
        store(at<T>(a.dx, tile.row, time) + channel, dinput[0] * delta + ds * D, lanes);
        store(at<T>(a.ddelta, tile.row, time) + channel, ddelta, lanes);
    }
    *dD += dD_tile;
    *dbias += dbias_tile;
    if (STATE)
        for (int n = 0; n < N; n++) dh_vectors[n] = dh[n];
}

template <class T, int STATE>
void backward(const ScanArgs& a, int64_t group, int64_t first_channel, void* scratch) {
    const int64_t N = a.state, first_unit = group * a.units_per_group;
    const int64_t last_unit = first_unit + a.units_per_group < a.units ? first_unit + a.units_per_group : a.units;
    const int channels = a.inner - first_channel < CHANNELS ? (int)(a.inner - first_channel) : CHANNELS;
    Arena arena{(char*)scratch};
    vf *A = arena.take<vf>(BLOCKS * N), *dh = arena.take<vf>(BLOCKS * N), *dA = arena.take<vf>(BLOCKS * N);
    vf *dD = arena.take<vf>(BLOCKS), *dbias = arena.take<vf>(BLOCKS);
    float *B = arena.take<float>(TILE * N), *C = arena.take<float>(TILE * N);
    BlockScratch w;
    w.states = arena.take<vf>((TILE + 1) * N);
    w.decays = arena.take<vf>(TILE * N);
    w.x = arena.take<vf>(TILE);
    w.delta = arena.take<vf>(TILE);
    w.slope = arena.take<vf>(TILE);
    w.ds = arena.take<vf>(TILE);
    w.dz = arena.take<vf>(TILE);
    w.dB = arena.take<float>(TILE * N);
    w.dC = arena.take<float>(TILE * N);
    for (int c = 0, b = 0; c < channels; c += LANES, b++) {
        transpose_in(a.A + (first_channel + c) * N, N, channels - c < LANES ? channels - c : LANES, A + b * N,
                     LOG2_E);
        for (int64_t n = 0; n < N; n++) dA[b * N + n] = vf{};
        dD[b] = dbias[b] = vf{};
    }
    float* dB_part = a.dB_part + first_channel / CHANNELS * a.batch * a.length * N;
    float* dC_part = a.dC_part + first_channel / CHANNELS * a.batch * a.length * N;

    for (int64_t unit = first_unit; unit < last_unit; unit++) {
        const Unit u = unit_of(a, unit);
        for (int c = 0, b = 0; c < channels; c += LANES, b++) {
            const int lanes = channels - c < LANES ? channels - c : LANES;
            transpose_in(a.dfinal + (unit * a.inner + first_channel + c) * N, N, lanes, dh + b * N);
        }
        for (int64_t first = (u.length - 1) / TILE * TILE; u.length && first >= 0; first -= TILE) {
            const Tile tile(a, u, first);
            gather_tile<T>(tile, a.B, N, B);
            gather_tile<T>(tile, a.C, N, C);
            for (int64_t i = 0; i < tile.steps * N; i++) w.dB[i] = w.dC[i] = 0.0f;
            for (int c = 0, b = 0; c < channels; c += LANES, b++) {
                const int lanes = channels - c < LANES ? channels - c : LANES;
                const int64_t channel = first_channel + c;
                const Kept kept(a, unit, first, channel);
                for (int64_t n = 0; n < N; n++) w.states[n] = load(kept.states + n * kept.stride, lanes);
                backward_block<T, STATE>(a, tile, channel, lanes, A + b * N, B, C, w, dh + b * N, dA + b * N, dD + b,
                                         dbias + b);
            }
            for (int t = 0; t < tile.steps; t++) {
                const int64_t out = (tile.row * a.length + tile.time[t]) * N;
                for (int64_t n = 0; n < N; n++) {
                    dB_part[out + n] = w.dB[t * N + n];
                    dC_part[out + n] = w.dC[t * N + n];
                }
            }
        }
        if (a.dinitial)
            for (int c = 0, b = 0; c < channels; c += LANES, b++) {
                const int lanes = channels - c < LANES ? channels - c : LANES;
                transpose_out(dh + b * N, N, lanes, a.dinitial + (unit * a.inner + first_channel + c) * N);
            }
    }
    for (int c = 0, b = 0; c < channels; c += LANES, b++) {
        const int lanes = channels - c < LANES ? channels - c : LANES;
        const int64_t channel = group * a.inner + first_channel + c;
        transpose_out(dA + b * N, N, lanes, a.dA_part + channel * N);
        store(a.dD_part + channel, dD[b], lanes);
        store(a.dbias_part + channel, dbias[b], lanes);
    }
}

}  // namespace

void scan_forward(const ScanArgs& a, int64_t unit, int64_t channel, void* scratch) {
    const FlushDenormals flush;
    if (a.bf16)
        a.state == 16 ? forward<bf16, 16>(a, unit, channel, scratch) : forward<bf16, 0>(a, unit, channel, scratch);
    else
        a.state == 16 ? forward<float, 16>(a, unit, channel, scratch) : forward<float, 0>(a, unit, channel, scratch);
}

void scan_backward(const ScanArgs& a, int64_t group, int64_t channel, void* scratch) {
    const FlushDenormals flush;
    if (a.bf16)
        a.state == 16 ? backward<bf16, 16>(a, group, channel, scratch) : backward<bf16, 0>(a, group, channel, scratch);
    else
        a.state == 16 ? backward<float, 16>(a, group, channel, scratch)
                      : backward<float, 0>(a, group, channel, scratch);
}

void vector_function(int which, const float* in, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        const int lanes = n - i < LANES ? (int)(n - i) : LANES;
        const vf v = load(in + i, lanes);
        store(out + i, which == 0 ? exp(v) : which == 1 ? softplus(v) : which == 2 ? sigmoid(v) : exp2(v), lanes);
    }
}

}  // namespace mabert::MABERT_ISA
