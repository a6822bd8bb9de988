// Values ⇄ bytes, to the bit as common/src/compress/codec.rs does it; the layout is described there.
#pragma once

#include "device.cuh"

namespace arc {

constexpr uint32_t SCALE_BYTES = 2;
// Adding it and keeping the low bits rounds |x| < 2²² to the nearest integer, ties to even.
constexpr float ROUNDING = 12582912.0f;

struct Codec {
    uint32_t wire;
    uint32_t block;   // values that share a scale
    uint32_t shift;   // log2 of it, or 32 if it is no power of two
    uint32_t stride;  // bytes of a whole block
};

ARC_DEVICE Codec codec_of(uint32_t wire, uint32_t quant_block) {
    const bool power = (quant_block & (quant_block - 1)) == 0;
    const uint32_t stride = SCALE_BYTES + (wire == WIRE_INT8 ? quant_block : (quant_block + 1) / 2);
    const uint32_t shift = power ? 31 - __clz(static_cast<int>(quant_block)) : 32;
    return {wire, quant_block, shift, stride};
}

ARC_DEVICE bool is_quantised(uint32_t wire) { return wire >= WIRE_INT8; }
ARC_DEVICE float top_of(uint32_t wire) { return wire == WIRE_INT8 ? 127.0f : 7.0f; }
ARC_DEVICE uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// ---------------------------------------------------------------- decode

// Signed nibble.
ARC_DEVICE float nibble(uint32_t code) { return static_cast<float>(static_cast<int>((code & 0xf) ^ 8) - 8); }

ARC_DEVICE uint32_t two_bytes(const uint8_t *at) { return at[0] | at[1] << 8; }

ARC_DEVICE float decode_f32(const uint8_t *at) {
    if (aligned(at, 4)) return *reinterpret_cast<const float *>(at);
    return __uint_as_float(two_bytes(at) | two_bytes(at + 2) << 16);
}

ARC_DEVICE uint32_t block_of(const Codec &codec, uint32_t i) { return codec.shift < 32 ? i >> codec.shift : i / codec.block; }

// Code number `within` of a block that begins at `at`, times its scale.
ARC_DEVICE float decode_code(uint32_t wire, const uint8_t *at, uint32_t within, float scale) {
    if (wire == WIRE_INT8) return static_cast<float>(static_cast<int8_t>(at[SCALE_BYTES + within])) * scale;
    return nibble(at[SCALE_BYTES + within / 2] >> (within % 2 * 4)) * scale;
}

// x[k] = value number at + column of an encoded array, for four columns of a row (see load_state).
template <bool VECTOR>
ARC_DEVICE void decode_columns(float (&x)[4], const Codec &codec, const uint8_t *bytes, uint32_t at, uint32_t first, uint32_t lanes,
                               uint32_t end) {
    if (!is_quantised(codec.wire)) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint32_t c = column<VECTOR>(first, lanes, k);
            x[k] = 0.0f;
            if (c >= end) continue;
            const size_t i = static_cast<size_t>(at) + c;
            if (codec.wire == WIRE_F32) x[k] = decode_f32(bytes + i * 4);
            else x[k] = codec.wire == WIRE_BF16 ? from_bf16(two_bytes(bytes + i * 2)) : from_f16(two_bytes(bytes + i * 2));
        }
        return;
    }
    uint32_t block = NOT_THERE;
    const uint8_t *codes = bytes;
    float scale = 0.0f;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const uint32_t c = column<VECTOR>(first, lanes, k), i = at + c;
        x[k] = 0.0f;
        if (c >= end) continue;
        // Neighbours lie in the same block nearly always: its scale is read once.
        if (k == 0 || !VECTOR || i - block * codec.block >= codec.block) {
            block = block_of(codec, i);
            codes = bytes + static_cast<size_t>(block) * codec.stride;
            scale = from_bf16(two_bytes(codes));
        }
        x[k] = decode_code(codec.wire, codes, i - block * codec.block, scale);
    }
}

// ---------------------------------------------------------------- encode

// Nearest, ties to even; finite values saturate; NaN stays NaN.
ARC_DEVICE uint32_t wire_bf16(float x) {
    const uint32_t bits = __float_as_uint(x), abs = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000;
    if (abs < INFINITY_BITS) return sign | least((abs + 0x7fff + ((abs >> 16) & 1)) >> 16, 0x7f7f);
    return sign | (abs >> 16) | (abs > INFINITY_BITS ? 0x40 : 0);
}

ARC_DEVICE uint32_t wire_f16(float x) {
    if (magnitude(x) >= INFINITY_BITS) return to_f16(x);
    return to_f16(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x);
}

struct Scale {
    float value;
    uint32_t bits;
};

// Of a block whose largest magnitude has these bits; NaN if it is not finite.
ARC_DEVICE Scale block_scale(uint32_t largest, float top) {
    if (largest >= INFINITY_BITS) return {__uint_as_float(0x7fc00000u), 0x7fc0};
    if (largest == 0) return {0.0f, 0};
    const uint32_t exact = __float_as_uint(__uint_as_float(largest) / top);
    // Up, and at least bf16's smallest number: the quotient of a subnormal may have vanished.
    uint32_t bits = (exact + 0xffff) >> 16;
    if (bits == 0) bits = 1;
    if (magnitude(from_bf16(bits) * top) >= INFINITY_BITS) bits -= 1;
    return {from_bf16(bits), bits};
}

// Nearest code, ties to even; 0 where the scale is 0 or NaN.
ARC_DEVICE uint32_t code(float x, float scale, float top) {
    float q = scale > 0.0f ? x / scale : 0.0f;
    q = q > top ? top : q < -top ? -top : q;
    return __float_as_uint(q + ROUNDING) - __float_as_uint(ROUNDING);
}

// Bytes of the block that begins at value `first` of an array.
ARC_DEVICE uint8_t *block_at(const Codec &codec, uint8_t *out, uint32_t first) {
    return out + static_cast<size_t>(first / codec.block) * codec.stride;
}

// Values `2·pair` and the next of a block; `both`: there is a next one.
ARC_DEVICE void store_codes(const Codec &codec, uint8_t *codes, uint32_t pair, float low, float high, bool both, float scale) {
    const float top = top_of(codec.wire);
    if (codec.wire == WIRE_INT4) {
        codes[pair] = static_cast<uint8_t>((code(low, scale, top) & 0xf) | (both ? code(high, scale, top) << 4 : 0));
        return;
    }
    codes[2 * pair] = static_cast<uint8_t>(code(low, scale, top));
    if (both) codes[2 * pair + 1] = static_cast<uint8_t>(code(high, scale, top));
}

// A value of a type without blocks.
ARC_DEVICE void store_plain(uint32_t wire, uint8_t *out, uint32_t i, float x) {
    if (wire == WIRE_F32) {
        uint8_t *at = out + static_cast<size_t>(i) * 4;
        if (aligned(at, 4)) {
            *reinterpret_cast<float *>(at) = x;
            return;
        }
        for (int byte = 0; byte < 4; byte++) at[byte] = static_cast<uint8_t>(__float_as_uint(x) >> (8 * byte));
        return;
    }
    const uint32_t bits = wire == WIRE_BF16 ? wire_bf16(x) : wire_f16(x);
    uint8_t *at = out + static_cast<size_t>(i) * 2;
    if (aligned(at, 2)) {
        *reinterpret_cast<uint16_t *>(at) = static_cast<uint16_t>(bits);
        return;
    }
    at[0] = static_cast<uint8_t>(bits);
    at[1] = static_cast<uint8_t>(bits >> 8);
}

} // namespace arc
