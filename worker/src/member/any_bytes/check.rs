//! What is asserted of everything that comes out, and of what is held.

use super::Play;
use crate::member::{Member, Notice, Output};
use crate::step::{Outgoing, RETAINED_STEPS};
use arc_topk_common::ids::ShardId;
use arc_topk_common::wire::{Control, MAX_ROSTER_BYTES, RoundShape};
use core::time::Duration;

/// What came out of one call so far.
#[derive(Default)]
struct Heard {
    /// Held frames that were announced and must follow at once.
    announced: usize,
    told: usize,
    again: usize,
    failed: bool,
}

impl Play {
    /// Calls the member, and ticks as a shell does.
    pub(super) fn call<R>(
        &mut self,
        call: impl FnOnce(&mut Member, Duration, &mut Vec<Output>) -> R,
    ) -> R {
        let mut out = Vec::new();
        let failed = self.member.has_failed();
        let answer = call(&mut self.member, self.now, &mut out);
        self.hear_all(failed, out);
        let (failed, mut out) = (self.member.has_failed(), Vec::new());
        self.member.tick(self.now, &mut out);
        self.hear_all(failed, out);
        self.check();
        answer
    }

    /// Before the deadline nothing happens by itself.
    pub(super) fn pass_the_deadline(&mut self) {
        let Some(deadline) = self.member.next_deadline() else {
            return;
        };
        let before = deadline.saturating_sub(Duration::from_nanos(1));
        if before > self.now {
            self.now = before;
            let mut out = Vec::new();
            self.member.tick(before, &mut out);
            assert_eq!(out, [], "something happened before the deadline");
        }
        self.now = deadline;
        self.call(|member, now, out| member.tick(now, out));
    }

    fn hear_all(&mut self, failed: bool, out: Vec<Output>) {
        assert!(!failed || out.is_empty(), "nothing follows a failure");
        let mut heard = Heard::default();
        for output in out {
            assert!(!heard.failed, "nothing follows a failure");
            let held = matches!(&output, Output::Frame(frame) if frame.header.flags.held);
            assert_eq!(
                held,
                heard.announced > 0,
                "as many held frames as announced"
            );
            match output {
                Output::Dial { shard } => {
                    assert!(!self.lines[shard.index()].up && !self.left);
                }
                Output::Control { shard, message } => {
                    self.hear_control(shard, &message, &mut heard)
                }
                Output::Frame(frame) => self.hear_sent(&frame, &mut heard),
                Output::Fail(_) => heard.failed = true,
                Output::Notice(Notice::ShardBack { told, again, .. }) => {
                    assert_eq!((told, again), (heard.told, heard.again));
                }
                Output::Notice(_) => {}
            }
        }
        assert_eq!(heard.announced, 0, "as many held frames as announced");
        assert_eq!(self.member.has_failed(), failed || heard.failed);
    }

    fn hear_control(&mut self, shard: ShardId, message: &Control, heard: &mut Heard) {
        let step = self.step();
        let newest = self.member.place().epoch;
        let line = &mut self.lines[shard.index()];
        assert!(line.up, "{} to a shard that is not there", message.name());
        match message {
            Control::Ready { step: from } => {
                assert!(!line.waits, "told twice");
                assert_eq!(*from, step);
                line.waits = true;
            }
            Control::Away => {
                assert!(line.waits, "told twice");
                line.waits = false;
            }
            Control::Membership { epoch, away, .. } => {
                // A restarted one has forgotten who was away.
                let from_there = shard == ShardId(0) && away.is_empty();
                assert!(!from_there, "shard 0 is where it comes from");
                assert!(*epoch == newest && *epoch >= line.epoch);
                line.epoch = *epoch;
            }
            Control::Retelling { frames } => heard.announced = *frames as usize,
            Control::Donated { .. } | Control::Report { .. } => assert_eq!(shard, ShardId(0)),
            Control::Donating { .. } | Control::Leave => {}
            other => panic!("no member sends {}", other.name()),
        }
    }

    fn hear_sent(&mut self, frame: &Outgoing, heard: &mut Heard) {
        let header = frame.header;
        let line = &mut self.lines[frame.shard.index()];
        assert!(line.up, "a frame to a shard that is not there");
        assert_eq!(header.body_bytes as usize, frame.body.len());
        assert_eq!(header.epoch, self.member.place().epoch);
        if header.flags.held {
            heard.announced -= 1;
            heard.told += 1;
            return;
        }
        heard.again += 1;
        assert!(!header.kind.is_down() && self.open);
        assert_eq!(header.step, self.member.machine().step());
        let twice = !line.went.insert((header.bucket, header.kind as u8));
        assert!(!twice, "the same frame twice over one connection");
        let key = (frame.shard, header.bucket, header.kind as u8);
        let first = self.sent.entry(key).or_insert_with(|| frame.body.clone());
        assert_eq!(*first, frame.body, "a frame that is sent again is the same");
    }

    /// Between events.
    pub(super) fn check(&self) {
        let (member, now) = (&self.member, self.now);
        if let Some(deadline) = member.next_deadline() {
            assert!(
                deadline > now,
                "a deadline that is over keeps the shell awake"
            );
        }
        for (shard, line) in (0u16..).map(ShardId).zip(&self.lines) {
            assert!(member.has_failed() || member.is_up(shard) == line.up);
        }
        let waiting = self.check_memory();
        let all = member.is_abstaining() || self.filled.iter().all(|filled| *filled);
        assert!(
            !self.open || !all || member.is_complete() || waiting > 0,
            "it waits for nothing"
        );
        let other = member.place().members.iter().min();
        assert!(member.leader() == member.place().rank || other <= Some(&member.leader()));
    }

    /// Returns the frames that wait for their answers.
    fn check_memory(&self) -> usize {
        let machine = self.member.machine();
        let mut waiting = 0;
        for shard in (0..self.plan.spec.shards).map(ShardId) {
            let update = machine.update();
            let buckets = self.plan.buckets.iter();
            let rounds = buckets.map(|b| RoundShape::new(&self.plan, b.id, shard, update));
            let rounds = rounds.filter(|shape| !shape.phases().is_empty()).count();
            let outstanding = machine.outstanding(shard);
            assert!(outstanding.len() <= rounds);
            let own = |frame: &Outgoing| frame.body.len() <= self.largest_body;
            assert!(outstanding.iter().all(own));
            waiting += outstanding.len();
            // Two phases, and one more where H is made anew.
            let held = machine.held(shard);
            assert!(held.len() <= (RETAINED_STEPS + 1) * rounds * 3);
            let most = self.largest_body + MAX_ROSTER_BYTES;
            assert!(held.iter().all(|frame| frame.body.len() <= most));
        }
        waiting
    }
}
