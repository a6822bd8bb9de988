//! The trainer's side, and the shards' answers.

use super::{Member, Notice, Output};
use crate::backend::Gradient;
use crate::step::{ImportError, StepError, StepMachine, StepOutcome, TensorResult, WorkerState};
use arc_topk_common::ids::{ShardId, Step, TensorId};
use arc_topk_common::wire::{Control, FrameHeader};
use bytes::Bytes;

impl Member {
    /// The step machine, to look at.
    #[must_use]
    pub fn machine(&self) -> &StepMachine {
        &self.machine
    }

    /// The step machine, to set what is measured. Frames must come and go through the member.
    pub fn machine_mut(&mut self) -> &mut StepMachine {
        &mut self.machine
    }

    /// Opens the step. True: the job has left it behind, so that no gradients are needed. They may be pushed and are
    /// ignored then.
    ///
    /// A worker that joined and has caught up tells the shards here that they may wait for it.
    pub fn begin(&mut self, out: &mut Vec<Output>) -> bool {
        if self.failed {
            self.machine.begin();
            return false;
        }
        let behind = self.machine.behind(self.waited);
        if let Some(job) = behind {
            let step = self.machine.step();
            out.push(Output::Notice(Notice::Behind { step, job }));
            self.machine.begin_abstaining(&mut self.frames);
        } else {
            self.machine.begin();
            self.waited = true;
            self.tell_readiness(out);
        }
        self.send_frames(out);
        behind.is_some()
    }

    /// Whether the open step only takes results, as [`Member::begin`] said.
    #[must_use]
    pub fn is_abstaining(&self) -> bool {
        self.machine.is_abstaining()
    }

    /// Hands over a gradient; see [`StepMachine::fill_any`].
    ///
    /// # Errors
    /// As there.
    pub fn fill(
        &mut self,
        tensor: TensorId,
        gradient: Gradient<'_>,
        out: &mut Vec<Output>,
    ) -> Result<(), StepError> {
        let filled = self.machine.fill_any(tensor, gradient, &mut self.frames);
        self.send_frames(out);
        filled
    }

    /// No more gradients come in this step; see [`StepMachine::flush`].
    ///
    /// # Errors
    /// As there.
    pub fn flush(&mut self, out: &mut Vec<Output>) -> Result<(), StepError> {
        let flushed = self.machine.flush(&mut self.frames);
        self.send_frames(out);
        flushed
    }

    /// Whether [`Member::commit`] may be called.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.machine.is_complete()
    }

    /// Ends the step; see [`StepMachine::commit`].
    ///
    /// # Panics
    /// As there.
    pub fn commit(&mut self) -> StepOutcome {
        self.machine.commit()
    }

    /// See [`StepMachine::for_each_result`].
    pub fn for_each_result(&self, f: &mut dyn FnMut(TensorResult<'_>)) {
        self.machine.for_each_result(f);
    }

    /// See [`StepMachine::abandon`].
    pub fn abandon(&mut self) {
        self.machine.abandon();
    }

    /// See [`StepMachine::give_back`].
    pub fn give_back(&mut self) {
        self.machine.give_back();
    }

    /// See [`StepMachine::finished`].
    pub fn finished(&mut self) -> Option<u64> {
        self.machine.finished()
    }

    /// See [`StepMachine::export_state`].
    #[must_use]
    pub fn export_state(&self) -> WorkerState {
        self.machine.export_state()
    }

    /// See [`StepMachine::import_state`].
    ///
    /// # Errors
    /// As there.
    pub fn import_state(&mut self, state: WorkerState) -> Result<(), ImportError> {
        self.machine.import_state(state)
    }

    /// Shard 0 waits for a snapshot of this replica, to be taken at the next end of a step. Stays true until
    /// [`Member::donation_taken`].
    #[must_use]
    pub fn donation_due(&self) -> bool {
        self.donation_due
    }

    /// The copy is made and is on its way to the store: shards keep the answers from its step on. It serves all that ask
    /// until it is there.
    pub fn donation_taken(&mut self, step: Step, out: &mut Vec<Output>) {
        self.donation_due = false;
        self.donates = true;
        if !self.failed {
            for shard in (0..self.machine.plan().spec.shards).map(ShardId) {
                self.send(shard, Control::Donating { step }, out);
            }
        }
    }

    /// The copy did not come into the store: another one is due.
    pub fn donation_failed(&mut self) {
        self.donation_due |= self.donates;
        self.donates = false;
    }

    /// The snapshot of this step is in the store.
    pub fn donated(&mut self, step: Step, out: &mut Vec<Output>) {
        self.donates = false;
        if self.failed {
            return;
        }
        if self.is_up(ShardId(0)) {
            self.send(ShardId(0), Control::Donated { step }, out);
        } else {
            self.donated = Some(step);
        }
    }

    /// Sends shard 0 a message of the trainer (Report, Digest), if the connection is there. Best effort.
    pub fn tell_coordinator(&mut self, message: Control, out: &mut Vec<Output>) {
        if !self.failed {
            self.send(ShardId(0), message, out);
        }
    }

    /// No more steps come. Rounds need not wait for this worker, which is still there.
    pub fn step_aside(&mut self, out: &mut Vec<Output>) {
        if self.failed || self.left {
            return;
        }
        self.waited = false;
        self.tell_readiness(out);
    }

    /// Leaves the job in order. Connections that close from now on are no loss.
    pub fn leave(&mut self, out: &mut Vec<Output>) {
        if self.failed || self.left {
            return;
        }
        self.left = true;
        for shard in (0..self.links.len() as u16).map(ShardId) {
            self.send(shard, Control::Leave, out);
        }
    }

    pub(super) fn frame(
        &mut self,
        shard: ShardId,
        header: FrameHeader,
        body: Bytes,
        out: &mut Vec<Output>,
    ) {
        if !self.is_up(shard) {
            return;
        }
        match self.machine.handle(shard, header, body, &mut self.frames) {
            Ok(()) => {
                self.send_frames(out);
            }
            Err(error) => self.fail(error.into(), out),
        }
    }
}
