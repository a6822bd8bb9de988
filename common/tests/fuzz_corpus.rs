//! Runs the fuzz seeds, and some thousands of deterministic mutations of each, through the fuzz targets' functions on
//! the stable toolchain. `ARC_WRITE_SEEDS=1` writes the seeds anew after a change of the format.
#![allow(clippy::unwrap_used, reason = "tests")]

use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::ids::{BucketId, Epoch, Rank, RunId, Step};
use arc_topk_common::plan::{DType, PlanSpec, TensorSpec};
use arc_topk_common::wire::{
    Control, FrameFlags, FrameHeader, FrameKind, HeldPiece, HeldSnapshot, Hello, Intent, JoinWhen,
    Manifest, Owner, PartInfo, PieceMeta, Place, RefusalCode, SnapshotId, StoreRequest,
    StoreResponse, Welcome, any_bytes, append_selection, encode_roster, encode_selection,
};

mod corpus;

fn seeds(target: &str) -> Vec<Vec<u8>> {
    corpus::seeds(target, make_seeds)
}

fn run(target: &str, entry: fn(&[u8])) {
    corpus::run(target, make_seeds, entry);
}

#[test]
fn control_messages() {
    for seed in seeds("control") {
        Control::decode(&seed)
            .expect("seeds are valid: write them anew after a change of the format");
    }
    run("control", any_bytes::control);
}

#[test]
fn hellos_with_schedules_at_the_ends_of_their_type() {
    for seed in seeds("control") {
        let Ok(Control::Hello(hello)) = Control::decode(&seed) else {
            continue;
        };
        for updates in [1 << 40, (1 << 40) + 1, u64::MAX] {
            for (warmup, ramp) in [(updates, 0), (0, updates), (updates, updates)] {
                let mut hello = hello.clone();
                hello.plan.algorithm.warmup_updates = warmup;
                hello.plan.algorithm.ramp_updates = ramp;
                any_bytes::control(&Control::Hello(hello).encode());
            }
        }
    }
}

#[test]
fn headers() {
    run("header", any_bytes::header);
}

#[test]
fn selections() {
    run("selection", any_bytes::selection);
}

#[test]
fn rosters() {
    run("roster", any_bytes::roster);
}

#[test]
fn bodies() {
    run("body", any_bytes::body);
}

#[test]
fn store_messages() {
    run("store", any_bytes::store);
}

fn make_seeds(target: &str) -> Vec<Vec<u8>> {
    match target {
        "control" => control_seeds(),
        "header" => vec![
            header_seed(FrameKind::Sketch, 100),
            header_seed(FrameKind::SparseMean, 0),
        ],
        "selection" => vec![
            (20, vec![3, 4, 19]),
            (1000, vec![5, 6, 300]),
            (1, vec![0]),
            (999, vec![]),
        ]
        .into_iter()
        .map(|(rows, selected): (u16, Vec<u32>)| {
            [
                (rows - 1).to_le_bytes().to_vec(),
                encode_selection(usize::from(rows), &selected),
            ]
            .concat()
        })
        .collect(),
        "body" => body_seeds(),
        "roster" => [&[0u16, 1, 2, 3][..], &[], &[7, 4000, 65535]]
            .into_iter()
            .map(|ranks| encode_roster(&ranks.iter().copied().map(Rank).collect()))
            .collect(),
        "store" => store_seeds(),
        other => panic!("no target {other}"),
    }
}

fn header_seed(kind: FrameKind, body_bytes: u32) -> Vec<u8> {
    let flags = FrameFlags {
        non_finite: body_bytes == 0,
        counted: true,
        ..FrameFlags::default()
    };
    let header = FrameHeader {
        kind,
        flags,
        bucket: BucketId(1),
        epoch: Epoch(2),
        step: Step(3),
        update: 4,
        body_bytes,
        roster_bytes: body_bytes.min(6) as u16,
        lead: 1,
    };
    header.encode().to_vec()
}

