//! What becomes of a gradient that is late, not counted or not there.

use super::*;

#[test]
fn one_that_is_behind_takes_the_results_and_keeps_its_state_to_the_bit() {
    for feedback in [Feedback::Ef14, Feedback::Ef21m] {
        for compressor in [Compressor::Arc, Compressor::Randk, Compressor::Topk] {
            let algorithm = AlgorithmConfig {
                compressor,
                feedback_decay: 0.5,
                ..algorithm(feedback, 0.3)
            };
            let mut bench = Bench::new(&spec(algorithm, 2, model()));
            bench.whole_step(&[0, ME], 0.5);
            bench.begin();
            bench.fill();
            // Both shards are two steps ahead: this gradient is late, the next step is closed already.
            loop {
                let frames = bench.frames();
                if frames.is_empty() {
                    break;
                }
                for frame in &frames {
                    bench.answer_ahead(frame, &[0, 2], 0.25, 2);
                }
            }
            assert_eq!(bench.member.commit().stats.rounds_counted, 0);
            let name = if feedback == Feedback::Ef14 {
                "residual/embed"
            } else {
                "momentum/embed"
            };
            let before = bits(&bench.array(name));
            assert!(bench.begin());
            let behind = Notice::Behind {
                step: Step(2),
                job: Step(3),
            };
            assert_eq!(bench.out[0], Output::Notice(behind));
            assert!(bench.member.is_abstaining());
            let absent = |output: &Output| match output {
                Output::Frame(frame) => frame.header.flags.absent && frame.body.is_empty(),
                _ => true,
            };
            assert!(bench.out.iter().all(absent));
            let rounds = bench.out.len() - 1;
            // A gradient that comes all the same is ignored.
            bench.fill();
            assert_eq!(bench.out.len(), rounds + 1);
            let outcome = bench.finish(&[0, 2], 0.75);
            assert!(!outcome.skipped && outcome.stats.rounds_counted == 0);
            assert_eq!(outcome.stats.rounds as usize, rounds);
            assert_eq!(bits(&bench.array(name)), before, "{compressor:?}");
            if feedback == Feedback::Ef21m {
                assert_eq!(bench.array("local/embed"), bench.array("global/embed"));
            }
            bench.member.for_each_result(&mut |result| {
                assert!(result.values.contains(&0.75) || feedback == Feedback::Ef21m);
            });
            // There again.
            assert!(!bench.begin() && !bench.member.is_abstaining());
        }
    }
}

#[test]
fn what_is_late_stays_whole_in_exact_dense_tensors_too_and_goes_with_the_next() {
    let algorithm = algorithm(Feedback::Ef14, 0.25);
    let spec = spec(
        algorithm,
        1,
        vec![tensor("w", &[8, 8]), tensor("bias", &[8])],
    );
    let mut bench = Bench::new(&spec);
    assert_eq!(bench.member.export_state().arrays.len(), 1);
    bench.whole_step(&[0, ME], 0.0);
    assert!(bench.array("residual/bias").is_empty());
    let gradient = |step| gradients(&spec, 1, step)[0][1].clone();
    bench.whole_step(&[0, 2], 0.0);
    assert_eq!(bench.array("residual/bias"), gradient(1));

    // A checkpoint keeps it.
    let saved = bench.member.export_state();
    let mut other = Bench::new(&spec);
    other.whole_step(&[0, 2], 0.0);
    other.member.import_state(saved.clone()).unwrap();
    assert_eq!(other.member.export_state(), saved);

    // Late again: both gradients.
    bench.whole_step(&[], 0.0);
    let sum = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<_>>();
    let both = sum(&gradient(2), &gradient(1));
    assert_eq!(bench.array("residual/bias"), both);
    // A skipped step changes nothing.
    bench.begin();
    bench.fill();
    for frame in bench.frames() {
        let (header, body) = shard::non_finite(&bench.plan, &frame);
        let shard = frame.shard;
        bench.input(Input::Frame {
            shard,
            header,
            body,
        });
    }
    assert!(bench.member.commit().skipped);
    assert_eq!(bench.array("residual/bias"), both);
    // Counted: all of it has gone.
    bench.begin();
    bench.fill();
    let sketch = bench.frames().remove(0);
    let all = sum(&gradient(4), &both);
    let dense: Vec<u8> = all.iter().flat_map(|x| x.to_le_bytes()).collect();
    assert!(sketch.body.ends_with(&dense));
    bench.answer(&sketch, &[ME], 0.0);
    bench.finish(&[ME], 0.0);
    assert!(bench.array("residual/bias").is_empty());
}

