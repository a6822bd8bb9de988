#![allow(clippy::unwrap_used, reason = "tests")]

use super::super::{Blame, WireError};
use super::*;
use proptest::prelude::*;

/// Bytes of an annotated dump: `#` starts a comment, all else is hexadecimal.
fn dump(text: &str) -> Vec<u8> {
    let digits: String = text
        .lines()
        .filter_map(|line| line.split('#').next())
        .flat_map(str::chars)
        .filter(|c| !c.is_whitespace())
        .collect();
    (0..digits.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap())
        .collect()
}

fn snapshot() -> SnapshotId {
    SnapshotId {
        step: Step(0x0102),
        run: RunId(*b"0123456789abcdef"),
    }
}

fn meta() -> PieceMeta {
    PieceMeta {
        snapshot: snapshot(),
        owner: Owner::Rank(Rank(5)),
        piece: 1,
        pieces: 3,
        piece_bytes: 3,
        total_bytes: 10,
        total_sha256: [0xaa; 32],
        piece_sha256: [0xbb; 32],
    }
}

fn part(owner: Owner) -> PartInfo {
    PartInfo {
        owner,
        pieces: 3,
        total_bytes: 10,
        total_sha256: [0xaa; 32],
    }
}

fn manifest() -> Manifest {
    Manifest {
        snapshot: snapshot(),
        update: 7,
        members: 3,
        parts: vec![part(Owner::Replica), part(Owner::Rank(Rank(5)))],
    }
}

const SNAPSHOT: &str = "
    02 01 00 00 00 00 00 00 # step 0x0102
    30313233 34353637 38396162 63646566 # run
";
const META: &str = "
    01 05 00           # owner: rank 5
    01 00 03 00        # piece 1 of 3
    03 00 00 00 00 00 00 00 # piece bytes
    0a 00 00 00 00 00 00 00 # total bytes
    aaaaaaaaaaaaaaaa aaaaaaaaaaaaaaaa aaaaaaaaaaaaaaaa aaaaaaaaaaaaaaaa # hash of the part
    bbbbbbbbbbbbbbbb bbbbbbbbbbbbbbbb bbbbbbbbbbbbbbbb bbbbbbbbbbbbbbbb # hash of the piece
";
const PART: &str = "
    03 00              # pieces
    0a 00 00 00 00 00 00 00 # total bytes
    aaaaaaaaaaaaaaaa aaaaaaaaaaaaaaaa aaaaaaaaaaaaaaaa aaaaaaaaaaaaaaaa # hash of the part
";

fn manifest_dump() -> String {
    format!(
        "{SNAPSHOT}
         07 00 00 00 00 00 00 00 # update 7
         03 00              # of three members
         02 00 00 00        # two parts
         00 00 00           # owner: replica
         {PART}
         01 05 00           # owner: rank 5
         {PART}"
    )
}

#[test]
fn request_bytes() {
    let get = StoreRequest::Get {
        snapshot: snapshot(),
        owner: Owner::Replica,
        piece: 0,
        pieces: 256,
    };
    let cases = [
        (
            StoreRequest::Put(meta()),
            format!("01 # Put\n{SNAPSHOT}{META}"),
        ),
        (
            get,
            format!("02 # Get\n{SNAPSHOT} 000000 # replica\n 0000 0001 # piece 0 of 256"),
        ),
        (StoreRequest::List, "03 # List".to_owned()),
        (
            StoreRequest::Commit(manifest()),
            format!("04 # Commit\n{}", manifest_dump()),
        ),
    ];
    for (message, text) in cases {
        let bytes = dump(&text);
        assert_eq!(message.encode(), bytes, "{message:?}");
        assert_eq!(StoreRequest::decode(&bytes), Ok(message));
    }
}

