// What the kernels have in common: element types, loads of four columns, U, sums over the threads of a row.
//
// Compiled with -fmad=false, so that a product and a sum round twice, as they do on the CPU; where one rounding is as good,
// arc_fma says so.
#pragma once

#include "arc.cuh"

#ifdef ARC_EMULATOR
#include "emulator/shim.h"
#else
// `blocks`: how many a multiprocessor should be able to hold, which bounds the registers.
#define ARC_KERNEL(name, Args, blocks) \
    extern "C" __global__ void __launch_bounds__(arc::THREADS, blocks) name(const __grid_constant__ Args args)
#define ARC_SHARED(Type, name) __shared__ Type name
// Not static: names of internal linkage hold a hash of the source's folder, and then no two builds are the same.
#define ARC_DEVICE __device__ __forceinline__
#define arc_fma(x, y, z) fmaf(x, y, z)
#endif

namespace arc {

constexpr uint32_t FULL_WARP = 0xffffffffu;
constexpr uint32_t INFINITY_BITS = 0x7f800000u;
constexpr uint32_t NOT_THERE = 0xffffffffu;

ARC_DEVICE uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }

// ---------------------------------------------------------------- element types

ARC_DEVICE float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }

// Nearest, ties to even; overflows to infinity, as the crate `half` does.
ARC_DEVICE uint32_t to_bf16(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > INFINITY_BITS) return (bits >> 16) | 0x40;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

ARC_DEVICE float from_f16(uint32_t bits) {
#ifdef ARC_EMULATOR
    return emulator::half_to_float(static_cast<uint16_t>(bits));
#else
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
    return x;
#endif
}

// Nearest, ties to even; overflows to infinity; a NaN keeps its sign and high bits.
ARC_DEVICE uint32_t to_f16(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > INFINITY_BITS) return (bits >> 16 & 0x8000) | 0x7e00 | (bits >> 13 & 0x3ff);
#ifdef ARC_EMULATOR
    return emulator::float_to_half(x);
#else
    uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
#endif
}

ARC_DEVICE float load_element(const void *at, uint32_t element, uint32_t index) {
    if (element == ELEMENT_F32) return static_cast<const float *>(at)[index];
    const uint32_t bits = static_cast<const uint16_t *>(at)[index];
    return element == ELEMENT_BF16 ? from_bf16(bits) : from_f16(bits);
}

ARC_DEVICE void store_element(void *at, uint32_t element, uint32_t index, float x) {
    if (element == ELEMENT_F32) {
        static_cast<float *>(at)[index] = x;
    } else {
        static_cast<uint16_t *>(at)[index] = static_cast<uint16_t>(element == ELEMENT_BF16 ? to_bf16(x) : to_f16(x));
    }
}

// ---------------------------------------------------------------- four columns

struct alignas(16) Four {
    float of[4];
};
struct alignas(8) Two {
    uint32_t of[2];
};

ARC_DEVICE bool aligned(const void *at, uint32_t bytes) { return (reinterpret_cast<size_t>(at) & (bytes - 1)) == 0; }

// A thread works on four columns of a row: neighbours, read at once (VECTOR), or as many apart as threads share the row
// (`lanes`), so that each of the four reads is coalesced whatever the alignment. The row starts at element `row`; columns from
// `end` on read as zero and are not written.
template <bool VECTOR> ARC_DEVICE uint32_t column(uint32_t first, uint32_t lanes, int k) {
    return VECTOR ? first + k : first + k * lanes;
}

template <bool VECTOR>
ARC_DEVICE void load_state(float (&x)[4], const float *at, uint32_t row, uint32_t first, uint32_t lanes, uint32_t end) {
    if (VECTOR && first + 4 <= end) {
        const Four four = *reinterpret_cast<const Four *>(at + row + first);
#pragma unroll
        for (int k = 0; k < 4; k++) x[k] = four.of[k];
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const uint32_t c = column<VECTOR>(first, lanes, k);
        x[k] = c < end ? at[row + c] : 0.0f;
    }
}

template <bool VECTOR>
ARC_DEVICE void store_state(const float (&x)[4], float *at, uint32_t row, uint32_t first, uint32_t lanes, uint32_t end) {
    if (VECTOR && first + 4 <= end) {
        Four four;
#pragma unroll
        for (int k = 0; k < 4; k++) four.of[k] = x[k];
        *reinterpret_cast<Four *>(at + row + first) = four;
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const uint32_t c = column<VECTOR>(first, lanes, k);
        if (c < end) at[row + c] = x[k];
    }
}

// Four elements as they lie in memory. Loading and converting are apart, so that a thread may ask for much before it waits: with
// VECTOR halves stay packed, the lower one first.
struct Raw {
    uint32_t of[4];
};

template <bool VECTOR>
ARC_DEVICE void load_raw(Raw &raw, const void *at, uint32_t element, uint32_t row, uint32_t first, uint32_t lanes, uint32_t end) {
    raw = {};
    if (element == ELEMENT_F32) {
        float x[4];
        load_state<VECTOR>(x, static_cast<const float *>(at), row, first, lanes, end);
#pragma unroll
        for (int k = 0; k < 4; k++) raw.of[k] = __float_as_uint(x[k]);
    } else if (VECTOR && first + 4 <= end) {
        const Two two = *reinterpret_cast<const Two *>(static_cast<const uint16_t *>(at) + row + first);
        raw.of[0] = two.of[0];
        raw.of[1] = two.of[1];
    } else {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint32_t c = column<VECTOR>(first, lanes, k);
            const uint32_t bits = c < end ? static_cast<const uint16_t *>(at)[row + c] : 0;
            raw.of[VECTOR ? k / 2 : k] |= VECTOR ? bits << (k % 2 * 16) : bits;
        }
    }
}

