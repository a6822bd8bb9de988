//! The workers' trainers: gradients, steps that end, and what is checked then.

use super::{Happening, World};
use crate::check::{LifeId, Violation, broken};
use crate::estimates::Answers;
use crate::trainer::Model;
use crate::world::OpenStep;
use arc_topk_common::config::algorithm::Feedback;
use arc_topk_common::ids::Step;
use arc_topk_common::wire::{Control, FrameKind};
use arc_topk_worker::backend::Gradient;
use arc_topk_worker::step::StepOutcome;
use core::time::Duration;

impl World<'_> {
    /// The trainer begins its next step, or has done them all.
    pub(super) fn begin(&mut self, life: LifeId, worker: usize) -> Result<(), Violation> {
        let case = self.case;
        let process = &mut self.workers[worker];
        if !process.alive || process.life != life || process.is_open {
            return Ok(());
        }
        if process.step().0 >= case.steps {
            return self.after(worker);
        }
        let mut out = Vec::new();
        process.open = OpenStep::default();
        process.is_open = true;
        let member = process
            .member
            .as_mut()
            .expect("a worker that trains is a member");
        let behind = member.begin(&mut out);
        if behind {
            self.coverage.count("steps begun behind");
        } else {
            process.open.next_fill = Some(0);
            let time = self.fill_time(worker);
            self.schedule(time, Happening::Fill { life, worker });
        }
        self.outputs(worker, out)?;
        self.after(worker)
    }

    /// Time until the next tensor's gradient is there.
    pub(super) fn fill_time(&mut self, worker: usize) -> Duration {
        let case = self.case;
        let straggles = self.workers[worker].open.next_fill == Some(0)
            && self.randoms.compute.chance(case.straggler_per_mille);
        let time = self.randoms.compute.time(case.compute.clone()) / case.plan.tensors.len() as u32;
        if straggles {
            self.coverage.count("slow steps");
            self.randoms.compute.time(case.compute.clone()) * 10
        } else {
            time
        }
    }

    pub(super) fn fill(&mut self, life: LifeId, worker: usize) -> Result<(), Violation> {
        let case = self.case;
        let process = &mut self.workers[worker];
        if !process.alive || process.life != life || !process.is_open {
            return Ok(());
        }
        let Some(at) = process.open.next_fill else {
            return Ok(());
        };
        let mut order = case.plan.buckets.iter().flat_map(|bucket| &bucket.tensors);
        let tensor = *order.nth(at).expect("fills end with the last tensor");
        let member = process
            .member
            .as_mut()
            .expect("a worker that trains is a member");
        let (rank, step) = (member.place().rank, member.machine().step());
        let mut gradient = Model::gradient(case, process.model.digest(), rank, step, tensor);
        if Model::poisoned(case, rank, step) == Some(tensor) {
            gradient[0] = f32::NAN;
            self.coverage.count("gradients with a NaN");
        }
        let mut out = Vec::new();
        member
            .fill(tensor, Gradient::F32(&gradient), &mut out)
            .or_else(|error| broken("P fill", error.to_string()))?;
        process.open.gradients.insert(tensor, gradient);
        let last = at + 1 == case.plan.tensors.len();
        process.open.next_fill = (!last).then_some(at + 1);
        if last {
            member
                .flush(&mut out)
                .expect("simulated workers have no device");
        } else {
            let time = self.fill_time(worker);
            self.schedule(time, Happening::Fill { life, worker });
        }
        self.outputs(worker, out)?;
        self.after(worker)
    }

    pub(super) fn commit(&mut self, worker: usize) -> Result<(), Violation> {
        let case = self.case;
        let process = &mut self.workers[worker];
        let life = process.life;
        let member = process
            .member
            .as_mut()
            .expect("a complete step has a member");
        let rank = member.place().rank;
        let abstained = member.is_abstaining();
        let outcome = member.commit();
        let (step, update) = (outcome.step, outcome.update);
        process.is_open = false;
        let open = core::mem::take(&mut process.open);
        if !outcome.skipped {
            process.model.apply(&mut |f| member.for_each_result(f));
            process
                .books
                .settle(case, rank, step, update, &open, abstained);
            if case.exact && case.plan.spec.algorithm.feedback == Feedback::Ef14 {
                process
                    .books
                    .check(case, &member.export_state())
                    .or_else(|detail| {
                        broken(
                            "I2 given = residual + counted",
                            format!("rank {rank} after step {step}: {detail}"),
                        )
                    })?;
            }
        }
        self.note(format_args!(
            "{} applies step {step}, update {update}{}{}",
            self.name(life),
            if outcome.skipped { ", skipped" } else { "" },
            if abstained { ", behind" } else { "" }
        ));
        self.coverage.count(if outcome.skipped {
            "steps skipped"
        } else {
            "steps applied"
        });
        let answers = open
            .answers
            .iter()
            .map(|(key, (_, answer))| (*key, answer.clone()));
        let answers = answers.collect();
        self.checker.committed(life, step, &answers)?;
        self.check_estimates(worker, &outcome, &answers)?;
        self.progressed(step);
        self.report(worker)?;
        self.donate(worker)?;
        if self.workers[worker].leaving {
            return self.leave(worker);
        }
        self.schedule(
            Duration::from_micros(200),
            Happening::Begin { life, worker },
        );
        Ok(())
    }

    /// What ef21 keeps, after a step that was not skipped.
    pub(super) fn check_estimates(
        &mut self,
        worker: usize,
        outcome: &StepOutcome,
        answers: &Answers,
    ) -> Result<(), Violation> {
        let case = self.case;
        let process = &self.workers[worker];
        let (Some(member), false) = (&process.member, outcome.skipped) else {
            return Ok(());
        };
        if !case.plan.spec.algorithm.keeps_estimates() {
            return Ok(());
        }
        if answers.keys().any(|key| key.2 == FrameKind::Restore.into()) {
            self.coverage.count("steps that made H anew");
        }
        let rank = member.place().rank;
        let after = Step(outcome.step.0 + 1);
        let chain = self.checker.chain(process.life, after);
        self.estimates
            .check(case, rank, outcome, chain, &member.export_state(), answers)
            .or_else(|detail| {
                let step = outcome.step;
                broken(
                    "I2 H is the mean of h",
                    format!("rank {rank} after step {step}: {detail}"),
                )
            })
    }

    /// The digest of the parameters goes to shard 0.
    pub(super) fn report(&mut self, worker: usize) -> Result<(), Violation> {
        let process = &mut self.workers[worker];
        let step = process.step();
        if self.case.digest_every == 0 || !step.0.is_multiple_of(self.case.digest_every) {
            return Ok(());
        }
        let mut digest = [0; 32];
        digest[..8].copy_from_slice(&process.model.digest().to_le_bytes());
        let mut out = Vec::new();
        if let Some(member) = &mut process.member {
            member.tell_coordinator(Control::Digest { step, digest }, &mut out);
        }
        self.outputs(worker, out)
    }

    /// One that has nothing to finish leaves at once.
    pub(super) fn leaves_if_idle(&mut self, worker: usize) -> Result<(), Violation> {
        let process = &self.workers[worker];
        if process.is_open || process.frozen_until.is_some() {
            return Ok(());
        }
        self.leave(worker)
    }

    pub(super) fn leave(&mut self, worker: usize) -> Result<(), Violation> {
        let mut out = Vec::new();
        if let Some(member) = &mut self.workers[worker].member {
            member.leave(&mut out);
        }
        self.outputs(worker, out)?;
        self.rejoin(worker, "it leaves", Duration::ZERO);
        Ok(())
    }
}
