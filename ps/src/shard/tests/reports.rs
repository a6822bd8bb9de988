//! What workers report, and what is made of it.

use super::*;

pub(super) fn report(bench: &mut Bench, session: u64, step: u64, loss: f32) -> Vec<Action> {
    let report = Report {
        step: Step(step),
        loss,
        step_seconds: 0.1,
        wait_seconds: 0.0,
        bytes_sent: 0,
        bytes_received: 0,
        bytes_dense_equivalent: 0,
        captured_energy: f32::NAN,
        residual_ratio: f32::NAN,
    };
    bench.handle(Event::Report {
        session: SessionId(session),
        report,
    })
}

pub(super) fn step(bench: &mut Bench, workers: u64, step: u64) {
    let bytes = bench.shape(0).dense_layout().bytes;
    for session in 0..workers {
        bench.send(session, step, FrameKind::Dense, vec![0; bytes]);
    }
}

fn curve(bench: &Bench) -> Vec<(u64, f32)> {
    let points = bench.shard.status(bench.now).loss;
    points.iter().map(|p| (p.step.0, p.loss)).collect()
}

#[test]
fn late_and_false_reports_leave_the_curve_alone() {
    let mut bench = Bench::running(2, Compressor::Dense);
    for number in 0..4 {
        step(&mut bench, 2, number);
        report(&mut bench, 0, number, 8.0 - number as f32);
        report(&mut bench, 1, number, 6.0 - number as f32);
    }
    let drawn = [(0, 7.0), (1, 6.0), (2, 5.0), (3, 4.0)];
    assert_eq!(curve(&bench), drawn);
    report(&mut bench, 1, 1, 100.0);
    // A step that has not been: were it believed, no true one could follow it.
    assert_eq!(report(&mut bench, 1, u64::MAX, 100.0), []);
    assert_eq!(curve(&bench), drawn);
    assert_eq!(
        bench.shard.load().training,
        Some((Step(3), (5.0 + 100.0) / 2.0))
    );
    step(&mut bench, 2, 4);
    report(&mut bench, 0, 4, 3.0);
    assert_eq!(curve(&bench).last(), Some(&(4, 3.0)));
}

#[test]
fn another_start_draws_another_curve() {
    let mut bench = Bench::running(1, Compressor::Dense);
    for number in 0..3 {
        step(&mut bench, 1, number);
        report(&mut bench, 0, number, 1.0);
    }
    bench.lose(0);
    assert_eq!(curve(&bench).len(), 3, "the last job's stays to be seen");
    let spec = bench.plan.spec.clone();
    bench.hello(0, hello(&spec));
    assert_eq!(curve(&bench), []);
    step(&mut bench, 1, 0);
    report(&mut bench, 0, 0, 2.0);
    assert_eq!(curve(&bench), [(0, 2.0)]);
}

#[test]
fn losses_that_are_not_finite_do_not_hide_the_others() {
    let mut bench = Bench::running(3, Compressor::Dense);
    step(&mut bench, 3, 0);
    report(&mut bench, 0, 0, f32::NAN);
    let (_, loss) = bench.shard.load().training.unwrap();
    assert!(loss.is_nan());
    report(&mut bench, 1, 0, 2.0);
    report(&mut bench, 2, 0, 4.0);
    assert_eq!(bench.shard.load().training, Some((Step(0), 3.0)));
    assert_eq!(curve(&bench), [(0, 3.0)]);
}
