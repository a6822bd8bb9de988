//! Values ⇄ bytes.
//!
//! # Layout (little endian, no header; the number of values is known to both sides)
//!
//! | type | bytes | loses |
//! |---|---|---|
//! | f32 | 4 a value | nothing |
//! | bf16 | 2 a value | ≤ 2⁻⁸·\|x\|, or 2⁻¹³⁴ near zero; saturates at ±3.39e38 |
//! | f16 | 2 a value | ≤ 2⁻¹¹·\|x\|, or 2⁻²⁵ near zero; beyond ±65504 it saturates |
//! | int8 | blocks of `2 + b` | ≤ scale/2 |
//! | int4 | blocks of `2 + ceil(b/2)` | ≤ scale/2 |
//!
//! int8 and int4 cut the values into blocks of `quant_block`; the last one holds the b values that are left.
//! A block is its scale (bf16, 2 bytes), then its codes: int8 one signed byte per value in −127..=127; int4 one nibble
//! per value in two's complement, −7..=7, low nibble first, an odd last high nibble being 0. A value is code × scale.
//! ```text
//! int4, block of 3 values: | scale lo | scale hi | v1:v0 | 0:v2 |
//! ```
//! The scale is max|x| / 127 (or 7), rounded **up** to bf16, so the largest value never clips. bf16 because its
//! exponent is f32's: blocks near 1e-38 or 1e38 survive, which an f16 scale would turn into zeros or infinities.
//!
//! Finite values never decode to NaN or infinity: f16 and bf16 saturate, and so does a quantised block whose
//! rounded-up scale would carry the top code past f32's range (it takes the next scale below and clips by < 1 %).
//! A NaN or infinity in a block makes the whole block NaN, so that a receiver's finiteness check still sees it.
//!
//! A vector cut at a multiple of `quant_block` encodes to the concatenation of its parts' encodings.

use super::ValueCodec;
use super::simd::multiversion;
use crate::config::algorithm::ValueType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Bytes of a block's scale.
const SCALE_BYTES: usize = 2;
/// Largest code of int8.
const INT8_TOP: f32 = 127.0;
/// Largest code of int4.
const INT4_TOP: f32 = 7.0;
/// Exponent bits of an f32: absolute values with these bits or more are not finite.
const INFINITY_BITS: u32 = 0x7f80_0000;
/// Adding and keeping the low bits rounds |x| < 2²² to the nearest integer, ties to even, without a library call.
const ROUNDING: f32 = 12_582_912.0;
/// Values converted at a time where an intermediate array is needed (f16).
const CHUNK: usize = 64;

impl ValueCodec {
    /// Whether decoding may differ from what was encoded.
    #[must_use]
    pub fn is_lossy(&self) -> bool {
        self.value_type != ValueType::F32
    }

    /// Encoded bytes of `values` values. Exact: receivers check lengths by it.
    ///
    /// # Panics
    /// If `quant_block` is 0 with int8 or int4; configuration allows 8..=4096.
    #[must_use]
    pub fn encoded_bytes(&self, values: usize) -> usize {
        let blocks = |block_bytes: fn(usize) -> usize| {
            assert!(self.quant_block > 0, "quant_block must be positive");
            let (full, rest) = (values / self.quant_block, values % self.quant_block);
            full * block_bytes(self.quant_block) + if rest > 0 { block_bytes(rest) } else { 0 }
        };
        match self.value_type {
            ValueType::F32 => values * 4,
            ValueType::Bf16 | ValueType::F16 => values * 2,
            ValueType::Int8 => blocks(|b| SCALE_BYTES + b),
            ValueType::Int4 => blocks(|b| SCALE_BYTES + b.div_ceil(2)),
        }
    }

    /// Appends the encoding of `values` to `out`.
    pub fn encode(&self, values: &[f32], out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + self.encoded_bytes(values.len()), 0);
        self.encode_into(values, &mut out[start..]);
    }

    /// Writes the encoding of `values` over `out`.
    ///
    /// # Panics
    /// If `out.len()` is not `encoded_bytes(values.len())`.
    pub fn encode_into(&self, values: &[f32], out: &mut [u8]) {
        assert_eq!(
            out.len(),
            self.encoded_bytes(values.len()),
            "encoded length"
        );
        match self.value_type {
            ValueType::F32 => encode_f32(values, out),
            ValueType::Bf16 => encode_bf16(values, out),
            ValueType::F16 => encode_f16(values, out),
            ValueType::Int8 => encode_int8(values, self.quant_block, out),
            ValueType::Int4 => encode_int4(values, self.quant_block, out),
        }
    }

    /// Decodes exactly `out.len()` values. `bytes.len()` must be `encoded_bytes(out.len())`.
    ///
    /// # Panics
    /// If the lengths disagree; the wire checks them first.
    pub fn decode(&self, bytes: &[u8], out: &mut [f32]) {
        self.check(bytes, out);
        match self.value_type {
            ValueType::F32 => decode_f32(bytes, out),
            ValueType::Bf16 => decode_bf16(bytes, out),
            ValueType::F16 => decode_f16(bytes, out),
            ValueType::Int8 => decode_int8(bytes, self.quant_block, out),
            ValueType::Int4 => decode_int4(bytes, self.quant_block, out),
        }
    }

    /// `acc[i] += decoded[i]`, the shard's hot loop (no intermediate buffer).
    ///
    /// # Panics
    /// If the lengths disagree, as in [`ValueCodec::decode`].
    pub fn decode_add(&self, bytes: &[u8], acc: &mut [f32]) {
        self.check(bytes, acc);
        match self.value_type {
            ValueType::F32 => add_f32(bytes, acc),
            ValueType::Bf16 => add_bf16(bytes, acc),
            ValueType::F16 => add_f16(bytes, acc),
            ValueType::Int8 => add_int8(bytes, self.quant_block, acc),
            ValueType::Int4 => add_int4(bytes, self.quant_block, acc),
        }
    }

    fn check(&self, bytes: &[u8], values: &[f32]) {
        let expected = self.encoded_bytes(values.len());
        assert_eq!(
            bytes.len(),
            expected,
            "{} values of {:?}: encoded length",
            values.len(),
            self.value_type
        );
    }
}

