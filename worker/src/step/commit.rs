//! The end of a step: feedback state moves on, results are in place, numbers are summed up.

use super::round::Committed;
use super::{StepMachine, StepStats};
use arc_topk_common::config::algorithm::Feedback;

impl StepMachine {
    pub(super) fn commit_rounds(&mut self, measure: bool) -> Committed {
        // ef21's result is the whole estimate H, whichever rows moved it.
        let estimates = matches!(
            self.plan.spec.algorithm.feedback,
            Feedback::Ef21 | Feedback::Ef21m
        );
        for (came, tensor) in self.came.iter_mut().zip(&self.plan.tensors) {
            came.rows.clear();
            came.all = !tensor.sparse || estimates;
        }
        let mut total = Committed::default();
        let came = &mut self.came;
        for round in self.rounds.iter_mut().flatten() {
            let committed = round.commit(&mut *self.backend, measure, &mut |segment, rows| {
                let came = &mut came[segment.segment.tensor.index()];
                match rows {
                    Some(rows) => came.rows.extend_from_slice(rows),
                    None => came.all = true,
                }
            });
            total.sparse.input += committed.sparse.input;
            total.sparse.sent += committed.sparse.sent;
            total.residual += committed.residual;
            total.elements_came += committed.elements_came;
            total.rounds += committed.rounds;
            total.counted += committed.counted;
        }
        for came in &mut self.came {
            // Shards own ranges in any order.
            came.rows.sort_unstable();
        }
        total
    }

    pub(super) fn stats(&self, committed: &Committed, measured: bool) -> StepStats {
        let sparse_elements = self
            .plan
            .tensors
            .iter()
            .filter(|t| t.sparse)
            .map(|t| (t.rows * t.width) as u64);
        let sparse_elements: u64 = sparse_elements.sum();
        let elements: u64 = self
            .plan
            .tensors
            .iter()
            .map(|tensor| tensor.elements as u64)
            .sum();
        let captured = committed.sparse.sent / committed.sparse.input;
        StepStats {
            sent: self.traffic.sent,
            received: self.traffic.received,
            dense_equivalent_bytes: 4 * elements,
            captured_energy: (measured && committed.sparse.input > 0.0).then_some(captured as f32),
            density: if sparse_elements == 0 {
                1.0
            } else {
                committed.elements_came as f32 / sparse_elements as f32
            },
            gradient_norm: measured.then(|| self.gradient_energy.sqrt() as f32),
            residual_norm: measured.then(|| committed.residual.sqrt() as f32),
            rounds: committed.rounds,
            rounds_counted: committed.counted,
            compress_seconds: 0.0,
            wait_seconds: 0.0,
            device: None,
        }
    }
}