#[test]
fn response_bytes() {
    let listing = vec![HeldSnapshot {
        snapshot: snapshot(),
        manifest: Some(manifest()),
        pieces: vec![HeldPiece {
            part: part(Owner::Rank(Rank(5))),
            piece: 2,
        }],
    }];
    let failed = StoreResponse::Failed {
        code: StoreCode::Limit,
        detail: "full".to_owned(),
    };
    let listing_dump = format!(
        "03                 # Listing
         01 00 00 00        # one snapshot
         {SNAPSHOT}
         01                 # with a manifest
         {}
         01 00 00 00        # one piece
         01 05 00           # owner: rank 5
         {PART}
         02 00              # piece 2",
        manifest_dump()
    );
    let cases = [
        (StoreResponse::Stored, "01 # Stored".to_owned()),
        (
            StoreResponse::Piece(meta()),
            format!("02 # Piece\n{SNAPSHOT}{META}"),
        ),
        (StoreResponse::Listing(listing), listing_dump),
        (
            failed,
            "04 # Failed\n 0200 # limit\n 04000000 66756c6c # \"full\"".to_owned(),
        ),
    ];
    for (message, text) in cases {
        let bytes = dump(&text);
        assert_eq!(message.encode(), bytes, "{message:?}");
        assert_eq!(StoreResponse::decode(&bytes), Ok(message));
    }
}

#[test]
fn file_bytes() {
    let start = dump("61726370 69656365 # arcpiece\n 0100 # version 1");
    let header = meta().file_header();
    let fields = dump(&format!("{SNAPSHOT}{META}"));
    assert_eq!(header[..PART_HEADER_BYTES - 32], [start, fields].concat());
    let file = manifest().file_bytes();
    let start = dump("61726373 6e617073 # arcsnaps\n 0100 # version 1");
    assert_eq!(
        file[..file.len() - 32],
        [start, dump(&manifest_dump())].concat()
    );
}

/// Every cut and every flipped bit of a file's fields is noticed.
#[test]
fn damaged_files_are_told() {
    let header = meta().file_header();
    assert_eq!(PieceMeta::from_file_header(&header), Ok(meta()));
    for bit in 0..header.len() * 8 {
        let mut damaged = header;
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(PieceMeta::from_file_header(&damaged).is_err(), "bit {bit}");
    }
    let file = manifest().file_bytes();
    assert_eq!(Manifest::from_file_bytes(&file), Ok(manifest()));
    for end in 0..file.len() {
        assert!(
            Manifest::from_file_bytes(&file[..end]).is_err(),
            "cut at {end}"
        );
    }
    for bit in 0..file.len() * 8 {
        let mut damaged = file.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(Manifest::from_file_bytes(&damaged).is_err(), "bit {bit}");
    }
    assert!(Manifest::from_file_bytes(&[&file[..], &[0]].concat()).is_err());
}

fn refused(bytes: &[u8]) -> WireError {
    StoreRequest::decode(bytes).unwrap_err()
}

#[test]
fn what_is_not_canonical_or_too_large_is_refused() {
    let with = |change: fn(&mut PieceMeta)| {
        let mut meta = meta();
        change(&mut meta);
        refused(&StoreRequest::Put(meta).encode())
    };
    assert_eq!(with(|m| m.piece = 3).blame(), Blame::Bytes);
    assert_eq!(with(|m| m.pieces = 0).blame(), Blame::Bytes);
    assert_eq!(with(|m| m.pieces = 257).blame(), Blame::Peer);
    assert_eq!(with(|m| m.piece_bytes = 4).blame(), Blame::Bytes);
    assert_eq!(with(|m| m.piece_bytes = u64::MAX).blame(), Blame::Peer);
    assert_eq!(with(|m| m.total_bytes = u64::MAX).blame(), Blame::Peer);
    assert_eq!(
        with(|m| m.owner = Owner::Rank(Rank(4096))).blame(),
        Blame::Peer
    );
    let manifest_with = |change: fn(&mut Manifest)| {
        let mut manifest = manifest();
        change(&mut manifest);
        refused(&StoreRequest::Commit(manifest).encode())
    };
    assert_eq!(manifest_with(|m| m.parts.clear()).blame(), Blame::Bytes);
    assert_eq!(manifest_with(|m| m.parts.reverse()).blame(), Blame::Bytes);
    assert_eq!(manifest_with(|m| m.members = 0).blame(), Blame::Bytes);
    assert_eq!(
        manifest_with(|m| m.parts[1].total_bytes = 3 * MAX_PIECE_BYTES + 1).blame(),
        Blame::Peer
    );
    // A count is compared with the bytes that are there before anything is allocated.
    let mut claims = StoreRequest::Commit(manifest()).encode();
    claims[35..39].copy_from_slice(&4000u32.to_le_bytes());
    assert!(matches!(
        refused(&claims),
        WireError::Truncated { what: "parts", .. }
    ));
    assert!(matches!(
        refused(&vec![3; MAX_STORE_MESSAGE_BYTES + 1]),
        WireError::TooLong { .. }
    ));
}