// ---------------------------------------------------------------- one value

/// To bf16 bits: nearest, ties to even; finite values saturate; NaN stays NaN.
#[inline(always)]
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let (sign, abs) = ((bits >> 16) & 0x8000, bits & 0x7fff_ffff);
    let rounded = ((abs + 0x7fff + ((abs >> 16) & 1)) >> 16).min(0x7f7f);
    // A NaN whose payload sits in the lost bits must not become an infinity.
    let special = (abs >> 16) | if abs > INFINITY_BITS { 0x40 } else { 0 };
    (sign
        | if abs < INFINITY_BITS {
            rounded
        } else {
            special
        }) as u16
}

#[inline(always)]
fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Largest finite f16 of the same sign for finite values beyond it.
#[inline(always)]
fn f16_saturated(x: f32) -> f32 {
    let (top, finite) = (65504.0f32, x.to_bits() & 0x7fff_ffff < INFINITY_BITS);
    let clipped = if x > top {
        top
    } else if x < -top {
        -top
    } else {
        x
    };
    if finite { clipped } else { x }
}

/// Scale of a block and its bf16 bits; NaN if the block is not finite.
#[inline(always)]
fn block_scale(values: &[f32], top: f32) -> (f32, u16) {
    let mut max = 0u32;
    for x in values {
        max = max.max(x.to_bits() & 0x7fff_ffff);
    }
    if max >= INFINITY_BITS {
        return (f32::NAN, bf16::NAN.to_bits());
    }
    if max == 0 {
        return (0.0, 0);
    }
    let exact = (f32::from_bits(max) / top).to_bits();
    // Up, and at least bf16's smallest number: the quotient of a subnormal may have vanished.
    let up = exact.div_ceil(0x1_0000).max(1) as u16;
    let bits = if (bf16_value(up) * top).is_finite() {
        up
    } else {
        up - 1
    };
    (bf16_value(bits), bits)
}

/// Nearest code, ties to even. `scale` is finite and positive, or 0 with x = 0, or NaN (code 0).
#[inline(always)]
fn code(x: f32, scale: f32, top: f32) -> i32 {
    // Division, not multiplication by a reciprocal: that of a subnormal scale overflows.
    let q = if scale > 0.0 { x / scale } else { 0.0 };
    let q = if q > top {
        top
    } else if q < -top {
        -top
    } else {
        q
    };
    (q + ROUNDING).to_bits().wrapping_sub(ROUNDING.to_bits()) as i32
}

/// Sign-extends a nibble.
#[inline(always)]
fn nibble(code: u8) -> f32 {
    f32::from((((code & 0xf) ^ 8) as i8) - 8)
}

// ---------------------------------------------------------------- encode

fn encode_f32(values: &[f32], out: &mut [u8]) {
    for (bytes, x) in out.chunks_exact_mut(4).zip(values) {
        bytes.copy_from_slice(&x.to_le_bytes());
    }
}

multiversion! {
fn encode_bf16(values: &[f32], out: &mut [u8]) {
    for (bytes, x) in out.chunks_exact_mut(2).zip(values) {
        bytes.copy_from_slice(&bf16_bits(*x).to_le_bytes());
    }
}
}

fn encode_f16(values: &[f32], out: &mut [u8]) {
    let (mut clipped, mut halves) = ([0f32; CHUNK], [f16::ZERO; CHUNK]);
    for (values, bytes) in values.chunks(CHUNK).zip(out.chunks_mut(CHUNK * 2)) {
        let (clipped, halves) = (&mut clipped[..values.len()], &mut halves[..values.len()]);
        for (c, x) in clipped.iter_mut().zip(values) {
            *c = f16_saturated(*x);
        }
        halves.convert_from_f32_slice(clipped);
        for (bytes, h) in bytes.chunks_exact_mut(2).zip(halves) {
            bytes.copy_from_slice(&h.to_le_bytes());
        }
    }
}