template <bool VECTOR> ARC_DEVICE void expand(float (&x)[4], const Raw &raw, uint32_t element) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const uint32_t half = VECTOR ? raw.of[k / 2] >> (k % 2 * 16) & 0xffff : raw.of[k];
        x[k] = element == ELEMENT_F32 ? __uint_as_float(raw.of[k]) : element == ELEMENT_BF16 ? from_bf16(half) : from_f16(half);
    }
}

template <bool VECTOR>
ARC_DEVICE void load_elements(
    float (&x)[4], const void *at, uint32_t element, uint32_t row, uint32_t first, uint32_t lanes, uint32_t end) {
    Raw raw;
    load_raw<VECTOR>(raw, at, element, row, first, lanes, end);
    expand<VECTOR>(x, raw, element);
}

template <bool VECTOR>
ARC_DEVICE void store_elements(
    const float (&x)[4], void *at, uint32_t element, uint32_t row, uint32_t first, uint32_t lanes, uint32_t end) {
    if (VECTOR && element == ELEMENT_F32) {
        store_state<VECTOR>(x, static_cast<float *>(at), row, first, lanes, end);
    } else if (VECTOR && first + 4 <= end) {
        uint32_t half[4];
#pragma unroll
        for (int k = 0; k < 4; k++) half[k] = element == ELEMENT_BF16 ? to_bf16(x[k]) : to_f16(x[k]);
        *reinterpret_cast<Two *>(static_cast<uint16_t *>(at) + row + first) = {{half[0] | half[1] << 16, half[2] | half[3] << 16}};
    } else {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint32_t c = column<VECTOR>(first, lanes, k);
            if (c < end) store_element(at, element, row + c, x[k]);
        }
    }
}

// ---------------------------------------------------------------- U and A

// U = keep·old + take·g where there is an old value, else g; A = U − h where there is an h. In a dense round ef21 and ef21m
// start anew from the gradient.
struct Rule {
    const float *old;
    const float *h;
    float keep, take, unscale;
};

ARC_DEVICE Rule rule_of(const Segment &segment, bool dense_round, float unscale) {
    const bool restarts = dense_round && segment.local != nullptr;
    return {restarts ? nullptr : segment.blended, dense_round ? nullptr : segment.local, segment.keep, segment.take, unscale};
}

ARC_DEVICE float blend(const Rule &rule, float old, float g) { return rule.old ? rule.keep * old + rule.take * g : g; }

// Whether four neighbouring columns can be read at once, of everything that `segment` has.
ARC_DEVICE bool vectors(const Segment &segment) {
    const uint32_t element_bytes = segment.element == ELEMENT_F32 ? 16 : 8;
    return segment.width % 4 == 0 && aligned(segment.gradient, element_bytes) && aligned(segment.result, element_bytes) &&
           aligned(segment.blended, 16) && aligned(segment.local, 16) && aligned(segment.global, 16);
}

// One row's columns in a tile: its first element, and where the columns end that have state, and a gradient. Rows that are
// not there end at 0.
struct Row {
    uint32_t start;
    uint32_t end;
    uint32_t gradient_end;
};

ARC_DEVICE Row row_of(const Segment &segment, uint32_t row, uint32_t column0, uint32_t columns) {
    const uint32_t start = row * segment.width + column0;
    const uint32_t state = segment.padded > start ? segment.padded - start : 0;
    const uint32_t gradient = segment.gradient && segment.elements > start ? segment.elements - start : 0;
    return {start, least(columns, state), least(columns, gradient)};
}

// ---------------------------------------------------------------- sums over threads

// Sum over the `lanes` threads that share a row, at most a warp's; all of them get it. A fixed tree: neighbours last.
template <typename T> ARC_DEVICE T sum_lanes(T x, uint32_t lanes) {
    for (uint32_t off = 16; off > 0; off >>= 1) {
        if (off < lanes) x += __shfl_xor_sync(FULL_WARP, x, off);
    }
    return x;
}

// ---------------------------------------------------------------- chosen rows

// Number of entries of ascending `rows` below `limit`. All threads of the block take part.
ARC_DEVICE uint32_t lower_bound(const uint32_t *rows, uint32_t count, uint32_t limit) {
    uint32_t from = 0, left = count;
    while (left > 0) {
        // Entry from + k·step is below the limit for the first `below` of the probes.
        const uint32_t step = (left + THREADS - 1) / THREADS, probe = threadIdx.x * step;
        const uint32_t below = __syncthreads_count(probe < left && rows[from + probe] < limit);
        if (below == 0) return from;
        // The probe before the first that is not below is below itself: what is left lies behind it.
        const uint32_t skipped = (below - 1) * step + 1;
        from += skipped;
        left = least(left - skipped, step - 1);
    }
    return from;
}

// For rows `first .. first + rows` (as the list counts them): place in the list, or NOT_THERE. All threads take part.
ARC_DEVICE void find_places(uint32_t *places, const uint32_t *list, uint32_t count, uint32_t first, uint32_t rows) {
    for (uint32_t i = threadIdx.x; i < rows; i += THREADS) places[i] = NOT_THERE;
    const uint32_t from = lower_bound(list, count, first);
    __syncthreads();
    for (uint32_t i = from + threadIdx.x; i < count && list[i] - first < rows; i += THREADS) places[list[i] - first] = i;
    __syncthreads();
}

} // namespace arc