/// A shard that holds all it may can still say so.
#[test]
fn the_largest_listing_fits() {
    let parts = |count: u16| {
        let ranks = (0..count).map(|rank| Owner::Rank(Rank(rank)));
        let owners = [Owner::Replica].into_iter().chain(ranks);
        owners.map(part).collect::<Vec<_>>()
    };
    let held = |step: u64| {
        let snapshot = SnapshotId {
            step: Step(step),
            run: RunId([1; 16]),
        };
        let manifest = Manifest {
            snapshot,
            update: 0,
            members: 4096,
            parts: parts(4096),
        };
        let pieces = parts(4096).into_iter().flat_map(|part| {
            (0..3).map(move |piece| HeldPiece {
                part: part.clone(),
                piece,
            })
        });
        let rest = if step == 0 {
            MAX_LISTED_PIECES % MAX_LISTED_SNAPSHOTS
        } else {
            0
        };
        HeldSnapshot {
            snapshot,
            manifest: Some(manifest),
            pieces: pieces
                .take(MAX_LISTED_PIECES / MAX_LISTED_SNAPSHOTS + rest)
                .collect(),
        }
    };
    let listing: Vec<_> = (0..MAX_LISTED_SNAPSHOTS as u64).map(held).collect();
    let bytes = StoreResponse::Listing(listing.clone()).encode();
    assert!(bytes.len() <= MAX_STORE_MESSAGE_BYTES, "{}", bytes.len());
    assert_eq!(
        StoreResponse::decode(&bytes),
        Ok(StoreResponse::Listing(listing))
    );
}

proptest! {
    #[test]
    fn pieces_cover_a_part_in_order(total in 0..=u64::MAX, pieces in 1..=MAX_PIECES) {
        let ranges: Vec<_> = (0..pieces).map(|piece| piece_range(total, piece, pieces)).collect();
        prop_assert_eq!(ranges[0].start, 0);
        prop_assert_eq!(ranges[ranges.len() - 1].end, total);
        prop_assert!(ranges.windows(2).all(|two| two[0].end == two[1].start));
        let lengths = || ranges.iter().map(|range| range.end - range.start);
        prop_assert!(lengths().max().unwrap() - lengths().min().unwrap() <= 1);
        prop_assert!(piece_range(total, pieces, pieces).is_empty());
    }

    #[test]
    fn any_bytes_end_in_a_message_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        crate::wire::any_bytes::store(&bytes);
    }

    #[test]
    fn changed_messages_end_in_a_message_or_an_error(at in 0usize..400, to in any::<u8>()) {
        for mut bytes in [
            StoreRequest::Put(meta()).encode(),
            StoreRequest::Commit(manifest()).encode(),
            StoreResponse::Piece(meta()).encode(),
        ] {
            let length = bytes.len();
            bytes[at % length] = to;
            crate::wire::any_bytes::store(&bytes);
        }
    }
}
