//! What is computed, against a naive model in f64.

use super::*;
use arc_topk_common::config::algorithm::SelectionPolicy;
use arc_topk_common::wire::Direction;
use proptest::prelude::*;

/// Small numbers that differ by worker and place.
pub(super) fn numbers(count: usize, salt: u64) -> Vec<f32> {
    let mut state = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % 2001) as f32 / 1000.0 - 1.0
        })
        .collect()
}

pub(super) fn mean(all: &[Vec<f32>]) -> Vec<f64> {
    let n = all.len() as f64;
    (0..all[0].len())
        .map(|i| all.iter().map(|v| f64::from(v[i])).sum::<f64>() / n)
        .collect()
}

pub(super) fn close(got: &[f32], expected: &[f64]) {
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        assert!(
            (f64::from(*got) - expected).abs() <= 1e-6,
            "{got} {expected}"
        );
    }
}

/// Sends one body per session in this order; the answers after the last.
fn phase(
    bench: &mut Bench,
    step: u64,
    kind: FrameKind,
    bodies: &[Vec<u8>],
    order: &[usize],
) -> Vec<Action> {
    let mut last = Vec::new();
    for (at, worker) in order.iter().enumerate() {
        last = bench.send(*worker as u64, step, kind, bodies[*worker].clone());
        assert_eq!(
            answers(&last).is_empty(),
            at + 1 < order.len(),
            "answers come when all are in"
        );
    }
    last
}

/// One arc round; bytes of both answers.
fn arc_round(
    bench: &mut Bench,
    world: usize,
    step: u64,
    order: &[usize],
) -> (Bytes, Bytes, RoundClosed) {
    let shape = bench.shape(step);
    let sketches: Vec<_> = (0..world)
        .map(|w| encode(&numbers(shape.sketch_layout().bytes / 4, w as u64 + 1)))
        .collect();
    let selection = answers(&phase(bench, step, FrameKind::Sketch, &sketches, order))
        .remove(0)
        .2;
    let rows = shape.decode_selection_body(&selection).unwrap();
    let count = shape.values_layout(&rows.kept(), Direction::Up).bytes / 4;
    let values: Vec<_> = (0..world)
        .map(|w| encode(&numbers(count, w as u64 + 100)))
        .collect();
    let actions = phase(bench, step, FrameKind::Values, &values, order);
    (
        selection,
        answers(&actions).remove(0).2,
        closed_round(&actions).unwrap(),
    )
}

#[test]
fn arc_averages_first_and_squares_after() {
    let world = 3;
    let mut bench = Bench::running(world as u16, Compressor::Arc);
    let shape = bench.shape(0);
    let sketches: Vec<_> = (0..world).map(|w| numbers(15, w as u64 + 1)).collect();
    let (selection, result, closed) = arc_round(&mut bench, world, 0, &[0, 1, 2]);

    let sketch = mean(&sketches);
    let picked = shape.decode_selection_body(&selection).unwrap();
    let (mut at, mut total, mut kept) = (0, 0.0, 0.0);
    for (segment, rows) in shape.sparse.iter().zip(&picked.rows) {
        let score = |row: usize| sketch[at + 2 * row].powi(2) + sketch[at + 2 * row + 1].powi(2);
        let mut order: Vec<usize> = (0..segment.rows).collect();
        order.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
        let mut expected: Vec<u32> = order[..segment.keep]
            .iter()
            .map(|row| *row as u32)
            .collect();
        expected.sort_unstable();
        assert_eq!(*rows, expected);
        total += (0..segment.rows).map(score).sum::<f64>();
        kept += expected.iter().map(|row| score(*row as usize)).sum::<f64>();
        at += 2 * segment.rows;
    }
    close(
        &decode(&selection[picked.layout.dense[0].clone()]),
        &sketch[at..],
    );
    let values: Vec<_> = (0..world).map(|w| numbers(7, w as u64 + 100)).collect();
    close(&decode(&result), &mean(&values));

    assert_eq!(closed.outcome, Outcome::Complete);
    assert!((f64::from(closed.captured_energy.unwrap()) - kept / total).abs() < 1e-6);
    assert_eq!(closed.density, Some(0.5));
    assert_eq!(
        closed.received,
        Traffic {
            sketch: 3 * 48,
            selection: 0,
            values: 3 * 28,
            dense: 3 * 12
        }
    );
    assert_eq!(closed.sent.dense, 3 * 12);
    assert_eq!(closed.dense_equivalent_bytes, 3 * 17 * 4);
    assert_eq!(bench.shard.status(bench.now).step, Step(1));
}

