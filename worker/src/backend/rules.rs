//! What the algorithm's settings mean for a tensor's feedback state, whichever memory it lies in.

use arc_topk_common::compress::{FeedbackParams, TensorState};
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback};
use arc_topk_common::plan::{Plan, Segment, TensorPlan};

/// How a tensor's feedback works.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Rule {
    /// The rule that the tensor really needs.
    pub(super) feedback: Feedback,
    pub(super) params: FeedbackParams,
    /// What a worker sends of this tensor must be kept when it is not counted, although the rule has no place for it.
    /// (ef21 and ef21m lose it: they average estimates, and that of a tensor that travels whole is the gradient of one step.)
    pub(super) keeps_late: bool,
}

impl Rule {
    pub(super) fn of(tensor: &TensorPlan, algorithm: &AlgorithmConfig) -> Self {
        Self {
            feedback: feedback_of(tensor, algorithm),
            params: FeedbackParams {
                eta: algorithm.eta,
                // The residual of a tensor that travels whole is rounding alone: nothing stale to forget.
                decay: if tensor.sparse {
                    algorithm.feedback_decay
                } else {
                    1.0
                },
            },
            keeps_late: !tensor.sparse
                && algorithm.compressor != Compressor::Dense
                && algorithm.feedback == Feedback::Ef14
                && !algorithm.rounds_dense_tensors(),
        }
    }
}

/// Where all rows always travel, ef21's estimate would be the gradient itself: only what rounding loses needs a place, which
/// is ef14's residual.
fn feedback_of(tensor: &TensorPlan, algorithm: &AlgorithmConfig) -> Feedback {
    if !tensor.sparse {
        let lossy = algorithm.rounds_dense_tensors();
        return TensorState::for_dense_tensor(algorithm.feedback, 0, lossy).feedback;
    }
    match (algorithm.compressor, algorithm.feedback) {
        (Compressor::Dense, Feedback::None) => Feedback::None,
        (Compressor::Dense, _) if algorithm.codec_dense().is_lossy() => Feedback::Ef14,
        (Compressor::Dense, _) => Feedback::None,
        (_, feedback) => feedback,
    }
}

/// Segments of every tensor, by ascending rows.
pub(super) fn tensor_segments(plan: &Plan) -> Vec<Vec<Segment>> {
    let mut segments = vec![Vec::new(); plan.tensors.len()];
    for segment in plan
        .buckets
        .iter()
        .flat_map(|bucket| bucket.segments.iter().flatten())
    {
        segments[segment.tensor.index()].push(*segment);
    }
    for segments in &mut segments {
        segments.sort_unstable_by_key(|segment| segment.row_start);
    }
    segments
}
