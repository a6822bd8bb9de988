//! Any sequence of events.

use super::*;

/// What may happen to a member, in numbers.
#[derive(Clone, Debug)]
enum Event {
    Up(u16, u64, bool, u64),
    Down(u16),
    Answer(usize, bool, u16),
    Garbage(u16, Vec<u8>, Vec<u8>),
    Control(u16, u8, u32),
    Tick(u64),
    Trainer,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        2 => (0..3u16, 0..3u64, any::<bool>(), 0..9u64).prop_map(|(s, i, r, t)| Event::Up(s, i, r, t)),
        1 => (0..3u16).prop_map(Event::Down),
        6 => (any::<usize>(), any::<bool>(), 0..3u16).prop_map(|(f, c, l)| Event::Answer(f, c, l)),
        1 => (0..4u16, prop::collection::vec(any::<u8>(), 32), prop::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(s, h, b)| Event::Garbage(s, h, b)),
        2 => (0..3u16, any::<u8>(), 0..6u32).prop_map(|(s, kind, x)| Event::Control(s, kind, x)),
        1 => (0..3000u64).prop_map(Event::Tick),
        4 => Just(Event::Trainer),
    ]
}

fn some_control(kind: u8, x: u32) -> Control {
    match kind % 8 {
        0 => membership(x, &[0, 1, 2], &[2]),
        1 => membership(x, &[0, 1], &[0, 1]),
        2 => Control::Donate,
        3 => Control::Refused {
            code: RefusalCode::Shutdown,
            detail: String::new(),
        },
        4 => Control::Waiting {
            joined: 1,
            world: 2,
        },
        5 => Control::Ready { step: Step(9) },
        6 => Control::DigestsDiffer {
            step: Step(0),
            ranks: vec![],
        },
        _ => Control::Away,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// No sequence of inputs is a panic, nothing follows a failure, and whatever is sent goes over a link that is up.
    #[test]
    fn any_order_of_events_is_survived(
        events in prop::collection::vec(event(), 0..120),
        compressor in prop::sample::select(vec![Compressor::Arc, Compressor::Randk, Compressor::Topk]),
        waited in any::<bool>(),
    ) {
        let algorithm = AlgorithmConfig { compressor, ..algorithm(Feedback::Ef14, 0.3) };
        let spec = spec(algorithm, 2, vec![tensor("w", &[12, 8]), tensor("b", &[8]), tensor("v", &[9, 16])]);
        let mut bench = Bench::dialling(&spec, waited);
        let mut sent: Vec<Outgoing> = Vec::new();
        let mut open = false;
        for event in events {
            bench.take();
            let failed = bench.member.has_failed();
            match event {
                Event::Up(s, incarnation, retell, step) => {
                    let shard = ShardId(s);
                    let Intent::Member { place, .. } = bench.member.intent(shard) else { unreachable!() };
                    let welcome = Welcome { shard_incarnation: incarnation, retell, place, step: Step(step), snapshot: false };
                    bench.input(Input::LinkUp { shard, welcome });
                }
                Event::Down(s) => bench.down(s),
                Event::Answer(at, counted, lead) if !sent.is_empty() => {
                    let frame = sent[at % sent.len()].clone();
                    // Absent frames cannot have been counted, and twice the same frame gets twice the same answer.
                    let mine = counted && !frame.header.flags.absent && frame.header.bucket.0.is_multiple_of(2);
                    bench.answer_ahead(&frame, if mine { &[ME] } else { &[0] }, 0.5, lead);
                }
                Event::Answer(..) => {}
                Event::Garbage(s, header, body) => {
                    if let Ok(header) = FrameHeader::decode(&header.try_into().unwrap()) {
                        bench.input(Input::Frame { shard: ShardId(s), header, body: body.into() });
                    }
                }
                Event::Control(s, kind, x) => bench.control(s, some_control(kind, x)),
                Event::Tick(more) => {
                    bench.now += ms(more);
                    bench.member.tick(bench.now, &mut bench.out);
                }
                Event::Trainer => {
                    if !open {
                        if !bench.begin() {
                            bench.fill();
                        }
                        open = true;
                    } else if bench.member.is_complete() {
                        bench.member.commit();
                        open = false;
                    }
                }
            }
            if failed {
                prop_assert!(bench.out.is_empty(), "{:?}", bench.out);
            }
            for output in &bench.out {
                if let Output::Frame(frame) = output {
                    prop_assert!(bench.member.is_up(frame.shard));
                    if !frame.header.flags.held {
                        sent.push(frame.clone());
                    }
                }
            }
        }
        let e = bench.member.export_state();
        prop_assert!(e.arrays.iter().all(|(_, values)| values.iter().all(|x| x.is_finite())));
    }
}
