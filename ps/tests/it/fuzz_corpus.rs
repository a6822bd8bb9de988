//! Runs the fuzz seeds, and some thousands of deterministic mutations of each, through the fuzz target's function on
//! the stable toolchain. `ARC_WRITE_SEEDS=1` writes the seeds anew after a change of what the bytes stand for.

#[path = "../../../common/tests/corpus/mod.rs"]
mod corpus;

use arc_topk_ps::shard::any_bytes;

#[test]
fn operations() {
    corpus::run("operations", |_| seeds(), any_bytes::operations);
}

// What the first bytes choose, and each operation reads, is in `any_bytes`. An operation is (session, which, …).

/// Compressor, feedback, shards - 1, world - 1, minimum - 1, more than the world, quorum, resync.
const FIRST_OF_ONE: [u8; 8] = [0, 0, 0, 1, 0, 1, 0, 0];
const SECOND_OF_TWO: [u8; 8] = [3, 0, 1, 1, 0, 1, 0, 0];

fn join(session: u8) -> Vec<u8> {
    vec![session, 0, 255, 0, 1]
}

/// A member of the run that session 0 began, two workers strong, at the step of the shard plus `ahead`.
fn member(session: u8, rank: u8, ahead: u8) -> Vec<u8> {
    vec![session, 1, rank, 3, 0, 0, 0, ahead, 1, rank]
}

/// A frame in the shard's step plus `ahead`.
fn frame(session: u8, ahead: u8) -> Vec<u8> {
    vec![session, 3, ahead, session, 0]
}

/// One that asks for an answer of the shard's step minus `behind`.
fn ask(session: u8, behind: u8) -> Vec<u8> {
    vec![session, 3, 128 + behind, 0, 3]
}

/// Both phases of a step of two workers.
fn step(first: u8, second: u8) -> Vec<u8> {
    let phase = [frame(first, 0), frame(second, 0)].concat();
    phase.repeat(2)
}

fn retelling(session: u8, frames: u8) -> Vec<u8> {
    let held = (0..frames).flat_map(|at| [session, 9, at, 0]);
    [session, 11, frames].into_iter().chain(held).collect()
}

const DEADLINE: [u8; 2] = [0, 19];

fn started() -> Vec<u8> {
    [FIRST_OF_ONE.to_vec(), join(0), join(1)].concat()
}

fn seeds() -> Vec<Vec<u8>> {
    let cut = |session| vec![session, 16, 4];
    let deadlines = DEADLINE.repeat(6);
    let steps = step(0, 1).repeat(3);
    vec![
        [started(), steps.clone(), deadlines.clone()].concat(),
        // One is away, replays, and is counted again.
        [
            started(),
            cut(1),
            DEADLINE.to_vec(),
            frame(0, 0).repeat(4),
            member(2, 1, 128),
            ask(2, 2),
            ask(2, 1),
            step(0, 2),
        ]
        .concat(),
        // A third one joins, and is ready.
        [
            started(),
            steps.clone(),
            join(3),
            vec![0, 14, 0],
            ask(3, 0),
            vec![3, 12, 1],
            step(0, 1),
            frame(3, 0),
        ]
        .concat(),
        // The shard is started anew and told.
        [
            started(),
            steps.clone(),
            frame(0, 0),
            frame(1, 0),
            vec![0, 16, 2],
            member(0, 0, 3),
            retelling(0, 6),
            frame(0, 0),
            member(1, 1, 3),
            retelling(1, 6),
            step(0, 1),
            deadlines.clone(),
        ]
        .concat(),
        // Another shard, of which one member is slow to come.
        [
            SECOND_OF_TWO.to_vec(),
            member(0, 0, 0),
            retelling(0, 0),
            frame(0, 0),
            deadlines.clone(),
            member(1, 1, 0),
            retelling(1, 0),
            frame(1, 0),
            step(0, 1),
        ]
        .concat(),
        // A quorum; digests that differ, with resync; a pin; those that wait start anew.
        [
            vec![3, 0, 0, 1, 0, 1, 1, 1],
            join(0),
            join(1),
            frame(0, 0),
            deadlines.clone(),
            frame(1, 1),
            vec![0, 13, 0, 1, 1, 13, 0, 0],
            vec![0, 17, 0, 0],
            join(4),
            join(5),
            cut(0),
            deadlines,
        ]
        .concat(),
        // ef21: H is made anew without the one that is lost.
        [
            vec![0, 1, 0, 2, 0, 0, 0, 0],
            join(0),
            join(1),
            join(2),
            [frame(0, 0), frame(1, 0), frame(2, 0)].concat(),
            vec![2, 16, 3],
            step(0, 1),
            step(0, 1),
        ]
        .concat(),
    ]
}
