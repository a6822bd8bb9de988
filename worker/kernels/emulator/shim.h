// What a kernel needs of CUDA, for g++: so that the very same sources run on a CPU, slowly and one thread at a time. This tests
// the kernels' logic. It says nothing about a GPU: neither its speed nor its compiler nor races that real threads may have.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace emulator {

struct Dim3 {
    unsigned x, y, z;
};

extern Dim3 thread_index, block_index;

// Memory that the block's threads share, for the `bytes` of its one variable; full of NaN when a block begins.
void *shared(size_t bytes);
// Waits until all threads of the block are here; how many of them said yes.
unsigned barrier(bool yes);
// Waits until the warp's 32 threads are here; what the one whose lane differs by `mask` brought.
uint64_t exchange(uint64_t value, unsigned mask);

template <typename To, typename From> To cast(From from) {
    static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable_v<From>);
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

float half_to_float(uint16_t half);
uint16_t float_to_half(float x); // nearest, ties to even

using Entry = void (*)(const void *arguments);

struct Kernel {
    const char *name;
    Entry entry;
    Kernel *next;
    Kernel(const char *name, Entry entry);
};

} // namespace emulator

#define ARC_DEVICE static inline
#define ARC_SHARED(Type, name) Type &name = *static_cast<Type *>(emulator::shared(sizeof(Type)))
#define ARC_KERNEL(name, Args, blocks)                                                                                          \
    static void name(const Args &args);                                                                                        \
    static emulator::Kernel name##_kernel(#name, [](const void *arguments) { name(*static_cast<const Args *>(arguments)); });  \
    static void name(const Args &args)

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index

// One rounding or two makes no difference where kernels use it: one factor is ±1, or the tolerance covers it.
ARC_DEVICE float arc_fma(float x, float y, float z) { return x * y + z; }

ARC_DEVICE void __syncthreads() { emulator::barrier(false); }
ARC_DEVICE int __syncthreads_or(int yes) { return emulator::barrier(yes != 0) > 0; }
ARC_DEVICE unsigned __syncthreads_count(int yes) { return emulator::barrier(yes != 0); }

template <typename T> T __shfl_xor_sync(unsigned, T value, unsigned mask) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = emulator::exchange(bits, mask);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Threads run one at a time, so that nothing comes between.
ARC_DEVICE uint32_t atomicOr(uint32_t *at, uint32_t bits) {
    const uint32_t before = *at;
    *at |= bits;
    return before;
}

ARC_DEVICE float __uint_as_float(uint32_t bits) { return emulator::cast<float>(bits); }
ARC_DEVICE uint32_t __float_as_uint(float x) { return emulator::cast<uint32_t>(x); }
ARC_DEVICE double __longlong_as_double(long long bits) { return emulator::cast<double>(bits); }
ARC_DEVICE long long __double_as_longlong(double x) { return emulator::cast<long long>(x); }
ARC_DEVICE int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

ARC_DEVICE uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
