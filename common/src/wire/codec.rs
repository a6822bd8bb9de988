//! Bounded reading and plain writing of little-endian fields. Used by every message of this module.

use super::WireError;

/// Appends fields to a message.
pub(crate) struct Writer<'a>(pub(crate) &'a mut Vec<u8>);

impl Writer<'_> {
    pub(crate) fn u8(&mut self, v: u8) {
        self.0.push(v);
    }
    pub(crate) fn u16(&mut self, v: u16) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }
    pub(crate) fn u32(&mut self, v: u32) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }
    pub(crate) fn u64(&mut self, v: u64) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }
    pub(crate) fn f32(&mut self, v: f32) {
        self.u32(v.to_bits());
    }
    pub(crate) fn bytes(&mut self, v: &[u8]) {
        self.0.extend_from_slice(v);
    }
    /// Count of following items; a longer list than u32 holds is refused by every reader.
    pub(crate) fn count(&mut self, v: usize) {
        self.u32(u32::try_from(v).unwrap_or(u32::MAX));
    }
    pub(crate) fn text(&mut self, v: &str) {
        self.count(v.len());
        self.bytes(v.as_bytes());
    }
    /// Text for people: cut at `limit` bytes (at a character's end) rather than refused by the reader.
    pub(crate) fn text_cut(&mut self, v: &str, limit: usize) {
        let mut end = v.len().min(limit);
        while !v.is_char_boundary(end) {
            end -= 1;
        }
        self.text(&v[..end]);
    }
    pub(crate) fn option<T>(&mut self, v: Option<T>, write: impl FnOnce(&mut Self, T)) {
        self.u8(u8::from(v.is_some()));
        if let Some(v) = v {
            write(self, v);
        }
    }
    /// Low seven bits first, the high bit of a byte says that another follows.
    pub(crate) fn leb128(&mut self, mut v: u32) {
        while v >= 0x80 {
            self.u8((v as u8) | 0x80);
            v >>= 7;
        }
        self.u8(v as u8);
    }
}

/// Bytes of the LEB128 form of `v`.
pub(crate) fn leb128_bytes(v: u32) -> usize {
    (32 - (v | 1).leading_zeros() as usize).div_ceil(7)
}

/// Takes fields off the front of a message.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn take(
        &mut self,
        what: &'static str,
        needed: usize,
    ) -> Result<&'a [u8], WireError> {
        let Some((head, tail)) = self.0.split_at_checked(needed) else {
            return Err(WireError::Truncated {
                what,
                needed,
                left: self.0.len(),
            });
        };
        self.0 = tail;
        Ok(head)
    }
    pub(crate) fn array<const N: usize>(
        &mut self,
        what: &'static str,
    ) -> Result<[u8; N], WireError> {
        let Some((head, tail)) = self.0.split_first_chunk::<N>() else {
            return Err(WireError::Truncated {
                what,
                needed: N,
                left: self.0.len(),
            });
        };
        self.0 = tail;
        Ok(*head)
    }
    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, WireError> {
        Ok(self.array::<1>(what)?[0])
    }
    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array(what)?))
    }
    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }
    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }
    pub(crate) fn f32(&mut self, what: &'static str) -> Result<f32, WireError> {
        Ok(f32::from_bits(self.u32(what)?))
    }
    /// A count that is within `limit` and for which the bytes can be there (`item_bytes` at least each):
    /// so allocating `count` items is bounded by what was received.
    pub(crate) fn count(
        &mut self,
        what: &'static str,
        limit: usize,
        item_bytes: usize,
    ) -> Result<usize, WireError> {
        let count = self.u32(what)? as usize;
        if count > limit {
            return Err(WireError::TooLong {
                what,
                value: count as u64,
                limit: limit as u64,
            });
        }
        let needed = count.saturating_mul(item_bytes);
        if needed > self.0.len() {
            return Err(WireError::Truncated {
                what,
                needed,
                left: self.0.len(),
            });
        }
        Ok(count)
    }
    pub(crate) fn text(&mut self, what: &'static str, limit: usize) -> Result<String, WireError> {
        let length = self.count(what, limit, 1)?;
        let bytes = self.take(what, length)?;
        core::str::from_utf8(bytes)
            .map(str::to_owned)
            .map_err(|_| WireError::NotUtf8 { what })
    }
    pub(crate) fn option<T>(
        &mut self,
        what: &'static str,
        read: impl FnOnce(&mut Self) -> Result<T, WireError>,
    ) -> Result<Option<T>, WireError> {
        match self.u8(what)? {
            0 => Ok(None),
            1 => read(self).map(Some),
            value => Err(WireError::Unknown {
                what,
                value: u64::from(value),
            }),
        }
    }
    /// Shortest form only; a value above `u32::MAX` is refused.
    pub(crate) fn leb128(&mut self, what: &'static str) -> Result<u32, WireError> {
        let mut value = 0u64;
        for shift in [0, 7, 14, 21, 28] {
            let byte = self.u8(what)?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    return Err(WireError::Invalid {
                        what,
                        rule: "a number must have its shortest LEB128 form",
                    });
                }
                return u32::try_from(value).map_err(|_| WireError::TooLong {
                    what,
                    value,
                    limit: u64::from(u32::MAX),
                });
            }
        }
        Err(WireError::Invalid {
            what,
            rule: "a LEB128 number has at most five bytes",
        })
    }
    pub(crate) fn finish(self, what: &'static str) -> Result<(), WireError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(WireError::Trailing {
                what,
                bytes: self.0.len(),
            })
        }
    }
}