multiversion! {
fn encode_int8(values: &[f32], block: usize, out: &mut [u8]) {
    for (values, bytes) in values.chunks(block).zip(out.chunks_mut(SCALE_BYTES + block)) {
        let (scale, bits) = block_scale(values, INT8_TOP);
        let (head, codes) = bytes.split_at_mut(SCALE_BYTES);
        head.copy_from_slice(&bits.to_le_bytes());
        for (c, x) in codes.iter_mut().zip(values) {
            *c = code(*x, scale, INT8_TOP) as u8;
        }
    }
}
}

multiversion! {
fn encode_int4(values: &[f32], block: usize, out: &mut [u8]) {
    for (values, bytes) in values.chunks(block).zip(out.chunks_mut(SCALE_BYTES + block.div_ceil(2))) {
        let (scale, bits) = block_scale(values, INT4_TOP);
        let (head, codes) = bytes.split_at_mut(SCALE_BYTES);
        head.copy_from_slice(&bits.to_le_bytes());
        let (pairs, last) = values.as_chunks::<2>();
        for (c, [low, high]) in codes.iter_mut().zip(pairs) {
            *c = (code(*low, scale, INT4_TOP) & 0xf | code(*high, scale, INT4_TOP) << 4) as u8;
        }
        if let ([x], Some(c)) = (last, codes.last_mut()) {
            *c = (code(*x, scale, INT4_TOP) & 0xf) as u8;
        }
    }
}
}

// ---------------------------------------------------------------- decode

/// Defines the decoder that stores and the one that adds from one body.
macro_rules! decoders {
    ($store:ident, $add:ident, ($($arg:ident: $ty:ty),*), $body:ident) => {
        multiversion! {
            fn $store(bytes: &[u8], $($arg: $ty,)* out: &mut [f32]) { $body(bytes, $($arg,)* out, |slot, x| *slot = x); }
        }
        multiversion! {
            fn $add(bytes: &[u8], $($arg: $ty,)* out: &mut [f32]) { $body(bytes, $($arg,)* out, |slot, x| *slot += x); }
        }
    };
}

decoders!(decode_f32, add_f32, (), each_f32);
decoders!(decode_bf16, add_bf16, (), each_bf16);
decoders!(decode_int8, add_int8, (block: usize), each_int8);
decoders!(decode_int4, add_int4, (block: usize), each_int4);

#[inline(always)]
fn each_f32(bytes: &[u8], out: &mut [f32], mut put: impl FnMut(&mut f32, f32)) {
    for (slot, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
        put(slot, f32::from_le_bytes(*b));
    }
}

#[inline(always)]
fn each_bf16(bytes: &[u8], out: &mut [f32], mut put: impl FnMut(&mut f32, f32)) {
    for (slot, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
        put(slot, bf16_value(u16::from_le_bytes(*b)));
    }
}

#[inline(always)]
fn each_int8(bytes: &[u8], block: usize, out: &mut [f32], mut put: impl FnMut(&mut f32, f32)) {
    for (bytes, out) in bytes.chunks(SCALE_BYTES + block).zip(out.chunks_mut(block)) {
        let scale = bf16_value(u16::from_le_bytes([bytes[0], bytes[1]]));
        for (slot, c) in out.iter_mut().zip(&bytes[SCALE_BYTES..]) {
            put(slot, f32::from(*c as i8) * scale);
        }
    }
}

#[inline(always)]
fn each_int4(bytes: &[u8], block: usize, out: &mut [f32], mut put: impl FnMut(&mut f32, f32)) {
    for (bytes, out) in bytes
        .chunks(SCALE_BYTES + block.div_ceil(2))
        .zip(out.chunks_mut(block))
    {
        let scale = bf16_value(u16::from_le_bytes([bytes[0], bytes[1]]));
        let (pairs, last) = out.as_chunks_mut::<2>();
        for ([low, high], c) in pairs.iter_mut().zip(&bytes[SCALE_BYTES..]) {
            put(low, nibble(*c) * scale);
            put(high, nibble(*c >> 4) * scale);
        }
        if let ([slot], Some(c)) = (last, bytes.last()) {
            put(slot, nibble(*c) * scale);
        }
    }
}

fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    each_f16_chunk(bytes, out, |out, values| out.copy_from_slice(values));
}

fn add_f16(bytes: &[u8], acc: &mut [f32]) {
    each_f16_chunk(bytes, acc, |acc, values| {
        for (a, x) in acc.iter_mut().zip(values) {
            *a += x;
        }
    });
}

/// Through `half`, which uses the CPU's own conversion where there is one.
fn each_f16_chunk(bytes: &[u8], out: &mut [f32], mut put: impl FnMut(&mut [f32], &[f32])) {
    let (mut halves, mut values) = ([f16::ZERO; CHUNK], [0f32; CHUNK]);
    for (bytes, out) in bytes.chunks(CHUNK * 2).zip(out.chunks_mut(CHUNK)) {
        let (halves, values) = (&mut halves[..out.len()], &mut values[..out.len()]);
        for (h, b) in halves.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *h = f16::from_le_bytes(*b);
        }
        halves.convert_to_f32_slice(values);
        put(out, values);
    }
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
