// The Python module of the CPU kernels: picks the instruction set, divides the work among threads, adds partial sums.
//
// It takes addresses and strides; mabert/ops/*/native.py checks every tensor before it passes any.
// The division depends on shapes alone and partial sums are added in a fixed order, so results are the same to the bit
// for any number of threads and from run to run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "depthwise_conv/native.h"
#include "selective_scan/native.h"

namespace nb = nanobind;
using namespace mabert;

namespace {

struct Isa {
    const char* name;
    bool available;
    void (*scan_forward)(const ScanArgs&, int64_t, int64_t, void*);
    void (*scan_backward)(const ScanArgs&, int64_t, int64_t, void*);
    void (*conv_forward)(const ConvArgs&, int64_t, int64_t);
    void (*conv_backward)(const ConvArgs&, int64_t, int64_t);
    void (*vector_function)(int, const float*, float*, int64_t);
};

#define MABERT_KERNELS_OF(isa) \
    isa::scan_forward, isa::scan_backward, isa::conv_forward, isa::conv_backward, isa::vector_function

const std::vector<Isa>& isas() {
    static const std::vector<Isa> all = {
#if defined(__x86_64__)
        {"avx512",
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq"),
         MABERT_KERNELS_OF(avx512)},
        {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), MABERT_KERNELS_OF(avx2)},
#endif
        {"baseline", true, MABERT_KERNELS_OF(baseline)},
    };
    return all;
}

const Isa* chosen = nullptr;

const Isa& isa() {
    if (!chosen)
        for (const Isa& candidate : isas())
            if (candidate.available) {
                chosen = &candidate;
                break;
            }
    return *chosen;
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa& candidate : isas())
        if (candidate.available) names.push_back(candidate.name);
    return names;
}

void use_isa(const std::string& name) {
    for (const Isa& candidate : isas())
        if (name == candidate.name && candidate.available) {
            chosen = &candidate;
            return;
        }
    throw std::invalid_argument("this processor has no instruction set named " + name);
}

int thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Runs task(i, scratch) for every i below count.
template <class Task>
void parallel(int64_t count, int threads, size_t scratch_bytes, Task task) {
    const int used = count > 1 && threads > 1 ? threads : 1;
    const size_t each = (scratch_bytes + 63) / 64 * 64;
    std::unique_ptr<char[]> scratch(new char[used * each]);  // here: an exception must not leave a parallel region
#pragma omp parallel num_threads(used) if (used > 1)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) task(i, scratch.get() + thread_number() * each);
    }
}

using Address = uintptr_t;
using Layout = std::tuple<Address, int64_t, int64_t>;  // data, stride of the batch, stride of time

Rows rows(const Layout& layout) { return {(void*)std::get<0>(layout), std::get<1>(layout), std::get<2>(layout)}; }

// Asks for huge pages under memory that is about to be written. A large tensor is fresh from the system at every call,
// and touching it in pages of 4 KiB would take as long as the scan itself.
void expect_writes(const void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 1 << 21, first = ((uintptr_t)data + page - 1) / page * page;
    const uintptr_t last = ((uintptr_t)data + bytes) / page * page;
    if (data && last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);  // a wish; refusal does no harm
#endif
}

using Floats = std::unique_ptr<float[]>;

Floats floats(int64_t n) {
    Floats memory(new float[n]);
    expect_writes(memory.get(), n * sizeof(float));
    return memory;
}

int64_t bytes_each(bool bf16) { return bf16 ? 2 : 4; }

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// First row of the kept states of each unit.
std::vector<int64_t> kept_rows(int64_t units, int64_t length, const int32_t* cu) {
    std::vector<int64_t> first(units);
    int64_t row = 0;
    for (int64_t u = 0; u < units; u++) {
        first[u] = row;
        row += blocks(cu ? cu[u + 1] - cu[u] : length, TILE);
    }
    return first;
}

// to[i] = Σ_p from[p, i] in the order of p.
void add_parts(const float* from, float* to, int64_t parts, int64_t count, int threads) {
    const int64_t span = 4096;
    parallel(blocks(count, span), threads, 0, [&](int64_t block, void*) {
        const int64_t end = (block + 1) * span < count ? (block + 1) * span : count;
        for (int64_t i = block * span; i < end; i++) to[i] = from[i];
        for (int64_t p = 1; p < parts; p++)
            for (int64_t i = block * span; i < end; i++) to[i] += from[p * count + i];
    });
}

