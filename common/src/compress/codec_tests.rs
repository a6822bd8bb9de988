#![allow(clippy::unwrap_used, reason = "tests")]

use super::super::simd::at_every_level;
use super::*;
use proptest::prelude::*;

const TYPES: [ValueType; 5] = [
    ValueType::F32,
    ValueType::Bf16,
    ValueType::F16,
    ValueType::Int8,
    ValueType::Int4,
];

fn codec(value_type: ValueType, quant_block: usize) -> ValueCodec {
    ValueCodec {
        value_type,
        quant_block,
    }
}

fn round_trip(codec: ValueCodec, values: &[f32]) -> Vec<f32> {
    let mut bytes = vec![0xaa];
    codec.encode(values, &mut bytes);
    assert_eq!(bytes[0], 0xaa, "encode appends");
    assert_eq!(bytes.len() - 1, codec.encoded_bytes(values.len()));
    let mut out = vec![f32::NAN; values.len()];
    codec.decode(&bytes[1..], &mut out);
    out
}

/// Largest error that the layout's table allows for `x` in a block whose largest magnitude is `max`.
fn bound(value_type: ValueType, x: f32, max: f32) -> f64 {
    let (x, max) = (f64::from(x.abs()), f64::from(max));
    // The scale is rounded up by less than a bf16 ulp: 2⁻⁷ of it, and 2⁻¹³³ among subnormal scales.
    let scale = |top: f64| (max / top * (1.0 + 2f64.powi(-7))).max(max / top + 2f64.powi(-133));
    match value_type {
        ValueType::F32 => 0.0,
        ValueType::Bf16 => (x * 2f64.powi(-8)).max(2f64.powi(-134)),
        ValueType::F16 if x > 65504.0 => x - 65504.0,
        ValueType::F16 => (x * 2f64.powi(-11)).max(2f64.powi(-25)),
        ValueType::Int8 => scale(127.0) * 0.5001 + if max > 3.3e38 { max * 0.01 } else { 0.0 },
        ValueType::Int4 => scale(7.0) * 0.5001 + if max > 3.3e38 { max * 0.01 } else { 0.0 },
    }
}

fn any_finite() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => -10f32..10.0,
        1 => any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |x| x.is_finite()),
        1 => prop_oneof![Just(0.0f32), Just(-0.0), Just(f32::MAX), Just(f32::MIN), Just(f32::from_bits(1)), Just(65519.9), Just(65520.0)],
    ]
}

proptest! {
    #[test]
    fn errors_stay_within_the_documented_bounds(
        values in prop::collection::vec(any_finite(), 0..200), block in 1usize..70,
    ) {
        for value_type in TYPES {
            let out = round_trip(codec(value_type, block), &values);
            for (block, (out, values)) in out.chunks(block).zip(values.chunks(block)).enumerate() {
                let max = values.iter().fold(0f32, |m, x| m.max(x.abs()));
                for (y, x) in out.iter().zip(values) {
                    prop_assert!(y.is_finite(), "{value_type:?}: {x:e} -> {y:e}");
                    let error = (f64::from(*y) - f64::from(*x)).abs();
                    prop_assert!(error <= bound(value_type, *x, max), "{value_type:?} block {block}: {x:e} -> {y:e} (max {max:e})");
                }
            }
        }
    }

    #[test]
    fn decode_add_is_decode_then_add(values in prop::collection::vec(-1e3f32..1e3, 1..300), block in 1usize..70) {
        for value_type in TYPES {
            let codec = codec(value_type, block);
            let mut bytes = Vec::new();
            codec.encode(&values, &mut bytes);
            let mut acc: Vec<f32> = (0..values.len()).map(|i| i as f32).collect();
            let expected: Vec<f32> = round_trip(codec, &values).iter().zip(&acc).map(|(x, a)| a + x).collect();
            codec.decode_add(&bytes, &mut acc);
            prop_assert_eq!(&acc, &expected);
        }
    }

    #[test]
    fn cutting_at_a_block_boundary_changes_nothing(values in prop::collection::vec(-1e3f32..1e3, 0..300), block in 1usize..70, at in 0usize..10) {
        let cut = (at * block).min(values.len() / block * block);
        for value_type in TYPES {
            let codec = codec(value_type, block);
            let (mut whole, mut parts) = (Vec::new(), Vec::new());
            codec.encode(&values, &mut whole);
            codec.encode(&values[..cut], &mut parts);
            codec.encode(&values[cut..], &mut parts);
            prop_assert_eq!(&whole, &parts);
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bytes(values in prop::collection::vec(any_finite(), 0..300), block in 1usize..70) {
        for value_type in TYPES {
            let codec = codec(value_type, block);
            let results = at_every_level(|| {
                let mut bytes = Vec::new();
                codec.encode(&values, &mut bytes);
                let mut acc = vec![0.1f32; values.len()];
                codec.decode_add(&bytes, &mut acc);
                (bytes, round_trip(codec, &values), acc)
            });
            prop_assert!(results.windows(2).all(|w| w[0] == w[1]));
        }
    }

    #[test]
    fn any_bytes_decode_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), block in 1usize..70) {
        for value_type in TYPES {
            let codec = codec(value_type, block);
            if let Some(values) = (0..=bytes.len()).find(|v| codec.encoded_bytes(*v) == bytes.len()) {
                codec.decode(&bytes, &mut vec![0.0; values]);
            }
        }
    }
}