fn control_seeds() -> Vec<Vec<u8>> {
    let tensor = |name: &str, shape: &[u64]| TensorSpec {
        name: name.into(),
        shape: shape.into(),
        dtype: DType::F32,
        density: Some(0.5),
    };
    let hello = Hello {
        protocol: 2,
        job: "demo".into(),
        incarnation: [7; 16],
        shard: 0,
        host: "host 1".into(),
        intent: Intent::Join {
            rank: Some(Rank(1)),
            world: Some(4),
            start_step: Step(0),
            when: JoinWhen::Any,
        },
        plan: PlanSpec {
            trainer: String::new(),
            algorithm: AlgorithmConfig::default(),
            shards: 2,
            tensors: vec![tensor("embed", &[256, 64]), tensor("norm", &[64])],
        },
    };
    let report = Control::Report {
        step: Step(9),
        loss: 2.5,
        step_seconds: 0.5,
        wait_seconds: 0.1,
        bytes_sent: 1,
        bytes_received: 2,
        bytes_dense_equivalent: 3,
        captured_energy: f32::NAN,
        residual_ratio: 1.0,
    };
    let place = Place {
        run: RunId([9; 16]),
        rank: Rank(0),
        epoch: Epoch(1),
        next_rank: 4,
        members: (0..4).map(Rank).collect(),
    };
    let member = Hello {
        intent: Intent::Member {
            place: place.clone(),
            step: Step(3),
            waited: true,
        },
        ..hello.clone()
    };
    let welcome = Welcome {
        shard_incarnation: 5,
        retell: false,
        place,
        step: Step(0),
        snapshot: false,
    };
    [
        Control::Hello(Box::new(hello)),
        Control::Hello(Box::new(member)),
        Control::Welcome(welcome),
        Control::Waiting {
            joined: 1,
            world: 4,
        },
        Control::Refused {
            code: RefusalCode::Plan,
            detail: "density: 0.2 here, 0.4 there".into(),
        },
        Control::Membership {
            epoch: Epoch(2),
            next_rank: 4,
            members: vec![Rank(0), Rank(2)],
            away: vec![Rank(2)],
            reason: "rank 1 is gone".into(),
        },
        Control::Leave,
        Control::Retelling { frames: 2 },
        Control::Ready { step: Step(4) },
        Control::Digest {
            step: Step(5),
            digest: [1; 32],
        },
        Control::DigestsDiffer {
            step: Step(5),
            ranks: vec![Rank(2)],
        },
        report,
    ]
    .iter()
    .map(Control::encode)
    .collect()
}

fn store_seeds() -> Vec<Vec<u8>> {
    let snapshot = SnapshotId {
        step: Step(100),
        run: RunId([9; 16]),
    };
    let meta = PieceMeta {
        snapshot,
        owner: Owner::Replica,
        piece: 1,
        pieces: 2,
        piece_bytes: 50,
        total_bytes: 100,
        total_sha256: [1; 32],
        piece_sha256: [2; 32],
    };
    let part = |owner| PartInfo {
        owner,
        pieces: 2,
        total_bytes: 100,
        total_sha256: [1; 32],
    };
    let manifest = Manifest {
        snapshot,
        update: 99,
        members: 2,
        parts: vec![part(Owner::Replica), part(Owner::Rank(Rank(0)))],
    };
    let held = HeldSnapshot {
        snapshot,
        manifest: Some(manifest.clone()),
        pieces: vec![HeldPiece {
            part: part(Owner::Replica),
            piece: 1,
        }],
    };
    vec![
        StoreRequest::Put(meta.clone()).encode(),
        StoreRequest::Commit(manifest.clone()).encode(),
        StoreResponse::Piece(meta.clone()).encode(),
        StoreResponse::Listing(vec![held]).encode(),
        meta.file_header().to_vec(),
        manifest.file_bytes(),
    ]
}

/// The first byte chooses the round, see `any_bytes::shape`.
fn body_seeds() -> Vec<Vec<u8>> {
    let dense = [0; 20];
    let rows: [(usize, &[u32], usize); 2] = [(10, &[1, 2, 9], 8), (20, &[0, 1, 2, 3, 19], 4)];
    [0u8, 4, 1, 17, 5, 2, 3, 8]
        .into_iter()
        .map(|choice| {
            let shape = any_bytes::shape(choice);
            let mut body = vec![choice];
            match choice & 3 {
                0 if choice & 8 == 0 => {
                    rows.iter()
                        .for_each(|(m, selected, _)| append_selection(*m, selected, &mut body));
                    body.extend(dense);
                }
                1 => {
                    for (m, selected, width) in rows {
                        append_selection(m, selected, &mut body);
                        body.resize(
                            body.len() + shape.codec_up.encoded_bytes(selected.len() * width),
                            0,
                        );
                    }
                    body.extend(dense);
                }
                2 => body.resize(1 + shape.sketch_layout().bytes, 0),
                _ => body.resize(1 + shape.dense_layout().bytes, 0),
            }
            body
        })
        .collect()
}