#[test]
fn workers_whose_rows_cancel_do_not_look_important() {
    let mut bench = Bench::running(2, Compressor::Arc);
    let mut sketch = vec![0.0; 15];
    let shape = bench.shape(0);
    // Row 0 of the first segment is huge and cancels, row 1 is small and does not.
    assert_eq!(shape.sparse[0].keep * 2, shape.sparse[0].rows);
    sketch[0] = 100.0;
    for row in 1..=shape.sparse[0].keep {
        sketch[2 * row] = 0.1;
    }
    let mut other = sketch.clone();
    other[0] = -100.0;
    bench.send(0, 0, FrameKind::Sketch, encode(&sketch));
    let selection = answers(&bench.send(1, 0, FrameKind::Sketch, encode(&other)))
        .remove(0)
        .2;
    let rows = shape.decode_selection_body(&selection).unwrap().rows;
    assert!(!rows[0].contains(&0), "{rows:?}");
}

#[test]
fn pooled_rows_compete_across_tensors() {
    let pooled = AlgorithmConfig {
        selection: SelectionPolicy::Pooled,
        ..algorithm(Compressor::Arc)
    };
    let mut bench = Bench::running_with(config(1), pooled);
    let shape = bench.shape(0);
    // All the energy lies in the first sparse segment: it gets all it can of the common budget.
    let mut sketch = vec![0.0; 15];
    sketch[..2 * shape.sparse[0].rows].fill(1.0);
    let selection = answers(&bench.send(0, 0, FrameKind::Sketch, encode(&sketch)))
        .remove(0)
        .2;
    let rows = shape.decode_selection_body(&selection).unwrap();
    let elements: usize = rows
        .kept()
        .iter()
        .zip(&shape.sparse)
        .map(|(kept, s)| kept * s.width)
        .sum();
    assert!(elements <= shape.budget_elements());
    assert!(rows.rows[0].len() > shape.sparse[0].keep, "{:?}", rows.rows);
    let bytes = shape.values_layout(&rows.kept(), Direction::Up).bytes;
    let actions = bench.send(0, 0, FrameKind::Values, vec![0; bytes]);
    assert_eq!(closed_round(&actions).unwrap().outcome, Outcome::Complete);
}

/// A step whose sketch has these scores, of the 4 rows of one tensor and the 2 of another: chosen rows, and what is reported.
fn step_by_energy(algorithm: AlgorithmConfig, scores: [f32; 6]) -> (Vec<Vec<u32>>, RoundClosed) {
    let mut bench = Bench::running_with(config(1), algorithm);
    let shape = bench.shape(0);
    let mut sketch = vec![0.0; 15];
    let entries = sketch.iter_mut().step_by(2);
    entries
        .zip(scores)
        .for_each(|(entry, score)| *entry = score.sqrt());
    let selection = answers(&bench.send(0, 0, FrameKind::Sketch, encode(&sketch)))
        .remove(0)
        .2;
    let rows = shape.decode_selection_body(&selection).unwrap();
    let count = shape.values_layout(&rows.kept(), Direction::Up).bytes / 4;
    let values = numbers(count, 7);
    let actions = bench.send(0, 0, FrameKind::Values, encode(&values));
    close(&decode(&answers(&actions).remove(0).2), &mean(&[values]));
    (rows.rows, closed_round(&actions).unwrap())
}