ScanArgs scan_arguments(std::tuple<int64_t, int64_t, int64_t, int64_t> shape, int64_t units, Address cu, Address mask,
                        bool bf16, bool softplus, bool reverse, const Layout& x, const Layout& delta, const Layout& B,
                        const Layout& C, const Layout& z, Address A, Address D, Address bias, Address kept) {
    ScanArgs a{};
    std::tie(a.batch, a.length, a.inner, a.state) = shape;
    a.units = units;
    a.cu = (const int32_t*)cu;
    a.mask = (const uint8_t*)mask;
    a.bf16 = bf16;
    a.softplus = softplus;
    a.reverse = reverse;
    a.x = rows(x);
    a.delta = rows(delta);
    a.B = rows(B);
    a.C = rows(C);
    a.z = rows(z);
    a.A = (const float*)A;
    a.D = (const float*)D;
    a.bias = (const float*)bias;
    a.kept = (float*)kept;
    return a;
}

void scan_forward(std::tuple<int64_t, int64_t, int64_t, int64_t> shape, int64_t units, Address cu, Address mask,
                  bool bf16, bool softplus, bool reverse, Layout x, Layout delta, Layout B, Layout C, Layout z,
                  Address A, Address D, Address bias, Address kept, int64_t kept_count, Address initial, Layout y,
                  Address final_state, int threads) {
    nb::gil_scoped_release release;
    ScanArgs a = scan_arguments(shape, units, cu, mask, bf16, softplus, reverse, x, delta, B, C, z, A, D, bias, kept);
    const std::vector<int64_t> first = kept_rows(units, a.length, a.cu);
    a.kept_row = first.data();
    a.keep = kept != 0;
    a.initial = (const float*)initial;
    a.y = rows(y);
    a.final_state = (float*)final_state;
    expect_writes(a.y.data, a.batch * a.length * a.inner * bytes_each(bf16));
    if (a.keep) expect_writes(a.kept, kept_count * a.inner * a.state * sizeof(float));
    const int64_t groups = blocks(a.inner, CHANNELS);
    const Isa& set = isa();  // once: another thread may choose another one meanwhile
    parallel(units * groups, threads, scan_scratch_bytes(a.state), [&](int64_t i, void* scratch) {
        set.scan_forward(a, i / groups, i % groups * CHANNELS, scratch);
    });
}

void scan_backward(std::tuple<int64_t, int64_t, int64_t, int64_t> shape, int64_t units, Address cu, Address mask,
                   bool bf16, bool softplus, bool reverse, Layout x, Layout delta, Layout B, Layout C, Layout z,
                   Address A, Address D, Address bias, Address kept, Layout dy, Address dfinal, Layout dx,
                   Layout ddelta, Layout dz, Address dinitial, Address dA, Address dB, Address dC, Address dD,
                   Address dbias, int threads) {
    nb::gil_scoped_release release;
    ScanArgs a = scan_arguments(shape, units, cu, mask, bf16, softplus, reverse, x, delta, B, C, z, A, D, bias, kept);
    const std::vector<int64_t> first = kept_rows(units, a.length, a.cu);
    a.kept_row = first.data();
    a.dy = rows(dy);
    a.dx = rows(dx);
    a.ddelta = rows(ddelta);
    a.dz = rows(dz);
    a.dfinal = (const float*)dfinal;
    a.dinitial = (float*)dinitial;
    for (const Rows& grad : {a.dx, a.ddelta, a.dz})
        expect_writes(grad.data, a.batch * a.length * a.inner * bytes_each(bf16));
    const int64_t groups = blocks(a.inner, CHANNELS), tokens = a.batch * a.length;
    a.units_per_group = units ? blocks(units, UNIT_GROUPS) : 1;
    const int64_t unit_groups = blocks(units, a.units_per_group);
    const Floats dB_part = floats(groups * tokens * a.state), dC_part = floats(groups * tokens * a.state);
    const Floats dA_part = floats(unit_groups * a.inner * a.state);
    const Floats dD_part = floats(unit_groups * a.inner), dbias_part = floats(unit_groups * a.inner);
    a.dB_part = dB_part.get();
    a.dC_part = dC_part.get();
    a.dA_part = dA_part.get();
    a.dD_part = dD_part.get();
    a.dbias_part = dbias_part.get();
    const Isa& set = isa();
    parallel(unit_groups * groups, threads, scan_scratch_bytes(a.state), [&](int64_t i, void* scratch) {
        set.scan_backward(a, i / groups, i % groups * CHANNELS, scratch);
    });
    if (!unit_groups || !groups) return;
    add_parts(dB_part.get(), (float*)dB, groups, tokens * a.state, threads);
    add_parts(dC_part.get(), (float*)dC, groups, tokens * a.state, threads);
    add_parts(dA_part.get(), (float*)dA, unit_groups, a.inner * a.state, threads);
    add_parts(dD_part.get(), (float*)dD, unit_groups, a.inner, threads);
    add_parts(dbias_part.get(), (float*)dbias, unit_groups, a.inner, threads);
}

