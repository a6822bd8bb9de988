//! Runs the fuzz seeds, and some thousands of deterministic mutations of each, through the fuzz target's function on
//! the stable toolchain. `ARC_WRITE_SEEDS=1` writes the seeds anew after a change of what the bytes stand for.

#[path = "../../../common/tests/corpus/mod.rs"]
mod corpus;

use arc_topk_worker::member::any_bytes;

#[test]
fn member_operations() {
    corpus::run(
        "member_operations",
        |_| seeds(),
        |bytes| {
            any_bytes::operations(bytes);
        },
    );
}

/// Seeds that end early lead nowhere.
#[test]
fn seeds_go_far() {
    let committed: Vec<u32> = seeds().iter().map(|s| any_bytes::operations(s)).collect();
    assert_eq!(committed, [3, 3, 3, 3, 3, 3, 5, 5, 7, 3, 3, 0]);
}

// What the first bytes choose, and each operation reads, is in `any_bytes`. An operation is (shard, which, …).

/// Compressor, feedback, wires and schedule, shards - 1, first step, replays first.
fn start(compressor: u8, feedback: u8, choice: u8, shards: u8) -> Vec<u8> {
    vec![compressor, feedback, choice, shards - 1, 0, 0]
}

/// A Welcome; `choice` 1 wants to be told, 2 is another incarnation.
fn up(shard: u8, choice: u8) -> Vec<u8> {
    vec![shard, 0, choice, 0]
}

fn down(shard: u8) -> Vec<u8> {
    vec![shard, 2]
}

const GRADIENT: [u8; 2] = [0, 12];
const COMMIT: [u8; 2] = [0, 16];
const DEADLINE: [u8; 2] = [0, 19];
/// Everybody is counted.
const ALL: u8 = 7;
const OTHERS: u8 = 5;

/// Answers to the frames that wait, first ones first: each of them leaves when it is answered, unless the round goes on.
fn answers(shard: u8, counted: u8) -> Vec<u8> {
    (0..6).flat_map(|at| [shard, 5, at, at, counted]).collect()
}

fn step(shards: u8, counted: u8) -> Vec<u8> {
    let answers = (0..shards).flat_map(|shard| answers(shard, counted));
    GRADIENT.into_iter().chain(answers).chain(COMMIT).collect()
}

fn control(shard: u8, message: &[u8]) -> Vec<u8> {
    [&[shard, 3, 0], message].concat()
}

fn trainer(choice: u8) -> Vec<u8> {
    vec![0, 15, choice]
}

fn seeds() -> Vec<Vec<u8>> {
    let steps = |shards| [step(shards, ALL), step(shards, OTHERS), step(shards, ALL)].concat();
    let both = |choice| [start(0, 0, choice, 2), up(1, 0)].concat();
    vec![
        // Every compressor, on all wires; a warm-up.
        [both(0), steps(2)].concat(),
        [both(1), steps(2)].concat(),
        [both(6), steps(2)].concat(),
        [start(1, 0, 0, 1), steps(1)].concat(),
        [start(2, 0, 0, 1), steps(1)].concat(),
        [start(3, 0, 0, 1), steps(1)].concat(),
        // ef21: H is made anew.
        [
            start(0, 1, 0, 1),
            step(1, ALL),
            step(1, 0xc0 | ALL),
            steps(1),
        ]
        .concat(),
        [
            start(2, 2, 0, 1),
            step(1, ALL),
            step(1, 0xc0 | OTHERS),
            steps(1),
        ]
        .concat(),
        // A shard is lost for long, and comes back as another one that has forgotten all.
        [
            both(0),
            steps(2),
            GRADIENT.to_vec(),
            answers(0, ALL),
            down(1),
            DEADLINE.to_vec(),
            up(1, 3),
            answers(1, ALL),
            COMMIT.to_vec(),
            steps(2),
        ]
        .concat(),
        // One that replays; the job is ahead, then it is there.
        [
            vec![0, 0, 0, 0, 1, 1],
            vec![0, 2, 0, 0, 0, 2],
            step(1, OTHERS),
            step(1, OTHERS),
            step(1, ALL),
        ]
        .concat(),
        // Members come and go, a donation is asked for, a gradient is not finite, and it leaves.
        [
            both(0),
            control(0, &[16, 7, 0, 2, 0]),
            control(0, &[11]),
            step(2, ALL),
            trainer(0),
            trainer(2),
            trainer(4),
            vec![0, 14, 1, 100, 200],
            step(2, 0xf0),
            trainer(6),
            control(1, &[3]),
            up(1, 1),
            step(2, ALL),
            trainer(7),
            vec![255],
            down(0),
        ]
        .concat(),
        // An answer comes twice, and then spoiled.
        [
            both(0),
            GRADIENT.to_vec(),
            answers(0, ALL),
            vec![0, 10, 0, 0],
            vec![0, 10, 0, 255, 3],
        ]
        .concat(),
    ]
}
