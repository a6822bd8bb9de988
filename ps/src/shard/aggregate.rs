//! Sums of frame bodies.
//!
//! The caller adds bodies in rank order (I3); nothing here depends on when they came. Every body is one
//! pass of [`ValueCodec::decode_add`] per piece, without a buffer between the wire and the sum.

use arc_topk_common::compress::ValueCodec;

/// A run of values with one codec, as it lies in a body.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// How the values are encoded.
    pub codec: ValueCodec,
    /// How many there are.
    pub values: usize,
}

impl Piece {
    /// Exact length of its encoding.
    #[must_use]
    pub fn encoded_bytes(&self) -> usize {
        self.codec.encoded_bytes(self.values)
    }
}

/// Exact length of a body made of `pieces`.
#[must_use]
pub fn body_bytes(pieces: &[Piece]) -> usize {
    pieces.iter().map(Piece::encoded_bytes).sum()
}

/// A running sum of bodies of one shape.
#[derive(Clone, PartialEq, Debug)]
pub struct Sum {
    pieces: Vec<Piece>,
    values: Vec<f32>,
    added: u32,
}

impl Sum {
    /// Zero, for bodies made of `pieces`. Memory is taken when the first body is added.
    #[must_use]
    pub fn new(pieces: Vec<Piece>) -> Self {
        Self {
            pieces,
            values: Vec::new(),
            added: 0,
        }
    }

    /// Exact length of the bodies that [`Sum::add`] takes.
    #[must_use]
    pub fn body_bytes(&self) -> usize {
        body_bytes(&self.pieces)
    }

    /// Adds one worker's body.
    ///
    /// # Panics
    /// If the length is not [`Sum::body_bytes`]; frames are checked when they come.
    pub fn add(&mut self, body: &[u8]) {
        assert_eq!(
            body.len(),
            self.body_bytes(),
            "a body's length is checked on arrival"
        );
        let total = self.pieces.iter().map(|piece| piece.values).sum();
        self.values.resize(total, 0.0);
        let (mut at, mut start) = (0, 0);
        for piece in &self.pieces {
            let bytes = piece.encoded_bytes();
            let acc = &mut self.values[start..start + piece.values];
            piece.codec.decode_add(&body[at..at + bytes], acc);
            at += bytes;
            start += piece.values;
        }
        self.added += 1;
    }

    /// The mean over the bodies added, or `None` if a sum is not finite.
    #[must_use]
    pub fn mean(mut self) -> Option<Vec<f32>> {
        scale_by_count(&mut self.values, self.added).then_some(self.values)
    }
}

/// Divides by `count`; false if any value is NaN or infinite. One pass: the check rides along.
pub(crate) fn scale_by_count(values: &mut [f32], count: u32) -> bool {
    let factor = 1.0 / count.max(1) as f32;
    let mut finite = true;
    for value in values {
        *value *= factor;
        finite &= value.is_finite();
    }
    finite
}

#[cfg(test)]
mod tests {
    use super::*;
    use arc_topk_common::config::algorithm::ValueType;

    const F32: ValueCodec = ValueCodec {
        value_type: ValueType::F32,
        quant_block: 64,
    };

    fn body(values: &[f32]) -> Vec<u8> {
        let mut out = Vec::new();
        F32.encode(values, &mut out);
        out
    }

    #[test]
    fn mean_of_two() {
        let mut sum = Sum::new(vec![
            Piece {
                codec: F32,
                values: 1,
            },
            Piece {
                codec: F32,
                values: 2,
            },
        ]);
        assert_eq!(sum.body_bytes(), 12);
        sum.add(&body(&[1.0, 2.0, 3.0]));
        sum.add(&body(&[3.0, 2.0, -3.0]));
        assert_eq!(sum.mean(), Some(vec![2.0, 2.0, 0.0]));
    }

    #[test]
    fn overflow_of_the_sum_is_not_finite() {
        let mut sum = Sum::new(vec![Piece {
            codec: F32,
            values: 1,
        }]);
        sum.add(&body(&[f32::MAX]));
        sum.add(&body(&[f32::MAX]));
        assert_eq!(sum.mean(), None);
    }
}
