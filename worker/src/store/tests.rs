#![allow(clippy::unwrap_used, reason = "tests")]

use super::search::survey;
use arc_topk_common::ids::RunId;
use arc_topk_common::ids::{Rank, Step};
use arc_topk_common::wire::{HeldPiece, HeldSnapshot, Manifest, Owner, PartInfo, SnapshotId};

fn id(step: u64) -> SnapshotId {
    SnapshotId {
        step: Step(step),
        run: RunId([1; 16]),
    }
}

fn part(owner: Owner, pieces: u16) -> PartInfo {
    PartInfo {
        owner,
        pieces,
        total_bytes: 100,
        total_sha256: [3; 32],
    }
}

fn manifest(step: u64, pieces: u16) -> Manifest {
    Manifest {
        snapshot: id(step),
        update: step,
        members: 1,
        parts: vec![
            part(Owner::Replica, pieces),
            part(Owner::Rank(Rank(0)), pieces),
        ],
    }
}

/// A shard that has the positions `has` of both parts.
fn held(step: u64, pieces: u16, committed: bool, has: &[u16]) -> HeldSnapshot {
    let manifest = manifest(step, pieces);
    let pieces = manifest.parts.iter().flat_map(|part| {
        has.iter().map(|piece| HeldPiece {
            part: part.clone(),
            piece: *piece,
        })
    });
    HeldSnapshot {
        snapshot: id(step),
        pieces: pieces.collect(),
        manifest: committed.then_some(manifest),
    }
}

#[test]
fn the_newest_of_which_everything_is_somewhere_is_chosen() {
    let listings = [
        (
            0,
            vec![
                held(10, 2, true, &[0]),
                held(20, 2, true, &[0]),
                held(30, 2, false, &[0]),
            ],
        ),
        (
            1,
            vec![
                held(10, 2, true, &[1]),
                held(20, 2, true, &[]),
                held(30, 2, false, &[1]),
            ],
        ),
    ];
    let survey = survey(&listings);
    let newest = survey.newest().unwrap();
    assert_eq!(newest.id(), id(10));
    assert_eq!(newest.holders[&Owner::Replica], [vec![0], vec![1]]);
    let reasons: Vec<_> = survey
        .passed_over
        .iter()
        .map(|passed| (passed.snapshot, passed.reason.as_str()))
        .collect();
    assert!(reasons[0].0 == id(30) && reasons[0].1.contains("not committed"));
    assert!(reasons[1].0 == id(20) && reasons[1].1.contains("piece 1 of 2 of its replica part"));
    // A joiner may have the replica of what is not committed.
    assert_eq!(survey.parts_of(id(30)).count(), 2);
    assert_eq!(survey.parts_of(id(20)).count(), 0);
}

#[test]
fn any_shard_may_hold_any_piece_and_one_that_knows_the_manifest_is_enough() {
    let listings = [
        (0, vec![held(10, 3, false, &[2])]),
        (
            4,
            vec![held(10, 3, true, &[0, 2]), held(20, 1, false, &[0])],
        ),
        (7, vec![held(10, 3, false, &[1])]),
    ];
    let survey = survey(&listings);
    let newest = survey.newest().unwrap();
    let places = &newest.holders[&Owner::Rank(Rank(0))];
    assert_eq!(*places, [vec![4], vec![7], vec![0, 4]]);
    assert_eq!(survey.find(id(20)), None);
}

#[test]
fn pieces_of_another_version_do_not_count() {
    let mut other = held(10, 2, true, &[1]);
    for piece in &mut other.pieces {
        piece.part.total_sha256 = [4; 32];
    }
    let survey = survey(&[(0, vec![held(10, 2, true, &[0])]), (1, vec![other])]);
    assert_eq!(survey.newest(), None);
    assert_eq!(survey.passed_over.len(), 1);
}

#[test]
fn nothing_is_no_error() {
    assert_eq!(survey(&[]).newest(), None);
    assert_eq!(survey(&[(0, vec![])]).newest(), None);
}