#[test]
fn int4_layout_is_as_documented() {
    let mut bytes = Vec::new();
    // Scale 7/7 = 1; then a block of one value, scale 14/7 = 2.
    codec(ValueType::Int4, 3).encode(&[7.0, -2.0, 0.6, -14.0], &mut bytes);
    assert_eq!(bytes, [0x80, 0x3f, 0xe7, 0x01, 0x00, 0x40, 0x09]);
}

#[test]
fn int8_layout_is_as_documented() {
    let mut bytes = Vec::new();
    codec(ValueType::Int8, 8).encode(&[127.0, -2.0, 0.4], &mut bytes);
    assert_eq!(bytes, [0x80, 0x3f, 127, 0xfe, 0]);
}

#[test]
fn ties_round_to_even() {
    let values = [7.0, 0.5, 1.5, 2.5, -0.5, -1.5];
    assert_eq!(
        round_trip(codec(ValueType::Int4, 8), &values),
        [7.0, 0.0, 2.0, 2.0, 0.0, -2.0]
    );
}

#[test]
fn the_largest_value_of_a_block_takes_the_top_code() {
    for max in [1e-30f32, 0.3, 1.0, 123.456, 1e30] {
        let out = round_trip(codec(ValueType::Int8, 64), &[max, -max / 3.0]);
        assert!(
            (out[0] - max).abs() <= max / 200.0,
            "{max:e} became {:e}",
            out[0]
        );
    }
}

#[test]
fn tiny_and_huge_blocks_survive() {
    for value_type in [ValueType::Int8, ValueType::Int4] {
        let out = round_trip(codec(value_type, 8), &[1e-38, -1e-38]);
        assert!((out[0] / 1e-38 - 1.0).abs() < 0.2 && out[1] == -out[0]);
        let out = round_trip(codec(value_type, 8), &[f32::MAX, 0.0, f32::MIN]);
        assert!(out[0] > 3.3e38 && out[0].is_finite() && out[1] == 0.0 && out[2] == -out[0]);
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    for value_type in TYPES {
        for bad in [
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::from_bits(0x7f80_0001),
        ] {
            assert!(
                !round_trip(codec(value_type, 8), &[1.0, bad])[1].is_finite(),
                "{value_type:?} {bad}"
            );
        }
    }
}

#[test]
#[should_panic(expected = "encoded length")]
fn a_wrong_length_panics() {
    codec(ValueType::Bf16, 64).decode(&[0; 3], &mut [0.0; 2]);
}