#[test]
fn fewer_rows_travel_where_fewer_hold_the_energy() {
    let by_energy = |energy, selection| AlgorithmConfig {
        energy,
        density: 1.0,
        selection,
        ..algorithm(Compressor::Arc)
    };
    let of_tensors = |energy| by_energy(energy, SelectionPolicy::PerTensor);
    // Of the matrix with 4 rows of 2, and of that with 2 rows of 3.
    let scores = [1.0, 16.0, 1.0, 2.0, 3.0, 1.0];
    let (rows, closed) = step_by_energy(of_tensors(0.7), scores);
    assert_eq!(rows, [vec![1], vec![0]]);
    assert_eq!(closed.density, Some(5.0 / 14.0));
    assert!((closed.captured_energy.unwrap() - 19.0 / 24.0).abs() < 1e-6);
    let (rows, closed) = step_by_energy(of_tensors(0.9), scores);
    assert_eq!(rows, [vec![1, 3], vec![0, 1]]);
    assert_eq!(closed.received.values, 4 * (2 * 3 + 2 * 2));
    let (rows, _) = step_by_energy(of_tensors(1.0), scores);
    assert_eq!(rows, [vec![0, 1, 2, 3], vec![0, 1]]);
    // The density is the cap, and a tensor without energy sends one row all the same.
    let half = AlgorithmConfig {
        density: 0.5,
        ..of_tensors(0.9)
    };
    let (rows, closed) = step_by_energy(half, [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]);
    assert_eq!(rows, [vec![0, 1], vec![0]]);
    assert_eq!(closed.density, Some(0.5));
    // In a pool the strong tensor's rows may be all that come.
    let pooled = by_energy(0.7, SelectionPolicy::Pooled);
    let (rows, _) = step_by_energy(pooled, [0.0, 16.0, 0.0, 3.0, 0.0, 1.0]);
    assert_eq!(rows, [vec![1], vec![]]);
}

#[test]
fn randk_and_dense_answer_in_one_phase() {
    for compressor in [Compressor::Randk, Compressor::Dense] {
        let mut bench = Bench::running(2, compressor);
        let shape = bench.shape(0);
        let (kind, down, count) = match compressor {
            Compressor::Randk => (
                FrameKind::Values,
                FrameKind::Mean,
                shape.values_layout(&shape.keep(), Direction::Up).bytes / 4,
            ),
            _ => (FrameKind::Dense, FrameKind::DenseMean, 17),
        };
        let values: Vec<_> = (0..2).map(|w| numbers(count, w + 1)).collect();
        bench.send(1, 0, kind, encode(&values[1]));
        let actions = bench.send(0, 0, kind, encode(&values[0]));
        let (_, header, body) = answers(&actions).remove(1);
        assert_eq!((header.kind, header.flags.counted), (down, true));
        close(&decode(&body), &mean(&values));
        assert!(closed_round(&actions).is_some());
    }
}

#[test]
fn topk_averages_the_union_over_all_workers() {
    let mut bench = Bench::running(2, Compressor::Topk);
    let shape = bench.shape(0);
    let body = |row: u32, value: f32| {
        let mut out = Vec::new();
        for segment in &shape.sparse {
            let rows: Vec<u32> = (0..segment.keep as u32)
                .map(|r| (r + row) % segment.rows as u32)
                .collect();
            let mut rows = rows;
            rows.sort_unstable();
            arc_topk_common::wire::append_selection(segment.rows, &rows, &mut out);
            F32.encode(&vec![value; rows.len() * segment.width], &mut out);
        }
        F32.encode(&[value; 3], &mut out);
        out
    };
    bench.send(0, 0, FrameKind::Sparse, body(0, 1.0));
    let actions = bench.send(1, 0, FrameKind::Sparse, body(1, 3.0));
    let answer = answers(&actions).remove(0);
    assert_eq!(answer.1.kind, FrameKind::SparseMean);
    let union = shape
        .decode_sparse_body(&answer.2, Direction::Down)
        .unwrap();
    for (at, segment) in shape.sparse.iter().enumerate() {
        let values = decode(&answer.2[union.layout.sparse[at].clone()]);
        for (row, values) in union.rows[at].iter().zip(values.chunks(segment.width)) {
            let (first, second) = ((*row as usize) < segment.keep, {
                (0..segment.keep as u32).any(|r| (r + 1) % segment.rows as u32 == *row)
            });
            let expected = (f32::from(u8::from(first)) + 3.0 * f32::from(u8::from(second))) / 2.0;
            assert_eq!(values, vec![expected; segment.width]);
        }
    }
    assert_eq!(decode(&answer.2[union.layout.dense[0].clone()]), [2.0; 3]);
    let mut cut = body(0, 1.0);
    cut.pop();
    let refused = bench.send(0, 1, FrameKind::Sparse, cut);
    assert_eq!(refusals(&refused)[0].1, RefusalCode::Protocol);
}

