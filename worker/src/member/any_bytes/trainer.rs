//! The trainer's side: its calls in their order, and what a committed step must be.

use super::shards::report;
use super::{ME, Play, Source, Taken};
use crate::backend::Gradient;
use crate::step::StepOutcome;
use arc_topk_common::ids::{ShardId, TensorId};
use arc_topk_common::wire::{FrameKind, RoundShape};

impl Play {
    fn begin(&mut self) {
        if self.open {
            return;
        }
        self.open = true;
        self.filled.fill(false);
        self.taken.clear();
        self.sent.clear();
        self.lines.iter_mut().for_each(|line| line.went.clear());
        let behind = self.call(|member, _, out| member.begin(out));
        assert_eq!(behind, self.member.is_abstaining());
    }

    /// Every gradient that is missing, or no more of them.
    pub(super) fn whole_gradient(&mut self) {
        self.begin();
        for tensor in 0..self.filled.len() {
            if !self.filled[tensor] {
                let values = vec![0.5; self.plan.tensors[tensor].elements];
                self.fill_one(tensor, Gradient::F32(&values));
            }
        }
    }

    /// A gradient as it may be.
    pub(super) fn fill(&mut self, source: &mut Source<'_>) {
        self.begin();
        let tensor = source.below(self.filled.len() as u64 + 1) as usize;
        let elements = self.plan.tensors.get(tensor).map_or(1, |t| t.elements);
        let value = f32::from(source.byte()) - 100.0;
        let mut values = vec![value; elements];
        let choice = source.byte();
        match choice {
            240.. => values.push(value),
            200..240 => values[usize::from(choice) % elements] = f32::NAN,
            _ => {}
        }
        if choice % 8 == 7 {
            self.fill_one(tensor, Gradient::Absent);
        } else {
            self.fill_one(tensor, Gradient::F32(&values));
        }
    }

    fn fill_one(&mut self, tensor: usize, gradient: Gradient<'_>) {
        let elements = self.plan.tensors.get(tensor).map(|tensor| tensor.elements);
        let fits = match gradient.elements() {
            Some(actual) => elements == Some(actual),
            None => elements.is_some(),
        };
        let missing = self.filled.get(tensor) == Some(&false);
        let id = TensorId(tensor as u32);
        let filled = self.call(|member, _, out| {
            let before = out.len();
            let filled = member.fill(id, gradient, out);
            assert!(filled.is_ok() || out.len() == before, "nothing changes");
            filled
        });
        assert_eq!(filled.is_ok(), fits && missing, "{filled:?}");
        if filled.is_ok() && !self.member.is_abstaining() {
            self.filled[tensor] = true;
        }
    }

    /// What else a trainer does.
    pub(super) fn trainer(&mut self, source: &mut Source<'_>) {
        let step = self.step();
        match source.below(8) {
            0 | 1 if self.member.donation_due() => {
                self.call(|member, _, out| member.donation_taken(step, out));
                assert!(!self.member.donation_due());
            }
            2 | 3 => self.call(|member, _, out| member.donated(step, out)),
            4 => self.call(|member, _, out| member.tell_coordinator(report(step), out)),
            5 => {
                self.begin();
                self.call(|member, _, out| {
                    member.flush(out).expect("the CPU does not fail");
                });
                if !self.member.is_abstaining() {
                    self.filled.fill(true);
                }
            }
            6 if !self.open => self.save_and_go_on(),
            7 if source.byte() >= 192 => {
                self.left = true;
                self.call(|member, _, out| member.leave(out));
            }
            _ => {}
        }
    }

    fn save_and_go_on(&mut self) {
        let state = self.member.export_state();
        let loaded = self.member.import_state(state.clone());
        assert_eq!(loaded, Ok(()), "its own state fits");
        let again = self.member.export_state();
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!((state.step, state.update), (again.step, again.update));
        for ((name, before), (same, after)) in state.arrays.iter().zip(&again.arrays) {
            assert_eq!((name, bits(before)), (same, bits(after)));
        }
    }

    pub(super) fn commit(&mut self) {
        if !self.member.is_complete() {
            return;
        }
        assert!(self.open, "between steps nothing is complete");
        let abstained = self.member.is_abstaining();
        let (step, update) = (self.step(), self.member.machine().update());
        let outcome = self.member.commit();
        self.open = false;
        self.committed += 1;
        assert_eq!((outcome.step, outcome.update), (step, update));
        let skipped = self.taken.values().any(|taken| taken.non_finite);
        assert_eq!(outcome.skipped, skipped, "all skip, or none");
        self.check_counted(&outcome);
        assert!(!abstained || outcome.stats.rounds_counted == 0);
        self.check_kept(&outcome);
        let mut results = 0;
        self.member.for_each_result(&mut |result| {
            assert!(!result.values.is_empty());
            results += 1;
        });
        let tensors = if skipped { 0 } else { self.filled.len() };
        assert_eq!(results, tensors, "a result of each tensor");
        self.check();
    }

    /// By the rosters of the answers that were taken.
    fn check_counted(&self, outcome: &StepOutcome) {
        let (mut rounds, mut counted) = (0, 0);
        for bucket in &self.plan.buckets {
            for shard in (0..self.plan.spec.shards).map(ShardId) {
                let shape = RoundShape::new(&self.plan, bucket.id, shard, outcome.update);
                let phases = shape.phases().len();
                if phases == 0 {
                    continue;
                }
                let holds_me = |phase| {
                    let taken: Option<&Taken> = self.taken.get(&(shard, bucket.id, phase));
                    taken.map(|taken| (taken.kind, taken.holds_me))
                };
                let restored = holds_me(phases);
                let (kind, last) = restored
                    .or_else(|| holds_me(phases - 1))
                    .unwrap_or((FrameKind::Selection, false));
                let first = holds_me(0).is_some_and(|(_, holds_me)| holds_me);
                // The dense tensors of arc come with the Selection.
                let both = phases == 2 && !shape.dense.is_empty() && restored.is_none();
                assert!(outcome.skipped || !kind.goes_on(), "the round has closed");
                rounds += 1;
                counted += u32::from(last && (first || !both));
            }
        }
        if outcome.skipped {
            (rounds, counted) = (0, 0);
        }
        let stats = (outcome.stats.rounds, outcome.stats.rounds_counted);
        assert_eq!(stats, (rounds, counted), "{ME} and the rosters disagree");
    }

    /// What was taken is what would be told to a shard that has forgotten it.
    fn check_kept(&self, outcome: &StepOutcome) {
        let mut kept = 0;
        for shard in (0..self.plan.spec.shards).map(ShardId) {
            for held in self.member.machine().held(shard) {
                let header = held.header;
                if header.step != outcome.step {
                    continue;
                }
                let shape = RoundShape::new(&self.plan, header.bucket, shard, header.update);
                let key = (shard, header.bucket, shape.phase_of(header.kind));
                let taken = self.taken.get(&key).map(|taken| (taken.kind, &taken.body));
                assert_eq!(taken, Some((header.kind, &held.body)));
                kept += 1;
            }
        }
        assert_eq!(kept, self.taken.len(), "every answer is kept");
    }
}