ConvArgs conv_arguments(std::tuple<int64_t, int64_t, int64_t> shape, int width, int left, int64_t units, Address cu,
                        Address mask, bool bf16, bool silu, const Layout& x, Address weight, Address bias) {
    ConvArgs a{};
    std::tie(a.batch, a.length, a.inner) = shape;
    a.width = width;
    a.left = left;
    a.units = units;
    a.cu = (const int32_t*)cu;
    a.mask = (const uint8_t*)mask;
    a.bf16 = bf16;
    a.silu = silu;
    a.x = rows(x);
    a.weight = (const float*)weight;
    a.bias = (const float*)bias;
    return a;
}

void conv_forward(std::tuple<int64_t, int64_t, int64_t> shape, int width, int left, int64_t units, Address cu,
                  Address mask, bool bf16, bool silu, Layout x, Address weight, Address bias, Layout y, int threads) {
    nb::gil_scoped_release release;
    ConvArgs a = conv_arguments(shape, width, left, units, cu, mask, bf16, silu, x, weight, bias);
    a.y = rows(y);
    expect_writes(a.y.data, a.batch * a.length * a.inner * bytes_each(bf16));
    const int64_t groups = blocks(a.inner, CHANNELS);
    const Isa& set = isa();
    parallel(units * groups, threads, 0, [&](int64_t i, void*) {
        set.conv_forward(a, i / groups, i % groups * CHANNELS);
    });
}

void conv_backward(std::tuple<int64_t, int64_t, int64_t> shape, int width, int left, int64_t units, Address cu,
                   Address mask, bool bf16, bool silu, Layout x, Address weight, Address bias, Layout dy, Layout dx,
                   Address dweight, Address dbias, int threads) {
    nb::gil_scoped_release release;
    ConvArgs a = conv_arguments(shape, width, left, units, cu, mask, bf16, silu, x, weight, bias);
    a.dy = rows(dy);
    a.dx = rows(dx);
    expect_writes(a.dx.data, a.batch * a.length * a.inner * bytes_each(bf16));
    const int64_t groups = blocks(a.inner, CHANNELS);
    a.units_per_group = units ? blocks(units, UNIT_GROUPS) : 1;
    const int64_t unit_groups = blocks(units, a.units_per_group);
    const Floats dweight_part = floats(unit_groups * a.inner * width), dbias_part = floats(unit_groups * a.inner);
    a.dweight_part = dweight_part.get();
    a.dbias_part = dbias_part.get();
    const Isa& set = isa();
    parallel(unit_groups * groups, threads, 0, [&](int64_t i, void*) {
        set.conv_backward(a, i / groups, i % groups * CHANNELS);
    });
    if (!unit_groups || !groups) return;
    add_parts(dweight_part.get(), (float*)dweight, unit_groups, a.inner * width, threads);
    add_parts(dbias_part.get(), (float*)dbias, unit_groups, a.inner, threads);
}

}  // namespace

NB_MODULE(_native, m) {
    m.attr("TILE") = TILE;
    m.attr("MAX_WIDTH") = MAX_WIDTH;
    m.def("isas", &available_isas, "Instruction sets that this processor has, the best one first.");
    m.def("isa", [] { return std::string(isa().name); }, "The instruction set in use.");
    m.def("use_isa", &use_isa, "Use another one, for tests and comparisons.");
    m.def("vector_function", [](int which, Address in, Address out, int64_t n) {
        isa().vector_function(which, (const float*)in, (float*)out, n);
    }, "exp (0), softplus (1), sigmoid (2) or 2^x (3) of n floats.");
    m.def("scan_forward", &scan_forward);
    m.def("scan_backward", &scan_backward);
    m.def("conv_forward", &conv_forward);
    m.def("conv_backward", &conv_backward);
}