#[test]
fn a_gradient_that_is_not_finite_makes_all_skip() {
    let mut bench = Bench::running(3, Compressor::Arc);
    let body = encode(&numbers(15, 1));
    bench.send(2, 0, FrameKind::Sketch, body.clone());
    let mut flagged = header(FrameKind::Sketch, 0, 0);
    flagged.flags.non_finite = true;
    bench.frame(0, flagged, Vec::new());
    let actions = bench.send(1, 0, FrameKind::Sketch, body.clone());
    let answers = answers(&actions);
    assert_eq!(answers.len(), 3);
    for (_, header, body) in &answers {
        assert!(header.flags.non_finite && !header.flags.counted && body.is_empty());
        assert_eq!(header.kind, FrameKind::Selection);
    }
    assert_eq!(closed_round(&actions).unwrap().outcome, Outcome::NonFinite);
    // The update number stays, the step goes on.
    let mut next = header(FrameKind::Sketch, 1, body.len());
    next.update = 0;
    for session in 0..3 {
        assert_eq!(refusals(&bench.frame(session, next, body.clone())), []);
    }
}

#[test]
fn a_sum_that_overflows_makes_all_skip() {
    let mut bench = Bench::running(2, Compressor::Dense);
    bench.send(0, 0, FrameKind::Dense, encode(&[f32::MAX; 17]));
    let actions = bench.send(1, 0, FrameKind::Dense, encode(&[f32::MAX; 17]));
    assert!(
        answers(&actions)
            .iter()
            .all(|(_, header, body)| header.flags.non_finite && body.is_empty())
    );
}

#[test]
fn a_loss_in_the_first_phase_closes_it_with_those_present() {
    let mut bench = Bench::running(3, Compressor::Arc);
    let sketches: Vec<_> = (0..3).map(|w| numbers(15, w + 1)).collect();
    bench.send(0, 0, FrameKind::Sketch, encode(&sketches[0]));
    bench.send(2, 0, FrameKind::Sketch, encode(&sketches[2]));
    let actions = bench.lose(1);
    let answers = answers(&actions);
    assert_eq!(answers.iter().map(|a| a.0).collect::<Vec<_>>(), [0, 2]);
    let shape = bench.shape(0);
    let picked = shape.decode_selection_body(&answers[0].2).unwrap();
    let expected = mean(&[sketches[0].clone(), sketches[2].clone()]);
    close(
        &decode(&answers[0].2[picked.layout.dense[0].clone()]),
        &expected[12..],
    );
    assert_eq!(answers[0].1.epoch, Epoch(2));
}

#[test]
fn a_contribution_that_came_counts_even_if_its_worker_is_lost() {
    let mut bench = Bench::running(3, Compressor::Dense);
    let all: Vec<_> = (0..3).map(|w| numbers(17, w + 1)).collect();
    bench.send(2, 0, FrameKind::Dense, encode(&all[2]));
    bench.lose(2);
    bench.send(1, 0, FrameKind::Dense, encode(&all[1]));
    let actions = bench.send(0, 0, FrameKind::Dense, encode(&all[0]));
    let answers = answers(&actions);
    assert_eq!(answers.len(), 2);
    close(&decode(&answers[0].2), &mean(&all));
    assert_eq!(closed_round(&actions).unwrap().contributors, 3);
}

