//! Files of the store: the fields of a message between a magic number and a hash of them.
//!
//! | bytes | part file | manifest file |
//! |---|---|---|
//! | 8 | `arcpiece` | `arcsnaps` |
//! | 2 | version | version |
//! | | [`PieceMeta`], of fixed length | [`Manifest`] |
//! | 32 | SHA-256 of all before | SHA-256 of all before |
//! | | the piece's bytes | |

use super::super::WireError;
use super::super::codec::{Reader, Writer};
use super::bytes::{META_BYTES, read_manifest, read_meta, write_manifest, write_meta};
use super::{MAX_STORE_MESSAGE_BYTES, Manifest, PieceMeta, Sha256Bytes};
use sha2::{Digest, Sha256};

const PART_MAGIC: &[u8; 8] = b"arcpiece";
const MANIFEST_MAGIC: &[u8; 8] = b"arcsnaps";
const FILE_VERSION: u16 = 1;
const START_BYTES: usize = 8 + size_of::<u16>();
const HASH_BYTES: usize = size_of::<Sha256Bytes>();

/// Bytes in front of a piece in its file.
pub const PART_HEADER_BYTES: usize = START_BYTES + META_BYTES + HASH_BYTES;

impl PieceMeta {
    /// What stands in front of the piece in its file.
    #[must_use]
    pub fn file_header(&self) -> [u8; PART_HEADER_BYTES] {
        let sealed = seal(PART_MAGIC, |w| write_meta(w, self));
        sealed
            .try_into()
            .expect("the fields add up to PART_HEADER_BYTES")
    }

    /// Reads what [`PieceMeta::file_header`] made.
    ///
    /// # Errors
    /// Bytes that are damaged, of another kind of file or of another version.
    pub fn from_file_header(bytes: &[u8; PART_HEADER_BYTES]) -> Result<Self, WireError> {
        open(PART_MAGIC, bytes, read_meta)
    }
}

impl Manifest {
    /// The manifest's file.
    #[must_use]
    pub fn file_bytes(&self) -> Vec<u8> {
        seal(MANIFEST_MAGIC, |w| write_manifest(w, self))
    }

    /// Reads what [`Manifest::file_bytes`] made.
    ///
    /// # Errors
    /// Bytes that are damaged, too many, of another kind of file or of another version.
    pub fn from_file_bytes(bytes: &[u8]) -> Result<Self, WireError> {
        open(MANIFEST_MAGIC, bytes, read_manifest)
    }
}

fn seal(magic: &[u8; 8], write: impl FnOnce(&mut Writer<'_>)) -> Vec<u8> {
    let mut out = Vec::with_capacity(PART_HEADER_BYTES);
    let mut w = Writer(&mut out);
    w.bytes(magic);
    w.u16(FILE_VERSION);
    write(&mut w);
    let hash = Sha256::digest(&out);
    out.extend_from_slice(&hash);
    out
}

fn open<T>(
    magic: &[u8; 8],
    bytes: &[u8],
    read: impl FnOnce(&mut Reader<'_>) -> Result<T, WireError>,
) -> Result<T, WireError> {
    if bytes.len() > MAX_STORE_MESSAGE_BYTES {
        return Err(WireError::TooLong {
            what: "store file",
            value: bytes.len() as u64,
            limit: MAX_STORE_MESSAGE_BYTES as u64,
        });
    }
    let Some((sealed, hash)) = bytes.split_last_chunk::<HASH_BYTES>() else {
        return Err(WireError::Truncated {
            what: "store file",
            needed: HASH_BYTES,
            left: bytes.len(),
        });
    };
    let mut r = Reader(sealed);
    if &r.array::<8>("magic number")? != magic {
        return Err(invalid("magic number", "the file is of another kind"));
    }
    let version = r.u16("file version")?;
    if version != FILE_VERSION {
        return Err(WireError::Unknown {
            what: "file version",
            value: u64::from(version),
        });
    }
    if Sha256::digest(sealed).as_slice() != hash {
        return Err(invalid(
            "store file",
            "its hash differs: it was cut short or changed",
        ));
    }
    let content = read(&mut r)?;
    r.finish("store file")?;
    Ok(content)
}

fn invalid(what: &'static str, rule: &'static str) -> WireError {
    WireError::Invalid { what, rule }
}