/// The naive model of ef14 with a zero mean: what was sent and counted is gone, all else stays.
#[test]
fn what_was_counted_is_what_the_rosters_say() {
    let spec = one_matrix();
    let mut bench = Bench::new(&spec);
    let mut residual = vec![0.0f32; 64];
    for step in 0..6 {
        let (first, second) = (step % 2 == 0, step % 3 == 0);
        let gradient = &gradients(&spec, 1, step)[0][0];
        residual.iter_mut().zip(gradient).for_each(|(e, g)| *e += g);
        bench.begin();
        bench.fill();
        let ranks = |counted| if counted { [ME, 2] } else { [0, 2] };
        let sketch = bench.frames().remove(0);
        bench.answer(&sketch, &ranks(first), 0.0);
        let values = bench.frames().remove(0);
        // The flag may be another worker's.
        let (mut header, body) = shard::answer(&bench.plan, &values, &ranks(second), 0.0);
        header.flags.counted = step < 3;
        let shard = ShardId(0);
        bench.input(Input::Frame {
            shard,
            header,
            body,
        });
        if second {
            residual[..16].fill(0.0);
        }
        let outcome = bench.member.commit();
        assert_eq!(outcome.stats.rounds_counted, u32::from(second));
        assert_eq!(bits(&bench.array("residual/w")), bits(&residual), "{step}");
    }
}

/// Two members of ef21 by hand: whatever one of them misses, its h is H when it comes back.
#[test]
fn under_ef21_one_that_was_not_counted_takes_the_mean_for_its_own() {
    let spec = spec(
        algorithm(Feedback::Ef21, 0.25),
        1,
        vec![tensor("w", &[8, 8])],
    );
    let mut bench = Bench::new(&spec);
    bench.whole_step(&[ME, 2], 0.5);
    assert_ne!(bench.array("local/w"), bench.array("global/w"));
    bench.whole_step(&[0, 2], 0.25);
    let global = bench.array("global/w");
    assert_eq!(bench.array("local/w"), global);
    assert_eq!(global[..16], [0.75; 16]);
    bench.whole_step(&[ME], 0.25);
    assert_ne!(bench.array("local/w"), bench.array("global/w"));
}

#[test]
fn a_nan_that_came_too_late_leaves_no_trace() {
    for compressor in [Compressor::Arc, Compressor::Randk, Compressor::Topk] {
        let algorithm = AlgorithmConfig {
            compressor,
            ..algorithm(Feedback::Ef14, 0.25)
        };
        let mut bench = Bench::new(&spec(algorithm, 1, vec![tensor("w", &[8, 8])]));
        bench.whole_step(&[0, 2], 0.0);
        let before = bits(&bench.array("residual/w"));
        bench.begin();
        let nan = [f32::NAN; 64];
        let gradient = Gradient::F32(&nan);
        bench
            .member
            .fill(TensorId(0), gradient, &mut bench.out)
            .unwrap();
        assert!(matches!(&bench.out[..], [Output::Frame(f)] if f.header.flags.non_finite));
        let outcome = bench.finish(&[0, 2], 0.5);
        assert!(!outcome.skipped);
        assert_eq!(bits(&bench.array("residual/w")), before);
        bench.member.for_each_result(&mut |result| {
            assert!(result.values.iter().all(|x| x.is_finite()) && result.values.contains(&0.5));
        });
    }
}

/// Rounds that were late, skipped, abstained from or made anew, with the device backend: the same states.
#[test]
fn the_same_on_a_device() {
    ON_DEVICE.set(true);
    one_that_is_behind_takes_the_results_and_keeps_its_state_to_the_bit();
    what_is_late_stays_whole_in_exact_dense_tensors_too_and_goes_with_the_next();
    what_was_counted_is_what_the_rosters_say();
    under_ef21_one_that_was_not_counted_takes_the_mean_for_its_own();
    a_nan_that_came_too_late_leaves_no_trace();
}