#[test]
fn a_loss_in_the_second_phase_leaves_the_selection_standing() {
    let mut bench = Bench::running(3, Compressor::Arc);
    let sketch = encode(&numbers(15, 1));
    for session in 0..3 {
        bench.send(session, 0, FrameKind::Sketch, sketch.clone());
    }
    let values: Vec<_> = (0..3).map(|w| numbers(7, w + 1)).collect();
    bench.send(0, 0, FrameKind::Values, encode(&values[0]));
    bench.send(1, 0, FrameKind::Values, encode(&values[1]));
    let actions = bench.lose(2);
    close(&decode(&answers(&actions)[0].2), &mean(&values[..2]));
    let closed = closed_round(&actions).unwrap();
    assert_eq!((closed.outcome, closed.contributors), (Outcome::Partial, 2));
}

#[test]
fn the_last_one_is_the_straggler() {
    let mut bench = Bench::running(2, Compressor::Dense);
    bench.send(1, 0, FrameKind::Dense, vec![0; 68]);
    bench.now += Duration::from_secs(2);
    let actions = bench.send(0, 0, FrameKind::Dense, vec![0; 68]);
    let waited = actions.iter().find_map(|action| match action {
        Action::Observe(Observation::Waited { rank, seconds }) => Some((*rank, *seconds)),
        _ => None,
    });
    assert_eq!(waited, Some((Rank(0), 2.01)));
    assert_eq!(
        bench.shard.status(bench.now).members[0].waited_for_seconds,
        2.01
    );
}

#[test]
fn the_status_is_json_with_reports_and_losses() {
    let mut bench = Bench::running(2, Compressor::Dense);
    for step in 0..2000 {
        super::reports::step(&mut bench, 2, step);
        let report = Report {
            step: Step(step),
            loss: 2.0,
            step_seconds: 0.1,
            wait_seconds: 0.01,
            bytes_sent: 10,
            bytes_received: 10,
            bytes_dense_equivalent: 100,
            captured_energy: f32::NAN,
            residual_ratio: 0.5,
        };
        for session in 0..2 {
            bench.handle(Event::Report {
                session: SessionId(session),
                report,
            });
        }
    }
    let status = bench.shard.status(bench.now);
    assert!(
        (256..=513).contains(&status.loss.len()),
        "{}",
        status.loss.len()
    );
    assert_eq!(status.loss.last().unwrap().step, Step(1999));
    let json = serde_json::to_string(&status).unwrap();
    assert!(
        json.contains("\"stage\":\"running\"") && json.contains("\"captured_energy\":null"),
        "{json}"
    );
}

fn permutation(world: usize) -> impl Strategy<Value = Vec<usize>> {
    Just((0..world).collect::<Vec<_>>()).prop_shuffle()
}

proptest! {
    /// I3: arrival order changes no byte.
    #[test]
    fn arrival_order_changes_no_byte(order in permutation(5), energy in prop_oneof![Just(1.0f32), 0.1f32..1.0]) {
        let algorithm = AlgorithmConfig { energy, ..algorithm(Compressor::Arc) };
        let bench = || Bench::running_with(config(5), algorithm.clone());
        let in_order = arc_round(&mut bench(), 5, 0, &[0, 1, 2, 3, 4]);
        let mixed = arc_round(&mut bench(), 5, 0, &order);
        prop_assert_eq!(in_order.0, mixed.0);
        prop_assert_eq!(in_order.1, mixed.1);
    }

    /// Dense rounds agree with the naive mean for any finite numbers.
    #[test]
    fn dense_is_the_mean(all in prop::collection::vec(prop::collection::vec(-1e3f32..1e3, 17), 1..6), seed in any::<u64>()) {
        let world = all.len();
        let mut bench = Bench::running(world as u16, Compressor::Dense);
        let mut order: Vec<u64> = (0..world as u64).collect();
        order.sort_by_key(|w| w.wrapping_mul(seed | 1).rotate_left(17));
        let mut last = Vec::new();
        for worker in order {
            last = bench.send(worker, 0, FrameKind::Dense, encode(&all[worker as usize]));
        }
        let got = decode(&answers(&last).remove(0).2);
        for (got, expected) in got.iter().zip(mean(&all)) {
            prop_assert!((f64::from(*got) - expected).abs() <= 1e-3, "{} {}", got, expected);
        }
    }
}
